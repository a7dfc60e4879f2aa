// The server as the page sees it: JSON in, JSON or a stream of events out; its errors by their own message. Addresses
// are relative to the page, which a proxy may show below any path.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// Nobody answers: the server is gone, or starting.
export class Unreachable extends Error {
  constructor() {
    super("The server does not answer.");
  }
}

// Kept until this tab is closed, and never in localStorage.
export const apiKey = {
  value: "",
  get() {
    try {
      return this.value || (sessionStorage.getItem("sftflow.key") ?? "");
    } catch {
      return this.value;
    }
  },
  set(key) {
    this.value = key;
    try {
      sessionStorage.setItem("sftflow.key", key);
    } catch {
      // A browser that keeps nothing asks again after a reload.
    }
  },
};

export async function call(path, body, signal) {
  const headers = {};
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable();
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new ServerError(answer.error?.message || `The server answered ${response.status}.`, response.status);
}

export async function models() {
  return (await (await call("v1/models")).json()).data.map((model) => model.id);
}

export async function promptTokens(model, messages) {
  return (await (await call("v1/render", { model, messages })).json()).tokens;
}

// The events of a reply as they come, each as its JSON. Ends at [DONE], or where the connection does.
export async function* chunks(body, signal) {
  const response = await call("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Unreachable();
    }
    if (piece.done) return;
    const events = (rest + piece.value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (!data) continue; // a comment that keeps the connection open
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ServerError(value.error.message, value.error.code);
      yield value;
    }
  }
}
