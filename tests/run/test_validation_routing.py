"""The routing of validation text whose languages are known."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from moe_jax.configs import common

from moe_jax import data
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.data import open_source, open_tokenizer
from moe_jax.parallel import MeshConfig
from moe_jax.run.session import open_session
from moe_jax.run.validation_routing import (
    RoutedLayer,
    ValidationRouting,
    against_truth,
    expert_tokens,
)
from tests.system import tiny


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def experiment(router=None, **moe):
    config = tiny.get_config()
    config.data.update(source="mixture", packing=True)
    config.data.mixture.update(
        num_languages=3, num_symbols=8, num_documents=16, num_eval_documents=12, document_length=20
    )
    config.model.moe.update(**moe)
    config.model.moe.router = router or config.model.moe.router
    made = build(Experiment, config)
    return dataclasses.replace(made, mesh=MeshConfig(data=8))


def read(experiment):
    session = open_session(experiment, open_tokenizer(experiment.data))
    _, state = session.recipe.create()
    with jax.set_mesh(session.mesh):
        routing = ValidationRouting(session, state)
        return list(routing), against_truth(routing), expert_tokens(routing)


@pytest.fixture(scope="module")
def found():
    # A hash of the token, so that what each expert takes is known.
    made = experiment(common.router("hash", kind="modulo", vocab_size=data.Bytes.vocab_size))
    return made, *read(made)


def test_each_token_has_the_domain_of_its_document_though_rows_are_packed(found):
    made, batches, _, _ = found
    source = open_source(made.data, "eval")
    domains = np.concatenate([layers[0].domains for layers in batches])
    expected = np.repeat([source.domain(index) for index in range(len(source))], 21)
    np.testing.assert_array_equal(domains, expected)


def test_counts_are_of_experts_and_domains(found):
    made, batches, truth, tokens = found
    (layer,) = truth["specialisation"]["layers"]
    taken = np.concatenate([layers[0].tokens for layers in batches]) % 4
    domains = np.concatenate([layers[0].domains for layers in batches])
    expected = np.zeros((4, 3), int)
    np.add.at(expected, (taken, domains), 1)
    assert layer["counts"] == expected.tolist()
    assert layer["layer"] == made.moe_layers[0]
    assert truth["specialisation"]["domains"] == 3
    # A hash of the token cannot tell more than the token.
    assert 0 < layer["mutual_information"] < truth["specialisation"]["token_information"]
    assert [found["layer"] for found in tokens["layers"]] == [layer["layer"]]


def test_the_best_possible_loss_is_per_target(found):
    made, _, truth, _ = found
    mixture, source = data.make_mixture(made.data.mixture), open_source(made.data, "eval")
    nats = sum(mixture.bayes_nll(source[index]) for index in range(12))
    assert truth["best_possible_loss"] == pytest.approx(nats / (12 * 21))


def test_a_dense_model_has_a_best_possible_loss_alone():
    _, truth, tokens = read(experiment(every=0))
    assert truth.keys() == {"best_possible_loss"}
    assert tokens == {"layers": []}


def test_other_text_has_no_known_truth(found):
    made = found[0]
    other = dataclasses.replace(made, data=dataclasses.replace(made.data, source="files:x"))
    session = dataclasses.make_dataclass("Session", ["experiment"])(other)
    assert against_truth(ValidationRouting(session, None)) == {}


def test_layers_with_fewer_experts_have_rows_of_their_own():
    layers = [
        types.SimpleNamespace(name=name, moe=types.SimpleNamespace(num_experts=count))
        for name, count in (("encoder 1", 1), ("decoder 1", 2))
    ]
    model = types.SimpleNamespace(sparse_layers=lambda: layers)
    session = types.SimpleNamespace(
        experiment=types.SimpleNamespace(model=model), tokenizer=data.Bytes()
    )
    tokens = np.array([5, 6])
    one, two = np.ones((2, 1), bool), np.array([[True, False], [False, True]])
    batch = [RoutedLayer(tokens, experts, None) for experts in (one, two)]

    class Routing(list):
        """A list of batches with a session."""

    routing = Routing([batch])
    routing.session = session
    found = expert_tokens(routing)["layers"]
    counts = [[len(expert) for expert in layer["experts"]] for layer in found]
    assert counts == [[2], [1, 1]]
