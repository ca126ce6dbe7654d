"""Routes every preset once with all annotations of ``moe_jax.routing`` checked.

The annotations are checked where functions are called and dataclasses are created, which includes
tracing, so nothing is compiled. The import hook works on modules that are not imported yet:
``test_shapes.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import inspect
import sys
import typing

import jax
import jax.numpy as jnp
import jaxtyping

with jaxtyping.install_import_hook("moe_jax.routing", "beartype.beartype"):
    from moe_jax import routing

# The groups and devices of all presets divide 16 experts.
G, S, E, M = 2, 6, 16, 8
VARIANTS = {
    "expert_choice": {"over": "tokens", "z_weight": 1e-3},
    "fairseq_top2": {"fp32_gating": False, "second": "random", "pad_mask": True},
    "forced": {"k": 2, "scored_by": "sigmoid"},
    "hash": {"kind": "balanced", "vocab_size": S},
    "switch": {"sample": True},
    "switch_mtf": {"priority": "score"},
    "top2_mtf": {"second": "threshold", "second_balance_weight": 1e-2},
    "xmoe": {"unit_tokens": True},
}


def logits_of(router: routing.Router, *leading: int) -> jax.Array:
    """Returns the logits ``(..., E)`` or ``(..., E, P)`` of tokens of zeros."""
    scored = E + router.free.count
    described = router.head.parameters(M, scored, router.planes)
    parameters = {name: jnp.zeros(each.shape) for name, each in described.items()}
    carried = jnp.zeros((*leading, router.carried_width(E)))
    return router.head.read(jnp.zeros((*leading, M)), parameters, scored, carried)[0]


def route_one_group(router: routing.Router, key: jax.Array | None) -> jax.Array:
    """Returns a value that depends on the whole plan of one group."""
    shapes = router.state_shapes(E)
    state = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    choices = router.select.choices(E)
    record = {} if key is None else {"experts": jnp.zeros((S, choices), jnp.int32)}
    plan = router.plan_group(
        logits_of(router, S),
        capacity=router.slots(S, E, train=key is not None),
        valid=jnp.arange(S) < S - 1,
        token_ids=jnp.arange(S),
        rng=key,
        state=state | record,
    )
    if plan.evidence is not None:
        router.sequence_losses(plan.evidence, jnp.ones(S, bool), state)
    router.next_state(state, plan.counts.demand, plan.counts.observed)
    unit = [plan.slots.with_unit_weights()] if isinstance(plan.slots, routing.Slots) else []
    return plan.dispatch.sum() + plan.combine.sum() + plan.counts.dropped + len(unit)


def route_groups(router: routing.Router, key: jax.Array) -> jax.Array:
    """Returns a value that depends on the plans of all groups."""
    logits, valid = logits_of(router, G, S), jnp.ones((G, S), bool)
    state = {name: jnp.zeros(shape) for name, shape in router.state_shapes(E).items()}
    capacity = router.slots(S, E, train=True)
    plan = routing.route(router, logits, capacity=capacity, valid=valid, rng=key, state=state)
    return plan.dispatch.sum()


def rejects_an_untrue_shape(router: routing.Router) -> bool:
    """Returns True if a mask of another length than the tokens is rejected, as a self-test."""
    try:
        router(jnp.zeros((S, E)), capacity=1, valid=jnp.ones(S + 1, bool))
    except jaxtyping.TypeCheckError:
        return True
    return False


def evaluate_annotations() -> int:
    """Returns the number of functions and classes whose annotations are names that exist.

    Beartype accepts every value for an annotation that it cannot evaluate.
    """
    count = 0
    modules = [name for name in sys.modules if name.startswith("moe_jax.routing.")]
    for module in modules:
        members = [each for each in vars(sys.modules[module]).values() if callable(each)]
        local = [each for each in members if getattr(each, "__module__", "") == module]
        methods = [each for part in local for each in vars(part).values() if callable(each)]
        for each in (*local, *filter(inspect.isfunction, methods)):
            typing.get_type_hints(each)
            count += 1
    return count


def main() -> None:
    """Raises ``jaxtyping.TypeCheckError`` if an annotation is untrue."""
    key = jax.random.key(0)
    names = [function.__name__ for function in routing.PRESETS]
    routers = [routing.preset(name) for name in names]
    routers += [routing.preset(name, **choices) for name, choices in VARIANTS.items()]
    routers += [routing.Router(routing.Softmax(), routing.TopK(1), (routing.LoadBalance(ema=0.5),))]
    for router in routers:
        for rng in (key, None):
            jax.eval_shape(lambda router=router, rng=rng: route_one_group(router, rng))
    jax.eval_shape(lambda: routing.preset("switch")(jnp.zeros((G, S, E))).dispatch)
    jax.eval_shape(lambda: routing.preset("noisy_top_k")(jnp.zeros((S, E)), rng=key).dispatch)
    of_groups = ("switch", "deepseek_v3", "expert_choice", "soft_moe")
    for router in map(routing.preset, of_groups):
        jax.eval_shape(lambda router=router: route_groups(router, key))
    assert rejects_an_untrue_shape(routing.preset("switch")), "the hook checks nothing"
    count = evaluate_annotations()
    assert count > 100, count
    print(f"{len(routers)} routers and {count} functions and classes have true annotations")


if __name__ == "__main__":
    main()
