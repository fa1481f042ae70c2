"""Check of reports in a real browser without a window: what a reader would stumble over.

    python scripts/report/check_report.py runs/b/report.html [more.html ...] [--width 1280] [--screenshot page.png]

Fails on a message of level warning or error in the console, a request for anything but the file itself, a page or a
table that must be scrolled sideways, a picture that does not show, and a link that leads nowhere. Takes chromium or
chrome from the PATH, with a new profile that is thrown away. For POSIX systems.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe")  # fmt: skip
_LOUD = ("warning", "error", "assert")
_MEASURE = """(async () => {
  await Promise.all([...document.images].map(i => i.decode().catch(() => null)));
  const wider = e => e.scrollWidth > e.clientWidth + 1, root = document.scrollingElement;
  const name = e => (e.closest('section')?.querySelector('h2')?.textContent ?? 'the page').trim();
  return {
    wide: wider(root) ? root.scrollWidth : 0,
    scrolled: [...document.body.querySelectorAll('*')].filter(
      e => wider(e) && ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)).map(name),
    broken: [...document.images].filter(i => !i.naturalWidth).map(i => i.alt || 'a picture without a name'),
    dead: [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href')).filter(
      h => !(h.startsWith('#') && document.getElementById(h.slice(1)))),
    images: document.images.length, tables: document.querySelectorAll('table').length,
    sections: document.querySelectorAll('section').length, height: root.scrollHeight};
})()"""


@dataclass(frozen=True)
class Found:
    """What a browser saw.

    Attributes:
        problems: a sentence each; none where the report is fine.
        counts: images, tables, sections, and the height in CSS pixels.
        picture: PNG of the whole page.
    """

    problems: tuple[str, ...]
    counts: dict[str, int]
    picture: bytes


class _Browser:
    """Chrome's DevTools protocol over a pair of pipes: JSON messages with a zero byte after each."""

    def __init__(self, path: str, profile: str) -> None:
        (read_in, self._out), (self._in, write_out) = os.pipe(), os.pipe()
        # The browser reads descriptor 3 and writes descriptor 4: the originals must not lie there.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_in, write_out)]
        null = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in (1, 2)]
        ends = [(os.POSIX_SPAWN_DUP2, theirs[0], 3), (os.POSIX_SPAWN_DUP2, theirs[1], 4)]
        arguments = [path, *_SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        self.process = os.posix_spawn(path, arguments, os.environ, file_actions=[*null, *ends])
        for end in (read_in, write_out, *theirs):
            os.close(end)
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **values: Any) -> dict[str, Any]:
        """Raises: RuntimeError where the browser refuses or does not answer."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": values} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        found = self._until(lambda m: m.get("id") == number, f"an answer to {method}")
        if "error" in found:
            raise RuntimeError(f"the browser refused {method}: {found['error'].get('message')}")
        return dict(found["result"])

    def wait(self, event: str) -> None:
        """Until the event has come."""
        if not any(e["method"] == event for e in self.events):
            self._until(lambda m: m.get("method") == event, event)

    def _until(self, wanted: Callable[[dict[str, Any]], bool], what: str, limit_s: float = 60) -> dict[str, Any]:
        end = time.monotonic() + limit_s
        while True:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                message = json.loads(text)
                if "method" in message:
                    self.events.append(message)
                if wanted(message):
                    return message
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise RuntimeError(f"the browser gave no sign of {what} within {limit_s:g} s")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError(f"the browser ended before {what}")
            self._rest += chunk

    def close(self) -> None:
        try:
            self.ask("Browser.close")
        except (RuntimeError, OSError):
            os.kill(self.process, signal.SIGKILL)
        for end in (self._in, self._out):
            os.close(end)
        os.waitpid(self.process, 0)


@contextlib.contextmanager
def _browser() -> Iterator[_Browser]:
    path = browser_path()
    if path is None:
        raise RuntimeError(f"no browser on the PATH, expected one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = _Browser(path, profile)
        try:
            yield browser
        finally:
            browser.close()


def browser_path() -> str | None:
    """The first browser on the PATH; None where there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def check(report: Path, width: int = 1280) -> Found:
    """Opens a report in a window of this width.

    Raises:
        RuntimeError: where there is no browser, or it fails.
    """
    address = report.resolve(strict=True).as_uri()
    with _browser() as browser:
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            browser.ask(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.ask("Emulation.setDeviceMetricsOverride", session, **size)
        browser.events.clear()
        browser.ask("Page.navigate", session, url=address)
        browser.wait("Page.loadEventFired")
        asked = browser.ask("Runtime.evaluate", session, expression=_MEASURE, awaitPromise=True, returnByValue=True)
        seen = asked["result"]["value"]
        picture = browser.ask("Page.captureScreenshot", session, format="png", captureBeyondViewport=True)["data"]
        events = [e for e in browser.events if e.get("sessionId") == session]
    problems = [f"console: {said}" for said in _loud(events)]
    problems += [f"it asks for {url[:120]}" for url in _requests(events) if url != address]
    if seen["wide"]:
        problems.append(f"the page is {seen['wide']} pixels wide in a window of {width}")
    problems += [f"something in “{name}” must be scrolled sideways" for name in dict.fromkeys(seen["scrolled"])]
    problems += [f"a picture does not show: {name}" for name in seen["broken"]]
    problems += [f"a link leads nowhere within the page: {link}" for link in seen["dead"]]
    counts = {name: int(seen[name]) for name in ("sections", "tables", "images", "height")}
    return Found(tuple(problems), counts, base64.b64decode(picture))


def _loud(events: list[dict[str, Any]]) -> list[str]:
    """Messages of the console that are warnings or worse."""
    found = []
    for event in events:
        values = event["params"]
        if event["method"] == "Log.entryAdded" and values["entry"]["level"] in _LOUD:
            found.append(values["entry"]["text"])
        if event["method"] == "Runtime.consoleAPICalled" and values["type"] in _LOUD:
            found.append(" ".join(str(a.get("value", a.get("description", ""))) for a in values["args"]))
        if event["method"] == "Runtime.exceptionThrown":
            found.append(values["exceptionDetails"]["text"])
    return found


def _requests(events: list[dict[str, Any]]) -> list[str]:
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--width", type=int, default=1280, help="of the window, in CSS pixels")
    parser.add_argument("--screenshot", type=Path, help="PNG to write; of several reports the last one's")
    arguments = parser.parse_args()
    failed = False
    for report in arguments.reports:
        try:
            found = check(report, arguments.width)
        except (RuntimeError, OSError) as error:
            print(f"{report}: {error}", file=sys.stderr)
            return 2
        said = ", ".join(f"{count} {name}" for name, count in found.counts.items() if name != "height")
        print(f"{report}: {said}, {found.counts['height']} pixels high at {arguments.width}")
        for problem in found.problems or ("nothing to complain about",):
            print(f"  {problem}")
        failed |= bool(found.problems)
        if arguments.screenshot is not None:
            arguments.screenshot.write_bytes(found.picture)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
