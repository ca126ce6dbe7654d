"""Plans the published models on machines that can train them.

``python -m tools.plans`` runs ``moe_jax.plan`` for every entry below, one at a time, and writes
``experiments/results/plans/NAME.json`` and the table of ``docs/plans.md``. ``--only=mixtral`` makes
only plans whose name contains ``mixtral``; ``--only=`` makes no plan and writes the table of the
existing plans.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from moe_jax import files, signals
from moe_jax.cli import common
from moe_jax.planning.page import human, mesh

_MARKS = ("<!-- plans -->\n", "<!-- end of plans -->")
_BEFORE_MARKS = ("<!-- before -->\n", "<!-- end of before -->")
_DECODING_MARKS = ("<!-- decode steps -->\n", "<!-- end of decode steps -->")
_HEAD = (
    "| plan | parameters | chips | mesh | tokens a step | remat, microbatches | compiles | "
    "state | peak of HBM | sent | FLOPs | step, at best | MFU, at most | planning |\n"
    + "|---" * 14
    + "|\n"
)
_BEFORE = (
    "| plan | temporaries | FLOPs | step, at best | MFU, at most | transport | mesh |\n"
    + "|---" * 7
    + "|\n"
)
_DECODING = (
    "| plan | chips | mesh | requests | fits | parameters | cache | temporaries | peak of HBM | "
    "experts read | read | sent | FLOPs | step, at best | tokens/s, at most | planning |\n"
    + "|---" * 16
    + "|\n"
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A published model on a machine.

    Attributes:
        name: Name of the file of the plan.
        config: Name of the config in ``configs/published``.
        topology: Topology of the machine.
        mesh: Shape of the mesh.
        overrides: Settings that the paper does not give.
        requests: Numbers of requests and of the tokens that each attends to in a decode step;
            ``None`` plans a training step.
    """

    name: str
    config: str
    topology: str
    mesh: str
    overrides: tuple[str, ...] = ()
    requests: tuple[int, int] | None = None

    @property
    def arguments(self) -> list[str]:
        """Arguments of the command."""
        return [
            f"--config=configs/published/{self.config}.py",
            f"--topology={self.topology}",
            f"--mesh={self.mesh}",
            *(f"--config.{override}" for override in self.overrides),
            *self._of_step(),
        ]

    def _of_step(self) -> tuple[str, ...]:
        if self.requests is None:
            return ()
        batch, context = self.requests
        return "--decode", f"--batch={batch}", f"--context={context}"


def _groups(encoder: int, decoder: int) -> tuple[str, str]:
    return (
        f"model.encoder_moe.group_size={encoder}",
        f"model.decoder_moe.group_size={decoder}",
    )


_MIXTRAL = ("data.batch_size=1024", "data.seq_length=4096", "training.loss_chunk=512")
PLANS = (
    Planned(
        "switch_base_128.v4",
        "switch_base_128",
        "v4:2x4x4",
        "expert=32",
        (*_groups(2048, 912), "training.microbatches=4"),
    ),
    Planned(
        "switch_base_128.v5e",
        "switch_base_128",
        "v5e:4x8",
        "expert=32",
        (*_groups(2048, 912), "training.microbatches=8"),
    ),
    Planned(
        "mixtral_8x7b.v5p",
        "mixtral_8x7b",
        "v5p:4x4x8",
        "fsdp=128",
        (*_MIXTRAL, "training.microbatches=4"),
    ),
    Planned(
        "mixtral_8x7b.v6e",
        "mixtral_8x7b",
        "v6e:16x16",
        "fsdp=256",
        (*_MIXTRAL, "training.microbatches=2"),
    ),
    Planned(
        "mixtral_8x7b.v5p.32768",
        "mixtral_8x7b",
        "v5p:4x4x8",
        "fsdp=128",
        ("training.loss_chunk=512",),
    ),
    Planned(
        "qwen3_30b_a3b.v5p",
        "qwen3_30b_a3b",
        "v5p:4x4x4",
        "fsdp=64",
        (
            "data.batch_size=1024",
            "data.seq_length=4096",
            "training.loss_chunk=512",
            "training.microbatches=4",
        ),
    ),
    Planned(
        "olmoe_1b_7b.v5p",
        "olmoe_1b_7b",
        "v5p:2x4x4",
        "fsdp=32",
        ("data.batch_size=1024", "training.loss_chunk=512", "training.microbatches=8"),
    ),
    Planned(
        "ec_8b_64e.v4",
        "ec_8b_64e",
        "v4:8x8x8",
        "fsdp=8,expert=64",
        ("training.loss_chunk=256",),
    ),
    Planned(
        "switch_xxl_128.v4",
        "switch_xxl_128",
        "v4:8x8x8",
        "fsdp=16,expert=32",
        (*_groups(2048, 456),),
    ),
    Planned(
        "switch_c_2048.v5p",
        "switch_c_2048",
        "v5p:8x8x8",
        "expert=512",
        (*_groups(2048, 456),),
    ),
    Planned(
        "glam_64b_64e.v5p",
        "glam_64b_64e",
        "v5p:8x8x16",
        "fsdp=16,expert=64",
        ("training.loss_chunk=128",),
    ),
    Planned(
        "gshard_2048e_36l.v4",
        "gshard_2048e_36l",
        "v4:8x16x16",
        "expert=2048",
        ("data.batch_size=16384", *_groups(1024, 1024)),
    ),
    Planned(
        "deepseek_v3.v5p",
        "deepseek_v3",
        "v5p:8x8x8",
        "fsdp=32,expert=16",
        (
            "model.moe.exchange_buffer=1.1",
            "training.loss_chunk=512",
            "training.microbatches=30",
        ),
    ),
)


