"""Records the collectives of some training steps: ``python -m tools.collectives``.

The tool compiles each step for eight simulated devices and writes the number and the bytes of its
collectives, by kind and mesh axes, to ``experiments/results/collectives.json``. A test compiles the
steps again and shows each difference to the record.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
from moe_jax.configs import quickstart, span_corruption  # noqa: E402

from moe_jax.config.experiment import Experiment  # noqa: E402
from moe_jax.config.schema import build  # noqa: E402
from moe_jax.parallel import MeshConfig, make_mesh  # noqa: E402
from moe_jax.planning.collectives import of_compiled, summary  # noqa: E402
from moe_jax.planning.compile import make_step  # noqa: E402

RESULT = Path(__file__).parents[1] / "experiments" / "results" / "collectives.json"
PLAIN = MeshConfig(data=2, expert=4)
MIXED = MeshConfig(data=1, fsdp=2, expert=2, model=2)
Record = dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration on a mesh.

    Attributes:
        name: Name of the config file.
        variant: Variant of the config file.
        mesh: Shape of the mesh.
        exchange: Exchange of the slots between devices, as in ``model.moe.exchange``.
        scanned: Whether the layers are scanned.
    """

    name: str
    variant: str
    mesh: MeshConfig
    exchange: str = "gspmd"
    scanned: bool = False

    @property
    def title(self) -> str:
        """Name of the case in the record."""
        axes = vars(self.mesh).items()
        sizes = " x ".join(f"{axis}={size}" for axis, size in axes if size > 1)
        scan = ", scanned" if self.scanned else ""
        return f"{self.name}:{self.variant}, {sizes}, {self.exchange}{scan}"

    @property
    def experiment(self) -> Experiment:
        """Configuration of the case, with the sizes of this tool."""
        module = {"quickstart": quickstart, "span_corruption": span_corruption}[self.name]
        config = module.get_config(self.variant)
        config.mesh.update(dataclasses.asdict(self.mesh))
        config.model.scan_layers = self.scanned
        # Each of the eight devices has as many tokens as a group.
        config.data.batch_size = 16 if self.name == "quickstart" else 64
        if self.name == "quickstart":
            config.model.moe.exchange = self.exchange
        return build(Experiment, config)


CASES = (
    Case("quickstart", "dense", MeshConfig(data=8)),
    Case("quickstart", "switch", MeshConfig(data=8)),
    Case("quickstart", "switch", MeshConfig(data=1, fsdp=8), scanned=True),
    Case("quickstart", "switch", PLAIN),
    Case("quickstart", "switch", PLAIN, "all_to_all"),
    Case("quickstart", "switch", PLAIN, "ring"),
    Case("quickstart", "switch", MIXED, scanned=True),
    Case("quickstart", "gshard", PLAIN),
    Case("quickstart", "gshard", MeshConfig(data=2, expert=2, sequence=2)),
    Case("quickstart", "expert_choice", PLAIN),
    Case("span_corruption", "switch", PLAIN),
)


def measure(case: Case) -> Record:
    """Returns count, executions and bytes per device of the collectives, by kind and axes."""
    mesh = make_mesh(case.mesh)
    step = make_step(case.experiment, mesh)
    with jax.set_mesh(mesh):
        compiled = step.function.lower(step.state, step.batch).compile()
    return {
        f"{line['kind']} over {' x '.join(line['axes'])}": {
            key: line[key] for key in ("count", "executed", "bytes")
        }
        for line in summary(of_compiled(compiled, mesh))
    }


def main() -> None:
    """Writes the record."""
    cases = {case.title: measure(case) for case in CASES}
    RESULT.write_text(json.dumps({"jax": jax.__version__, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
