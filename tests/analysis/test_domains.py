import math

import numpy as np
import pytest

from moe_jax.analysis.domains import DomainTable


def _table(domains, experts, num_experts=2, num_domains=2):
    table = DomainTable(1, num_experts, num_domains, 4)
    table.add(0, np.array(domains), np.eye(num_experts)[experts])
    return table


def test_an_expert_for_each_domain():
    found = _table([0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1]).layer(0, 2)
    assert found["counts"] == [[0, 3], [3, 0]]
    assert found["mutual_information"] == pytest.approx(math.log(2))
    assert found["share_of_domain"] == pytest.approx(1.0)
    assert found["purity"] == 1.0


def test_experts_that_know_nothing():
    found = _table([0, 1, 0, 1], [0, 0, 1, 1]).layer(0, 2)
    assert found["mutual_information"] == pytest.approx(0.0, abs=1e-12)
    assert found["purity"] == 0.5


def test_one_domain_tells_nothing():
    found = _table([0, 0], [0, 1], num_domains=1).layer(0, 2)
    assert (found["mutual_information"], found["share_of_domain"]) == (0.0, 0.0)


def test_a_token_counts_for_each_expert_and_batches_add_up():
    table = DomainTable(2, 3, 2, 4)
    for _ in range(2):
        table.add(1, np.array([0, 1]), np.array([[True, True], [False, False]]))
    assert table.layer(0, 3)["counts"] == [[0, 0], [0, 0], [0, 0]]
    assert table.layer(1, 2)["counts"] == [[2, 0], [2, 0]]


def test_what_the_token_tells():
    table = DomainTable(1, 2, 2, 4)
    table.add_tokens(np.array([0, 0, 3, 3]), np.array([0, 0, 1, 1]))
    assert table.token_information == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("domains", "experts"),
    [
        (np.zeros(3, int), np.ones((2, 2))),
        (np.zeros(2, int), np.ones((2, 3))),
        (np.zeros((2, 2), int), np.ones((2, 2))),
        (np.array([0, 2]), np.ones((2, 2))),
        (np.array([0, -1]), np.ones((2, 2))),
    ],
)
def test_refuses_what_does_not_fit(domains, experts):
    with pytest.raises(ValueError, match="domains"):
        DomainTable(1, 2, 2, 4).add(0, domains, experts)
