// The wiring of the page: its controls start and stop conversations, its displays show how they go.

import { LevelMeter, fraction, setBar } from "./bars.js";
import { Conversation } from "./conversation.js";
import { ActivityPlot } from "./memory_plot.js";
import { resetStats } from "./stats.js";
import { Transcript } from "./transcript.js";

const FRAME_BUDGET_MS = 80;

const element = (id) => document.getElementById(id);

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
