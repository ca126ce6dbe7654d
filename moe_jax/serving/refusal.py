"""Requests that the endpoint refuses, in the JSON of OpenAI's errors."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """The endpoint refuses a request; the message is one line and names the remedy.

    Attributes:
        status: Status code of HTTP.
        message: What is wrong, and what to change.
        param: Name of the wrong field, or ``None``.
        code: Short name of the fault, or ``None``.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong(param: str | None, message: str) -> Refusal:
    """Returns the refusal of a wrong field of the body, with status 400."""
    return Refusal(400, message, param=param)
