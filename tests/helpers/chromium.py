"""Pages in headless Chromium, over its DevTools protocol: their log, requests and sizes."""

import asyncio
import base64
import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

_LISTENS = re.compile(rb"DevTools listening on (ws://127\.0\.0\.1:\d+)/")


@dataclasses.dataclass
class Shown:
    """Facts of a page that was shown."""

    complaints: list[str]
    """Errors and warnings of the console and the log."""
    requests: list[str]
    """URLs that were requested, except for the page itself and the data it contains."""
    width: int
    """Width of the document, in CSS pixels."""
    broken: list[str]
    """Alternative texts of the images that were not drawn."""
    smallest: float
    """Size of the smallest text, in pixels."""


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Starts Chromium with a profile of its own; yields the address of its DevTools on loopback."""
    program = shutil.which("chromium")
    assert program, "the Debian package chromium is needed"
    log = folder / "chromium.log"
    words = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    words += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", "about:blank"]
    with (
        log.open("wb") as output,
        subprocess.Popen([program, *words], stdout=output, stderr=output) as process,
    ):
        try:
            while not (match := _LISTENS.search(log.read_bytes())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield match[1].decode().replace("ws:", "http:")
        finally:
            process.terminate()


def show(address: str, page: Path, *, width: int, picture: Path) -> Shown:
    """Shows a file at a width, and saves a screenshot of all of it."""
    return asyncio.run(asyncio.wait_for(_show(address, page.as_uri(), width, picture), 120))


async def _show(address: str, url: str, width: int, picture: Path) -> Shown:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{address}/json/new?about:blank") as answer:
            target = json.loads(await answer.text())["webSocketDebuggerUrl"]
        async with session.ws_connect(target, max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.ask(f"{domain}.enable")
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            await tab.ask("Emulation.setDeviceMetricsOverride", **size)
            await tab.ask("Page.navigate", url=url)
            await tab.until("Page.loadEventFired")
            shown = Shown(
                [], [], *[await tab.value(script) for script in (_WIDTH, _BROKEN, _SMALLEST)]
            )
            drawn = await tab.ask("Page.captureScreenshot", captureBeyondViewport=True)
            await asyncio.to_thread(picture.write_bytes, base64.b64decode(drawn["data"]))
            shown.complaints, shown.requests = tab.complaints(), tab.requests(url)
            return shown


_WIDTH = "document.documentElement.scrollWidth"
_BROKEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)"
_SMALLEST = """Math.min(...[...document.querySelectorAll(
    'p, li, td, th, dt, dd, figcaption, summary, span')]
  .map(e => parseFloat(getComputedStyle(e).fontSize)))"""


class _Tab:
    """A tab and the messages it has sent."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._told: list[dict[str, Any]] = []

    async def ask(self, method: str, **words: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": words})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._told.append(message)

    async def until(self, event: str) -> None:
        while not any(message.get("method") == event for message in self._told):
            self._told.append(await self._socket.receive_json())

    async def value(self, script: str) -> Any:
        return (await self.ask("Runtime.evaluate", expression=script, returnByValue=True))[
            "result"
        ]["value"]

    def complaints(self) -> list[str]:
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [
            json.dumps(message["params"])
            for message in self._told
            if message.get("method") in kinds
        ]

    def requests(self, page: str) -> list[str]:
        asked = [
            m["params"]["request"]["url"]
            for m in self._told
            if m.get("method") == "Network.requestWillBeSent"
        ]
        return [url[:200] for url in asked if url != page and not url.startswith("data:")]
