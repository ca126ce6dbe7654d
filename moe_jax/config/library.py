"""Configs and ablations of the package by name, wherever the package is installed."""

from __future__ import annotations

import difflib
import importlib.resources
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from moe_jax.errors import ConfigError, fault_in


def _folder(package: str) -> Path:
    return Path(str(importlib.resources.files(package))).resolve()


CONFIGS = _folder("moe_jax.configs")
PUBLISHED = CONFIGS / "published"
EXPERIMENTS = _folder("moe_jax.experiments")


def config_file(name: str) -> Path:
    """Returns the file of a config.

    Args:
        name: A file; the name of a config of the package, such as ``mixtral_8x7b``; or the path of
            a config of the package in the repository, such as ``configs/quickstart.py``.

    Raises:
        ConfigError: If no file and no config has this name.
    """
    return _file_named(name, [CONFIGS, PUBLISHED], "config", "--config=quickstart")


def ablation_file(name: str) -> Path:
    """Returns the file of an ablation.

    Args:
        name: A file, or the name of an ablation of the package, such as
            ``switch/capacity_factor``.

    Raises:
        ConfigError: If no file and no ablation has this name.
    """
    return _file_named(name, [EXPERIMENTS], "ablation", "--ablation=switch/capacity_factor")


def module_of(file: Path, what: str) -> ModuleType:
    """Runs a Python file and returns its module.

    Args:
        file: The file.
        what: Description of the file, for messages.

    Raises:
        ConfigError: If the file fails; the message names the line that failed.
    """
    spec = importlib.util.spec_from_file_location(file.stem.replace(".", "_"), file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what} {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        fault = fault_in(file, error)
        if fault is None:
            raise
        raise ConfigError(f"{what} cannot be loaded: {fault}") from error
    return module


def short_name(file: Path) -> str:
    """Returns the name of an ablation of the package, or the path of any other file."""
    top = EXPERIMENTS.resolve()
    for path in (file.resolve(), top.parent / file):
        if path.is_relative_to(top):
            return path.relative_to(top).with_suffix("").as_posix()
    return file.as_posix()


def _file_named(name: str, folders: Iterable[Path], flag: str, example: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    candidates = [folder / name.removesuffix(".py") for folder in folders]
    # A name such as ``configs/quickstart.py`` is a path in the repository.
    candidates += [folder.parent / name.removesuffix(".py") for folder in folders]
    for path in (path.with_name(f"{path.name}.py") for path in candidates):
        if path.is_file():
            return path
    # The last folder gives the shortest name.
    paths = [(folder, path) for folder in folders for path in _files(folder)]
    known = {path: path.relative_to(folder).with_suffix("").as_posix() for folder, path in paths}
    stems = {path.stem: full for path, full in known.items()}
    close = difflib.get_close_matches(name, known.values(), n=1)
    close = close or [stems[one] for one in difflib.get_close_matches(Path(name).stem, stems, n=1)]
    hint = f"did you mean {close[0]!r}?" if close else f"try {example}"
    raise ConfigError(f"--{flag}={name} is not a file, and no {flag} has this name; {hint}")


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("**/*.py")) if path.name != "__init__.py"]
