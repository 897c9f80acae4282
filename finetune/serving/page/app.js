// The page's conversation with the server over one websocket. Each binary message starts with a byte for its kind.

import { OggOpusReader, OggOpusWriter, concatBytes, packetSamples } from "./ogg_opus.js";

const KIND = { handshake: 0, audio: 1, text: 2, metadata: 4, error: 5 };
const MICROPHONE_RATE = 24000;
const SPEAKER_RATE = 48000; // what every Opus decoder works at: no browser has to resample single packets
const PACKETS_PER_SECOND = 50;
const BITS_PER_SECOND = 32000;

const JITTER_SEC = 0.1;
const LATE_SEC = 0.4; // with more than this in store, silent packets are left out
const TOO_LATE_SEC = 2; // with more than this, speech as well
const SILENCE_RMS = 0.003;

const FRAME_BUDGET_MS = 80;
const PLOT_SEC = 60;
const PLOT_REDRAW_MS = 100;
const PARAGRAPH_PAUSE_MS = 2000;
const METER_RANGE_DB = 60;

const CLOSE_MEANINGS = {
  1000: "The server has ended the conversation.",
  1001: "The server is going away.",
  1006: "The connection was refused or lost.",
  1008: "The server does not admit this conversation.",
  1009: "The server was sent too big a message.",
  1011: "The server has had an error.",
  1013: "The server is busy. Please try again later.",
};

const MICROPHONE_ERRORS = {
  NotAllowedError: "The browser may not use the microphone. Allow it for this page and start again.",
  NotFoundError: "There is no microphone.",
  NotReadableError: "The microphone is in use by another program, or does not work.",
};

const element = (id) => document.getElementById(id);

// Counters of the latest conversation, for tests and for a look from the browser's console.
const stats = (window.conversationStats = {});

function resetStats() {
  Object.assign(stats, {
    state: "idle",
    microphoneBlocks: 0,
    packetsSent: 0,
    packetsReceived: 0,
    secondsDecoded: 0,
    secondsScheduled: 0,
    secondsPlayed: 0,
    loudestPlayed: 0,
    underruns: 0,
    packetsLeftOut: 0,
    bytesSkipped: 0,
    textPieces: 0,
    metadataMessages: 0,
    closeCode: null,
  });
}

function rootMeanSquare(samples) {
  return Math.sqrt(samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length);
}

/** Browsers may create a context asleep. It is not waited for: closing a context rejects this. */
function keepRunning(context) {
  context.resume().catch(() => {});
}

/** The user's voice as Opus packets of 20 ms. */
class Microphone {
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

/** Plays the model's Ogg-Opus stream without gaps, a little later than it comes. */
class Speaker {
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

/** A bar that jumps up with a level and falls slowly. */
class LevelMeter {
  #shown = 0;

  constructor(bar) {
    this.bar = bar;
  }

  show(level) {
    const decibels = 20 * Math.log10(Math.max(level, 1e-6));
    this.#shown = Math.max(fraction(1 + decibels / METER_RANGE_DB), 0.9 * this.#shown);
    setBar(this.bar, this.#shown);
  }
}

function fraction(value) {
  return Math.min(1, Math.max(0, value));
}

function setBar(bar, value) {
  bar.style.transform = `scaleX(${value})`;
}

/** The activity of each layer's memory over the last minute. */
class ActivityPlot {
  #points = []; // { time, values } in the order of the layers
  #layers = [];
  #legendValues = [];
  #lastDraw = 0;

  constructor(canvas, legend, placeholder) {
    this.canvas = canvas;
    this.legend = legend;
    this.placeholder = placeholder;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#changeColours());
  }

  clear() {
    this.#points = [];
    this.#setLayers([]);
    this.placeholder.hidden = false;
    this.draw();
  }

