"""What ``--over`` means, and what it refuses."""

import pytest

from moe_jax.errors import ConfigError
from moe_jax.sweeps.axes import Axis, axes_of, axis_of, grid, name_of, settings_of


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("1e-3,3e-3", ("1e-3", "3e-3")),
        ("1e-3, 3e-3", ("1e-3", "3e-3")),
        ("0..3", ("0", "1", "2", "3")),
        ("7..7", ("7",)),
        ("AdamW,Lion", ("AdamW", "Lion")),
        # A list is one value: commas inside its brackets separate nothing.
        ("(0, 2),(1, 3)", ("(0, 2)", "(1, 3)")),
        # A path may have a colon, and a single value is a list of one.
        ("files:a/*.txt", ("files:a/*.txt",)),
    ],
)
def test_values_of_a_text(text, texts):
    assert axis_of("x", text) == Axis("x", texts)


@pytest.mark.parametrize(
    ("text", "log"), [("1e-4:1e-2", False), ("1e-4:1e-2:log", True), ("2:64:log", True)]
)
def test_ranges_of_a_text(text, log):
    low, high = text.removesuffix(":log").split(":")
    assert axis_of("x", text) == Axis("x", (low, high), is_range=True, log=log)


def test_python_values_are_texts():
    found = axes_of({"a": [1e-3, 0.5], "b": range(2), "c": [True], "d": "1:2"})
    assert [axis.texts for axis in found] == [("0.001", "0.5"), ("0", "1"), ("True",), ("1", "2")]
    assert [axis.is_range for axis in found] == [False, False, False, True]


def test_the_grid_has_every_combination_and_the_last_axis_changes_first():
    axes = axes_of(["a=1,2", "seed=0,1"])
    assert [tuple(point.values()) for point in grid(axes)] == [
        ("1", "0"),
        ("1", "1"),
        ("2", "0"),
        ("2", "1"),
    ]


def test_a_seed_is_the_seed_of_weights_and_data():
    point = {"optimizer.learning_rate": "0.1", "seed": "3"}
    assert settings_of(point) == {
        "optimizer.learning_rate": "0.1",
        "training.seed": "3",
        "data.seed": "3",
    }


def test_a_folder_is_named_by_its_point():
    assert name_of({"a.b": "1e-3", "seed": "0"}) == "a.b=1e-3,seed=0"
    # A name that cannot be a folder, or is too long for one, ends in a hash of the whole.
    slashes = [name_of({"data.source": f"files:/{letter}/*.txt"}) for letter in "ab"]
    assert all("/" not in name and "*" not in name for name in slashes)
    long = [name_of({"a": "x" * 300 + letter}) for letter in "ab"]
    assert all(len(name) < 140 for name in long)
    assert len({*slashes, *long}) == 4


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ([], "try --over seed=0..3"),
        (["seed"], "--over seed is not NAME=VALUES"),
        (["a="], "is not NAME=VALUES"),
        (["a=1,,2"], "--over a has an empty value"),
        ({"a": []}, "--over a has an empty value"),
        (["a=1,2,1"], "--over a has the value 1 twice"),
        (["a=3..1"], "--over a has an empty value"),
        (["a=2:1"], "--over a=2:1 is an empty range"),
        (["a=0:1:log"], "needs a lower end above 0"),
        (["seed=1,2", "training.seed=3"], "two --over change training.seed"),
    ],
)
def test_a_wrong_axis_is_one_line(over, said):
    with pytest.raises(ConfigError) as error:
        axes_of(over)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_grid_has_no_ranges():
    with pytest.raises(ConfigError, match=r"add --sampler=tpe --trials=20, or list values"):
        list(grid(axes_of(["a=1:2"])))
