// Horizontal bars: the level meters and the time for a frame.

const METER_RANGE_DB = 60;

/** A bar that jumps up with a level and falls slowly. */
export class LevelMeter {
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

export function fraction(value) {
  return Math.min(1, Math.max(0, value));
}

export function setBar(bar, value) {
  bar.style.transform = `scaleX(${value})`;
}