  add({ layers, activity }) {
    if (layers.join() !== this.#layers.join()) {
      this.#points = [];
      this.#setLayers(layers);
    }
    this.placeholder.hidden = layers.length > 0;
    this.#points.push({ time: performance.now(), values: activity });
    this.#legendValues.forEach((label, i) => (label.textContent = formatActivity(activity[i])));
  }

  #setLayers(layers) {
    this.#layers = [...layers];
    this.#legendValues = layers.map(() => makeElement("span", { className: "number" }));
    this.legend.replaceChildren(...layers.map((layer, i) => this.#legendEntry(layer, i)));
  }

  #legendEntry(layer, i) {
    const entry = document.createElement("li");
    const swatch = makeElement("span", { className: "swatch" });
    swatch.style.background = this.#colour(i);
    entry.append(swatch, `layer ${layer}`, this.#legendValues[i]);
    return entry;
  }

  #colour(i) {
    const count = this.#layers.length;
    return count > 8 ? `hsl(${Math.round((i * 360) / count)} 65% 50%)` : cssColour(`--line-${i + 1}`);
  }

  #changeColours() {
    this.legend.querySelectorAll(".swatch").forEach((swatch, i) => (swatch.style.background = this.#colour(i)));
    this.draw();
  }

  drawIfDue(now) {
    if (now - this.#lastDraw >= PLOT_REDRAW_MS) this.draw();
  }

  draw() {
    const now = performance.now();
    this.#lastDraw = now;
    // One point from before the window lets the lines reach its left edge.
    while (this.#points.length > 1 && this.#points[1].time < now - PLOT_SEC * 1000) this.#points.shift();
    const context = this.#prepareCanvas();
    const area = { left: 74, right: this.canvas.clientWidth - 12, top: 10, bottom: this.canvas.clientHeight - 26 };
    if (area.right <= area.left || area.bottom <= area.top) return;
    const ticks = axisTicks(this.#largest());
    const place = {
      x: (time) => area.right + ((time - now) / (PLOT_SEC * 1000)) * (area.right - area.left),
      y: (value) => area.bottom - (value / ticks.at(-1)) * (area.bottom - area.top),
    };
    drawAxes(context, area, ticks, place);
    context.save();
    context.beginPath();
    context.rect(area.left, area.top - 2, area.right - area.left, area.bottom - area.top + 4);
    context.clip();
    this.#layers.forEach((_, i) => this.#drawLine(context, i, place));
    context.restore();
  }

  #largest() {
    const values = this.#points.flatMap((point) => point.values).filter(Number.isFinite);
    return values.reduce((largest, value) => Math.max(largest, value), 0);
  }

  #prepareCanvas() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * ratio);
    const height = Math.round(this.canvas.clientHeight * ratio);
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
    return context;
  }

  #drawLine(context, i, place) {
    context.beginPath();
    context.strokeStyle = this.#colour(i);
    context.lineWidth = 2;
    context.lineJoin = "round";
    let isDrawing = false;
    for (const { time, values } of this.#points) {
      // The server sends null for what is not a finite number: a gap in the line.
      if (Number.isFinite(values[i])) {
        context[isDrawing ? "lineTo" : "moveTo"](place.x(time), place.y(values[i]));
      }
      isDrawing = Number.isFinite(values[i]);
    }
    context.stroke();
  }
}

function drawAxes(context, area, ticks, place) {
  context.font = `13px ${getComputedStyle(document.body).fontFamily}`;
  context.lineWidth = 1;
  context.fillStyle = cssColour("--muted");
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const tick of ticks) {
    const y = Math.round(place.y(tick)) + 0.5;
    context.strokeStyle = cssColour(tick === 0 ? "--axis" : "--grid");
    drawSegment(context, area.left, y, area.right, y);
    context.fillText(formatActivity(tick), area.left - 8, y);
  }
  context.strokeStyle = cssColour("--axis");
  context.textBaseline = "top";
  for (let seconds = 0; seconds <= PLOT_SEC; seconds += 10) {
    const x = Math.round(area.right - (seconds / PLOT_SEC) * (area.right - area.left)) + 0.5;
    drawSegment(context, x, area.bottom, x, area.bottom + 4);
    context.textAlign = seconds === 0 ? "right" : "center";
    context.fillText(seconds === 0 ? "now" : `−${seconds} s`, x, area.bottom + 7);
  }
  drawAxisTitle(context, area);
}

function drawAxisTitle(context, area) {
  context.save();
  context.translate(6, (area.top + area.bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  context.fillText("update ÷ stream", 0, 0);
  context.restore();
}

function drawSegment(context, x0, y0, x1, y1) {
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
}

/** Ticks from zero in steps of 1, 2 or 5 times a power of ten; the last one is not below `largest`. */
function axisTicks(largest) {
  const limit = largest > 0 ? largest : 1;
  const power = 10 ** Math.floor(Math.log10(limit / 4));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size * 5 >= limit) ?? 10 * power;
  const count = Math.max(1, Math.ceil(limit / step - 1e-9));
  return Array.from({ length: count + 1 }, (_, i) => i * step);
}

function formatActivity(value) {
  if (!Number.isFinite(value)) return "not finite";
  if (value === 0) return "0";
  return Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(2)));
}

function cssColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function makeElement(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

/** The model's words; a pause begins a new paragraph. */
class Transcript {
  #paragraph = null;
  #lastPiece = 0;

  constructor(box) {
    this.box = box;
  }

  clear() {
    this.box.replaceChildren();
    this.#paragraph = null;
  }

  append(piece) {
    const now = performance.now();
    const isAtEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 40;
    const isNewParagraph = now - this.#lastPiece > PARAGRAPH_PAUSE_MS && piece.startsWith(" ");
    if (this.#paragraph === null || isNewParagraph) {
      this.#paragraph = this.box.appendChild(document.createElement("p"));
    }
    this.#paragraph.append(piece);
    this.#lastPiece = now;
    // Whoever has scrolled back to read is left there.
    if (isAtEnd) this.box.scrollTop = this.box.scrollHeight;
  }
}

/** Everything between "start" and the end of one conversation. */
class Conversation {
  #ended = false;
  #writer = null;

  constructor(view, { fresh }) {
    this.view = view;
    this.fresh = fresh;
    this.microphone = new Microphone({
      onPacket: (packet, description) => this.#sendPacket(packet, description),
      onFailure: (text) => this.fail(text),
    });
    this.speaker = new Speaker({ onFailure: (text) => this.fail(text) });
  }

  async start() {
    try {
      this.#enter("asking", "Asking for the microphone …");
      this.speaker.open(); // at once, while the browser still sees the user's click
      await this.microphone.open();
      if (!this.#ended) this.#connect();
    } catch (error) {
      this.fail(MICROPHONE_ERRORS[error.name] ?? `Sound does not work here: ${error.message}`);
    }
  }

  #enter(state, text) {
    stats.state = state;
    this.view.showStatus(text, state);
  }

  #connect() {
    this.#enter("connecting", "Connecting …");
    this.socket = new WebSocket(chatUrl(this.fresh));
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.#receive(data);
    this.socket.onclose = (event) => this.#takeClose(event);
  }

  #receive(data) {
    if (this.#ended || !(data instanceof ArrayBuffer) || data.byteLength === 0) return;
    const bytes = new Uint8Array(data);
    const payload = bytes.subarray(1);
    switch (bytes[0]) {
      case KIND.handshake:
        return this.#begin();
      case KIND.audio:
        return this.speaker.push(payload);
      case KIND.text:
        stats.textPieces += 1;
        return this.view.transcript.append(decodeText(payload));
      case KIND.metadata:
        return this.#takeMetadata(decodeText(payload));
      case KIND.error:
        return this.view.showError(decodeText(payload));
    }
  }

  #begin() {
    this.#enter("talking", "You can talk.");
    this.startedAt = performance.now();
    this.microphone.isSending = true;
  }

