"""The command that makes a routing table, and commands that read it."""

import json

import jax
import numpy as np
import pytest

from moe_jax import models, routing
from moe_jax.analysis.observed import Observed, ObservedLayer
from moe_jax.analysis.routing_table import RoutingTable
from moe_jax.cli import main
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, save
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.run.tabulating import compared, require_tabulable
from tests.data.test_hf_tokenizer import byte_level
from tests.test_face import TINY_MIXTRAL


def test_the_command_measures_its_table_and_others_read_it(tmp_path, monkeypatch, capsys):
    config = {**TINY_MIXTRAL, "vocab_size": 300}
    model = models.make(FAMILIES["mixtral"].read(config), 300, jax.random.key(0))
    save(model, tmp_path / "model", "mixtral", original=config)
    byte_level(tmp_path / "model")
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + 1\n")

    def ran(*arguments):
        monkeypatch.setattr("sys.argv", ["moe-jax", *map(str, arguments)])
        main.main()
        return json.loads(capsys.readouterr().out)

    table, folder = tmp_path / "table.npz", tmp_path / "model"
    corpus = f"--corpus=files:{tmp_path}/*.txt"
    found = ran("tabulate", folder, corpus, f"--output={table}", "--least=20", "--length=64")
    assert 0 < found["table_ids"] == RoutingTable.load(table).known.sum()
    assert 0.5 < found["covered"] < 1  # Digits of the names are rare.
    assert all(0 < share <= 1 for share in found["agreement"])
    assert found["loss_increase"] == found["loss_with_table"] - found["loss"] != 0

    text = f"--file={tmp_path}/1.txt"
    plain = ran("score", folder, text)
    tabled = ran("score", folder, text, f"--routing_table={table}")
    assert plain["token_ids"] == tabled["token_ids"]
    assert plain["log_likelihood"] != tabled["log_likelihood"]


def test_losses_are_means_over_scored_tokens():
    def observed(losses):
        choices = np.array([[0], [1], [1]])
        layer = ObservedLayer("layer 0", 2, choices, np.ones((3, 1)))
        ids, zeros = np.array([0, 1, 0]), np.zeros(3)
        return Observed(ids, zeros, zeros, np.array(losses), (layer,))

    # Id 0 is in the table with expert 0, which one of its two tokens chose.
    table = RoutingTable(((np.array([[0], [-1]]), np.array([[1.0], [0.0]])),))
    found = compared(observed([1.0, 2.0, np.nan]), observed([2.0, 3.0, np.nan]), table)
    assert found["tokens"] == 3 and found["covered"] == pytest.approx(2 / 3)
    assert found["agreement"] == [0.5]
    assert (found["loss"], found["loss_with_table"], found["loss_increase"]) == (1.5, 2.5, 1.0)


def test_models_whose_routers_read_no_table_are_refused():
    moe = MoEConfig(router=routing.preset("expert_choice"), allow_future_leak=True)
    with pytest.raises(ConfigError, match="no likelihood"):
        require_tabulable(models.DecoderConfig(moe=moe))
    free = MoEConfig(router=routing.preset("zaya"))
    with pytest.raises(ConfigError, match="without free experts"):
        require_tabulable(models.DecoderConfig(moe=free))
