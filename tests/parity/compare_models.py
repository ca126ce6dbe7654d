"""What must hold between a loaded model and a record of ``transformers``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from moe_jax.decoding import Sampling, generate, positions_of, translate
from moe_jax.interop.huggingface import Imported, load, save
from moe_jax.models import EncoderDecoder
from moe_jax.nn.mode import Mode
from tests.parity.weights import write

Record = dict[str, Any]
FIXTURES = Path(__file__).parent / "fixtures" / "models"
RECORDED = sorted(path.stem for path in FIXTURES.glob("*.npz"))


def family_of(case: str) -> str:
    """Returns the ``model_type`` of a committed record."""
    return json.loads(str(np.load(FIXTURES / f"{case}.npz")["header"]))["config"]["model_type"]


_DENSE = ("llama", "qwen2", "qwen3")
MIXTURES = [case for case in RECORDED if family_of(case) not in _DENSE]
"""Records of models with experts."""


def recorded(case: str, folder: Path) -> Record:
    """Returns a committed record, and writes the model that it is of into ``folder``."""
    found = dict(np.load(FIXTURES / f"{case}.npz"))
    header = json.loads(str(found.pop("header")))
    (folder / "config.json").write_text(json.dumps(header["config"]))
    write(header["shapes"], folder)
    layers = sorted((n for n in found if n.startswith("choices_")), key=lambda n: int(n[8:]))
    return found | {"choices": [found[name] for name in layers]}


def forward(imported: Imported, record: Record) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Returns logits, who went where in each layer, and which of these tokens are real."""
    mode, segments = Mode("full", record=True), jnp.asarray(record["mask"], jnp.int32)
    ids = jnp.asarray(record["ids"], jnp.int32)

    @jax.jit
    def decoder(model):
        hidden, reports = model.hidden(ids, segments, positions_of(segments), mode=mode)
        return model.logits(hidden), [aux.experts for aux in reports]

    @jax.jit
    def encoder_decoder(model):
        memory, first = model.encode(ids, segments, positions=positions_of(segments), mode=mode)
        targets = jnp.asarray(record["targets"], jnp.int32)
        one = jnp.ones_like(targets)
        hidden, second = model.decode(targets, one, memory, segments, mode=mode)
        return model.logits(hidden), [aux.experts for aux in (*first, *second)]

    if isinstance(imported.model, EncoderDecoder):
        logits, experts = encoder_decoder(imported.model)
        real = np.ones(record["targets"].shape, bool)
    else:
        logits, experts = decoder(imported.model)
        real = record["mask"] > 0
    return np.asarray(logits), [np.asarray(e) for e in experts], real


def assert_same_function(imported: Imported, record: Record) -> None:
    """Asserts equal logits to 1e-4 of the largest, and equal experts of every real token."""
    logits, experts, real = forward(imported, record)
    error = np.abs(logits - record["logits"])[real].max()
    assert error <= 1e-4 * np.abs(record["logits"]).max()
    assert len(experts) == len(record["choices"]) == len(imported.config.sparse_layers())
    for mine, theirs in zip(experts, record["choices"], strict=True):
        valid = real_tokens(mine, record)
        np.testing.assert_array_equal(mine[valid], theirs[valid])


def real_tokens(layer: np.ndarray, record: Record) -> np.ndarray:
    """Returns ``(B, L)`` bool for a layer's ``(B, L, E)``; rows of targets have no padding."""
    of_inputs = layer.shape[1] == record["mask"].shape[1]
    return record["mask"] > 0 if of_inputs else np.ones(layer.shape[:2], bool)


def assert_same_greedy(imported: Imported, record: Record) -> None:
    """Asserts the same tokens as ``transformers.generate``, with our cache."""
    sampling = Sampling(tokens=record["generated"].shape[1], temperature=0.0)
    rows = [row[mask > 0].tolist() for row, mask in zip(record["ids"], record["mask"], strict=True)]
    if isinstance(imported.model, EncoderDecoder):
        start = imported.original["decoder_start_token_id"]
        found = translate(imported.model, rows, sampling, start_id=start)
    else:
        found = generate(imported.model, rows, sampling)
    np.testing.assert_array_equal(found, record["generated"])


def assert_same_tensors_back(imported: Imported, folder: Path, target: Path) -> None:
    """Asserts that a saved model has the tensors and the settings that it was loaded from."""
    save(imported.model, target, imported.family, original=imported.original)
    before, after = (load_file(path / "model.safetensors") for path in (folder, target))
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    again = load(target)
    assert again.config == imported.config and again.vocab_size == imported.vocab_size
