"""A model of ``transformers`` as Python gets it: logits and samples, on one device or a mesh."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, save
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.routing import preset
from moe_jax.run.loaded import LoadedModel, load_hf, save_hf
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


@pytest.fixture(scope="module")
def speaking(folder, tmp_path_factory):
    """The model with a tokenizer of words: <s> 1, </s> 2, and w0, w1, ... from 3 on."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = tmp_path_factory.mktemp("speaking") / "tiny"
    shutil.copytree(folder, path)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.save(str(path / "tokenizer.json"))
    template = "{{ bos_token }} {% for m in messages %}w9 {{ m.content }} w8 {% endfor %}"
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    return load_hf(path)


def test_a_mixtral_continues_a_text(speaking):
    (added,) = speaking.generate([[1, 3, 4]], tokens=3, temperature=0.0)
    said = speaking.tokenizer.decode(np.array([3, 4, *added]))
    assert speaking.generate("w0 w1", tokens=3, temperature=0.0) == said
    assert speaking.generate(["w0 w1"], tokens=3, temperature=0.0) == [said]


def test_a_mixtral_answers_in_its_chat_template(speaking):
    # The template writes w9 w5 w8, which are 12, 8 and 11, after the begin token.
    (added,) = speaking.generate([[1, 12, 8, 11]], tokens=3, temperature=0.0)
    answer = speaking.chat([{"role": "user", "content": "w5"}], tokens=3, temperature=0.0)
    assert answer == speaking.tokenizer.decode(np.array(added)) != ""


def test_ids_of_a_model_whose_experts_choose_tokens_are_not_continued():
    moe = MoEConfig(every=1, num_experts=4, router=preset("expert_choice"), allow_future_leak=True)
    config = models.DecoderConfig(num_layers=1, width=8, num_heads=2, mlp_dim=8, moe=moe)
    made = models.make(config, 16, jax.random.key(0))
    with pytest.raises(ConfigError, match="cannot generate text"):
        LoadedModel(made, 16, "", {}, Path()).generate([[1, 2]], tokens=1)
