"""``moe-jax continual``: methods from texts, one line per mistake, and real runs that go on."""

import errno
import json

import pytest

from moe_jax.cli import main
from moe_jax.cli.continual import methods_of
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.run.continual import Method
from moe_jax.surgery import new_experts
from moe_jax.surgery.new_experts import with_new_experts
from tests.data.corpora import write_rows
from tests.system import tiny
from tests.system.runs import ROOT

EXPERIMENT = experiment_of(tiny.get_config())


@pytest.fixture
def continual(tmp_path, capsys, monkeypatch):
    """A function from further arguments to exit code, stdout and stderr of the command."""
    for name, text in {"a": "ab" * 40, "b": "xyz" * 30}.items():
        write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for _ in range(30)])
    sources = {
        "first": f"--first=files:{tmp_path}/a.jsonl",
        "second": f"--second=files:{tmp_path}/b.jsonl",
    }
    every = [f"--config={ROOT}/tests/system/tiny.py", f"--workdir={tmp_path}/runs"]
    every += [f"--config.data.data_dir={tmp_path}/data", "--config.training.steps=2"]
    every += ["--config.training.eval_every=0", "--config.optimizer.warmup_steps=1"]

    def run(*arguments, **others):
        given = {**sources, **others}.values()
        command = ["moe-jax", "continual", *every, *filter(None, given), *arguments]
        monkeypatch.setattr("sys.argv", command)
        code = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_method_is_a_name_a_share_of_replay_copies_and_settings():
    kept = "kept: replay=0.25 config.optimizer.frozen=router,experts config.training.steps=9"
    settings = {"optimizer.frozen": ("router", "experts"), "training.steps": 9}
    grown = with_new_experts((0, 3), replay=0.5, settings={"model.dropout": 0.5})
    assert methods_of(
        ["tuned", kept, "grown: copy=0,3 replay=0.5 config.model.dropout=0.5"], EXPERIMENT
    ) == {"tuned": Method(), "kept": Method(0.25, settings), "grown": grown}


def test_quotes_keep_a_value_with_spaces_together():
    text = (
        "later: config.training.schedules='"
        '({"setting": "balance_weight", "steps": (1, 5), "values": (0.0, 0.01)},)\''
    )
    (method,) = methods_of([text], EXPERIMENT).values()
    (schedule,) = experiment_of(EXPERIMENT, method.settings).training.schedules
    assert (schedule.setting, schedule.values) == ("balance_weight", (0.0, 0.01))


def test_a_setting_may_fit_the_larger_model_alone():
    # The first run has four experts, and cannot freeze all of them.
    text = "grown: copy=0 config.optimizer.frozen_experts=4"
    begin = methods_of([text], EXPERIMENT)["grown"].begin
    frozen = {"optimizer.frozen_experts": 4}
    assert begin.experiment(EXPERIMENT, frozen).model.moe.num_experts == 5
    with pytest.raises(ConfigError, match="frozen_experts"):
        experiment_of(EXPERIMENT, frozen)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "--method is missing: try --method=tuned"),
        (["replay=0.25"], "begins with no name"),
        ([": replay=0.25"], "begins with no name"),
        (["../up"], "begins with no name"),
        (["tuned", "tuned: replay=0.5"], "another method is called 'tuned' too"),
        (["a: reply=0.5"], "no 'reply'; did you mean 'replay'"),
        (["a: replay=half"], "replay=half is not a number"),
        (["a: replay=0.1 replay=0.2"], "has 'replay' twice"),
        (["a: copy=0-3"], "copy=0-3 is not a list of integers such as 0,3"),
        (["a: config.model.wdith=8"], "config.model.wdith is not a setting; did you mean 'width'"),
        (["a: config.training.steps=ten"], "'ten' is not a whole number"),
        (["a: config.name='b"], "a quote has no end"),
    ],
)
def test_a_text_that_is_no_method_is_one_line(texts, words):
    with pytest.raises(ConfigError) as error:
        methods_of(texts, EXPERIMENT)
    assert words in str(error.value) and "\n" not in str(error.value)


