"""The command ``moe-jax``: ``moe-jax train --config=quickstart --workdir=runs/quickstart``."""

from __future__ import annotations

import importlib
import sys

from moe_jax.cli import common

COMMANDS = {
    "train": "trains a model, or resumes a run",
    "evaluate": "evaluates a run on its validation set",
    "generate": "samples text from a run",
    "score": "prints the log-likelihood of texts, token by token",
    "sweep": "trains runs over values of settings",
    "compare": "shows runs beside each other on one page",
    "report": "writes the report of a run again",
    "tokenizer": "trains a BPE tokenizer on the text of a config",
    "settings": "prints settings with their types, ranges and meanings",
    "count": "counts parameters and FLOPs of a model",
    "plan": "plans a run for devices that this machine lacks",
    "convert": "converts weights from and to Hugging Face transformers",
    "lr_range": "tests a range of learning rates in a short run",
    "bench": "measures MoE layers and peers, or loader and training",
    "ablate": "runs an ablation and writes its report",
}
# Flag of each command that a first argument without a flag name sets.
_OF_CONFIGS = ("train", "lr_range", "sweep", "tokenizer", "settings", "count", "plan", "bench")
_FIRST = dict.fromkeys(_OF_CONFIGS, "config") | {"ablate": "ablation"}


def main(command: str | None = None) -> None:
    """Runs one command with the arguments of the process.

    Args:
        command: Name of the command; ``None`` if the first argument names it.
    """
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command is not None:
        name, arguments = command, sys.argv[1:]
    if name not in COMMANDS:
        is_help = name in ("-h", "--help")
        print(_usage("" if is_help else name), file=sys.stdout if is_help else sys.stderr)
        sys.exit(0 if is_help else 2)
    if name in _FIRST and arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--{_FIRST[name]}={arguments[0]}"
    module = importlib.import_module(f"moe_jax.cli.{name}")
    common.run(module.define, module.main, [f"moe-jax {name}", *arguments])


def _usage(name: str) -> str:
    wrong = f"error: {name!r} is not a command\n" if name else ""
    lines = [f"  {command:10s}{what}" for command, what in COMMANDS.items()]
    listing = "\n".join(lines)
    return f"{wrong}usage: moe-jax COMMAND [flags]; moe-jax COMMAND --help\n\n{listing}"
