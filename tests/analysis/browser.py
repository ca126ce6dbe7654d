"""Opens a page in headless Chromium, or runs its script in Node beside a small document."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NODE = shutil.which("node")

_DOCUMENT = """
class Element {
  constructor(name) { Object.assign(this, {name, children: [], attributes: {}, style: {}, value: "",
    textContent: "", on: {}}); }
  setAttribute(key, value) { this.attributes[key] = String(value); }
  appendChild(child) { this.children.push(child); return child; }
  replaceChildren(...children) { this.children = children; }
  addEventListener(event, then) { this.on[event] = then; }
  insertRow() { return this.appendChild(new Element("tr")); }
}
const named = {};
const document = { getElementById: (id) => (named[id] ??= new Element(id)),
  createElement: (name) => new Element(name), createElementNS: (_, name) => new Element(name) };
document.getElementById("data").textContent = DATA;
document.getElementById("measure").value = "effects";
SCRIPT;
const count = (node) => node.children.reduce((sum, child) => sum + count(child),
  node.attributes.class === "cell" ? 1 : 0);
process.stdout.write(JSON.stringify({ cells: count(named.grid), where: named.where.textContent }));
"""


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


def opened(page):
    """The number of cells that the script of a page has drawn, and the heading of its table."""
    if CHROMIUM:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        text = subprocess.run(
            [CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, check=True
        ).stdout
        where = re.search(r'<h2 id="where">(.*?)</h2>', text).group(1)
        return {"cells": text.count('class="cell"'), "where": where}
    text = page.read_text()
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    program = _DOCUMENT.replace("DATA", json.dumps(data)).replace("SCRIPT", script)
    found = subprocess.run([NODE, "-"], input=program, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)
