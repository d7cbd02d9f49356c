// Draws both pictures, as SVG. Text from the data is only ever set as text.

const TOP = 16; // pixels above a plot
const FOOT = 22; // below it
const LEFT = 56;
const RAIL = 7; // height of the row of loops
const state = { of: "mst", from: 0, to: 2, same: false, picked: null, loop: null };
const $ = (id) => document.getElementById(id);
const overview = $("overview");
const chart = $("chart");
let view = null; // of the chart as drawn: scales, and the paths of buffers

function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

function html(name, text) {
  return Object.assign(document.createElement(name), { textContent: text });
}

function ticks(highest) {
  let step = 2 ** Math.floor(Math.log2(Math.max(highest, 4) / 4));
  while (highest / step > 6) step *= 2;
  return Array.from({ length: Math.floor(highest / step) + 1 }, (_, i) => i * step);
}

// Scales, the grid and the names of both halves.
function frame(into, height, highest, from, to) {
  const width = Math.max(into.clientWidth, 200);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  const x = (p) => LEFT + ((p - from) / (to - from)) * (width - LEFT - 2);
  const y = (n) => height - FOOT - (n / highest) * (height - FOOT - TOP);
  for (const n of ticks(highest)) {
    root.append(svg("line", { class: "grid", x1: LEFT, x2: width, y1: y(n), y2: y(n) }));
    label(root, LEFT - 6, y(n) + 4, "end", n ? size(n) : "0");
  }
  for (const [start, name] of [[0, "forward"], [1, "backward"]]) {
    const [a, b] = [Math.max(start, from), Math.min(start + 1, to)];
    if (b - a > 0.15 * (to - from)) label(root, x((a + b) / 2), height - 6, "middle", name);
  }
  if (from < 1 && to > 1)
    root.append(svg("line", { class: "half", x1: x(1), x2: x(1), y1: TOP, y2: height - FOOT }));
  return { root, x, y, width, height };
}

function label(root, x, y, anchor, text, kind = "") {
  root.append(svg("text", { class: kind, x, y, "text-anchor": anchor }, text));
}

// Path data of what lies between two edges; pieces are [x, end, bottom, top].
function between(f, pieces) {
  let there = "";
  let back = "";
  for (const [start, end, low, high] of pieces) {
    if (end < LEFT - 4 || start > f.width + 4) continue;
    const [x, next] = [Math.max(start, LEFT - 4).toFixed(1), Math.min(end, f.width + 4).toFixed(1)];
    there += `${there ? "L" : "M"}${x},${f.y(low).toFixed(1)}H${next}`;
    back = `L${next},${f.y(high).toFixed(1)}H${x}${back}`;
  }
  return there && `${there}${back}Z`;
}

// Pieces from each entry's time to the next's; within a pixel, the highest stands for all.
function pieces(f, trace, entries, end, edges) {
  const found = [];
  for (const entry of entries) {
    const x = f.x(place(trace, entry[0]));
    const [low, high] = edges(entry);
    const last = found[found.length - 1];
    if (!last || x - last[0] >= 0.7) {
      if (last) last[1] = x;
      found.push([x, end, low, high]);
    } else if (high > last[3]) [last[2], last[3]] = [low, high];
    else if (entry === entries[entries.length - 1]) found.push([(last[1] = x), end, low, high]);
  }
  return found;
}

function drawOverview() {
  const f = frame(overview, 150, 1.06 * highestPeak(), 0, 2);
  for (const of of ["inductor", "mst"]) {
    const trace = data[of];
    const all = pieces(f, trace, stacked(trace).band, f.x(2), ([, , total]) => [0, total]);
    f.root.append(svg("path", { class: `area-${of}`, d: between(f, all) }));
  }
  for (const [of, below] of [["inductor", 8], ["mst", -6]]) {
    const trace = data[of];
    const x = f.x(place(trace, trace.times[trace.totals.indexOf(trace.peak)]));
    const [at, anchor] = x > f.width - 150 ? [x - 8, "end"] : [x + 8, "start"];
    const y = Math.max(f.y(trace.peak) + below, TOP - 4);
    label(f.root, at, y, anchor, `${of} ${size(trace.peak)}`, "strong");
  }
  if (state.from > 0 || state.to < 2) {
    const [x, end] = [f.x(state.from), f.x(state.to)];
    const height = f.height - FOOT;
    f.root.append(svg("rect", { class: "window", x, width: end - x, y: 2, height }));
  }
  overview.replaceChildren(f.root);
}

