"""Chat templates of released tokenizers."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from moe_jax.errors import ConfigError, line_of


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template from messages to text, as in ``transformers``.

    The template runs in a sandbox, since it comes with a downloaded folder.

    Attributes:
        text: The template.
        bos_token: Text of the begin token.
        eos_token: Text of the end token.
    """

    text: str
    bos_token: str = ""
    eos_token: str = ""

    def render(self, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
        """Returns the text of a dialogue.

        Args:
            messages: Messages with ``role`` and ``content``.
            prompt: Whether the text ends where the next answer begins.

        Raises:
            ConfigError: The template is wrong, or it rejects the messages.
        """
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **tokens)
        except (jinja2.TemplateError, TypeError) as error:
            raise ConfigError(
                f"the chat template of the tokenizer rejects a dialogue ({line_of(error)}): "
                "correct the messages or the template"
            ) from error

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        return environment.from_string(self.text)


def _raise(message: str) -> Any:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
