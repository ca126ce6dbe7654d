"""The router as a module: it holds the router's parameters and its state between steps."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe_jax import routing
from moe_jax.nn.dropout import dropout
from moe_jax.nn.groups import out_of_groups
from moe_jax.nn.init import described
from moe_jax.parallel import constrain, over_groups
from moe_jax.routing import Counts, Plan, Router
from moe_jax.routing.balance import BATCH_LOAD, Evidence
from moe_jax.routing.inputs import Inputs
from moe_jax.routing.observing import observing


class RouterState(nnx.Variable):
    """State of a router between steps, checkpointed but neither trained nor differentiated."""


class RouterLayer(nnx.Module):
    """A router with its parameters and its state: it computes the plans of all groups."""

    def __init__(
        self, router: Router, width: int, num_experts: int, key: PRNGKeyArray, scale: float
    ):
        """Initialises the parameters of the router's head, and the state to zeros.

        Args:
            router: The router.
            width: Width ``M`` of the tokens.
            num_experts: Number ``E`` of experts.
            key: Random key.
            scale: Scale of the initial weights, see ``moe_jax.nn.init.weight``.
        """
        scored = router.scored(num_experts)
        parameters = router.head.parameters(width, scored, router.planes)
        for name, parameter in parameters.items():
            setattr(self, name, described(parameter, key, scale))
            key = jax.random.fold_in(key, 1)
        self.names = tuple(parameters)
        self.state = nnx.Dict(
            {
                name: RouterState(jnp.zeros(shape, jnp.float32), axes=("router",))
                for name, shape in router.state_shapes(num_experts).items()
            }
        )
        self.router = router
        self.num_experts = num_experts

    def logits(
        self, x: Float[Array, "G S M"], carried: Float[Array, "G S D"] | None = None
    ) -> Float[Array, "G S E *P"]:
        """Returns the logits ``(G, S, E)`` or ``(G, S, E, P)`` of the tokens ``x (G, S, M)``."""
        return self._read(x, carried)[0]

    def _read(
        self, x: Float[Array, "G S M"], carried: Float[Array, "G S D"] | None
    ) -> tuple[Float[Array, "G S E *P"], Float[Array, "G S D"] | None]:
        """Returns the logits, and the values for the next MoE layer in float32."""
        parameters = {name: getattr(self, name)[...] for name in self.names}
        inputs, outputs = _dtypes(self.router.precision, x.dtype)
        width = self.router.carried_width(self.num_experts)
        if width and carried is None:
            carried = jnp.zeros((*x.shape[:-1], width), jnp.float32)
        scored = self.router.scored(self.num_experts)
        logits, carried = self.router.head.read(x.astype(inputs), parameters, scored, carried)
        return logits.astype(outputs), None if carried is None else carried.astype(jnp.float32)

    def __call__(
        self,
        x: Float[Array, "G S M"],
        *,
        capacity: int,
        valid: Bool[Array, "G S"],
        token_ids: Int[Array, "G S"] | None,
        record: Int[Array, "G S K"] | None,
        rng: PRNGKeyArray | None,
        carried: Float[Array, "G S D"] | None = None,
        settings: Mapping[str, Array] | None = None,
        limit: Int[Array, " G"] | None = None,
    ) -> tuple[Plan, Float[Array, "G S D"] | None]:
        """Returns the plan of all groups, and the values for the router of the next MoE layer.

        The arrays of the plan have a leading ``G``.

        Args:
            x: Tokens ``(G, S, M)``.
            capacity: Number ``C`` of slots per expert and group.
            valid: Mask ``(G, S)``, False for padding.
            token_ids: Ids ``(G, S)`` of the tokens, int32, for routers that hash them, or ``None``.
            record: Recorded choices ``(G, S, K)``, for the router ``forced``, or ``None``.
            rng: Random key in training, or ``None``.
            carried: Values ``(G, S, D)`` of the router of the MoE layer before, for a head that
                reads them; ``None`` stands for zeros.
            settings: Values of settings at this step, by name; see ``moe_jax.nn.mode.Mode``.
            limit: Slots ``(G,)`` per expert that tokens can fill, at most ``C``, or ``None``.
        """
        noise_key, key = (None, None) if rng is None else jax.random.split(rng)
        x = x if noise_key is None else self._noisy(x, noise_key, settings or {})
        logits, carried = self._read(x, carried)
        plan = routing.route(
            self.router,
            logits,
            capacity=capacity,
            valid=valid,
            token_ids=token_ids,
            rng=key,
            state=self._carried(),
            record=record,
            settings=settings,
            limit=limit,
            spread=over_groups,
        )
        return plan, carried

    def log_shares(
        self,
        x: Float[Array, "G S M"],
        valid: Bool[Array, "G S"],
        carried: Float[Array, "G S D"] | None = None,
    ) -> Float[Array, "G S V"]:
        """Returns the logarithm of the share of each of ``V`` logits in the scores of a token.

        The scores are those of evaluation, without noise. The gradient reaches the parameters of
        the router alone.

        Args:
            x: Tokens ``(G, S, M)``.
            valid: Mask ``(G, S)``, False for padding.
            carried: Values ``(G, S, D)`` of the router of the MoE layer before, or ``None``.
        """
        logits = self.logits(*jax.lax.stop_gradient((x, carried)))
        planes = logits.reshape(*logits.shape[:3], -1).astype(jnp.float32)
        state = jax.lax.stop_gradient(self._carried())

        def one(planes: Array, valid: Array) -> Array:
            inputs = Inputs(planes[..., 0], planes, valid, 0, state=state)
            return jax.nn.log_softmax(self.router.score(inputs).log_scores, axis=-1)

        return jax.vmap(one)(planes, valid)

    def _noisy(self, x: Array, noise_key: Array, settings: Mapping[str, Array]) -> Array:
        """Returns the tokens with the jitter and the dropout that the router adds in training."""
        router = self.router
        if router.input_jitter or "input_jitter" in settings:
            half = settings.get("input_jitter", router.input_jitter)
            low, high = 1 - half, 1 + half
            jitter = jax.random.uniform(noise_key, x.shape, jnp.float32, low, high)
            # A router in bfloat16 reads noisy inputs in bfloat16, but the noise is float32.
            dtype = x.dtype if router.precision == "input" else jnp.float32
            x = (x.astype(jnp.float32) * jitter).astype(dtype)
        if router.input_dropout:
            x = dropout(x, router.input_dropout, jax.random.fold_in(noise_key, 1))
        return x

    def _carried(self) -> dict[str, Array]:
        return {name: value[...] for name, value in self.state.items()}

    def sequence_losses(
        self,
        plan: Plan,
        valid: Bool[Array, "B L"],
        settings: Mapping[str, Array] | None = None,
    ) -> dict[str, Float[Array, " B"]]:
        """Returns the losses ``(B,)`` per sequence by name; a sequence is a row of the batch.

        Args:
            plan: Plan of all groups.
            valid: Mask ``(B, L)``, False for padding.
            settings: Values of settings at this step, by name; see ``moe_jax.nn.mode.Mode``.
        """
        if plan.evidence is None:
            return {}
        state = self._carried()
        if BATCH_LOAD in state:
            # Zeros unless the step has counted the choices of all microbatches before.
            known, here = state[BATCH_LOAD], plan.counts.demand.sum(0)
            state[BATCH_LOAD] = jnp.where(known.sum() > 0, known, here)

        def rows(x: Array) -> Array:
            return constrain(out_of_groups(x, valid.shape), "batch", "length")

        def one(evidence: Evidence, valid: Array) -> dict[str, Array]:
            known = jax.lax.stop_gradient(state)
            return self.router.sequence_losses(evidence, valid, known, settings or {})

        return jax.vmap(one)(jax.tree.map(rows, plan.evidence), valid)

    def announce(self, demand: Float[Array, "*layers E"]) -> None:
        """Makes the choices of a whole batch known to the losses that read them.

        Args:
            demand: Number ``(..., E)`` of tokens that choose each expert in the batch.
        """
        if BATCH_LOAD in self.state:
            self.state[BATCH_LOAD][...] = demand

    def update(self, counts: Counts) -> None:
        """Updates the state after an optimizer step.

        Args:
            counts: Counts of the whole step, with the leading axes of scanned layers.
        """
        after = self.router.next_state(self._carried(), counts.demand, counts.observed)
        for name, value in after.items():
            self.state[name][...] = value


def observe_top_scores(model: nnx.Module) -> None:
    """Makes all routers of a model sum the shares of their top scores; no plan changes."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, RouterLayer):
            module.router = observing(module.router)


def _dtypes(precision: str, dtype: jnp.dtype) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the types of the tokens in the router's product and of its logits."""
    wide = jnp.dtype(jnp.float32)
    dtypes = {
        "float32": (wide, wide),
        "bfloat16_product": (jnp.dtype(jnp.bfloat16), wide),
        "input": (dtype, dtype),
    }
    return dtypes[precision]
