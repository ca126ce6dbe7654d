"""A run with an average of its parameters as a folder of ``transformers``, and scores of both."""

import types

import jax
import numpy as np
import pytest
from absl import flags

from moe_jax import data
from moe_jax.cli import convert
from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES
from moe_jax.run import workdir
from moe_jax.run.api import open_run
from moe_jax.run.loaded import load_hf, save_hf
from moe_jax.run.scoring import open_model, scores
from moe_jax.run.session import open_checkpoints, open_session
from moe_jax.training.average import averaged_names, with_average
from moe_jax.training.state import from_named_leaves, named_leaves
from tests.test_face import TINY_MIXTRAL

DATA = data.DataConfig("mixture", tokenizer="bytes", seq_length=16, batch_size=8)
TEXTS = ["def f(x):", "ü", "return x + 1\n" * 2]


def convert_with(*arguments):
    """Runs the command with these flags in this process."""
    values = flags.FlagValues()
    convert.define(values)
    values(["convert", "--from=moe_jax", *map(str, arguments)])
    convert.main(values)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of a tiny Mixtral, whose average is half of its parameters."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    model = FAMILIES["mixtral"].read(TINY_MIXTRAL)
    optimizer, training = OptimizerConfig(ema_decay=0.5), TrainingConfig(steps=2)
    experiment = Experiment("own", model, DATA, optimizer, training)
    session = open_session(experiment, data.Bytes())
    workdir.claim(folder, experiment)
    data.Bytes().save(folder)
    leaves = drawn(named_leaves(session.abstract))
    with open_checkpoints(experiment, folder / workdir.CHECKPOINTS) as checkpoints:
        checkpoints.save(1, leaves, {})
    state = from_named_leaves(session.abstract, leaves)
    params = {True: with_average(state).params, False: state.params}
    return types.SimpleNamespace(folder=folder, params=params)


def drawn(shapes):
    """Arrays of a state, drawn by numpy, which takes no compiling; averages are halves."""
    rng = np.random.default_rng(0)
    leaves = {name: 0.2 * rng.normal(size=like.shape) for name, like in shapes.items()}
    halves = {
        average: leaves[name] / 2
        for name, average in averaged_names(shapes).items()
        if average != name
    }
    assert halves
    return {
        name: jax.device_put(leaf.astype(shapes[name].dtype), shapes[name].sharding)
        for name, leaf in (leaves | halves).items()
    }


@pytest.fixture(scope="module")
def exported(run):
    """The folders that the command writes, with the average and without it."""
    folders = {True: run.folder.parent / "averaged", False: run.folder.parent / "trained"}
    for average, folder in folders.items():
        given = (f"--input={run.folder}", f"--output={folder}", "--family=mixtral")
        convert_with(*given, *([] if average else ["--noaverage"]))
    return folders


def embedding(folder):
    return np.asarray(load_hf(folder).model.embedding.table[...])


def test_a_converted_run_has_the_averaged_weights_and_by_choice_the_last(run, exported):
    trained, averaged = embedding(exported[False]), embedding(exported[True])
    np.testing.assert_array_equal(averaged, trained / 2)
    np.testing.assert_array_equal(trained, run.params[False]["embedding"]["table"][...])
    for average, params in run.params.items():
        loaded = open_run(run.folder, average=average).state.params
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("average", [True, False])
def test_a_run_is_written_with_the_parameters_that_it_was_opened_with(
    run, exported, average, tmp_path
):
    save_hf(open_run(run.folder, average=average), tmp_path / "out", family="mixtral")
    found, wanted = (load_hf(folder).model for folder in (tmp_path / "out", exported[average]))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("average", [True, False])
def test_a_converted_run_scores_texts_as_the_run_does(run, exported, average):
    own = list(scores(open_model(run.folder, average=average), TEXTS, overlap=4))
    folder = list(scores(open_model(exported[average]), TEXTS, window=16, overlap=4))
    for mine, theirs in zip(own, folder, strict=True):
        assert mine.tokens == theirs.tokens and mine.size == theirs.size
        np.testing.assert_allclose(mine.log_likelihoods, theirs.log_likelihoods, atol=1e-5)
    other = list(scores(open_model(run.folder, average=not average), TEXTS, overlap=4))
    assert abs(other[2].log_likelihood - own[2].log_likelihood) > 1e-3


def test_the_best_step_is_scored_by_its_name(run):
    with pytest.raises(ConfigError, match="has no validation yet, so no step is best"):
        open_model(run.folder, "best")


def test_no_average_is_selected_where_there_is_no_run(exported, tmp_path):
    with pytest.raises(ConfigError, match="--noaverage selects parameters of a run, and"):
        open_model(exported[True], average=False)
    given = (f"--input={exported[True]}", f"--output={tmp_path / 'out'}", "--noaverage")
    with pytest.raises(ConfigError, match="--noaverage selects parameters of a run, and"):
        convert_with("--from=hf", *given)
