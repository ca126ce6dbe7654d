"""Shared parts of the command lines: flags, and errors of one line instead of a traceback."""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from moe_jax import files, processes, signals
from moe_jax.config import library
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import read_text
from moe_jax.config.reference import settings_of
from moe_jax.config.schema import build, override
from moe_jax.errors import (
    CheckpointError,
    ConfigError,
    TrainingError,
    fault_in,
    nearest,
    plain,
)

Define = Callable[[flags.FlagValues], None]
Main = Callable[[flags.FlagValues], None]
_OVERRIDE, _FOLDERS = "override", "folders"
_SETTING = re.compile(r"--?(no)?config\.([^=]*)(=.*)?", re.DOTALL)
_HOSTS = ("coordinator", "num_processes", "process_id")
_USER_ERRORS = (ConfigError, CheckpointError, TrainingError, OSError, ValueError)
_INDENT, _WIDTH = " " * 6, 88
_LIBRARIES = ("jax", "flax", "optax", "numpy")
_FLAG_ERRORS = (AttributeError, KeyError, TypeError, flags.Error, *_USER_ERRORS)


class _StepParser(flags.IntegerParser):
    """Parser of a number of a step, or of ``best``."""

    syntactic_help = "a number, or best"

    def parse(self, argument: Any) -> Any:
        """Returns the number, or ``best``."""
        return argument if argument == "best" else super().parse(argument)


def define_config(values: flags.FlagValues) -> None:
    """Defines ``--config=NAME_OR_FILE[:ARGUMENT]`` and overrides ``--config.NAME=VALUE``."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Name or file of a configuration, with its argument after a colon (quickstart:dense).",
        flag_values=values,
    )
    define_overrides(values)


def define_overrides(values: flags.FlagValues) -> None:
    """Defines ``--config.NAME=VALUE`` and its other form ``--override=NAME=VALUE``."""
    flags.DEFINE_multi_string(
        _OVERRIDE,
        [],
        "Setting of the configuration as NAME=VALUE, the same as --config.NAME=VALUE.",
        flag_values=values,
    )


def define_workdir(values: flags.FlagValues) -> None:
    """Defines ``--workdir``."""
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True, flag_values=values)


def define_folders(values: flags.FlagValues, help_text: str) -> None:
    """Defines ``--folders``, which also has the arguments without a flag name."""
    flags.DEFINE_multi_string(_FOLDERS, [], help_text, flag_values=values)
    values.set_gnu_getopt(True)


def define_step(values: flags.FlagValues, name: str = "step") -> None:
    """Defines ``--step``, a number or ``best``, or another flag of this kind."""
    flags.DEFINE(
        _StepParser(lower_bound=0),
        name,
        None,
        "Step of the checkpoint, or 'best' for the lowest validation loss; by default the newest "
        "intact one.",
        flag_values=values,
    )


def define_average(values: flags.FlagValues) -> None:
    """Defines ``--average``."""
    flags.DEFINE_boolean(
        "average",
        True,
        "Read the averaged parameters of a run with optimizer.ema_decay.",
        flag_values=values,
    )


def define_routing_table(values: flags.FlagValues) -> None:
    """Defines ``--routing_table``."""
    flags.DEFINE_string(
        "routing_table",
        "",
        "File of moe-jax tabulate, from which routers read the experts of common tokens.",
        flag_values=values,
    )


def folder_of(given: flags.FlagValues) -> Path:
    """Returns the folder of the ``--workdir`` flag.

    Raises:
        ConfigError: If the flag is empty.
    """
    if not given.workdir:
        raise ConfigError("--workdir is empty; try --workdir=runs/quickstart")
    return Path(given.workdir)


def define_hosts(values: flags.FlagValues) -> None:
    """Defines ``--distributed`` and the flags of the coordinator, for ``join_hosts``."""
    flags.DEFINE_boolean(
        "distributed",
        False,
        "Join the other processes of this run (docs/multihost.md).",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, if JAX cannot find its address.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes", None, "Number of processes, if JAX cannot find it.", flag_values=values
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "Index of this process, from 0, if JAX cannot find it.",
        flag_values=values,
    )


def join_hosts(given: flags.FlagValues) -> None:
    """Joins the other processes if ``--distributed`` is set; JAX must not have opened devices yet.

    Raises:
        ConfigError: If the processes cannot be found, or if another flag is set without
            ``--distributed``.
    """
    where = {name: given[name].value for name in _HOSTS}
    if given.distributed:
        processes.join(processes.Hosts(*where.values()))
        return
    for name, value in where.items():
        if value is not None:
            raise ConfigError(f"--{name} has an effect only with --distributed: add --distributed")


def config_of(given: flags.FlagValues) -> str:
    """Returns the file of the ``--config`` flag, with its argument after a colon."""
    flag: Any = given["config"]  # ml_collections adds attributes to the type of the stub.
    return flag.config_filename


def experiment_of(given: flags.FlagValues) -> Experiment:
    """Returns the checked experiment of the ``--config`` flag and its overrides.

    Raises:
        ConfigError: If the flag is missing, or a setting is unknown or invalid.
    """
    flag: Any = given["config"]  # ml_collections adds attributes to the type of the stub.
    file = flag.config_filename if flag.present else None
    if not file:
        raise ConfigError("--config is missing; try --config=quickstart")
    try:
        config = flag.value
        getattr(config, "items", None)  # raises the error that reading the file raised
        if not isinstance(config, ConfigDict):
            kind = type(config).__name__
            raise ConfigError(f"get_config() of {file} returns {kind}, not a ConfigDict: return it")
        override(Experiment, config, texts_of(given), read_text)
        experiment = build(Experiment, config)
    except OSError as error:
        # An OSError of a config file is raised only when its values are read.
        fault = fault_in(_path_of(file), error) or _last_line(error)
        raise ConfigError(f"the config file cannot be loaded: {fault}") from error
    experiment.check_settings()
    return experiment


def overrides_of(given: flags.FlagValues) -> dict[str, Any]:
    """Returns the settings of the command line by dotted name; call ``experiment_of`` before."""
    return {name: _value(given["config"].value, name) for name in texts_of(given)}


def _value(config: ConfigDict, name: str) -> Any:
    return functools.reduce(lambda group, key: group[key], name.split("."), config)


def texts_of(given: flags.FlagValues) -> dict[str, str | None]:
    """Returns the settings of the command line as text, with ``None`` for a missing value."""
    pairs = (setting.partition("=") for setting in given[_OVERRIDE].value or ())
    return {name: text if equals else None for name, equals, text in pairs}


def with_overrides(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with ``--override=NAME=VALUE`` in place of ``--config.NAME=VALUE``.

    The value may be the next argument. A bool setting may have no value, or be ``--noconfig.NAME``.
    """
    rest, rewritten = list(arguments), list[str]()
    while rest:
        argument = rest.pop(0)
        setting = _SETTING.fullmatch(argument)
        if setting is None:
            rewritten.append(argument)
            continue
        off, name, value = setting.groups()
        if off:
            value = "=false"
        elif value is None and rest and not rest[0].startswith("--"):
            value = f"={rest.pop(0)}"
        rewritten.append(f"--{_OVERRIDE}={name}{value or ''}")
    return rewritten


