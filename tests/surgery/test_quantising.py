"""Quantised folders: runs that generate, evaluate and train on, and released models."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

import moe_jax as mj
from moe_jax import signals
from moe_jax.cli import convert
from moe_jax.cli import quantise as command
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, native
from moe_jax.interop.huggingface import load
from moe_jax.quantised.packed import FILE, NOTE, PackedFile
from moe_jax.run.exported import checkpoint_of
from moe_jax.surgery import quantising
from moe_jax.surgery.api import prune
from moe_jax.surgery.quantising import quantise
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.saved_arrays import named
from tests.parity.compare_models import recorded
from tests.surgery.test_api import SMALL, add_tokenizer, files_of

KEPT = ("router/", "norm/", "attention/", "embedding/")


def types_of(saved):
    """The type of each array in a checkpoint, by name."""
    return {name: np.dtype(leaf.dtype).name for name, leaf in named(saved).items()}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A trained run of four experts per layer, which keeps an average of its parameters."""
    folder = tmp_path_factory.mktemp("runs") / "sparse"
    more = {"model.moe.num_experts": 4, "model.moe.expert_dim": 24, "optimizer.ema_decay": 0.9}
    mj.train("quickstart", folder, overrides={**SMALL, **more})
    return folder


@pytest.fixture(scope="module")
def four_bits(sparse):
    """The run in int4 with factors from its validation set."""
    folder = sparse.with_name("int4")
    before = files_of(sparse)
    found = quantise(
        sparse,
        folder,
        bits="int4",
        group=8,
        calibration="validation",
        overrides={"training.steps": 2},
    )
    assert files_of(sparse) == before and found.kind == "run"
    return found


def test_a_quantised_run_holds_codes_and_goes_on(sparse, four_bits, tmp_path):
    step = four_bits.folder / "checkpoints" / "0"
    tensors = load_file(step / FILE)
    assert sum(tensor.nbytes for tensor in tensors.values()) == four_bits.expert_bytes[1]
    run, source = mj.open_run(four_bits.folder), mj.open_run(sparse)
    assert run.step == 0 and run.evaluate()["loss"] == pytest.approx(
        source.evaluate()["loss"], abs=0.05
    )
    assert len(run.generate("abc", tokens=3)) > 3
    # Parameters and their average are both the weights of the codes.
    file = PackedFile(step)
    experts = [name for name in file.leaves if name.startswith("params/")]
    assert experts and len(file.leaves) == 2 * len(experts)
    pruned = prune(four_bits.folder, tmp_path / "pruned", experts=3, batches=1)
    assert set(pruned.experts.values()) == {3} and not (tmp_path / "pruned" / FILE).exists()
    assert mj.train(run.config, four_bits.folder).step == 2
    assert not (four_bits.folder / "checkpoints" / "2" / FILE).exists()


def test_routers_and_norms_of_a_run_are_stored_in_float32(four_bits):
    path = four_bits.folder / "checkpoints" / "0"
    types = types_of(ocp.metadata(path, checkpointable_name="state").metadata)
    stored = [name for name in types if name.startswith("params/")]
    # The only weights of the experts are codes.
    assert not any("/experts/" in name for name in stored)
    assert {part for name in stored for part in KEPT if part in name} == set(KEPT)
    assert {types[name] for name in stored} == {"float32"}


def test_the_report_has_size_and_error(sparse, tmp_path):
    small = quantise(sparse, tmp_path / "int8", bits="int8", batches=1)
    before, after = small.expert_bytes
    assert before > 3 * after and small.model_bytes[0] - small.model_bytes[1] == before - after
    assert 0 < small.difference.logits_error < 0.02
    assert f"4 experts in int8 of {after:,} bytes (before: {before:,})" in str(small)
    assert "relative error of the logits" in str(small) and "bits per byte" in str(small)
    # The whole validation set: an evaluation drops 2 of 260 choices, and the comparison none.
    whole = quantise(sparse, tmp_path / "whole", bits="int8", batches=10**6).difference
    bits = [mj.open_run(of).evaluate()["bits_per_byte"] for of in (sparse, tmp_path / "whole")]
    assert whole.bits_per_byte == pytest.approx(bits, rel=2e-4)


