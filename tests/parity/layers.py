"""Records of whole MoE layers of ``transformers``: weights, tokens, outputs and gradients.

Needs ``torch`` and ``transformers``. ``python -m tests.parity.layers`` writes the committed records
that the tests compare with where these are not installed.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from tests.parity.compare_layers import FIXTURES, LATENTS, K

Record = dict[str, np.ndarray]


def nemotron_h(latent: int | None, seed: int, tokens: int) -> Record:
    """Returns the record of the layer of Nemotron 3, with 4 groups of experts of which 2 are kept.

    Args:
        latent: Width of the latent space of the experts, or ``None``.
        seed: Seed of weights and tokens.
        tokens: Number of tokens.
    """
    config = NemotronHConfig(
        layers_block_type=["moe"],
        hidden_size=12,
        n_routed_experts=8,
        num_experts_per_tok=K,
        moe_intermediate_size=6,
        moe_shared_expert_intermediate_size=7,
        moe_latent_size=latent,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        experts_implementation="eager",
    )
    layer, generator = NemotronHMoE(config), torch.Generator().manual_seed(seed)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator) / 4
    x = torch.randn((1, tokens, 12), generator=generator, requires_grad=True)
    y = layer(x)
    torch.sin(y).sum().backward()
    arrays = {"x": x, "y": y, "bias": layer.gate.e_score_correction_bias}
    for name, tensor in (("x", x), *layer.named_parameters()):
        arrays |= {name: tensor, f"gradient {name}": tensor.grad}
    return {name: value.detach().numpy() for name, value in arrays.items()}


def main() -> None:
    """Writes one record per layer."""
    FIXTURES.mkdir(exist_ok=True)
    for name, latent in LATENTS.items():
        np.savez_compressed(FIXTURES / f"{name}.npz", **nemotron_h(latent, 0, 19))


if __name__ == "__main__":
    main()
