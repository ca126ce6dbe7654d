"""A mixture-of-experts layer by itself, for models of any Flax NNX code."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn import moe
from moe_jax.nn.feed_forward import Activation, FeedForwardConfig
from moe_jax.nn.mode import EVAL, TRAIN
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.transport import TransportName

Array = jax.Array


class MoE(nnx.Module):
    """A mixture-of-experts layer, in place of a feed-forward network.

    It has no norm and no residual connection, and works with ``nnx.jit``, ``nnx.grad``,
    ``nnx.Optimizer`` and ``nnx.split`` as any module does.

    Attributes:
        mixture: router, experts and shared network, with all parameters.
        deterministic: whether a call evaluates; ``model.train()`` and ``model.eval()`` set it.

    Examples:
        >>> import jax
        >>> import moe_jax as mj
        >>> from flax import nnx
        >>> layer = mj.MoE(width=16, hidden=32, num_experts=4, router="switch", rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (2, 8, 16))  # (B, L, M)
        >>> y, report = layer(x)
        >>> y.shape, report.counts.demand.sum().item()  # 16 tokens, one expert each
        ((2, 8, 16), 16.0)

        In training the balance loss is added to the model's own:

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
        shared: int | SharedConfig = 0,
        expert_dropout: float = 0.0,
        group_size: int = 1024,
        transport: TransportName | None = None,
        init_scale: float = 1.0,
    ):
        """Makes the parameters.

        Args:
            width: ``M`` of the tokens.
            hidden: ``F`` of every expert; several widths make experts of several sizes, in equally
                large groups.
            num_experts: ``E``.
            router: the name of a router, or a router.
            rngs: its stream ``params`` draws the parameters.
            activation: of the experts.
            gated: whether experts are gated linear units.
            bias: whether the linear maps of experts have biases.
            shared: hidden width of a network that every token passes beside its experts, 0 for
                none; or its whole description.
            expert_dropout: dropout of the experts' output in training.
            group_size: ``S``, tokens that are routed together and compete for slots.
            transport: how tokens travel to experts, see ``MoEConfig``; by default ``gather``, and
                ``einsum`` for routers that mix tokens.
            init_scale: scale of the initial weights.

        Raises:
            ConfigError: if the router does not exist, or settings do not go together.
        """
        router = routing.preset(router) if isinstance(router, str) else router
        widths = () if isinstance(hidden, int) else tuple(hidden)
        one = hidden if isinstance(hidden, int) else widths[0]
        usual: TransportName = "gather" if router.select.slot_table else "einsum"
        config = MoEConfig(
            every=1,
            num_experts=num_experts,
            expert_dim=one,
            expert_dims=widths,
            group_size=group_size,
            router=router,
            transport=transport or usual,
            shared=SharedConfig(shared) if isinstance(shared, int) else shared,
            expert_dropout=expert_dropout,
        )
        expert = FeedForwardConfig(
            width=width,
            hidden=one,
            activation=activation,
            gated=gated,
            bias=bias,
            init_scale=init_scale,
        )
        self.mixture = moe.MoE(config, expert, rngs.params())
        self.width = width
        self.deterministic = True

    def __call__(
        self,
        x: Array,
        valid: Array | None = None,
        *,
        train: bool | None = None,
        rngs: nnx.Rngs | Array | None = None,
        token_ids: Array | None = None,
    ) -> tuple[Array, MoEAux]:
        """Applies the layer.

        Args:
            x: ``(B, L, M)`` float.
            valid: ``(B, L)`` bool, False for padding, which gets zero output and takes no slot;
                all True by default.
            train: whether the router and its capacity are those of training; by default what
                ``model.train()`` or ``model.eval()`` said last, and evaluation before that.
            rngs: in training its stream ``dropout``, or a key, draws noise, random policies and
                dropout; without it nothing is random.
            token_ids: ``(B, L)`` int32, for routers that hash them.

        Returns:
            ``(B, L, M)``, zero for tokens that got no slot, and the layer's report: ``loss`` to add
            to the objective, ``losses`` by name, ``counts`` by expert and ``dropped_fraction``.

        Raises:
            ConfigError: if ``x`` has another shape.
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
        )

    def update_router(self, report: MoEAux) -> None:
        """Moves the router's state on after an optimizer step, such as the biases of DeepSeek-V3.

        Args:
            report: of the batch of this step.
        """
        self.mixture.router.update(report.counts.demand)


def _key(rngs: nnx.Rngs | Array | None) -> Array | None:
    return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
