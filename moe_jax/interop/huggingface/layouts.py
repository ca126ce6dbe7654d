"""Resolves the names of tensors in files of older and newer versions of ``transformers``."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry, ExpertMatrices
from moe_jax.interop.huggingface.family import Family
from moe_jax.interop.huggingface.keys import Json

# Matrices of one expert, and the tensor of all experts into which transformers 5 joins them.
_JOINED = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(" + "|".join(_JOINED) + r")\.weight")


def names_of(family: Family, config: Json, stored: Collection[str]) -> dict[str, str]:
    """Returns the stored name of every tensor of the model, by its name in the family.

    The function removes the prefix that a checkpoint with other towers adds, adds the prefix that
    a bare model lacks, and replaces alternative spellings. Tensors of other towers and tensors
    that are no parameters are skipped.

    Raises:
        ConfigError: If two stored tensors have the same name in the family.
    """
    names = [n for n in stored if not family.beside(config, n) and not n.endswith(family.ignored)]
    plain = {name: name.removeprefix(family.prefix) for name in names}
    head, _ = family.tied
    bare = family.base and not any(name.startswith(family.base) for name in plain.values())
    stored_names: dict[str, str] = {}
    for name, ours in plain.items():
        ours = family.base + ours if bare and ours != head else ours
        for other, spelling in family.renamed.items():
            ours = ours.replace(other, spelling)
        if ours in stored_names:
            raise ConfigError(
                f"{name} and {stored_names[ours]} are two names of one tensor: keep one"
            )
        stored_names[ours] = name
    return stored_names


def without_copies(
    family: Family, names: dict[str, str], tied: bool, read: Callable[[str], np.ndarray]
) -> dict[str, str]:
    """Returns the names without second copies of a tensor.

    Args:
        family: The family; its ``copies`` and ``tied`` name the tensors that may be stored twice.
        names: Stored name of each tensor, by its name in the family.
        tied: Whether the head is the embedding. A file may then store either of them, or both.
        read: Reads a tensor by its stored name.

    Raises:
        ConfigError: If the copies differ. Versions of ``transformers`` disagree about such files.
    """
    copies = {name: list(others) for name, others in family.copies.items()}
    head, embedding = family.tied
    if tied:
        copies.setdefault(embedding, []).append(head)
    unique = dict(names)
    for name, others in copies.items():
        for other in (other for other in others if other in unique):
            stored = unique.pop(other)
            if unique.setdefault(name, stored) != stored:
                _check_equal(unique[name], stored, read)
    return unique


def _check_equal(name: str, other: str, read: Callable[[str], np.ndarray]) -> None:
    if not np.array_equal(read(name), read(other)):
        raise ConfigError(
            f"{other} is stored and differs from {name}, though config.json says that they are one "
            "tensor: set tie_word_embeddings to false to keep both, or remove one of the two"
        )


def as_stored(entries: Iterable[Entry], names: Collection[str]) -> Iterator[Entry]:
    """Yields the entries of a model, with the experts joined if the file stores them joined."""
    joined: dict[str, list[str]] = {}
    for entry in entries:
        match = _EXPERT.fullmatch(entry.theirs)
        theirs = f"{match[1]}.{_JOINED[match[2]]}" if match else ""
        if theirs not in names:
            yield entry
            continue
        ours = entry.ours[0].partition("|")[0]
        if ours not in joined.setdefault(theirs, []):
            joined[theirs].append(ours)
    for theirs, parameters in joined.items():
        yield Entry(theirs, tuple(parameters), ExpertMatrices())
