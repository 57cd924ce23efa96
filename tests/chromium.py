"""Headless Chromium over its debugging pipe: real clicks and keys, every request and console line on record.

Nothing but the standard library: the browser reads JSON from descriptor 3 and writes it to descriptor 4, each message
ended by a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARY = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # a container's root cannot make one; the pages are this project's own
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the network is off: no name resolves
    "--window-size=1200,1000",
    "--remote-debugging-pipe",
)
WAIT = 60.0
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "Enter": 13, "Home": 36}


class Browser:
    """One tab. requests: URLs asked for, in order. failed, complaints: loads that failed; console errors, warnings
    and uncaught exceptions."""

    def __init__(self, process: "subprocess.Popen[bytes]", send: int, receive: int) -> None:
        self.process, self._send, self._receive = process, send, receive
        self._number, self._rest, self._session = 0, b"", ""
        self.requests: list[str] = []
        self.failed: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        self._tab = ""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are taken note of."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def open(self, url: str) -> float:
        """Load a page in a new tab; seconds until its load event, before which its scripts have run."""
        self._renew()
        self._loaded, start = False, time.perf_counter()
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._note(self._next())
        return time.perf_counter() - start

    def _renew(self) -> None:
        """Another tab in place of the one there is, so that nothing late from the last page is put on record."""
        old, self._session = self._tab, ""
        self._tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        if old:
            self.call("Target.closeTarget", targetId=old)
        self._session = self.call("Target.attachToTarget", targetId=self._tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", **offline)
        self.requests, self.failed, self.complaints = [], [], []

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def settle(self) -> None:
        """Wait until what was scheduled has been painted (React draws in a task of its own)."""
        self.run("new Promise(r => requestAnimationFrame(() => setTimeout(() => requestAnimationFrame(r), 30)))")

    def until(self, expression: str) -> None:
        """Wait for a JavaScript expression to become true."""
        end = time.monotonic() + WAIT
        while not self.run(f"!!({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({place}.getBoundingClientRect())")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            extra = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **extra)
        self.settle()

    def hover(self, selector: str) -> None:
        """Move the mouse over the middle of an element."""
        place = f"document.querySelector({json.dumps(selector)})"
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({place}.getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            self.call("Input.dispatchKeyEvent", type="rawKeyDown", **code)
            if key == "Enter":
                self.call("Input.dispatchKeyEvent", type="char", text="\r", **code)
            self.call("Input.dispatchKeyEvent", type="keyUp", **code)
        self.settle()

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + WAIT
        while b"\0" not in self._rest:
            if not select.select([self._receive], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            if not (block := os.read(self._receive, 1 << 20)):
                raise RuntimeError("Chromium closed its pipe")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        name, told = event.get("method"), event.get("params", {})
        if event.get("sessionId", "") != self._session:
            return
        if name == "Page.loadEventFired":
            self._loaded = True
        elif name == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif name == "Network.loadingFailed":
            self.failed.append(str(told.get("errorText")))
        elif name == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in told["args"]))
        elif name == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(told["entry"]["text"]))


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, gone afterwards."""
    to_browser, send = os.pipe()
    receive, from_browser = os.pipe()

    def wire() -> None:  # Chromium reads descriptor 3 and writes 4; high copies first, so that neither is overwritten
        high = [os.dup2(fd, 60 + i) for i, fd in enumerate((to_browser, from_browser))]
        for fd, place in zip(high, (3, 4), strict=True):
            os.dup2(fd, place)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [str(BINARY), *FLAGS, f"--user-data-dir={profile}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=wire,
        )
        os.close(to_browser), os.close(from_browser)
        try:
            yield Browser(process, send, receive)
        finally:
            process.terminate()
            process.wait(timeout=WAIT)
            os.close(send), os.close(receive)
