"""Makes a mixture of a dense model: ``moe-jax upcycle --input=runs/dense --output=runs/moe``.

The experts are copies of the dense networks, or parts of copies (``--shards``). The new run starts
at step 0 with a new optimizer, and ``moe-jax train --workdir=runs/moe`` trains it.
"""

from __future__ import annotations

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.surgery.api import upcycle


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    changed_models.define_folders(values)
    changed_models.define_layers(values)
    for name, default, meaning in (
        ("experts", 8, "Number of experts per layer."),
        ("k", None, "Number of experts per token; by default 2, or the router's own number."),
        ("shards", 1, "Number of parts of equal width of each network; 1 copies whole networks."),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "redrawn",
        0.0,
        "Share of each expert's hidden units that is drawn again.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_string("router", "mixtral", "Name of a router.", flag_values=values)
    flags.DEFINE_integer(
        "seed",
        0,
        "Seed of the routers and of the weights that are drawn again.",
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Writes the mixture."""
    changed = upcycle(
        **changed_models.folders_of(given),
        experts=given.experts,
        k=given.k,
        shards=given.shards,
        layers=changed_models.layers_of(given),
        redrawn=given.redrawn,
        router=given.router,
        seed=given.seed,
    )
    common.say(str(changed))


if __name__ == "__main__":
    common.run(define, main)