def test_a_budget_mixes_precisions(sparse, tmp_path):
    small, large = (quantise(sparse, tmp_path / b, bits=b, batches=1) for b in ("int4", "int8"))
    budget = (small.expert_bytes[1] + large.expert_bytes[1]) // 2
    found = quantise(sparse, tmp_path / "mixed", bits="int8", budget=budget, batches=1)
    chosen = [precision for of in found.precisions.values() for precision in of]
    assert set(chosen) == {"int4", "int8"} and found.expert_bytes[1] <= budget
    tensors = load_file(tmp_path / "mixed" / "checkpoints" / "0" / FILE)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= budget
    errors = [one.difference.logits_error for one in (large, found, small)]
    assert errors[0] < errors[1] < errors[2]
    assert np.isfinite(mj.open_run(tmp_path / "mixed").evaluate()["loss"])


@pytest.mark.parametrize(
    "write", ["training.checkpoint.Checkpoints.save", "surgery.destination.add_packed"]
)
def test_a_stopped_write_leaves_nothing(sparse, tmp_path, monkeypatch, write):
    def stopped(*_, **__):
        raise signals.Interrupted(2)

    monkeypatch.setattr(f"moe_jax.{write}", stopped)
    with pytest.raises(signals.Interrupted):
        quantise(sparse, tmp_path / "out", bits="int8", batches=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": "int3"}, "bits='int3' is none of"),
        ({"bits": "int8", "group": 5}, "group=5 does not divide"),
        ({"bits": "int8", "budget": 10, "calibration": "missing"}, "budget=10 bytes is below the"),
        (
            {"bits": "int8", "calibration": "missing", "overrides": {"model.width": 8}},
            "these settings change the parameters of the model",
        ),
        ({"bits": "int4", "budget": 10**6}, "bits='int4' leaves no choice"),
        ({"bits": "int8", "family": "mixtral"}, "leave --family out"),
        ({"bits": "int8", "file": "missing.txt"}, "missing.txt"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(sparse, tmp_path, settings, match):
    with pytest.raises((ConfigError, OSError), match=match) as error:
        quantise(sparse, tmp_path / "out", **settings)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_missing_text_is_found_before_codes_are_computed(tmp_path, monkeypatch):
    def unexpected(*args, **options):
        raise AssertionError

    monkeypatch.setattr(quantising, "quantised", unexpected)
    folder = folder_of("mixtral", tmp_path / "hf")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        quantise(folder, tmp_path / "out", bits="int8", file="missing.txt")
    add_tokenizer(folder)
    with pytest.raises((ConfigError, OSError), match="missing.txt"):
        quantise(folder, tmp_path / "out", bits="int8", file="missing.txt")


def folder_of(case, path):
    path.mkdir()
    recorded(case, path)
    return path


@pytest.mark.parametrize(
    "case", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "switch_transformers"]
)
def test_a_released_model_becomes_a_converted_one(case, tmp_path):
    source = folder_of(case, tmp_path / "hf")
    small = quantise(source, tmp_path / "int8", bits="int8")
    assert small.kind == "moe_jax" and small.difference is None
    assert "without a text" in str(small)
    one, other = load(source), native.load(tmp_path / "int8")
    assert (other.family, other.config) == (one.family, one.config)
    before, after = (LayerWeights.of_model(m.model).arrays for m in (one, other))
    packed = {n for of in PackedFile(tmp_path / "int8")._leaves.values() for n in np.atleast_1d(of)}
    assert packed and before.keys() == after.keys()
    for name, array in before.items():
        difference = np.abs(np.asarray(array) - np.asarray(after[name])).max()
        assert (difference > 0) == (name in packed), name
        assert difference <= np.abs(array).max() / 127.5 / 2 * 1.0001 or name not in packed
    types = types_of(ocp.pytree_metadata((tmp_path / "int8" / "parameters").absolute()).metadata)
    assert any("router" in name for name in types) and any("norm" in name for name in types)
    assert set(types.values()) == {"float32"}


def test_a_family_gives_a_folder_of_transformers(tmp_path):
    source = folder_of("mixtral", tmp_path / "hf")
    quantise(source, tmp_path / "codes", bits="int4")
    small = quantise(source, tmp_path / "plain", bits="int4", family="mixtral")
    assert small.kind == "hf" and "holds the weights of the codes" in str(small)
    one, other = (
        LayerWeights.of_model(m.model).arrays
        for m in (native.load(tmp_path / "codes"), load(tmp_path / "plain"))
    )
    jax.tree.map(np.testing.assert_array_equal, dict(one), dict(other))
    for folder in (tmp_path / "codes", tmp_path / "plain"):
        with pytest.raises(ConfigError, match="holds quantised weights already") as error:
            quantise(folder, tmp_path / "again", bits="int8")
        assert "\n" not in str(error.value)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="holds quantised weights already"):
        quantise(source, tmp_path / "again", bits="int8")
    with pytest.raises(ConfigError, match="llama cannot express"):
        quantise(
            folder_of("qwen3_moe", tmp_path / "q"), tmp_path / "x", bits="int8", family="llama"
        )
    assert not (tmp_path / "again").exists() and folders.kind_of(tmp_path / "plain") == "hf"


