"""Upcycled runs, students and runs with taken experts: they generate a text and are converted."""

import jax
import numpy as np
import pytest

import moe_jax as mj
from moe_jax.cli import common, generate
from moe_jax.surgery.weights import LayerWeights
from tests.run import test_exported
from tests.run.test_exported import convert_with

run = test_exported.run  # the fixture: a tiny Mixtral with drawn weights


@pytest.fixture(scope="module")
def source(run):
    """A run of the same function at step 0, which may be a teacher."""
    folder = run.folder.with_name("source")
    mj.grow(run.folder, folder, parts=2)
    return folder


def upcycled(run, out):
    """A mixture of copies of the dense student of a run."""
    student = out.with_name("dense")
    mj.distil(run, student, experts=1, batches=1)
    return mj.upcycle(student, out, experts=2)


CHANGES = {
    "upcycle": upcycled,
    "distil": lambda run, out: mj.distil(run, out, experts=5, student="mixture", batches=1),
    "take": lambda run, out: mj.take_experts(run, out, other=run, experts=[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_generates_a_text_and_is_converted(source, tmp_path, change, capsys):
    out, hf = tmp_path / "out", tmp_path / "hf"
    made = CHANGES[change](source, out)
    opened = mj.open_run(out)
    text = opened.generate("abc", tokens=4, temperature=0.0)
    capsys.readouterr()
    flags = (f"--workdir={out}", "--prompt=abc", "--tokens=4", "--temperature=0")
    common.run(generate.define, generate.main, ["generate", *flags])
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    convert_with(f"--input={out}", f"--output={hf}", "--family=mixtral")
    loaded = mj.load_hf(hf)
    assert loaded.config.moe.num_experts == next(iter(made.experts.values()))
    wanted, found = (LayerWeights.of_model(one.model).arrays for one in (opened, loaded))
    jax.tree.map(np.testing.assert_array_equal, dict(wanted), dict(found))
