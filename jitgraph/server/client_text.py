"""Text for the clients: prompts to ids and tokens back to text, in the client's own process. No torch.

``ModelText`` never changes once made; a ``RemoteLive`` belongs to whoever reads its connection.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from jitgraph.errors import CheckpointError, JitgraphError, RequestError
from jitgraph.ipc.frames import Framer, encode
from jitgraph.ipc.messages import EngineFacts, FromEngine, Tokens, WireLogprobs
from jitgraph.ipc.messages import Grammar as WireGrammar
from jitgraph.server.client_handoff import Mailbox
from jitgraph.server.client_records import FINISH_REASONS, check_tokens, submit_frame
from jitgraph.stream import DETOKENIZER_TAIL, Live
from jitgraph.text.detokenize import IncrementalDetokenizer
from jitgraph.text.prompts import Prompt, token_ids
from jitgraph.text.tokenizer import Tokenizer, find_tokenizer
from jitgraph.types import FinishReason, PromptLogprobs, Request, TokenChunk, TokenLogprobs

_FIRST = encode(Tokens(1, (1,), (1,), finish_reason=FinishReason.LENGTH.value))
"""The only one as well, so that the way of the last is gone too."""


@dataclass(eq=False)
class RemoteLive(Live):
    """A request on its way at an engine process."""

    mailbox: Mailbox = field(default_factory=Mailbox)
    """Of the thread that waits for it."""
    error: JitgraphError | None = None
    """Why it ended without a finish reason."""
    whole: bool = False
    """Only the end is news; nobody reads the chunks."""
    tokenizer: Tokenizer | None = None
    """Makes the text; None where there is no text to make."""
    making: threading.Lock = field(default_factory=threading.Lock)

    def make_text(self) -> None:
        """Makes the detokenizer if there is none yet: as soon as the request is on its way, or with its first token,
        by whichever thread is there first."""
        if self.tokenizer is None or self.detokenizer is not None:
            return
        with self.making:
            if self.detokenizer is None:
                params, tail = self.request.params, self.request.prompt_token_ids[-DETOKENIZER_TAIL:]
                shown = tail if not tail or min(tail) >= 0 else ()  # what the engine refuses may be no ids at all
                self.detokenizer = IncrementalDetokenizer(self.tokenizer, shown, params.stop, params.min_tokens)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.finish_reason is not None or self.error is not None


class ModelText:
    """The tokenizer of the model that an engine process serves."""

    def __init__(self, facts: EngineFacts) -> None:
        self._name = facts.model
        self._tokenizer: Tokenizer | None = None
        self._trouble: CheckpointError | None = None
        try:
            self._tokenizer = find_tokenizer(None if facts.folder is None else Path(facts.folder))
        except CheckpointError as error:  # prompts of token ids work all the same
            self._trouble = error

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            CheckpointError: there is none, or it cannot be read here.
        """
        if self._trouble is not None:
            raise self._trouble
        if self._tokenizer is None:
            raise CheckpointError(f"{self._name} has no tokenizer.json: add one, or give prompts as token ids")
        return self._tokenizer

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            RequestError: nothing in it, or neither text nor token ids.
            CheckpointError: a text, and no tokenizer.
        """
        if not isinstance(prompt, str):
            return token_ids(prompt)
        if not prompt:
            raise RequestError("the prompt is empty: give at least one character")
        return tuple(self.tokenizer.encode(prompt))

    def live(self, request: Request, started_ns: int) -> RemoteLive:
        """The books of a request that is about to be sent.

        Raises:
            CheckpointError: it has stop strings, and there is no tokenizer to make text.
        """
        tokenizer = self.tokenizer if request.params.stop else self._tokenizer
        return RemoteLive(request, started_ns, tokenizer=tokenizer)


def wire_grammar(request: Request) -> WireGrammar | None:
    """A request's grammar as it is sent."""
    grammar = request.grammar
    return None if grammar is None else WireGrammar(grammar.kind, grammar.source)


def request_frame(request: Request, timeout_s: float = 0.0) -> bytes:
    """A request as it is sent; ``timeout_s`` as in ``Submit``.

    Raises:
        RequestError: ids that are no 32-bit numbers, or too many for a frame.
    """
    return submit_frame(
        request.request_id,
        request.prompt_token_ids,
        request.params,
        request.salt,
        request.prompt_logprobs,
        wire_grammar(request),
        timeout_s,
    )


def practise(live: RemoteLive, framer: Framer[FromEngine]) -> None:
    """Does for nothing what the first token of a request will need, so that the processor has it at hand: code that has
    not run for a while takes several times as long. ``framer`` is for nothing else."""
    other = RemoteLive(live.request, live.submitted_ns, tokenizer=live.tokenizer)
    for record in framer.feed(_FIRST):
        if type(record) is Tokens:
            check_tokens(record)
            take_record(other, record, live.submitted_ns)


def _from_wire(wire: WireLogprobs | None) -> TokenLogprobs | None:
    return None if wire is None else TokenLogprobs(wire.token_id, wire.logprob, wire.top)


def take_record(live: RemoteLive, record: Tokens, seen_ns: int) -> bool:
    """Adds news of a request to its books. ``record`` has passed ``check_tokens``.

    Returns:
        Whether a stop string ended it, so that the engine must be told.
    """
    reason = None if record.finish_reason is None else FINISH_REASONS[record.finish_reason]
    if not record.token_ids:
        if reason is not None:
            live.take(TokenChunk(record.request_id, None, seen_ns, None, reason))
        return False
    if live.detokenizer is None:
        live.make_text()
    scores: PromptLogprobs | None = None
    if record.prompt_logprobs is not None:
        scores = tuple(_from_wire(wire) for wire in record.prompt_logprobs)
    cached, last = record.cached_tokens, len(record.token_ids) - 1
    for i, token_id in enumerate(record.token_ids):
        logprobs = _from_wire(record.logprobs[i]) if record.logprobs else None
        ending = reason if i == last else None
        time_ns = record.times_ns[i]
        if live.take(TokenChunk(record.request_id, token_id, time_ns, logprobs, ending, cached, scores), seen_ns):
            return reason is None
        if live.finish_reason is not None:
            break
        scores = None
    if live.whole:
        live.pending.clear()
    return False
