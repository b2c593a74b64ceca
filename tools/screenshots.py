"""Opens every page of build/site in chromium, wide and narrow, and writes a picture of each into build/screenshots.

    .venv/bin/nox -s docs -- --screenshots

A page with an error in the console, a request that fails, a picture that is not shown or text that runs out of the
window is an error. Chromium is the one on PATH, or playwright's own.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
SITE, PICTURES = ROOT / "build" / "site", ROOT / "build" / "screenshots"
WIDTHS = {"wide": 1280, "narrow": 390}
"""Of the window, in pixels: a screen and a telephone."""

NOT_SHOWN = (
    "[...document.images].filter(each => each.complete && !each.naturalWidth).map(each => each.src.slice(0, 80))"
)
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def main() -> int:
    """Opens all pages; prints what is wrong, and returns how much that is."""
    pages = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if path.name != "404.html")
    PICTURES.mkdir(parents=True, exist_ok=True)
    with served(SITE) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        wrong = [fault for name in pages for fault in faults_of(browser, address, name)]
        browser.close()
    print(*wrong, f"{len(pages)} pages, {len(wrong)} faults; pictures are in {PICTURES}", sep="\n")
    return len(wrong)


def faults_of(browser: Browser, address: str, name: str) -> Iterator[str]:
    """Opens a page in every width, writes its pictures, and yields what is wrong with it."""
    for kind, width in WIDTHS.items():
        page = browser.new_page(viewport={"width": width, "height": 900})
        heard: list[str] = []
        page.on("console", lambda said, heard=heard: heard.append(said.text) if said.type == "error" else None)
        page.on("requestfailed", lambda request, heard=heard: heard.append(f"no answer: {request.url}"))
        page.goto(f"{address}/{name}", wait_until="networkidle")
        yield from (f"{name}, {kind}: {fault}" for fault in [*heard, *seen(page)])
        page.screenshot(path=PICTURES / f"{name.removesuffix('.html').replace('/', '-')}-{kind}.png", full_page=True)
        page.close()


def seen(page: Page) -> Iterator[str]:
    """Yields what is wrong with how a page looks."""
    yield from (f"a picture is not shown: {each}" for each in page.evaluate(NOT_SHOWN))
    if pixels := page.evaluate(TOO_WIDE):
        yield f"{pixels} pixels run out of the window"
    if not page.locator("article h1").count():
        yield "no heading"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine; yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        """Logs nothing."""

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


if __name__ == "__main__":
    sys.exit(min(main(), 1))
