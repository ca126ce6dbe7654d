"""Loss and gradient of span corruption against ``transformers`` (``make parity``)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: run `make parity`"
)

from moe_jax.data import SpanCorruption  # noqa: E402
from moe_jax.interop.huggingface import load  # noqa: E402
from moe_jax.nn.mode import DECODE  # noqa: E402
from moe_jax.training.loss import score_tokens  # noqa: E402
from tests.parity import models  # noqa: E402

CORRUPTION = SpanCorruption(vocab_size=43, sentinels=5, eos_id=1, pad_id=0)


def examples():
    """Two texts of 20 and 11 tokens, in one batch."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 38, length) for length in (20, 11)]
    rows = [CORRUPTION.example(text, rng, inputs_length=22) for text in texts]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def theirs(folder, batch):
    """Mean nats per target and the gradient of the shared embedding."""
    model = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    labels = np.where(batch["targets_segments"] > 0, batch["targets"], -100)
    loss = model(
        input_ids=torch.tensor(batch["inputs"], dtype=torch.long),
        attention_mask=torch.tensor(batch["inputs_segments"]),
        # They move the labels right themselves: our decoder inputs must be the same.
        labels=torch.tensor(labels, dtype=torch.long),
    ).loss
    loss.backward()
    return loss.item(), model.shared.weight.grad.numpy()


@pytest.mark.parametrize("case", ["switch_transformers", "switch_transformers_odd"])
def test_the_training_forward_and_its_gradient(case, tmp_path):
    models.make(case, tmp_path)
    batch = examples()
    expected, gradient = theirs(tmp_path, batch)
    mask = jnp.asarray(batch["targets_segments"] > 0)
    arrays = {
        "encoder_inputs": batch["inputs"],
        "encoder_segments": batch["inputs_segments"],
        "inputs": batch["decoder_inputs"],
        "segments": batch["targets_segments"],
        "positions": np.arange(mask.shape[1])[None] * batch["targets_segments"],
    }

    @jax.jit
    @jax.value_and_grad
    def loss(model):
        # Nothing may be dropped: their capacity of 64 slots holds all tokens.
        hidden = model.read(arrays, mode=DECODE).hidden
        scored = score_tokens(model.embedding, hidden, jnp.asarray(batch["targets"]), chunk=0)
        return (scored.nll * mask).sum() / mask.sum()

    value, found = loss(load(tmp_path).model)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.abs(found.embedding.table - gradient).max() <= 1e-4 * np.abs(gradient).max()
