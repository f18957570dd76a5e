"""Grammars: checked, compiled beside the token path, and kept for the next request that asks for the same.

llguidance does the work. Its compiler calls itself as deep as a grammar is nested and would break a thread's usual
stack, so it runs in one thread of its own, with a stack for the longest source there can be. All else is the engine's
thread. What one grammar may cost is limited: its length (``types.Grammar``), the depth of a schema, the numbers that
become automata, the library's own fuel, and the time that a request waits for it.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.ops.slots import mask_words
from jitgraph.types import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from jitgraph.text.tokenizer import Tokenizer

COMPILE_LIMIT_S = 5.0
"""How long a request may wait for its grammar, those before it in the line included."""
KEPT_GRAMMARS = 32
"""Compiled grammars at any time, besides those in use; the one that was not asked for longest goes first."""
WORN_TOKENS = 20_000
"""A compiled grammar keeps what it learns about states of its lexer, some hundred bytes for a character of output.
After so many tokens it is left to those who use it, and whoever comes next has it compiled anew."""
MAX_DEPTH = 64
"""Objects and lists of a schema inside each other."""
MAX_MULTIPLE = 10_000
"""Largest ``multipleOf``, or least common multiple of several, without its zeros: an automaton has a state for each."""
MAX_MESSAGE_CHARS = 400
WHITESPACE = r"\n?[ ]{0,40}"
"""What may stand between the parts of a JSON text: as people write it, but never without end."""

_STACK_BYTES = 256 * 2**20
"""Of address space; memory is what a grammar really needs. Eight times what the worst one found took."""
_JSON = {"json_object", "json_schema"}
_ANY_OBJECT = '{"type":"object"}'
_INSTALL = "constrained output needs the package llguidance: install it with pip install 'jitgraph[serve]'"


class CompiledGrammar:
    """A grammar ready to be followed. ``matcher`` is copied for each sequence; its copies share what they learn."""

    def __init__(self, matcher: LLMatcher, first_mask: bytes) -> None:
        self.matcher = matcher
        self.first_mask = first_mask
        """Which ids may begin the output, as the sampling ops read it."""
        self.tokens = 0
        """Consumed by all its copies together."""
        self.broken = False
        """A copy went over a limit, and what they share may be the reason."""

    @property
    def worn(self) -> bool:
        """Whether nobody else should begin to use it."""
        return self.broken or self.tokens >= WORN_TOKENS


class Compilation:
    """A grammar on its way. ``done`` from any thread."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._deadline_s = time.monotonic() + COMPILE_LIMIT_S
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._compiled: CompiledGrammar | None = None
        self._error = ""

    @property
    def done(self) -> bool:
        """Whether ``result`` returns, or raises, at once."""
        return self._ended.is_set() or time.monotonic() >= self._deadline_s

    @property
    def stale(self) -> bool:
        """Whether the next request must have it compiled anew: it is worn, or was never tried."""
        if not self._ended.is_set():
            return False
        return not self._error if self._compiled is None else self._compiled.worn

    def listen(self, tell: Callable[[], None]) -> None:
        """Calls ``tell``, from the compiling thread, when there is a result; not where there is one already."""
        with self._lock:
            if not self._ended.is_set():
                self._listeners.append(tell)

    def end(self, compiled: CompiledGrammar | None, error: str = "") -> None:
        """The result, or why there is none; without a reason it was not tried."""
        with self._lock:
            self._compiled, self._error = compiled, error
            self._ended.set()
        for tell in self._listeners:
            tell()

    def result(self) -> CompiledGrammar:
        """The compiled grammar; waits for it.

        Raises:
            RequestError: it cannot be compiled, and why, or not in time.
        """
        self._ended.wait(max(0.0, self._deadline_s - time.monotonic()))
        if self._compiled is None:
            late = f"the grammar was not compiled within {COMPILE_LIMIT_S:g} s: make it simpler or try again"
            raise RequestError(self._error or late)
        return self._compiled


