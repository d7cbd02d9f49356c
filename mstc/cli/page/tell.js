// What is told of the buffer, or the loop, that one points at.

const tip = $("tip");

// `line` is "file:line  code", "" where there is none, null where none is to be expected.
function tell(lines, line, [x, y]) {
  const [first, ...others] = lines;
  tip.replaceChildren(html("b", first), ...others.map((text) => html("span", `${text} `)));
  if (line !== null) {
    const [where, ...code] = line.split("  ");
    tip.append(html("small", where || "no line of the model’s"));
    if (code.length) tip.append(html("code", code.join("  ")));
  }
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const isLow = y + 18 + box.height > innerHeight;
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${isLow ? Math.max(8, y - box.height - 14) : y + 18}px`;
}

function unpick() {
  if (state.picked !== null) view.paths[state.picked].classList.remove("on");
  state.picked = null;
  view.ring.removeAttribute("d");
  tip.hidden = true;
}

function pick(i, at) {
  unpick();
  const path = view.paths[i];
  state.picked = i;
  path.classList.add("on");
  view.ring.setAttribute("d", path.getAttribute("d"));
  tell(described(view.trace, view.trace.buffers[i]), lineOf(i), at || corner(i));
}

function lineOf(i) {
  return view.trace.texts[view.trace.buffers[i][LINE]];
}

// Where a buffer begins, on the screen.
function corner(i) {
  const box = chart.getBoundingClientRect();
  const [time, low] = view.steps[i][0];
  const x = Math.max(view.f.x(place(view.trace, time)), LEFT);
  return [box.left + x, box.top + view.f.y(low)];
}

function described(trace, b) {
  const half = (time) => (time < trace.backward ? "the forward" : "the backward");
  const [born, dies] = [half(b[BORN]), b[DIES] === null ? "the end" : half(b[DIES])];
  const lives = born === dies ? `only in ${born}` : `from ${born} to ${dies}`;
  const isPart = b[GRAD] && b[GRAD] < b[BYTES];
  const kind = isPart ? `gradients (${size(b[GRAD])} of it)` : KINDS[b[KIND]];
  const lines = [`${size(b[BYTES])}  ${trace.texts[b[WHAT]]}`, `${kind}, alive ${lives}.`];
  if (b[LOOP] !== null) {
    const chunks = trace.loops[b[LOOP]][3];
    lines.push(`Loop ${b[LOOP] + 1} of ${trace.loops.length}, ${many(chunks)} chunks.`);
  }
  return lines;
}

function pointed(event) {
  const { buffer, loop, rest } = event.target.dataset;
  const at = [event.clientX, event.clientY];
  if (buffer !== undefined) return pick(+buffer, at);
  unpick();
  const trace = view.trace;
  if (loop !== undefined) {
    const [start, , name, chunks] = trace.loops[loop];
    const [op, line] = name.split(/ at (.*)/s);
    const half = start < trace.backward ? "forward" : "backward";
    tell([`loop of ${op}`, `in the ${half}, ${many(chunks)} chunks`], line || "", at);
  } else if (rest !== undefined) {
    const others = many(trace.count - trace.buffers.length);
    tell([`the other ${others} buffers`, "smaller ones, or short-lived"], null, at);
  }
}

chart.addEventListener("pointermove", pointed);
chart.addEventListener("pointerdown", pointed);
chart.addEventListener("pointerleave", (event) => {
  if (event.pointerType === "mouse") unpick();
});
document.addEventListener("pointerdown", (event) => {
  if (!chart.contains(event.target)) unpick();
});
