"""Tables of experts by token id, from a released model into a router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_jax.configs import common
from safetensors.numpy import save_file

from moe_jax.cli import common as commands
from moe_jax.cli import tables
from moe_jax.config.schema import build
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import save_token_tables, token_tables
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.mode import Mode

V, E, K = 11, 6, 2
TABLES = [
    np.stack([np.random.default_rng(100 * layer + i).permutation(E)[:K] for i in range(V)])
    for layer in range(2)
]


def write(folder, **tensors):
    usual = {
        "model.layers.0.ffn.gate.tid2eid": TABLES[0],
        "layers.1.ffn.gate.tid2eid": TABLES[1].astype(np.int32),
        "model.layers.2.ffn.gate.weight": np.ones((E, 4), np.float32),
    }
    save_file(tensors or usual, folder / "model.safetensors")


def test_the_tables_of_all_hash_layers_are_read(tmp_path):
    write(tmp_path)
    found = token_tables(tmp_path)
    assert list(found) == [0, 1] and {one.dtype for one in found.values()} == {np.dtype(np.int32)}
    for layer, table in found.items():
        np.testing.assert_array_equal(table, TABLES[layer])


def test_the_command_writes_files_by_which_layers_route(tmp_path, capsys):
    write(tmp_path)
    out = tmp_path / "tables"
    flags = ["tables", f"--input={tmp_path}", f"--output={out}"]
    commands.run(tables.define, tables.main, flags)
    line = f"layer 1: {out}/layer_1.npy has 2 experts for each of 11 token ids"
    assert line in capsys.readouterr().out
    # The first two of three layers read a table each, the third routes as DeepSeek-V4.
    moe = {"every": 1, "num_experts": E, "expert_dim": 4, "group_size": 4}
    moe["router"] = common.router("deepseek_v4", k=K)
    moe["overrides"] = [
        {
            "layers": (layer,),
            "router": common.router("deepseek_v4_hash", k=K, table=f"{out}/layer_{layer}.npy"),
        }
        for layer in range(2)
    ]
    sizes = {"num_layers": 3, "width": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 8}
    model = Decoder(build(DecoderConfig, {**sizes, "moe": moe}), V, jax.random.key(0))
    ids = jnp.arange(V)[None]
    run = jax.jit(
        lambda m: m.hidden(ids, jnp.ones_like(ids), ids, mode=Mode("full", record=True))[1]
    )
    reports = run(model)
    for layer, table in enumerate(TABLES):
        chosen = np.sort(np.asarray(reports[layer].choices)[0], axis=1)
        np.testing.assert_array_equal(chosen, np.sort(table, axis=1))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.gate.weight": np.ones(2, np.float32)}, "has no tensor layers.*.tid2eid"),
        ({"layers.0.tid2eid": np.ones((2, 2), np.float32)}, "store it as int32 or int64"),
        ({"layers.0.tid2eid": np.arange(4)}, r"has shape \(4,\), but a table has \(V, K\)"),
        ({"layers.0.tid2eid": np.array([[0, -1]])}, "experts from 0"),
        ({"layers.0.tid2eid": np.array([[0, 1], [3, 3]])}, "an expert twice for token id 1"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, tensors, message):
    write(tmp_path, **tensors)
    with pytest.raises(ConfigError, match=message):
        save_token_tables(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_named(tmp_path, capsys):
    flags = ["tables", f"--input={tmp_path}/none", f"--output={tmp_path}/out"]
    with pytest.raises(SystemExit):
        commands.run(tables.define, tables.main, flags)
    assert f"--input={tmp_path}/none is not a folder" in capsys.readouterr().err
