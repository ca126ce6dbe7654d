"""Tables of experts by token id, against counts by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.analysis.observed import Observed, ObservedLayer, observe
from moe_jax.analysis.routing_table import RoutingTable, agreement, install, table_of
from moe_jax.analysis.texts import Text
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing.free import FreeExperts

# Id 1 comes three times, id 2 twice, id 0 once. Each token chooses two of three experts.
IDS = np.array([1, 1, 1, 2, 2, 0])
CHOICES = np.array([[0, 1], [0, 2], [0, 2], [1, 2], [1, -3], [0, 1]])
GATES = np.array([[0.6, 0.4], [0.8, 0.2], [0.7, 0.3], [0.5, 0.5], [0.9, 0.0], [1.0, 0.0]])


def observed(ids=IDS, choices=CHOICES, gates=GATES):
    zeros = np.zeros(len(ids))
    return Observed(ids, zeros, zeros, zeros, (ObservedLayer("layer 0", 3, choices, gates),))


def test_the_most_frequent_experts_have_their_mean_gates():
    ((experts, gates),) = table_of(observed(), 4, least=2).layers
    # Id 1 chose expert 0 three times and expert 2 twice; id 2 chose 1 and 2, of which the second
    # was dropped once. Ids 0 and 3 are too rare.
    assert experts.tolist() == [[-1, -1], [0, 2], [1, 2], [-1, -1]]
    # Means of id 1 are 0.7 and 0.25, and the gates of a token sum to 1.
    np.testing.assert_allclose(gates[1], [0.7 / 0.95, 0.25 / 0.95], rtol=1e-6)
    # Means of id 2 are 0.7 and 0.5 without the dropped choice; the sums 1.0 and 0.9 have mean 0.95.
    np.testing.assert_allclose(gates[2], [0.7 / 1.2 * 0.95, 0.5 / 1.2 * 0.95], rtol=1e-6)


def test_an_expert_that_an_id_never_chose_has_no_weight():
    once = observed(np.array([1]), np.array([[2, 2]]), np.array([[1.0, 0.0]]))
    ((experts, gates),) = table_of(once, 2, least=1).layers
    assert experts[1].tolist() == [2, 0] and gates[1].tolist() == [1, 0]


def test_agreement_is_of_the_choices_of_covered_tokens():
    table = table_of(observed(), 4, least=2)
    # Of the five covered tokens with two choices each, the first chose expert 1, which is missing.
    assert agreement(observed(), table) == [pytest.approx(9 / 10)]
    nothing = dataclasses.replace(table, layers=((np.full((4, 2), -1), np.zeros((4, 2))),))
    assert agreement(observed(), nothing) == [None]


def test_a_file_keeps_the_table(tmp_path):
    table = table_of(observed(), 4, least=2)
    table.save(tmp_path / "table.npz")
    found = RoutingTable.load(tmp_path / "table.npz")
    for ours, theirs in zip(found.layers, table.layers, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(x, y)
    assert found.known.tolist() == [False, True, True, False]
    whole = (tmp_path / "table.npz").read_bytes()
    for name, content in {"text": b"no table", "empty": b"", "cut": whole[:200]}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.save(tmp_path / "array.npz.npy", np.zeros(3))
    for name in ("text.npz", "empty.npz", "cut.npz", "array.npz.npy"):
        with pytest.raises(ConfigError, match="moe-jax tabulate"):
            RoutingTable.load(tmp_path / name)


# The router of Zaya reads values of the router before; its free expert is left out.
ROUTERS = {
    "mixtral": routing.preset("mixtral"),
    "carried": dataclasses.replace(routing.preset("zaya", dim=4), free=FreeExperts()),
}


@pytest.mark.parametrize("router", ROUTERS)
def test_a_model_reads_its_table_in_scanned_layers(router):
    preset = ROUTERS[router]
    moe = MoEConfig(every=1, num_experts=4, expert_dim=4, router=preset, latent_dim=4)
    config = DecoderConfig(num_layers=2, width=8, num_heads=2, head_dim=4, mlp_dim=8, moe=moe)
    model = Decoder(config, 5, jax.random.key(0))
    k = preset.select.choices(4)
    rng = np.random.default_rng(1)
    layers = tuple(
        (np.stack([rng.permutation(4)[:k] for _ in range(5)]), np.full((5, k), 1.0 / k, np.float32))
        for _ in range(2)
    )
    for experts, gates in layers:
        experts[3], gates[3] = -1, 0
    rows = [Text([0, 1, 2, 3, 4, 3, 2])]
    (before,) = observe(model, rows, 1)
    install(model, RoutingTable(layers))
    (after,) = observe(model, rows, 1)
    for (experts, _), found in zip(layers, after.layers, strict=True):
        known = after.tokens != 3
        np.testing.assert_array_equal(found.wanted[known], experts[after.tokens[known]])
        np.testing.assert_allclose(found.gates[known], 1.0 / k)
    # The first layer routes id 3 as before, since it reads the same tokens at position 3 or later.
    first = np.flatnonzero(after.tokens == 3)
    assert after.layers[0].wanted[first].tolist() == before.layers[0].wanted[first].tolist()


def test_a_table_of_another_model_is_refused():
    config = DecoderConfig(num_layers=2, width=8, num_heads=2, head_dim=4, mlp_dim=8)
    model = jax.eval_shape(lambda: Decoder(config, 4, jax.random.key(0)))
    with pytest.raises(ConfigError, match="write a table of this model"):
        install(model, table_of(observed(), 4, least=2))
