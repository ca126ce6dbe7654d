"""The page of the endpoint in a browser: a message, the answer as it comes, and the load."""

import pytest

from moe_jax.serving.stream import StreamState
from tests import browser
from tests.serving.test_app import site

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'moe_jax[browser]'")
expect = playwright.expect


@pytest.mark.parametrize(("width", "scheme"), zip(browser.WIDTHS, browser.SCHEMES, strict=True))
def test_an_answer_streams_and_the_bars_move(width, scheme):
    with (
        browser.started() as chromium,
        site("été ", most=4) as served,
        browser.opened(chromium, served.url, width, scheme) as page,
    ):
        served.generator.gate.clear()
        page.fill("#text", "hello")
        page.fill("#tokens", "12")
        page.click("#send")
        served.until(lambda: served.generator.seen)
        assert page.locator(".user").inner_text() == "hello"
        assert page.locator(".assistant").inner_text() == "" and page.is_enabled("#stop")
        served.generator.gate.set()
        # Six bytes are one word.
        expect(page.locator(".assistant")).to_have_text("été été")
        expect(page.locator("#stop")).to_be_disabled()
        bars = page.locator(".layer i")
        assert bars.count() == 4 and bars.first.get_attribute("title") == "expert 0: 3"
        served.generator.load = ((5, 1), (0, 4))
        expect(bars.first).to_have_attribute("title", "expert 0: 5")
        sizes = [bar.bounding_box()["height"] for bar in bars.all()]
        assert sizes[0] > 4 * sizes[1] and sizes[3] > 4 * sizes[2]
        assert page.locator("#alarms").is_hidden()
        served.generator.stream = StreamState(alarms={"Drift": {"1": "drift of the data"}})
        expect(page.locator("#alarms")).to_have_text("Drift in layer 1: drift of the data")
        browser.check_layout(page)
        page.click("#clear")
        assert page.locator(".message").count() == 0


def test_a_refused_message_is_shown():
    with (
        browser.started() as chromium,
        site(api_key="secret") as served,
        browser.opened(chromium, served.url, log="401") as page,
    ):
        page.fill("#text", "hello")
        page.click("#send")
        expect(page.locator(".error")).to_contain_text("the API key is missing")
        page.fill("#key", "secret")
        page.fill("#text", "hello")
        page.fill("#tokens", "3")
        page.click("#send")
        expect(page.locator(".assistant").last).to_have_text("ét")
