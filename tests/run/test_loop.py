"""The log of a run, line by line, without a model that trains."""

from types import SimpleNamespace
from typing import Any, cast

from moe_jax import models
from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.monitor import Drift, Drops, Overload, Watch
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.run.loop import _Log
from moe_jax.training.metrics import MetricsWriter, ProgressBar, read_metrics
from tests.training.test_metrics import REPORT, events


def test_alarms_are_warned_shown_in_the_bar_and_held_by_tensorboard(tmp_path, caplog):
    # The report's only layer has drops of 4/8 and a largest load of 5/4 of the mean; the
    # validation's only layer has one expert without a token.
    model = models.DecoderConfig(num_layers=2, moe=MoEConfig(every=2, num_experts=2))
    training = TrainingConfig(steps=2, log_every=1)
    session = SimpleNamespace(
        experiment=Experiment("x", model, training=training),
        tokenizer=SimpleNamespace(vocab_size=16),
    )
    even = {"step": 0, "layers": [{"layer": 1, "load": [0.5, 0.5]}]}
    rules = [Drops(above=0.3), Overload(above=1.2), Drift(reference="other")]
    shown = list[str]()
    with (
        MetricsWriter(tmp_path) as writer,
        ProgressBar(0, 2, seconds_between_lines=0, say=shown.append) as bar,
    ):
        log = _Log(cast(Any, session), writer, bar, Watch(rules, (), {"other": even}))
        log.step(1, REPORT)
        log.evaluation(1, {"layers": [{"layer": 1, "load": [1.0, 0.0]}]})
        log.step(2, REPORT)
    assert [line.split("dropped, ")[1].split(",")[0] for line in shown] == ["2 alarms", "3 alarms"]
    # A condition that lasts is one warning.
    assert [message.split(" in layer")[0] for message in caplog.messages] == [
        "step 1: Drops",
        "step 1: Overload",
        "step 1: Drift",
    ]
    read = {
        (event.step, value.tag): value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
        if value.tag.endswith("/active_alarms")
    }
    counts = {(1, "train"): 2, (1, "eval"): 1, (2, "train"): 2}
    assert read == {(step, f"{kind}/active_alarms"): n for (step, kind), n in counts.items()}
    lines = read_metrics(tmp_path)
    assert {(line["step"], line["kind"]): line["active_alarms"] for line in lines} == counts
