// Where things are on the timeline. Time is a place from 0 to 2: the forward is the first half, the
// backward the second, so that two backends lie over each other.

const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = ["kept for the backward", "inside a loop", "passing", "gradients"];
const [BYTES, GRAD, BORN, DIES, WHAT, LINE, LOOP, , KIND] = Array(9).keys(); // of a buffer

function size(n) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (n >= 1000 * unit) return `${many(Math.round(n / unit))} ${name}`;
    if (n >= unit) return `${+(n / unit).toPrecision(3)} ${name}`;
  }
  return `${n} B`;
}

function many(n) {
  return n.toLocaleString("en");
}

function place(trace, time) {
  if (time === null) return 2;
  if (time <= trace.backward) return time / Math.max(trace.backward, 1);
  const end = Math.max(trace.times[trace.times.length - 1], trace.backward + 1);
  return 1 + (time - trace.backward) / (end - trace.backward);
}

// Buffers stand on each other in the order of their making; when one goes, those above come down.
// Of each: the steps [time, bottom] that it takes. The band on top, [time, bottom, top], is what is
// not drawn by itself. The first entry of a timeline is the empty start, at the first event's time.
function stacked(trace) {
  if (trace.stacked) return trace.stacked;
  const events = new Map(trace.times.map((time) => [time, { born: [], dies: new Set() }]));
  trace.buffers.forEach((b, i) => {
    events.get(b[BORN]).born.push(i);
    if (b[DIES] !== null) events.get(b[DIES]).dies.add(i);
  });
  const steps = trace.buffers.map(() => []);
  const band = [];
  let alive = [];
  for (let t = 1; t < trace.times.length; t++) {
    const time = trace.times[t];
    const { born, dies } = events.get(time);
    alive = alive.filter((i) => !dies.has(i)).concat(born);
    let height = 0;
    for (const i of alive) {
      const own = steps[i];
      if (!own.length || own[own.length - 1][1] !== height) own.push([time, height]);
      height += trace.buffers[i][BYTES];
    }
    band.push([time, height, trace.totals[t]]);
  }
  return (trace.stacked = { steps, band });
}
