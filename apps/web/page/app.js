// The chat: one conversation at a time, whole in this page and sent whole with each question, kept by the server.
import { events, get, send } from "./api.js";
import * as files from "./files.js";
import * as list from "./list.js";
import { count } from "./make.js";
import { follow, Growing, showAll, typed } from "./messages.js";
import * as panel from "./panel.js";

const at = (id) => document.getElementById(id);
const question = at("question");
const IDEAS = ["What is the capital of France?", "Who was Napoleon?", "Write a short story about a mill."];

const chat = { conversation: null, revision: null, messages: [] };
let sent = []; // the files of the newest question
let answering = null; // {name, stopped} of the answer that is being given
const acts = { edit, retry };

// ---- answers --------------------------------------------------------------------------------------------------------
async function answer() {
  const talk = chat.messages;
  const growing = new Growing();
  const mine = answering = { name: null, stopped: false };
  let last = null;
  busy(true);
  try {
    const asked = {
      messages: withSystem(talk).map(({ role, content, facts }) => ({ role, content, facts: facts ?? {} })),
      title: heading(talk[0]), conversation: chat.conversation, revision: chat.revision, temperature: Number(at("temperature").value),
    };
    for await (const event of events("/api/answer", asked)) {
      if (event.type === "start") {
        mine.name = event.answer;
        if (mine.stopped) stop();
      }
      if (event.told) tell(event.told);
      if (event.conversation !== undefined) {
        Object.assign(chat, { conversation: event.conversation, revision: event.revision });
        remember();
      }
      if (event.type === "error") throw new Error(event.message);
      if (event.facts) panel.figures(event.facts);
      if (event.type === "reading" || event.type === "text") growing.update(event);
      if (event.type === "end") last = event;
    }
    if (!last) throw new Error("The answer broke off.");
    if (last.text) talk.push({ role: "assistant", content: last.text, html: last.html, facts: last.facts });
    at("announce").textContent = last.text ? `Answer: ${last.text}` : "There is no answer.";
    if (!last.text && !mine.stopped) tell("The model answered nothing; try again, or ask differently.");
  } catch (error) {
    tell(error.message);
    if (!last && !mine.name) giveBack(talk);
  } finally {
    answering = null;
    busy(false);
    showAll(chat.messages, acts);
    follow();
    list.refresh(chat.conversation).then(title).catch((error) => tell(error.message));
  }
}

/** A title for a new conversation: its first question, and the file that goes with it. */
function heading(message) {
  const words = `${message.facts?.files?.[0] ? `${message.facts.files[0].name}: ` : ""}${typed(message)}`.replace(/\s+/g, " ");
  return words.length > 60 ? `${words.slice(0, 57).replace(/ \S*$/, "")}...` : words;
}

/** A question that was refused goes back to where it was typed. */
function giveBack(talk) {
  if (talk.at(-1)?.role !== "user" || question.value) return;
  question.value = typed(talk.pop());
  files.exchange(sent);
}

function withSystem(messages) {
  const system = at("system").value.trim();
  const rest = messages.filter((message) => message.role !== "system");
  return system ? [{ role: "system", content: system }, ...rest] : rest;
}

function ask(message) {
  if (answering) return;
  tell("");
  chat.messages.push(message);
  showAll(chat.messages, acts);
  answer();
}

function submit() {
  const text = question.value.trim();
  if (answering || !text) return;
  const message = files.withFiles(text);
  question.value = "";
  sent = files.exchange();
  ask(message);
}

function edit(index, text) {
  if (answering) return;
  const former = chat.messages[index];
  const before = former.content.slice(0, former.content.length - typed(former).length);
  chat.messages.length = index;
  sent = [];
  ask({ role: "user", content: before + text.trim(), facts: former.facts ?? {} });
}

function retry(index) {
  if (answering) return;
  const asked = chat.messages[index - 1];
  chat.messages.length = index - 1;
  sent = [];
  ask(asked);
}

