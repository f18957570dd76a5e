"""Which KV pages hold the beginning of which prompt: the index that lets the next turn of a chat pay for its new tokens
alone. Pure Python, no torch.

Owned by the engine's thread. A page is known by its salt, its own tokens and all before them: the key of a first page
is (salt, its tokens), that of any other (number of the page before, its tokens). A dict hashes such a key and then
compares it, tokens included, and a number stands for one page for ever, so two beginnings with one hash are still two.

What always holds: a page comes in when it is full and the steps that wrote it are over, and nobody writes it again.
Whoever holds a page holds all pages before it. Pages that nobody holds are *idle* and stand in one order, least
recently used first and each behind those that continue it, so the first of them is always the end of its chain.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_ID_BYTES = 4


class KeptPage:
    """A full page of the index. Compared by identity."""

    __slots__ = ("holders", "key", "number", "page")

    def __init__(self, key: tuple[str | int, bytes], number: int, page: int) -> None:
        self.key = key
        self.number = number
        """Of this entry of the index; never given again."""
        self.page = page
        """Of the KV cache."""
        self.holders = 0
        """Sequences that hold it."""


Chain = list[KeptPage]
"""Pages of one beginning, from the first on."""


def pack(ids: Iterable[int]) -> bytes:
    """Token ids as the index compares them."""
    return array("i", ids).tobytes()


class PrefixIndex:
    """The pages that are kept, by what they hold.

    ``outputs``: whether pages with generated tokens are kept too. Their bits are those of decode steps, which are not
    always those of a prompt's chunk.
    """

    def __init__(self, page_size: int, outputs: bool = True) -> None:
        self.page_size = page_size
        self._outputs = outputs
        self._known: dict[tuple[str | int, bytes], KeptPage] = {}
        self._idle: OrderedDict[KeptPage, None] = OrderedDict()
        self._numbers = itertools.count()
        self._ended: list[tuple[str, Sequence[int], Sequence[int], int, list[int], Chain]] = []
        self.asked_tokens = 0
        """Prompt tokens of all admitted requests."""
        self.found_tokens = 0
        """Those of them that did not have to be computed."""

    def reset_counters(self) -> None:
        """Counts tokens from here on."""
        self.asked_tokens = self.found_tokens = 0

    @property
    def idle(self) -> int:
        """Pages that nobody holds: whoever needs pages may take them."""
        return len(self._idle)

    @property
    def kept(self) -> int:
        """All pages of the index."""
        return len(self._known)

    def match(self, salt: str, ids: Sequence[int]) -> Chain:
        """The longest chain that begins this prompt, short of its last token, which must be computed: its logits are
        wanted. Costs a first page's comparison where there is none. Nothing is held yet."""
        size = self.page_size
        most = (len(ids) - 1) // size
        first = self._known.get((salt, pack(ids[:size]))) if most > 0 and self._known else None
        if first is None:
            return []
        chain, width = [first], size * _ID_BYTES
        packed = pack(ids[: most * size])
        for start in range(width, most * width, width):
            page = self._known.get((chain[-1].number, packed[start : start + width]))
            if page is None:
                break
            chain.append(page)
        return chain

    def in_common(self, ids: Sequence[int], others: Sequence[int]) -> int:
        """Tokens of the whole pages that two prompts both begin with, short of the first one's last token."""
        size = self.page_size
        most = min((len(ids) - 1) // size, len(others) // size) * size
        if ids[:size] != others[:size]:
            return 0
        if ids[:most] == others[:most]:
            return most
        first = next(at for at in range(most) if ids[at] != others[at])
        return first // size * size

    def hold(self, chain: Chain) -> None:
        """One more sequence reads these pages; none of them goes before it lets go."""
        for page in chain:
            if not page.holders:
                del self._idle[page]
            page.holders += 1

    def let_go(self, chain: Chain) -> None:
        """A sequence that held a chain is done with it."""
        for page in reversed(chain):
            page.holders -= 1
            if not page.holders:
                self._idle[page] = None

    def extend(
        self, chain: Chain, salt: str, prompt: Sequence[int], output: Sequence[int], written: int, pages: list[int]
    ) -> None:
        """Takes a sequence's full pages into the index, and into ``chain``, which it holds.

        ``written``: its first tokens whose K and V are in ``pages`` for good, the steps that wrote them being over. A
        page whose tokens another page has is left out, and that one held in its place.
        """
        size = self.page_size
        if not self._outputs:
            written = min(written, len(prompt))
        start, end = len(chain) * size, written // size * size
        if end <= start:
            return
        past = len(prompt)
        packed = pack(itertools.chain(prompt[start:end], output[max(0, start - past) : max(0, end - past)]))
        width = size * _ID_BYTES
        for at in range(0, len(packed), width):
            key = (chain[-1].number if chain else salt, packed[at : at + width])
            page = self._known.get(key)
            if page is None:
                page = self._known[key] = KeptPage(key, next(self._numbers), pages[len(chain)])
            elif not page.holders:
                del self._idle[page]
            page.holders += 1
            chain.append(page)

    def end(
        self, salt: str, prompt: Sequence[int], output: Sequence[int], written: int, pages: list[int], chain: Chain
    ) -> None:
        """A sequence has ended, with what ``extend`` wants to know of it. The work is left for ``settle``: somebody
        waits for its last token."""
        self._ended.append((salt, prompt, output, written, pages, chain))

    def settle(self) -> list[int]:
        """Keeps what is worth keeping of the sequences that have ended; returns their other pages, which are free."""
        free: list[int] = []
        ended, self._ended = self._ended, []
        for salt, prompt, output, written, pages, chain in ended:
            self.extend(chain, salt, prompt, output, written, pages)
            kept = [page.page for page in chain]
            free += [page for index, page in enumerate(pages) if index >= len(kept) or kept[index] != page]
            self.let_go(chain)
        return free

    @property
    def settled(self) -> bool:
        """Whether ``settle`` has nothing to do."""
        return not self._ended

    def oldest(self, most: int) -> list[int]:
        """The pages that ``evict`` gives next, in its order: ``most``, or all that are idle."""
        return [page.page for page in itertools.islice(self._idle, most)]

    def evict(self, count: int) -> list[int]:
        """Forgets the ``count`` idle pages that were not used for longest, ends of chains first, and returns them."""
        pages = []
        for _ in range(count):
            page, _ = self._idle.popitem(last=False)
            del self._known[page.key]
            pages.append(page.page)
        return pages

    def forget(self) -> None:
        """Forgets everything, whoever holds it."""
        self._known.clear()
        self._idle.clear()
        self._ended.clear()
