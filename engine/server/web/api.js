// What the page asks of the server that it came from.

let key = "";

export function useKey(value) {
  key = value ?? "";
}

/** An answer of the server that is no success. */
export class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

async function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const options = body === undefined ? { headers, signal } : { method: "POST", headers, signal, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError(0, { message: "The server cannot be reached." });
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new ServerError(response.status, told?.error);
}

/** The one model, and what the server says of it. */
export async function model() {
  return (await (await ask("v1/models")).json()).data[0];
}

/** How many tokens the prompt of messages has. */
export async function countTokens(messages) {
  return (await (await ask("tokenize", { messages })).json()).count;
}

/** How many tokens a text has. */
export async function countText(content) {
  return (await (await ask("tokenize", { content })).json()).count;
}

/** The events of a streamed answer, parsed. Throws ServerError, also for an error in the middle. */
export async function* answer(fields, signal) {
  const options = { include_usage: true, include_layers: true };
  const response = await ask("v1/chat/completions", { ...fields, stream: true, stream_options: options }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError(0, { message: "The connection to the server was lost." });
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(500, event.error);
      yield event;
    }
  }
}
