import dataclasses
import io
import json
import math
import os
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moe_jax.routing import Counts
from moe_jax.training.history import Logged
from moe_jax.training.metrics import (
    MetricsWriter,
    ProgressBar,
    eval_record,
    flatten,
    load_statistics,
    read_metrics,
    train_record,
)
from moe_jax.training.noise import GradientNoise
from moe_jax.training.step import LayerReport, Losses, StepReport


def _write(folder, steps, resume_step=None, kind="train", **numbers):
    with MetricsWriter(folder, resume_step) as writer:
        for step in steps:
            writer.write({"kind": kind, "step": step, "loss": float(step), **numbers})


def _steps(folder):
    return [(record["kind"], record["step"]) for record in read_metrics(folder)]


def test_flatten_names_nested_numbers():
    record = {
        "kind": "train",
        "loss": np.float32(0.5),
        "layers": [{"losses": {"balance": 1}, "load": jnp.array([0.25, 0.75])}],
        "skipped": np.int32(3),
        "good": True,
        "nothing": None,
        "bad": math.nan,
    }
    flat = flatten(record)
    assert math.isnan(flat.pop("bad"))
    assert flat == {
        "loss": 0.5,
        "layers/0/losses/balance": 1.0,
        "layers/0/load/0": 0.25,
        "layers/0/load/1": 0.75,
        "skipped": 3.0,
    }


def test_floats_come_back_to_the_last_bit(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.float32([0.1, -0.0, 1e-45, 3.4e38])])
    doubles = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308]
    with MetricsWriter(tmp_path) as writer:
        writer.write({"kind": "train", "step": 1, "values": values, "doubles": doubles})
    (record,) = read_metrics(tmp_path)
    assert np.float32(record["values"]).tobytes() == values.tobytes()
    assert struct.pack("4d", *record["doubles"]) == struct.pack("4d", *doubles)


def test_lines_are_strict_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"kind": "train", "step": 1, "loss": math.nan, "norms": [math.inf, 1.0]})

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"kind": "train", "step": 1, "loss": None, "norms": [None, 1.0]}


@pytest.mark.parametrize(
    ("resume", "kept"), [(None, [1, 2, 3, 4]), (4, [1, 2, 3, 4]), (2, [1, 2]), (0, [])]
)
def test_resume_removes_what_is_about_to_be_repeated(tmp_path, resume, kept):
    _write(tmp_path, [1, 2, 3, 4])
    _write(tmp_path, [9], resume)
    assert _steps(tmp_path) == [("train", step) for step in [*kept, 9]]


def test_resume_keeps_lines_to_the_last_byte(tmp_path):
    _write(tmp_path, [1, 2], note="é", number=0.1)
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    _write(tmp_path, [], resume_step=2)
    assert path.read_bytes() == before


def test_kind_and_step_are_written_once(tmp_path):
    _write(tmp_path, [2], kind="eval")
    _write(tmp_path, [2], resume_step=2, kind="eval")
    _write(tmp_path, [2], resume_step=2)
    assert _steps(tmp_path) == [("eval", 2), ("train", 2)]


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_last_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    _write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    # A line that lacks nothing but its end of line is whole.
    kept = [1, 2, 3] if cut == 1 else [1, 2]
    assert _steps(tmp_path) == [("train", step) for step in kept]
    _write(tmp_path, [4], resume_step=3)
    assert _steps(tmp_path) == [("train", step) for step in [*kept, 4]]


def test_resume_appends_after_a_line_cut_short_even_where_all_is_kept(tmp_path):
    _write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    _write(tmp_path, [2])
    assert _steps(tmp_path) == [("train", 1), ("train", 2)]


def test_damage_elsewhere_is_reported_with_its_line(tmp_path):
    _write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"step" 2'))
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is damaged"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, 3)


