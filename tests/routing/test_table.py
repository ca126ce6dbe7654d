"""The page of routers is what the presets say."""

from pathlib import Path

from moe_jax.routing import PRESETS, table

PAGE = Path(__file__).parents[2] / "docs" / "routers.md"


def test_the_page_is_up_to_date():
    message = "run: python -m moe_jax.routing.table > docs/routers.md"
    assert PAGE.read_text() == table.table(), message


def test_every_preset_has_a_row_with_every_column():
    rows = [line for line in table.table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(PRESETS)
    for line, function in zip(rows, PRESETS, strict=True):
        assert line.startswith(f"| `{function.__name__}` |")
        assert line.count(" | ") == len(table.COLUMNS) - 1


def test_cells_show_what_is_not_default():
    # One published router in full, as a reader finds it.
    cells = table.row({function.__name__: function for function in PRESETS}["deepseek_v3"])
    assert cells[1:6] == (
        "`Sigmoid()`",
        "`TopK(k=8, normalize=True, scale=2.5, rank=Bias(), "
        "limit=Limit(groups=8, keep=4, by='top2'))`",
        "`LoadBalance(weight=0.0001, choices='mean', per_token=True, span='sequence')`",
        "`Capacity(dropless='always')`",
        "2.5 * score / sum over the chosen",
    )
