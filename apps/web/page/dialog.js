// One dialog for everything that has to be asked.
const dialog = document.getElementById("ask");
const input = document.getElementById("ask-input");
const label = document.getElementById("ask-label");

let open = Promise.resolve();

/** Ask for a text, or with no label for a yes -> the text (or true), or null. */
export function ask(title, options = {}) {
  open = open.then(() => show(title, options));
  return open;
}

function show(title, { label: wanted = "", value = "", yes = "OK", secret = false }) {
  document.getElementById("ask-title").textContent = title;
  document.getElementById("ask-yes").textContent = yes;
  label.textContent = wanted;
  label.hidden = input.hidden = !wanted;
  input.type = secret ? "password" : "text";
  input.required = Boolean(wanted);
  input.value = value;
  dialog.returnValue = "no";
  dialog.showModal();
  if (wanted) input.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue !== "yes" ? null : wanted ? input.value : true), { once: true });
  });
}

// Enter presses the first button of a form, which is Cancel here.
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  document.getElementById("ask-yes").click();
});
