"""Pages by hand: pages of two tokens, of which 1, 2 and 3 are handed out first."""

from moe_jax.serving.pages import Pages


def computed(pages, prompt, tokens):
    """Pages of a request whose prompt is computed."""
    held = pages.take(prompt, tokens)
    held.computed = len(prompt)
    pages.name(held, prompt)
    return held


def test_full_pages_of_a_common_prefix_are_shared():
    pages = Pages(6, 2)
    first = computed(pages, [5, 6, 7, 8, 9], 6)
    assert first.pages == [1, 2, 3] and pages.free == 3
    # The last page of the first request is not full, and the last token is computed anew.
    second = pages.take([5, 6, 7, 8], 5)
    assert second.pages == [1, 4, 5] and second.computed == 2
    third = pages.take([5, 6, 7, 8, 1], 5)
    assert third.pages == [1, 2, 6] and third.computed == 4
    # Tokens 7, 8 are no prefix: a page is named by all tokens before it too.
    assert pages.free == 0 and pages.take([7, 8, 9], 3) is None
    for held in (first, second, third):
        pages.release(held)
    assert pages.free == 6 and pages.take([7, 8, 9], 3).computed == 0


def test_pages_of_a_prefix_are_kept_until_others_are_needed():
    pages = Pages(3, 2)
    pages.release(computed(pages, [5, 6, 7, 8], 4))
    assert pages.free == 3
    # Page 3 was never named and comes first; then the end of the prefix goes before its beginning.
    other = pages.take([1, 1, 1], 4)
    assert sorted(other.pages) == [2, 3]
    kept = pages.take([5, 6, 7, 8], 2)
    assert kept.pages == [1] and kept.computed == 2
    # Idle pages that a request shares are not counted as free for its other pages.
    pages.release(other)
    pages.release(kept)
    assert pages.take([5, 6, 9, 9, 9, 9, 9], 8) is None
    assert pages.free == 3


def test_two_requests_that_computed_one_page_go_on_with_one_name():
    pages = Pages(6, 2)
    first, second = (pages.take([5, 6, 7, 8], 5) for _ in range(2))
    for held in (first, second):
        held.computed = 4
        pages.name(held, [5, 6, 7, 8])
    assert first.pages != second.pages and first.last == second.last
    pages.release(first)
    pages.release(second)
    assert pages.take([5, 6, 7, 8, 9], 5).pages[:2] == first.pages[:2]
