from pathlib import Path

from tools.mutations import ROOT, given


def test_every_given_mutation_fits_the_code():
    # Each old text occurs exactly once, else ``given`` ends the command with the file and the text.
    assert len(list(given(Path(ROOT) / "tools" / "holes.tsv"))) > 20
