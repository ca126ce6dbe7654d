"""What the command lines share: flags, and errors as one line instead of a traceback."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from moe_jax import files, processes, signals
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build, forget_other_types
from moe_jax.errors import CheckpointError, ConfigError, TrainingError, fault_in

_USER_ERRORS = (ConfigError, CheckpointError, TrainingError, OSError, ValueError)
_LIBRARIES = ("jax", "flax", "optax", "numpy")
_FLAG_ERRORS = (AttributeError, KeyError, TypeError, flags.Error, *_USER_ERRORS)


def define_config() -> flags.FlagHolder:
    """Defines ``--config=FILE[:ARGUMENT]`` with overrides ``--config.a.b=value``."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, with an argument after a colon.",
        lock_config=True,
        flag_values=flags.FLAGS,
    )


def define_workdir() -> flags.FlagHolder:
    """Defines ``--workdir``."""
    return flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)


def folder_of(flag: flags.FlagHolder) -> Path:
    """Returns the folder of the ``--workdir`` flag; raises ConfigError if it is empty."""
    if not flag.value:
        raise ConfigError("--workdir is empty; try --workdir=runs/quickstart")
    return Path(flag.value)


def define_hosts() -> tuple[flags.FlagHolder, ...]:
    """Defines ``--distributed`` and what says where the processes meet, for ``join_hosts``."""
    return (
        flags.DEFINE_boolean(
            "distributed", False, "Join the other processes of this run (docs/multihost.md)."
        ),
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if JAX cannot find it."),
        flags.DEFINE_integer("num_processes", None, "Processes, if JAX cannot find their number."),
        flags.DEFINE_integer("process_id", None, "This process, from 0, if JAX cannot find it."),
    )


def join_hosts(hosts: tuple[flags.FlagHolder, ...]) -> None:
    """Joins the other processes, if asked to, before anything looks at devices.

    Raises:
        ConfigError: if they cannot be found, or are named without ``--distributed``.
    """
    distributed, *where = hosts
    if distributed.value:
        processes.join(processes.Hosts(*(flag.value for flag in where)))
        return
    for flag in where:
        if flag.value is not None:
            raise ConfigError(f"--{flag.name} says where other processes are: add --distributed")


def experiment_of(flag: flags.FlagHolder) -> Experiment:
    """Returns the typed experiment of the ``--config`` flag, whose settings go together.

    Raises:
        ConfigError: if it is missing or says something that does not exist.
    """
    file = flags.FLAGS[flag.name].config_filename if flags.FLAGS[flag.name].present else None
    if not file:
        raise ConfigError("--config is missing; try --config=configs/quickstart.py")
    try:
        config = flag.value
        getattr(config, "items", None)  # raises what came up when the file was read
        if not isinstance(config, ConfigDict):
            kind = type(config).__name__
            raise ConfigError(f"get_config() of {file} returns {kind}, not a ConfigDict: return it")
        overridden = config_flags.get_override_values(flags.FLAGS[flag.name])
        forget_other_types(Experiment, config, overridden)
        experiment = build(Experiment, config)
    except OSError as error:
        # An OSError of a config file comes out only when its values are read.
        fault = fault_in(_path_of(file), error) or _last_line(error)
        raise ConfigError(f"the config file cannot be loaded: {fault}") from error
    experiment.check_settings()
    return experiment


def overrides_of(flag: flags.FlagHolder) -> dict[str, Any]:
    """Returns the settings of the ``--config`` flag given on the command line, by dotted name."""
    return dict(config_flags.get_override_values(flags.FLAGS[flag.name]))


def run(main: Callable[[], None]) -> None:
    """Parses flags and runs ``main``; what a user can mend ends the program with one line.

    So do Ctrl-C and SIGTERM, with exit codes 130 and 143.
    """
    with signals.listening(_stop):
        try:
            app.run(lambda _: _guarded(main), flags_parser=_parse)
        except signals.Interrupted as stop:
            _stop(stop.code, f"{stop}; {signals.advice()}")


def _stop(code: int, line: str) -> None:
    if jax.distributed.is_initialized():
        processes.fail(code, line)
    # A terminal shows ^C where the line would begin.
    print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
    sys.exit(code)


def _parse(arguments: Sequence[str]) -> list[str]:
    # Loading a config file may log; what is wrong with it is said below.
    logging.set_verbosity(logging.ERROR)
    file = _config_file(arguments)
    try:
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"--config={file} is not a file; try --config=configs/quickstart.py")
        rest = flags.FLAGS(list(arguments))
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; settings start with --config.")
    except (Exception, SystemExit) as error:
        fault = None if file is None else fault_in(file, error)
        if fault:
            processes.fail(2, f"the config file cannot be loaded: {fault}")
        if not isinstance(error, _FLAG_ERRORS):
            raise
        if _lacks_get_config(error):
            processes.fail(2, f"the config file {file} has no function get_config()")
        _fail(error)
    logging.set_verbosity(logging.WARNING)
    return rest


def _config_file(arguments: Sequence[str]) -> str | None:
    """Returns the file of ``--config=FILE[:ARGUMENT]``, if this program reads one."""
    if "config" not in flags.FLAGS:
        return None
    for argument, after in zip(arguments, (*arguments[1:], ""), strict=True):
        name, equals, value = argument.partition("=")
        if name in ("-config", "--config"):
            return _path_of(value if equals else after)
    return None


def _path_of(value: str) -> str:
    return value.split(":", 1)[0]


def _lacks_get_config(error: BaseException) -> bool:
    return isinstance(error, AttributeError) and error.name == "get_config"


def _guarded(main: Callable[[], None]) -> None:
    try:
        with processes.together(lambda: "start all processes again with the same command"):
            main()
    except Exception as error:
        if _can_be_mended(error):
            if logging.level_debug():
                raise
            _fail(error)
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        processes.fail(1, f"{type(error).__name__}: {_one_line(error)}")


def _can_be_mended(error: Exception) -> bool:
    """True for a mistake of the user; a ValueError out of a library's depths is a fault of ours."""
    if not isinstance(error, _USER_ERRORS):
        return False
    return type(error) is not ValueError or not _out_of_library(error)


def _out_of_library(error: Exception) -> bool:
    # JAX removes its own frames, and says so in a note or a cause.
    texts = [*getattr(error, "__notes__", ()), str(error.__cause__ or "")]
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any("JAX has removed its internal frames" in text for text in texts) or any(
        f"/site-packages/{name}/" in file for file in files for name in _LIBRARIES
    )


def _fail(error: BaseException) -> None:
    processes.fail(2, _one_line(error))


def _one_line(error: BaseException) -> str:
    text = str(error)
    guess = re.search(r'Did you mean "([^"]+)" instead of "([^"]+)"', text)
    if guess:
        return f"the configuration has no setting {guess[2]!r}; did you mean {guess[1]!r}?"
    if isinstance(error, KeyError | AttributeError):
        name = re.sub(r"[^\w.].*", "", text.strip("\"'\\ "))
        return f"the configuration has no setting {name!r}"
    if "whilst parsing config file" in text:
        return f"the config file cannot be loaded: {_last_line(error)}"
    if isinstance(error, OSError) and files.remedy(error):
        text = f"{text}: {files.remedy(error)}"
    return " ".join(text.split())


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].strip()
