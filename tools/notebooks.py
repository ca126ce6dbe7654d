"""Runs the notebooks of ``colab/`` in a new kernel and draws the pictures of ``docs/``.

``python -m tools.notebooks`` runs all notebooks, ``--only=02`` only notebooks whose name contains
``02``.
"""

from __future__ import annotations

import base64
import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags
from PIL import Image

from moe_jax.cli import common
from moe_jax.errors import ConfigError
from tools.address import repository

ROOT = Path(__file__).parents[1]
FOLDER, PICTURES = ROOT / "colab", ROOT / "docs" / "pictures"
REPOSITORY = repository()
TIMEOUT = 600  # Maximum seconds of a notebook.


def paths() -> list[Path]:
    """Returns the notebooks in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def badge(path: Path) -> str:
    """Returns the Markdown badge that opens a notebook in Colab."""
    where = REPOSITORY.removeprefix("https://github.com")
    link = f"https://colab.research.google.com/github{where}/blob/main/colab/{path.name}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def execute(path: Path, folder: Path) -> Any:
    """Runs a notebook in ``folder``, in a separate kernel, and returns it with its outputs.

    The kernel has the environment of a user, without the JAX settings of this process.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=resources)
    return client.execute(env=environment())


def environment() -> dict[str, str]:
    """Returns the environment without JAX settings and with this checkout on the Python path."""
    settings = ("JAX", "XLA", "TF_", "LIBTPU", "PYTEST")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    inline = "module://matplotlib_inline.backend_inline"
    return {**plain, "PYTHONPATH": str(ROOT), "MPLBACKEND": inline}


def pictures(notebook: Any) -> dict[str, bytes]:
    """Returns the PNG pictures of an executed notebook, by the name in the metadata of the cell.

    Several figures of one cell are stacked into one picture.
    """
    return {
        cell.metadata["picture"]: _stacked(figures(cell))
        for cell in notebook.cells
        if "picture" in cell.metadata
    }


def figures(cell: Any) -> list[bytes]:
    """Returns the figures that an executed cell shows, as PNG."""
    shown = [output.get("data", {}) for output in cell.get("outputs", ())]
    return [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]


def _stacked(figures: list[bytes]) -> bytes:
    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in figures]
    width, height = max(i.width for i in images), sum(i.height for i in images)
    whole = Image.new("RGB", (width, height), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    file = io.BytesIO()
    # A palette of 128 colours is enough for plots and takes a third of the bytes.
    whole.quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "only", "", "Run only notebooks whose name contains this text.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Runs the notebooks and writes their pictures."""
    chosen = [path for path in paths() if given.only in path.name]
    if not chosen:
        raise ConfigError(
            f"--only={given.only}: no name of a notebook in {FOLDER} contains this text"
        )
    for path in chosen:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        for name, png in pictures(notebook).items():
            (PICTURES / f"{name}.png").write_bytes(png)
        print(f"{path.name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    common.run(define, main)
