// What one can choose, by buttons, keys and dragging; and the start.

function show(changes) {
  unpick();
  Object.assign(state, changes);
  draw();
  press();
}

const CHOICES = {
  backend: { mst: { of: "mst" }, inductor: { of: "inductor" } },
  scale: { "own scale": { same: false }, "same scale": { same: true } },
  range: {
    "whole step": { from: 0, to: 2 },
    forward: { from: 0, to: 1 },
    backward: { from: 1, to: 2 },
  },
};
const buttons = [];
for (const [id, choices] of Object.entries(CHOICES))
  for (const [text, changes] of Object.entries(choices)) {
    const button = html("button", text);
    button.type = "button";
    button.addEventListener("click", () => show(changes));
    $(id).append(button);
    buttons.push([button, changes]);
  }

function press() {
  for (const [button, changes] of buttons) {
    const isOn = Object.keys(changes).every((key) => state[key] === changes[key]);
    button.setAttribute("aria-pressed", isOn);
  }
}

function zoom(factor) {
  const middle = (state.from + state.to) / 2;
  const half = Math.min(1, Math.max(0.005, (factor * (state.to - state.from)) / 2));
  const from = Math.max(0, Math.min(middle - half, 2 - 2 * half));
  show({ from, to: from + 2 * half });
}

// The next buffer in the order of making that is in sight.
function along(step) {
  const paths = view.paths;
  let i = state.picked === null ? (step > 0 ? -1 : paths.length) : state.picked;
  do i += step;
  while (i >= 0 && i < paths.length && !paths[i]);
  return i >= 0 && i < paths.length ? i : state.picked;
}

// The one above (1) or below (-1) the picked buffer: the next that lives at the same time.
function beside(step) {
  const { trace, paths } = view;
  const own = trace.buffers[state.picked];
  const end = (b) => (b[DIES] === null ? Infinity : b[DIES]);
  for (let i = state.picked + step; i >= 0 && i < paths.length; i += step) {
    const b = trace.buffers[i];
    if (paths[i] && b[BORN] < end(own) && own[BORN] < end(b)) return i;
  }
  return state.picked;
}

const KEYS = {
  ArrowRight: () => along(1),
  ArrowLeft: () => along(-1),
  ArrowUp: () => (state.picked === null ? along(1) : beside(1)),
  ArrowDown: () => (state.picked === null ? along(-1) : beside(-1)),
};

chart.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "Escape") show({ loop: null });
  else if (event.key === "+" || event.key === "=") zoom(0.5);
  else if (event.key === "-") zoom(2);
  else if (event.key in KEYS) {
    const i = KEYS[event.key]();
    if (i !== null) pick(i);
  } else return;
  event.preventDefault();
});

const CLICK = 0.02; // as far as a click may slip, in places
let dragged = null; // the place where it began

function placeOf(event) {
  const box = overview.getBoundingClientRect();
  const there = (event.clientX - box.left - LEFT) / (box.width - LEFT - 2);
  return Math.min(2, Math.max(0, 2 * there));
}

overview.addEventListener("pointerdown", (event) => {
  dragged = placeOf(event);
  overview.setPointerCapture(event.pointerId);
});
overview.addEventListener("pointermove", (event) => {
  if (dragged === null) return;
  const here = placeOf(event);
  if (Math.abs(here - dragged) >= CLICK)
    show({ from: Math.min(here, dragged), to: Math.max(here, dragged) });
});
overview.addEventListener("pointerup", (event) => {
  if (dragged !== null && Math.abs(placeOf(event) - dragged) < CLICK) show({ from: 0, to: 2 });
  dragged = null;
});
overview.addEventListener("pointercancel", () => (dragged = null));

for (const button of document.querySelectorAll("button[data-loop]"))
  button.addEventListener("click", () => {
    show({ of: "mst", from: 0, to: 2, loop: button.dataset.loop });
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    $("step").scrollIntoView({ behavior: still ? "auto" : "smooth" });
    chart.focus({ preventScroll: true });
  });

let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone's bars come and go
  width = innerWidth;
  show({});
});

$("timeline").hidden = false;
draw();
press();
