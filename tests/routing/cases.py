"""Every preset at a size for tests, the properties all have, and which of them a preset lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.routing import Capacity, Forced, Plan, Router
from moe_jax.transport import Einsum, Gather, Transport
from tests.routing.helpers import S, drawn_valid, jitted, jitted_groups

Array = np.ndarray
TIGHT = 2
KEY = jax.random.key(1)
TRANSPORTS: dict[str, Transport] = {"einsum": Einsum(), "gather": Gather()}

# Eight tokens and four experts unless experts come in groups; fewer experts per token than experts,
# so that there is something to choose. Published sizes are in test_presets.py.
SMALL: dict[str, dict] = {
    "noisy_top_k": {"k": 2},
    "fairseq_top1": {"pad_mask": True},
    "fairseq_top2": {"pad_mask": True},
    "hash": {"vocab_size": 64},
    "soft_moe": {"slots_per_expert": TIGHT},
    "dbrx": {"k": 2},
    "olmoe": {"k": 2},
    "qwen2_moe": {"k": 2},
    "qwen3_moe": {"k": 2},
    "gpt_oss": {"k": 2},
    "deepseek_moe": {"k": 2, "device_weight": 0.05, "devices": 4},
    "deepseek_v2": {"k": 2, "devices": 4, "keep_devices": 2},
    "deepseek_v3": {"k": 2, "groups": 4, "keep_groups": 2},
    "loss_free": {"k": 2},
    "glm4_moe": {"k": 2},
    "kimi_k2": {"k": 2},
    "minimax_m2": {"k": 2},
    "ernie4_5_moe": {"k": 2},
    "deepseek_v4": {"k": 2},
    "deepseek_v4_hash": {"k": 2},
    "moe_plus_plus": {"constant": 0, "zero": 1},
    "longcat_flash": {"k": 2, "copy": 2},
    "gemma4": {"k": 2},
    "zaya": {"dim": 4, "offset": -0.125},
    "phimoe": {"jitter": 1.0},
    "token_rounding": {"k": 2, "tile": 2, "rounding": "up"},
    "quantile_balancing": {"k": 2},
    "pi_balancing": {"k": 2},
    "random": {"k": 2},
    "forced": {"k": 2},
}
# Neighbours that may not be torn apart by a permutation, in each of four groups.
GROUPED = {"hierarchical": 2, "deepseek_moe": 2, "deepseek_v2": 2, "deepseek_v3": 2}

# The same presets with one expert, where they allow it.
ONE_EXPERT: dict[str, dict] = {
    "noisy_top_k": {"k": 1},
    "hierarchical": {"groups": 1, "k_groups": 1, "k": 1},
    "no_token_left_behind": {"k": 1},
    "vmoe": {"k": 1},
    "fairseq_top1": {"pad_mask": True},
    "expert_choice_capped": {"experts_per_token": 1},
    "mixtral": {"k": 1},
    "dbrx": {"k": 1},
    "olmoe": {"k": 1},
    "qwen2_moe": {"k": 1},
    "qwen3_moe": {"k": 1},
    "gpt_oss": {"k": 1},
    "deepseek_moe": {"k": 1},
    "deepseek_v2": {"k": 1, "devices": 1, "keep_devices": 1, "scale": 1.0},
    "deepseek_v3": {"k": 1, "groups": 1, "keep_groups": 1, "scale": 1.0},
    "loss_free": {"k": 1},
    "glm4_moe": {"k": 1},
    "kimi_k2": {"k": 1, "scale": 1.0},
    "minimax_m2": {"k": 1},
    "ernie4_5_moe": {"k": 1},
    "cohere2_moe": {"k": 1},
    "deepseek_v4": {"k": 1, "scale": 1.0},
    "deepseek_v4_hash": {"k": 1, "scale": 1.0},
    "moe_plus_plus": {"k": 1, "constant": 0, "copy": 0, "zero": 0},
    "longcat_flash": {"k": 1, "copy": 0, "scale": 1.0},
    "zaya": {"zero": 0},
    "phimoe": {"k": 1},
    "token_rounding": {"k": 1, "tile": 1},
    "quantile_balancing": {"k": 1},
    "pi_balancing": {"k": 1},
    "expert_threshold": {"k": 1},
}

TWO_EXPERTS = ("gshard", "glam", "top2_mtf", "st_moe", "fairseq_top2", "xmoe")
NO_BALANCE = (
    "jacobs_1991",
    "base",
    "sinkhorn",
    "hash",
    "expert_choice",
    "expert_choice_capped",
    "soft_moe",
    "loss_free",
    "deepseek_v4_hash",
    "longcat_flash",
    "zaya",
    "quantile_balancing",
    "pi_balancing",
    "expert_threshold",
    "random",
    "forced",
)
EXPERTS_CHOOSE = ("expert_choice", "expert_choice_capped", "expert_choice_mtf")
ANY = ""  # an exception that holds for both transports, or where there is none

# The one table of what does not hold, by (property, preset, transport), with the reason.
EXCEPTIONS: dict[tuple[str, str, str], str] = {
    **{
        ("permuting_experts_permutes_the_plan", name, ANY): reason
        for name, reason in {
            "hash": "the expert is a function of the token id, whatever its logits",
            "deepseek_v4_hash": "the experts are a function of the token id",
            "random": "experts are dealt by position, whatever the logits",
        }.items()
    },
    **{
        ("a_gate_has_gradient_from_its_own_token_alone", name, ANY): reason
        for name, reason in {
            "hash": "the gate is 1",
            "random": "the gate is 1 / k",
            "expert_choice_mtf": "its softmax is over tokens, and refused in causal models",
            "soft_moe": "its slots are mixtures of tokens, and refused in causal models",
        }.items()
    },
    **{
        ("full_capacity_is_dropless", name, ANY): reason
        for name, reason in {
            "soft_moe": "slots are mixtures: their number is fixed and no capacity is asked for",
            "remoe": "a token without a positive score is unrouted",
            "expert_threshold": "a token below all thresholds is unrouted",
        }.items()
    },
    (
        "gradients_equal_finite_differences",
        "phimoe",
        ANY,
    ): "the gradient is an estimate through the draws; by hand in test_select_sparse_mixer.py",
    **{
        ("well_formed", "soft_moe", ANY): "a slot holds a mixture of all tokens; see test_router.py"
    },
    **{
        ("balance_is_even_at_uniform_routing", name, ANY): "has no balance loss"
        for name in NO_BALANCE
    },
    (
        "balance_is_even_at_uniform_routing",
        "moe_plus_plus",
        ANY,
    ): "free experts count less; by hand in test_free.py",
    (
        "balance_is_even_at_uniform_routing",
        "remoe",
        ANY,
    ): "the loss falls with the scores; by hand in test_balance_sparsity.py",
    **{
        ("a_sequence_is_routed_alone_as_in_a_batch", name, ANY): "experts rank tokens of the group"
        for name in (*EXPERTS_CHOOSE, "soft_moe")
    },
    **{
        ("task_teaches_the_router", name, ANY): "learns nothing: gates are constant"
        for name in ("hash", "random")
    },
    **{
        ("one_expert_is_dense", name, transport): reason
        for transport in TRANSPORTS
        for name, reason in {
            **dict.fromkeys(TWO_EXPERTS, "needs a second expert"),
            "expert_choice_mtf": "softmax over tokens: the gate is a token's share of the expert",
            "remoe": "the gate is the logit",
            "gemma4": "the gate is the scale of the expert, which is a logit of the test",
            "soft_moe": "the only slots are mixtures of all tokens",
        }.items()
    },
    **{
        (
            "an_expert_without_tokens_gets_no_gradient",
            name,
            transport,
        ): "every expert takes every token"
        for transport in TRANSPORTS
        for name in (*EXPERTS_CHOOSE, "jacobs_1991", "soft_moe")
    },
    **{
        (name, "soft_moe", "gather"): "no slot table: refused, see test_transports.py"
        for name in (
            "gather_equals_einsum",
            "output_is_the_weighted_sum_of_experts",
            "padding_is_nowhere",
            "one_expert_is_dense",
            "an_expert_without_tokens_gets_no_gradient",
        )
    },
}


@dataclasses.dataclass(frozen=True)
class Group:
    """What a router is given: the routed tokens, and state where a part has some."""

    logits: Array
    valid: Array
    ids: Array
    bias: Array

    def of_tokens(self, order: Array) -> Group:
        return Group(self.logits[order], self.valid[order], self.ids[order], self.bias)

    def of_experts(self, order: Array) -> Group:
        # Free experts stay the last.
        order = np.concatenate([order, np.arange(len(order), self.logits.shape[1])])
        return Group(self.logits[:, order], self.valid, self.ids, self.bias[order])


@dataclasses.dataclass(frozen=True)
class Case:
    """A router under test.

    Attributes:
        name: of its preset.
        router: the router.
        experts: ``E``.
        inside: neighbouring experts that stay together under permutations.
    """

    name: str
    router: Router
    experts: int = 4
    inside: int = 1

    @property
    def scored(self) -> int:
        """Returns the number of experts that have a score, free ones included."""
        return self.experts + self.router.free.count

    def group(self, seed: int, valid: Array | None = None) -> Group:
        """Returns a generic group."""
        draw = np.random.default_rng(seed)
        shape = (S, self.scored, self.router.planes)
        logits = draw.normal(size=shape).astype(np.float32)
        valid = np.ones(S, bool) if valid is None else valid
        return self.of(logits, valid, draw.integers(0, 64, S))

    def of(self, logits: Array, valid: Array | None = None, ids: Array | None = None) -> Group:
        """Returns a group with logits ``(S, E)``, equal in all planes, or ``(S, E, P)``."""
        if logits.ndim == 2:
            logits = np.repeat(logits[..., None], self.router.planes, -1)
        valid = np.ones(S, bool) if valid is None else valid
        ids = np.arange(S) if ids is None else ids
        logits = logits.astype(np.float32)
        return Group(logits, valid, ids.astype(np.int32), np.zeros(self.scored, np.float32))

    @property
    def drawn(self) -> st.SearchStrategy[Group]:
        """Groups with well separated logits."""
        shape = (S, self.scored, self.router.planes)
        noise = np.random.default_rng(0).uniform(-0.02, 0.02, shape)

        def build(seed: int, spread: float, valid: Array, biased: bool) -> Group:
            draw = np.random.default_rng(seed)
            logits = draw.integers(-16 * 3, 16 * 3 + 1, shape) / 16 * spread + noise
            bias = draw.integers(-8, 9, self.scored) / 16 if biased else np.zeros(self.scored)
            ids = draw.integers(0, 64, S).astype(np.int32)
            return Group(logits.astype(np.float32), valid, ids, bias.astype(np.float32))

        # Spread 0 leaves the noise alone: almost uniform scores.
        return st.builds(
            build,
            st.integers(0, 2**31),
            st.sampled_from([1.0, 0.25, 0.0]),
            drawn_valid,
            st.booleans(),
        )

    @property
    def drawn_experts(self) -> st.SearchStrategy[Array]:
        """Permutations of the experts that keep groups of neighbours together."""

        def build(order: list[int], turn: list[int]) -> Array:
            return np.array([g * self.inside + w for g in order for w in turn])

        groups = self.experts // self.inside
        return st.builds(build, st.permutations(range(groups)), st.permutations(range(self.inside)))

    def state(self, group: Group) -> dict[str, Array]:
        """Returns what the router carries, and for a forced one its best experts."""
        shapes = self.router.state_shapes(self.experts)
        state = {
            name: group.bias if shape == group.bias.shape else np.zeros(shape, np.float32)
            for name, shape in shapes.items()
        }
        if isinstance(self.router.select, Forced):
            state["experts"] = recorded(group.logits, self.router.select.k)
        return state

    def plan(self, group: Group, capacity: int = TIGHT, key: Array | None = None) -> Plan:
        """Returns the plan of one group."""
        run = jitted(self.router, capacity)
        return run(self.shaped(group.logits), group.valid, key, group.ids, self.state(group))

    def plans(self, groups: list[Group], capacity: int = TIGHT, key: Array | None = None) -> Plan:
        """Returns the plan of several groups with one state."""
        logits, valid, ids = (
            np.stack([getattr(group, name) for group in groups])
            for name in ("logits", "valid", "ids")
        )
        states = [self.state(group) for group in groups]
        record = [state.pop("experts", None) for state in states]
        record = None if record[0] is None else np.stack(record)
        run = jitted_groups(self.router, capacity)
        return run(self.shaped(logits), valid, key, ids, states[0], record)

    @property
    def executed(self) -> Case:
        """The case without what does not act on a plan of given capacity, but for its losses.

        Presets that plan alike then share what is compiled to execute their plans.
        """
        rule, router = self.router.capacity, self.router
        kept = Capacity(
            rule.factor if rule.devices else 1.0,
            dropless=rule.dropless if rule.devices else "never",
            priority=rule.priority,
            reroute=rule.reroute,
            devices=rule.devices,
            renormalize=rule.renormalize,
        )
        masked = router.mask_padding
        plain = Router(
            router.score, router.select, capacity=kept, mask_padding=masked, free=router.free
        )
        return Case("", plain, self.experts, self.inside)

    def shaped(self, logits: Array) -> Array:
        """Returns logits without a lone plane."""
        return logits[..., 0] if self.router.planes == 1 else logits


def recorded(logits: Array, k: int) -> Array:
    """Returns ``(..., S, K)``: the best experts of the first plane, as a record."""
    return jax.lax.top_k(jax.lax.stop_gradient(jnp.asarray(logits)[..., 0]), k)[1].astype(jnp.int32)


def case(name: str) -> Case:
    """Returns a preset at a small size."""
    inside = GROUPED.get(name, 1)
    router = routing.preset(name, **SMALL.get(name, {}))
    return Case(name, router, 4 * inside, inside)


def case_with_one_expert(name: str) -> Case:
    """Returns a preset with a single expert."""
    return Case(name, routing.preset(name, **ONE_EXPERT.get(name, {})), 1)


def names() -> list[str]:
    """Returns the names of all presets."""
    return [function.__name__ for function in routing.PRESETS]


Check = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Property:
    """A check of a preset by name, and the transports it runs on."""

    check: Check
    transports: tuple[str, ...]


def registered(table: dict[str, Property], *transports: str) -> Callable[[Check], Check]:
    """Enters a check under its own name, without transports as ``ANY``."""

    def enter(check: Check) -> Check:
        table[check.__name__] = Property(check, transports or (ANY,))
        return check

    return enter


def runs(table: dict[str, Property]) -> Iterator[tuple[str, str, str]]:
    """Yields every (property, preset, transport) that is no declared exception."""
    for title, entry in table.items():
        for name in names():
            for transport in entry.transports:
                if (title, name, transport) not in EXCEPTIONS:
                    yield title, name, transport
