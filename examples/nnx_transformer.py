"""A plain Flax NNX transformer with one mixture-of-experts layer, trained for some steps.

Attention, norms, embedding and training loop are plain ``flax.nnx`` and ``optax``. Three lines,
marked ``MoE``, add the experts: the first creates the layer in place of a feed-forward network, the
second calls it, and the third adds its loss to the objective. Run it:
``python examples/nnx_transformer.py``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import moe_jax as mj

VOCAB, WIDTH, HIDDEN, LENGTH, ROWS = 16, 32, 64, 16, 8


class FeedForward(nnx.Module):
    """The dense feed-forward network of the first block."""

    def __init__(self, rngs: nnx.Rngs):
        """Makes two linear maps."""
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(B, L, M)`` to ``(B, L, M)``."""
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """Causal attention, then a feed-forward network or experts."""

    def __init__(self, sparse: bool, rngs: nnx.Rngs):
        """Makes the two sub-layers and their norms."""
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        if sparse:
            self.experts = mj.MoE(WIDTH, HIDDEN, num_experts=4, router="switch", rngs=rngs)  # MoE
        else:
            self.dense = FeedForward(rngs)
        self.sparse = sparse

    def __call__(self, x: jax.Array, train: bool, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        """Returns the output ``(B, L, M)`` and the balance loss of the block, 0 without experts."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=mask)
        if not self.sparse:
            return x + self.dense(self.norm(x)), jnp.float32(0)
        y, report = self.experts(self.norm(x), train=train, rngs=rngs)  # MoE
        return x + y, report.loss


class Transformer(nnx.Module):
    """A decoder of one dense and one sparse block."""

    def __init__(self, rngs: nnx.Rngs):
        """Makes embedding, blocks and head."""
        self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.blocks = nnx.List([Block(False, rngs), Block(True, rngs)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids: jax.Array, train: bool, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
        """Returns logits ``(B, L, V)`` for ``ids (B, L)``, and the balance loss of all blocks."""
        x, balance = self.embedding(ids) + self.positions[...], jnp.float32(0)
        for block in self.blocks:
            x, more = block(x, train, rngs)
            balance += more
        return self.head(self.norm(x)), balance


def batch_of(key: jax.Array) -> jax.Array:
    """Returns ids ``(B, L + 1)`` that count up from a random start, by one or by three."""
    start_key, pace_key = jax.random.split(key)
    start = jax.random.randint(start_key, (ROWS, 1), 0, VOCAB)
    pace = jax.random.choice(pace_key, jnp.array([1, 3]), (ROWS, 1))
    return (start + pace * jnp.arange(LENGTH + 1)) % VOCAB


def losses(
    model: Transformer, ids: jax.Array, train: bool, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """Returns the objective and its main term, the cross-entropy of the next token."""
    logits, balance = model(ids[:, :-1], train, rngs)
    error = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()
    return error + balance, error  # MoE


@nnx.jit
def step(
    model: Transformer, optimizer: nnx.Optimizer, ids: jax.Array, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """Trains on a batch and returns its objective and its cross-entropy."""
    values, grads = nnx.value_and_grad(losses, has_aux=True)(model, ids, True, rngs)
    optimizer.update(model, grads)
    return values


def train(steps: int) -> list[tuple[jax.Array, jax.Array]]:
    """Returns the objective and the cross-entropy of every step, in nats per token."""
    rngs = nnx.Rngs(params=0, dropout=1)
    model = Transformer(rngs)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(2), steps)
    return [step(model, optimizer, batch_of(key), rngs) for key in keys]


if __name__ == "__main__":
    for number, (_, error) in enumerate(train(100), 1):
        if number % 20 == 0:
            print(f"step {number}: {error:.3f} nats per token")
