"""Pages of the cache: which are free, which a request holds, and which hold a common prefix."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

# The page that padding writes to. No request holds it.
UNUSED = 0
_ROOT = 0
# A full page of tokens is named by the number of the page before it, and by its own tokens.
_Name = tuple[int, tuple[int, ...]]


@dataclasses.dataclass
class Held:
    """The pages of one request.

    Attributes:
        pages: Pages in the order of positions.
        computed: Number of tokens, from the first, whose entries are computed.
        named: Number of pages, from the first, that have names.
        last: Number of the last of them.
    """

    pages: list[int]
    computed: int
    named: int
    last: int


class Pages:
    """The pages of a cache.

    A full page whose entries are computed gets a name. A later request whose tokens begin alike
    holds the same page. A named page that no request holds keeps its entries until it is needed.
    """

    def __init__(self, number: int, size: int):
        """Makes pages 1 to ``number``, all free, of ``size`` entries; page 0 is for padding."""
        self.size = size
        self._free = list(range(number, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders: dict[int, int] = {}
        self._by_name: dict[_Name, tuple[int, int]] = {}
        self._names: dict[int, _Name] = {}
        self._count = _ROOT

    @property
    def free(self) -> int:
        """Number of pages that no request holds."""
        return len(self._free) + len(self._idle)

    def of(self, tokens: int) -> int:
        """Returns the number of pages for ``tokens`` entries."""
        return -(-tokens // self.size)

    def take(self, prompt: Sequence[int], tokens: int) -> Held | None:
        """Returns pages for a request, or ``None`` if too few are free.

        Args:
            prompt: Token ids of the request. The last one is always computed anew.
            tokens: Largest number of tokens of the request, with its sample.
        """
        shared, last = self._prefix(prompt)
        fresh = self.of(tokens) - len(shared)
        if fresh > self.free - sum(page in self._idle for page in shared):
            return None
        for page in shared:
            self._idle.pop(page, None)
        pages = [*shared, *(self._emptied() for _ in range(fresh))]
        for page in pages:
            self._holders[page] = self._holders.get(page, 0) + 1
        return Held(pages, len(shared) * self.size, len(shared), last)

    def name(self, held: Held, tokens: Sequence[int]) -> None:
        """Gives names to the full pages of a request whose entries are computed.

        Args:
            held: Pages of the request.
            tokens: Its token ids, at least the computed ones.
        """
        for index in range(held.named, held.computed // self.size):
            name = (held.last, tuple(tokens[index * self.size : (index + 1) * self.size]))
            if name not in self._by_name:
                self._count += 1
                self._by_name[name] = held.pages[index], self._count
                self._names[held.pages[index]] = name
            held.last = self._by_name[name][1]
            held.named = index + 1

    def release(self, held: Held) -> None:
        """Frees the pages of a request, except those that others hold."""
        # The last pages of a prefix are used again before its first ones.
        for page in reversed(held.pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._names:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _prefix(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """Returns the pages that hold the beginning of a prompt, and the number of the last."""
        found, last = list[int](), _ROOT
        for start in range(0, len(prompt) - self.size, self.size):
            name = last, tuple(prompt[start : start + self.size])
            if name not in self._by_name:
                break
            page, last = self._by_name[name]
            found.append(page)
        return found, last

    def _emptied(self) -> int:
        """Returns a page without a name, the one that was idle for longest if no other is free."""
        if self._free:
            return self._free.pop()
        page, _ = self._idle.popitem(last=False)
        del self._by_name[self._names.pop(page)]
        return page
