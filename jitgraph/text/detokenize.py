"""Text while it is being generated: what may be shown now, and where a stop string ends it.

No torch, no shared state: one ``IncrementalDetokenizer`` belongs to one sequence, in whichever process shows the
text. Always holds: what ``push`` and ``finish`` return, joined together, is the whole text, cut before the first
stop string; nothing once returned is ever taken back; where the tokens' borders fall makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jitgraph.errors import RequestError
from jitgraph.text.pieces import TextStream
from jitgraph.text.tokenizer import Tokenizer


def _failure_table(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper prefix that is also its suffix.

    Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", SIAM J. Comput. 6 (1977).
    """
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        length += pattern[i] == pattern[length]
        table[i] = length
    return table


class StopScanner:
    """Finds the first stop string in a text that arrives in parts, holding back what may be its beginning.

    The first stop string is the one completed first, character by character; of several completed by the same
    character it is the longest. Amortised constant work per character and stop string.

    Args:
        stops: non-empty texts; their order does not matter.
        include: what ends the text is its last part, instead of no part of it.

    Raises:
        RequestError: an empty stop string.
    """

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        self._include = include
        self._stops = [(stop, _failure_table(stop)) for stop in dict.fromkeys(stops)]
        if any(stop == "" for stop, _ in self._stops):
            raise RequestError("each stop string must be a non-empty text; remove the empty one")
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.found = False

    def feed(self, text: str, armed: bool = True) -> str:
        """Take more text, return what can be shown; ``found`` is set once a stop string ended it.

        Args:
            text: what follows the text fed so far.
            armed: False lets stop strings that are completed in this part pass as plain text.
        """
        if not self._stops:
            return text
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            completed = self._advance(char)
            if completed and armed:
                self.found = True
                self._held = ""
                return buffer[: end if self._include else end - completed]
        shown = len(buffer) - max(self._matched)
        self._held = buffer[shown:]
        return buffer[:shown]

    def release(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> int:
        """Move every stop string's match by one character; the length of the longest one completed, or 0."""
        longest = 0
        for i, (stop, table) in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = table[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                longest = max(longest, matched)
                matched = table[matched - 1]
            self._matched[i] = matched
        return longest


class IncrementalDetokenizer:
    """Turns one sequence's generated ids into text as they come.

    The text continues the prompt: after a prompt with visible tokens the first word keeps its leading space, and
    no text of the prompt shows. Ids without an entry show as ``<|id|>``.

    Args:
        tokenizer: the tokenizer of the model.
        prompt_ids_tail: the prompt's ids, or a tail of them that holds its last 8 visible ones.
        stop: strings that end the text and are not part of it.
        min_tokens: a stop string counts only where its last character came with this token or a later one.
        skip_special_tokens: leave the tokens out that steer the model.
        include_stop: the stop string that ends the text is its last part.

    Raises:
        RequestError: an empty stop string, or a negative id.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids_tail: Sequence[int] = (),
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._stream = TextStream(tokenizer.pieces, skip_special_tokens)
        self._stream.prime(prompt_ids_tail)
        self._scanner = StopScanner(stop, include_stop)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._finished = False
        self._parts: list[str] = []

    @property
    def stopped(self) -> bool:
        """True once a stop string ended the text; tokens pushed after that are ignored."""
        return self._scanner.found

    @property
    def text(self) -> str:
        """Everything returned so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, token_id: int) -> str:
        """Take the next generated id, return the new text that is safe to show (often empty, never taken back)."""
        if self._finished:
            raise RuntimeError("this detokenizer has finished; make a new one for another sequence")
        if self.stopped:
            return ""
        self._tokens += 1
        return self._show(self._stream.push(token_id))

    def finish(self) -> str:
        """The rest of the text, after the last id. A second call returns nothing."""
        if self._finished or self.stopped:
            self._finished = True
            return ""
        self._finished = True
        rest = self._show(self._stream.finish())
        if not self.stopped:
            held = self._scanner.release()
            self._parts.append(held)
            rest += held
        return rest

    def _show(self, text: str) -> str:
        shown = self._scanner.feed(text, armed=self._tokens >= self._min_tokens)
        if shown:
            self._parts.append(shown)
        return shown