  #takeMetadata(text) {
    stats.metadataMessages += 1;
    let metadata;
    try {
      metadata = JSON.parse(text);
    } catch {
      return; // not worth a conversation
    }
    if (metadata.waiting !== undefined) {
      this.#enter("waiting", `Waiting for a free place: number ${metadata.waiting} in the queue.`);
    }
    if (metadata.memory) this.view.plot.add(metadata.memory);
    if (Number.isFinite(metadata.frame_ms)) this.view.showFrameTime(metadata.frame_ms);
    if (Number.isFinite(metadata.lag_sec)) this.view.showLag(metadata.lag_sec);
    if (metadata.forgotten > 0) this.view.showForgotten(metadata.forgotten);
  }

  #sendPacket(packet, description) {
    if (this.socket?.readyState !== WebSocket.OPEN) return;
    let pages = new Uint8Array(0);
    if (this.#writer === null) {
      this.#writer = new OggOpusWriter({ preSkip: readPreSkip(description), inputSampleRate: MICROPHONE_RATE });
      pages = this.#writer.headerPages();
    }
    this.socket.send(concatBytes(Uint8Array.of(KIND.audio), pages, this.#writer.audioPage([packet])));
    stats.packetsSent += 1;
  }

  #takeClose({ code, reason }) {
    stats.closeCode = code;
    const meaning = CLOSE_MEANINGS[code] ?? "The connection has ended.";
    const text = `${meaning} (code ${code}${reason ? `: ${reason}` : ""})`;
    if (code !== 1000) this.view.showError(text);
    this.end(code === 1000 ? text : "The conversation has ended.");
  }

