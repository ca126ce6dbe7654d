"""Copies the project's address from ``pyproject.toml`` into every tracked text.

``python -m tools.address`` writes the address of ``[project.urls]`` into badges, notebooks, pages
and ``CITATION.cff``; ``--check`` writes nothing and fails if a file has a different address.
``--set=https://github.com/ACCOUNT/moe_jax`` changes ``pyproject.toml`` first.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_GITHUB = "https://github.com/"
# An address of this project on GitHub, on GitHub Pages' raw host, or opened by Colab.
_ADDRESS = re.compile(
    r"(https://(?:github\.com|raw\.githubusercontent\.com|colab\.research\.google\.com/github)/)"
    r"([\w.-]+)/moe_jax(?![\w-])"
)
_SET = re.compile(re.escape(_GITHUB) + r"[\w.-]+/moe_jax")
# Texts in which ACCOUNT stands for an account.
_PLACEHOLDERS = ("ACCOUNT", "NAME")


def project(root: Path = ROOT) -> dict:
    """Returns the table ``[project]`` of ``pyproject.toml``."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def repository(root: Path = ROOT) -> str:
    """Returns the address of the repository, such as ``https://github.com/ACCOUNT/moe_jax``."""
    return project(root)["urls"]["Repository"]


def written(text: str, address: str) -> str:
    """Returns ``text`` with ``address`` in the place of every other address of this project."""
    account = address.removeprefix(_GITHUB).split("/")[0]

    def replaced(match: re.Match) -> str:
        return match[0] if match[2] in _PLACEHOLDERS else f"{match[1]}{account}/moe_jax"

    return _ADDRESS.sub(replaced, text)


def outdated(address: str, root: Path = ROOT) -> dict[Path, str]:
    """Returns the tracked files with another address, and the text that each should have."""
    texts = {path: text for path, text in _texts(root) if written(text, address) != text}
    return {path: written(text, address) for path, text in texts.items()}


def _texts(root: Path) -> Iterator[tuple[Path, str]]:
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=root, text=True)
    for name in filter(None, listed.split("\0")):
        path = root / name
        if not path.is_file() or path.suffix == ".png":
            continue
        try:
            yield path, path.read_text()
        except UnicodeDecodeError:
            continue


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Writes or checks the address, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    parser.add_argument("--set", metavar="ADDRESS", help="https://github.com/ACCOUNT/moe_jax")
    options = parser.parse_args(arguments)
    if options.set and not _SET.fullmatch(options.set):
        parser.error(f"--set={options.set} is not https://github.com/ACCOUNT/moe_jax")
    files = outdated(options.set or repository(root), root)
    names = ", ".join(str(path.relative_to(root)) for path in files)
    if options.check:
        if files:
            print(f"not the address of pyproject.toml: {names}; run python -m tools.address")
        return 1 if files else 0
    for path, text in files.items():
        path.write_text(text)
    print(f"written: {names}" if files else "every file has the address already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
