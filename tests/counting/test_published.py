"""Every config of a published model is held to what is printed of it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.counting import PublishedNumber
from moe_jax.counting.published import load, load_all, table
from moe_jax.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "configs" / "published"
MODELS = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"}
WANTED = (
    *(f"switch_base_{e}" for e in (8, 16, 32, 64, 128, 256)),
    *("switch_large_128", "switch_xxl_128", "switch_c_2048", "t5_base", "t5_large", "t5_xxl"),
    *("st_moe_base", "st_moe_l", "st_moe_32b", "experts_choose_base", "experts_choose_small"),
    *(f"gshard_{e}e_{layers}l" for e in (128, 512, 2048) for layers in (12, 36)),
    *("glam_0.1b", "glam_1.7b", "glam_8b", "glam_0.1b_64e", "glam_0.1b_128e", "glam_1.7b_32e"),
    *("glam_1.7b_64e", "glam_1.7b_128e", "glam_1.7b_256e", "glam_8b_64e", "glam_64b_64e"),
    *("ec_0.1b_16e", "ec_0.1b_32e", "ec_0.1b_64e", "ec_0.1b_128e", "ec_8b_64e"),
    *(f"fairseq_moe_{size}" for size in ("15b", "52b", "207b", "1.1t")),
    *("fairseq_transformer_moe", "nllb_moe_54b", "moe_xs", "moe_small", "moe_medium"),
    *(f"dsmoe_2b_{router}" for router in ("dense", "hash", "switch", "gshard", "fine")),
    *("olmoe_1b_7b", "olmoe_8e_k1", "olmoe_32e_k4", "olmoe_32e_shared", "olmoe_64e_k8"),
    *("olmoe_dense", "mixtral_8x7b", "dbrx", "deepseek_moe_16b", "deepseek_v2_lite"),
    *("deepseek_v3", "qwen1.5_moe_a2.7b", "qwen3_30b_a3b", "gpt_oss_20b", "gpt_oss_120b"),
    *("llama4_scout", "llama4_maverick", "glm_4.5", "glm_4.5_air", "kimi_k2"),
    *("minimax_m2", "ernie_4.5_21b_a3b", "ernie_4.5_300b_a47b", "dots_llm1", "k_exaone_236b_a23b"),
    *("granite_3.0_1b_a400m", "hunyuan_a13b", "gemma_4_26b_a4b", "flex_olmo_37b"),
    *("trinity_nano", "trinity_mini", "trinity_large", "mistral_small_4"),
    *("qwen3_vl_30b_a3b", "glm_4.5v"),
)


def test_all_are_there():
    assert not set(WANTED) - set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_published_numbers(name: str):
    published = load(MODELS[name])
    assert published.experiment().name == name
    found = published.record()
    for claim in published.claims:
        deviation = claim.deviation(found)
        text = f"{claim.quantity}: {claim.counted(found):,.0f}, printed {claim.value:,.0f}"
        if claim.wrong:
            assert abs(deviation) > claim.within, f"{text} can be reproduced after all"
        else:
            assert abs(deviation) <= claim.within, text
    # Nothing is counted twice and nothing left out.
    assert found["total"] == sum(found["parameters"].values())


@pytest.mark.parametrize("name", ["mixtral_8x7b", "deepseek_v3", "gpt_oss_20b", "llama4_scout"])
def test_released_weights_are_met_to_a_thousandth(name: str):
    claims = [c for c in load(MODELS[name]).claims if c.source.startswith("released")]
    assert claims and all(claim.within <= 1e-3 for claim in claims)


def test_the_committed_table_is_current():
    assert (FOLDER.parents[1] / "docs" / "published.md").read_text() == table(FOLDER)


def test_a_claim_by_hand():
    claim = PublishedNumber("active.no_input_embedding", 200.0, 0.01, "table 1")
    assert claim.deviation({"active": {"no_input_embedding": 203}}) == pytest.approx(0.015)
    assert dataclasses.replace(claim, quantity="total").counted({"total": 7}) == 7


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no config files"):
        list(load_all(tmp_path))
    (tmp_path / "mine.py").write_text("PUBLISHED = ()")
    with pytest.raises(ConfigError, match="mine.py has no get_config"):
        list(load_all(tmp_path))


def test_the_command_prints_one_line():
    command = [sys.executable, "-m", "moe_jax.count", f"--config={MODELS['mixtral_8x7b']}"]
    command.append("--config.model.moe.num_experts=16")
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=FOLDER.parents[1]
    )
    found = json.loads(done.stdout)
    # Eight more experts of three matrices, 4096 x 14336, in 32 layers, and as many router columns.
    more = 32 * 8 * (3 * 4096 * 14336 + 4096)
    assert found["total"] == 46_702_792_704 + more
    assert found["name"] == "mixtral_8x7b"
