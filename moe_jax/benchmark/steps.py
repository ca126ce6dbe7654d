"""A whole train step of a small Mixtral, in this package and in ``transformers``.

All candidates start from the same weights and train on the same batch with AdamW. Their values are
the losses of the first two steps, so a wrong gradient or a wrong update is a wrong value.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.benchmark.candidate import Call
from moe_jax.benchmark.measure import Measurement, Trial, completed
from moe_jax.benchmark.oracle import Values
from moe_jax.benchmark.peers import COMPILED, IMPLEMENTATIONS, device_of, imported
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of
from moe_jax.counting import count
from moe_jax.interop import huggingface
from moe_jax.parallel import make_mesh
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe
from moe_jax.training.step import Objective, jit_train_step

STEP = "step"
_SHAPE, _VOCABULARY, _ROWS, _LENGTH, _RATE = "mixtral_step", 4096, 8, 256, 1e-3
SETTINGS = {
    "model.num_layers": 4,
    "model.width": 256,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.head_dim": 64,
    "model.mlp_dim": 512,
    "model.compute_dtype": "float32",
    "model.remat": "none",
    "model.scan_layers": False,
    "model.moe.expert_dim": 512,
    "model.moe.group_size": _ROWS * _LENGTH,
    "model.moe.router.balance_weight": 0.0,
    "data.vocab_size": _VOCABULARY,
    "data.seq_length": _LENGTH,
    "data.batch_size": _ROWS,
    "optimizer.learning_rate": _RATE,
    "optimizer.warmup_steps": 0,
    "optimizer.rule.weight_decay": 0.0,
}
_WAYS: dict[str, dict[str, Any]] = {
    "auto": {"model.moe.transport": "auto"},
    "gather": {"model.moe.transport": "gather"},
    "auto/capacity_1.25": {
        "model.moe.transport": "auto",
        "model.moe.router.capacity_factor": 1.25,
    },
}
_REFERENCE = {"model.moe.transport": "gather"}
NAMES = (
    *(f"moe_jax/{name}" for name in _WAYS),
    *(f"transformers/{name}" for name in (*IMPLEMENTATIONS, COMPILED)),
)

Batch = Mapping[str, np.ndarray]


def measure_steps(starts: tuple[str, ...], dtype: str, rounds: int) -> list[Measurement]:
    """Returns a row for the train step of each candidate.

    Args:
        starts: Starts of names of candidates; empty for all of them.
        dtype: Type of the computation; parameters and moments are float32.
        rounds: Number of rounds after the warm-up.
    """
    batch = _batch()
    reference = _experiment(_REFERENCE, "float32")
    cost = count(reference.model, _VOCABULARY, _LENGTH)
    flops = float(cost.training_flops_per_token) * batch["inputs"].size
    with tempfile.TemporaryDirectory() as folder:
        _save(reference, Path(folder))
        openers = [functools.partial(_ours, way) for way in _WAYS.values()]
        openers += [
            functools.partial(_theirs, name, Path(folder)) for name in (*IMPLEMENTATIONS, COMPILED)
        ]
        chosen = {
            name: opener
            for name, opener in zip(NAMES, openers, strict=True)
            if not starts or name.startswith(starts)
        }
        if not chosen:
            return []
        wanted = _ours(_REFERENCE, "float32", batch).values(None)
        entries = [
            Trial(_row(name, dtype), functools.partial(opener, dtype, batch))
            for name, opener in chosen.items()
        ]
        return completed(entries, wanted, flops, rounds)


def _experiment(way: Mapping[str, Any], dtype: str) -> Experiment:
    return experiment_of("mixtral_8x7b", {**SETTINGS, "model.compute_dtype": dtype, **way})


def _row(name: str, dtype: str) -> Measurement:
    return Measurement(_SHAPE, "router", STEP, name, "", "", STEP, dtype)


def _batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, _VOCABULARY, (_ROWS, _LENGTH + 1), np.int32)
    ones = np.ones((_ROWS, _LENGTH), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": ones,
        "positions": np.arange(_LENGTH, dtype=np.int32) * ones,
    }


def _recipe(experiment: Experiment) -> Recipe:
    optimizer = make_optimizer(experiment.optimizer, 1_000_000)
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    return Recipe(experiment.model, _VOCABULARY, optimizer, 0, mesh)


def _save(experiment: Experiment, folder: Path) -> None:
    """Writes the first weights for ``transformers``."""
    graph, state = _recipe(experiment).create()
    model = nnx.merge(graph, state.params, state.router_state)
    huggingface.save(model, folder, "mixtral")


def _ours(way: Mapping[str, Any], dtype: str, batch: Batch) -> Call:
    experiment = _experiment(way, dtype)
    recipe = _recipe(experiment)
    graph, state = recipe.create()
    with jax.set_mesh(recipe.mesh):
        step = jit_train_step(graph, recipe.optimizer, Objective(), recipe.abstract()[1])
        placed = jax.device_put(dict(batch))
        compiled = step.lower(state, placed).compile()
    memory = compiled.memory_analysis()

    def run() -> float:
        nonlocal state
        state, report = compiled(state, placed)
        jax.block_until_ready(state)
        return float(report.losses.loss)

    drops = way.get("model.moe.router.capacity_factor") is not None
    return _stepping(run, drops, None if memory is None else int(memory.temp_size_in_bytes))


def _theirs(name: str, folder: Path, dtype: str, batch: Batch) -> Call:
    torch, transformers = imported("torch"), imported("transformers")
    device = device_of(torch)
    model = transformers.MixtralForCausalLM.from_pretrained(folder).to(device)
    model.config._experts_implementation = "grouped_mm" if name == COMPILED else name
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    inputs, targets = (
        torch.from_numpy(batch[part].astype(np.int64)).to(device) for part in ("inputs", "targets")
    )
    forward = torch.compile(model) if name == COMPILED else model

    def run() -> float:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            logits = forward(input_ids=inputs, use_cache=False).logits
        flat = logits.float().reshape(-1, _VOCABULARY)
        loss = torch.nn.functional.cross_entropy(flat, targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return _stepping(run, drops=False, memory=None)


def _stepping(run: Callable[[], float], drops: bool, memory: int | None) -> Call:
    """Returns the call of a step, with the losses of its first two runs as its values."""
    losses = {} if drops else {"loss": np.array([run(), run()])}

    def values(_: Any) -> Values:
        return losses

    return Call(run, values, memory, advances=True)
