// The transcript of what the model says.

const PARAGRAPH_PAUSE_MS = 2000;

/** The model's words; a pause begins a new paragraph. */
export class Transcript {
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
