"""The committed plans are of the configurations that are here, and the page shows them."""

import json
from pathlib import Path

import pytest

from moe_jax.counting.published import load
from moe_jax.planning import topology
from moe_jax.planning.expected import EXCHANGES
from tools.plans import DECODE_PLANS, PLANS, comparison, decoding_table, table

FOLDER = Path("experiments/results/plans")
# Bytes of a token in the cache of a device, in bfloat16, by the size of the axis ``model``.
_ENTRY = {
    # A key and a value of 8 heads of 128 in 32 layers; the axis splits the heads.
    "mixtral_8x7b": lambda model: 32 * 2 * 8 * 128 * 2 // model,
    # A latent of 512 and a rotated key of 64, which all heads of a layer read, in 61 layers.
    "deepseek_v3": lambda model: 61 * (512 + 64) * 2,
}


@pytest.mark.parametrize("planned", PLANS, ids=lambda planned: planned.name)
def test_a_plan_is_of_its_configuration_and_its_machine(planned):
    found = json.loads((FOLDER / f"{planned.name}.json").read_text())
    counted = load(Path(f"configs/published/{planned.config}.py")).record()
    assert found["arguments"] == planned.arguments
    assert found["parameters"] == counted["total"] + counted["lookahead"]
    assert found["sources"] == list(topology.parse(planned.topology).chip.sources)
    assert found["devices"] == topology.parse(planned.topology).num_devices
    assert found["planning"]["peak_bytes"] < 20 * 2**30


@pytest.mark.parametrize("planned", PLANS, ids=lambda planned: planned.name)
def test_it_fits_and_computes_no_more_than_the_model_needs(planned):
    found = json.loads((FOLDER / f"{planned.name}.json").read_text())
    assert found["fits"]
    assert found["compiled_flops"]["of_needed"] <= 1.1


@pytest.mark.parametrize(
    "planned", [one for one in PLANS if "expert=" in one.mesh], ids=lambda planned: planned.name
)
def test_the_formula_of_the_exchange_holds_for_tpu_programs(planned):
    found = json.loads((FOLDER / f"{planned.name}.json").read_text())
    experiment = load(Path(f"configs/published/{planned.config}.py")).experiment()
    # Of a float32 model, XLA sends half of the exchanges in bfloat16 (docs/plans.md).
    share = 0.75 if experiment.model.compute_dtype == "float32" else 1

    def of_experts(records):
        return [record for record in records if record["axes"] == ["expert"]]

    needed = {record["kind"] for record in of_experts(found["expected_collectives"])}
    kinds = needed & set(EXCHANGES.values())

    def exchanged(records):
        return sum(record["bytes"] for record in of_experts(records) if record["kind"] in kinds)

    expected = exchanged(found["expected_collectives"])
    assert expected > 0
    assert exchanged(found["collectives"]) == pytest.approx(expected * share, rel=0.01)


@pytest.mark.parametrize("planned", DECODE_PLANS, ids=lambda planned: planned.name)
def test_a_plan_of_decoding_fits_beside_its_cache(planned):
    found = json.loads((FOLDER / f"{planned.name}.json").read_text())
    batch, context = planned.requests
    memory, bound = found["bytes_per_device"], found["roofline"]
    assert found["arguments"] == planned.arguments
    assert found["fits"]
    assert found["devices"] == topology.parse(planned.topology).num_devices
    entry = _ENTRY[planned.config](found["mesh"]["model"])
    assert memory["cache"] == entry * (batch * context + 16)
    # A program that copied the pages would have temporaries of their size.
    assert memory["temporaries"] < memory["cache"] / 2
    assert bound["tokens_per_second"] == pytest.approx(batch / bound["step_seconds"])


def test_the_page_shows_them():
    page = Path("docs/plans.md").read_text()
    assert table(FOLDER) in page
    assert comparison(FOLDER) in page
    assert decoding_table(FOLDER) in page
