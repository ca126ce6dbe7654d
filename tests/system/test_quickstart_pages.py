"""The quickstart, cut short, is analysed and explained by command; its pages open in a browser."""

from moe_jax.cli import main
from moe_jax.run.api import train
from tests import browser
from tests.system.runs import ROOT

SHORT = {
    "training.steps": 4,
    "optimizer.warmup_steps": 1,
    "training.checkpoint_every": 2,
    "training.keep_last": 2,
    "data.eval_documents": 8,
}
GROUPS = ("code=files:{root}/moe_jax/nn/*.py", "prose=files:{root}/docs/*.md")


def test_the_pages_of_the_quickstart_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("quickstart", tmp_path / "run", SHORT)
    groups = [f"--corpus={group.format(root=ROOT)}" for group in GROUPS]
    analyze = ["analyze", "--model=run", *groups, "--documents=4", "--earlier=2"]
    explain = ["explain", "--model=run", "--prompt=def f(x):\n    return x"]
    for arguments in (analyze, explain):
        monkeypatch.setattr("sys.argv", ["moe-jax", *arguments])
        main.main()
    with browser.started() as chromium:
        for name in ("run/report.html", "analyze.html", "explain.html"):
            browser.check(chromium, tmp_path / name)
        with browser.opened(chromium, (tmp_path / "explain.html").as_uri()) as page:
            page.locator(".cell").first.click()
            assert page.inner_text("#where").startswith("layer 1, token 0: <s>, next ")
            assert page.locator("#choices tr").count() == 3  # The head, one expert, the output.
        with browser.opened(chromium, (tmp_path / "analyze.html").as_uri()) as page:
            assert page.locator("#atlas tr.expert").count() == 2 * 8
            assert page.locator("#maps svg").count() == 4  # One expert per token: two maps a layer.
