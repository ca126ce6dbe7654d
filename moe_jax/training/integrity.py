"""The SHA-256 of every file of a checkpoint, and the check of files against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from moe_jax.errors import line_of

INTEGRITY_FILE = "integrity.json"
_ORBAX_METADATA_FILE = "_CHECKPOINT_METADATA"
_HANDLERS = "item_handlers"
_SOUND = "sound"
_HASH_THREADS = 4


def write_integrity(directory: epath.Path) -> None:
    """Writes the checksum of every file below ``directory`` into its ``integrity.json``."""
    files = [(name, path) for name, path in _files(directory) if name != INTEGRITY_FILE]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        hashed = [(name, path) for name, path in files if name != _ORBAX_METADATA_FILE]
        digests = pool.map(_digest, *zip(*hashed, strict=True))
        sums = {name: digest for (name, _), digest in zip(hashed, digests, strict=True)}
    sums[_ORBAX_METADATA_FILE] = _SOUND
    text = json.dumps({"sha256": sums}, sort_keys=True, separators=(",", ":"))
    (directory / INTEGRITY_FILE).write_text(text)


def damage(directory: epath.Path) -> str | None:
    """Returns the first damage of a checkpoint in words; ``None`` if all files are unchanged."""
    try:
        expected = json.loads((directory / INTEGRITY_FILE).read_bytes())["sha256"].items()
    except FileNotFoundError:
        return f"{INTEGRITY_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{INTEGRITY_FILE} cannot be read: {line_of(error)}"
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        problems = pool.map(lambda item: _file_damage(directory, *item), expected)
        return next((problem for problem in problems if problem is not None), None)


def _file_damage(directory: epath.Path, name: str, digest: str) -> str | None:
    try:
        if _digest(name, directory / name) != digest:
            return f"{name} differs from its checksum in {INTEGRITY_FILE}"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} cannot be read: {line_of(error)}"
    return None


def _files(directory: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name, path


def _digest(name: str, path: epath.Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    if name == _ORBAX_METADATA_FILE:
        # Orbax still writes this file while checksums are computed, so only its format is checked.
        sound = isinstance(json.loads(path.read_bytes()).get(_HANDLERS), dict)
        return _SOUND if sound else "no handlers"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