  fail(text) {
    if (this.#ended) return;
    this.view.showError(text);
    this.end("The conversation has ended.");
  }

  end(text) {
    if (this.#ended) return;
    this.#ended = true;
    this.microphone.close();
    this.speaker.close();
    if (this.socket) {
      this.socket.onclose = null;
      this.socket.close(1000);
    }
    this.#enter("ended", text);
    this.view.conversationEnded(this);
  }
}

function chatUrl(fresh) {
  const url = new URL("api/chat?memory=1", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  if (fresh) url.searchParams.set("fresh", "1");
  return url;
}

function decodeText(bytes) {
  return new TextDecoder().decode(bytes);
}

/** The encoder's delay in samples at 48 kHz, which it tells in an OpusHead packet; else libopus's usual one. */
function readPreSkip(description) {
  if (!description) return 312;
  const bytes = ArrayBuffer.isView(description)
    ? new Uint8Array(description.buffer, description.byteOffset, description.byteLength)
    : new Uint8Array(description);
  return bytes.length >= 12 ? bytes[10] | (bytes[11] << 8) : 312;
}

/** The page's controls and displays. */
class View {
  conversation = null;
  #meters = {
    microphone: new LevelMeter(element("microphone-level")),
    speaker: new LevelMeter(element("speaker-level")),
  };

  constructor() {
    this.transcript = new Transcript(element("transcript"));
    this.plot = new ActivityPlot(element("plot"), element("legend"), element("plot-empty"));
    element("start").addEventListener("click", () => this.#startOrStop());
    element("mute").addEventListener("click", () => this.#toggleMute());
    addEventListener("pagehide", () => this.#stop());
  }

  #startOrStop() {
    if (this.conversation) this.#stop();
    else this.#start();
  }

  #start() {
    resetStats();
    this.#clear();
    this.conversation = new Conversation(this, { fresh: element("fresh").checked });
    this.#showRunning(true);
    this.conversation.start();
    requestAnimationFrame((now) => this.#animate(now));
  }

  #stop() {
    this.conversation?.end("You have ended the conversation.");
  }

  conversationEnded() {
    this.conversation = null;
    this.#showRunning(false);
  }

  #clear() {
    this.transcript.clear();
    this.plot.clear();
    for (const id of ["error", "notice"]) element(id).hidden = true;
    element("error").textContent = "";
    for (const id of ["frame-time", "lag"]) element(id).textContent = "–";
    element("elapsed").textContent = "";
    setBar(element("frame-bar"), 0);
  }

  #showRunning(isRunning) {
    const start = element("start");
    start.textContent = isRunning ? "Stop" : "Start a conversation";
    start.classList.toggle("running", isRunning);
    element("fresh").disabled = isRunning;
    element("mute").disabled = !isRunning;
    this.#showMuted(false);
  }

  #toggleMute() {
    const muted = element("mute").getAttribute("aria-pressed") !== "true";
    this.conversation?.microphone.mute(muted);
    this.#showMuted(muted);
  }

