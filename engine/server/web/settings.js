// What a person sets: how answers are made, the theme, the key; and what the server says of its model.

import { $, el, keep, kept } from "./dom.js";
import { percent } from "./run.js";

const SETTINGS = "svdengine.settings";
const THEME = "svdengine.theme";
// Fields of a request that are numbers, by the name of their input.
const NUMBERS = { temperature: "temperature", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p",
  "repetition-penalty": "repetition_penalty", seed: "seed", "max-tokens": "max_tokens" };

export class Settings {
  values = kept(SETTINGS, {});
  #saved;

  /** `saved` is called after a change. */
  constructor(saved) {
    this.#saved = saved;
    if ("maxTokens" in this.values) this.values.max_tokens = this.values.maxTokens; // as it was kept before
    $("settings").querySelector("form").addEventListener("submit", () => this.#save());
    $("reset").addEventListener("click", () => {
      for (const id of ["system", ...Object.keys(NUMBERS)]) $(id).value = "";
    });
    for (const choice of document.getElementsByName("theme")) {
      choice.addEventListener("change", () => this.theme(choice.value));
    }
    for (const id of ["settings", "model-info", "shortcuts"]) {
      $(id).querySelector("[data-close]").addEventListener("click", () => $(id).close());
    }
  }

  get key() {
    return this.values.key;
  }

  /** Messages that come before all turns. */
  get system() {
    return this.values.system ? [{ role: "system", content: this.values.system }] : [];
  }

  /** Fields of a request: those that were set. */
  get fields() {
    const found = {};
    for (const name of Object.values(NUMBERS)) if (Number.isFinite(this.values[name])) found[name] = this.values[name];
    return found;
  }

  /** Show the defaults that hold where nothing is set. */
  use(info) {
    const defaults = info?.defaults ?? {};
    const shown = (value) => (value === undefined ? "The model's own" : String(value));
    for (const [id, name] of Object.entries(NUMBERS)) {
      if (name in defaults) $(id).placeholder = shown(defaults[name]);
    }
  }

  open(note = "") {
    for (const [id, name] of Object.entries(NUMBERS)) $(id).value = this.values[name] ?? "";
    $("system").value = this.values.system ?? "";
    $("key").value = this.values.key ?? "";
    const theme = kept(THEME, "system");
    for (const choice of document.getElementsByName("theme")) choice.checked = choice.value === theme;
    $("settings-note").textContent = note;
    if (!$("settings").open) $("settings").showModal();
    if (note) $("key").focus();
  }

  theme(value) {
    keep(THEME, value);
    if (value === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
    document.dispatchEvent(new Event("theme"));
  }

  #save() {
    const values = { system: $("system").value.trim() || undefined, key: $("key").value.trim() || undefined };
    for (const [id, name] of Object.entries(NUMBERS)) {
      if ($(id).value !== "" && Number.isFinite(Number($(id).value))) values[name] = Number($(id).value);
    }
    this.values = values;
    keep(SETTINGS, values);
    this.#saved();
  }
}

/** Fill the dialog with what the server says of its model. */
export function showModel(model, version) {
  const info = model.svdengine ?? {};
  const rows = [
    ["Name", model.id],
    ["Family", info.family],
    ["Parameters", info.parameters && short(info.parameters)],
    ["Size", info.size_bytes && `${(info.size_bytes / 1e6).toFixed(0)} MB`],
    ["Weights", info.formats?.join(", ")],
    ["Layers", info.layers && layersText(info)],
    ["Activation", info.activation],
    ["Context", `${model.max_model_len.toLocaleString("en")} tokens`],
    ["Keys and values", info.kv_dtype],
    ["Device", info.device && (info.threads ? `${info.device}, ${info.threads} threads` : info.device)],
    ["FFNs run", info.ffn],
    ["Predictor", info.predictor ? predictorText(info.predictor) : info.sparse ? "none" : "none: no neuron is ever zero"],
    ["svdengine", version],
  ];
  $("model-rows").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
}

function layersText({ layers, ffn_size: size, experts, active_experts: active }) {
  const neurons = `${size.toLocaleString("en")} neurons each`;
  return experts ? `${layers}, with ${experts} experts of ${neurons}, of which a token has ${active}` : `${layers}, with ${neurons}`;
}

function predictorText({ kind, predicted_density: predicted, active_density: active }) {
  return `${kind}: ${percent(predicted)} of neurons predicted, ${percent(active)} computed in calibration`;
}

function short(count) {
  return count >= 1e9 ? `${(count / 1e9).toFixed(2)} billion` : `${(count / 1e6).toFixed(1)} million`;
}
