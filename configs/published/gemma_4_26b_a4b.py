"""Gemma 4 26B-A4B (Google 2026), the text model: a dense network beside 128 experts in each layer.

The sizes are those in the config.json of LetheanNetwork/lemmy-pt, which repeats the release's, and
those in the metadata of gemma4:26b-a4b-it-q4_K_M in the library of Ollama. The model card prints
25.2B and 3.8B parameters, as the card of OpenExplorer/gemma-4-26B-A4B-it repeats; these numbers are
without the towers of images.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 25.2e9, 0.005, "model card"),
    PublishedNumber("active.embedding_and_head", 3.8e9, 0.01, "model card"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("gemma_4_26b_a4b", layers=30, width=2816, heads=(16, 8, 256))
    model = config.model
    model.update(mlp_dim=2112, activation="gelu", tie_embeddings=True, scale_embedding=True)
    model.update(logit_cap=30.0, layer_scale=True)
    model.norm.place = "both"
    details = {"qk_norm": "head", "value_norm": True, "scale": 1.0}
    model.attention.update(**details, window=1024)
    full = {"every": 6, "details": details | {"keys_as_values": True}}
    full |= {"positions": {"base": 1e6, "share": 0.25, "proportional": True}}
    model.attention_overrides = (full | {"num_kv_heads": 2, "head_dim": 512},)
    model.moe.update(every=1, num_experts=128, expert_dim=704, router_input="residual")
    model.moe.shared.update(hidden=2112, norms=True)
    model.moe.router = common.router("gemma4", k=8)
    config.data.update(vocab_size=262144, seq_length=8192, batch_size=1024)
    return config
