"""The wheel in an empty folder: names of configs and ablations work with no clone beside them."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moe_jax.ablation.catalogue import entries
from moe_jax.config.library import CONFIGS, EXPERIMENTS, short_name
from tests.system.runs import ROOT, environment

SOURCES = {"moe_jax": ROOT / "moe_jax", "configs": CONFIGS, "experiments": EXPERIMENTS}
# The environment of the tests finds a clone by a finder of its own, which a user does not have.
NO_CLONE = """
import sys
finders = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "").lower()]
sys.meta_path[:] = finders
"""
TINY = (
    "--config.data.source=mixture",
    "--config.data.tokenizer=bytes",
    "--config.data.seq_length=32",
    "--config.data.eval_documents=4",
    "--config.data.mixture.document_length=64",
    "--config.data.mixture.num_documents=64",
    "--config.model.num_layers=2",
    "--config.model.width=16",
    "--config.model.mlp_dim=32",
    "--config.model.moe.expert_dim=32",
    "--config.model.moe.group_size=32",
    "--config.training.loss_chunk=0",
    "--config.training.steps=2",
)


def _left_out(folder, names):
    """Caches and links are no part of what is packed."""
    return [name for name in names if name == "__pycache__" or (Path(folder) / name).is_symlink()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the sources; its path."""
    top = tmp_path_factory.mktemp("sources")
    for name, folder in SOURCES.items():
        shutil.copytree(folder, top / name, ignore=_left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, top / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir=dist", "."], cwd=top, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = (top / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Unpacks the wheel as an installation does; the folder."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "sitecustomize.py").write_text(NO_CLONE)
    return folder


@pytest.fixture
def python(installed, tmp_path):
    """A function that runs Python in an empty folder, with the wheel and its dependencies."""

    def run(*arguments):
        settings = environment(1) | {"PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=settings,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_it_holds_package_configs_ablations_and_records(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        about = {Path(name).name: archive.read(name).decode() for name in names if "info/" in name}
    tops = {name.split("/")[0] for name in names}
    assert tops == {"moe_jax", next(top for top in tops if top.endswith(".dist-info"))}
    for name in (
        "moe_jax/py.typed",
        "moe_jax/ablation/index.html.j2",
        "moe_jax/analysis/report.html.j2",
        "moe_jax/configs/quickstart.py",
        "moe_jax/configs/published/mixtral_8x7b.py",
        "moe_jax/configs/published/glam_0.1b.py",
        "moe_jax/experiments/switch/capacity_factor.py",
    ):
        assert name in names
    results = [name for name in names if "results/" in name]
    assert "moe_jax/experiments/results/deepseek_bake_off/results.jsonl" in results
    assert {Path(name).name for name in results} == {"results.jsonl"}
    assert "moe-jax = moe_jax.cli.main:main" in about["entry_points.txt"]
    # Every file that is no module is one of these, so that no glob packs what nobody reads.
    data = {Path(name).suffix for name in names if name.startswith("moe_jax/")}
    assert data == {".py", ".typed", ".j2", ".json", ".jsonl"}


def test_every_module_of_the_sources_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    for name, folder in SOURCES.items():
        inside = "moe_jax" if name == "moe_jax" else f"moe_jax/{name}"
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder)
            if not any((folder / parent).is_symlink() for parent in parts.parents):
                assert f"{inside}/{parts.as_posix()}" in packed


def test_a_published_model_is_counted_by_name(python, installed):
    code = "import moe_jax, moe_jax.configs as c; print(moe_jax.__file__, c.__path__[0])"
    assert all(word.startswith(str(installed)) for word in python("-c", code).split())
    found = json.loads(python("-m", "moe_jax", "count", "mixtral_8x7b"))
    assert found["name"] == "mixtral_8x7b" and round(found["total"] / 1e9, 1) == 46.7


def test_all_published_models_are_counted(python):
    table = python("-m", "moe_jax", "count", "--all")
    for path in (CONFIGS / "published").glob("[!_]*.py"):
        assert f"| `{path.stem}` |" in table


def test_a_config_by_name_trains(python, tmp_path):
    python("-m", "moe_jax", "train", "--config=quickstart", "--workdir=runs/q", *TINY)
    assert os.listdir(tmp_path) == ["runs"]
    code = """
import moe_jax as mj
run = mj.open_run("runs/q")
print(run.step, run.evaluate()["loss"] == run.result["loss"], run.report.exists())
"""
    assert python("-c", code).split() == ["2", "True", "True"]


def test_a_file_of_ones_own_may_start_from_a_published_model(python, tmp_path):
    (tmp_path / "mine.py").write_text("""
from moe_jax.configs.published import mixtral_8x7b


def get_config():
    config = mixtral_8x7b.get_config()
    config.name = "mine"
    config.model.moe.num_experts = 16
    return config
""")
    found = json.loads(python("-m", "moe_jax", "count", "mine.py"))
    assert found["name"] == "mine" and found["total"] > 80e9
    assert json.loads(python("-m", "moe_jax", "count", f"--config={tmp_path}/mine.py")) == found


def test_every_ablation_is_there_by_name(python):
    files = [EXPERIMENTS.parent / entry.file for entry in entries()]
    names = [short_name(file) for file in files]
    assert "switch/capacity_factor" in names
    code = """
import sys
from moe_jax.cli.main import main
for name in sys.argv[1:]:
    sys.argv = ["moe-jax", "ablate", name, "--dry-run"]
    main()
"""
    assert python("-c", code, *names).count(" to train, about ") == len(names)
