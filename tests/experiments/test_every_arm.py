"""Every arm of every ablation takes two training steps and one evaluation step, very small.

The scale is ``cpu`` with smaller sizes; what arms set they keep. Arms that compute the same, by
their fingerprint, are trained once. An arm that learns from another learns from it untrained;
starting from finished runs is tested in ``tests/training/test_transplant.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from moe_jax import data
from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.catalogue import load
from moe_jax.ablation.runner import fingerprint
from moe_jax.config.experiment import Experiment
from moe_jax.parallel import make_mesh
from moe_jax.run import session
from moe_jax.run.session import Session, open_session
from moe_jax.training.state import TrainState
from moe_jax.training.step import Objective, Teacher, eval_step, train_step

ROOT = Path(__file__).parents[2] / "experiments"
FILES = [path for path in sorted(ROOT.glob("*/*.py")) if "ABLATION = " in path.read_text()]
ABLATIONS = {f"{path.parent.name}/{path.stem}": load(path) for path in FILES}
ARMS = [(name, arm) for name, ablation in ABLATIONS.items() for arm in ablation.arms]

# Settings that a base does not have, or that its arms set, are left out. As few different sizes as
# there can be: arrays of one shape share compiled operations.
SMALL = {
    "model.num_layers": 2,
    "model.encoder_layers": 2,
    "model.decoder_layers": 2,
    "model.width": 16,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 16,
    "model.moe.expert_dim": 16,
    "model.moe.group_size": 64,
    "model.encoder_moe.expert_dim": 16,
    "model.encoder_moe.group_size": 64,
    "model.decoder_moe.expert_dim": 16,
    "model.decoder_moe.group_size": 64,
    "data.source": "mixture",
    "data.tokenizer": "bytes",
    "data.seq_length": 64,
    "data.target_length": 64,
    "data.batch_size": 4,
    "data.shuffle_window": 4,
    "data.prefetch": 0,
    "training.loss_chunk": 0,
}
STEPS = 2


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Runs operation by operation on one device, since arms share operations but no program.

    Compiling some eighty steps takes ten times as long. The step's ``cond`` would be compiled anew
    each time, so its branch is taken in Python.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        patch.setattr(jax.lax, "cond", lambda holds, yes, no, *args: (yes if holds else no)(*args))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def small(ablation: Ablation, arm: str) -> Experiment:
    """Returns an arm at the scale ``cpu`` with the sizes of ``SMALL``."""
    base = ablation.base()
    fixed = {
        key for settings in ablation.arms.values() for key, v in settings.items() if not callable(v)
    }
    sizes = {key: v for key, v in SMALL.items() if _has(base, key) and key not in fixed}
    scales = {"cpu": {**ablation.scales["cpu"], **sizes}}
    return dataclasses.replace(ablation, scales=scales).experiment(arm)


def _has(config: ConfigDict, name: str) -> bool:
    """Whether a setting is there; a config holds no settings of the other kind of model."""
    value = config
    for part in name.split("."):
        value = None if value is None else value.get(part)
    return value is not None


@functools.cache
def batches(config: data.DataConfig) -> tuple[list[data.Batch], data.Batch]:
    """Returns training batches and one of validation."""
    tokenizer = data.open_tokenizer(config)
    stream = data.train_batches(config, tokenizer)
    try:
        return list(itertools.islice(stream, STEPS)), next(data.eval_batches(config, tokenizer))
    finally:
        stream.close()


TRAINED: dict[str, tuple[float, float]] = {}


def trained(
    experiment: Experiment, *, taught_by: Experiment | None = None, own_optimizer: bool = False
) -> tuple[float, float]:
    """Returns the loss of the second training step and that of a validation batch after it.

    Args:
        experiment: small.
        taught_by: its teacher, as small; what it starts from is left out.
        own_optimizer: with its own, for arms that change it, instead of gradient descent.
    """
    name = fingerprint(experiment)
    if name not in TRAINED:
        TRAINED[name] = _trained(experiment, taught_by, own_optimizer)
    return TRAINED[name]


def _trained(
    experiment: Experiment, taught_by: Experiment | None, own_optimizer: bool
) -> tuple[float, float]:
    opened = open_session(experiment, data.open_tokenizer(experiment.data))
    training, held_out = batches(experiment.data)
    objective = Objective.of(experiment)
    optimizer = opened.optimizer if own_optimizer else optax.sgd(0.1)
    state, teacher = first_state(opened, optimizer), taught_by and _teacher(taught_by)
    for batch in training:
        placed = opened.place(batch)
        state, report = train_step(opened.graph, optimizer, objective, state, placed, teacher)
    assert bool(report.updated) and int(state.skipped) == 0
    assert len(report.layers) == len(experiment.moe_layers)
    placed, chunk = opened.place(held_out), objective.loss_chunk
    sums = eval_step(opened.graph, chunk, state.params, state.router_state, placed)
    return float(report.losses.loss), float(sums.nll / sums.tokens)


def _teacher(experiment: Experiment) -> Teacher:
    opened = open_session(experiment, data.open_tokenizer(experiment.data))
    state = first_state(opened, optax.identity())
    return Teacher(opened.graph, state.params, state.router_state)


def first_state(opened: Session, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns a state with parameters drawn by NumPy, which compiles nothing, and all else zero."""
    draw = np.random.default_rng(0)

    def small(like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(draw.normal(scale=0.1, size=like.shape).astype(like.dtype))

    def zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(np.zeros(like.shape, like.dtype))

    params = jax.tree.map(small, opened.abstract.params)
    state = jax.tree.map(zeros, dataclasses.replace(opened.abstract, params=None, opt_state=None))
    return dataclasses.replace(state, params=params, opt_state=optimizer.init(params))


@pytest.mark.parametrize("place", [f"{name}-{arm}" for name, arm in ARMS])
def test_an_arm_trains(place: str):
    name, arm = place.split("-", 1)
    experiment = small(ABLATIONS[name], arm)
    teacher = ABLATIONS[name].finished(arm).get("training.teacher")
    taught_by = small(ABLATIONS[name], teacher.arm) if teacher else None
    changes = any(key.startswith("optimizer.") for key in ABLATIONS[name].arms[arm])
    losses = trained(experiment, taught_by=taught_by, own_optimizer=changes)
    # Bytes of a small alphabet, hardly trained: near the uniform guess over the vocabulary.
    assert np.isfinite(losses).all() and 0 < max(losses) < 4 * np.log(experiment.vocab_size)


def test_every_ablation_is_here_and_equal_arms_are_trained_once():
    assert len(ABLATIONS) >= 20
    experts, tokens = ABLATIONS["glam/experts"], ABLATIONS["glam/data_efficiency"]
    same = small(experts, "e16"), small(tokens, "moe")
    assert len({fingerprint(experiment) for experiment in same}) == 1
