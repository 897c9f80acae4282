// The model's voice: its Ogg-Opus stream is decoded and played.

import { OggOpusReader, packetSamples } from "./ogg_opus.js";
import { keepRunning, rootMeanSquare } from "./sound.js";
import { stats } from "./stats.js";

const SPEAKER_RATE = 48000; // what every Opus decoder works at: no browser has to resample single packets

const JITTER_SEC = 0.1;
const LATE_SEC = 0.4; // with more than this in store, silent packets are left out
const TOO_LATE_SEC = 2; // with more than this, speech as well
const SILENCE_RMS = 0.003;

/** Plays the model's Ogg-Opus stream without gaps, a little later than it comes. */
export class Speaker {
  #demuxer = new OggOpusReader();
  #head = null;
  #nextFrame = 0; // the frame of the context's clock up to which sound is scheduled
  #microseconds = 0;

  constructor({ onFailure }) {
    this.onFailure = onFailure;
  }

  open() {
    this.context = new AudioContext({ sampleRate: SPEAKER_RATE });
    this.analyser = new AnalyserNode(this.context, { fftSize: 2048 });
    this.analyser.connect(this.context.destination);
    this.wave = new Float32Array(this.analyser.fftSize);
    this.decoder = new AudioDecoder({
      output: (audio) => this.#play(audio),
      error: (error) => this.onFailure(`The model's voice cannot be decoded: ${error.message}`),
    });
    keepRunning(this.context);
  }

  push(bytes) {
    for (const packet of this.#demuxer.push(bytes)) this.#decode(packet);
    stats.bytesSkipped = this.#demuxer.skippedBytes;
  }

  #decode(packet) {
    if (this.decoder.state === "closed" || this.#demuxer.head === null) return;
    if (this.#head !== this.#demuxer.head) this.#configure(this.#demuxer.head);
    stats.packetsReceived += 1;
    // To WebCodecs every Opus packet is a key frame.
    this.decoder.decode(new EncodedAudioChunk({ type: "key", timestamp: this.#microseconds, data: packet }));
    this.#microseconds += Math.round((packetSamples(packet) * 1e6) / 48000);
  }

  #configure(head) {
    this.#head = head;
    this.decoder.configure({
      codec: "opus",
      sampleRate: SPEAKER_RATE,
      numberOfChannels: head[9],
      description: head,
    });
  }

  #play(audio) {
    const samples = new Float32Array(audio.numberOfFrames);
    audio.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
    const { sampleRate } = audio;
    audio.close();
    if (this.context.state === "closed") return;
    stats.secondsDecoded += samples.length / sampleRate;
    if (this.#isLeftOut(samples)) {
      stats.packetsLeftOut += 1;
    } else {
      this.#schedule(samples, sampleRate);
    }
  }

  /** After the network has paused, its backlog would delay the model's voice for the rest of the conversation. */
  #isLeftOut(samples) {
    const stored = this.secondsStored;
    return stored > TOO_LATE_SEC || (stored > LATE_SEC && rootMeanSquare(samples) < SILENCE_RMS);
  }

  get secondsStored() {
    return Math.max(0, this.#nextFrame / SPEAKER_RATE - this.context.currentTime);
  }

  #schedule(samples, sampleRate) {
    const now = Math.ceil(this.context.currentTime * SPEAKER_RATE);
    if (this.#nextFrame < now) {
      if (this.#nextFrame > 0) stats.underruns += 1;
      this.#nextFrame = now + Math.round(JITTER_SEC * SPEAKER_RATE);
    }
    const buffer = new AudioBuffer({ length: samples.length, sampleRate, numberOfChannels: 1 });
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.analyser);
    source.start(this.#nextFrame / SPEAKER_RATE);
    // Whole frames, not seconds: the sum of rounded seconds would open tiny gaps.
    this.#nextFrame += Math.round((samples.length * SPEAKER_RATE) / sampleRate);
    stats.secondsScheduled += buffer.duration;
  }

  /** The loudness of what is heard now; decoding runs ahead of it. */
  get level() {
    if (!this.analyser || this.context.state !== "running") return 0;
    this.analyser.getFloatTimeDomainData(this.wave);
    const level = rootMeanSquare(this.wave);
    stats.loudestPlayed = Math.max(stats.loudestPlayed, level);
    stats.secondsPlayed = stats.secondsScheduled - this.secondsStored;
    return level;
  }

  close() {
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
    if (this.context && this.context.state !== "closed") this.context.close();
  }
}
