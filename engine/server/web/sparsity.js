// The sparsity panel: the meter of the layers, tokens a second, the speed against dense, and the slider between exact
// and fast.

import { $, keep, kept } from "./dom.js";
import { Meter, unpacked } from "./meter.js";
import { percent, rate, Run } from "./run.js";

// What the slider stands for. The first reads no predictor and leaves out exact zeros alone; the others shift its
// thresholds by a part of a standard deviation of each neuron's gate.
const STOPS = [
  { label: "Exact: only zeros are left out", fields: { ffn: "exact" } },
  ...[-0.2, -0.1].map((bias) => ({ label: `Bias ${bias}: more neurons`, fields: { ffn: "sparse", sparsity_bias: bias } })),
  { label: "As calibrated", fields: {} },
  ...[0.1, 0.2, 0.3, 0.4, 0.6].map((bias) => ({ label: `Bias +${bias}: fewer neurons`, fields: { ffn: "sparse", sparsity_bias: bias } })),
];
export const CALIBRATED = 3;
const DENSE = "svdengine.dense"; // speeds by model, as they were measured here

export class Sparsity {
  #meter = new Meter($("meter"));
  #model = null;

  constructor() {
    $("bias").max = STOPS.length - 1;
    $("bias").value = CALIBRATED;
    $("bias").addEventListener("input", () => this.#tell());
    $("bias").addEventListener("dblclick", () => this.reset());
    $("fold").addEventListener("click", () => this.#fold($("fold").getAttribute("aria-expanded") === "true"));
    this.#fold(kept("svdengine.folded", innerHeight < 620));
    this.#tell();
  }

  /** Show the panel for a model that has zeros; a model without a predictor has no slider. */
  use(model) {
    this.#model = model;
    const info = model.svdengine;
    $("sparsity").hidden = !info?.sparse;
    if ($("sparsity").hidden) return;
    $("dial").hidden = !info.predictor;
    this.#meter.clear(info.layers);
    this.#gain(0);
  }

  /** The fields of a request that the slider stands for. */
  get fields() {
    return this.#model?.svdengine?.predictor ? STOPS[$("bias").value].fields : {};
  }

  get setting() {
    return STOPS[$("bias").value].label;
  }

  reset() {
    $("bias").value = CALIBRATED;
    this.#tell();
  }

  begin() {
    this.#meter.clear(this.#model?.svdengine?.layers ?? 0);
    $("share").textContent = $("speed").textContent = "–";
    this.#gain(0);
  }

  /** Follow an answer. */
  show(run, columns) {
    if ($("sparsity").hidden) return;
    this.#meter.push(columns);
    const density = run.density;
    if (run.tokens) $("share").textContent = density ? percent(density.active) : "100 %";
    if (run.speed) $("speed").textContent = rate(run.speed);
    this.#gain(run.speed);
  }

  /** The answer is complete. */
  end(run) {
    this.show(run, []);
    this.#meter.settle();
  }

  /** Show an answer that was kept, or that there is none. */
  recall(message) {
    if ($("sparsity").hidden) return;
    this.begin();
    if (!message?.weave) return;
    const columns = unpacked(message.weave);
    if (message.weave.layers !== this.#model.svdengine.layers) return;
    this.#meter.push(columns);
    this.#meter.settle();
    $("share").textContent = message.density ? percent(message.density.active) : "100 %";
    if (message.speed) $("speed").textContent = rate(message.speed);
    this.#gain(message.speed ?? 0);
  }

  redraw() {
    this.#meter.draw();
  }

  /** The speed of dense answers, as it was measured last; 0: never. */
  get denseSpeed() {
    return kept(DENSE, {})[this.#name] ?? 0;
  }

  /** Note how fast a dense answer was. */
  noteDense(speed) {
    if (!speed) return;
    keep(DENSE, { ...kept(DENSE, {}), [this.#name]: speed });
    const shown = parseFloat($("speed").textContent);
    this.#gain(Number.isFinite(shown) ? shown : 0);
  }

  get #name() {
    const { id, svdengine: info } = this.#model ?? {};
    return `${id} ${info?.size_bytes} ${info?.device} ${info?.threads}`;
  }

  /** A short dense answer to the same messages, to compare speeds with. Returns its speed. */
  async measure(fields, count = 32) {
    const run = await new Run().go({ ...fields, ffn: "dense", max_tokens: count, ignore_eos: true }, () => {});
    if (run.error) throw run.error;
    this.noteDense(run.speed);
    return run.speed;
  }

  #gain(speed) {
    const dense = this.denseSpeed;
    $("gain").textContent = dense && speed ? `${(speed / dense).toFixed(2)} ×` : "–";
    $("gain").title = dense ? `Dense: ${rate(dense)} tokens/s, measured here` : "";
    $("measure").hidden = Boolean(dense);
    $("gain").hidden = $("gain-label").hidden = !dense;
  }

  #tell() {
    const stop = STOPS[$("bias").value];
    $("bias-text").textContent = stop.label;
    $("bias").setAttribute("aria-valuetext", stop.label);
  }

  #fold(folded) {
    $("fold").setAttribute("aria-expanded", String(!folded));
    $("fold").setAttribute("aria-label", folded ? "Show more of the layers" : "Show less of the layers");
    $("sparsity").classList.toggle("folded", folded);
    keep("svdengine.folded", folded);
    this.#meter.draw();
  }
}
