"""Records of the routers of ``transformers``: inputs, weights, and what came out of them.

Needs ``torch`` and ``transformers``. ``python -m tests.parity.families`` writes the committed
records that the tests compare with where these are not installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS, WIDTH = 19, 12
Record = dict[str, np.ndarray]


def _module(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _drawn(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter and buffer anew; many routers start as zeros."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return module.eval()


def _inputs(seed: int, tokens: int) -> torch.Tensor:
    return torch.randn((tokens, WIDTH), generator=torch.Generator().manual_seed(1000 + seed))


def _dense(weights: torch.Tensor, experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.zeros(weights.shape[0], num_experts).scatter(1, experts, weights)


def _record(x: torch.Tensor, kernel: torch.Tensor, dense: torch.Tensor, **more: Any) -> Record:
    arrays = {"x": x, "kernel": kernel.T, "weights": dense, **more}
    return {
        name: np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        for name, value in arrays.items()
    }


def _top_k(
    family: str, name: str, experts: int, k: int, normalize: bool
) -> Callable[[int, int], Record]:
    """A family whose router returns logits, weights and experts, with the usual loss."""

    def record(seed: int, tokens: int) -> Record:
        module = _module(family)
        config = SimpleNamespace(
            hidden_size=WIDTH,
            num_experts=experts,
            num_local_experts=experts,
            num_experts_per_tok=k,
            norm_topk_prob=normalize,
        )
        router, x = _drawn(getattr(module, name)(config), seed), _inputs(seed, tokens)
        logits, weights, chosen = router(x)
        loss = module.load_balancing_loss_func((logits,), experts, k)
        more = {"bias": router.bias} if hasattr(router, "bias") else {}
        dense = _dense(weights, chosen, experts)
        return _record(x, router.weight, dense, loss=loss, k=k, **more)

    return record


def dbrx(seed: int, tokens: int) -> Record:
    """DBRX: the choice is made outside the router."""
    module, experts, k = _module("dbrx"), 8, 3
    config = SimpleNamespace(hidden_size=WIDTH, moe_num_experts=experts, moe_jitter_eps=None)
    router, x = _drawn(module.DbrxRouter(config), seed), _inputs(seed, tokens)
    logits = router(x)
    chooser = SimpleNamespace(top_k=k, moe_normalize_expert_weights=1.0)
    weights, chosen = module.DbrxFFN.route_tokens_to_experts(chooser, logits)
    loss = module.load_balancing_loss_func((logits,), experts, k)
    dense = _dense(weights, chosen, experts)
    return _record(x, router.layer.weight, dense, loss=loss, k=k)


def deepseek_v2(seed: int, tokens: int) -> Record:
    """DeepSeek-V2: groups by their best expert."""
    config = SimpleNamespace(
        num_experts_per_tok=3,
        num_experts=12,
        hidden_size=WIDTH,
        routed_scaling_factor=16.0,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
    )
    router = _drawn(_module("deepseek_v2").DeepseekV2TopkRouter(config), seed)
    x = _inputs(seed, tokens)
    _, weights, chosen = router(x)
    return _record(x, router.weight, _dense(weights, chosen, 12), k=3)


def deepseek_v3(seed: int, tokens: int) -> Record:
    """DeepSeek-V3: a random bias, groups by their two best experts."""
    config = SimpleNamespace(
        num_experts_per_tok=3,
        num_local_experts=12,
        hidden_size=WIDTH,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
    )
    router = _drawn(_module("deepseek_v3").DeepseekV3TopkRouter(config), seed)
    x, bias = _inputs(seed, tokens), router.e_score_correction_bias
    _, weights, chosen = router(x)
    return _record(x, router.weight, _dense(weights, chosen, 12), k=3, state_bias=bias)


def nemotron_h(seed: int, tokens: int) -> Record:
    """Nemotron 3: DeepSeek-V3's router, as published without groups."""
    config = SimpleNamespace(
        num_experts_per_tok=3,
        num_local_experts=12,
        hidden_size=WIDTH,
        routed_scaling_factor=5.0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
    )
    router = _drawn(_module("nemotron_h").NemotronHTopkRouter(config), seed)
    x, bias = _inputs(seed, tokens), router.e_score_correction_bias
    _, weights, chosen = router(x)
    return _record(x, router.weight, _dense(weights, chosen, 12), k=3, state_bias=bias)


