// One image: the answer at the width that the server chooses, then at every width in turn, narrowest first.

import {byId, call, make, milliseconds, sentence, share, swatch} from "./common.js";

const PATIENCE = 10000; // milliseconds that a question for one width may wait: those of others go first
let widths = [];
let image = null;
let asking = null; // the AbortController of the questions on their way

/** Take the widths of a model, narrowest first; answers of another model are cleared. */
export function setWidths(names) {
  asking?.abort();
  widths = names;
  clear();
  busy(false);
}

function clear() {
  byId("verdict").textContent = byId("refusal").textContent = "";
  byId("summary").textContent = "Every width is asked in turn, narrowest first.";
  byId("answer").hidden = true;
  byId("strip").tBodies[0].replaceChildren(...widths.map(width => make("tr", {},
    make("th", {scope: "row"}, width), make("td", {}, "–"), make("td", {}, "–"), make("td", {}, "–"))));
}

function busy(is) {
  byId("again").ariaDisabled = String(is);
  byId("strip").ariaBusy = String(is);
}

function take(file) {
  if (byId("classifier").hidden) return; // the model does not classify
  image = file;
  const preview = byId("preview");
  URL.revokeObjectURL(preview.src);
  preview.onload = () => preview.classList.toggle("tiny", preview.naturalWidth <= 96);
  preview.onerror = () => { preview.hidden = true; }; // a format that the browser cannot show, but the server may read
  preview.hidden = false;
  preview.alt = `Your image ${file.name}`;
  preview.src = URL.createObjectURL(file);
  byId("again").hidden = false;
  classify();
}

async function classify() {
  asking?.abort();
  asking = new AbortController();
  const {signal} = asking;
  clear();
  busy(true);
  try {
    const answer = await ask(null, signal);
    showAnswer(answer);
    await askWidths(answer, signal);
  } catch (error) {
    if (signal.aborted) return;
    byId("refusal").textContent = error.message;
  }
  busy(false);
}

function ask(width, signal) {
  const form = new FormData();
  form.append("image", image);
  if (width) {
    form.append("width", width);
    form.append("deadline_ms", PATIENCE);
  }
  return call("v1/classify", {method: "POST", body: form, signal});
}

function showAnswer(answer) {
  const [best] = answer.labels;
  byId("verdict").textContent = `${best.label}, ${share(best.probability)}`;
  byId("labels").replaceChildren(...answer.labels.map(each => make("li", {},
    make("span", {}, each.label), make("span", {}, share(each.probability)), bar([each], answer))));
  byId("course").textContent = `Width ${answer.width}, in a batch of ${answer.batch}: ` +
    `${milliseconds(answer.queue_ms)} ms in the queue, ${milliseconds(answer.compute_ms)} ms of compute.`;
  byId("reason").textContent = `Why: ${sentence(answer.reason)}`;
  byId("answer").hidden = false;
}

async function askWidths(answer, signal) {
  const [best] = answer.labels;
  const said = [];
  const rows = [...byId("strip").tBodies[0].rows];
  rows[widths.indexOf(answer.width)]?.cells[0].append(make("span", {className: "tag"}, "chosen"));
  for (const [place, width] of widths.entries()) {
    byId("summary").textContent = `Asking width ${width}, ${place + 1} of ${widths.length}.`;
    const [, label, chance, time] = rows[place].cells;
    try {
      const {labels, compute_ms: ms} = await ask(width, signal);
      said.push(labels[0].index);
      label.replaceChildren(swatch("key", colour(labels[0], answer)), labels[0].label, bar(labels, answer));
      chance.textContent = share(labels[0].probability);
      time.textContent = milliseconds(ms);
    } catch (error) {
      if (signal.aborted) throw error;
      label.replaceChildren(make("span", {className: "error"}, error.message));
    }
  }
  const agree = said.filter(index => index === best.index).length;
  const silent = widths.length - said.length;
  byId("summary").textContent = `${agree} of ${widths.length} widths say ${best.label}.` +
    (silent ? ` ${silent} gave no answer.` : "");
}

function bar(labels, answer) {
  return make("div", {className: "bar", ariaHidden: "true"}, ...labels.map(each => {
    const part = make("span");
    part.style.width = `${100 * each.probability}%`;
    part.style.background = colour(each, answer);
    return part;
  }));
}

/** A label's colour: that of its place in the answer at the chosen width, as far as there are colours. */
function colour(label, answer) {
  return `var(--c${answer.labels.findIndex(each => each.index === label.index)}, var(--rest))`;
}

byId("file").addEventListener("change", event => {
  const [file] = event.target.files;
  if (file) take(file);
  event.target.value = ""; // so that the same file can be chosen again
});
byId("again").addEventListener("click", () => { if (byId("again").ariaDisabled !== "true") classify(); });
document.addEventListener("paste", event => {
  const [file] = event.clipboardData.files;
  if (!file) return;
  event.preventDefault();
  take(file);
});
document.addEventListener("dragover", event => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", event => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) take(file);
  else byId("refusal").textContent = "That was no file. Save the image first, or copy and paste it.";
});