def command_line() -> str:
    """Returns the command of this process as a shell takes it."""
    command, *arguments = sys.argv
    whole = [re.sub(f"^--{_OVERRIDE}=", "--config.", argument) for argument in arguments]
    return " ".join([command, *map(shlex.quote, whole)])


def say(text: str) -> None:
    """Prints lines and flushes the output."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning on the standard error output."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def run(define: Define, main: Main, argv: Sequence[str] | None = None) -> None:
    """Parses the flags of a command and runs it.

    An error that the user can correct prints one line and exits with code 2. Ctrl-C and SIGTERM
    print one line too, and exit with codes 130 and 143.

    Args:
        define: Function that defines the command's flags on the given flag values.
        main: Function that runs the command with the parsed flag values.
        argv: Name and arguments of the command; ``None`` for the arguments of the process.
    """
    arguments = _underscored(sys.argv if argv is None else argv)
    with signals.listening(_stop), _command_line(arguments):
        try:
            values = flags.FlagValues()
            define(values)
            _help(define, values, arguments)
            logging.use_absl_handler()
            values.append_flag_values(flags.FLAGS)
            _parse(values, arguments)
            flags.FLAGS.mark_as_parsed()
            _guarded(lambda: main(values))
        except signals.Interrupted as stop:
            _stop(stop.code, f"{stop}; {signals.advice()}")


def _underscored(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with ``_`` for ``-`` in names of flags; settings stay unchanged."""

    def one(argument: str) -> str:
        name, equals, value = argument.partition("=")
        is_flag = name.startswith("--") and not name.startswith("--config.")
        return "--" + name[2:].replace("-", "_") + equals + value if is_flag else argument

    return [one(argument) for argument in arguments]


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """Sets ``sys.argv`` for the command, because libraries read it."""
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


def _help(define: Define, values: flags.FlagValues, arguments: Sequence[str]) -> None:
    if {"--help", "-help", "-h"} & {*arguments}:
        about = (sys.modules[define.__module__].__doc__ or "").replace("``", "`").strip()
        listed = [_flag_text(values[name]) for name in values if name != _OVERRIDE]
        print("\n\n".join([about, "Flags:", *listed, *_about_settings(values)]))
        sys.exit(0)


