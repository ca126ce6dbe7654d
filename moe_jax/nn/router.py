"""The router as a module: its parameters, its state between steps, and plans for all groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.dropout import dropout
from moe_jax.nn.groups import out_of_groups
from moe_jax.nn.init import described
from moe_jax.parallel import constrain, over_groups
from moe_jax.routing import Plan, Router
from moe_jax.routing.balance import Evidence

Array = jax.Array


class RouterState(nnx.Variable):
    """What a router carries between steps: checkpointed, but neither trained nor differentiated."""


class RouterLayer(nnx.Module):
    """Tokens to plans."""

    def __init__(self, router: Router, width: int, num_experts: int, key: Array, scale: float):
        """Makes the parameters of the router's head by name, and its state as zeros."""
        wanted = router.head.parameters(width, num_experts, router.planes)
        for name, parameter in wanted.items():
            setattr(self, name, described(parameter, key, scale))
            key = jax.random.fold_in(key, 1)
        self.names = tuple(wanted)
        self.state = nnx.Dict(
            {
                name: RouterState(jnp.zeros(shape, jnp.float32), axes=("router",))
                for name, shape in router.state_shapes(num_experts).items()
            }
        )
        self.router = router
        self.num_experts = num_experts

    def logits(self, x: Array) -> Array:
        """Returns ``(G, S, E)`` or ``(G, S, E, P)`` for tokens ``(G, S, M)``."""
        parameters = {name: getattr(self, name)[...] for name in self.names}
        read, given = _types(self.router.precision, x.dtype)
        return self.router.head.logits(x.astype(read), parameters, self.num_experts).astype(given)

    def __call__(
        self,
        x: Array,
        *,
        capacity: int,
        valid: Array,
        token_ids: Array | None,
        record: Array | None,
        rng: Array | None,
    ) -> Plan:
        """Routes all groups.

        Args:
            x: ``(G, S, M)``.
            capacity: ``C``.
            valid: ``(G, S)`` bool.
            token_ids: ``(G, S)`` int32, or ``None``.
            record: ``(G, S, K)`` experts to force, or ``None``.
            rng: key in training.
        """
        router, groups = self.router, x.shape[0]
        jitter_key, key = (None, None) if rng is None else jax.random.split(rng)
        if jitter_key is not None and router.input_jitter:
            low, high = 1 - router.input_jitter, 1 + router.input_jitter
            jitter = jax.random.uniform(jitter_key, x.shape, jnp.float32, low, high)
            # A router in bfloat16 reads noisy inputs in bfloat16; the noise itself is finer.
            kept = x.dtype if router.precision == "input" else jnp.float32
            x = (x.astype(jnp.float32) * jitter).astype(kept)
        if jitter_key is not None and router.input_dropout:
            x = dropout(x, router.input_dropout, jax.random.fold_in(jitter_key, 1))
        state = {
            name: jnp.broadcast_to(value[...], (groups, *value[...].shape))
            for name, value in self.state.items()
        }
        if record is not None:
            state["experts"] = record
        keys = None if key is None else jax.random.split(key, groups)

        def one(logits: Array, valid: Array, token_ids, key, state) -> Plan:
            return router.plan_group(
                logits,
                capacity=capacity,
                valid=valid,
                token_ids=token_ids,
                rng=key,
                state=jax.lax.stop_gradient(state),
            )

        return over_groups(jax.vmap(one))(self.logits(x), valid, token_ids, keys, state)

    def sequence_losses(self, plan: Plan, valid: Array) -> dict[str, Array]:
        """Returns ``(B,)`` for each loss of sequences: the rows of the batch, whatever the groups.

        Args:
            plan: of all groups.
            valid: ``(B, L)`` bool.
        """
        if plan.evidence is None:
            return {}
        state = {name: value[...] for name, value in self.state.items()}

        def rows(x: Array) -> Array:
            return constrain(out_of_groups(x, valid.shape), "batch", "length")

        def one(evidence: Evidence, valid: Array) -> dict[str, Array]:
            return self.router.sequence_losses(evidence, valid, jax.lax.stop_gradient(state))

        return jax.vmap(one)(jax.tree.map(rows, plan.evidence), valid)

    def update(self, demand: Array) -> None:
        """Moves the state on by one optimizer step.

        Args:
            demand: ``(..., E)`` assignments asked for in the step, with the leading axes of scanned
                layers.
        """
        state = {name: value[...] for name, value in self.state.items()}
        for name, value in self.router.next_state(state, demand).items():
            self.state[name][...] = value


def _types(precision: str, given: jnp.dtype) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the type of the tokens that a router multiplies, and that of its logits."""
    wide = jnp.dtype(jnp.float32)
    kinds = {
        "float32": (wide, wide),
        "bfloat16_product": (jnp.dtype(jnp.bfloat16), wide),
        "input": (given, given),
    }
    return kinds[precision]
