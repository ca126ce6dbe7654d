"""Hooks of MkDocs: the repository's address, and links to files outside ``docs/``.

A page links to a source file relatively (``../moe_jax/routing/plan.py``), so that the link works in
a checkout and on GitHub. The site has no such file; there the link leads to the repository.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path.

from tools.address import repository  # noqa: E402

_LINK = re.compile(r"(!?\]\()(\.\./[^)#\s]+)")


def on_config(config: Any) -> Any:
    """Adds the repository's address to the configuration of the site."""
    config.repo_url = repository()
    config.repo_name = "moe_jax"
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns a page whose links to files outside ``docs/`` lead to the repository.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    return _LINK.sub(lambda match: match[1] + outside(match[2]), markdown)


def outside(link: str) -> str:
    """Returns the address of a file or folder that a page links to by ``../``.

    Raises:
        FileNotFoundError: if there is no such file or folder.
    """
    name = link.removeprefix("../")
    path = ROOT / name
    if not path.exists():
        raise FileNotFoundError(f"a page links to {link}, which does not exist")
    return f"{repository()}/{'tree' if path.is_dir() else 'blob'}/main/{name}"
