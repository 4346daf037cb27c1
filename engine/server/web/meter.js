// Drawings of which neurons ran. The meter: a column a layer, lit from below as far as its neurons were computed, dim as
// far as they were only predicted. The weave: a column a token, a row a layer, the brighter the more were computed.

const CELLS = 20; // of a column: each stands for a twentieth of the layer's neurons
const EASE = 0.28; // of the way to the next token's shares that a frame takes

/** Colours of the theme, as CSS has them. */
export function colours(node = document.documentElement) {
  const style = getComputedStyle(node);
  const of = (name) => style.getPropertyValue(name).trim();
  return { off: of("--cell-off"), dim: of("--cell-dim"), low: of("--lit-low"), high: of("--lit-high"), mark: of("--mark"),
    weave: [of("--weave-0"), of("--weave-1"), of("--weave-2")] };
}

/** Draw a meter into a box of a 2D context. `shares`: {active, predicted}, a number a layer; null: all neurons. */
export function drawMeter(context, { x, y, width, height }, layers, shares, means, paint) {
  const pitch = width / layers;
  const row = height / CELLS;
  const cell = { width: Math.max(pitch * 0.66, 1), height: Math.max(row * 0.64, 1) };
  const round = Math.min(cell.width, cell.height) / 2.2;
  const lit = context.createLinearGradient(0, y + height, 0, y);
  lit.addColorStop(0, paint.low);
  lit.addColorStop(1, paint.high);
  const fill = (colour, from, to, left) => {
    context.fillStyle = colour;
    for (let i = Math.floor(from); i < Math.min(Math.ceil(to), CELLS); i++) {
      context.globalAlpha = Math.min(1, to - i);
      context.beginPath();
      context.roundRect(left, y + height - (i + 1) * row + (row - cell.height) / 2, cell.width, cell.height, round);
      context.fill();
    }
    context.globalAlpha = 1;
  };
  for (let layer = 0; layer < layers; layer++) {
    const left = x + layer * pitch + (pitch - cell.width) / 2;
    const active = CELLS * (shares ? shares.active[layer] : 1);
    const predicted = CELLS * (shares ? shares.predicted[layer] : 1);
    fill(paint.off, 0, CELLS, left);
    if (predicted > active) fill(paint.dim, active, predicted, left);
    fill(lit, 0, active, left);
    if (means) {
      context.fillStyle = paint.mark;
      context.fillRect(left - 1, y + height - means[layer] * height - 0.75, cell.width + 2, 1.5);
    }
  }
}

