"""The command ``moe-jax``: ``moe-jax train --config=quickstart --workdir=runs/quickstart``."""

from __future__ import annotations

import importlib
import sys

from moe_jax.cli import common

COMMANDS = {
    "train": "trains a model, or resumes a run",
    "evaluate": "evaluates a run on its validation set",
    "generate": "samples text from a run",
    "report": "writes the report of a run again",
    "count": "counts parameters and FLOPs of a model",
    "plan": "plans a run on machines that are not here",
    "convert": "converts weights from and to Hugging Face transformers",
    "bench": "measures the data loader beside training",
    "ablate": "runs an ablation and writes its report",
}
# The flag that a first argument without a name stands for.
_FIRST = dict.fromkeys(("train", "count", "plan", "bench"), "config") | {"ablate": "ablation"}


def main(command: str | None = None) -> None:
    """Runs one command with the arguments of the process.

    Args:
        command: its name; ``None`` where the first argument names it.
    """
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command is not None:
        name, arguments = command, sys.argv[1:]
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        print(_usage("" if asked else name), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    if name in _FIRST and arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--{_FIRST[name]}={arguments[0]}"
    module = importlib.import_module(f"moe_jax.cli.{name}")
    common.run(module.define, module.main, [f"moe-jax {name}", *arguments])


def _usage(name: str) -> str:
    wrong = f"error: {name!r} is not a command\n" if name else ""
    lines = [f"  {command:10s}{what}" for command, what in COMMANDS.items()]
    listing = "\n".join(lines)
    return f"{wrong}usage: moe-jax COMMAND [flags]; moe-jax COMMAND --help\n\n{listing}"
