"""A headless Chromium to look at pages with: WebDriver's protocol, which is JSON over HTTP."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")
NEEDS_BROWSER = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER), reason="no chromium and chromedriver (apt: chromium-driver)"
)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update"),
    "--disable-sync",
)
KEYS = {"ArrowRight": "\ue014", "ArrowUp": "\ue013", "Escape": "\ue00c"}  # as WebDriver has them


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def call(self, method: str, path: str, body: object = None) -> Any:
        return _request(method, self._session + path, body)

    def open(self, path: Path) -> None:
        self.call("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: object) -> Any:
        """What the body of a JavaScript function returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def point(self, x: float, y: float, *, tap: bool = False) -> None:
        actions: list[dict[str, Any]] = [{"type": "pointerMove", "x": round(x), "y": round(y)}]
        if tap:
            actions += [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        parameters = {"pointerType": "touch" if tap else "mouse"}
        self._act({"type": "pointer", "id": "p", "parameters": parameters, "actions": actions})

    def drag(self, start: float, end: float, y: float) -> None:
        actions: list[dict[str, Any]] = [
            {"type": "pointerMove", "x": round(start), "y": round(y)},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerMove", "x": round(end), "y": round(y)},
            {"type": "pointerUp", "button": 0},
        ]
        self._act({"type": "pointer", "id": "p", "actions": actions})

    def press(self, *keys: str) -> None:
        pressed = [
            {"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in _UP_AND_DOWN
        ]
        self._act({"type": "key", "id": "k", "actions": pressed})

    def _act(self, actions: dict[str, Any]) -> None:
        self.call("POST", "/actions", {"actions": [actions]})

    def prefer_dark(self) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark"}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        self.call("POST", "/goog/cdp/execute", command)

    def log(self) -> Sequence[dict[str, Any]]:
        """What is in the console: errors, and what the page's policy stopped."""
        return self.call("POST", "/se/log", {"type": "browser"})


_UP_AND_DOWN = ("keyDown", "keyUp")


@contextmanager
def browser(folder: Path, width: int, height: int, *, phone: bool = False) -> Iterator[Browser]:
    """A window of that many pixels; `folder` takes what Chromium keeps."""
    flags = [*_FLAGS, f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}"]
    options: dict[str, Any] = {"binary": _CHROMIUM, "args": flags}
    if phone:
        metrics = {"width": width, "height": height, "pixelRatio": 2, "touch": True}
        options["mobileEmulation"] = {"deviceMetrics": metrics}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options}
    wanted["goog:loggingPrefs"] = {"browser": "ALL"}
    command = [str(_DRIVER), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            ports = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            port = next(found[1] for found in ports if found)
            address = f"http://127.0.0.1:{port}/session"
            body = {"capabilities": {"alwaysMatch": wanted}}
            session = f"{address}/{_request('POST', address, body)['sessionId']}"
            try:
                yield Browser(session)
            finally:
                _request("DELETE", session)
        finally:
            driver.terminate()


def _request(method: str, address: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]
