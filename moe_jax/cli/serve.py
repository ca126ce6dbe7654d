"""Offers a model over HTTP, with OpenAI's API: ``moe-jax serve --model=DIR``.

The model is a run, a converted model or a model of transformers. The endpoint has
`/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health` and `/metrics`, and a page at `/`
to type into. `--config.training.alarms` has rules on the tokens that the model reads. SIGTERM and
Ctrl-C end the server after the requests that wait or run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from absl import flags

from moe_jax import signals
from moe_jax.cli import alarming, common, drafting, offloading
from moe_jax.errors import ConfigError
from moe_jax.run.opened import open_folder
from moe_jax.serving.engines import Room

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "Folder of the model.", required=True, flag_values=values)
    common.define_step(values)
    common.define_average(values)
    common.define_routing_table(values)
    flags.DEFINE_string(
        "name", "", "Name of the model for clients; by default its folder's.", flag_values=values
    )
    flags.DEFINE_string(
        "host", _LOOPBACK[0], "Address to bind to; 0.0.0.0 for all.", flag_values=values
    )
    flags.DEFINE_string(
        "api_key_file",
        "",
        "File with the key that clients send; none is needed by default.",
        flag_values=values,
    )
    for name, default, lowest, meaning in (
        ("port", 8000, 0, "Port; 0 for a free one."),
        ("slots", 8, 1, "Number of requests that run at once."),
        ("queue", 64, 0, "Number of requests that may wait; a further one gets status 429."),
        ("context", 0, 0, "Largest number of tokens of prompt and answer; 0 for the model's."),
        ("body_bytes", 2**20, 1024, "Largest number of bytes of a body; more gets status 413."),
        ("drain_seconds", 30, 0, "Time in which requests end after SIGTERM."),
        ("expert_copies", 0, 0, "Number of further places for experts in each MoE layer."),
        ("place_every", 1000, 1, "Number of steps between placements of experts by their loads."),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=lowest, flag_values=values)
    drafting.define(values)
    offloading.define(values)
    alarming.define(values)


def main(given: flags.FlagValues) -> None:
    """Opens the model and answers requests until a signal comes."""
    _check_packages()
    from moe_jax.serving.app import Limits
    from moe_jax.serving.endpoint import offered

    offloading.check(given)
    experiment = alarming.experiment_of(given)
    limits = Limits(body=given.body_bytes, api_key=_key(given.api_key_file))
    opened = open_folder(
        given.model,
        given.step,
        drafting.check_of(given),
        average=given.average,
        routing_table=given.routing_table,
    )
    room = Room(
        given.slots,
        given.queue,
        given.context or opened.window,
        given.expert_copies,
        given.place_every,
        drafting.speculation_of(given),
        offloading.offload_of(given, opened.model),
        alarming.rules_of(given, experiment, opened),
    )
    name = given.name or Path(given.model).resolve().name
    with (
        signals.holding() as hold,
        offered(opened, name, room, limits, given.host, given.port) as endpoint,
    ):
        if given.host not in _LOOPBACK and not limits.api_key:
            common.warn(f"--host={given.host} without --api_key_file: anyone may send requests")
        common.say(f"{name} is at {endpoint.server.url}")
        hold.begin(silently=True)
        endpoint.wait(lambda: hold.came)
        common.say(f"{endpoint.bridge.open} requests wait or run: no other one starts")
        left = endpoint.drain(given.drain_seconds)
        if left:
            common.warn(f"{left} requests end early: raise --drain_seconds")


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"moe-jax serve needs the package {missing[0]}: pip install 'moe_jax[serve]'"
        )


def _key(file: str) -> str:
    """Returns the key in a file, or "" without a file."""
    if not file:
        return ""
    key = Path(file).read_text(encoding="utf-8").strip()
    if not key:
        raise ConfigError(f"--api_key_file={file} is empty: write the key into it")
    return key


if __name__ == "__main__":
    common.run(define, main)
