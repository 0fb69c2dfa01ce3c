// The conversations that are kept.
import { get, send } from "./api.js";
import { ask } from "./dialog.js";
import { make } from "./make.js";

const list = document.getElementById("list");
const find = document.getElementById("find");
let known = [];
let current = null;
let acts = {};

/** acts: {open(id), removed(id), renamed(), trouble(error)} */
export function start(given) {
  acts = given;
  find.addEventListener("input", show);
}

export async function refresh(now = current) {
  current = now;
  known = (await get("/api/conversations")).conversations;
  show();
}

function show() {
  const wanted = find.value.trim().toLowerCase();
  const rows = [];
  let before = "";
  for (const one of known.filter((each) => each.title.toLowerCase().includes(wanted))) {
    const when = day(new Date(one.updated));
    if (when !== before) rows.push(make("li", { class: "when" }, when));
    before = when;
    rows.push(item(one));
  }
  list.replaceChildren(...rows);
  document.getElementById("list-note").textContent = rows.length ? "" : wanted ? "Nothing found." : "";
}

function item(one) {
  const now = one.id === current;
  return make("li", { class: now ? "item now" : "item" },
    make("button", { type: "button", class: "open", title: one.title, "aria-current": now ? "true" : undefined,
      onclick: () => acts.open(one.id) }, one.title),
    make("button", { type: "button", class: "icon", "aria-label": `Rename ${one.title}`, onclick: () => rename(one) }, "✎"),
    make("button", { type: "button", class: "icon", "aria-label": `Delete ${one.title}`, onclick: () => remove(one) }, "✕"));
}

function day(date) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(date).setHours(0, 0, 0, 0)) / 86400000);
  return days <= 0 ? "Today" : days === 1 ? "Yesterday" : days < 7 ? "This week" : days < 31 ? "This month" : "Earlier";
}

async function rename(one) {
  const title = await ask("Rename the conversation", { label: "Title", value: one.title, yes: "Rename" });
  if (!title?.trim()) return;
  try {
    await send("PATCH", `/api/conversations/${one.id}`, { title: title.slice(0, 200) });
    await refresh();
    acts.renamed();
  } catch (error) {
    acts.trouble(error);
  }
}

async function remove(one) {
  if (!await ask(`Delete “${one.title}”? This cannot be undone.`, { yes: "Delete" })) return;
  try {
    await send("DELETE", `/api/conversations/${one.id}`);
    await refresh();
    acts.removed(one.id);
  } catch (error) {
    acts.trouble(error);
  }
}
