"""A model small enough to compile in seconds, with experts in scanned layers."""

import dataclasses

import pytest
from moe_jax.configs import quickstart

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.parallel import MeshConfig


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    config = quickstart.get_config()
    config.data.update(vocab_size=256, seq_length=32, batch_size=8, tokenizer="bytes")
    config.model.update(width=32, num_heads=2, head_dim=16, mlp_dim=64)
    config.model.update(scan_layers=True, remat="full")
    config.model.moe.update(expert_dim=64, group_size=32)
    config.training.loss_chunk = 8
    return dataclasses.replace(build(Experiment, config), mesh=MeshConfig(1, 4, 1, 2))