DECODE_PLANS = (
    Planned(
        "mixtral_8x7b.v5e.decode",
        "mixtral_8x7b",
        "v5e:4x4",
        "expert=8,model=2",
        ("model.moe.group_size=4",),
        (32, 2048),
    ),
    Planned(
        "mixtral_8x7b.v6e.decode",
        "mixtral_8x7b",
        "v6e:4x4",
        "expert=8,model=2",
        ("model.moe.group_size=8",),
        (64, 2048),
    ),
    Planned(
        "mixtral_8x7b.v5p.decode",
        "mixtral_8x7b",
        "v5p:2x2x2",
        "expert=8",
        ("model.moe.group_size=8",),
        (64, 2048),
    ),
    Planned(
        "deepseek_v3.v6e.decode",
        "deepseek_v3",
        "v6e:16x16",
        "expert=64,model=4",
        ("model.moe.group_size=1", "model.lookahead=0"),
        (64, 2048),
    ),
    Planned(
        "deepseek_v3.v5p.decode",
        "deepseek_v3",
        "v5p:4x4x4",
        "expert=32,model=2",
        ("model.moe.group_size=2", "model.lookahead=0"),
        (64, 2048),
    ),
    Planned(
        "deepseek_v3.v5e.decode",
        "deepseek_v3",
        "v5e:16x16",
        "expert=16,model=16",
        (
            "model.moe.group_size=2",
            "model.lookahead=0",
            "model.moe.transport=gather",
            "model.moe.exchange=all_to_all",
        ),
        (32, 2048),
    ),
)