def test_a_text_calibrates_a_released_model(tmp_path):
    source = folder_of("mixtral", tmp_path / "hf")
    with pytest.raises(ConfigError, match="has no validation set: give a text"):
        quantise(source, tmp_path / "out", bits="int8", budget=10**6)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        quantise(source, tmp_path / "out", bits="int8", calibration=__file__)
    assert not (tmp_path / "out").exists()
    add_tokenizer(source)
    (tmp_path / "text.txt").write_text("experts and routers of a mixture" * 20)
    text = str(tmp_path / "text.txt")
    small = quantise(source, tmp_path / "out", bits="int4", calibration=text, batches=1)
    assert 0 < small.difference.logits_error < 1 and small.kind == "moe_jax"
    tensors = load_file(tmp_path / "out" / FILE)
    assert any((tensors[name] != 1).any() for name in tensors if name.endswith("factors"))


def test_a_quantised_run_is_not_quantised_again(four_bits, tmp_path):
    with pytest.raises(ConfigError, match="holds quantised weights already"):
        quantise(four_bits.folder, tmp_path / "again", bits="int8", step=0)


def converted(source, output, *arguments):
    values = flags.FlagValues()
    convert.define(values)
    values(["convert", f"--input={source}", f"--output={output}", *arguments])
    convert.main(values)
    return output


def test_a_converted_model_remembers_that_its_weights_are_those_of_codes(four_bits, tmp_path):
    released = folder_of("mixtral", tmp_path / "hf")
    quantise(released, tmp_path / "codes", bits="int4")
    out = converted(tmp_path / "codes", tmp_path / "a", "--from=moe_jax", "--family=mixtral")
    back = converted(out, tmp_path / "b", "--from=hf")
    ran = PackedFile(checkpoint_of(four_bits.folder)).summary()
    for counts in (ran, *(json.loads((folder / NOTE).read_text()) for folder in (out, back))):
        assert counts and all(set(of) == {"int4"} for of in counts.values())
    for folder in (out, back):
        with pytest.raises(ConfigError, match="holds quantised weights already"):
            quantise(folder, tmp_path / "again", bits="int8")
    plain = converted(released, tmp_path / "d", "--from=hf")
    assert not (plain / NOTE).exists() and quantise(plain, tmp_path / "e", bits="int8").folder


def test_the_command_reads_its_flags(tmp_path, capsys):
    source = folder_of("mixtral", tmp_path / "hf")
    values = flags.FlagValues()
    command.define(values)
    values(["quantise", f"--input={source}", f"--output={tmp_path / 'out'}", "--bits=fp8"])
    command.main(values)
    assert "10 experts in fp8 of" in capsys.readouterr().out