ONE_LAYER = ("--config.model.num_layers=1", "--config.model.moe.every=1")
TUNED = "--method=tuned"
# Arguments, flags in place of those of the fixture, and what the one line must say.
MISTAKES = {
    "no sources": ([TUNED], {"first": "", "second": ""}, "--first and --second, the two sources"),
    "one source": ([TUNED], {"second": ""}, "give both, as --first="),
    "source twice": (
        [TUNED],
        {"first": "--first=mixture", "second": "--second=mixture"},
        "both 'mixture': give two sources",
    ),
    "source as setting": (
        [TUNED, "--config.data.source=mixture"],
        {},
        "the place of --config.data.source: leave it out",
    ),
    "no such source": ([TUNED], {"second": "--second=files:/nowhere/*"}, "no file matches"),
    "invalid config": ([TUNED, "--config.data.batch_size=7"], {}, "data.batch_size=7"),
    "first as name": (["--method=first"], {}, "method 'first': the folder of this name"),
    "replay": ([TUNED, "--method=a: replay=1"], {}, "method 'a': replay=1.0 is out of range"),
    "expert": ([TUNED, "--method=a: copy=0,4"], {}, "list experts from 0 to 3"),
    "group": (
        [TUNED, "--method=a: copy=0 config.optimizer.frozen=rooter"],
        {},
        "no group 'rooter'; did you mean 'router'",
    ),
    "width": ([TUNED, "--method=a: config.model.width=32"], {}, "is of another model"),
    "width of new experts": (
        [TUNED, "--method=a: copy=0 config.model.moe.expert_dim=16"],
        {},
        "these settings change the parameters of the model",
    ),
    "devices": (
        # Six experts can be divided by two, but not five.
        ["--config.mesh.expert=2", "--method=b: copy=0,1", "--method=a: copy=0"],
        {},
        "method 'a': model.moe.num_experts=5 is not divisible by mesh.expert=2",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_trained(continual, tmp_path, case):
    arguments, others, words = MISTAKES[case]
    code, out, err = continual(*arguments, **others)
    (line,) = err.splitlines()
    assert (code, out) == (2, "") and line.startswith("error: ") and words in line
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_command_goes_on_and_trains_no_finished_run_again(
    continual, tmp_path, monkeypatch
):
    def losses(name):
        parts = json.loads((tmp_path / "runs" / name / "result.json").read_text())["parts"]
        return [parts[f"files:{tmp_path}/{source}.jsonl"]["loss"] for source in "ab"]

    def written():
        return {
            path: path.stat().st_mtime_ns
            for path in (tmp_path / "runs" / "first").rglob("*")
            if path.name == "metrics.jsonl" or "checkpoints" in path.parts
        }

    def full(*given, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    frozen = "config.optimizer.frozen=attention,embedding,norms"
    arguments = [f"--method=grown: copy=0,1 {frozen}", *ONE_LAYER]
    with monkeypatch.context() as patch:
        patch.setattr(new_experts, "grow", full)
        code, out, err = continual(*arguments)
    assert code == 2 and "make space, then run the same command to go on" in err
    before = written()
    assert len(before) > 2 and not (tmp_path / "runs" / "grown").exists()
    code, out, err = continual(*arguments)
    assert code == 0, err
    assert written() == before and f"{tmp_path}/runs/first is finished" in out
    first, grown = losses("first"), losses("grown")
    rise, fall = grown[0] - first[0], first[1] - grown[1]
    found = json.loads((tmp_path / "runs" / "transfers.json").read_text())
    assert found == {"grown": {"forgetting": rise, "gain": fall}}
    said = f"grown: forgets {rise:.3f}, gains {fall:.3f} nats per target"
    assert out.splitlines()[-1] == said
    # Another share of replay is another run, and its folder is taken.
    code, out, err = continual("--method=tuned", f"{arguments[0]} replay=0.5", *ONE_LAYER)
    assert code == 2 and "method 'grown'" in err and not (tmp_path / "runs" / "tuned").exists()
