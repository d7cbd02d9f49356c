"""The page of `mstc report`: what is in it, what it keeps out, and what it does in a browser."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import mstc
from mstc.cli import html, steps, timeline
from mstc.cli.app import run
from mstc.cli.subject import Wanted, load_subject
from mstc.cli.text import size
from mstc.watch import SimulatedTrace
from tests.cli.browser import NEEDS_BROWSER, Browser, browser

SCRIPT = """
import torch
from torch import nn
from torch.nn import functional as F

class Model(nn.Module):
    def __init__(self, vocab=8192, hidden=64):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab, bias=False)
        self.up, self.down = nn.Linear(hidden, 16 * hidden), nn.Linear(16 * hidden, hidden)

    def forward(self, ids, labels):
        hidden = self.embed(ids)
        hidden = hidden + self.down(F.gelu(self.up(hidden)))
        logits = self.head(hidden)  # </script><script>window.stolen = 1</script>
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten()), logits

Evil = type("Evil<img src=x onerror='window.stolen=2'>", (Model,), {})

def build(seq_len):
    ids = torch.zeros(1, seq_len, dtype=torch.long)
    return Evil(), {"ids": ids, "labels": ids}
"""
NAME = "<b onclick='alert(1)'>&amp;model.py"  # of the script
LINE = "logits = self.head(hidden)  # </script><script>window.stolen = 1</script>"
WANTED = Wanted(2048, dtype="fp32")


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}  # by the path of elements that it is in
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are nested"

    def handle_data(self, data: str) -> None:
        path = " ".join(self.open[-1:])
        self.text[path] = self.text.get(path, "") + data


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / NAME
    path.write_text(SCRIPT)
    return f"{path}:build"


@pytest.fixture(scope="module")
def made(script: str) -> Iterator[tuple[str, dict[str, SimulatedTrace]]]:
    """A page, and what it is made from."""
    torch._dynamo.reset()
    subject = load_subject(script, WANTED)
    args, kwargs = subject.batch
    traces = steps.traces(subject)
    report = mstc.explain(subject.model, *args, **kwargs)
    yield html.page(subject, WANTED, traces, report), traces
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def file(made: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    html.write(path, made[0])
    return path


def _data(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found)


def test_one_file_that_needs_nothing_else(made: tuple[str, Any]) -> None:
    text, _ = made
    page = Page(text)
    assert not page.open, "every element ends"
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "form", "base", "a")
        assert not {"src", "href", "srcset", "action", "data", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"')]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name, which nobody asks for"
    assert "url(" not in page.text["style"]
    assert "@import" not in page.text["style"]
    (policy,) = [a["content"] for _, a in page.elements if "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_headline(made: tuple[str, dict[str, SimulatedTrace]]) -> None:
    text, traces = made
    before, after = (traces[name].peak_intermediate_nbytes for name in ("inductor", "mst"))
    assert f"<strong>{after / before:.2f}×</strong>" in text
    for trace in traces.values():
        assert f"<b>{size(trace.peak_intermediate_nbytes)}</b>" in text
        assert size(trace.peak_nbytes) in text
    assert "1 × 2,048 tokens" in text
    assert "<li>fp32</li>" in text


def test_data_sums_up_to_the_peaks(made: tuple[str, dict[str, SimulatedTrace]]) -> None:
    text, traces = made
    data = _data(text)
    assert list(data) == ["inductor", "mst"]
    for name, trace in traces.items():
        found = data[name]
        assert max(found["totals"]) == found["peak"] == trace.peak_nbytes
        assert found["count"] == len(found["buffers"]) == len(trace.buffers), "none is left out"
        top = found["times"][found["totals"].index(found["peak"])]
        alive = [b for b in found["buffers"] if b[2] <= top and (b[3] is None or b[3] > top)]
        assert sum(b[0] for b in alive) == trace.peak_nbytes
        top = found["peak_time"]
        alive = [b for b in found["buffers"] if b[2] <= top and (b[3] is None or b[3] > top)]
        assert sum(b[0] - b[1] for b in alive) == trace.peak_intermediate_nbytes
        assert found["kinds"] == [sum(b[0] for b in alive if b[8] == k) for k in range(4)]
    assert data["mst"]["kinds"][timeline.KINDS.index("chunk")] > 0
    assert data["inductor"]["kinds"][timeline.KINDS.index("chunk")] == 0


def test_the_largest_are_drawn(
    made: tuple[str, dict[str, SimulatedTrace]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "DRAWN", 5)
    trace = made[1]["inductor"]
    found = timeline.data_of(trace)
    assert len(found["buffers"]) == 5
    assert found["count"] == len(trace.buffers)
    assert found["kinds"] == _data(made[0])["inductor"]["kinds"], "sums are of all"
    logits = 4 * 8192 * 2048
    assert max(b[0] for b in found["buffers"]) == logits
    assert [b[2] for b in found["buffers"]] == sorted(b[2] for b in found["buffers"])


def test_plan_and_what_stands_at_the_peak(made: tuple[str, Any]) -> None:
    page = Page(made[0])
    loops = [a["data-loop"] for _, a in page.elements if "data-loop" in a]
    assert loops
    names = [loop[2] for loop in _data(made[0])["mst"]["loops"]]
    assert set(loops) <= set(names), "a button finds its loops in the timeline"
    cells = page.text["td"] + page.text["code"]
    assert "gradient-in-forward" in cells
    assert "logits = self.head(hidden)" in cells, "the user's line"


def test_text_is_no_markup(made: tuple[str, Any], script: str) -> None:
    text, _ = made
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert text.count("</script>") == 2
    (raw,) = re.findall(r'id="data">(.*?)</script>', text)
    assert not set("<>&") & set(raw), "no form of an end tag, with or without a blank"
    assert "img" not in dict(page.elements)
    assert page.text["h1"] == "Evil<img src=x onerror='window.stolen=2'>"
    assert script in page.text["p"]
    texts = _data(text)["inductor"]["texts"]
    assert any(line.endswith(LINE) for line in texts), "as it stands in the file"


def test_command(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.html"
    arguments = ["report", script, "--seq-len", "512", "--dtype=fp32", "--out", str(out)]
    assert run(arguments) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    first = out.read_text()
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": [str(out)]}
    assert out.read_text() == first, "the same again, and over the first"
    assert [p.name for p in tmp_path.iterdir()] == ["step.html"]


def test_where_a_page_cannot_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is simulated: the model is not even looked for."""
    (tmp_path / "a.html").mkdir()
    missing = tmp_path / "no" / "a.html"
    for out, message in {
        "report.pdf": "--out report.pdf: it must end in .html.",
        str(missing): f"--out {missing}: there is no folder {missing.parent}.",
        str(tmp_path / "a.html"): f"{tmp_path / 'a.html'} cannot be written.",
    }.items():
        assert run(["report", "nothing.json", "--out", out]) == 2
        assert capsys.readouterr().err == f"mstc: {message}\n"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run(["report", "nothing.json", "--out", str(tmp_path / "b.html")]) == 2
    assert "b.html cannot be written" in capsys.readouterr().err


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.html"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(html.SubjectError, match=r"a\.html cannot be written: No space left"):
        html.write(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


# --- in a browser

_INSIDE = """
const paths = [...document.querySelectorAll(arguments[0])];
paths[0].ownerSVGElement.scrollIntoView({ block: "center" });
for (const path of paths)
  for (let u = 0.1; u < 1; u += 0.1)
    for (let v = 0.1; v < 1; v += 0.1) {
      const box = path.getBoundingClientRect();
      const x = box.x + u * box.width, y = box.y + v * box.height;
      if (document.elementFromPoint(Math.round(x), Math.round(y)) === path) return [x, y];
    }
"""  # where the first of these that can be pointed at is
_TIP = "const tip = document.querySelector('#tip'); return tip.hidden ? null : tip.innerText"


def _check_quiet(window: Browser) -> None:
    assert window.log() == []
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.run("return window.stolen === undefined")


def _click(window: Browser, text: str) -> None:
    buttons = "[...document.querySelectorAll('button')]"
    window.run(f"{buttons}.find(b => b.textContent === arguments[0]).click()", text)


@NEEDS_BROWSER
def test_hovering(file: Path, tmp_path: Path) -> None:
    """The first buffer of 64 MiB that Inductor makes are the logits: bytes, op and line."""
    buffers = _data(file.read_text())["inductor"]["buffers"]
    logits = [b[0] for b in buffers].index(4 * 8192 * 2048)
    with browser(tmp_path, 1200, 900) as window:
        window.open(file)
        assert window.run(_TIP) is None
        _click(window, "inductor")
        x, y = window.run(_INSIDE, f"#chart [data-buffer='{logits}']")
        window.point(x, y)
        told = window.run(_TIP)
        assert "64 MiB" in told
        assert "aten.mm" in told
        assert LINE in told
        assert "model.py" in told
        window.point(5, 5)
        assert window.run(_TIP) is None
        _click(window, "mst")
        x, y = window.run(_INSIDE, "#chart [class*='k1s']")
        window.point(x, y)
        told = window.run(_TIP)
        assert "inside a loop" in told
        assert "chunks" in told
        _check_quiet(window)


_COLUMN = """
const chart = document.querySelector("#chart svg"), point = chart.createSVGPoint();
const paths = [...chart.querySelectorAll(".buffer")];
point.x = +chart.querySelector(".mark").getAttribute("x1") + 2;
let covered = 0;
for (point.y = 0; point.y < 400; point.y += 0.25)
  covered += 0.25 * paths.some((path) => path.isPointInFill(point));
const [low, high] = [...chart.querySelectorAll(".grid")].map((line) => +line.getAttribute("y1"));
const step = chart.querySelectorAll("text")[1].textContent;
return [covered / (low - high), step];
"""  # how much of the line after the peak buffers cover, in steps of the scale; and one step


@NEEDS_BROWSER
@pytest.mark.parametrize("backend", ["inductor", "mst"])
def test_buffers_are_drawn_to_scale(
    made: tuple[str, dict[str, SimulatedTrace]], file: Path, tmp_path: Path, backend: str
) -> None:
    trace = made[1][backend]
    with browser(tmp_path, 1200, 900) as window:
        window.open(file)
        _click(window, backend)
        steps, step = window.run(_COLUMN)
        _check_quiet(window)
    number, unit = step.split()
    assert unit == "MiB"
    (total,) = [nbytes for time, nbytes in trace.timeline[1:] if time == trace.peak_time]
    assert steps * int(number) * 2**20 == pytest.approx(total, rel=0.01)


@NEEDS_BROWSER
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone(file: Path, tmp_path: Path, dark: bool) -> None:
    with browser(tmp_path, 390, 844, phone=True) as window:
        if dark:
            window.prefer_dark()
        window.open(file)
        assert window.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        paper, ink = window.run(
            "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map("
            "c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
        )
        assert (paper < 150 < 600 < ink) if dark else (ink < 150 < 600 < paper)
        x, y = window.run(_INSIDE, "#chart .buffer")
        window.point(x, y, tap=True)
        assert "hidden = self.embed(ids)" in window.run(_TIP)
        left, right, bottom = window.run(
            "const b = document.querySelector('#tip').getBoundingClientRect(); "
            "return [b.left, b.right, b.bottom]"
        )
        assert left >= 0
        assert right <= 390
        assert bottom <= 844
        _check_quiet(window)


@NEEDS_BROWSER
def test_by_keyboard(file: Path, tmp_path: Path) -> None:
    picked = "const on = document.querySelector('.buffer.on'); return on && +on.dataset.buffer"
    part = "return +document.querySelector('.window').getAttribute('width')"
    with browser(tmp_path, 1000, 800) as window:
        window.open(file)
        window.run("document.querySelector('#chart').focus()")
        window.press("ArrowRight", "ArrowRight")
        assert window.run(picked) == 1
        assert "alive" in window.run(_TIP)
        window.press("ArrowUp")
        assert window.run(picked) > 1
        window.press("Escape")
        assert window.run(picked) is None
        assert window.run(_TIP) is None
        window.press("+")
        half = window.run(part)
        window.press("+")
        assert window.run(part) == pytest.approx(half / 2)
        _check_quiet(window)


@NEEDS_BROWSER
def test_looking_closer(file: Path, tmp_path: Path) -> None:
    """Dragging over the upper picture chooses a part; a button of the plan shows its loops."""
    wide = "return document.querySelector('#chart [data-loop]').getBBox().width"
    with browser(tmp_path, 1000, 1600) as window:
        window.open(file)
        before = window.run(wide)
        box = "const b = document.querySelector('#overview').getBoundingClientRect(); "
        left, right, y = window.run(box + "return [b.left, b.right, b.top + 50]")
        window.drag(left + 60, (left + right) / 2, y)
        assert window.run(wide) > 1.5 * before
        _click(window, "whole step")
        assert window.run(wide) == pytest.approx(before)
        assert window.run("return document.querySelectorAll('.rail.on').length") == 0
        window.run("document.querySelector('button[data-loop]').click()")
        assert window.run("return document.querySelectorAll('.rail.on').length") >= 1
        _check_quiet(window)
