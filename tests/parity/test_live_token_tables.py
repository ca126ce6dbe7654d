"""The hash layers of a DeepSeek-V4 of ``transformers``, by the tables of its safetensors file."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make parity`")

import jax.numpy as jnp  # noqa: E402

from moe_jax import routing  # noqa: E402
from moe_jax.interop.huggingface import save_token_tables  # noqa: E402

V, M, E, K, S = 40, 32, 8, 3, 64


@pytest.fixture(scope="module")
def theirs():
    from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV4Config(
        vocab_size=V,
        hidden_size=M,
        moe_intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        n_routed_experts=E,
        num_experts_per_tok=K,
        head_dim=16,
        q_lora_rank=16,
        o_lora_rank=8,
        o_groups=2,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        sliding_window=8,
    )
    model = DeepseekV4ForCausalLM(config)
    for layer in model.model.layers[:3]:
        drawn = [torch.randperm(E)[:K] for _ in range(V)]
        layer.mlp.gate.tid2eid.copy_(torch.stack(drawn))
        torch.nn.init.normal_(layer.mlp.gate.weight)
    return model


def test_hash_layers_choose_and_weigh_as_in_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    paths = save_token_tables(tmp_path, tmp_path / "tables")
    assert list(paths) == [0, 1, 2]
    ids, x = torch.randint(V, (1, S)), torch.randn(1, S, M)
    for layer, path in paths.items():
        gate = theirs.model.layers[layer].mlp.gate
        with torch.no_grad():
            _, gates, experts = gate(x, ids)
        wanted = np.zeros((S, E), np.float32)
        np.put_along_axis(wanted, experts.numpy(), gates.numpy(), 1)
        router = routing.preset("deepseek_v4_hash", k=K, table=str(path))
        kernel = jnp.asarray(gate.weight.detach().numpy().T)
        logits = router.head.logits(jnp.asarray(x[0].numpy()), {"kernel": kernel}, E)
        plan = router(logits, token_ids=jnp.asarray(ids[0].numpy(), jnp.int32))
        found = np.asarray(plan.combine).sum(-1)
        np.testing.assert_array_equal(found > 0, wanted > 0)
        np.testing.assert_allclose(found, wanted, rtol=2e-5)
