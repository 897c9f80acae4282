// The microphone: the user's voice is recorded and encoded as Opus packets.

import { keepRunning, rootMeanSquare } from "./sound.js";
import { stats } from "./stats.js";

export const MICROPHONE_RATE = 24000;
const PACKETS_PER_SECOND = 50;
const BITS_PER_SECOND = 32000;

export const MICROPHONE_ERRORS = {
  NotAllowedError: "The browser may not use the microphone. Allow it for this page and start again.",
  NotFoundError: "There is no microphone.",
  NotReadableError: "The microphone is in use by another program, or does not work.",
};

/** The user's voice as Opus packets of 20 ms. */
export class Microphone {
  level = 0;
  isSending = false; // the server wants no audio before its handshake
  #closed = false;
  #muted = false;
  #samplesEncoded = 0;

  constructor({ onPacket, onFailure }) {
    this.onPacket = onPacket;
    this.onFailure = onFailure;
  }

  async open() {
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: true, channelCount: 1 },
    });
    if (this.#closed) return this.close();
    for (const track of this.stream.getAudioTracks()) {
      track.onended = () => this.onFailure("The microphone has been disconnected.");
    }
    this.mute(this.#muted);
    const source = this.#connectSource();
    await this.context.audioWorklet.addModule("microphone_worklet.js");
    if (this.#closed) return;
    this.#makeEncoder();
    const blocks = new AudioWorkletNode(this.context, "microphone-blocks", {
      processorOptions: { blockSize: Math.round(this.context.sampleRate / PACKETS_PER_SECOND) },
    });
    blocks.port.onmessage = ({ data }) => this.#takeBlock(data);
    // Only what leads to the destination is computed everywhere; the worklet's own output is silent.
    source.connect(blocks).connect(this.context.destination);
    keepRunning(this.context);
  }

  #connectSource() {
    this.context = new AudioContext({ sampleRate: MICROPHONE_RATE });
    try {
      return this.context.createMediaStreamSource(this.stream);
    } catch {
      // Some browsers do not resample the microphone; Opus has no need of it.
      this.context.close();
      this.context = new AudioContext();
      return this.context.createMediaStreamSource(this.stream);
    }
  }

  #makeEncoder() {
    this.encoder = new AudioEncoder({
      output: (chunk, metadata) => this.#takePacket(chunk, metadata),
      error: (error) => this.onFailure(`The microphone cannot be encoded: ${error.message}`),
    });
    this.encoder.configure({
      codec: "opus",
      sampleRate: this.context.sampleRate,
      numberOfChannels: 1,
      bitrate: BITS_PER_SECOND,
      opus: { application: "voip", frameDuration: 1e6 / PACKETS_PER_SECOND },
    });
  }

  #takeBlock(samples) {
    if (this.#closed) return;
    stats.microphoneBlocks += 1;
    this.level = rootMeanSquare(samples);
    if (!this.isSending) return;
    const sampleRate = this.context.sampleRate;
    const audio = new AudioData({
      format: "f32",
      sampleRate,
      numberOfFrames: samples.length,
      numberOfChannels: 1,
      timestamp: Math.round((this.#samplesEncoded * 1e6) / sampleRate),
      data: samples,
    });
    this.#samplesEncoded += samples.length;
    this.encoder.encode(audio);
    audio.close();
  }

  #takePacket(chunk, metadata) {
    if (this.#closed) return;
    const packet = new Uint8Array(chunk.byteLength);
    chunk.copyTo(packet);
    this.onPacket(packet, metadata?.decoderConfig?.description);
  }

  /** A muted microphone goes on sending silence: the model's clock is the user's audio. */
  mute(muted) {
    this.#muted = muted;
    for (const track of this.stream?.getAudioTracks() ?? []) track.enabled = !muted;
  }

  close() {
    this.#closed = true;
    this.level = 0;
    for (const track of this.stream?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
    if (this.encoder && this.encoder.state !== "closed") this.encoder.close();
    if (this.context && this.context.state !== "closed") this.context.close();
  }
}