function highestPeak() {
  return Math.max(...Object.values(data).map((trace) => trace.peak), 1);
}

function drawChart() {
  const trace = data[state.of];
  const { steps, band } = stacked(trace);
  const isShown = ([time]) => place(trace, time) >= state.from && place(trace, time) <= state.to;
  const own = Math.max(...band.filter(isShown).map(([, , total]) => total), trace.peak / 50, 1);
  const height = innerWidth < 700 ? 300 : 400;
  const f = frame(chart, height, 1.08 * (state.same ? highestPeak() : own), state.from, state.to);
  const clip = svg("clipPath", { id: "plot" });
  clip.append(svg("rect", { x: LEFT, y: 0, width: f.width - LEFT, height: height - FOOT }));
  const plot = svg("g", { "clip-path": "url(#plot)" });
  drawLoops(f, trace, plot);
  const others = pieces(f, trace, band, f.x(2), ([, low, high]) => [low, high]);
  plot.append(svg("path", { class: "rest", "data-rest": "", d: between(f, others) }));
  const paths = trace.buffers.map((b, i) => drawBuffer(f, trace, plot, b, i, steps[i]));
  const peak = f.x(place(trace, trace.peak_time));
  const ring = svg("path", { class: "ring" });
  const bottom = height - FOOT;
  plot.append(svg("line", { class: "mark", x1: peak, x2: peak, y1: RAIL + 4, y2: bottom }), ring);
  f.root.append(clip, plot);
  if (peak >= LEFT && peak <= f.width) {
    const [at, anchor] = peak > (LEFT + f.width) / 2 ? [peak - 6, "end"] : [peak + 6, "start"];
    const what = f.width < 600 ? "peak" : "peak without gradients";
    label(f.root, at, TOP + 9, anchor, `${what} ${size(trace.intermediate)}`, "strong");
  }
  chart.replaceChildren(f.root);
  view = { f, trace, paths, steps, ring };
  markLoops();
}

function drawLoops(f, trace, plot) {
  trace.loops.forEach(([start, end], i) => {
    const x = f.x(place(trace, start));
    const width = Math.max(f.x(place(trace, end)) - x, 1);
    plot.append(
      svg("rect", { class: "shade", x, width, y: TOP, height: f.height - FOOT - TOP }),
      svg("rect", { class: "rail", "data-loop": i, x, width, y: 2, height: RAIL, rx: 2 }),
    );
  });
}

function drawBuffer(f, trace, plot, b, i, steps) {
  const born = f.x(place(trace, b[BORN]));
  const end = Math.max(f.x(place(trace, b[DIES])), born + 0.7); // or nobody would see it
  const d = between(f, pieces(f, trace, steps, end, ([, low]) => [low, low + b[BYTES]]));
  if (!d) return null;
  // of something thin, a border would hide it
  const thin = end - born < 3 || f.y(0) - f.y(b[BYTES]) < 3 ? " thin" : "";
  const kind = `k${b[KIND]}s${b[WHAT] % 3}`;
  const path = svg("path", { class: `buffer ${kind}${thin}`, "data-buffer": i, d });
  plot.append(path);
  return path;
}

function markLoops() {
  for (const rail of chart.querySelectorAll(".rail")) {
    const name = view.trace.loops[rail.dataset.loop][2];
    rail.classList.toggle("on", name === state.loop);
  }
}

function drawLegend() {
  const trace = data[state.of];
  const items = KINDS.map((name, k) => {
    const item = html("li", "");
    const swatch = svg("svg", { viewBox: "0 0 1 1", "aria-hidden": "true" });
    swatch.append(svg("rect", { class: `k${k}s0`, width: 1, height: 1 }));
    item.append(swatch, `${name}: `, html("b", size(trace.kinds[k])));
    return item;
  });
  items.push(html("li", "(at the marked peak)"));
  const others = trace.count - trace.buffers.length;
  if (others) items.push(html("li", `grey: the other ${many(others)} buffers`));
  $("legend").replaceChildren(...items);
}

function draw() {
  drawOverview();
  drawChart();
  drawLegend();
}
