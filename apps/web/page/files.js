// Text files that go with a question: attached, dropped, or pasted when long.
import { bytes } from "./make.js";
import { chip } from "./messages.js";

const LONG = 2000; // characters of a paste that becomes a file
const MOST = 2 << 20; // bytes of a file; more fits no context
const list = document.getElementById("files");
const drop = document.getElementById("drop");
const picker = document.getElementById("file");

let files = []; // {name, text}
let changed = () => {};
let tell = () => {};

export function start(onChange, onTrouble) {
  changed = onChange;
  tell = onTrouble;
  document.getElementById("attach").addEventListener("click", () => picker.click());
  picker.addEventListener("change", async () => { await add(picker.files); picker.value = ""; });
  let inside = 0; // dragenter and dragleave come for every element on the way
  addEventListener("dragenter", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    inside += 1;
    drop.hidden = false;
  });
  addEventListener("dragleave", () => { inside = Math.max(0, inside - 1); drop.hidden = inside === 0; });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    drop.hidden = true;
    if (event.dataTransfer.files.length) add(event.dataTransfer.files);
  });
  document.getElementById("question").addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      add(event.clipboardData.files);
      return;
    }
    const text = event.clipboardData.getData("text/plain");
    if (text.length < LONG) return;
    event.preventDefault();
    put("Pasted text", text);
  });
}

async function add(given) {
  for (const file of given) {
    if (file.size > MOST) {
      tell(`${file.name} has ${bytes(file.size)}; ${bytes(MOST)} is the most.`);
      continue;
    }
    const content = new Uint8Array(await file.arrayBuffer());
    if (content.includes(0)) {
      tell(`${file.name} is not a text file.`);
      continue;
    }
    put(file.name, new TextDecoder().decode(content).replaceAll("\r\n", "\n"));
  }
}

function put(name, text) {
  if (!text.trim()) {
    tell(`${name} is empty.`);
    return;
  }
  files.push({ name: name.slice(0, 200), text: text.trimEnd() });
  show();
  document.getElementById("question").focus();
}

function show() {
  list.replaceChildren(...files.map((file) => {
    const item = document.createElement("li");
    item.append(chip(file.name, bytes(file.text.length), () => { files = files.filter((other) => other !== file); show(); }));
    return item;
  }));
  changed();
}

/** A question with the files before it, as a message. */
export function withFiles(text) {
  const facts = files.length ? { files: files.map(({ name, text: content }) => ({ name, length: content.length })) } : {};
  return { role: "user", content: [...files.map((file) => file.text), text].join("\n\n"), facts };
}

export const any = () => files.length > 0;

/** Attach these instead, none by default -> those that were. */
export function exchange(others = []) {
  const former = files;
  files = others;
  show();
  return former;
}
