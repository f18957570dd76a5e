"""A headless Chromium for tests, driven through chromedriver by the W3C WebDriver protocol, which is JSON over HTTP.

Debian and Ubuntu have both programs as the packages ``chromium`` and ``chromium-driver``.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

PATIENCE_S = 30.0
ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def programs() -> tuple[str, str] | None:
    """Chromium and its driver, where both are installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One browser window with a profile of its own."""

    def __init__(self, browser: str, driver: str, profile: Path, *flags: str) -> None:
        self._driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            self._http = httpx.Client(base_url=f"http://127.0.0.1:{self._port()}", timeout=PATIENCE_S, trust_env=False)
            options = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={profile}", *flags]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            session = self._post("/session", capabilities={"alwaysMatch": wanted})
            self._root = f"/session/{session['sessionId']}"
        except BaseException:
            self._driver.kill()
            raise

    def _port(self) -> str:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            found = re.search(r"started successfully on port (\d+)", line)
            if found:
                return found.group(1)
        raise AssertionError("chromedriver ended without a word")

    def _post(self, path: str, **body: Any) -> Any:
        return self._value(self._http.post(path, json=body))

    @staticmethod
    def _value(reply: httpx.Response) -> Any:
        value = reply.json()["value"]
        assert reply.status_code == 200, f"{value['error']}: {value['message']}"
        return value

    def close(self) -> None:
        """Ends browser and driver."""
        with suppress(httpx.HTTPError):
            self._http.delete(self._root)
        self._driver.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._driver.wait(10)
        self._driver.kill()
        self._driver.wait()
        self._http.close()

    def open(self, url: str) -> None:
        """Opens a page and waits until it has been loaded."""
        self._post(f"{self._root}/url", url=url)

    def resize(self, width: int, height: int) -> None:
        """Makes the page (not the window) so large, and ``phone`` or not by its width."""
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def tell(self, command: str, **params: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self._post(f"{self._root}/goog/cdp/execute", cmd=command, params=params)

    def run(self, script: str, *args: Any) -> Any:
        """What a function body of JavaScript returns; ``arguments`` has the arguments."""
        return self._post(f"{self._root}/execute/sync", script=script, args=list(args))

    def _element(self, selector: str) -> str:
        found = self._post(f"{self._root}/element", using="css selector", value=selector)
        return f"{self._root}/element/{found[_ELEMENT]}"

    def click(self, selector: str) -> None:
        """Clicks an element, which must be visible."""
        self._post(f"{self._element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Types into an element as a keyboard does."""
        self._post(f"{self._element(selector)}/value", text=text)

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post(f"{self._root}/actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def text(self, selector: str) -> str:
        """The text of an element; empty where there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def wait(self, script: str, *args: Any) -> Any:
        """Waits until an expression of JavaScript is true; its value."""
        return self.wait_for(lambda: self.run(f"return {script}", *args), script)

    def wait_for(self, true: Callable[[], Any], what: str) -> Any:
        """Waits until something is so, and fails where it never is."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := true()):
            assert time.monotonic() < deadline, f"never: {what}"
            time.sleep(0.02)
        return found

    def logs(self, kind: str) -> list[dict[str, Any]]:
        """What the browser noted since the last call: ``browser`` (its console) or ``performance``."""
        found: list[dict[str, Any]] = self._post(f"{self._root}/se/log", type=kind)
        return found

    def screenshot(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode(self._value(self._http.get(f"{self._root}/screenshot")))