function stop() {
  if (!answering) return;
  answering.stopped = true;
  if (answering.name) send("POST", `/api/stop/${answering.name}`).catch((error) => tell(error.message));
}

function busy(now) {
  at("send").hidden = now;
  at("stop").hidden = !now;
  if (now) at("announce").textContent = "Answering";
  question.focus();
}

// ---- conversations --------------------------------------------------------------------------------------------------
async function open(id) {
  if (answering) return tell("An answer is being given: stop it first.");
  try {
    const found = await get(`/api/conversations/${id}`);
    const messages = found.messages.filter((message) => message.role !== "system");
    Object.assign(chat, { conversation: id, revision: found.revision, messages });
    at("system").value = found.messages.find((message) => message.role === "system")?.content ?? "";
  } catch (error) {
    return begin(error.message);
  }
  present();
}

function begin(told = "") {
  if (answering) return tell("An answer is being given: stop it first.");
  Object.assign(chat, { conversation: null, revision: null, messages: [] });
  present();
  tell(told);
}

function present() {
  tell("");
  remember();
  showAll(chat.messages, acts);
  panel.figures(chat.messages.at(-1)?.facts?.tokens ? chat.messages.at(-1).facts : null);
  follow(true);
  closeDrawers();
  question.focus();
  list.refresh(chat.conversation).then(title).catch((error) => tell(error.message));
}

/** The address says which conversation this is, so that a reload shows it again. */
function remember() {
  history.replaceState(null, "", chat.conversation === null ? "/" : `/#${chat.conversation}`);
}

function title() {
  const shown = document.querySelector("#list [aria-current]")?.textContent ?? "New conversation";
  at("title").textContent = shown;
  document.title = `${shown} – edgeattn`;
}

// ---- the page -------------------------------------------------------------------------------------------------------
function tell(text) {
  at("notice").textContent = text;
}

function resize() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

let counting;
function measure() {
  resize();
  clearTimeout(counting);
  counting = setTimeout(async () => {
    const text = question.value.trim();
    if (!text && !files.any()) {
      at("count").textContent = "";
      return;
    }
    const found = await send("POST", "/api/count", { messages: withSystem([...chat.messages, files.withFiles(text)])
      .map(({ role, content }) => ({ role, content })) }).catch(() => null);
    if (!found) return;
    at("count").textContent = `${count(found.tokens)} of ${count(found.ctx_size)} tokens`;
    at("count").className = found.tokens >= found.ctx_size ? "note bad" : "note";
  }, 300);
}

function drawer(name, opened) {
  at(name).classList.toggle("open", opened);
  at(`open-${name}`).setAttribute("aria-expanded", String(opened));
  at("veil").hidden = !document.querySelector(".side.open");
  if (opened) at(name).querySelector("button").focus();
}

function closeDrawers() {
  drawer("side", false);
  drawer("panel", false);
}

for (const name of ["side", "panel"]) {
  at(`open-${name}`).addEventListener("click", () => drawer(name, true));
  document.querySelector(`[data-close=${name}]`).addEventListener("click", () => { drawer(name, false); at(`open-${name}`).focus(); });
}
at("veil").addEventListener("click", closeDrawers);
at("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", () => begin());
at("temperature").addEventListener("input", () => { at("temperature-value").textContent = at("temperature").value; });
question.addEventListener("input", measure);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || at("ask").open) return;
  if (document.querySelector(".side.open")) closeDrawers();
  else stop();
});
at("ideas").append(...IDEAS.map((idea) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = idea;
  button.addEventListener("click", () => { question.value = idea; submit(); });
  return button;
}));

files.start(measure, tell);
list.start({ open, trouble: (error) => tell(error.message), renamed: title, removed: (id) => { if (id === chat.conversation) begin(); } });
panel.start((error) => tell(error.message)).then(() => {
  panel.figures(null);
  const id = Number(location.hash.slice(1));
  return Number.isInteger(id) && id > 0 ? open(id) : present();
}).catch((error) => tell(error.message));
