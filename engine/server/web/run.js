// One answer while it is written: its text, its neurons token by token, and what it cost. Also when it is stopped.

import * as api from "./api.js";

/** What an answer gives: text, tokens with their layers, and figures at its end. */
export class Run {
  text = "";
  tokens = 0;
  columns = []; // of each token of a sparse step: shares computed and predicted, by layer
  usage = null;
  cut = false; // the length limit was reached
  stopped = false;
  error = null;
  #first = 0;
  #last = 0;
  #control = new AbortController();

  /** Have a conversation answered. `onNews(run, columns)` is called after each piece, with the columns that came. */
  async go(fields, onNews) {
    try {
      for await (const event of api.answer(fields, this.#control.signal)) onNews(this, this.#take(event));
    } catch (error) {
      if (this.#control.signal.aborted) this.stopped = true;
      else this.error = error;
    }
    return this;
  }

  stop() {
    this.#control.abort();
  }

  #take(event) {
    const choice = event.choices[0];
    this.text += choice?.delta.content ?? "";
    if (choice?.finish_reason === "length") this.cut = true;
    if (event.usage) this.usage = event.usage;
    const layers = event.svdengine?.layers ?? [];
    if (layers.length > 0) {
      this.#last = performance.now();
      this.#first ||= this.#last;
      this.tokens += layers.length;
    }
    const found = layers.map((each) => each && { active: each.active_density, predicted: each.predicted_density });
    this.columns.push(...found);
    return found;
  }

  /** Tokens a second: as the server measured it, or until then as they came here. */
  get speed() {
    const measured = this.usage?.svdengine?.tokens_per_second;
    if (measured) return measured;
    const seconds = (this.#last - this.#first) / 1000;
    return this.tokens > 1 && seconds > 0.02 ? (this.tokens - 1) / seconds : 0;
  }

  /** Shares of neurons computed and predicted over all tokens; null where every step was dense. */
  get density() {
    const measured = this.usage?.svdengine;
    if (typeof measured?.active_density === "number") {
      return { active: measured.active_density, predicted: measured.predicted_density };
    }
    const sparse = this.columns.filter(Boolean);
    if (sparse.length === 0) return null;
    const over = (name) => mean(sparse.map((column) => mean(column[name])));
    return { active: over("active"), predicted: over("predicted") };
  }

  /** Tokens of prompt and answer, where the server told them. */
  get context() {
    return this.usage?.total_tokens ?? 0;
  }

  /** One line: speed, neurons, length. A stopped answer keeps what was counted until then. */
  get figures() {
    const found = [];
    if (this.speed) found.push(`${rate(this.speed)} tokens/s`);
    if (this.density) found.push(`${percent(this.density.active)} of neurons`);
    const tokens = this.usage?.completion_tokens ?? this.tokens;
    if (tokens) found.push(tokens === 1 ? "1 token" : `${tokens.toLocaleString("en")} tokens`);
    return found.join(" · ");
  }
}

export const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

export const rate = (speed) => (speed < 99.5 ? speed.toFixed(1) : speed.toFixed(0));
