import dataclasses

import pytest

from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.optimizer import Adafactor, OptimizerConfig
from moe_jax.data import DataConfig
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.run import memory

_MODEL = DecoderConfig(
    num_layers=2, moe=MoEConfig(every=0), width=8, mlp_dim=16, num_heads=2, head_dim=4
)
_RUN = Experiment("x", _MODEL, DataConfig(seq_length=16, batch_size=8))


@pytest.fixture
def given(monkeypatch):
    """A function that pretends that a device has so many bytes."""
    return lambda bytes_: monkeypatch.setattr(memory, "memory_of_device", lambda: bytes_)


def _parameters(experiment):
    return sum(
        x.size for x in memory.jax.tree.leaves(memory.abstract_state(experiment, 260).params)
    )


def test_activations_are_inputs_of_layers_and_logits():
    devices = memory.jax.device_count()
    rows = 8 // devices
    # 2 layers read 16 tokens of 8 features a row, and the head gives 260 logits; 4 bytes each.
    assert memory.activation_bytes(_RUN, 260) == rows * 16 * (2 * 8 + 260) * 4
    chunked = dataclasses.replace(_RUN, training=TrainingConfig(loss_chunk=4))
    assert memory.activation_bytes(chunked, 260) == rows * (16 * 2 * 8 + 4 * 260) * 4


def test_adam_needs_four_numbers_a_parameter_and_adafactor_fewer():
    # Parameters, two moments and gradients; the rest are counters and keys.
    least = memory.needed_bytes(memory.abstract_state(_RUN, 260), 0)
    assert 0 <= least - 16 * _parameters(_RUN) < 64
    other = dataclasses.replace(_RUN, optimizer=OptimizerConfig(Adafactor(factored_from=4)))
    assert memory.needed_bytes(memory.abstract_state(other, 260), 0) < 12 * _parameters(_RUN)


def test_what_cannot_fit_is_refused_with_bytes_and_remedies(given):
    least = memory.needed_bytes(
        memory.abstract_state(_RUN, 260), memory.activation_bytes(_RUN, 260)
    )
    given(least)
    memory.check_memory(_RUN, 260)
    given(least - 1)
    with pytest.raises(ConfigError, match=f"at least {least:,} bytes.* has {least - 1:,}") as error:
        memory.check_memory(_RUN, 260)
    for remedy in ("mesh.fsdp", "data.batch_size", "compute_dtype", "loss_chunk", "optimizer.rule"):
        assert remedy in str(error.value)
    given(None)
    memory.check_memory(_RUN, 260)


def test_simulated_devices_share_the_memory_of_the_machine():
    assert 2**20 < memory.memory_of_device() * memory.jax.local_device_count() < 2**50
