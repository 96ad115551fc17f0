// The page of `slicevit serve`: asks for the model once and for the status once a second while it is seen.

import {byId, call, make, milliseconds, number, share, swatch, tint} from "./common.js";
import {setWidths} from "./image.js";
import * as live from "./live.js";
import {onTarget, setTarget} from "./target.js";

const EVERY = 1000; // milliseconds between two questions
const PATIENCE = 5000; // milliseconds until a question counts as lost

let model = null; // null when it must be asked for
let shown = ""; // the model that is shown, as JSON
let status = null;
let polling = false;
let timer = 0;

async function poll() {
  clearTimeout(timer);
  if (polling || document.hidden) return;
  polling = true;
  try {
    const signal = AbortSignal.timeout(PATIENCE);
    model ??= showModel(await call("v1/model", {signal}));
    showStatus(await call("v1/status", {signal}));
    byId("outage").hidden = true;
  } catch (error) {
    model = null; // the server may come back with another one
    const rest = status ? " The figures below are the last that it gave." : "";
    byId("outage").textContent = `${error.message} This page asks again every second.${rest}`;
    byId("outage").hidden = false;
    live.draw();
  }
  polling = false;
  timer = setTimeout(poll, EVERY);
}

function showModel(answer) {
  const text = JSON.stringify(answer);
  if (text === shown) return answer;
  shown = text;
  const names = answer.widths.map(row => row.width);
  document.title = `${answer.architecture} · slicevit serve`;
  byId("name").textContent = answer.architecture;
  const facts = {
    Engine: answer.engine,
    Device: answer.device,
    Input: answer.input_size.join(" × "),
    Classes: number(answer.num_classes),
    Widths: `${names.length}, from ${names[0]} to ${names.at(-1)}`,
  };
  byId("facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
    make("div", {}, make("dt", {}, "Up for"), make("dd", {id: "uptime"}, "–")));
  byId("classifier").hidden = answer.task !== "classification";
  byId("elsewhere").hidden = answer.task === "classification";
  const figure = answer.figure.replace("-", "\u2011");
  showWidths(answer.widths, figure === "top\u20111" ? "Top\u20111" : figure);
  setWidths(names);
  live.setModel(answer.widths, figure);
  return answer;
}

function showWidths(rows, figure) {
  const batches = [...new Set(rows.flatMap(row => Object.keys(row.latency_ms)))].sort((a, b) => a - b);
  const head = ["Width", `${figure}, %`, ...batches.map(batch => `ms, batch\u00a0${batch}`), "Answers now"];
  byId("widths").tHead.replaceChildren(make("tr", {}, ...head.map(text => make("th", {scope: "col"}, text))));
  byId("widths").tBodies[0].replaceChildren(...rows.map((row, index) => {
    const name = make("th", {scope: "row"}, swatch("key", tint(index, rows.length)), row.width);
    if (!row.on_frontier) name.append(make("span", {className: "tag"}, "off the frontier"));
    const latencies = batches.map(batch => milliseconds(row.latency_ms[batch]));
    const figures = [row.top1.toFixed(1), ...latencies, "–"];
    const line = make("tr", {}, name, ...figures.map(text => make("td", {}, text)));
    line.dataset.width = row.width;
    return line;
  }));
  byId("off").hidden = rows.every(row => row.on_frontier);
}

function showStatus(answer) {
  status = answer;
  setTarget(status.slo_ms);
  byId("uptime").textContent = duration(status.uptime_s);
  for (const row of byId("widths").tBodies[0].rows) {
    row.lastChild.textContent = share(status.widths[row.dataset.width] ?? 0);
  }
  live.add(status);
}

function duration(time) {
  if (time < 120) return `${Math.round(time)} s`;
  if (time < 7200) return `${Math.round(time / 60)} min`;
  return `${number(time / 3600)} h`;
}

onTarget(showStatus);
document.addEventListener("visibilitychange", poll);
poll();
