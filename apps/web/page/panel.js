// Live figures, and the settings of the cache with the memory that they will take.
import { get, send } from "./api.js";
import { bytes, count, make, seconds } from "./make.js";

const at = (id) => document.getElementById(id);
const form = at("settings");
const NAMES = { "cache-type": "cache_type", budget: "kv_budget", eviction: "kv_eviction", "sparse-method": "sparse_attention" };
let status = null;
let filled = {}; // what the controls said when they were last filled
let trouble = () => {};

export function start(onTrouble) {
  trouble = onTrouble;
  let timer;
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(predict, 200); });
  form.addEventListener("submit", apply);
  setInterval(() => { if (!document.hidden) refresh().catch(() => {}); }, 1000);
  return refresh(true);
}

async function refresh(fill = false) {
  show(await get("/api/status"));
  if (fill) fillIn();
}

export const contextSize = () => status?.ctx_size ?? 0;

function show(found) {
  status = found;
  at("model").textContent = `${found.model} · ${found.cache.cache_type} cache`;
  at("kv").textContent = bytes(found.kv_bytes);
  at("sparse").textContent = sparseNow();
  at("explain").textContent = [...found.sparse_attention, ...found.sparse_prefill].join("\n");
  at("list-note").textContent = found.unkept ? `Conversations are ${found.unkept}` : at("list-note").textContent;
}

function sparseNow() {
  const share = shown?.sparse_share;
  return share ? `On: the last answer read ${Math.round(100 * share)} % of the cache.` : status.sparse_state;
}

let shown = null;

/** Figures of an answer, while it comes or afterwards; null where there is none. */
export function figures(facts) {
  shown = facts;
  at("speed").textContent = facts?.tokens_per_second ? facts.tokens_per_second.toFixed(1) : "–";
  at("first").textContent = facts?.ttft_s ? seconds(facts.ttft_s) : "–";
  at("reused").textContent = facts ? count(facts.cached_tokens) : "–";
  const used = facts ? facts.prompt_tokens + facts.tokens : 0;
  at("context").setAttribute("aria-valuemax", contextSize());
  at("context").setAttribute("aria-valuenow", used);
  at("context").firstElementChild.style.width = `${100 * Math.min(1, used / (contextSize() || 1))}%`;
  at("context-label").textContent = `Context: ${count(used)} of ${count(contextSize())} tokens`;
  if (status) at("sparse").textContent = sparseNow();
}

// ---- settings -------------------------------------------------------------------------------------------------------
function fillIn() {
  for (const [id, name] of Object.entries(NAMES)) {
    if (id === "budget") continue;
    const kinds = new Set([...status.choices[name], status.cache[name]]);
    at(id).replaceChildren(...[...kinds].map((kind) => make("option", { value: kind }, kind)));
    at(id).value = status.cache[name];
  }
  at("budget").value = status.cache.kv_budget ? mebibytes(status.cache.kv_budget) : "";
  filled = values();
  at("apply").disabled = true;
  tellMemory(status.memory, false);
}

const mebibytes = (number) => `${+(number / 2 ** 20).toFixed(2)}M`;
const values = () => Object.fromEntries(Object.entries(NAMES).map(([id, name]) => [name, at(id).value.trim()]));

function changes() {
  const now = values();
  return Object.fromEntries(Object.entries(now).filter(([name, value]) => value !== filled[name]));
}

async function predict() {
  const wanted = changes();
  at("apply").disabled = true;
  if (!Object.keys(wanted).length) {
    fillIn();
    return;
  }
  try {
    const found = await send("POST", "/api/predict", wanted);
    if (JSON.stringify(wanted) !== JSON.stringify(changes())) return; // typed on meanwhile
    tellMemory(found, true);
    at("apply").disabled = false;
  } catch (error) {
    at("predicted").textContent = error.message;
    at("predicted").className = "bad";
  }
}

function tellMemory({ total, kv, available, ctx_size: tokens }, would) {
  const fits = kv <= available;
  const verb = would ? "would take" : "takes";
  at("predicted").textContent = `A full context of ${count(tokens)} tokens ${verb} ${bytes(kv)} of cache, ${bytes(total)} in all`
    + (fits ? "." : `; only ${bytes(available)} are free.`);
  at("predicted").className = fits ? "" : "bad";
}

async function apply(event) {
  event.preventDefault();
  at("apply").disabled = true;
  at("predicted").textContent = "Loading the model with these settings…";
  try {
    show(await send("POST", "/api/settings", changes()));
    fillIn();
  } catch (error) {
    at("predicted").textContent = error.message;
    at("predicted").className = "bad";
    trouble(error);
  }
}
