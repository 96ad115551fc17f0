// The live picture: six small charts over the last minutes, on one axis of time.

import {byId, make, milliseconds, number, share, swatch, tint} from "./common.js";

const SPAN = 180; // seconds that a chart covers
const GAP = 3; // seconds without a figure that break a line
const FRAME = {left: 46, top: 8, bottom: 106, height: 128}; // of a chart, in pixels; its width is the page's

const points = value => value == null ? "–" : `${value.toFixed(1)} %`;
const kept = value => share(value && Math.floor(1000 * value) / 1000); // 100.0 % means all
const whole = () => [0, 1];
const asPercent = value => `${100 * value} %`;
const line = (name, field, colour, words = number) => ({name, field, colour: `var(${colour})`, words, dashed: false});
const limit = (name, field, words = number) => ({name, field, colour: "var(--c1)", words, dashed: true});

const panels = [
  {title: "Requests a second", lines: [line("answered", "requests_per_s", "--c0"), limit("shed", "shed_per_s")]},
  {title: "Waiting in the queue", lines: [line("requests", "queue", "--c0")]},
  {
    title: "Latency, ms",
    lines: [
      line("p99", "p99_ms", "--c0", milliseconds),
      line("p50", "p50_ms", "--c2", milliseconds),
      limit("target", "slo_ms"),
    ],
  },
  {
    title: "Answered within the target",
    lines: [line("share", "attainment", "--c0", kept)], scale: whole, tick: asPercent,
  },
  {title: "Width in use", lines: [], stacked: true, scale: whole, tick: asPercent},
  {
    title: "Accuracy estimate",
    lines: [line("estimate", "top1", "--c0", points), limit("floor", "min_top1", points)],
    scale: accuracyScale, tick: value => `${value} %`,
  },
];
const samples = []; // statuses with the second they came in, oldest first
let model = [];
let cursor = null; // the second that is read; null is now

const seconds = () => performance.now() / 1000;
const inUse = sample => Object.values(sample.widths).some(part => part > 0) ? sample.widths : null;
const nearest = time => samples.reduce((best, sample) =>
  best && Math.abs(best.time - time) <= Math.abs(sample.time - time) ? best : sample, undefined);

/** Take the widths of /v1/model, and the name of the figure that their accuracy is. */
export function setModel(widths, figure) {
  model = widths;
  name(panels.at(-1), `Accuracy estimate, ${figure}`);
}

function name(panel, title) {
  panel.heading.textContent = title;
  panel.chart.setAttribute("aria-label", `${title}, over the last three minutes`);
}

/** Take a status of /v1/status and draw it. */
export function add(status) {
  samples.push({...status, time: seconds()});
  draw();
}

/** Draw everything anew; without a new status the lines move left and leave a gap. */
export function draw() {
  const oldest = seconds() - SPAN;
  while (samples.length && samples[0].time < oldest) samples.shift();
  if (cursor !== null && cursor < oldest) cursor = null;
  const sample = cursor === null ? samples.at(-1) : nearest(cursor);
  for (const panel of panels) {
    panel.legend.replaceChildren(...(panel.stacked ? widthLegend(sample) : lineLegend(panel, sample)));
    drawPanel(panel);
  }
  byId("moment").textContent = cursor === null ? "Three minutes; each figure is of ten seconds" :
    `${Math.round(seconds() - sample.time)} s ago`;
}

function lineLegend(panel, sample) {
  return panel.lines.filter(({field, dashed}) => !dashed || sample?.[field] != null).map(
    ({name, field, colour, words, dashed}) => make("li", {},
      swatch(dashed ? "line dashed" : "line", colour), `${name} `, make("b", {}, words(sample?.[field]))));
}

function widthLegend(sample) {
  const items = model.flatMap(({width}, index) => {
    const part = sample?.widths[width] ?? 0;
    if (part < 0.0005) return [];
    return [make("li", {}, swatch("key", tint(index, model.length)), `${width} `, make("b", {}, share(part)))];
  });
  return items.length ? items : [make("li", {}, "none")];
}

function accuracyScale() {
  const values = [...model, ...samples].flatMap(each => [each.top1, each.min_top1]).filter(value => value != null);
  if (!values.length) return [0, 100];
  const low = Math.floor(Math.min(...values));
  return [low, Math.max(low + 2, Math.ceil(Math.max(...values)))];
}

