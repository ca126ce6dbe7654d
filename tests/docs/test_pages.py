"""The first page and the documentation: their links, their length, and what the site adds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tools import docs_hooks
from tools.address import repository

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def links(text):
    """The relative links of a page, outside code, with the part after ``#``."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not link.startswith(("http", "mailto"))]


def anchors(page):
    """The anchors of a page: its headings as MkDocs names them, and those written by hand."""
    titles = re.findall(r"^#+ (.*?)(?: \{ #([\w.-]+) \})?$", page.read_text(), flags=re.MULTILINE)
    return {given or slug(title) for title, given in titles}


def slug(title):
    title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
    words = re.sub(r"[^\w\s-]", "", title).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


@each_page
def test_links_lead_to_files_and_headings(page):
    for link in links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_no_page_names_a_section_twice(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    assert len(titles) == len(set(titles))


def test_the_first_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) < 12_000


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert set(re.findall(r"[\w]+\.md", navigation)) == {page.name for page in DOCS.glob("*.md")}


def test_on_the_site_a_link_to_a_source_file_leads_to_the_repository():
    inside = "![c](pictures/01_text.png) [d](faq.md)"
    text = f"[a](../moe_jax/routing/plan.py#L1) [b](../configs) {inside}"
    assert docs_hooks.on_page_markdown(text) == (
        f"[a]({repository()}/blob/main/moe_jax/routing/plan.py#L1) "
        f"[b]({repository()}/tree/main/configs) {inside}"
    )


def test_a_link_to_a_missing_file_is_an_error():
    with pytest.raises(FileNotFoundError, match="links to ../no_such_file.py"):
        docs_hooks.on_page_markdown("[a](../no_such_file.py)")


def test_figures_are_committed_as_png_alone():
    listed = subprocess.check_output(["git", "ls-files", "*.svg"], cwd=ROOT, text=True)
    assert not listed