def _flag_text(flag: Any) -> str:
    """Returns the name of a flag with its values, its meaning, and its default."""
    kinds = {flags.IntegerParser: "N", flags.FloatParser: "X", flags.EnumParser: "NAME"}
    kind = next((text for cls, text in kinds.items() if isinstance(flag.parser, cls)), "TEXT")
    if isinstance(flag.parser, flags.EnumParser):
        kind = "|".join(flag.parser.enum_values)
    name = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}={kind}"
    required = any("other than None" in one.message for one in flag.validators)
    notes = ["required"] if required else []
    notes += [f"default {flag.default_as_str}"] if flag.default else []
    notes += ["may be repeated"] if isinstance(flag, flags.MultiFlag) else []
    # absl writes the values of an enum before the text, and advice to repeat a flag after it.
    meaning = re.sub(r"^<.*?>: |;\s+repeat this option.*$", "", flag.help, flags=re.DOTALL)
    about = " ".join([meaning, *(f"({note})" for note in notes)])
    text = textwrap.fill(about, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return f"{name}\n{text}"


def _about_settings(values: flags.FlagValues) -> list[str]:
    if _OVERRIDE not in values:
        return []
    text = (
        "Any setting of the config may follow as --config.NAME=VALUE, such as "
        "--config.training.steps=100. `moe-jax settings quickstart --word=capacity` prints "
        "settings with type, range, default and meaning; docs/config_reference.md has all."
    )
    return ["Settings:", textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")]


def _stop(code: int, line: str) -> None:
    if jax.distributed.is_initialized():
        processes.fail(code, line)
    # A terminal shows ^C at the beginning of the line.
    print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
    sys.exit(code)


def _parse(values: flags.FlagValues, arguments: list[str]) -> None:
    # The import of a config file may log; this function reports its errors below.
    logging.set_verbosity(logging.ERROR)
    file = None
    try:
        file = _open_config(values, arguments)
        if _OVERRIDE in values:
            # ml_collections reads overrides from ``sys.argv``, which is this list.
            arguments[:] = with_overrides(arguments)
        rest = values(arguments)
        if _FOLDERS in values:
            values[_FOLDERS].value = [*(values[_FOLDERS].value or ()), *rest[1:]]
        elif len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}; settings start with --config.")
    except (Exception, SystemExit) as error:
        fault = None if file is None else fault_in(file, error)
        if fault:
            processes.fail(2, f"the config file cannot be loaded: {fault}")
        if not isinstance(error, _FLAG_ERRORS):
            raise
        if _lacks_get_config(error):
            processes.fail(2, f"the config file {file} has no function get_config()")
        processes.fail(2, _flag_error(values, arguments[0], error) or _one_line(error))
    chosen = flags.FLAGS["verbosity"]
    logging.set_verbosity(int(chosen.value or 0) if chosen.present else logging.WARNING)


def _flag_error(values: flags.FlagValues, command: str, error: BaseException) -> str:
    """Returns the line for a missing or an unknown flag, or "" for another error."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"{command} has no flag --{error.flagname}{_instead(values, error.flagname)}"
    missing = re.search(r"Flag --(\w+) must have a value other than None", str(error))
    if missing is None:
        return ""
    flag: Any = values[missing[1]]
    meaning = (flag.help[0].lower() + flag.help[1:]).rstrip(".")
    return f"--{flag.name} is missing: add --{flag.name}=VALUE, the {meaning}"


def _instead(values: flags.FlagValues, name: str) -> str:
    """Returns the advice for an unknown flag: a setting of this name, or the nearest flag."""
    last = name.rpartition(".")[2]
    if _OVERRIDE in values:
        known = [setting.name for setting in settings_of(Experiment("x"))]
        named = [one for one in known if one.rpartition(".")[2] == last]
        near = difflib.get_close_matches(name, named, n=1, cutoff=0.4) or named[:1]
        if near:
            return f"; the setting is --config.{near[0]}"
    own = [one for one in values if one not in flags.FLAGS]
    return nearest(name, [f"--{one}" for one in own if one != _OVERRIDE])


def _open_config(values: flags.FlagValues, arguments: list[str]) -> str | None:
    """Returns the file of ``--config=NAME_OR_FILE[:ARGUMENT]``, and writes it into the argument."""
    if "config" not in values:
        return None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name not in ("-config", "--config") or not (equals or arguments[index + 1 :]):
            continue
        chosen, colon, rest = (value if equals else arguments[index + 1]).partition(":")
        file = str(library.config_file(chosen))
        replacement = file + colon + rest
        if equals:
            arguments[index] = f"{name}={replacement}"
        else:
            arguments[index + 1] = replacement
        return file
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
        if _is_user_error(error):
            if logging.level_debug():
                raise
            _fail(error)
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        processes.fail(1, f"{type(error).__name__}: {_one_line(error)}")


def _is_user_error(error: Exception) -> bool:
    """Returns whether the user can correct an error; a library's ValueError is a bug of moe_jax."""
    if not isinstance(error, _USER_ERRORS):
        return False
    return type(error) is not ValueError or not _from_library(error)


def _from_library(error: Exception) -> bool:
    # JAX removes its own frames, and mentions it in a note or a cause.
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
    return plain(" ".join(text.split()))


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].strip()
