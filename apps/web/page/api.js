// Requests to the server that this page came from. A key, where one is needed, is asked for once and kept until the tab is closed.
import { ask } from "./dialog.js";

const KEY = "edgeattn-key";

export class Refused extends Error {}

async function request(path, { method = "GET", body, signal } = {}, asked = false) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (response.status === 401) {
    const given = await ask("This server needs a key", { label: asked ? "That was not the key; the key" : "Key", secret: true });
    if (!given) throw new Refused("The server needs a key.");
    sessionStorage.setItem(KEY, given);
    return request(path, { method, body, signal }, true);
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Refused(told?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

export const get = async (path) => (await request(path)).json();
export const send = async (method, path, body) => (await request(path, { method, body })).json();

/** Server-sent events of a POST, as objects. */
export async function* events(path, body) {
  const response = await request(path, { method: "POST", body });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => { throw new Refused("The connection to the server was lost."); });
    if (done) return;
    const parts = (held + decoder.decode(value, { stream: true })).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}
