"""Trains and opens runs from Python."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moe_jax import models
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import Config, experiment_of
from moe_jax.decoding import Sampling
from moe_jax.models.adapters import merged
from moe_jax.run import workdir as folders
from moe_jax.run.alarms import references
from moe_jax.run.best import Step
from moe_jax.run.evaluation import changed
from moe_jax.run.judging import judged
from moe_jax.run.restored import open_restored
from moe_jax.run.sampling import generate
from moe_jax.run.session import Session
from moe_jax.run.train import Say, Voice, train_in
from moe_jax.training.average import with_average
from moe_jax.training.metrics import REPORT, read_metrics
from moe_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run at one of its steps, with its weights on the devices.

    Attributes:
        workdir: Folder of the run.
        step: Number of training steps that the state has seen.
        session: Experiment on its devices.
        state: Parameters, optimizer state and router state; the parameters are the averaged ones if
            the run keeps an average (``optimizer.ema_decay``).

    Examples:
        >>> import moe_jax as mj
        >>> run = mj.open_run("runs/tiny")  # trained in the example of ``train``
        >>> run.config.model.num_layers, type(run.model).__name__, run.report.name
        (1, 'Decoder', 'report.html')
        >>> run.metrics[-1]["kind"], run.result["steps"]
        ('eval', 2)
    """

    workdir: Path
    step: int
    session: Session
    state: TrainState

    @property
    def config(self) -> Experiment:
        """Configuration of the run."""
        return self.session.experiment

    @property
    def model(self) -> models.Model:
        """Flax NNX module with the weights of ``state``, in which adapters are merged."""
        state = self.state
        return merged(nnx.merge(self.session.graph, state.params, state.router_state))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``; the ``kind`` of a line is ``train`` or ``eval``."""
        return read_metrics(self.workdir)

    @property
    def result(self) -> dict[str, Any]:
        """Content of ``result.json``, empty while the run is unfinished."""
        path = self.workdir / folders.RESULT
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def report(self) -> Path:
        """Path of ``report.html``, which a finished run has."""
        return self.workdir / REPORT

    def evaluate(self) -> dict[str, Any]:
        """Returns loss, bits per byte, accuracy and the load of experts on the validation set.

        A run with ``training.alarms`` also gets the conditions that the validation set meets, and
        with a rule of drift its distances from each reference.
        """
        references(self.config)  # before the evaluation
        with jax.set_mesh(self.session.mesh):
            means = self.session.evaluate(self.state)
        return judged(self.session, self.state, self.workdir, self.step, means)

    def generate(
        self,
        prompt: str,
        *,
        tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Returns the prompt with its continuation; an encoder-decoder returns the filled blanks.

        Args:
            prompt: Text to continue, or text with blanks ``<extra_id_0>``, ... to fill.
            tokens: Largest number of tokens to add.
            temperature: Sampling temperature; 0 takes the most probable token.
            top_k: Number of most probable tokens to sample from; 0 for all.
            top_p: Probability mass of the smallest set of tokens to sample from; 1 for all.
            seed: Random seed of the sample.

        Raises:
            ConfigError: If experts choose tokens in this model, which cannot generate text.
        """
        sampling = Sampling(tokens, temperature, top_k, top_p, seed)
        with jax.set_mesh(self.session.mesh):
            return generate(self.session, self.state, [prompt], sampling)[0]


def train(
    config: Config,
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    say: Say | None = None,
    profile: str | None = None,
    change: bool = False,
) -> OpenRun:
    """Trains a model to its last step, or resumes the run that ``workdir`` holds.

    Args:
        config: Name of a config, with a variant after a colon (``quickstart:gshard``), a file, a
            mapping of settings, or an experiment.
        workdir: Folder of the run, for checkpoints, metrics and the report.
        overrides: Settings to change, by dotted name.
        say: Function that receives progress lines, such as ``print``; by default the run is silent.
        profile: Steps to trace as ``FIRST:END``, such as ``5:8`` for the steps 5, 6 and 7; the
            trace is in the folder ``profile`` of ``workdir``.
        change: True continues a run, finished or not, with another number of steps or other rates
            (docs/runs.md); ``config.json`` records the change.

    Returns:
        The finished run.

    Raises:
        ConfigError: If the configuration cannot run on these devices, the folder holds a run of
            another configuration, or the run has no steps ``profile``.
        Diverged: After too many consecutive non-finite updates.
        TrainingError: If training cannot continue.
        CheckpointError: If no checkpoint can be read or written.
        Terminated: After SIGTERM or Ctrl-C, once the state is saved.

    Examples:
        A model of a synthetic mixture of languages, small enough for a few seconds:

        >>> import moe_jax as mj
        >>> small = {
        ...     "data.source": "mixture",
        ...     "data.tokenizer": "bytes",
        ...     "data.seq_length": 32,
        ...     "data.batch_size": 8,
        ...     "data.eval_documents": 4,
        ...     "data.mixture.document_length": 64,
        ...     "data.mixture.num_documents": 64,
        ...     "model.num_layers": 1,
        ...     "model.width": 16,
        ...     "model.num_heads": 2,
        ...     "model.head_dim": 8,
        ...     "model.mlp_dim": 32,
        ...     "model.moe.every": 1,
        ...     "model.moe.expert_dim": 32,
        ...     "model.moe.group_size": 32,
        ...     "optimizer.warmup_steps": 1,
        ...     "training.loss_chunk": 0,
        ...     "training.log_every": 1,
        ...     "training.steps": 2,
        ... }
        >>> run = mj.train("quickstart", workdir="runs/tiny", overrides=small)
        >>> run.step, [round(line["step"]) for line in run.metrics if line["kind"] == "train"]
        (2, [1, 2])
        >>> run.result["loss"] == run.evaluate()["loss"]
        True
        >>> run.generate("abc", tokens=4).startswith("abc")
        True
    """
    folder = Path(workdir)
    experiment, voice = experiment_of(config, overrides), Voice(say or _silent)
    trained = train_in(folder, experiment, overrides, voice, profile, change=change)
    if trained is None:
        return open_run(folder)
    session, state = trained
    return OpenRun(folder, int(state.step), session, with_average(state))


def open_run(
    workdir: str | Path,
    *,
    step: Step = None,
    average: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> OpenRun:
    """Opens a run at one of its checkpoints, finished or not, without writing a file.

    Args:
        workdir: Folder of the run.
        step: Step of the checkpoint, or ``best`` for the lowest validation loss; ``None`` for the
            newest intact one.
        average: False opens the trained parameters of a run that keeps an average of them.
        overrides: Other settings of the evaluation by dotted name, such as ``data.source``.

    Raises:
        ConfigError: If the folder holds no run, or no checkpoint yet; or if a setting changes the
            parameters of the model or has no effect on an evaluation.
        CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.

    Examples:
        >>> import moe_jax as mj
        >>> run = mj.open_run("runs/tiny")  # trained in the example of ``train``
        >>> run.step, run.config.model.width
        (2, 16)
        >>> sorted(run.evaluate())
        ['accuracy', 'bits_per_byte', 'dropped_fraction', 'layers', 'loss']
        >>> other = mj.open_run("runs/tiny", overrides={"data.mixture.seed": 1})
        >>> other.evaluate()["loss"] == run.evaluate()["loss"]
        False
    """
    found, session, state = open_restored(
        workdir, step, lambda run: changed(run, overrides or {}), average=average
    )
    return OpenRun(Path(workdir), found, session, state)


def _silent(text: str) -> None:
    """Ignores a progress line."""
