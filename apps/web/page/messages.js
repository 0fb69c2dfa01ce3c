// The messages of a conversation. HTML comes only from the server, which makes it of Markdown with all of a model's HTML as text.
import { bytes, count, make, seconds } from "./make.js";

const box = document.getElementById("messages");
const scroll = document.getElementById("scroll");
const newest = document.getElementById("newest");
let following = true; // whether the end is in sight, so that it stays there

scroll.addEventListener("scroll", () => {
  following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  newest.hidden = following;
});
newest.addEventListener("click", () => { following = true; follow(); });

export function follow(now = false) {
  following ||= now;
  if (following) scroll.scrollTop = scroll.scrollHeight;
}

/** Show a conversation anew. acts: {edit(index, text), retry(index)} */
export function showAll(messages, acts) {
  box.replaceChildren(...messages.map((message, index) => element(message, index, acts)).filter(Boolean));
  document.getElementById("welcome").hidden = messages.some((message) => message.role !== "system");
}

function element(message, index, acts) {
  if (message.role === "system") return null;
  return message.role === "user" ? question(message, index, acts) : finished(message, index, acts);
}

// ---- questions ------------------------------------------------------------------------------------------------------
/** What was typed, behind the files that stand before it. */
export function typed(message) {
  return message.content.slice((message.facts?.files ?? []).reduce((sum, file) => sum + file.length + 2, 0));
}

function question(message, index, acts) {
  const files = (message.facts?.files ?? []).map((file) => chip(file.name, bytes(file.length)));
  const words = make("div", { class: "words", tabindex: typed(message).length > 800 ? 0 : undefined }, typed(message));
  const article = make("article", { class: "message user", "aria-label": "You" },
    make("div", { class: "bubble" }, files.length ? make("div", { class: "chips" }, ...files) : null, words),
    make("div", { class: "acts" }, make("button", { type: "button", onclick: () => edit(article, message, index, acts) }, "Edit")));
  return article;
}

function edit(article, message, index, acts) {
  const former = [...article.childNodes];
  const area = make("textarea", { class: "edit", "aria-label": "Edit your question" });
  area.value = typed(message);
  const back = () => { article.replaceChildren(...former); article.classList.remove("editing"); };
  const sendIt = () => { if (area.value.trim()) acts.edit(index, area.value); };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); back(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); sendIt(); }
  });
  article.classList.add("editing");
  article.replaceChildren(area, make("div", { class: "bar" },
    make("button", { type: "button", class: "primary", onclick: sendIt }, "Send"),
    make("button", { type: "button", onclick: back }, "Cancel"),
    make("span", { class: "note" }, "What came after it is replaced.")));
  area.focus();
}

export function chip(name, size, remove) {
  return make("span", { class: "chip" }, make("span", { class: "name" }, name), make("span", { class: "size" }, size),
    remove ? make("button", { type: "button", "aria-label": `Remove ${name}`, onclick: remove }, "✕") : null);
}

// ---- answers --------------------------------------------------------------------------------------------------------
function finished(message, index, acts) {
  const words = make("div", { class: "words" });
  words.innerHTML = message.html ?? "";
  addCopies(words);
  return make("article", { class: "message assistant", "aria-label": "Answer" }, words, make("div", { class: "acts" },
    make("button", { type: "button", onclick: (event) => copy(message.content, event.currentTarget) }, "Copy"),
    make("button", { type: "button", onclick: () => acts.retry(index) }, "Try again"),
    make("span", { class: "facts" }, factsLine(message.facts))));
}

function factsLine(facts) {
  if (!facts?.tokens) return "";
  const ends = { length: "cut at the limit", cancelled: "stopped" };
  return [facts.tokens === 1 ? "1 token" : `${count(facts.tokens)} tokens`,
    facts.tokens_per_second && `${facts.tokens_per_second.toFixed(1)} per second`,
    facts.ttft_s && `first after ${seconds(facts.ttft_s)}`, ends[facts.finish]].filter(Boolean).join(" · ");
}

function addCopies(words) {
  for (const block of words.querySelectorAll("pre")) {
    block.tabIndex = 0; // so that the keyboard can scroll it
    block.append(make("button", { type: "button", class: "copy", "aria-label": "Copy code",
      onclick: (event) => copy(block.querySelector("code").textContent, event.currentTarget) }, "Copy"));
  }
}

async function copy(text, button) {
  const before = button.textContent;
  button.textContent = await navigator.clipboard.writeText(text).then(() => "Copied", () => "Not allowed here");
  setTimeout(() => { button.textContent = before; }, 1500);
}

/** An answer that grows: update(event) as they come. */
export class Growing {
  constructor() {
    this.working = make("p", { class: "working" }, "Waiting");
    this.words = make("div", { class: "words" }, this.working);
    this.tail = make("div", { class: "tail" });
    this.article = make("article", { class: "message assistant", "aria-label": "Answer", "aria-busy": "true" }, this.words);
    box.append(this.article);
    follow(true);
  }

  update(event) {
    if (event.type === "reading") {
      this.working.textContent = event.waiting ? "Waiting for other answers"
        : event.total > 512 ? `Reading: ${count(event.done)} of ${count(event.total)} tokens` : "Thinking";
    } else {
      if (!this.tail.isConnected) this.words.replaceChildren(this.tail);
      for (const html of event.done) {
        const block = make("div");
        block.innerHTML = html;
        this.tail.before(...block.childNodes);
      }
      this.tail.innerHTML = event.tail;
    }
    follow();
  }
}
