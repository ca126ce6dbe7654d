import types

import pytest

from tests.system import runs

# On eight devices with a router that carries a bias from step to step, looking ahead.
_SETTINGS = {
    1: (),
    8: (
        "--config.mesh.data=4",
        "--config.mesh.expert=2",
        "--config.model.moe.router.preset=loss_free",
        "--config.model.moe.router.k=2",
        "--config.model.lookahead=1",
    ),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The flag that names a small corpus."""
    return f"--config.data.source={runs.write_text(tmp_path_factory.mktemp('corpus') / 'text')}"


@pytest.fixture(scope="session")
def whole(source, tmp_path_factory):
    """A function that returns the uninterrupted run on so many devices; each is trained once."""
    made = {}

    def run(devices=1):
        if devices not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            flags = (runs.CONFIG, source, *_SETTINGS[devices])
            done = runs.train(folder, *flags, devices=devices)
            made[devices] = types.SimpleNamespace(folder=folder, flags=flags, stdout=done.stdout)
        return made[devices]

    return run
