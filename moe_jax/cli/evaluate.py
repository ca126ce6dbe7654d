"""Evaluates a run and prints one JSON line: ``moe-jax evaluate --workdir=runs/quickstart``.

``--config.data.source=files:other/*.txt`` evaluates on other text, ``--capacity_factor=4`` with
another capacity. Other settings of ``data``, ``mesh`` and ``model`` may change too, if the model
keeps its parameters. The conditions of ``training.alarms`` that the data meet are warnings.

``--routing_table=table.npz`` evaluates the same batches a second time, with the experts of a table
of ``moe-jax tabulate`` in place of the choices of the routers. The line then has the second losses
and their increase under ``with_table``.
"""

from __future__ import annotations

import json

import jax
from absl import flags

from moe_jax import processes
from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of_texts
from moe_jax.monitor import in_words
from moe_jax.run.alarms import references
from moe_jax.run.evaluation import changed
from moe_jax.run.judging import judged
from moe_jax.run.restored import open_restored
from moe_jax.run.table_loss import evaluated_with, open_table


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_workdir(values)
    common.define_step(values)
    common.define_average(values)
    common.define_overrides(values)
    flags.DEFINE_float(
        "capacity_factor",
        0.0,
        "Capacity factor of every router; 0 for the run's own factors of evaluation.",
        lower_bound=0.0,
        flag_values=values,
    )
    common.define_routing_table(values)
    common.define_hosts(values)


def main(given: flags.FlagValues) -> None:
    """Restores a checkpoint and prints loss, bits per byte, accuracy and load."""
    common.join_hosts(given)

    def change(run: Experiment) -> Experiment:
        values = experiment_of_texts(run, common.texts_of(given))[1]
        experiment = changed(run, values, given.capacity_factor)
        references(experiment)  # before weights are read
        return experiment

    folder = common.folder_of(given)
    table = open_table(given.routing_table, folder) if given.routing_table else None
    step, session, state = open_restored(folder, given.step, change, average=given.average)
    with jax.set_mesh(session.mesh):
        means = session.evaluate(state)
        tabled = {"with_table": evaluated_with(table, session, state, means)} if table else {}
    if processes.is_first():
        record = judged(session, state, folder, step, means)
        for words in in_words(record):
            common.warn(words)
        print(json.dumps({"step": step, **record, **tabled}))


if __name__ == "__main__":
    common.run(define, main)
