"""Flags of commands that sample with drafts: ``--draft=ngram`` or ``--draft=runs/small``."""

from __future__ import annotations

from absl import flags

from moe_jax.run.opened import open_folder
from moe_jax.run.sampling import check_continues
from moe_jax.serving.speculation import DraftModel, NGram, Speculation

_NGRAM = "ngram"


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "draft",
        "",
        "Folder of a smaller model with the same tokenizer, which drafts tokens, or `ngram` to "
        "draft tokens that came before; by default no drafts. Drafts change no token.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "draft_tokens",
        4,
        "Largest number of drafted tokens per request and step.",
        lower_bound=1,
        flag_values=values,
    )


def speculation_of(given: flags.FlagValues) -> Speculation | None:
    """Returns the way to draft tokens; opens the draft model.

    Raises:
        ConfigError: If the folder has no model that continues text.
    """
    if not given.draft:
        return None
    if given.draft == _NGRAM:
        return Speculation(NGram(), given.draft_tokens)
    draft = open_folder(given.draft, None, check_continues)
    return Speculation(DraftModel(draft.model), given.draft_tokens)
