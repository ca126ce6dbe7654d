"""DeepSeek-V3's module for a second token, made of the layers of ``transformers`` (section 2.2).

``transformers`` leaves the module out; the reference is its own decoder layer between the norms and
the projection of the released weights.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make parity`")

from moe_jax.interop.huggingface import load, save  # noqa: E402
from moe_jax.nn.mode import DECODE  # noqa: E402
from tests.parity import models  # noqa: E402

WIDTH, VOCAB, LAST = 24, 43, "model.layers.1."
INPUTS = np.random.default_rng(3).integers(3, VOCAB, (2, 9))
TARGETS = np.random.default_rng(4).integers(3, VOCAB, (2, 9))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder whose second layer has become the module of a model of one layer."""
    whole, folder = (tmp_path_factory.mktemp(name) for name in ("whole", "stored"))
    models.make("deepseek_v3", whole)
    config = json.loads((whole / "config.json").read_text())
    tensors = load_file(whole / "model.safetensors")
    rng = np.random.default_rng(0)
    tensors |= {
        f"{LAST}enorm.weight": 1 + rng.normal(size=WIDTH) / 5,
        f"{LAST}hnorm.weight": 1 + rng.normal(size=WIDTH) / 5,
        f"{LAST}shared_head.norm.weight": 1 + rng.normal(size=WIDTH) / 5,
        f"{LAST}eh_proj.weight": rng.normal(size=(WIDTH, 2 * WIDTH)) / 7,
        f"{LAST}embed_tokens.weight": tensors["model.embed_tokens.weight"],
        f"{LAST}shared_head.head.weight": tensors["lm_head.weight"],
    }
    # A dense first layer, which alone is not what a module repeats: its layer has experts.
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 1}
    experts = {name: t for name, t in tensors.items() if name.startswith(f"{LAST}mlp")}
    for name in [name for name in tensors if name.startswith("model.layers.0.mlp")]:
        del tensors[name]
    tensors |= {name.replace(LAST, "model.layers.0."): t.copy() for name, t in experts.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.astype(np.float32) for n, t in tensors.items()}, folder / "model.safetensors")
    return whole, folder, tensors


def theirs(whole, folder, tensors):
    layer = models.load(whole).model.layers[1]
    model = models.load(folder)

    def norm(name, x):
        scale = torch.tensor(tensors[f"{LAST}{name}.weight"], dtype=torch.float32)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps) * scale

    with torch.no_grad():
        hidden = model.model(torch.tensor(INPUTS)).last_hidden_state
        token = model.model.embed_tokens(torch.tensor(TARGETS))
        both = torch.cat([norm("enorm", token), norm("hnorm", hidden)], -1)
        x = both @ torch.tensor(tensors[f"{LAST}eh_proj.weight"], dtype=torch.float32).T
        places = torch.arange(9)[None].expand(2, 9)
        mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        around = model.model.rotary_emb(x, places)
        x = layer(x, attention_mask=mask, position_ids=places, position_embeddings=around)
        return model.lm_head(norm("shared_head.norm", x)).numpy()


def test_the_module_is_that_of_the_released_weights(stored, tmp_path):
    whole, folder, tensors = stored
    expected = theirs(whole, folder, tensors)
    imported = load(folder)
    assert imported.config.lookahead == 1
    batch = {"inputs": INPUTS, "targets": TARGETS, "segments": np.ones_like(INPUTS)}
    batch["positions"] = np.broadcast_to(np.arange(9), (2, 9))

    @jax.jit
    def further(model):
        return model.logits(model.read(batch, mode=DECODE).ahead[0])

    found = np.asarray(further(imported.model))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    save(imported.model, tmp_path, imported.family, original=imported.original)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor.astype(np.float32), err_msg=name)
