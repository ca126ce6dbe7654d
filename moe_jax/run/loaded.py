"""Loads models of Hugging Face ``transformers``, and saves models for it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import data, decoding, models
from moe_jax.decoding import Sampling, positions_of
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, huggingface
from moe_jax.nn.mode import DECODE
from moe_jax.run.api import OpenRun
from moe_jax.run.exported import target, tokenizer_texts
from moe_jax.run.sampling import answer, check_can_generate, texts

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A released model with its weights.

    Attributes:
        model: Flax NNX module.
        vocab_size: Vocabulary size ``V``.
        family: ``model_type`` of ``transformers``.
        original: Content of the released ``config.json``.
        folder: Folder of the released model, with its tokenizer.
        mesh: Mesh of devices; ``None`` for the default device.

    Examples:
        >>> import moe_jax as mj
        >>> model = mj.load_hf("tiny-mixtral")
        >>> model.config.width, model.vocab_size
        (16, 96)
        >>> model.generate([[5, 7], [3]], tokens=2, temperature=0.0) == [
        ...     *model.generate([[5, 7]], tokens=2, temperature=0.0),
        ...     *model.generate([[3]], tokens=2, temperature=0.0),
        ... ]  # each text is independent of its batch
        True
    """

    model: models.Model
    vocab_size: int
    family: str
    original: dict[str, Any]
    folder: Path
    mesh: Mesh | None = None

    @property
    def config(self) -> models.ModelConfig:
        """Configuration of the model."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        """Tokenizer of the folder.

        Raises:
            ConfigError: If the folder has no tokenizer.
        """
        name = folders.tokenizer_of(self.folder)
        if not name:
            raise ConfigError(f"{self.folder} has no tokenizer: pass token ids instead of texts")
        return data.open_tokenizer(data.DataConfig(tokenizer=name))

    def logits(self, tokens: Any, valid: Any = None) -> Array:
        """Returns the float32 logits ``(B, L, V)`` of each next token; no token is dropped.

        Args:
            tokens: Token ids ``(B, L)``.
            valid: Bool mask ``(B, L)``, False for padding; all True by default.

        Raises:
            ConfigError: If the model is an encoder-decoder, which reads two texts.
        """
        if not isinstance(self.model, models.Decoder):
            raise ConfigError("an encoder-decoder reads two texts: use model.encode and .decode")
        tokens = jnp.asarray(tokens, jnp.int32)
        valid = jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid, bool)
        with self._on_mesh():
            return _logits(self.model, tokens, valid)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Any:
        """Samples continuations of prompts.

        Args:
            prompts: One text, several texts, or several lists of token ids.
            tokens: Largest number of tokens to add to each prompt.
            temperature: Sampling temperature; 0 takes the most probable token.
            top_k: Number of most probable tokens to sample from; 0 for all.
            top_p: Probability mass of the smallest set of tokens to sample from; 1 for all.
            seed: Random seed of the samples.

        Returns:
            One text for one text, and a list of texts for several. For lists of token ids, the list
            of ids added to each.

        Raises:
            ConfigError: If the model reads later tokens; see ``check_can_generate``.
        """
        check_can_generate(self.model.config)
        sampling = Sampling(tokens, temperature, top_k, top_p, seed)
        with self._on_mesh():
            if isinstance(prompts, str):
                return texts(self.model, self.tokenizer, [prompts], sampling)[0]
            written = [prompt for prompt in prompts if isinstance(prompt, str)]
            if written and len(written) == len(prompts):
                return texts(self.model, self.tokenizer, written, sampling)
            return self._added(prompts, sampling)

    def chat(
        self,
        messages: data.Messages,
        *,
        tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Returns a sampled answer to a dialogue, in the chat template of the folder.

        Args:
            messages: Messages such as ``{"role": "user", "content": "What is a router?"}``.
            tokens: Largest number of tokens of the answer.
            temperature: Sampling temperature; 0 takes the most probable token.
            top_k: Number of most probable tokens to sample from; 0 for all.
            top_p: Probability mass of the smallest set of tokens to sample from; 1 for all.
            seed: Random seed of the sample.

        Raises:
            ConfigError: If the folder has no tokenizer, or the template rejects the messages.
        """
        sampling = Sampling(tokens, temperature, top_k, top_p, seed)
        with self._on_mesh():
            return answer(self.model, self.tokenizer, messages, sampling)

    def _added(self, prompts: Any, sampling: Sampling) -> list[list[int]]:
        if isinstance(self.model, models.EncoderDecoder):
            start = self.original.get("decoder_start_token_id") or 0
            return decoding.translate(self.model, prompts, sampling, start)
        return decoding.generate(self.model, prompts, sampling)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def load_hf(
    folder: str | Path, dtype: str = "float32", mesh: Mesh | None = None, **changes: Any
) -> LoadedModel:
    """Loads a model of Hugging Face ``transformers``.

    Args:
        folder: Folder with ``config.json`` and safetensors files.
        dtype: Data type of parameters and activations, ``float32`` or ``bfloat16``; routers compute
            in float32 either way.
        mesh: Mesh of ``moe_jax.parallel.make_mesh``; ``None`` for the default device.
        **changes: Changed settings of the model's configuration, such as ``remat="full"``.

    Raises:
        ConfigError: If the family is unknown or a file is incomplete. The error is raised before
            weights are loaded.

    Examples:
        >>> import moe_jax as mj
        >>> model = mj.load_hf("tiny-mixtral")
        >>> model.family, model.logits([[1, 2, 3]]).shape
        ('mixtral', (1, 3, 96))
        >>> len(model.generate([[1, 2, 3]], tokens=4)[0])
        4
    """
    found = huggingface.load(folder, dtype, mesh, **changes)
    return LoadedModel(
        found.model, found.vocab_size, found.family, found.original, Path(folder), mesh
    )


def save_hf(
    source: LoadedModel | OpenRun,
    folder: str | Path,
    *,
    family: str = "",
    dtype: str = "float32",
) -> None:
    """Writes a folder that Hugging Face ``transformers`` loads.

    Args:
        source: Loaded model, or run, which is written with the parameters that it was opened with.
        folder: Empty or new folder to write.
        family: ``model_type`` to write; by default the family of the released model that ``source``
            started from.
        dtype: Data type of the parameters in the files.

    Raises:
        ConfigError: If the family cannot express this model.

    Examples:
        >>> import moe_jax as mj
        >>> mj.save_hf(mj.load_hf("tiny-mixtral"), "tiny-copy", dtype="bfloat16")
        >>> mj.load_hf("tiny-copy").model.config == mj.load_hf("tiny-mixtral").model.config
        True
    """
    if isinstance(source, OpenRun):
        origin = source.workdir
        name, original = target(origin, source.config.model, source.session.tokenizer, family)
    else:
        origin, name, original = source.folder, family or source.family, source.original
    huggingface.save(
        source.model,
        folder,
        name,
        original=original,
        companions=folders.companions_of(origin),
        texts=tokenizer_texts(origin),
        dtype=dtype,
    )


@jax.jit
def _logits(model: models.Decoder, tokens: Array, valid: Array) -> Array:
    segments = valid.astype(np.int32)
    hidden, _ = model.hidden(tokens, segments, positions_of(segments), mode=DECODE)
    return model.logits(hidden)
