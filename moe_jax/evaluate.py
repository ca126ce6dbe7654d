"""Evaluates a run: ``python -m moe_jax.evaluate --workdir=runs/quickstart``; one JSON line."""

from __future__ import annotations

import json

import jax

from moe_jax import cli
from moe_jax.parallel import multihost
from moe_jax.training.restored import open_restored

_WORKDIR = cli.define_workdir()
_HOSTS = cli.define_hosts()


def main() -> None:
    """Restores the newest checkpoint and prints loss, bits per byte, accuracy and load."""
    cli.join_hosts(_HOSTS)
    step, session, state = open_restored(cli.folder_of(_WORKDIR))
    with jax.set_mesh(session.mesh):
        record = session.evaluate(state)
    if multihost.is_first():
        print(json.dumps({"step": step, **record}))


if __name__ == "__main__":
    cli.run(main)
