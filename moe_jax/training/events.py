"""TensorBoard's event files: a writer of records, and a reader of the recorded steps.

A file is a sequence of frames: the length of an event, its checksum, the event, its checksum. This
writer writes every event immediately. The writer of ``tensorboardX`` passes events to a thread; a
full disk ends this thread silently, and the run then waits for the thread for ever.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.files import Appended

_VERSION = "brain.Event:2"
_numbers = itertools.count()


class Events:
    """One event file of a run."""

    def __init__(self, folder: Path, purge_step: int | None):
        """Creates the file.

        Args:
            folder: Folder of all event files of the run.
            purge_step: First step whose events in older files are hidden; ``None`` for no step.
        """
        # tensorboardX imports torch if it is installed, which takes seconds.
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        parts = f"{int(time.time()):010d}", socket.gethostname(), os.getpid(), next(_numbers)
        self._file = Appended(folder / ".".join(map(str, ("events.out.tfevents", *parts))))
        self._write(Event(wall_time=time.time(), file_version=_VERSION))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the numbers of one record under tags such as ``train/loss``."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=number)
            for name, number in numbers.items()
        ]
        # One event for all numbers is forty times faster than one event per expert.
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + sums[0] + data + sums[1])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def held(folder: Path) -> set[tuple[str, int]]:
    """Returns kind and step of every record in the event files, up to a file's first damage."""
    return {record for path in sorted(folder.glob("*tfevents*")) for record in _records(path)}


def _records(path: Path) -> Iterator[tuple[str, int]]:
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    content, position = path.read_bytes(), 0
    while position + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        end = position + 12 + length
        if end + 4 > len(content):
            return
        try:
            event = Event.FromString(content[position + 12 : end])
        except DecodeError:
            return
        if event.summary.value:
            yield event.summary.value[0].tag.split("/", 1)[0], event.step
        position = end + 4
