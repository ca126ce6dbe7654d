"""One address of the project, in ``pyproject.toml``; every other text has a copy of it."""

import re
import subprocess

import pytest

from tools import address

GITHUB = "https://github.com/"
OLD, NEW = f"{GITHUB}old_account/moe_jax", f"{GITHUB}new-account/moe_jax"


@pytest.fixture
def checkout(tmp_path):
    """A repository with two tracked files, and one that is not tracked."""
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{OLD}"\n')
    colab = OLD.replace(GITHUB, "https://colab.research.google.com/github/") + "/blob/main/a.ipynb"
    (tmp_path / "page.md").write_text(f"{OLD}/issues {colab} https://github.com/google/flax")
    (tmp_path / "notes.txt").write_text(OLD)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "pyproject.toml", "page.md"], cwd=tmp_path, check=True)
    return tmp_path


def test_no_tracked_file_has_another_address():
    assert not address.outdated(address.repository()), "run python -m tools.address"


def test_the_citation_has_the_version_and_the_address_of_the_project():
    text = (address.ROOT / "CITATION.cff").read_text()
    assert f"version: {address.project()['version']}\n" in text
    assert f"repository-code: {address.repository()}\n" in text


def test_only_the_account_of_this_project_is_replaced():
    # Another project and another repository of the account stay as they are.
    text = f"{OLD}.git {GITHUB}google/flax {OLD}_data"
    assert address.written(text, NEW) == text.replace(OLD + ".git", NEW + ".git")
    usage = "--set=https://github.com/ACCOUNT/moe_jax"
    assert address.written(usage, NEW) == usage


def test_set_changes_every_tracked_file(checkout, capsys):
    assert address.main(["--check"], checkout) == 0
    assert address.main([f"--set={NEW}"], checkout) == 0
    assert address.repository(checkout) == NEW
    page = (checkout / "page.md").read_text()
    assert "old_account" not in page and len(re.findall("new-account", page)) == 2
    assert (checkout / "notes.txt").read_text() == OLD
    assert "written: page.md, pyproject.toml" in capsys.readouterr().out


def test_check_names_the_file_with_another_address(checkout, capsys):
    (checkout / "page.md").write_text(NEW)
    assert address.main(["--check"], checkout) == 1
    assert "page.md; run python -m tools.address" in capsys.readouterr().out
    assert address.main([], checkout) == 0
    assert (checkout / "page.md").read_text() == OLD


def test_an_address_elsewhere_is_rejected(checkout):
    with pytest.raises(SystemExit):
        address.main(["--set=https://example.com/moe_jax"], checkout)