def run(planned: Planned, folder: Path) -> dict[str, Any]:
    """Makes one plan in a separate process and writes its file.

    Raises:
        RuntimeError: The command failed; the message holds its stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "plan.json"
        command = [sys.executable, "-m", "moe_jax.plan", *planned.arguments, f"--output={output}"]
        began = time.perf_counter()
        process = None
        try:
            # A signal between the start and the name of the process would leave it running.
            with signals.holding() as hold:
                hold.begin(silently=True)
                process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            errors = process.stderr.read()
            _, status, used = os.wait4(process.pid, 0)
        except signals.Interrupted:
            if process is not None:
                process.kill()
                process.wait()
            raise
        if status:
            raise RuntimeError(f"{planned.name}: {errors.strip()}")
        plan = json.loads(output.read_text())
    plan["arguments"] = planned.arguments
    if planned.requests is None:
        plan["before"] = _before(folder / f"{planned.name}.json")
    plan["planning"] = {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_bytes": used.ru_maxrss * 1024,
    }
    with files.replaced(folder / f"{planned.name}.json") as temporary:
        temporary.write_text(json.dumps(plan, indent=2) + "\n")
    return plan


def _before(path: Path) -> dict[str, Any] | None:
    """Returns the figures that a plan had before, from its file, or ``None`` if it is new.

    A file that has such figures keeps them, so that they are those of the first plan.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found["before"] if "before" in found else figures(found)


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a plan that are compared with its figures before."""
    flops, compiled = found["flops_per_step"], found.get("compiled_flops")
    return {
        "temporaries": found["bytes_per_device"]["temporaries"],
        "flops": compiled["total"] if compiled else flops["hardware"],
        "step_seconds": found["roofline"]["step_seconds"],
        "mfu": found["roofline"]["mfu"],
        "transport": sorted(set(found["transport"].values())),
        "mesh": mesh(found),
    }


def _existing(
    folder: Path, plans: tuple[Planned, ...] = PLANS
) -> Iterator[tuple[str, dict[str, Any]]]:
    for planned in plans:
        path = folder / f"{planned.name}.json"
        if path.exists():
            yield planned.name, json.loads(path.read_text())


def table(folder: Path) -> str:
    """Returns the table of the existing plans, in the order of ``PLANS``."""
    return _HEAD + "".join(row(name, found) for name, found in _existing(folder))


def decoding_table(folder: Path) -> str:
    """Returns the table of the existing plans of decode steps, in the order of their list."""
    existing = _existing(folder, DECODE_PLANS)
    return _DECODING + "".join(decoding_row(name, found) for name, found in existing)


def comparison(folder: Path) -> str:
    """Returns the table of the figures before and after, of all plans that are not new."""
    rows = []
    for name, found in _existing(folder):
        if found.get("before"):
            after = figures(found)
            rows += [_compared(f"`{name}` before", found["before"]), _compared("after", after)]
    return _BEFORE + "".join(rows)


def _compared(name: str, values: dict[str, Any]) -> str:
    cells = (
        name,
        human(values["temporaries"]),
        f"{values['flops']:.3g}",
        f"{values['step_seconds']:.3g} s",
        f"{100 * values['mfu']:.1f} %",
        ", ".join(values["transport"]),
        values["mesh"],
    )
    return f"| {' | '.join(cells)} |\n"


def row(name: str, found: dict[str, Any]) -> str:
    """Returns the table row of a plan."""
    memory, bound, compiled = found["bytes_per_device"], found["roofline"], found["compiled"]
    state = sum(memory[part] for part in ("parameters", "optimizer", "other", "batch"))
    sent = sum(one["bytes"] for one in found["collectives"])
    fits = "fits" if found["fits"] else f"**{human(memory['missing'])} too much**"
    cells = (
        f"`{name}`",
        f"{found['parameters'] / 1e9:,.1f}B",
        f"{found['chips']:,} × {found['topology'].split(':')[0]}",
        mesh(found),
        f"{found['batch']['tokens'] / 1e6:.3g}M",
        f"{found['remat']}, {found['microbatches']}",
        fits if compiled else "by formula",
        human(state),
        f"{human(memory['peak'])} of {human(memory['hbm'])}",
        human(sent),
        _of_needed(found),
        f"{bound['step_seconds']:.3g} s ({bound['bound']})",
        f"{100 * bound['mfu']:.1f} %",
        f"{found['planning']['seconds']:.0f} s, {human(found['planning']['peak_bytes'])}",
    )
    return f"| {' | '.join(cells)} |\n"


def decoding_row(name: str, found: dict[str, Any]) -> str:
    """Returns the table row of the plan of a decode step."""
    memory, bound, asked = found["bytes_per_device"], found["roofline"], found["decoding"]
    cells = (
        f"`{name}`",
        f"{found['chips']:,} × {found['topology'].split(':')[0]}",
        mesh(found),
        f"{asked['batch']} of {asked['context']:,}",
        "fits" if found["fits"] else f"**{human(memory['missing'])} too much**",
        *(human(memory[part]) for part in ("parameters", "cache", "temporaries")),
        f"{human(memory['peak'])} of {human(memory['hbm'])}",
        ", ".join(f"{100 * share:.1f} %" for share in found["touched_experts"].values()),
        human(sum(found["bytes_read_per_device"].values())),
        human(sum(one["bytes"] for one in found["collectives"])),
        f"{found['flops_per_step']:.3g}",
        f"{1000 * bound['step_seconds']:.3g} ms ({bound['bound']})",
        f"{bound['tokens_per_second']:,.0f}",
        f"{found['planning']['seconds']:.0f} s, {human(found['planning']['peak_bytes'])}",
    )
    return f"| {' | '.join(cells)} |\n"


def _of_needed(found: dict[str, Any]) -> str:
    share = (found.get("compiled_flops") or {}).get("of_needed")
    return "" if share is None else f"{share:.2f}x"


def write_table(page: Path, text: str, marks: tuple[str, str] = _MARKS) -> None:
    """Writes the table between two comments of the page."""
    before, rest = page.read_text().split(marks[0])
    _, after = rest.split(marks[1])
    with files.replaced(page) as temporary:
        temporary.write_text(before + marks[0] + text + marks[1] + after)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "only", None, "Make only plans whose name contains this text.", flag_values=values
    )
    flags.DEFINE_string(
        "folder", "experiments/results/plans", "Folder of the plans.", flag_values=values
    )
    flags.DEFINE_string("page", "docs/plans.md", "Page that shows the table.", flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Makes the plans and writes the table."""
    folder = Path(given.folder)
    chosen = given.only
    for planned in PLANS + DECODE_PLANS:
        if chosen is None or (chosen and re.search(re.escape(chosen), planned.name)):
            signals.advise(f"plans before {planned.name} are written; --only=NAME makes one plan")
            print(f"{planned.name} ...", flush=True)
            written = decoding_row if planned.requests else row
            print(written(planned.name, run(planned, folder)), end="", flush=True)
    write_table(Path(given.page), table(folder))
    write_table(Path(given.page), comparison(folder), _BEFORE_MARKS)
    write_table(Path(given.page), decoding_table(folder), _DECODING_MARKS)


if __name__ == "__main__":
    common.run(define, main)
