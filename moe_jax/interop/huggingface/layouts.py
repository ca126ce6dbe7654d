"""How files of older and newer ``transformers`` name and join the tensors of one model."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry, ExpertMatrices
from moe_jax.interop.huggingface.family import Family
from moe_jax.interop.huggingface.keys import Json

# The matrices of one expert, by the tensor of all experts that transformers 5 has in memory.
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

    A name has lost the prefix of a model with other towers, has the one that a bare model lacks,
    and is spelt as the family spells it. Tensors that hold nothing of the model are left out.

    Raises:
        ConfigError: if two stored tensors have one name.
    """
    names = [n for n in stored if not family.beside(config, n) and not n.endswith(family.ignored)]
    plain = {name: name.removeprefix(family.prefix) for name in names}
    head, _ = family.tied
    bare = family.base and not any(name.startswith(family.base) for name in plain.values())
    found: dict[str, str] = {}
    for name, ours in plain.items():
        ours = family.base + ours if bare and ours != head else ours
        for theirs, spelt in family.renamed.items():
            ours = ours.replace(theirs, spelt)
        if ours in found:
            raise ConfigError(f"{name} and {found[ours]} are two names of one tensor: keep one")
        found[ours] = name
    return found


def without_copies(
    family: Family, names: dict[str, str], tied: bool, read: Callable[[str], np.ndarray]
) -> dict[str, str]:
    """Returns the names less those of tensors that are stored a second time.

    Args:
        family: the family, which says what may be stored twice.
        names: the stored name by the family's.
        tied: whether the head is the embedding; then it may be stored as well, or instead.
        read: reads a stored tensor.

    Raises:
        ConfigError: if the two differ, which ``transformers`` reads as it likes.
    """
    copies = {name: list(others) for name, others in family.copies.items()}
    head, embedding = family.tied
    if tied:
        copies.setdefault(embedding, []).append(head)
    found = dict(names)
    for name, others in copies.items():
        for other in (other for other in others if other in found):
            stored = found.pop(other)
            if found.setdefault(name, stored) != stored:
                _check_equal(found[name], stored, read)
    return found


def _check_equal(name: str, other: str, read: Callable[[str], np.ndarray]) -> None:
    if not np.array_equal(read(name), read(other)):
        raise ConfigError(
            f"{other} is stored and differs from {name}, though config.json says that they are one "
            "tensor: set tie_word_embeddings to false to keep both, or remove one of the two"
        )


def as_stored(entries: Iterable[Entry], names: Collection[str]) -> Iterator[Entry]:
    """Yields the entries of a model, those of experts joined where a file stores them joined."""
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
    for theirs, ours in joined.items():
        yield Entry(theirs, tuple(ours), ExpertMatrices())
