"""Flags of commands that sample with drafts: ``--draft=ngram``, ``lookahead`` or a folder."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig
from moe_jax.run.opened import check_folder, open_folder
from moe_jax.run.sampling import check_continues
from moe_jax.serving.speculation import (
    DraftModel,
    LookaheadModule,
    NGram,
    Speculation,
    check_looks_ahead,
)

_AHEAD = "lookahead"
_OWN: dict[str, NGram | LookaheadModule] = {"ngram": NGram(), _AHEAD: LookaheadModule()}


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "draft",
        "",
        "Folder of a smaller model with the same tokenizer, which drafts tokens, `ngram` to draft "
        "tokens that came before, or `lookahead` to draft with the lookahead modules of the model; "
        "by default no drafts. Drafts change no token.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "draft_tokens",
        4,
        "Largest number of drafted tokens per request and step.",
        lower_bound=1,
        flag_values=values,
    )


def check_of(given: flags.FlagValues) -> Callable[[ModelConfig], None]:
    """Returns a function that rejects models which cannot continue text with these drafts.

    Raises:
        ConfigError: If the folder of ``--draft`` has no model that continues text, or if a number
            of drafts is given without ``--draft``.
    """
    if given["draft_tokens"].present and not given.draft:
        raise ConfigError("--draft_tokens needs --draft, such as --draft=ngram")
    if given.draft and given.draft not in _OWN:
        check_folder(given.draft, check_continues, "--draft")

    def check(config: ModelConfig) -> None:
        check_continues(config)
        if given.draft == _AHEAD:
            check_looks_ahead(config)

    return check


def speculation_of(given: flags.FlagValues) -> Speculation | None:
    """Returns the way to draft tokens; opens the draft model.

    Raises:
        ConfigError: If the folder has no model that continues text.
    """
    if not given.draft:
        return None
    if given.draft in _OWN:
        return Speculation(_OWN[given.draft], given.draft_tokens)
    draft = open_folder(given.draft, None, check_continues)
    return Speculation(DraftModel(draft.model), given.draft_tokens)
