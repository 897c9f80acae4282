// The page's conversation with the server over one websocket. Each binary message starts with a byte for its kind.

import { MICROPHONE_ERRORS, MICROPHONE_RATE, Microphone } from "./microphone.js";
import { OggOpusWriter, concatBytes } from "./ogg_opus.js";
import { stats } from "./stats.js";
import { Speaker } from "./voice.js";

const KIND = { handshake: 0, audio: 1, text: 2, metadata: 4, error: 5 };

const CLOSE_MEANINGS = {
  1000: "The server has ended the conversation.",
  1001: "The server is going away.",
  1006: "The connection was refused or lost.",
  1008: "The server does not admit this conversation.",
  1009: "The server was sent too big a message.",
  1011: "The server has had an error.",
  1013: "The server is busy. Please try again later.",
};

/** Everything between "start" and the end of one conversation. */
export class Conversation {
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
