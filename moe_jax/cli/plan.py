"""Plans a run for devices that this machine lacks.

``moe-jax plan glam_64b_64e --topology=v5p:8x8x16 --mesh=data=16,expert=64`` compiles the training
step ahead of time with ``libtpu`` (the extra ``tpu``) and prints one JSON object with memory,
collectives and a bound of the step time. ``cpu:8`` simulates devices. A GPU cluster such as
``h100:64`` is planned by formulas, without compilation. ``--sweep`` compares meshes and
rematerialisation policies. ``--decode`` plans a step in which the engine of ``moe-jax serve`` reads
one token of each of ``--batch`` requests.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from moe_jax import files, signals
from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.planning import page, topology
from moe_jax.planning.plan import fitted, parse_mesh, plan, sweep
from moe_jax.serving.decode_plan import plan_decoding
from moe_jax.serving.decode_work import Decoding


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    flags.DEFINE_string(
        "topology",
        None,
        f"Devices as CHIP:SHAPE; CHIP is one of {', '.join(topology.CHIPS)}.",
        flag_values=values,
    )
    flags.DEFINE_string("mesh", None, "Mesh axes, such as data=16,expert=64.", flag_values=values)
    flags.DEFINE_bool(
        "sweep",
        False,
        "Compare and rank meshes and rematerialisation policies.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "limit", 3, "Number of plans of a sweep to compile.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_bool(
        "decode",
        False,
        "Plan a decode step of serving instead of training.",
        flag_values=values,
    )
    for name, default, meaning in (
        ("batch", 64, "Number of requests of a decode step."),
        ("context", 2048, "Number of tokens that each request of a decode step attends to."),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "output", None, "Write the JSON to this file instead of printing.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Checks the configuration, plans the run and prints the plan."""
    if not given.topology:
        raise ConfigError("--topology is missing; try --topology=v5p:4x4x4 or --topology=cpu:8")
    if given.sweep and given.decode:
        raise ConfigError("--sweep compares plans of training steps: omit it or --decode")
    if given.sweep and given.mesh:
        raise ConfigError("--sweep compares all meshes: omit it or --mesh")
    if given.output:
        files.check_file(Path(given.output), "--output")
    target = topology.parse(given.topology)
    experiment = common.experiment_of(given)
    if given.mesh:
        mesh = parse_mesh(given.mesh, target.num_devices, target.name)
    else:
        mesh = fitted(experiment.mesh, target.num_devices, target.name)
    experiment = dataclasses.replace(experiment, mesh=mesh)
    if not given.sweep and not given.decode:
        experiment.check_program(target.num_devices)
    topology.prepare(target)
    if given.sweep:
        _sweep(given, experiment, target)
    elif given.decode:
        asked = Decoding(given.batch, given.context)
        _write(given, plan_decoding(experiment, target, asked), page.decoding)
    else:
        _write(given, plan(experiment, target), page.plan)


def _sweep(given: flags.FlagValues, experiment: Experiment, target: topology.Topology) -> None:
    """Writes the plans of a sweep; Ctrl-C ends the sweep after the current plan."""
    signals.advise("the plans so far are written; run the same command to compile the rest")
    with signals.holding() as hold:
        hold.begin()
        plans = sweep(experiment, target, given.limit, lambda: bool(hold.came))
        _write(given, {"name": experiment.name, "plans": plans}, page.sweep)


def _write(
    given: flags.FlagValues, found: dict[str, Any], summary: Callable[[dict[str, Any]], str]
) -> None:
    text = json.dumps(found, indent=2)
    if given.output:
        with files.replaced(Path(given.output)) as temporary:
            temporary.write_text(text + "\n")
    else:
        print(text, flush=True)
    if sys.stderr.isatty():
        print(summary(found), file=sys.stderr)


if __name__ == "__main__":
    common.run(define, main)
