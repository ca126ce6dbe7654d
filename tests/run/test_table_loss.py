"""The evaluation of a run with a routing table beside its evaluation with the routers."""

import json

import jax
import numpy as np
import pytest

import moe_jax as mj
from moe_jax import data
from moe_jax.analysis.routing_table import RoutingTable
from moe_jax.cli import main
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.run import workdir
from moe_jax.run.session import open_session
from moe_jax.run.table_loss import evaluated_with, open_table
from tests.system import tiny
from tests.system.runs import write_text

_SETTINGS = {"training.steps": 2, "optimizer.warmup_steps": 1, "training.eval_every": 2}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """An untrained model with its validation set: session, state and measures of the routers."""
    source = write_text(tmp_path_factory.mktemp("table") / "text")
    experiment = experiment_of(tiny.get_config(), {"data.source": source})
    session = open_session(experiment, data.open_tokenizer(experiment.data))
    _, state = session.recipe.create()
    with jax.set_mesh(session.mesh):
        return session, state, session.evaluate(state)


def fixed(session, expert):
    """A table that sends every token to one expert with weight 1/2; -1 is an empty table."""
    rows, layers = session.tokenizer.vocab_size, session.experiment.model.sparse_layers()
    gate = 0.5 if expert >= 0 else 0.0
    layer = np.full((rows, 1), expert, np.int32), np.full((rows, 1), gate, np.float32)
    return RoutingTable((layer,) * len(layers))


def measured(opened, expert):
    session, state, before = opened
    with jax.set_mesh(session.mesh):
        return evaluated_with(fixed(session, expert), session, state, before)


def test_an_empty_table_changes_no_measure(opened):
    before, found = opened[2], measured(opened, -1)
    names = ("loss", "bits_per_byte", "accuracy")
    assert [found[name] for name in names] == [before[name] for name in names]
    assert (found["loss_increase"], found["table_ids"]) == (0, 0)


def test_a_table_of_all_tokens_replaces_every_choice(opened):
    session, state, before = opened
    first = measured(opened, 0)
    assert first["loss"] != before["loss"]
    assert first["loss_increase"] == first["loss"] - before["loss"]
    assert first["table_ids"] == session.tokenizer.vocab_size
    # The state of the run has no table.
    with jax.set_mesh(session.mesh):
        assert session.evaluate(state)["loss"] == before["loss"]


def test_a_table_of_another_model_is_refused(opened):
    session, state, before = opened
    with pytest.raises(ConfigError, match="write a table of this model with moe-jax tabulate"):
        evaluated_with(RoutingTable(()), session, state, before)


def test_routers_that_read_no_table_are_refused_before_weights_are_read(tmp_path):
    changes = {"model.moe.router": {"preset": "expert_choice"}, "model.moe.allow_future_leak": True}
    workdir.claim(tmp_path, experiment_of(tiny.get_config(), changes))
    with pytest.raises(ConfigError, match="experts choose among tokens"):
        open_table("never read", tmp_path)


def test_the_command_prints_both(tmp_path, monkeypatch, capsys):
    source = write_text(tmp_path / "text")
    run = mj.train(tiny.get_config(), tmp_path / "run", {**_SETTINGS, "data.source": source})
    table = tmp_path / "table.npz"
    fixed(run.session, 1).save(table)
    arguments = ["evaluate", f"--workdir={run.workdir}", f"--routing_table={table}"]
    monkeypatch.setattr("sys.argv", ["moe-jax", *arguments])
    main.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    beside = found["with_table"]
    assert beside["loss"] != found["loss"] == run.evaluate()["loss"]
    assert beside["loss_increase"] == beside["loss"] - found["loss"]
    table.write_text("no table")
    with pytest.raises(ConfigError, match="is no routing table: write one with moe-jax tabulate"):
        open_table(str(table), run.workdir)
