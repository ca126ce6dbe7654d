"""Starts a run from a released or converted model, and remembers the model's family."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from moe_jax import data, files
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build, override, settings
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, huggingface, native
from moe_jax.interop.companions import copy_companions
from moe_jax.interop.huggingface.function import function_of
from moe_jax.models import DecoderConfig, EncoderDecoderConfig, ModelConfig
from moe_jax.run import workdir
from moe_jax.training.state import named_leaves, split_model

_SETTING, _FAMILY = "training.start_from", "family.json"
# Model settings that a run takes from its config, not from the released model.
_KEPT = ("dropout", "init_scale", "scan_layers", "remat", "compute_dtype", "lora")
_SAMPLE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Released:
    """A folder of ``transformers``, or a converted folder, that a run starts from.

    Attributes:
        folder: Folder of the model.
        found: Description of the model in the folder.
        tokenizer: Tokenizer of the folder; ``None`` if the folder has no tokenizer.
        setting: Setting of the run that names the folder.
    """

    folder: Path
    found: huggingface.Described
    tokenizer: data.Tokenizer | None
    setting: str = _SETTING

    @property
    def identity(self) -> str:
        """Hash of names, sizes, first and last bytes of the files."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and native.BESIDE not in path.relative_to(self.folder).parts:
                digest.update(f"{path.relative_to(self.folder)} {path.stat().st_size}".encode())
                with path.open("rb") as file:
                    digest.update(file.read(_SAMPLE))
                    file.seek(max(0, path.stat().st_size - _SAMPLE))
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()[:16]

    def parts(self, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        """Returns graph definition, parameters and router state of the loaded model."""
        if folders.kind_of(self.folder) == "moe_jax":
            return split_model(native.load(self.folder, mesh).model)
        return split_model(huggingface.load(self.folder, mesh=mesh, progress=True).model)

    def weights(self, mesh: Mesh) -> dict[str, jax.Array]:
        """Returns parameters and router state, by the names of ``named_leaves``."""
        _, params, routers = self.parts(mesh)
        return named_leaves({"params": params, "router_state": routers})

    def keep(self, folder: Path) -> None:
        """Writes family and companion files into the workdir of the run."""
        remember(folder, self.found.family, self.found.original, self.folder)


def is_released(folder: str) -> bool:
    """Returns whether a folder holds a released or converted model."""
    return bool(folder) and folders.kind_of(folder) in ("hf", "moe_jax")


def open_released(folder: str, experiment: Experiment) -> Released:
    """Opens a released or converted model for reading, without loading weights.

    Raises:
        ConfigError: If a file is missing or unreadable, or if the family is unknown.
    """
    found = folders.describe(folder)
    tokenizer = None
    if folders.tokenizer_of(folder):
        own = dataclasses.replace(experiment.data, tokenizer=folders.tokenizer_of(folder))
        tokenizer = data.open_tokenizer(own)
    return Released(Path(folder), found, tokenizer)


def adopted(
    experiment: Experiment, folder: Path, overrides: Mapping[str, Any] | None = None
) -> Experiment:
    """Returns the experiment with model and tokenizer of its released start model.

    A config whose model computes the same function keeps its own model settings, and with them the
    settings that only training reads. A run that has begun takes the model from its workdir.

    Args:
        experiment: Configuration of the run.
        folder: Workdir of the run.
        overrides: Settings of the command line by dotted name, which take precedence.

    Raises:
        ConfigError: If a setting of the command line contradicts the released model.
    """
    start = experiment.training.start_from
    if experiment.training.start_with != "all" or not start:
        return experiment
    if _adopted_before(folder):
        saved = workdir.load(folder)
        model, tokenizer = saved.model, saved.data.tokenizer
    elif is_released(start):
        described = folders.describe(start).config
        assert isinstance(described, DecoderConfig | EncoderDecoderConfig)
        model = described
        tokenizer = folders.tokenizer_of(start) or experiment.data.tokenizer
    else:
        return experiment
    if function_of(model) == function_of(experiment.model):
        model = experiment.model
    kept = {name: getattr(experiment.model, name) for name in _KEPT}
    adapted = dataclasses.replace(
        experiment,
        model=dataclasses.replace(model, **kept),
        data=dataclasses.replace(experiment.data, tokenizer=tokenizer),
    )
    return _overridden(adapted, model, overrides or {})


def _overridden(
    experiment: Experiment, model: ModelConfig, overrides: Mapping[str, Any]
) -> Experiment:
    """Restores the settings of the command line, and rejects a change of the model's function."""
    start, config = experiment.training.start_from, settings(experiment)
    for name, value in overrides.items():
        if name == "data.tokenizer" and value != experiment.data.tokenizer:
            raise ConfigError(
                f"data.tokenizer={value!r} is not the tokenizer of {_SETTING}={start}: leave it out"
            )
        if not name.startswith("model."):
            continue
        try:
            override(Experiment, config, {name: value})
        except ConfigError as error:
            raise ConfigError(f"{_SETTING}={start}: {error}") from error
    found = build(Experiment, config)
    wanted, here = function_of(model), function_of(found.model)
    for name in {**wanted, **here}:
        if wanted.get(name) != here.get(name):
            raise ConfigError(
                f"{_SETTING}={start} is of another model: {name}={wanted.get(name)!r} there and "
                f"{here.get(name)!r} here; leave this setting out"
            )
    return found


def remember(
    folder: Path, family: str, original: Mapping[str, Any], source: Path, *, adopts: bool = True
) -> None:
    """Writes the model's family and its companion files into a workdir."""
    beside = folder / native.BESIDE
    copy_companions(folders.companions_of(source), beside)
    fields = {"family": family, "original": dict(original), "adopted": adopts}
    files.write_json(beside / _FAMILY, fields)


def remembered(folder: Path) -> dict[str, Any]:
    """Returns ``family``, ``original`` and ``adopted`` of a workdir.

    A run without a released model in its chain returns an empty dict.

    Raises:
        ConfigError: If the file is corrupt.
    """
    path = folder / native.BESIDE / _FAMILY
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error})") from error


def _adopted_before(folder: Path) -> bool:
    return (folder / workdir.CONFIG).exists() and bool(remembered(folder).get("adopted"))
