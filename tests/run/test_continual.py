"""Runs on two sources after each other, real files and real runs."""

import pytest

from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import load
from moe_jax.run import workdir
from moe_jax.run.continual import Method, Transfer, continual
from tests.data.corpora import write_rows
from tests.parity.compare_models import recorded
from tests.system import tiny

PARTS = ({"source": "mixture", "name": "a"}, {"source": "python_library", "name": "b"})
BLEND = {"data.source": "blend", "data.blend.parts": PARTS}


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
    changes = changes | ({"data.blend.parts": PARTS} if changes else {})
    with pytest.raises(ConfigError, match=message) as error:
        continual(tiny.get_config(), tmp_path / "runs", methods, changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.width": 32}, "start_from=.*first is of another model"),
        ({"model.wdith": 32}, "model.wdith is not a setting"),
        ({"optimizer.frozen": ("rooter",)}, "no group 'rooter'"),
        ({"training.noise_scale": True}, "set training.microbatches=2"),
        ({"mesh.expert": 3}, "mesh"),
        ({"data.source": "mixture"}, "data.source is set by continual learning"),
        ({"data.tokenizer": "sentencepiece"}, "data.tokenizer belongs to the weights"),
        ({"data.mask_rate": 0.1, "model.causal": False}, "data.mask_rate belong to the weights"),
    ],
)
def test_the_settings_of_every_method_are_checked_before_the_first_run(settings, message, tmp_path):
    methods = {"tuned": Method(), "other": Method(settings=settings)}
    with pytest.raises(ConfigError, match=f"method 'other': .*{message}") as error:
        continual(tiny.get_config(), tmp_path / "runs", methods, BLEND)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_methods_have_the_model_of_the_released_start_of_the_first_run(tmp_path):
    (tmp_path / "mixtral").mkdir()
    recorded("mixtral", tmp_path / "mixtral")
    changes = BLEND | {"training.start_from": str(tmp_path / "mixtral")}
    # The width of the config is 16. The first method is right, so that the line names the second.
    width = load(tmp_path / "mixtral").config.width
    methods = {"same": Method(settings={"model.width": width}), "other": Method(1.0)}
    assert width != tiny.get_config().model.width
    with pytest.raises(ConfigError, match="method 'other': replay=1.0 is out of range"):
        continual(tiny.get_config(), tmp_path / "runs", methods, changes)


def test_a_folder_with_another_run_is_found_before_the_first_run(tmp_path):
    workdir.claim(tmp_path / "other", experiment_of(tiny.get_config(), BLEND))
    with pytest.raises(ConfigError, match="method 'other': .*data.blend.parts.0.weight"):
        continual(tiny.get_config(), tmp_path, {"tuned": Method(), "other": Method(0.5)}, BLEND)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


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