def llama4(seed: int, tokens: int) -> Record:
    """Llama 4: the weights scale what goes in."""
    config = SimpleNamespace(hidden_size=WIDTH, num_local_experts=7, num_experts_per_tok=1)
    router, x = _drawn(_module("llama4").Llama4Router(config), seed), _inputs(seed, tokens)
    scores, _ = router(x)
    return _record(x, router.weight, scores, k=1)


def switch_transformers(seed: int, tokens: int) -> Record:
    """Switch: first come first served, and its z-loss and balance loss."""
    module, experts, capacity = _module("switch_transformers"), 5, 3
    config = SimpleNamespace(
        num_experts=experts,
        expert_capacity=capacity,
        hidden_size=WIDTH,
        router_bias=False,
        router_jitter_noise=0.0,
        router_ignore_padding_tokens=False,
        router_dtype="float32",
    )
    router = _drawn(module.SwitchTransformersTop1Router(config), seed)
    x = _inputs(seed, tokens)
    seated, probability, logits = router(x[None])
    chosen = logits.argmax(-1)
    loss = module.load_balancing_loss_func(torch.softmax(logits, -1), chosen)
    z = module.router_z_loss_func(logits)
    dense = (seated * probability)[0]
    kernel = router.classifier.weight
    return _record(x, kernel, dense, k=1, capacity=capacity, loss=loss, z=z)


def _nllb(normalize_before: bool, prioritized: bool) -> Callable[[int, int], Record]:
    """NLLB-MoE, which is fairseq's top-2 gate, at its evaluation capacity."""

    def record(seed: int, tokens: int) -> Record:
        config = SimpleNamespace(
            num_experts=6,
            expert_capacity=None,
            hidden_size=WIDTH,
            router_bias=False,
            router_ignore_padding_tokens=False,
            router_dtype="float32",
            second_expert_policy="all",
            normalize_router_prob_before_dropping=normalize_before,
            batch_prioritized_routing=prioritized,
            moe_eval_capacity_token_fraction=0.25,
        )
        router = _drawn(_module("nllb_moe").NllbMoeTop2Router(config), seed)
        x = _inputs(seed, tokens)
        _, weights, _ = router(x)
        kernel = router.classifier.weight
        return _record(x, kernel, weights, k=2, capacity=router.expert_capacity)

    return record


FAMILIES: dict[str, Callable[[int, int], Record]] = {
    "mixtral": _top_k("mixtral", "MixtralTopKRouter", 8, 2, True),
    "qwen2_moe": _top_k("qwen2_moe", "Qwen2MoeTopKRouter", 10, 4, False),
    "qwen3_moe": _top_k("qwen3_moe", "Qwen3MoeTopKRouter", 11, 5, True),
    "olmoe": _top_k("olmoe", "OlmoeTopKRouter", 9, 3, False),
    "gpt_oss": _top_k("gpt_oss", "GptOssTopKRouter", 7, 4, True),
    "dbrx": dbrx,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "nemotron_h": nemotron_h,
    "llama4": llama4,
    "switch_transformers": switch_transformers,
    "nllb_moe": _nllb(False, False),
    "nllb_moe_prioritized": _nllb(False, True),
    "nllb_moe_normalized_first": _nllb(True, False),
}


def main() -> None:
    """Writes one record per family."""
    FIXTURES.mkdir(exist_ok=True)
    for name, family in FAMILIES.items():
        np.savez_compressed(FIXTURES / f"{name}.npz", **family(0, TOKENS))


if __name__ == "__main__":
    main()
