// How full the context is, and which of the oldest turns are left out when it is.

import * as api from "./api.js";
import { $ } from "./dom.js";

const RESERVED = 0.25; // of the context, for the answer, when turns are left out

/** Show that some of the context's tokens are taken. */
export function showGauge(used, size) {
  $("gauge").hidden = !size;
  if (!size) return;
  const share = Math.min(1, used / size);
  $("gauge").classList.toggle("nearly", share > 0.85);
  $("gauge-fill").style.width = `${100 * share}%`;
  $("gauge-text").textContent = `${used.toLocaleString("en")} of ${size.toLocaleString("en")} tokens`;
  for (const [name, value] of [["valuenow", used], ["valuemax", size], ["valuetext", `${used} of ${size} tokens are used`]]) {
    $("gauge").setAttribute(`aria-${name}`, value);
  }
}

/**
 * The turns that fit: `{first, messages}`, where `first` counts those left out from the beginning. They end with the
 * question; a turn begins with a question. `system` are messages that always stay.
 */
export async function fitting(system, turns, size, answer) {
  const room = size - Math.max(1, Math.min(answer ?? Infinity, Math.floor(RESERVED * size)));
  const starts = turns.map((turn, i) => (turn.role === "user" ? i : -1)).filter((i) => i >= 0);
  const fits = async (k) => (await api.countTokens([...system, ...turns.slice(starts[k])])) <= room;
  let [low, high] = [0, starts.length - 1]; // the last question is always sent, whether it fits or not
  while (low < high) {
    const middle = (low + high) >> 1;
    if (await fits(middle)) high = middle;
    else low = middle + 1;
  }
  const first = starts[low] ?? 0;
  return { first, messages: [...system, ...turns.slice(first)] };
}
