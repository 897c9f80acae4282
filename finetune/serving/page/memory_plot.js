// The plot of the memory's activity on a canvas, with its legend.

const PLOT_SEC = 60;
const PLOT_REDRAW_MS = 100;

/** The activity of each layer's memory over the last minute. */
export class ActivityPlot {
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
