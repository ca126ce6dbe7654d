"""Times an MoE layer with each router, relative to the same layer with ``switch``.

``python -m tools.router_times`` compiles the training gradient of one layer for every preset, with
the same experts, tokens and slots. It runs all layers in turn, round after round, and writes
``results.json`` and ``report.md``. The ratio of a router is its time divided by the time of
``switch`` in the same round, as a median over rounds: it measures routing and transport, since the
experts are equal.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moe_jax import routing
from moe_jax.cli import common
from moe_jax.files import write_json
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import PRESETS, Capacity, Router

TOKENS, WIDTH, HIDDEN, EXPERTS, SLOTS = 1024, 256, 512, 16, 128
_CHOICES = {
    "deepseek_v3": {"k": 4},
    "soft_moe": {"slots_per_expert": SLOTS},
    "hash": {"kind": "random"},
}


def router(name: str) -> Router:
    """Returns the preset with ``SLOTS`` slots for every expert."""
    published = routing.preset(name, **_CHOICES.get(name, {}))
    factor = SLOTS * EXPERTS / TOKENS
    capacity = Capacity(
        factor,
        factor,
        rounding="floor",
        priority=published.capacity.priority,
        reroute=published.capacity.reroute,
        renormalize=published.capacity.renormalize,
    )
    return dataclasses.replace(published, capacity=capacity)


def step(name: str) -> tuple[str, Callable[[], None]]:
    """Returns the name of the transport and a function that runs the compiled gradient once."""
    chosen = router(name)
    transport = "gather" if chosen.select.slot_table else "einsum"
    sizes = {"num_experts": EXPERTS, "expert_dim": HIDDEN, "group_size": TOKENS}
    config = MoEConfig(router=chosen, transport=transport, **sizes)
    layer = ConfiguredMoE(config, FeedForwardConfig(WIDTH, HIDDEN, "relu"), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, TOKENS, WIDTH))
    ids = jax.random.randint(jax.random.key(2), (1, TOKENS), 0, 32000)
    record = ids[..., None] % EXPERTS if name == "forced" else None

    def loss(layer: ConfiguredMoE, x: jax.Array) -> jax.Array:
        valid = jnp.ones(x.shape[:2], bool)
        y, aux = layer(x, valid, mode=TRAIN, rng=jax.random.key(3), token_ids=ids, record=record)
        return (y * x).sum() + aux.loss

    compiled = jax.jit(jax.grad(loss, (0, 1), allow_int=True)).lower(layer, x).compile()
    return transport, lambda: jax.block_until_ready(compiled(layer, x))


def report(rows: dict[str, dict[str, float | str]]) -> str:
    """Returns the Markdown table of all routers."""
    lines = [
        f"Time of the gradient of one MoE layer on a CPU: {TOKENS} tokens of width {WIDTH}, "
        f"{EXPERTS} experts of hidden width",
        f"{HIDDEN}, and {SLOTS} slots per expert for every router. Times are relative to `switch` "
        "in the same round:",
        "the median over rounds, and the 10th to 90th percentile.",
        "",
        "| router | transport | time / switch | 10th - 90th |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        spread = f"{row['low']:.2f} - {row['high']:.2f}"
        lines.append(f"| `{name}` | {row['transport']} | {row['ratio']:.2f} | {spread} |")
    return "\n".join([*lines, ""])


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "output", "experiments/results/routers", "Folder of the results.", flag_values=values
    )
    flags.DEFINE_integer("rounds", 15, "Number of rounds.", lower_bound=1, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Compiles all layers, times them in turn and writes the results."""
    names = ["switch", *(f.__name__ for f in PRESETS if f.__name__ != "switch")]
    steps = {name: step(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(given.rounds + 1):
        for name, (_, run) in steps.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    switch = np.array(seconds["switch"])
    rows = {}
    for name in names:
        ratio = np.array(seconds[name]) / switch
        low, middle, high = np.percentile(ratio, (10, 50, 90))
        rows[name] = {
            "transport": steps[name][0],
            "ratio": round(middle, 3),
            "low": round(low, 3),
            "high": round(high, 3),
        }
    output = Path(given.output)
    everything = {"rounds": given.rounds, "switch_seconds": float(np.median(switch))}
    write_json(output / "results.json", {**everything, "routers": rows})
    (output / "report.md").write_text(report(rows))
    print(report(rows))


if __name__ == "__main__":
    common.run(define, main)
