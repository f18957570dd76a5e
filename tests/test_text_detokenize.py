"""Incremental text equals whole text, whatever the tokens' borders; stop strings end it at the same place."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import ALPHABET, byte_level_backend, llama_backend, metaspace_backend
from tokenizers import Tokenizer as Backend

from jitgraph.errors import RequestError
from jitgraph.text.detokenize import IncrementalDetokenizer, StopScanner
from jitgraph.text.tokenizer import Tokenizer

BYTE_LEVEL, LLAMA, METASPACE = (
    Tokenizer(make(), {"bos_token": "<s>", "eos_token": "</s>"}, {}, "test")
    for make in (byte_level_backend, llama_backend, metaspace_backend)
)
KINDS = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA, METASPACE], ids=["byte", "llama", "metaspace"])
TEXT = st.text(alphabet=ALPHABET, max_size=30)
STOPS = st.lists(st.text(alphabet="ab c🙂", min_size=1, max_size=4), max_size=3).map(tuple)


def whole_with_stops(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The specification, by brute force: cut before the stop string that is completed first, the longest on a tie."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))], True
    return text, False


def could_begin_a_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text that begins a stop string without being all of it."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def backend(tokenizer: Tokenizer) -> Backend:
    return tokenizer._backend


def split_randomly(tokenizer: Tokenizer, text: str, data: st.DataObject) -> list[int]:
    """Ids whose bytes are the text, with borders anywhere, inside characters too."""
    ids: list[int] = []
    for char in text:
        whole = backend(tokenizer).encode(f"a{char}", add_special_tokens=False).ids[-1:]
        if tokenizer.decode([*backend(tokenizer).encode("a", add_special_tokens=False).ids, *whole]) == "a" + char:
            options = [whole, single_bytes(tokenizer, char)]
        else:
            options = [single_bytes(tokenizer, char)]
        ids += data.draw(st.sampled_from(options))
    return ids


def single_bytes(tokenizer: Tokenizer, char: str) -> list[int]:
    if tokenizer is BYTE_LEVEL:
        by_byte = {tokenizer.pieces.bytes_of(i, False): i for i in range(2, 258)}
        return [by_byte[bytes([byte])] for byte in char.encode()]
    return [backend(tokenizer).token_to_id(f"<0x{byte:02X}>") for byte in char.encode()]


def feed(detokenizer: IncrementalDetokenizer, ids: Sequence[int]) -> list[str]:
    """What each push and the finish gave; ``text`` is checked against it on the way."""
    parts: list[str] = []
    for token_id in ids:
        parts.append(detokenizer.push(token_id))
        assert detokenizer.text == "".join(parts)
    parts.append(detokenizer.finish())
    assert detokenizer.text == "".join(parts)
    return parts


@KINDS
@given(data=st.data(), text=TEXT, stops=STOPS)
@settings(deadline=None, max_examples=150)
def test_any_split_of_a_text_gives_the_text_cut_at_its_first_stop(
    tokenizer: Tokenizer, data: st.DataObject, text: str, stops: tuple[str, ...]
) -> None:
    prompt = tokenizer.encode("the a")
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, stops)
    # In sentencepiece's alphabet U+2581 is the space.
    shown = text if tokenizer is BYTE_LEVEL else text.replace("▁", " ")
    parts = feed(detokenizer, split_randomly(tokenizer, shown, data))
    assert ("".join(parts), detokenizer.stopped) == whole_with_stops(shown, stops)


@KINDS
@given(data=st.data(), stops=STOPS)
@settings(deadline=None, max_examples=100)
def test_random_ids_equal_the_whole_decode(tokenizer: Tokenizer, data: st.DataObject, stops: tuple[str, ...]) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=40))
    detokenizer = IncrementalDetokenizer(tokenizer, (), stops)
    expected = whole_with_stops(tokenizer.decode(ids), stops)
    assert ("".join(feed(detokenizer, ids)), detokenizer.stopped) == expected


@KINDS
@given(prompt=TEXT, text=TEXT)
@settings(deadline=None, max_examples=100)
def test_the_text_after_a_prompt_is_the_library_s_whole_text_without_the_prompt(
    tokenizer: Tokenizer, prompt: str, text: str
) -> None:
    before = backend(tokenizer).encode(prompt).ids
    after = backend(tokenizer).encode(text, add_special_tokens=False).ids
    whole = backend(tokenizer).decode([*before, *after])
    shown = "".join(feed(IncrementalDetokenizer(tokenizer, before), after))
    assert backend(tokenizer).decode(before) + shown == whole


@given(text=TEXT, stops=STOPS)
@settings(deadline=None, max_examples=150)
def test_everything_that_is_certain_is_shown_at_once(text: str, stops: tuple[str, ...]) -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, (), stops)
    raw = text.encode()
    for count, token_id in enumerate(single_bytes(BYTE_LEVEL, text), start=1):
        detokenizer.push(token_id)
        complete = raw[:count].decode(errors="ignore")
        cut, stopped = whole_with_stops(complete, stops)
        assert detokenizer.stopped == stopped
        if stopped:
            assert detokenizer.text == cut
            return
        assert detokenizer.text == complete[: len(complete) - could_begin_a_stop(complete, stops)]


@KINDS
@given(data=st.data(), stops=STOPS, min_tokens=st.integers(0, 12))
@settings(deadline=None, max_examples=100)
def test_stop_strings_count_only_from_min_tokens_on(
    tokenizer: Tokenizer, data: st.DataObject, stops: tuple[str, ...], min_tokens: int
) -> None:
    text = data.draw(st.text(alphabet="ab c🙂", max_size=12))
    ids = split_randomly(tokenizer, text, data)
    prompt = tokenizer.encode("a")
    pieces = IncrementalDetokenizer(tokenizer, prompt)
    arrived = [token for token, part in enumerate(feed(pieces, ids)[:-1], start=1) for _ in part]
    expected, stopped = text, False
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed and arrived[end - 1] >= min_tokens:
            expected, stopped = text[: end - max(map(len, completed))], True
            break
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, stops, min_tokens)
    assert ("".join(feed(detokenizer, ids)), detokenizer.stopped) == (expected, stopped)


def test_the_first_word_keeps_its_space_only_after_visible_prompt_text() -> None:
    the = backend(LLAMA).token_to_id("▁the")
    assert IncrementalDetokenizer(LLAMA, LLAMA.encode("a")).push(the) == " the"
    assert IncrementalDetokenizer(LLAMA, LLAMA.encode("")[:1]).push(the) == "the"
    assert IncrementalDetokenizer(LLAMA, ()).push(the) == "the"


@KINDS
def test_a_character_begun_by_the_prompt_is_new_text_once_it_is_complete(tokenizer: Tokenizer) -> None:
    first, *rest = single_bytes(tokenizer, "🙂")
    prompt = [*tokenizer.encode("a"), first]
    assert feed(IncrementalDetokenizer(tokenizer, prompt), rest) == ["", "", "🙂", ""]
    (letter,) = single_bytes(tokenizer, "a")
    assert feed(IncrementalDetokenizer(tokenizer, prompt), [letter]) == ["a", ""]
    assert feed(IncrementalDetokenizer(tokenizer, prompt), []) == [""]


@KINDS
def test_an_unfinished_character_shows_as_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    ids = single_bytes(tokenizer, "a🙂")[:-1]
    assert feed(IncrementalDetokenizer(tokenizer, ()), ids)[-1] == "\ufffd"


def test_special_tokens_are_left_out_and_unknown_ids_show() -> None:
    ids = [*single_bytes(BYTE_LEVEL, "ab"), 31999, 1]
    assert feed(IncrementalDetokenizer(BYTE_LEVEL, ()), ids) == ["a", "b", "<|31999|>", "", ""]
    stopping = IncrementalDetokenizer(BYTE_LEVEL, (), ("<|3",))
    assert "".join(feed(stopping, ids)) == "ab" and stopping.stopped


def test_the_longest_of_several_stops_completed_together_wins() -> None:
    scanner = StopScanner(["bc", "abc", "c", "abcd"])
    assert scanner.feed("xxabcd") == "xx" and scanner.found


def test_the_stop_completed_first_wins_wherever_the_borders_are() -> None:
    for parts in (["xabcd"], ["xabc", "d"], list("xabcd")):
        scanner = StopScanner(["abcd", "bc"])
        shown = "".join([scanner.feed(part) for part in parts if not scanner.found])
        assert shown == "xa" and scanner.found


def test_a_stop_may_begin_inside_one_that_came_too_early() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, (), ("aa",), min_tokens=3)
    assert feed(detokenizer, single_bytes(BYTE_LEVEL, "aaa")) == ["", "a", "", ""]
    assert (detokenizer.text, detokenizer.stopped) == ("a", True)


def test_misuse_is_refused() -> None:
    with pytest.raises(RequestError, match="non-empty"):
        IncrementalDetokenizer(BYTE_LEVEL, (), ("",))
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ())
    assert detokenizer.finish() == "" and detokenizer.finish() == ""
    with pytest.raises(RuntimeError, match="finished"):
        detokenizer.push(3)


def test_tokens_after_a_stop_are_ignored() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, (), ("b",))
    for token_id in single_bytes(BYTE_LEVEL, "abab"):
        detokenizer.push(token_id)
    assert (detokenizer.text, detokenizer.stopped, detokenizer.finish()) == ("a", True, "")


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, (), ("ab" * 20, "🙂" * 30))
    ids = single_bytes(BYTE_LEVEL, "aba🙂") * 3000
    times: list[float] = []
    for start in range(0, len(ids), 1000):
        began = time.perf_counter()
        for token_id in ids[start : start + 1000]:
            detokenizer.push(token_id)
        times.append(time.perf_counter() - began)
    # A re-decode of the whole text would make the last thousand tokens 20 times as dear as the first.
    assert min(times[-5:]) < 5 * min(times[:5])
