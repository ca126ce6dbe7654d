"""The layer drops into a transformer of plain Flax NNX, in three lines, and trains there."""

import math
import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from examples import nnx_transformer as example

SOURCE = Path(example.__file__).read_text()


def test_three_lines_make_it_sparse():
    assert SOURCE.count("# MoE") == 3
    assert set(re.findall(r"\bmj\.\w+", SOURCE)) == {"mj.MoE"}


def test_it_learns_and_the_balance_loss_is_in_the_objective():
    errors = example.train(40)
    assert errors[0] > 0.8 * math.log(example.VOCAB)
    assert np.mean(errors[-5:]) < 0.5 * errors[0]
    rngs = nnx.Rngs(params=0, dropout=1)
    ids = example.batch_of(jax.random.key(0))
    objective, error = example.losses(example.Transformer(rngs), ids, True, rngs)
    # Switch's balance loss is about its weight, 0.01, where the load is about even.
    assert 0.005 < objective - error < 0.04
