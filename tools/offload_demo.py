"""Generates tokens from a model of Mixtral 8x7B's shape, whose int4 experts stay in files.

``python -m tools.offload_demo --folder=FOLDER`` writes random experts into the folder, layer by
layer, unless it holds them already; with all 32 layers they take about 23 GB. Then it generates
with a budget of bytes for the experts on the device and writes
``experiments/benchmarks/offload_mixtral.json`` and the table of ``docs/offloading.md``.
``--layers`` gives fewer layers. The weights are random, so the tokens mean nothing.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import moe_jax as mj
from moe_jax import files
from moe_jax.cli import common
from moe_jax.decoding import Sampling
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.feed_forward import Experts
from moe_jax.offload import ExpertArrays, FileStore, experts_of, write_experts
from moe_jax.serving import Engine, Offload, Request
from tools.plans import write_table

_MARKS = ("<!-- offload demo -->\n", "<!-- end of offload demo -->")
_INT4, _INT8 = 4.6, 73.9  # standard deviations of uniform codes


def without_weights(layers: int, changes: dict[str, Any] | None = None) -> Decoder:
    """Returns a decoder of Mixtral 8x7B's shape, or with other settings; it has shapes alone.

    Args:
        layers: Number of layers.
        changes: Values of settings by their path, for smaller models.
    """
    experiment = mj.experiment("mixtral_8x7b", {"model.num_layers": layers} | (changes or {}))
    assert isinstance(experiment.model, DecoderConfig)
    config = dataclasses.replace(experiment.model, scan_layers=False, remat="none")
    made: Decoder = jax.eval_shape(
        lambda: Decoder(config, experiment.vocab_size, jax.random.key(0))
    )
    return made


def random_experts(model: Decoder, seed: int) -> Iterator[Iterator[ExpertArrays]]:
    """Yields the experts of every layer in int4, one scale per output; one exists at a time."""
    rng = np.random.default_rng(seed)
    for experts in experts_of(model):
        yield (_expert(experts, rng) for _ in range(experts.up.shape[0]))


def _expert(experts: Experts, rng: np.random.Generator) -> ExpertArrays:
    found: dict[str, np.ndarray] = {}
    for name in ("up", "gate", "down"):
        _, inputs, outputs = getattr(experts, name).shape
        codes = np.frombuffer(rng.bytes(outputs * inputs // 2), np.uint8)
        found[f"{name}_int4"] = codes.reshape(outputs, inputs // 2)
        scale = 1 / (_INT4 * inputs**0.5)
        found[f"{name}_scales"] = np.full((outputs, 1), scale, np.float32)
    return found


def with_random_weights(model: Decoder, seed: int) -> Decoder:
    """Returns the model with random weights, except those of the experts, which stay shapes.

    Matrices of more than a million entries are bfloat16, vectors are 1.
    """
    rng = np.random.default_rng(seed)

    def filled(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        if ".experts." in jax.tree_util.keystr(path):
            return leaf
        if leaf.ndim < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        codes = np.frombuffer(rng.bytes(leaf.size), np.int8).reshape(leaf.shape)
        dtype = jnp.bfloat16 if leaf.size > 10**6 else leaf.dtype
        scale = 1 / (_INT8 * model.config.width**0.5)
        return jnp.asarray(codes).astype(dtype) * jnp.asarray(scale, dtype)

    done: Decoder = jax.tree_util.tree_map_with_path(filled, model)
    return done


def generated(model: Decoder, store: FileStore, budget: int, tokens: int) -> dict[str, Any]:
    """Returns the figures of a request of four tokens and its sample, read greedily.

    Args:
        model: The model without experts.
        store: Its experts.
        budget: Bytes of experts on the device.
        tokens: Number of tokens of the sample.
    """
    prompt = (1, 2, 3, 4)
    offload = Offload(budget, store=store)
    engine = Engine(model, 1, len(prompt) + tokens, len(prompt), offload=offload)
    engine.submit(Request(prompt, Sampling(tokens, temperature=0.0)))
    began, found = time.perf_counter(), []
    while engine.waiting or engine.running:
        found += [token.token for token in engine.step()]
    seconds = time.perf_counter() - began
    counts = engine.offloaded
    assert counts is not None
    return {
        "tokens": found,
        "prompt_tokens": len(prompt),
        "seconds": round(seconds, 2),
        "hit_rate": round(counts.hit_rate, 4),
        "prediction_accuracy": round(counts.accuracy, 4),
        "bytes_moved": counts.bytes_moved,
        "stall_seconds": round(counts.stall_seconds, 2),
    }


def measured(model: Decoder, folder: Path, budget: int, tokens: int) -> dict[str, Any]:
    """Returns the record of a run whose experts are in a folder."""
    store = FileStore(folder)
    figures = generated(with_random_weights(model, 1), store, budget, tokens)
    rest = jax.tree_util.tree_leaves(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "device": f"{os.cpu_count()} x {jax.devices()[0].device_kind}",
        "layers": len(store.experts),
        "experts": sum(store.experts),
        "parameters": sum(leaf.size for leaf in rest),
        "bytes_on_disk": sum(path.stat().st_size for path in folder.iterdir()),
        "budget_bytes": budget,
        "peak_resident_bytes": 1024 * peak,
    } | figures


def table(figures: dict[str, Any]) -> str:
    """Returns the table of the figures."""
    gigabytes = {
        name: f"{figures[key] / 1e9:.2f} GB"
        for name, key in (
            ("files of the experts", "bytes_on_disk"),
            ("budget of experts on the device", "budget_bytes"),
            ("peak of resident memory", "peak_resident_bytes"),
            ("experts loaded", "bytes_moved"),
        )
    }
    rows = {
        "model": f"{figures['layers']} layers, {figures['experts']} experts, "
        f"{figures['parameters'] / 1e9:.1f} billion parameters",
        **gigabytes,
        "tokens": f"{figures['prompt_tokens']} of the prompt, {len(figures['tokens'])} generated",
        "seconds": f"{figures['seconds']:.0f}, of which {figures['stall_seconds']:.1f} waiting "
        "for experts",
        "hit rate": f"{figures['hit_rate']:.3f}",
        "experts of the next layer foreseen": f"{figures['prediction_accuracy']:.3f}",
    }
    return "| figure | value |\n|---|---|\n" + "".join(
        f"| {name} | {value} |\n" for name, value in rows.items()
    )


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    for name, text, meaning in (
        ("folder", "", "Folder of the experts, which are written if it holds none."),
        ("output", "experiments/benchmarks/offload_mixtral.json", "File of the figures."),
        ("page", "docs/offloading.md", "Page that shows the table."),
    ):
        flags.DEFINE_string(name, text, meaning, flag_values=values)
    for name, size, meaning in (
        ("layers", 32, "Number of layers."),
        ("tokens", 4, "Number of tokens to generate."),
        ("budget", 2 * 10**9, "Bytes of experts on the device."),
    ):
        flags.DEFINE_integer(name, size, meaning, lower_bound=1, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Writes the experts if there are none, generates, and writes figures and table."""
    if not given.folder:
        raise mj.ConfigError("--folder is missing: name a folder on a disk with 25 GB of space")
    folder, output = Path(given.folder), Path(given.output)
    files.check_file(output, "output")
    model = without_weights(given.layers)
    if not folder.exists():
        write_experts(random_experts(model, 0), folder)
    figures = measured(model, folder, given.budget, given.tokens)
    files.write_json(output, figures)
    write_table(Path(given.page), table(figures), _MARKS)


if __name__ == "__main__":
    common.run(define, main)
