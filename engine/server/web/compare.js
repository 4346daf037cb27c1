// The same question twice, one after the other so that neither slows the other: every neuron, and those that count.

import { $, el, notice, save } from "./dom.js";
import { render } from "./markdown.js";
import { Meter } from "./meter.js";
import { picture } from "./picture.js";
import { percent, rate, Run } from "./run.js";

const TOKENS = 200; // of an answer
const SEED = 1; // the same for both, so that only the neurons differ

export class Compare {
  #meters = { dense: new Meter($("dense-meter")), sparse: new Meter($("sparse-meter")) };
  #sparsity;
  #running = null;
  #asked = null; // what is compared: {question, fields, setting, model}
  #results = {};

  constructor(sparsity) {
    this.#sparsity = sparsity;
    $("compare-again").addEventListener("click", () => (this.#running ? this.#running.stop() : this.#go()));
    $("compare-close").addEventListener("click", () => $("compare").close());
    $("compare").addEventListener("close", () => {
      this.#asked = null;
      this.#running?.stop();
    });
    $("compare-picture").addEventListener("click", () => this.#save());
  }

  get open() {
    return $("compare").open;
  }

  /** Show the dialog and run. `fields` are those of a request, without what makes it dense or sparse. */
  async start(question, fields, model) {
    this.#asked = { question, fields, setting: this.#sparsity.setting, sparse: this.#sparsity.fields, model };
    $("compare-question").textContent = question;
    $("sparse-setting").textContent = this.#asked.setting;
    $("compare").showModal();
    await this.#go();
  }

  async #go() {
    const asked = this.#asked;
    const { fields, sparse, model } = asked;
    const layers = model.svdengine.layers;
    this.#results = {};
    $("compare-picture").disabled = true;
    $("compare-again").textContent = "Stop";
    $("verdict").textContent = "The same question, twice";
    for (const side of ["dense", "sparse"]) this.#blank(side, layers);
    for (const [side, path] of [["dense", { ffn: "dense" }], ["sparse", sparse]]) {
      const most = Math.min(TOKENS, fields.max_tokens ?? TOKENS);
      this.#running = new Run();
      $(`${side}-side`).classList.add("live");
      await this.#running.go({ seed: SEED, ...fields, ...path, max_tokens: most }, (run, columns) => this.#show(side, run, columns));
      $(`${side}-side`).classList.remove("live");
      if (this.#asked !== asked) return; // closed, or begun anew
      const run = this.#running;
      this.#running = null;
      this.#show(side, run, []);
      this.#meters[side].settle();
      if (run.error || run.stopped) {
        if (run.error) notice(run.error.message);
        break;
      }
      this.#results[side] = run;
      if (side === "dense") this.#sparsity.noteDense(run.speed);
    }
    $("compare-again").textContent = "Run again";
    this.#conclude();
  }

  #blank(side, layers) {
    this.#meters[side].clear(layers);
    $(`${side}-text`).replaceChildren();
    $(`${side}-speed`).textContent = $(`${side}-share`).textContent = "–";
  }

  #show(side, run, columns) {
    this.#meters[side].push(columns);
    const box = $(`${side}-text`);
    box.replaceChildren(render(run.text));
    box.scrollTop = box.scrollHeight;
    if (run.speed) $(`${side}-speed`).textContent = rate(run.speed);
    if (run.tokens) $(`${side}-share`).textContent = run.density ? percent(run.density.active) : "100 %";
  }

  #conclude() {
    const { dense, sparse } = this.#results;
    if (!dense || !sparse) return;
    const gain = dense.speed && sparse.speed ? `${(sparse.speed / dense.speed).toFixed(2)} × the speed` : "";
    const share = sparse.density ? `${percent(sparse.density.active)} of the neurons` : "";
    const same = alike(dense.text, sparse.text);
    $("verdict").replaceChildren(el("strong", {}, [gain, share].filter(Boolean).join(", ")),
      same === 1 ? " — word for word the same answer" : "");
    $("compare-picture").disabled = false;
  }

  async #save() {
    const { dense, sparse } = this.#results;
    const side = (name, run) => ({ text: run.text, speed: run.speed, density: run.density,
      means: this.#meters[name].means, predicted: this.#meters[name].predictedMeans });
    const blob = await picture({ model: this.#asked.model, question: this.#asked.question, setting: this.#asked.setting,
      dense: side("dense", dense), sparse: side("sparse", sparse) });
    save("svdengine-dense-and-sparse.png", blob, "image/png");
  }
}

/** The share of words that two texts begin with alike. */
function alike(a, b) {
  const [left, right] = [a.split(/\s+/), b.split(/\s+/)];
  let same = 0;
  while (same < left.length && left[same] === right[same]) same++;
  return same / Math.max(left.length, right.length, 1);
}
