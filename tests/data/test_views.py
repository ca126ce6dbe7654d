import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data.views import FirstDocuments, HeldOut, Joined, held_out


class Texts:
    """Documents in memory; the domain of a document is its number."""

    size = 100

    def __init__(self, *texts):
        self.texts, self.identity = texts, repr(texts)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.texts[index]

    def domain(self, index):
        return index


def read(source):
    return [(source[i], source.domain(i)) for i in range(len(source))]


def test_held_out_numbers_by_hand():
    assert held_out(100, 20).tolist() == [10, 30, 50, 70, 90]
    # Two of ten are the middles of two halves: 2.5 and 7.5, rounded down.
    assert held_out(10, 5).tolist() == [2, 7]
    assert held_out(3, 20).tolist() == [1]


@given(count=st.integers(2, 300), one_in=st.integers(2, 40))
def test_each_document_is_on_one_side(count, one_in):
    source = Texts(*map(str, range(count)))
    held, kept = (read(HeldOut(source, one_in, side)) for side in (True, False))
    assert len(held) == max(1, count // one_in)
    assert sorted(held + kept, key=lambda pair: pair[1]) == read(source)
    assert kept == sorted(kept, key=lambda pair: pair[1])
    assert np.diff([number for _, number in held], prepend=-1, append=count).max() < 2 * one_in + 2


def test_sides_have_names_and_sizes_of_their_own():
    source = Texts(*"abcd")
    held, kept = HeldOut(source, 2, True), HeldOut(source, 2, False)
    assert held.identity != kept.identity
    assert (held.size, kept.size, FirstDocuments(source, 1).size) == (50, 50, 100)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            held[index]


def test_joined_sources_follow_each_other():
    source = Joined((Texts("a", "b"), Texts(), Texts("c")))
    assert read(source) == [("a", 0), ("b", 1), ("c", 0)]
    assert source.size == 300
    numbered = Joined(source.sources, numbered=True)
    assert read(numbered) == [("a", 0), ("b", 0), ("c", 2)]
    with pytest.raises(IndexError):
        source[3]
