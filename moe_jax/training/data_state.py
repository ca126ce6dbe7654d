"""The position in the input, which a checkpoint stores as one JSON text per process."""

from __future__ import annotations

import base64
import functools
import json
import numbers
from collections.abc import Awaitable, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from moe_jax.errors import CheckpointError


class DataState:
    """The position of this process, which Orbax saves with the arrays (StatefulCheckpointable).

    Attributes:
        text: Position as JSON.
        step_directory: Directory of the step that Orbax writes; ``None`` before the first save.
    """

    def __init__(self, position: Mapping[str, Any], where: str):
        """Converts ``position`` to text.

        Args:
            position: Dicts with string keys, lists, tuples, strings, bytes, numbers, booleans and
                ``None``.
            where: Name of the position in messages.

        Raises:
            TypeError: If the position holds a value of another type.
        """
        self.text = json.dumps(_to_json(position, where))
        self.step_directory: epath.Path | None = None

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Awaitable[None]:
        """Notes the step's directory and returns the coroutine that writes this process's text."""
        self.step_directory = directory.path.parent
        return self._write(directory)

    async def _write(self, directory: ocp.path.PathAwaitingCreation) -> None:
        folder = await directory.await_creation()
        (folder / f"process_{jax.process_index()}.json").write_text(self.text)

    async def load(self, directory: ocp.path.Path) -> Awaitable[None]:
        """Raises ``NotImplementedError``; Orbax's protocol requires this method."""
        # Orbax would wrap the messages of ``read_data_state`` in its errors.
        raise NotImplementedError("use read_data_state")


def read_data_state(directory: epath.Path) -> dict[str, Any]:
    """Returns the union of the positions of all processes, for any number of processes.

    Raises:
        CheckpointError: If two processes saved different values under one name.
    """
    texts = {file.read_text() for file in directory.glob("process_*.json")}
    try:
        return _from_json(functools.reduce(_union, map(json.loads, sorted(texts))))
    except ValueError as error:
        raise CheckpointError(
            f"the input positions in {directory} do not fit together: {error}"
        ) from error


def _union(one: Any, other: Any, where: str = "") -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        both = {key: _union(one[key], other[key], f"{where}/{key}") for key in one if key in other}
        return {**one, **other, **both}
    if one != other:
        raise ValueError(f"{where or '/'} is {one} and {other}")
    return one


def _to_json(value: Any, where: str) -> Any:
    """Returns ``value`` as JSON types; bytes become ``{"__bytes__": base64}``."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == "__bytes__":
                raise TypeError(f"{where} has the key {key!r}; use a string (not '__bytes__')")
        return {key: _to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    raise TypeError(f"{where} is a {type(value).__name__}; use dicts, lists, strings or numbers")


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__bytes__"}:
            return base64.b64decode(value["__bytes__"])
        return {key: _from_json(item) for key, item in value.items()}
    return [_from_json(item) for item in value] if isinstance(value, list) else value
