import dataclasses

import pytest
from moe_jax.configs.published import glam_64b_64e

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.counting import count
from moe_jax.planning import roofline
from moe_jax.planning.roofline import Roofline


def with_moe(experiment, **changes):
    moe = dataclasses.replace(experiment.model.moe, **changes)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, moe=moe))


def with_remat(experiment, remat):
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=remat))


def test_model_flops_are_those_of_the_count(tiny):
    cost = count(tiny.model, tiny.vocab_size, tiny.sequence)
    assert roofline.work(tiny).model == cost.training_flops_per_token * tiny.tokens_per_step


def test_slots_that_capacity_adds_are_computed_and_not_of_the_model(tiny):
    def experts(convention):
        cost = count(tiny.model, tiny.vocab_size, tiny.sequence, convention)
        return cost.flops_by_part["experts"]

    # A capacity factor of 1.25 over groups of 32 and 8 experts: 5 slots where 4 suffice.
    assert experts("computed") == pytest.approx(1.25 * experts("exact"))
    assert experts("full") == experts("exact")
    assert roofline.work(tiny).slots > 0


def test_the_einsum_transport_costs_products_and_gather_does_not(tiny):
    assert roofline.work(tiny).transport == 0
    slots, width, passes, layers = 8 * 5, 32, 4, 2  # rematerialised
    expected = passes * layers * 4 * slots * width * tiny.tokens_per_step
    assert roofline.work(with_moe(tiny, transport="einsum")).transport == expected


def test_rematerialisation_is_counted_apart():
    glam = build(Experiment, glam_64b_64e.get_config())
    done = {remat: roofline.work(with_remat(glam, remat)) for remat in ("none", "full", "dots")}
    some = roofline.work(with_remat(glam, "dots_no_batch"))
    assert done["none"].recomputed == done["dots"].recomputed == 0
    assert 0 < some.recomputed < done["full"].recomputed
    assert len({one.model for one in (*done.values(), some)}) == 1
    # The forward pass again, but for the head: a third of forward and backward.
    assert done["full"].recomputed / done["full"].hardware == pytest.approx(0.25, abs=0.01)


def test_the_rule_of_overlap():
    found = Roofline(compute=3, memory=2, beside=1, in_the_way=0.5, tokens=7, mfu=0)
    assert found.step == 3.5
    assert found.tokens_per_second == 2
    assert found.bound == "compute"
    slow = dataclasses.replace(found, beside=4)
    assert slow.step == 4.5
    assert "gradients" in slow.bound