/** A meter on a canvas, which moves to each token's shares. */
export class Meter {
  constructor(canvas) {
    this.canvas = canvas;
    this.layers = 0;
    this.#still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  #still;
  #target = null;
  #shown = null;
  #sums = null;
  #predicted = null;
  #count = 0;
  #settled = false; // it shows the means
  #frame = 0;

  /** Begin anew: nothing lit. */
  clear(layers) {
    this.layers = layers;
    this.#target = this.#shown = { active: Array(layers).fill(0), predicted: Array(layers).fill(0) };
    this.#sums = Array(layers).fill(0);
    this.#predicted = Array(layers).fill(0);
    this.#count = 0;
    this.draw();
    this.#say();
  }

  /** Show the shares of tokens, the last one in the end. null stands for all neurons. */
  push(columns) {
    for (const column of columns) {
      const all = Array(this.layers).fill(1);
      this.#target = column && column.active.length === this.layers ? column : column ? spread(column, this.layers) : { active: all, predicted: all };
      this.#target.active.forEach((share, i) => (this.#sums[i] += share));
      this.#target.predicted.forEach((share, i) => (this.#predicted[i] += share));
      this.#count++;
    }
    if (columns.length === 0) return;
    this.#settled = false;
    if (this.#still) this.#shown = this.#target;
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#move());
    this.#say();
  }

  /** Come to rest at the means of all tokens. */
  settle() {
    if (!this.#count) return;
    this.#settled = true;
    this.#target = { active: this.means, predicted: this.predictedMeans };
    if (this.#still) this.#shown = this.#target;
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#move());
  }

  /** By layer, over all tokens so far; null before the first. */
  get means() {
    return this.#count ? this.#sums.map((sum) => sum / this.#count) : null;
  }

  get predictedMeans() {
    return this.#count ? this.#predicted.map((sum) => sum / this.#count) : null;
  }

  draw() {
    if (!this.layers) return;
    const { canvas } = this;
    const scale = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    drawMeter(context, { x: 0, y: 0, width, height }, this.layers, this.#shown, this.#count > 1 && !this.#settled ? this.means : null, colours(canvas));
  }

  #move() {
    const step = (name) => this.#shown[name].map((from, i) => {
      const way = this.#target[name][i] - from;
      return Math.abs(way) < 0.002 ? this.#target[name][i] : from + EASE * way;
    });
    this.#shown = { active: step("active"), predicted: step("predicted") };
    this.draw();
    const moving = ["active", "predicted"].some((name) => this.#shown[name].some((share, i) => share !== this.#target[name][i]));
    if (moving) this.#frame = requestAnimationFrame(() => this.#move());
  }

  #say() {
    const means = this.means;
    const told = means
      ? `Shares of neurons computed by layer, on average: ${means.map((share) => `${Math.round(100 * share)} %`).join(", ")}`
      : `Shares of neurons computed in each of ${this.layers} layers; no answer yet`;
    this.canvas.setAttribute("aria-label", told);
  }
}

/** A share for each layer; the last one stands for those that are missing. */
function spread(column, layers) {
  const fill = (values) => Array.from({ length: layers }, (_, i) => values[Math.min(i, values.length - 1)] ?? 1);
  return { active: fill(column.active), predicted: fill(column.predicted) };
}

const MOST_COLUMNS = 640;

/** What is kept of an answer's columns: a byte a share. Long answers are thinned out evenly. */
export function packed(columns, layers) {
  const step = Math.max(1, columns.length / MOST_COLUMNS);
  const count = Math.ceil(columns.length / step);
  const data = new Uint8Array(count * layers);
  for (let i = 0; i < count; i++) {
    const column = columns[Math.floor(i * step)];
    const active = column ? spread(column, layers).active : null;
    for (let layer = 0; layer < layers; layer++) data[i * layers + layer] = active ? Math.round(255 * active[layer]) : 255;
  }
  return { layers, data };
}

/** The columns that were packed, as far as they are needed to show them again. */
export function unpacked({ layers, data }) {
  const columns = [];
  for (let at = 0; at < data.length; at += layers) {
    const active = [...data.subarray(at, at + layers)].map((byte) => byte / 255);
    columns.push({ active, predicted: active });
  }
  return columns;
}

/** Draw a weave onto a canvas, a pixel a share; CSS makes it as large as it is shown. */
export function drawWeave(canvas, { layers, data }) {
  const count = data.length / layers;
  canvas.width = Math.max(count, 1);
  canvas.height = layers;
  const scale = colourScale(colours(canvas).weave);
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, layers);
  for (let token = 0; token < count; token++) {
    for (let layer = 0; layer < layers; layer++) {
      image.data.set(scale[data[token * layers + layer]], 4 * (layer * canvas.width + token));
    }
  }
  context.putImageData(image, 0, 0);
}

/** 256 colours between three, of which the low ones are spread out: most shares are small. */
function colourScale(stops) {
  const rgb = stops.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = 2 * (i / 255) ** 0.6;
    const [from, to] = at < 1 ? [rgb[0], rgb[1]] : [rgb[1], rgb[2]];
    return [...from.map((value, k) => Math.round(value + (to[k] - value) * (at < 1 ? at : at - 1))), 255];
  });
}
