"""Configs and ablations by name: those that come with the package, wherever it is installed."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from moe_jax import configs, experiments
from moe_jax.errors import ConfigError, fault_in

CONFIGS = Path(configs.__file__).resolve().parent
PUBLISHED = CONFIGS / "published"
EXPERIMENTS = Path(experiments.__file__).resolve().parent


def config_file(name: str) -> Path:
    """Returns the file of a config.

    Args:
        name: a file, or the name of a config of the package, such as ``mixtral_8x7b``; a config
            of the package is also found by its path in the repository.

    Raises:
        ConfigError: if there is neither.
    """
    return _found(name, [CONFIGS, PUBLISHED], "config", "--config=quickstart")


def ablation_file(name: str) -> Path:
    """Returns the file of an ablation: a file, or a name such as ``switch/capacity_factor``.

    Raises:
        ConfigError: if there is neither.
    """
    return _found(name, [EXPERIMENTS], "ablation", "--ablation=switch/capacity_factor")


def module_of(file: Path, what: str) -> ModuleType:
    """Returns the module that a Python file makes, which is run.

    Args:
        file: the file.
        what: it is, for the message.

    Raises:
        ConfigError: with the line of the file, if it fails.
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
    """Returns the name of an ablation of the package, or the path of another file."""
    top = EXPERIMENTS.resolve()
    for path in (file.resolve(), top.parent / file):
        if path.is_relative_to(top):
            return path.relative_to(top).with_suffix("").as_posix()
    return file.as_posix()


def _found(name: str, folders: Iterable[Path], flag: str, example: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    inside = [folder / name.removesuffix(".py") for folder in folders]
    # ``configs/quickstart.py`` is the path of a file of the repository.
    inside += [folder.parent / name.removesuffix(".py") for folder in folders]
    for path in (path.with_name(f"{path.name}.py") for path in inside):
        if path.is_file():
            return path
    known = sorted({path.stem for folder in folders for path in _files(folder)})
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"try {example}"
    raise ConfigError(f"--{flag}={name} is not a file, and no {flag} has this name; {hint}")


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("**/*.py")) if path.name != "__init__.py"]
