"""Settings that may differ between a run and its evaluation."""

import dataclasses

import pytest

from moe_jax import data
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.run.evaluation import changed, check_same_weights
from tests.system import tiny

RUN = experiment_of(tiny.get_config())
TOKENIZER = data.open_tokenizer(RUN.data)


def capacity(experiment):
    return experiment.model.moe.router.capacity


def test_a_capacity_factor_is_that_of_every_router():
    router = {"preset": "gshard"}
    one = experiment_of(RUN, {"model.moe.overrides": ({"layers": (1,), "router": router},)})
    other = changed(one, {}, 3.5)
    assert capacity(other).eval_factor == 3.5
    assert other.model.moe.at(1).router.capacity.eval_factor == 3.5
    assert capacity(other).factor == capacity(one).factor
    check_same_weights(one, other, TOKENIZER.vocab_size)


def test_a_capacity_of_the_evaluation_replaces_its_other_rules():
    rules = {"dropless": "eval", "eval_fraction": 0.5}
    one = experiment_of(RUN, {f"model.moe.router.capacity.{k}": v for k, v in rules.items()})
    other = capacity(changed(one, {}, 2.0))
    assert (other.eval_factor, other.dropless, other.eval_fraction) == (2.0, "never", 0.0)


def test_other_data_and_another_group_keep_the_weights():
    other = changed(RUN, {"data.source": "mixture", "model.moe.group_size": 64})
    assert (other.data.source, other.model.moe.group_size) == ("mixture", 64)
    check_same_weights(RUN, other, TOKENIZER.vocab_size)


def test_another_source_is_evaluated_whatever_the_validation_of_the_run_reads():
    apart = experiment_of(RUN, {"data.eval_source": "mixture"})
    other = changed(apart, {"data.source": "python_library"})
    assert (other.data.source, other.data.eval_source) == ("python_library", "")
    kept = changed(apart, {"data.source": "mixture", "data.eval_source": "python_library"})
    assert kept.data.eval_source == "python_library"
    assert changed(apart, {"model.moe.group_size": 64}).data.eval_source == "mixture"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.width": 32}, "embedding/table is (259, 16) in the run, (259, 32) here"),
        ({"model.num_layers": 4}, "in the run"),
    ],
)
def test_other_parameters_are_refused(settings, said):
    with pytest.raises(ConfigError) as error:
        check_same_weights(RUN, changed(RUN, settings), TOKENIZER.vocab_size)
    assert said in str(error.value) and "leave out those of model.*" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer.learning_rate": 1.0}, "optimizer.learning_rate has no effect"),
        ({"training.steps": 1}, "training.steps has no effect"),
        ({"data.tokenizer": "bytes"}, "data.tokenizer belongs to the weights"),
        ({"data.sorce": "x"}, "did you mean 'source'"),
    ],
)
def test_a_setting_that_cannot_change_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        changed(RUN, settings)


def test_a_dense_model_has_no_capacity():
    model = dataclasses.replace(RUN.model, moe=dataclasses.replace(RUN.model.moe, every=0))
    with pytest.raises(ConfigError, match="the model has no experts"):
        changed(Experiment("dense", model), {}, 2.0)