def events(folder):
    """Reads TFRecord frames: length, its checksum, data, its checksum."""
    for path in sorted((folder / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    record = {
        "kind": "train",
        "step": 10,
        "loss": np.float32(0.1),
        "layers": [{"layer": 1, "losses": {"balance": 1.5}, "load": [0.25, 0.75]}],
    }
    with MetricsWriter(tmp_path) as writer:
        writer.write(record)
        writer.write({"kind": "eval", "step": 20, "loss": math.nan})
    found = {
        (event.step, value.tag): value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
    }
    assert math.isnan(found.pop((20, "eval/loss")))
    numbers = flatten({key: value for key, value in record.items() if key != "step"})
    assert found == {(10, f"train/{n}"): np.float32(v) for n, v in numbers.items()}


def test_tensorboard_hides_what_resume_repeats(tmp_path):
    _write(tmp_path, [1, 2, 3])
    _write(tmp_path, [3], resume_step=2)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [3]


def test_no_file_is_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_load_statistics():
    even = load_statistics(np.full(4, 0.25))
    assert even == pytest.approx({"load_entropy": 1, "max_mean_load": 1, "max_violation": 0})
    one = load_statistics(np.array([8, 0, 0, 0]))
    assert one == pytest.approx({"load_entropy": 0, "max_mean_load": 4, "max_violation": 3})
    half = load_statistics(np.array([0.5, 0.5, 0, 0]))
    assert half["load_entropy"] == pytest.approx(0.5)
    assert set(load_statistics(np.zeros(4)).values()) == {0}
    assert load_statistics(np.array([5]))["load_entropy"] == 1


# Of 8 assignments asked for, 5 and 3, the experts accepted 3 and 1.
COUNTS = Counts(
    demand=np.array([5.0, 3.0]),
    load=np.array([3.0, 1.0]),
    unrouted=np.float32(4),
    valid=np.float32(8),
)
REPORT = StepReport(
    losses=Losses(np.float32(2), np.zeros(0), None, np.float32(2.5)),
    grad_norm=np.float32(0.5),
    layers=(LayerReport({"balance": np.float32(1.25)}, COUNTS),),
    choices=(None,),
    updated=np.True_,
    skipped=np.int32(1),
    skipped_in_row=np.int32(0),
)
RATES = {"learning_rate": 0.1, "tokens_per_second": 9.0}
PLAIN = {
    "kind": "train",
    "step": 7,
    "loss": 2.0,
    "objective": 2.5,
    "grad_norm": 0.5,
    "skipped_updates": 1,
    "dropped_fraction": 0.5,
    **RATES,
}


def _line(report=REPORT, **more):
    """The training line of step 7, and the record of its only layer."""
    line = train_record(7, report, [3], **RATES, **more)
    (layer,) = line.pop("layers")
    return line, layer


def test_a_training_line_by_hand():
    line, layer = _line()
    known = {
        "layer": 3,
        "losses": {"balance": 1.25},
        "dropped_fraction": 0.5,
        "unrouted_fraction": 0.5,
        "load": [0.75, 0.25],
    }
    assert line == PLAIN and layer.items() >= known.items()


@pytest.mark.parametrize(
    ("weights", "settings", "loss"),
    [
        ({"balance": 0.02}, None, 0.025),
        ({"balance": 0.0}, None, 0.0),
        ({"balance": 0.02}, {"balance_weight": np.float32(0)}, 0.0),  # a schedule at 0
        ({}, None, 0.0),  # a router with a loss on logits alone
    ],
)
def test_a_training_line_has_the_weighted_losses_of_balance(weights, settings, loss):
    report = dataclasses.replace(REPORT, settings=settings)
    _, layer = _line(report, balance_weights=[weights])
    assert layer["balance_loss"] == pytest.approx(loss)


def test_a_training_line_with_the_noise_of_the_gradient():
    noise = GradientNoise(np.float32(0.25), np.float32(8), np.int32(64))
    line, _ = _line(dataclasses.replace(REPORT, noise=noise))
    # TensorBoard has the same numbers under the names of their places.
    found = {name: one for name, one in flatten(line).items() if name.startswith("gradient_noise")}
    assert found == {
        "gradient_noise/squared_gradient": 0.25,
        "gradient_noise/trace": 8.0,
        "gradient_noise/tokens": 64.0,
    }


def test_a_training_line_with_the_speed_of_the_model():
    line, _ = _line(flops_per_token=100.0)
    assert line == PLAIN | {"model_flops_per_second": 900.0}  # the peak of a CPU is unknown
    line, _ = _line(flops_per_token=100.0, peak_flops=1800.0)
    assert line == PLAIN | {"model_flops_per_second": 900.0, "mfu": 0.5}


def test_a_training_line_has_the_further_losses_of_the_objective():
    losses = Losses(np.float32(2), np.array([3.0, 4.0], "f"), np.float32(1), np.float32(2.5))
    line, _ = _line(dataclasses.replace(REPORT, losses=losses))
    assert line == PLAIN | {"lookahead_loss": [3.0, 4.0], "distillation_loss": 1.0}


def test_an_evaluation_line_is_the_means_with_kind_and_step():
    assert eval_record(5, {"loss": 1.5}) == {"kind": "eval", "step": 5, "loss": 1.5}


def test_plain_lines_are_sparse_and_the_last_step_always_shows(capsys):
    seconds = iter(range(0, 1000, 4))
    with ProgressBar(0, 7, clock=lambda: next(seconds)) as bar:
        for step in range(1, 8):
            bar.update(step, loss=1.0, tokens_per_second=5.0, dropped=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1/7", "step 4/7", "step 7/7"]
    assert "25.0% dropped" in lines[0]
    assert lines[0].endswith("? left")
    # 12 seconds for 3 steps.
    assert lines[1].endswith("00:12 left")


def test_plain_lines_have_the_rates_that_are_known(capsys):
    with ProgressBar(0, 3) as bar:
        bar.update(1, loss=1.0, tokens_per_second=5.0, dropped=0.25)
    with ProgressBar(0, 3) as bar:
        rates = {"model_flops_per_second": 3.21e13, "mfu": 0.1634}
        bar.update(1, loss=1.0, tokens_per_second=5.0, dropped=0.25, **rates)
    without, with_rates = capsys.readouterr().out.splitlines()
    assert without.startswith("step 1/3: loss 1.000, 5 tokens/s, 25.0% dropped")
    middle = "5 tokens/s, 32.1TFLOP/s, MFU 16.3%, 25.0% dropped"
    assert with_rates.startswith(f"step 1/3: loss 1.000, {middle}")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("alarms", "words"), [(0, ""), (1, ", 1 alarm"), (2, ", 2 alarms")])
def test_the_number_of_active_alarms_is_in_lines_and_in_the_bar(alarms, words, monkeypatch, capsys):
    numbers = {"loss": 1.0, "tokens_per_second": 5.0, "dropped": 0.25, "alarms": alarms}
    with ProgressBar(0, 3) as bar:
        bar.update(1, **numbers)
    assert f"25.0% dropped{words}, ? left" in capsys.readouterr().out
    monkeypatch.setattr("sys.stderr", Terminal())
    with ProgressBar(0, 3) as bar:
        bar.update(1, **numbers)
        bar.update(3, **numbers)
    assert sys.stderr.getvalue().rstrip().endswith(f"25.0% dropped{words}]")


def test_lines_that_a_checkpoint_knows_of_and_the_file_has_lost_are_named(tmp_path, caplog):
    _write(tmp_path, range(1, 11))
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    logged = Logged({"train": [[1, 8, 1]]})
    with MetricsWriter(tmp_path, 8, logged) as writer:
        assert writer.lost == "2 lines are missing: steps 7 to 8"
        writer.write({"kind": "train", "step": 9})
    (warning,) = caplog.messages
    assert str(path) in warning and writer.lost in warning
    # The next checkpoint still knows what must be there.
    assert writer.logged.ranges == {"train": [[1, 9, 1]]}


def test_a_whole_log_is_not_warned_about(tmp_path, caplog):
    _write(tmp_path, [1, 2, 3])
    with MetricsWriter(tmp_path, 2, Logged({"train": [[1, 2, 1]]})) as writer:
        assert writer.lost == ""
    # Older checkpoints do not know: what is there is what must be there.
    with MetricsWriter(tmp_path, 2) as writer:
        assert writer.logged.ranges == {"train": [[1, 2, 1]]}
    assert not caplog.messages


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)])
def test_tensorboard_gets_what_it_has_lost_from_the_lines(tmp_path, damage, caplog):
    _write(tmp_path, [1, 2, 3])
    (events,) = (tmp_path / "tensorboard").iterdir()
    damage(events)
    _write(tmp_path, [4], resume_step=3)
    shown = [
        event.step
        for path in sorted((tmp_path / "tensorboard").iterdir())
        for event in _events_of(path)
    ]
    assert sorted(set(shown) - {0}) == [1, 2, 3, 4]
    assert "written again from metrics.jsonl" in caplog.text


def _events_of(path):
    data = path.read_bytes()
    while len(data) >= 12 and len(data) >= 16 + struct.unpack_from("<Q", data)[0]:
        (length,) = struct.unpack_from("<Q", data)
        event = Event.FromString(data[12 : 12 + length])
        if event.summary.value:
            yield event
        data = data[16 + length :]


@pytest.mark.parametrize("line", ["7", '{"kind": "train"}', '{"step": 2}'])
def test_a_line_that_is_no_record_is_damage(tmp_path, line):
    _write(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_metrics(tmp_path)


def test_without_tensorboard_there_are_no_event_files(tmp_path):
    with MetricsWriter(tmp_path, writers=()) as writer:
        writer.write({"kind": "train", "step": 1, "loss": 1.0})
    assert _steps(tmp_path) == [("train", 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
