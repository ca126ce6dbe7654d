import types

import pytest

from moe_jax.ablation.index import BEGIN, CLAIMS, END, README
from tests.ablation.records import records
from tests.ablation.test_index import ENTRY, write
from tools import index


@pytest.fixture
def folder(tmp_path):
    (tmp_path / CLAIMS).parent.mkdir()
    for page in (README, CLAIMS):
        (tmp_path / page).write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return tmp_path


def test_the_command_writes_and_checks(folder, monkeypatch, capsys):
    write(folder, "tiny", records())
    monkeypatch.setattr(index, "RESULTS", folder)
    monkeypatch.setattr(index, "ROOT", folder)
    monkeypatch.setattr(index, "entries", lambda: [ENTRY])

    def run(check=False, figures=False):
        index.main(types.SimpleNamespace(check=check, figures=figures))
        return capsys.readouterr().out

    with pytest.raises(SystemExit) as stopped:
        run(check=True)
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "README.md, docs/results.md, index.html, tiny/report.md; run python -m" in said
    assert not (folder / "index.html").exists()
    assert "written: index.html" in run(figures=True)
    assert (folder / "tiny" / "overlay.png").exists()
    assert run(check=True) == ""
