"""The command ``moe-jax``: ``moe-jax train --config=quickstart --workdir=runs/quickstart``."""

from __future__ import annotations

import importlib
import sys

from moe_jax.cli import common
from moe_jax.config.library import CONFIGS, PUBLISHED
from moe_jax.errors import nearest

COMMANDS = {
    "train": "trains a model, or resumes a run",
    "train_growing": "trains in stages that grow when an alarm stops them",
    "continual": "trains on a second source in several ways, and measures forgetting",
    "evaluate": "evaluates a run on its validation set",
    "generate": "samples text from a run",
    "serve": "offers a model over HTTP, with OpenAI's API",
    "score": "prints the log-likelihood of texts, token by token",
    "explain": "shows the experts of a text and the effect of each",
    "analyze": "shows what the experts of a model take from a corpus",
    "sweep": "trains runs over values of settings",
    "compare": "shows runs beside each other on one page",
    "report": "writes the report of a run again",
    "tokenizer": "trains a BPE tokenizer on the text of a config",
    "settings": "prints settings with their types, ranges and meanings",
    "count": "counts parameters and FLOPs of a model",
    "plan": "plans a run for devices that this machine lacks",
    "convert": "converts weights from and to Hugging Face transformers",
    "tables": "writes a released model's tables of experts by token id",
    "tabulate": "makes a table of experts for common tokens, and measures the loss",
    "upcycle": "makes a mixture of experts of a dense model",
    "prune": "leaves experts of a model out",
    "merge": "merges similar experts of a model",
    "merge_adapters": "merges LoRA adapters into the weights of a run",
    "distil": "makes a smaller student that learns from a mixture",
    "grow": "adds experts to a model, or widens them",
    "hash_experts": "prints a hash of every expert",
    "diff_experts": "compares the experts of two models",
    "take_experts": "takes experts from another model or an older step",
    "quantise": "writes experts of a model in eight or four bits",
    "lr_range": "tests a range of learning rates in a short run",
    "noise_scale": "measures the gradient noise scale in a short run",
    "bench": "measures MoE layers and peers, or loader and training",
    "ablate": "runs an ablation and writes its report",
}
# Flag of each command that a first argument without a flag name sets.
_OF_CONFIGS = (
    "train",
    "train_growing",
    "continual",
    "lr_range",
    "noise_scale",
    "sweep",
    "tokenizer",
    "settings",
    "count",
    "plan",
    "bench",
)
_FIRST = {
    **dict.fromkeys(_OF_CONFIGS, "config"),
    **dict.fromkeys(("evaluate", "generate", "report"), "workdir"),
    "ablate": "ablation",
    **dict.fromkeys(("serve", "score", "explain", "analyze", "tabulate"), "model"),
    **dict.fromkeys(("hash_experts", "diff_experts"), "model"),
    "quantise": "input",
}


def main(command: str | None = None) -> None:
    """Runs one command with the arguments of the process.

    Args:
        command: Name of the command; ``None`` if the first argument names it.
    """
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command is not None:
        name, arguments = command, sys.argv[1:]
    if name in ("", "-h", "--help", "help"):
        print(_usage())
        sys.exit(0)
    if name not in COMMANDS:
        line = f"error: {name!r} is not a command of moe-jax{nearest(name, COMMANDS)}"
        print(line, file=sys.stderr)
        sys.exit(2)
    if name in _FIRST and arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--{_FIRST[name]}={arguments[0]}"
    module = importlib.import_module(f"moe_jax.cli.{name}")
    common.run(module.define, module.main, [f"moe-jax {name}", *arguments])


def _usage() -> str:
    """Returns all commands, and where flags, settings and configs are listed."""
    commands = [f"  {command:16s}{what}" for command, what in COMMANDS.items()]
    configs = sorted(path.stem for path in CONFIGS.glob("[!_]*.py") if path.stem != "common")
    published = len([*PUBLISHED.glob("[!_]*.py")])
    return "\n".join(
        [
            "usage: moe-jax COMMAND [CONFIG] [flags]",
            "",
            *commands,
            "",
            "first run:  moe-jax train quickstart --workdir=runs/quickstart",
            "flags:      moe-jax COMMAND --help",
            "settings:   moe-jax settings quickstart --word=capacity",
            f"configs:    {', '.join(configs)}, and {published} published models "
            "(moe-jax count --all)",
        ]
    )
