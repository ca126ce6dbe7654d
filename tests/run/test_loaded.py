"""A model of ``transformers`` as Python gets it: logits and samples, on one device or a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, save
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.run.loaded import load_hf, save_hf
from tests.test_face import TINY_MIXTRAL

VOCAB = TINY_MIXTRAL["vocab_size"]
TOKENS = np.arange(8).reshape(2, 4) + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tiny"
    model = models.make(FAMILIES["mixtral"].read(TINY_MIXTRAL), VOCAB, jax.random.key(0))
    save(model, path, "mixtral", original=TINY_MIXTRAL)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_hf(folder)


def test_padding_changes_no_logits_of_the_other_tokens(loaded):
    valid = np.array([[True] * 4, [True] * 2 + [False] * 2])
    whole, padded = loaded.logits(TOKENS), loaded.logits(TOKENS, valid)
    np.testing.assert_allclose(padded[0], whole[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(padded[1, :2], whole[1, :2], rtol=1e-5, atol=1e-6)


def test_a_mesh_and_a_smaller_type_give_about_the_same(folder, loaded):
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    spread = load_hf(folder, "bfloat16", mesh)
    weights = spread.model.embedding.table[...]
    assert weights.dtype == jnp.bfloat16 and len(weights.sharding.device_set) == 8
    np.testing.assert_allclose(spread.logits(TOKENS), loaded.logits(TOKENS), rtol=0, atol=0.05)


def test_what_is_saved_again_is_the_same(loaded, tmp_path):
    save_hf(loaded, tmp_path / "again")
    again = load_hf(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.model, loaded.model)


def test_texts_need_a_tokenizer(loaded):
    for prompt in ("a text", ["a text"]):
        with pytest.raises(ConfigError, match="has no tokenizer: pass token ids instead"):
            loaded.generate(prompt)
