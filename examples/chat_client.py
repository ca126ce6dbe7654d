"""Continues a chat with ``moe-jax serve`` in the terminal, with the standard library alone.

python examples/chat_client.py http://127.0.0.1:8000
"""

import http.client
import json
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

Messages = list[dict[str, str]]


def answer(url: str, messages: Messages, **settings: object) -> Iterator[str]:
    """Yields the parts of the answer to a dialogue.

    Args:
        url: Address of the server.
        messages: Messages with ``role`` and ``content``.
        **settings: Fields of the body, such as ``max_tokens=64``.

    Raises:
        RuntimeError: If the server refuses the request; the message is its line.
    """
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc)
    body = json.dumps({"messages": messages, "stream": True, **settings})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(json.load(response)["error"]["message"])
    for line in response:
        event = line.decode().strip().removeprefix("data: ")
        if event == "[DONE]":
            return
        if event:
            yield _text(json.loads(event))


def _text(event: dict[str, Any]) -> str:
    if "error" in event:  # The server or the model ends before the answer.
        raise RuntimeError(event["error"]["message"])
    return event["choices"][0]["delta"].get("content", "")


def main(url: str) -> None:
    """Reads messages of the user line by line and prints the answers."""
    messages: Messages = []
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        said = ""
        for part in answer(url, messages, max_tokens=256):
            print(part, end="", flush=True)
            said += part
        print()
        messages.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    main(sys.argv[1])
