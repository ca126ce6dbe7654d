"""Plans a run on machines that are not here.

``python -m moe_jax.plan --config=configs/published/glam_64b_64e.py --topology=v5p:8x8x16
--mesh=data=16,expert=64`` compiles the real training step ahead of time with ``libtpu`` (the extra
``tpu``) and prints one JSON object: whether it fits, what it sends, how fast it can be. ``cpu:8``
simulates devices; a GPU cluster such as ``h100:64`` is planned by formula alone. ``--sweep`` tries
meshes and rematerialisation policies.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags

from moe_jax import cli
from moe_jax.errors import ConfigError
from moe_jax.planning import page, topology
from moe_jax.planning.plan import fitted, parse_mesh, plan, sweep

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, f"CHIP:SHAPE, with a chip of {', '.join(topology.CHIPS)}."
)
_MESH = flags.DEFINE_string("mesh", None, "Mesh axes, such as data=16,expert=64.")
_SWEEP = flags.DEFINE_bool("sweep", False, "Try meshes and policies, and rank them.")
_LIMIT = flags.DEFINE_integer("limit", 3, "Plans of a sweep that are compiled.", lower_bound=0)
_OUTPUT = flags.DEFINE_string("output", None, "Write the JSON to this file, not to stdout.")


def main() -> None:
    """Checks, plans and prints."""
    if not _TOPOLOGY.value:
        raise ConfigError("--topology is missing; try --topology=v5p:4x4x4 or --topology=cpu:8")
    target = topology.parse(_TOPOLOGY.value)
    experiment = cli.experiment_of(_CONFIG)
    if _MESH.value:
        mesh = parse_mesh(_MESH.value, target.num_devices, target.name)
    else:
        mesh = fitted(experiment.mesh, target.num_devices, target.name)
    experiment = dataclasses.replace(experiment, mesh=mesh)
    if not _SWEEP.value:
        experiment.check_program(target.num_devices)
    topology.prepare(target)
    if _SWEEP.value:
        found = {"name": experiment.name, "plans": sweep(experiment, target, _LIMIT.value)}
    else:
        found = plan(experiment, target)
    text = json.dumps(found, indent=2)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(text + "\n")
    else:
        print(text)
    if sys.stderr.isatty():
        print(page.sweep(found) if _SWEEP.value else page.plan(found), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
