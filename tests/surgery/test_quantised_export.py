"""A quantised run as a folder of ``transformers``, whose weights are those of the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax as mj
from moe_jax.surgery.quantising import quantise
from tests.run import test_exported
from tests.run.test_exported import convert_with

run = test_exported.run  # the fixture: a tiny Mixtral with drawn weights


@pytest.fixture(scope="module")
def four_bits(run):
    """The run in int4."""
    folder = run.folder.with_name("int4")
    quantise(run.folder, folder, bits="int4", group=8, batches=1)
    return folder


def tokens():
    return np.random.default_rng(0).integers(0, 200, (2, 8))


@pytest.mark.parametrize(("dtype", "round_off"), [("float32", 0), ("bfloat16", 2**-8)])
def test_the_weights_of_the_codes_are_converted(run, four_bits, tmp_path, dtype, round_off):
    convert_with(
        f"--input={four_bits}",
        f"--output={tmp_path / 'hf'}",
        "--family=mixtral",
        f"--dtype={dtype}",
    )
    found = mj.load_hf(tmp_path / "hf").model.layers
    wanted = mj.open_run(four_bits).model.layers
    differences = jax.tree.map(
        lambda x, y: float(jnp.abs(x - y).max() / jnp.abs(y).max()), found, wanted
    )
    assert max(jax.tree.leaves(differences)) <= round_off
    # The codes are another model than the run before.
    before = mj.open_run(run.folder).model.layers
    changed = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), found, before)
    assert max(jax.tree.leaves(changed)) > 1e-3


def test_transformers_computes_the_logits_of_the_quantised_run(four_bits, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
    transformers = pytest.importorskip("transformers", reason="run `make parity`")
    convert_with(f"--input={four_bits}", f"--output={tmp_path / 'hf'}", "--family=mixtral")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens())).logits.numpy()
    ours = mj.load_hf(tmp_path / "hf").logits(tokens())
    own = mj.open_run(four_bits)
    np.testing.assert_allclose(theirs, ours, atol=2e-4, rtol=2e-4)
    np.testing.assert_array_equal(
        own.model.embedding.table[...], mj.load_hf(tmp_path / "hf").model.embedding.table[...]
    )