  #showMuted(muted) {
    element("mute").setAttribute("aria-pressed", String(muted));
  }

  #animate(now) {
    this.#meters.microphone.show(this.conversation?.microphone.level ?? 0);
    this.#meters.speaker.show(this.conversation?.speaker.level ?? 0);
    if (!this.conversation) return this.#settle();
    this.plot.drawIfDue(now);
    this.#showElapsed(now);
    requestAnimationFrame((next) => this.#animate(next));
  }

  /** The plot stays as it was at the end; the meters go to zero. */
  #settle() {
    for (const id of ["microphone-level", "speaker-level"]) setBar(element(id), 0);
  }

  #showElapsed(now) {
    if (!this.conversation.startedAt) return;
    const seconds = Math.max(0, Math.floor((now - this.conversation.startedAt) / 1000));
    const text = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    if (element("elapsed").textContent !== text) element("elapsed").textContent = text;
  }

  showStatus(text, state) {
    element("status").textContent = text;
    element("status").dataset.state = state;
  }

  /** Errors of one conversation add up: the server's own words often precede the closing of the connection. */
  showError(text) {
    const box = element("error");
    box.textContent = box.textContent ? `${box.textContent}\n${text}` : text;
    box.hidden = false;
  }

  showForgotten(times) {
    const often = times === 1 ? "once" : `${times} times`;
    const box = element("notice");
    const text = `The memory of this conversation was no longer finite and had to be reset ${often}.`;
    if (box.textContent !== text || box.hidden) box.textContent = text;
    box.hidden = false;
  }

  showFrameTime(milliseconds) {
    const isOver = milliseconds > FRAME_BUDGET_MS;
    const text = element("frame-time");
    text.textContent = `${milliseconds.toFixed(1)} of ${FRAME_BUDGET_MS} ms${isOver ? ": too slow" : ""}`;
    text.classList.toggle("over-budget", isOver);
    element("frame-bar").classList.toggle("over", isOver);
    setBar(element("frame-bar"), fraction(milliseconds / FRAME_BUDGET_MS));
  }

  showLag(seconds) {
    element("lag").textContent = `${seconds.toFixed(1)} s`;
  }
}

/** Why no conversation is possible in this browser, or null. */
function obstacle() {
  if (!window.isSecureContext) {
    return "Browsers give the microphone only to secure pages: open this page by https, or on localhost.";
  }
  if (!navigator.mediaDevices?.getUserMedia || !window.AudioWorkletNode) {
    return "This browser cannot record sound. A recent Chrome, Edge, Firefox or Safari can.";
  }
  if (!window.AudioEncoder || !window.AudioDecoder) {
    return "This browser lacks WebCodecs for sound. A recent Chrome, Edge, Firefox or Safari has it.";
  }
  return null;
}

function openPage() {
  resetStats();
  const view = new View();
  const reason = obstacle();
  if (reason === null) return;
  view.showError(reason);
  view.showStatus("No conversation is possible here.", "ended");
  element("start").disabled = true;
}

openPage();
