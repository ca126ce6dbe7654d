"""Opens pages in headless Chromium: their complaints, their width and the places of their texts."""

import contextlib
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTHS = (1280, 400)
SCHEMES = ("light", "dark")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
_FLAGS += ["--disable-background-networking", "--disable-component-update"]
_LAYOUT = Path(__file__).with_name("layout.js").read_text()


@contextlib.contextmanager
def started():
    """Chromium without a window; a test is skipped where it or playwright is missing."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    reason = "no playwright: pip install 'moe_jax[browser]'"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


@contextlib.contextmanager
def opened(chromium, address, width=WIDTHS[0], scheme="light", log=None):
    """A page that asks no other host while it is open, and logs nothing or lines with ``log``."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, logged = [], []
    page.on("console", lambda line: logged.append(line.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.extend(_failed(request)))
    page.on("request", lambda request: complaints.extend(_foreign(address, request.url)))
    page.goto(address, wait_until="load")
    yield page
    # Closing a page aborts the requests that it has left open.
    found = [*complaints, *(line for line in logged if log is None or log not in line)]
    page.close()
    assert found == [], found


def _failed(request):
    """A page may stop to read an answer; the browser calls that request aborted."""
    aborted = request.failure == "net::ERR_ABORTED"
    return [] if aborted else [f"failed: {request.url}: {request.failure}"]


def _foreign(address, asked):
    own, other = urlsplit(address), urlsplit(asked)
    inside = other.scheme == "data" or (own.scheme, own.netloc) == (other.scheme, other.netloc)
    return [] if inside else [f"asks {asked}"]


def check_layout(page):
    """Fails if a page is wider than its window, or if a text is cut off or covers another."""
    wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window, f"{wide} pixels in a window of {window}"
    found = page.evaluate(_LAYOUT)
    assert found["number"] > 5
    assert found["covered"] == [], f"texts cover each other: {found['covered']}"
    assert found["cut"] == [], f"texts are cut off: {found['cut']}"


def check(chromium, path):
    """Opens a file at both widths and in both colour schemes, and checks its layout."""
    for width, scheme in zip(WIDTHS, SCHEMES, strict=True):
        with opened(chromium, Path(path).resolve().as_uri(), width, scheme) as page:
            check_layout(page)
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            shade = sum(map(int, re.findall(r"\d+", colour)[:3]))
            assert (shade > 600) == (scheme == "light")


class _Elements(HTMLParser):
    """Counts the elements of a page, and holds the names of the open ones."""

    EMPTY = {"meta", "br", "hr", "img", "input", "link"}

    def __init__(self):
        super().__init__()
        self.counts, self.open = Counter(), []

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] += 1

    def handle_starttag(self, tag, attributes):
        self.counts[tag] += 1
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def elements(page):
    """The number of elements of a page by name; each closes the last one that is open."""
    parser = _Elements()
    parser.feed(page.read_text())
    assert parser.open == []
    return parser.counts
