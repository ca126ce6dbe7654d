"""The table of how tokens travel: what it refuses, what it suggests, and what its lines execute."""

import dataclasses
import itertools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.grouped import on_choices
from moe_jax.nn.attention_experts import AttentionExpertsConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import presets, route
from moe_jax.transport import TABLE, check, implementation
from moe_jax.transport.requirements import NO_DROPOUT
from tests.transport.example_transport import LINE

PAIRS = sorted({(row.transport, row.exchange) for row in TABLE})
NAMES = sorted(itertools.product(*map(set, zip(*PAIRS, strict=True))))
LAYERS = {
    "switch": {},
    "expert_choice": {"router": presets.expert_choice()},
    "soft_moe": {"router": presets.soft_moe()},
    "several widths": {"expert_dims": (4, 8)},
    "dropout": {"expert_dropout": 0.1},
    "mask": {"expert_mask": 0.1},
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """Settings that nobody has checked yet."""

    transport: str
    exchange: str
    router: object = presets.switch()
    expert_dims: tuple = ()
    expert_dropout: float = 0.0
    expert_mask: float = 0.0
    exchange_buffer: float | None = None


def refused(layer, *mesh):
    """Returns the line that refuses a layer, or nothing."""
    try:
        check(layer, "model.moe", *mesh)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", LAYERS)
def test_what_a_refusal_suggests_is_accepted(what):
    # On one device and on four, for networks and for projections of attention.
    lines = []
    for (transport, exchange), mesh in itertools.product(NAMES, [(1,), (4,), (1, False)]):
        layer = Layer(transport, exchange, **LAYERS[what])
        line = refused(layer, *mesh)
        if not line:
            assert (transport, exchange) in PAIRS
            continue
        lines.append(line)
        assert re.fullmatch(
            r"model\.moe\.\S+='.* requires .+, but .+=.+\. Change .+, or use .+\.", line
        )
        suggested = dict(re.findall(r"(\w+)='(\w+)'", line.rsplit("or use ", 1)[1]))
        assert suggested and not refused(dataclasses.replace(layer, **suggested), *mesh), line
    # Of 12 pairs 5 are no lines; a ring refuses projections, and sorted rows a mesh over experts.
    assert len(lines) >= 3 * 5 + 1 + 1


@pytest.mark.parametrize(
    ("changes", "mesh", "line"),
    [
        (
            {"transport": "ragged", "router": presets.expert_choice()},
            (),
            "model.moe.transport='ragged' requires tokens that choose their experts, but "
            "router.select=TopTokens. Change router.select, or use transport='gather'.",
        ),
        (
            {"transport": "ragged"},
            (2,),
            "model.moe.transport='ragged' requires all experts on each device, but mesh.expert=2. "
            "Change mesh.expert, or use exchange='ragged'.",
        ),
        (
            {"transport": "ragged", "exchange": "ragged", "router": presets.expert_choice()},
            (4,),
            "model.moe.transport='ragged' with exchange='ragged' requires tokens that choose their "
            "experts, but router.select=TopTokens. Change router.select, or use "
            "transport='gather' with exchange='ring'.",
        ),
        (
            {"transport": "auto", "exchange": "ring", "expert_dropout": 0.1},
            (4,),
            "model.moe.transport='gather' with exchange='ring' requires expert outputs without "
            "dropout, but expert_dropout=0.1. Change expert_dropout, or use exchange='gspmd'.",
        ),
        (
            {"transport": "gather", "exchange": "ring"},
            (1, False),
            "model.moe.transport='gather' with exchange='ring' requires expert outputs as wide as "
            "tokens, but experts=projections of attention. Change experts, or use "
            "exchange='gspmd'.",
        ),
        (
            {"exchange": "ring"},
            (),
            "model.moe.exchange='ring' requires transport='gather', but transport='einsum'. Change "
            "transport, or use exchange='gspmd'.",
        ),
        (
            {"transport": "gater"},
            (),
            "model.moe.exchange='gspmd' requires transport='ragged' or 'gather' or 'einsum', but "
            "transport='gater'. Change transport, or use transport='ragged'.",
        ),
        (
            {"exchange": "rng"},
            (),
            "model.moe.transport='einsum' requires exchange='gspmd' or 'all_to_all', but "
            "exchange='rng'. Change exchange, or use exchange='gspmd'.",
        ),
    ],
)
def test_a_refusal_names_the_requirement_and_the_setting(changes, mesh, line):
    assert refused(Layer(**{"transport": "einsum", "exchange": "gspmd", **changes}), *mesh) == line


DROPLESS = {"router": presets.mixtral()}


@pytest.mark.parametrize(
    ("changes", "shards", "selected"),
    [
        # Slots with a capacity: one gather, whatever the mesh.
        ({}, 1, ("gather", "gspmd")),
        ({}, 4, ("gather", "gspmd")),
        ({"router": presets.expert_choice()}, 4, ("gather", "gspmd")),
        # Slots for the worst case are mostly empty: only the choices are computed.
        (DROPLESS, 1, ("ragged", "gspmd")),
        (DROPLESS, 2, ("ragged", "ragged")),
        ({"router": presets.deepseek_v2(devices=1, keep_devices=1)}, 1, ("ragged", "gspmd")),
        # Sorted rows do not know slots, widths or masks.
        (DROPLESS | {"expert_dropout": 0.1}, 1, ("gather", "gspmd")),
        (DROPLESS | {"expert_dims": (4, 8)}, 4, ("gather", "gspmd")),
        # A slot of Soft MoE holds every token.
        ({"router": presets.soft_moe()}, 4, ("einsum", "gspmd")),
        # An exchange that is set stays.
        (DROPLESS | {"exchange": "ring"}, 4, ("gather", "ring")),
        (DROPLESS | {"exchange": "ragged"}, 4, ("ragged", "ragged")),
        ({"exchange": "all_to_all"}, 4, ("gather", "all_to_all")),
        ({"exchange": "all_to_all", "router": presets.soft_moe()}, 4, ("einsum", "all_to_all")),
    ],
)
def test_auto_selects_the_transport_that_computes_and_sends_least(changes, shards, selected):
    layer = Layer(**{"transport": "auto", "exchange": "gspmd", **changes})
    row = implementation(layer, shards)
    assert (row.transport, row.exchange) == selected
    assert not refused(layer, shards)
    assert row.reason or "exchange" in changes


def test_the_settings_accept_the_names_of_the_table():
    def names(owner, setting):
        return typing.get_args(typing.get_type_hints(owner)[setting])

    assert names(MoEConfig, "transport") == ("auto", "einsum", "gather", "ragged")
    assert names(MoEConfig, "exchange") == ("all_to_all", "gspmd", "ragged", "ring")
    # Projections of attention are wider or narrower than tokens, and a ring adds up tokens.
    assert names(AttentionExpertsConfig, "exchange") == ("all_to_all", "gspmd", "ragged")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tanh:
    """Experts ``tanh(x kernel)`` with ``kernel (E, M, N)``."""

    kernel: jax.Array

    def __call__(self, x):
        return jnp.tanh(jnp.einsum("etm,emn->etn", x, self.kernel))

    def before(self, linear, x):
        return linear(x, "kernel")

    def after(self, linear, pre, gate):
        return jnp.tanh(pre) if gate is None else jnp.tanh(pre) * gate

    def on_choices(self, tokens, gate, choices, gate_on="out"):
        network, parameters = Tanh(None), {"kernel": self.kernel}
        return on_choices(network, parameters, tokens, gate, choices, gate_on)


@pytest.mark.parametrize("gate_on", ["in", "out"])
def test_every_line_gives_a_token_the_weighted_outputs_of_its_experts(gate_on):
    # Three tokens of one group and two experts, the second twice as steep. Tokens 0 and 1 prefer
    # expert 0, whose only slot token 0 gets; token 2 prefers expert 1.
    kernel = jnp.stack([jnp.eye(4), 2 * jnp.eye(4)])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32)
    logits = jnp.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    plan = route(presets.switch(), logits, capacity=1, valid=jnp.ones((1, 3), bool))
    one, two = (np.exp(logit) / (1 + np.exp(logit)) for logit in (1, 2))
    expected = {
        "out": [one * np.tanh(x[0, 0]), np.zeros(4), two * np.tanh(2 * x[0, 2])],
        "in": [np.tanh(one * x[0, 0]), np.zeros(4), np.tanh(2 * two * x[0, 2])],
    }
    for row in (*TABLE, LINE):
        y = row.dispatch(Tanh(kernel), x, plan, gate_on=gate_on)
        np.testing.assert_allclose(y[0], expected[gate_on], rtol=1e-5, atol=1e-6, err_msg=str(row))


def test_outputs_by_slot_are_changed_or_refused():
    plan = route(presets.switch(), jnp.ones((1, 2, 2)), capacity=2, valid=jnp.ones((1, 2), bool))
    experts, x = Tanh(jnp.ones((2, 4, 4))), jnp.ones((1, 2, 4))
    for row in TABLE:
        if NO_DROPOUT in row.requires:
            with pytest.raises(ConfigError, match="requires expert outputs without dropout"):
                row.dispatch(experts, x, plan, on_outputs=jnp.zeros_like)
        else:
            assert not row.dispatch(experts, x, plan, on_outputs=jnp.zeros_like).any()