function countScale(panel) {
  const most = Math.max(1, ...panel.lines.flatMap(({field}) => samples.map(sample => sample[field] ?? 0)));
  const ten = 10 ** Math.floor(Math.log10(most));
  return [0, ten * [1, 2, 4, 5, 10].find(step => step * ten >= most * 0.999)];
}

/** Stretches of samples that have a value, each without a gap. */
function stretches(value) {
  const found = [];
  let last = -Infinity;
  for (const sample of samples) {
    if (value(sample) == null) continue;
    if (sample.time - last > GAP) found.push([]);
    found.at(-1).push(sample);
    last = sample.time;
  }
  return found;
}

function drawPanel(panel) {
  const {left, top, bottom, height} = FRAME;
  const right = panel.chart.clientWidth - 4;
  const now = seconds();
  const [low, high] = panel.scale?.() ?? countScale(panel);
  const x = time => right + (right - left) * (time - now) / SPAN;
  const y = value => bottom - (bottom - top) * (value - low) / (high - low);
  const at = (sample, value) => `${x(sample.time).toFixed(1)} ${y(value).toFixed(1)}`;
  const nodes = [];
  for (const value of [low, (low + high) / 2, high]) {
    nodes.push(svg("line", {class: "grid", x1: left, x2: right, y1: y(value), y2: y(value)}));
    nodes.push(svg("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, (panel.tick ?? number)(value)));
  }
  for (const [minutes, anchor] of [[3, "start"], [2, "middle"], [1, "middle"], [0, "end"]]) {
    const words = minutes ? `−${minutes} min` : "now";
    nodes.push(svg("text", {x: x(now - 60 * minutes), y: height - 4, "text-anchor": anchor}, words));
  }
  if (panel.stacked) nodes.push(...stretches(inUse).flatMap(stretch => areas(stretch, at)));
  for (const {field, colour, dashed} of panel.lines) {
    for (const stretch of stretches(sample => sample[field])) {
      const path = stretch.map(sample => at(sample, sample[field])).join("L");
      const drawn = svg("path", {class: dashed ? "drawn dashed" : "drawn", d: `M${path}h0`}); // h0: one sample is a dot
      drawn.style.stroke = colour;
      nodes.push(drawn);
    }
  }
  if (cursor !== null) nodes.push(svg("line", {class: "cursor", x1: x(cursor), x2: x(cursor), y1: top, y2: bottom}));
  panel.chart.replaceChildren(...nodes);
  panel.timeAt = pixel => now + SPAN * (pixel - right) / (right - left);
}

/** The widths' shares upon each other, narrowest below. */
function areas(stretch, at) {
  const sums = stretch.map(() => 0);
  const edge = () => stretch.map((sample, k) => at(sample, sums[k]));
  return model.map(({width}, index) => {
    const below = edge();
    stretch.forEach((sample, k) => { sums[k] += sample.widths[width] ?? 0; });
    const area = svg("path", {class: "area", d: `M${[...below, ...edge().reverse()].join("L")}Z`});
    area.style.fill = tint(index, model.length);
    return area;
  });
}

function svg(tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

function read(time) {
  cursor = time;
  draw();
}

for (const panel of panels) {
  panel.legend = make("ul");
  panel.heading = make("h3");
  panel.chart = svg("svg", {role: "img"});
  name(panel, panel.title);
  byId("panels").append(make("figure", {}, make("figcaption", {}, panel.heading, panel.legend), panel.chart));
  panel.chart.addEventListener("pointermove", event => {
    const pixel = event.clientX - panel.chart.getBoundingClientRect().left;
    read(nearest(panel.timeAt(pixel))?.time ?? null);
  });
  panel.chart.addEventListener("pointerleave", () => read(null));
}
byId("panels").addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1, Escape: samples.length}[event.key];
  if (!step || !samples.length) return;
  event.preventDefault();
  const place = cursor === null ? samples.length - 1 : samples.indexOf(nearest(cursor));
  const next = Math.max(0, place + step);
  read(next < samples.length - 1 ? samples[next].time : null);
});
byId("panels").addEventListener("blur", () => read(null));
addEventListener("resize", draw);
draw();
