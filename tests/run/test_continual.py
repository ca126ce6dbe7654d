"""Runs on two sources after each other, real files and real runs."""

import pytest

from moe_jax.errors import ConfigError
from moe_jax.run.continual import Method, Transfer, continual
from tests.data.corpora import write_rows
from tests.system import tiny


def test_forgetting_and_gain_are_the_changes_of_the_two_losses():
    before = {"parts": {"a": {"loss": 1.0}, "b": {"loss": 3.0}}}
    after = {"parts": {"a": {"loss": 1.5}, "b": {"loss": 2.25}}}
    assert Transfer.between(before, after) == Transfer(forgetting=0.5, gain=0.75)


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        ({"tuned": Method()}, {}, "set data.source=blend and two data.blend.parts"),
        ({"first": Method()}, {"data.source": "blend"}, "another name than 'first'"),
        ({"replay": Method(1.0)}, {"data.source": "blend"}, "a replay from 0 to below 1"),
    ],
)
def test_what_cannot_be_compared_is_one_line(methods, changes, message, tmp_path):
    parts = ({"source": "mixture", "name": "a"}, {"source": "python_library", "name": "b"})
    changes = changes | ({"data.blend.parts": parts} if changes else {})
    with pytest.raises(ConfigError, match=message) as error:
        continual(tiny.get_config(), tmp_path / "runs", methods, changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_model_forgets_the_first_text_and_replay_keeps_more_of_it(tmp_path):
    texts = {"a": "ab" * 40, "b": "xyz" * 30}
    for name, text in texts.items():
        write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for _ in range(30)])
    changes = {
        "data.source": "blend",
        "data.blend.parts": tuple(
            {"source": f"files:{tmp_path}/{name}.jsonl", "name": name} for name in texts
        ),
        "data.data_dir": str(tmp_path / "data"),
        "model.dropout": 0.0,
        "optimizer.learning_rate": 0.01,
        "training.steps": 20,
        "training.eval_every": 0,
    }
    frozen = Method(settings={"optimizer.frozen": ("router", "experts")})
    methods = {"tuned": Method(), "replay": Method(0.5), "frozen": frozen}
    found = continual(tiny.get_config(), tmp_path / "runs", methods, changes)
    assert found["tuned"].forgetting > found["replay"].forgetting
    assert found["tuned"].forgetting > 0.1
    assert min(method.gain for method in found.values()) > 0.5
