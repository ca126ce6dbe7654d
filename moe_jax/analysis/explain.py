"""Explains one text: the experts of each token, their contributions, and their causal effects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.analysis.contributions import Contributions, hidden_and_contributions
from moe_jax.analysis.forward import Batch, check_separate, forward, sparse_layers
from moe_jax.analysis.removal import model_without
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, Model, ModelConfig
from moe_jax.nn.mode import DECODE

# A norm below this share of the output's norm is a rounding error of the differences.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class ExplainedLayer:
    """The experts of one MoE layer for ``T`` tokens.

    Attributes:
        name: Name of the layer.
        of_source: True if the layer reads the source of an encoder-decoder.
        num_experts: Number ``E`` of experts.
        experts: Expert ``(T, K)`` of each choice; -1 where the token has no such expert.
        gates: Combine weight ``(T, K)`` of each choice.
        norms: Euclidean norm ``(T, K)`` of the expert's part of the layer's output.
        others: Norm ``(T,)`` of the part of the shared network and of free experts; 0 below the
            rounding error.
        output: Norm ``(T,)`` of the layer's output.
        error: Largest norm of the difference between the output and the sum of its parts, relative
            to the norm of the output.
        effects: Change ``(T, K)`` of a log-likelihood in nats if the expert is removed from this
            token in this layer: of the next token, or of the whole target if the layer reads the
            source. A negative number means that the expert made the text more likely.
    """

    name: str
    of_source: bool
    num_experts: int
    experts: np.ndarray
    gates: np.ndarray
    norms: np.ndarray
    others: np.ndarray
    output: np.ndarray
    error: float
    effects: np.ndarray


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The routing of one text and the effect of every expert on it.

    Attributes:
        pieces: Texts of the ``T`` tokens that the decoder reads.
        source: Texts of the tokens that the encoder reads; empty for a decoder.
        next_pieces: Texts of the ``T`` next tokens; after a prompt this is the most probable token.
        log_likelihoods: Log-likelihood ``(T,)`` of each next token, in nats.
        layers: The MoE layers in order.
    """

    pieces: tuple[str, ...]
    source: tuple[str, ...]
    next_pieces: tuple[str, ...]
    log_likelihoods: np.ndarray
    layers: tuple[ExplainedLayer, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the explanation as lists, numbers and texts, for JSON."""
        found = dataclasses.asdict(self)
        return jax.tree.map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x, found)


def require_explainable(config: ModelConfig) -> None:
    """Rejects models whose experts have no effect on the next token that could be measured.

    Raises:
        ConfigError: If the model has no experts, is not causal, or has soft slots.
    """
    layers = config.sparse_layers()
    if not layers:
        raise ConfigError("this model is dense and has no experts to explain: give a mixture")
    if isinstance(config, DecoderConfig) and not config.causal:
        raise ConfigError(
            "a model with model.causal=False predicts masked tokens and no next token: "
            "explain a causal model"
        )
    check_separate(layers, "explain")


@dataclasses.dataclass(frozen=True)
class MeasuredText:
    """Numbers of an explanation, without texts.

    Attributes:
        next_ids: Token ids ``(T,)`` whose log-likelihood is explained.
        log_likelihoods: Their log-likelihoods ``(T,)`` in nats.
        layers: The MoE layers in order.
    """

    next_ids: np.ndarray
    log_likelihoods: np.ndarray
    layers: tuple[ExplainedLayer, ...]


def measure(model: Model, batch: Batch, *, batch_size: int = 16) -> MeasuredText:
    """Measures contributions and causal effects for one text.

    Each effect is computed by a forward pass of its own in which one expert is removed from one
    token in one layer; ``batch_size`` of them are computed at once. No token is dropped. Where
    experts choose, they choose among the text with the capacity of evaluation, and the routers of
    later layers choose anew after a removal.

    Args:
        model: Model that ``require_explainable`` accepts.
        batch: Fields of ``moe_jax.analysis.forward`` for one text, each ``(1, T)``, without
            padding.
        batch_size: Number of forward passes that are computed at once.
    """
    hidden, found = hidden_and_contributions(model, batch)
    last = _most_probable(model, hidden[:, -1:])
    next_ids = np.append(np.asarray(batch["inputs"])[0, 1:], np.asarray(last))
    targets = jnp.asarray(next_ids, jnp.int32)
    nothing = np.full((1, 3), -1, np.int32)
    base = np.asarray(_log_likelihoods(model, batch, targets, nothing))[0]
    layers, rows = sparse_layers(model), []
    for index, one in enumerate(found):
        rows += _removals(index, np.asarray(one.experts)[0])
    after = _after(model, batch, targets, np.array(rows, np.int32).reshape(-1, 4), batch_size)
    effects = [np.zeros(one.experts.shape[1:], np.float64) for one in found]
    for (index, token, _, choice), values in zip(rows, after, strict=True):
        change = np.asarray(values, np.float64) - base
        whole = layers[index].stack == "encoder"
        effects[index][token, choice] = change.sum() if whole else change[token]
    explained = (
        _layer(layer.name, layer.stack == "encoder", layer.moe.num_experts, one, effect)
        for layer, one, effect in zip(layers, found, effects, strict=True)
    )
    return MeasuredText(next_ids, base, tuple(explained))


def _removals(layer: int, experts: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Returns layer, token, expert and number of each choice of ``experts (T, K)``."""
    return [
        (layer, int(token), int(experts[token, choice]), int(choice))
        for token, choice in np.argwhere(experts >= 0)
    ]


def _layer(
    name: str | int, of_source: bool, num_experts: int, found: Contributions, effects: np.ndarray
) -> ExplainedLayer:
    experts, gates, norms, others, output, error = (
        np.asarray(getattr(found, field.name))[0] for field in dataclasses.fields(found)
    )
    taken, scale = experts >= 0, np.maximum(output, np.finfo(np.float32).tiny)
    return ExplainedLayer(
        f"layer {name}",
        of_source,
        num_experts,
        np.where(taken, experts, -1),
        np.where(taken, gates, 0),
        np.where(taken, norms, 0),
        np.where(others > _ROUNDING * output, others, 0),
        output,
        float((error / scale).max()),
        effects,
    )


def _after(
    model: Model, batch: Batch, targets: Array, rows: np.ndarray, batch_size: int
) -> Iterator[np.ndarray]:
    """Yields the log-likelihoods ``(T,)`` of the targets after each removal, row by row."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size, :3]
        filled = np.full((batch_size, 3), -1, np.int32)
        filled[: len(part)] = part
        yield from np.asarray(_log_likelihoods(model, batch, targets, filled))[: len(part)]


@jax.jit
def _most_probable(model: Model, hidden: Float[Array, "1 1 M"]) -> Int[Array, ""]:
    return model.logits(hidden)[0, 0].argmax()


@jax.jit
def _log_likelihoods(
    model: Model, batch: Batch, targets: Int[Array, " T"], removed: Int[Array, "B 3"]
) -> Float[Array, "B T"]:
    """Returns the log-likelihoods of the targets after ``B`` removals of layer, token, expert."""
    size = removed.shape[0]
    many = {name: jnp.repeat(array, size, axis=0) for name, array in batch.items()}
    layer, token, expert = (removed[:, i, None, None] for i in range(3))
    masks = []
    for index, sparse in enumerate(sparse_layers(model)):
        of_source = sparse.stack == "encoder"
        length = batch["encoder_inputs" if of_source else "inputs"].shape[1]
        here = jnp.arange(length)[:, None] == token
        chosen = jnp.arange(sparse.moe.num_experts) == expert
        masks.append((layer == index) & here & chosen)
    hidden, _ = forward(model_without(model, masks), many, DECODE)

    def of_row(row: Array) -> Array:
        logits = model.logits(row[None])[0]
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(of_row, hidden)
