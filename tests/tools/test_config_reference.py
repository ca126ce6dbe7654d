"""The reference of the settings says what their dataclasses say."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from moe_jax.ranges import Chance, Positive, Ranged
from tools import config_reference
from tools.config_reference import attributes, kind, page, rendered, sections


@dataclasses.dataclass(frozen=True)
class Leaf(Ranged):
    """A leaf.

    Attributes:
        size: how large
            it is, in ``cm``.
    """

    size: Positive = 3


@dataclasses.dataclass(frozen=True)
class Other(Ranged):
    """A leaf of another kind."""


@dataclasses.dataclass(frozen=True)
class Tree(Ranged):
    """A tree.

    Attributes:
        leaf: its leaf.
        colour: of the bark | wood.
        chance: of falling.
    """

    leaf: Leaf | Other = Leaf()
    colour: Literal["brown", "grey"] = "brown"
    chance: Chance | None = None


def test_the_page_is_up_to_date():
    assert config_reference.PAGE.read_text() == page(), "run python -m tools.config_reference"


def test_every_setting_has_a_meaning():
    missing = [
        f"{section.cls.__name__}.{field.name}"
        for section in sections()
        for field in dataclasses.fields(section.cls)
        if not attributes(section.cls).get(field.name)
    ]
    # The summaries of these classes say what their one or two settings are.
    assert set(missing) <= {
        "Cosine.final",
        "GaussianNoise.std",
        "Linear.final",
        "LinearScaling.factor",
        "Random.k",
    }


def test_classes_that_exclude_each_other_have_a_section_each():
    tree, leaf, other = sections(Tree)
    assert (tree.paths, tree.alternative) == (("",), False)
    assert (leaf.cls, leaf.paths, leaf.alternative) == (Leaf, ("leaf",), True)
    assert other.cls is Other
    assert "## leaf: Leaf { #leaf }" in rendered(leaf)
    assert "| `size` | integer ≥ 1 | `3` | How large it is, in `cm`. |" in rendered(leaf)
    assert rendered(other).endswith("It has no settings.\n")


def test_a_row_has_type_default_and_meaning():
    text = rendered(sections(Tree)[0])
    assert "| `leaf` | [Leaf](#leaf), [Other](#other) | Leaf | Its leaf. |" in text
    assert "| `colour` | `brown`, `grey` | `'brown'` | Of the bark \\| wood. |" in text
    assert "| `chance` | number ≥ 0 and < 1 or `None` | `None` | Of falling. |" in text


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (bool, "`True` or `False`"),
        (str | None, "text or `None`"),
        (tuple[int, ...], "list of integer"),
        (Chance, "number ≥ 0 and < 1"),
    ],
)
def test_types_in_words(hint, words):
    assert kind(hint) == words


def test_check_fails_where_the_page_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config_reference, "PAGE", tmp_path / "config_reference.md")
    monkeypatch.setattr(config_reference, "page", lambda: "text")
    assert config_reference.main(["--check"]) == 1
    assert "run python -m tools.config_reference" in capsys.readouterr().out
    assert config_reference.main([]) == 0
    assert config_reference.main(["--check"]) == 0
