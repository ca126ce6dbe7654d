"""The notebooks as a reader finds them, and as a clean kernel runs them."""

import ast
import importlib.util
import re

import nbformat
import pytest

from tools import notebooks

NOTEBOOKS = notebooks.paths()
# What cells look for first, and do without.
WHERE_INSTALLED = {"torch", "transformers"}
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_picture(notebook):
    return [cell for cell in notebook.cells if "picture" in cell.metadata]


def imported(source):
    """The packages that a cell imports; lines of IPython are no Python."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_they_are_the_six():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@each
def test_outputs_are_stripped(path):
    for cell in code(read(path)):
        assert cell.outputs == []
        assert cell.execution_count is None


@each
def test_the_badge_opens_this_file(path):
    assert read(path).cells[0].source.startswith(notebooks.badge(path))


@each
def test_the_page_and_the_readme_have_the_badge(path):
    for page in ("docs/notebooks.md", "README.md"):
        assert notebooks.badge(path) in (notebooks.ROOT / page).read_text()


@each
def test_the_set_up_is_the_same_everywhere(path):
    cell = code(read(path))[0].source
    assert cell == code(read(NOTEBOOKS[0]))[0].source
    assert f'REPOSITORY = "{notebooks.REPOSITORY}"' in cell


@each
def test_imports_are_installed(path):
    names = {name for cell in code(read(path)) for name in imported(cell.source)}
    assert "moe_jax" in names
    missing = {name for name in names if importlib.util.find_spec(name) is None}
    assert missing <= WHERE_INSTALLED


@each
def test_links_to_other_notebooks(path):
    text = "\n".join(cell.source for cell in read(path).cells)
    for name in re.findall(r"\]\((\w+\.ipynb)\)", text):
        assert (notebooks.FOLDER / name).exists()


@each
def test_pictures_of_the_page_are_there_and_small(path):
    page = (notebooks.ROOT / "docs" / "notebooks.md").read_text()
    names = [cell.metadata["picture"] for cell in with_picture(read(path))]
    assert names
    for name in names:
        picture = notebooks.PICTURES / f"{name}.png"
        assert picture.stat().st_size < 150_000
        assert f"(pictures/{name}.png)" in page


@each
def test_it_runs_from_a_clean_kernel(path, tmp_path):
    notebook = notebooks.execute(path, tmp_path)
    assert all(cell.execution_count for cell in code(notebook))
    drawn = {cell.metadata["picture"]: notebooks.figures(cell) for cell in with_picture(notebook)}
    assert drawn
    assert all(len(png) > 1000 for name in drawn for png in drawn[name] or [b""])


def test_the_kernel_sees_none_of_our_settings(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = notebooks.environment()
    assert not [name for name in found if name.startswith(("JAX", "XLA"))]
    assert found["PATH"]
