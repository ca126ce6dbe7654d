"""The layer drops into a transformer of plain Flax NNX, in three lines, and trains there."""

import math
import re
from pathlib import Path

import numpy as np

from examples import nnx_transformer as example

SOURCE = Path(example.__file__).read_text()


def test_three_lines_make_it_sparse():
    assert SOURCE.count("# MoE") == 3
    assert set(re.findall(r"\bmj\.\w+", SOURCE)) == {"mj.MoE"}


def test_it_learns_and_the_balance_loss_is_in_the_objective():
    objectives, errors = np.array(example.train(40)).T
    assert errors[0] > 0.8 * math.log(example.VOCAB)
    assert errors[-5:].mean() < 0.5 * errors[0]
    # Switch's balance loss is its weight, 0.01, where the load is even, and more elsewhere.
    balance = objectives - errors
    assert (balance > 0.0099).all() and (balance < 0.04).all()
