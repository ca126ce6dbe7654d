"""The public names: light to import, documented, and functions whatever else is imported."""

import ast
import doctest
import importlib.metadata
import inspect
import subprocess
import sys
import typing
import warnings

import jax
import pytest

import moe_jax as mj
from moe_jax import models, routing
from moe_jax.interop.huggingface import FAMILIES, save

TINY_MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
TINY_LLAMA = {
    **{name: TINY_MIXTRAL[name] for name in TINY_MIXTRAL if "experts" not in name},
    "model_type": "llama",
    "intermediate_size": 32,
}
DOCUMENTED = [name for name in mj.__all__ if name != "__version__"]
# Their examples go on with the run of the example of ``train``.
OF_A_RUN = (
    "open_run",
    "OpenRun",
    "prune",
    "merge",
    "merge_adapters",
    "distil",
    "quantise",
    "analyze",
)


def examples(name):
    """Runs the examples of a name; what they print and should not, or "" if all is well."""
    told = []
    found = doctest.DocTestFinder(recurse=False).find(getattr(mj, name), name, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for case in found:
        runner.run(case, out=told.append)
    assert runner.tries > 1, f"{name} has no examples"
    return "".join(told)


def python(code, *arguments):
    command = [sys.executable, *arguments, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("face")
    for original in (TINY_MIXTRAL, TINY_LLAMA):
        family, vocab_size = original["model_type"], original["vocab_size"]
        model = models.make(FAMILIES[family].read(original), vocab_size, jax.random.key(0))
        save(model, path / f"tiny-{family}", family, original=original)
    return path


@pytest.fixture(scope="module")
def trained(folder):
    """What the examples of ``train`` print wrongly; their run lies in the folder then."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        patch.chdir(folder)
        return examples("train")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_are_true(name, folder, monkeypatch, request):
    monkeypatch.chdir(folder)
    before = list(routing.PRESETS)
    if name == "train" or name in OF_A_RUN:
        assert request.getfixturevalue("trained") == ""
    if name != "train":
        assert examples(name) == ""
    routing.PRESETS[:] = before


def test_a_finished_run_is_opened_and_not_trained_again(folder, trained, monkeypatch):
    monkeypatch.chdir(folder)
    run, said = mj.open_run("runs/tiny"), []
    again = mj.train(run.config, "runs/tiny", say=said.append)
    assert said == ["runs/tiny is finished; its results are in runs/tiny/report.html"]
    assert (again.step, again.result) == (run.step, run.result)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_name_says_what_it_takes(name):
    found = getattr(mj, name)
    text = inspect.getdoc(found)
    assert "Examples:" in text
    if inspect.isfunction(found):
        parameters = inspect.signature(found).parameters
        assert all(f"{parameter}:" in text for parameter in parameters if parameter != "function")
        assert typing.get_type_hints(found).keys() >= parameters.keys() - {"function"}


def test_dir_and_all_agree():
    assert {*mj.__all__} <= {*dir(mj)}
    assert sorted(mj.__all__) == mj.__all__
    assert {*mj._HOMES} | {"__version__"} == {*mj.__all__}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mj.nothing  # noqa: B018


def test_checkers_see_the_same_names():
    seen = {
        (alias.asname or alias.name, f"{node.module}:{alias.name}")
        for node in ast.walk(ast.parse(inspect.getsource(mj)))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(mj._HOMES.items()) <= seen


def test_the_version_is_that_of_the_distribution():
    assert mj.__version__ == importlib.metadata.version("moe_jax")


def test_an_import_loads_nothing_heavy():
    code = "import sys, moe_jax; moe_jax.__all__; print({'jax', 'flax', 'numpy'} & {*sys.modules})"
    assert python(code).stdout.strip() == "set()"


@pytest.mark.parametrize("first", ["import moe_jax as mj", "import moe_jax.train, moe_jax.count"])
def test_train_and_count_are_functions_whatever_is_imported_first(first):
    code = f"""
{first}
import moe_jax as mj
before = mj.train, mj.count
import moe_jax.train, moe_jax.count, moe_jax.evaluate
from moe_jax import train, count
assert before == (mj.train, mj.count) == (train, count)
print(mj.train.__name__, mj.count("quickstart").total > 0)
"""
    done = python(code)
    assert done.stdout.split() == ["train", "True"], done.stderr
