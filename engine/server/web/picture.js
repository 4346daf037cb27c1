// The comparison as a picture to share: 1600 by 900, in the dark colours, whatever the page's theme is.

import { drawMeter } from "./meter.js";
import { percent, rate } from "./run.js";

const [WIDTH, HEIGHT, EDGE] = [1600, 900, 80];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif';
const PAINT = { off: "#1a2927", dim: "#1f4642", low: "#14b8a6", high: "#a7f3d0", mark: "rgba(0,0,0,0)" };
const [TEXT, FAINT, ACCENT] = ["#eef5f4", "#8fa5a1", "#5eead4"];

/** A PNG of two answers to a question. */
export async function picture({ model, question, setting, dense, sparse }) {
  const canvas = new OffscreenCanvas(WIDTH, HEIGHT);
  const context = canvas.getContext("2d");
  const glow = context.createRadialGradient(1200, 330, 60, 1100, 420, 1100);
  glow.addColorStop(0, "#10302c");
  glow.addColorStop(1, "#0b1110");
  context.fillStyle = glow;
  context.fillRect(0, 0, WIDTH, HEIGHT);

  write(context, cut(context, `“${question.replace(/\s+/g, " ")}”`, WIDTH - 2 * EDGE, 600, 40), EDGE, 108, TEXT, 600, 40);
  write(context, `${model.id} · ${model.svdengine.formats[0]} · ${model.svdengine.device}`, EDGE, 156, FAINT, 400, 26);

  const layers = model.svdengine.layers;
  const width = (WIDTH - 2 * EDGE - 80) / 2;
  side(context, "Dense", "every neuron", dense, null, EDGE, width, layers);
  side(context, "Sparse", setting.toLowerCase(), sparse, { active: sparse.means ?? [], predicted: sparse.predicted ?? [] }, EDGE + width + 80, width, layers);

  if (dense.speed && sparse.speed) {
    write(context, `${(sparse.speed / dense.speed).toFixed(2)} × the speed`, EDGE, 838, ACCENT, 700, 44);
  }
  context.textAlign = "center";
  write(context, "A column is a layer. Lit: the neurons that were computed.", WIDTH / 2 + 60, 836, FAINT, 400, 24);
  context.textAlign = "right";
  write(context, "svdengine", WIDTH - EDGE, 838, TEXT, 600, 30);
  context.textAlign = "left";
  return canvas.convertToBlob({ type: "image/png" });
}

function side(context, name, about, { text, speed, density }, shares, x, width, layers) {
  write(context, name, x, 246, TEXT, 700, 38);
  write(context, about, x + context.measureText(name).width + 18, 246, FAINT, 400, 26);
  const usable = shares && shares.active.length === layers ? shares : null;
  drawMeter(context, { x, y: 280, width, height: 270 }, layers, usable, null, PAINT);
  write(context, rate(speed || 0), x, 650, TEXT, 700, 72);
  const after = context.measureText(rate(speed || 0)).width;
  write(context, "tokens/s", x + after + 14, 650, FAINT, 400, 28);
  context.textAlign = "right";
  write(context, `${density ? percent(density.active) : "100 %"} of neurons`, x + width, 650, density ? ACCENT : FAINT, 600, 32);
  context.textAlign = "left";
  lines(context, text.replace(/\s+/g, " ").trim(), width, 24, 3).forEach((line, i) => write(context, line, x, 704 + 34 * i, FAINT, 400, 24));
}

function write(context, text, x, y, colour, weight, size) {
  context.font = `${weight} ${size}px ${FONT}`;
  context.fillStyle = colour;
  context.fillText(text, x, y);
}

function cut(context, text, width, weight, size) {
  context.font = `${weight} ${size}px ${FONT}`;
  if (context.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 0 && context.measureText(`${text.slice(0, end)}…`).width > width) end--;
  return `${text.slice(0, end)}…`;
}

/** A text in at most so many lines, broken at words. */
function lines(context, text, width, size, most) {
  context.font = `400 ${size}px ${FONT}`;
  const found = [""];
  for (const word of text.split(" ").slice(0, 200)) {
    const longer = found.at(-1) ? `${found.at(-1)} ${word}` : word;
    if (context.measureText(longer).width <= width) found[found.length - 1] = longer;
    else if (found.length < most) found.push(word);
    else {
      found[most - 1] = cut(context, `${found[most - 1]} ${word}`, width, 400, size);
      break;
    }
  }
  return found.map((line) => cut(context, line, width, 400, size));
}
