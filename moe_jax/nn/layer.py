"""The mixture-of-experts layer for any Flax NNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn import moe
from moe_jax.nn.feed_forward import Activation, FeedForwardConfig
from moe_jax.nn.mode import EVAL, TRAIN
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.transport import TransportName


class MoE(nnx.Module):
    """A mixture-of-experts layer, which takes the place of a feed-forward network.

    The layer has no norm and no residual connection. It works with ``nnx.jit``, ``nnx.grad``,
    ``nnx.Optimizer`` and ``nnx.split`` like any other module.

    Attributes:
        mixture: Router, experts and shared network, which hold all parameters.
        deterministic: True if a call evaluates; ``model.train()`` and ``model.eval()`` set it.

    Examples:
        >>> import jax
        >>> import moe_jax as mj
        >>> from flax import nnx
        >>> layer = mj.MoE(width=16, hidden=32, num_experts=4, router="switch", rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (2, 8, 16))  # (B, L, M)
        >>> y, report = layer(x)
        >>> y.shape, report.counts.demand.sum().item()  # 16 tokens, one expert each
        ((2, 8, 16), 16.0)

        In training, the objective of the model includes the loss of the layer:

        >>> def loss(layer, x, rngs):
        ...     y, report = layer(x, train=True, rngs=rngs)
        ...     return (y**2).mean() + report.loss
        >>> grads = nnx.grad(loss)(layer, x, nnx.Rngs(1))
    """

    def __init__(
        self,
        width: int,
        hidden: int | Sequence[int],
        num_experts: int = 8,
        router: str | routing.Router = "switch",
        *,
        rngs: nnx.Rngs,
        activation: Activation = "gelu",
        gated: bool = False,
        bias: bool = False,
        latent_dim: int = 0,
        shared: int | SharedConfig = 0,
        expert_dropout: float = 0.0,
        group_size: int = 1024,
        transport: TransportName = "auto",
        init_scale: float = 1.0,
    ):
        """Initialises the parameters.

        Args:
            width: Width ``M`` of the tokens.
            hidden: Hidden width ``F`` of every expert. With several widths, equally many
                neighbouring experts have each width.
            num_experts: Number ``E`` of experts.
            router: Name of a router, or a router.
            rngs: Random streams; the stream ``params`` initialises the parameters.
            activation: Activation of the experts.
            gated: True makes experts gated linear units.
            bias: True adds biases to the linear maps of experts.
            latent_dim: Width of the experts' inputs and outputs, between two projections that all
                experts share (LatentMoE); 0 makes them as wide as the tokens.
            shared: Hidden width of the shared network, which computes an output for every token
                beside the experts; 0 for no such network; or its whole configuration.
            expert_dropout: Dropout rate of the experts' output in training.
            group_size: Number ``S`` of tokens that are routed together and compete for slots.
            transport: Movement of tokens to experts, see ``MoEConfig``; ``auto`` selects one for
                the router and the mesh.
            init_scale: Scale of the initial weights, see ``moe_jax.nn.init.weight``.

        Raises:
            ConfigError: If the router does not exist or settings contradict each other.
        """
        config = MoEConfig(
            **_widths(hidden, num_experts, latent_dim),
            group_size=group_size,
            router=routing.preset(router) if isinstance(router, str) else router,
            transport=transport,
            shared=SharedConfig(shared) if isinstance(shared, int) else shared,
            expert_dropout=expert_dropout,
        )
        linear: dict[str, Any] = {"gated": gated, "bias": bias, "init_scale": init_scale}
        expert = FeedForwardConfig(width, config.expert_dim, activation, **linear)
        self.mixture = moe.ConfiguredMoE(config, expert, rngs.params())
        self.width = width
        self.deterministic = True

    def __call__(
        self,
        x: Float[Array, "*shape"],
        valid: Bool[Array, "B L"] | None = None,
        *,
        train: bool | None = None,
        rngs: nnx.Rngs | PRNGKeyArray | None = None,
        token_ids: Int[Array, "B L"] | None = None,
        carried: Float[Array, "B L D"] | None = None,
    ) -> tuple[Float[Array, "B L M"], MoEAux]:
        """Returns the output of the layer and its report.

        Args:
            x: Tokens ``(B, L, M)``.
            valid: Mask ``(B, L)``, False for padding, which gets zero output and takes no slot;
                ``None`` means that no token is padding.
            train: True selects the router and the capacity of training, False the router and the
                capacity of evaluation; ``None`` follows the last call of ``model.train()`` or
                ``model.eval()``, and evaluates before the first call.
            rngs: Random streams, of which training uses ``dropout``, or a random key, for noise,
                random policies and dropout; without it the layer is deterministic.
            token_ids: Ids ``(B, L)`` of the tokens, int32, for routers that hash them.
            carried: ``report.carried`` of the MoE layer before, for the routers ``moe_plus_plus``
                and ``zaya``; ``None`` in the first MoE layer.

        Returns:
            The output ``(B, L, M)`` and the report, with the ``loss`` that the objective includes,
            the ``losses`` by name, the ``counts`` by expert and ``dropped_fraction``. The output of
            unrouted tokens is zero unless the layer has a shared network.

        Raises:
            ConfigError: If ``x`` has another shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ConfigError(f"x has shape {x.shape}, and the layer reads (B, L, {self.width})")
        train = not self.deterministic if train is None else train
        return self.mixture(
            x,
            jnp.ones(x.shape[:2], bool) if valid is None else valid,
            mode=TRAIN if train else EVAL,
            rng=_key(rngs) if train else None,
            token_ids=token_ids,
            carried=carried,
        )

    def update_router(self, report: MoEAux) -> None:
        """Updates the state of the router after an optimizer step, such as DeepSeek-V3's biases.

        Args:
            report: Report of the layer on the batch of this step.
        """
        self.mixture.router.update(report.counts)


def _widths(hidden: int | Sequence[int], num_experts: int, latent_dim: int) -> dict[str, Any]:
    """Returns the settings of ``MoEConfig`` that determine the sizes of the experts."""
    sizes = {"every": 1, "num_experts": num_experts, "latent_dim": latent_dim}
    if isinstance(hidden, int):
        return {**sizes, "expert_dim": hidden}
    return {**sizes, "expert_dim": hidden[0], "expert_dims": tuple(hidden)}


def _key(rngs: nnx.Rngs | PRNGKeyArray | None) -> PRNGKeyArray | None:
    return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