class GrammarCompiler:
    """One engine's grammars."""

    def __init__(
        self, tokenizer: Callable[[], Tokenizer | None], vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        """``tokenizer`` reads the model's, once it is needed; None where there is none."""
        self._find_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.eos = frozenset(eos_token_ids)
        """Ids that may end an output: the model's; where it names none the tokenizer's own, once it has been read."""
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, Compilation] = OrderedDict()
        self._line: queue.SimpleQueue[Compilation | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def load(self) -> None:
        """Reads the tokenizer in, which takes a second for 128,000 entries and stops all Python meanwhile: before
        ready, where grammars are to be expected. The first grammar does it otherwise.

        Raises:
            RequestError: the package is missing, or there is no tokenizer, or it does not suit the model.
        """
        if self._tokenizer is not None:
            return
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise RequestError(_INSTALL) from error
        try:
            found = self._find_tokenizer()
        except CheckpointError as error:
            raise RequestError(f"constrained output needs the model's tokenizer: {error}") from error
        if found is None:
            raise RequestError("constrained output needs the model's tokenizer, and this checkpoint has none: add it")
        if not self.eos and found.eos_id is not None:
            self.eos = frozenset((found.eos_id,))
        try:
            eos = sorted(self.eos) or None
            self._tokenizer = LLTokenizer(found.serialised(), n_vocab=self._vocab_size, eos_token=eos)
        except ValueError as error:
            raise RequestError(f"this model's tokenizer does not serve constrained output: {error}") from error

    def start(self, grammar: Grammar, on_done: Callable[[], None] | None = None) -> Compilation:
        """The grammar's compilation: one that is over where it is known, else one that begins now. ``on_done`` is
        called from another thread, unless it is over already.

        Raises:
            RequestError: there is no thread to be had.
        """
        found = self._kept.get(grammar)
        if found is None or found.stale:
            found = Compilation(grammar)
            self._begin(found)
            self._kept[grammar] = found
        if on_done is not None:
            found.listen(on_done)
        self._kept.move_to_end(grammar)
        while len(self._kept) > KEPT_GRAMMARS:
            self._kept.popitem(last=False)
        return found

    def close(self) -> None:
        """Lets the thread end, after what is in its line."""
        self._kept.clear()
        self._line.put(None)

    # ------------------------------------------------------------------------------------------------- compiling thread

    def _begin(self, wanted: Compilation) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="jitgraph-grammars", daemon=True)
            usual = threading.stack_size(_STACK_BYTES)
            try:
                thread.start()
            except RuntimeError as error:
                raise RequestError(f"no grammar can be compiled now ({error}): try again later") from error
            finally:
                threading.stack_size(usual)
            self._thread = thread
        self._line.put(wanted)

    def _run(self) -> None:
        while (wanted := self._line.get()) is not None:
            if wanted.done:  # its request has given up
                wanted.end(None)
                continue
            try:
                compiled = self._compile(wanted.grammar)
            except RequestError as error:
                wanted.end(None, str(error))
            except BaseException as error:  # a defect of the library, or a panic in it, must not take the thread along
                wanted.end(None, f"the grammar could not be compiled: {_short(str(error))}")
            else:
                wanted.end(compiled)
            del wanted

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        source = _checked(grammar)
        self.load()
        from llguidance import LLMatcher, LLParserLimits

        assert self._tokenizer is not None
        limits = LLParserLimits(
            max_items_in_row=10_000, step_lexer_fuel=100_000, max_grammar_size=200_000, verbose_errors=False
        )
        make: Callable[[str], str] = {"regex": LLMatcher.grammar_from_regex, "lark": LLMatcher.grammar_from_lark}.get(
            grammar.kind, _grammar_of_schema
        )
        try:
            matcher = LLMatcher(self._tokenizer, make(source), log_level=0, limits=limits)
            first = np.zeros(mask_words(self._vocab_size), np.int32)
            if not matcher.is_error():
                matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
        except ValueError as error:
            raise RequestError(f"the grammar does not compile: {_short(str(error))}") from error
        if matcher.is_error():
            raise RequestError(f"the grammar does not compile: {_short(matcher.get_error())}")
        if not first.any():
            raise RequestError("the grammar allows no output at all: correct it")
        return CompiledGrammar(matcher, first.tobytes())


def _grammar_of_schema(source: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(source, defaults={"whitespace_pattern": WHITESPACE})


def _short(message: str) -> str:
    """An error of the library on one line: both ends of a long one, which quotes the grammar in between."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    half = MAX_MESSAGE_CHARS // 2
    return line if len(line) <= MAX_MESSAGE_CHARS else f"{line[:half]} ... {line[-half:]}"


def _checked(grammar: Grammar) -> str:
    """The source as the library gets it.

    Raises:
        RequestError: a schema that is no JSON, nested too deep, or beyond what numbers it may have.
    """
    try:
        grammar.source.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the grammar has a lone surrogate at character {error.start}: mend it") from error
    if grammar.kind not in _JSON:
        if grammar.kind == "lark" and "%json" in grammar.source:
            raise RequestError("%json is not supported inside a grammar: give the schema as one of kind json_schema")
        return grammar.source
    try:
        schema = json.loads(grammar.source or _ANY_OBJECT)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON: {_short(str(error))}") from error
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise RequestError("the JSON schema must be an object that allows something: correct it")
    _check_schema(schema)
    return json.dumps(schema)  # what has been checked, even where a name stands twice


def _check_schema(schema: Any) -> None:
    multiple, level = 1, [schema]
    for _ in range(MAX_DEPTH):
        if not level:
            return
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                multiple = math.lcm(multiple, _digits(node.get("multipleOf", 1)))
                if multiple > MAX_MULTIPLE:
                    raise RequestError(f"multipleOf may be at most {MAX_MULTIPLE}, all of them together: leave it out")
                below += node.values()
            elif isinstance(node, list):
                below += node
        level = [node for node in below if isinstance(node, (dict, list))]
    if level:
        raise RequestError(f"the JSON schema is nested more than {MAX_DEPTH} deep: make it flatter")


def _digits(value: Any) -> int:
    """A number without sign, point and zeros around it; 1 for whatever the library will refuse itself."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not value:
        return 1
    return int("".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits)))
