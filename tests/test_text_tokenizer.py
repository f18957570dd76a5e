"""Tokenizer folders: loading, what ids they give beside transformers, what a broken folder says."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_tokenizers import ALPHABET, byte_level_backend, llama_backend, metaspace_backend, write_folder
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.text.bounds import bytes_per_token
from jitgraph.text.prose import prose
from jitgraph.text.tokenizer import Tokenizer, bundled_tokenizer_folder

BUNDLED = Tokenizer.from_folder(bundled_tokenizer_folder())
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "ß"},
]


@cache
def bundled_judge() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(bundled_tokenizer_folder()))


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    shutil.copytree(bundled_tokenizer_folder(), target)
    return target


def edit(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bundled_tokenizer_is_what_the_presets_rely_on() -> None:
    assert BUNDLED.vocab_size == 2048
    assert (BUNDLED.bos_id, BUNDLED.eos_id, BUNDLED.pad_id) == (0, 1, 2)
    roles = [BUNDLED.encode(text, add_special_tokens=False) for text in ("<|user|>", "<|assistant|>", "<|system|>")]
    assert roles == [[3], [4], [5]]
    assert BUNDLED.encode("")[:1] == [0] and BUNDLED.encode("", add_special_tokens=False) == []


def test_prose_is_long_enough_for_every_prompt_of_the_benchmark() -> None:
    assert len(prose().split()) >= 1400
    assert len(BUNDLED.encode(prose())) > 1200
    assert BUNDLED.decode(BUNDLED.encode(prose())) == prose()


@given(st.text(max_size=200))
@settings(deadline=None)
def test_bundled_tokenizer_round_trips_any_unicode(text: str) -> None:
    ids = BUNDLED.encode(text, add_special_tokens=False)
    assert BUNDLED.decode(ids, skip_special_tokens=False) == text


@given(st.text(alphabet=ALPHABET, max_size=60))
@settings(deadline=None)
def test_bundled_ids_and_text_equal_transformers(text: str) -> None:
    judge = bundled_judge()
    for special in (True, False):
        ids = BUNDLED.encode(text, add_special_tokens=special)
        assert ids == judge.encode(text, add_special_tokens=special)
        assert BUNDLED.decode(ids, special) == judge.decode(ids, skip_special_tokens=special)


@pytest.mark.parametrize("make", [byte_level_backend, llama_backend, metaspace_backend])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_decode_equals_the_library_on_any_valid_ids(make: Callable[[], Backend], data: st.DataObject) -> None:
    backend = make()
    ours = Tokenizer(backend, {}, {}, "test")
    byte_tokens = {backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} - {None}
    plain = [i for i in range(backend.get_vocab_size()) if i not in byte_tokens]
    chunks = st.one_of(
        st.lists(st.sampled_from(plain), max_size=6),
        st.text(alphabet=ALPHABET, max_size=6).map(lambda text: backend.encode(text, add_special_tokens=False).ids),
    )
    ids = [i for chunk in data.draw(st.lists(chunks, max_size=6)) for i in chunk]
    for skip in (True, False):
        assert ours.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 2047), max_size=80))
@settings(deadline=None)
def test_byte_level_decode_equals_the_library_even_on_broken_bytes(ids: list[int]) -> None:
    assert BUNDLED.decode(ids, False) == BUNDLED._backend.decode(ids, skip_special_tokens=False)


def test_broken_fallback_bytes_become_one_replacement_each() -> None:
    ours = Tokenizer(llama_backend(), {}, {}, "test")
    ids = [ours._backend.token_to_id(f"<0x{byte:02X}>") for byte in (0xFF, 0xE4, 0xBD, 0xA0, 0xE4)]
    assert ours.decode(ids) == "\ufffd你\ufffd"


def test_a_leading_space_byte_is_stripped_like_a_leading_space() -> None:
    ours = Tokenizer(llama_backend(), {}, {}, "test")
    space, a = ours._backend.token_to_id("<0x20>"), ours._backend.token_to_id("a")
    assert ours.decode([space, a]) == ours._backend.decode([space, a]) == "a"
    assert ours.decode([a, space, a]) == ours._backend.decode([a, space, a]) == "a a"


def test_ids_outside_the_vocabulary_show_as_placeholders() -> None:
    hello = BUNDLED.encode("hi", add_special_tokens=False)
    assert BUNDLED.decode([*hello, 31999, 2**40]) == "hi<|31999|><|1099511627776|>"
    with pytest.raises(RequestError, match="from 0 up, not -1"):
        BUNDLED.decode([-1])


def test_wordpiece_decodes_like_the_library() -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "run": 1, "##ning": 2, "fast": 3, ".": 4}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    ids = [1, 2, 3, 4]
    assert Tokenizer(backend, {}, {}, "test").decode(ids) == backend.decode(ids) == "running fast."


def test_a_decoder_that_looks_ahead_is_refused_by_name() -> None:
    backend = Backend(models.BPE({"a</w>": 0}, []))
    backend.decoder = decoders.BPEDecoder()
    with pytest.raises(CheckpointError, match="BPEDecoder"):
        Tokenizer(backend, {}, {}, "test")


@pytest.mark.parametrize("flag", [True, False, None])
def test_the_post_processor_decides_about_bos_as_in_transformers(folder: Path, flag: bool | None) -> None:
    if flag is not None:
        edit(folder, add_bos_token=flag, add_eos_token=True)
    judge = AutoTokenizer.from_pretrained(str(folder))
    assert Tokenizer.from_folder(folder).encode("trains") == judge.encode("trains")


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_a_llama_2_folder_gives_the_ids_of_transformers(folder: Path, name: str) -> None:
    write_folder(folder, llama_backend())
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    edit(folder, tokenizer_class=name, legacy=False, **named)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    ours, judge = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in ["the a b", "the  a", "é 你 🙂\n\nthe", "a</s>", "b."]:
        assert ours.encode(text) == judge.encode(text)
        assert ours.decode(ours.encode(text)) == judge.decode(judge.encode(text), skip_special_tokens=True)


def test_truncation_and_padding_of_a_training_run_do_not_touch_prompts(folder: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=500)
    write_folder(folder, backend)
    text = "a long sentence about kitchens"
    judge = AutoTokenizer.from_pretrained(str(folder))
    assert Tokenizer.from_folder(folder).encode(text) == judge.encode(text)


def test_added_tokens_known_only_to_the_config_are_registered(folder: Path) -> None:
    extra = {"content": "<tool>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    edit(folder, added_tokens_decoder={"2048": extra})
    ours, judge = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))
    ids = ours.encode("a<tool>b")
    assert ids == judge.encode("a<tool>b") and 2048 in ids
    assert ours.decode(ids) == "ab" and ours.vocab_size == 2049


def test_named_tokens_may_be_objects_or_live_in_the_older_file(folder: Path) -> None:
    edit(folder, bos_token={"__type": "AddedToken", "content": "<|end|>"}, eos_token=None)
    loaded = Tokenizer.from_folder(folder)
    assert (loaded.bos_id, loaded.eos_id) == (1, None)
    (folder / "tokenizer_config.json").unlink()
    loaded = Tokenizer.from_folder(folder)
    assert (loaded.bos_id, loaded.eos_id, loaded.chat_template) == (0, 1, None)


def test_chat_ids_equal_transformers() -> None:
    expected = bundled_judge().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert BUNDLED.encode_chat(MESSAGES) == expected
    assert expected.count(BUNDLED.bos_id) == 1
    with pytest.raises(RequestError, match="the role must be"):
        BUNDLED.encode_chat([{"role": "robot", "content": "x"}])


def test_chat_template_comes_from_file_text_or_named_list(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    edit(folder, chat_template=named)
    loaded = Tokenizer.from_folder(folder)
    assert loaded.chat_template == "plain"
    assert loaded.render_chat(MESSAGES) == "plain" and loaded.render_chat(MESSAGES, tools=[]) == "tools"
    (folder / "chat_template.jinja").write_text("file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("file tools")
    loaded = Tokenizer.from_folder(folder)
    assert loaded.render_chat(MESSAGES) == "file" and loaded.render_chat(MESSAGES, tools=[]) == "file tools"
    assert AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(MESSAGES, tokenize=False) == "file"


def test_no_default_chat_template_is_said_so(folder: Path) -> None:
    edit(folder, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(RequestError, match="only rag"):
        Tokenizer.from_folder(folder).encode_chat(MESSAGES)
    edit(folder, chat_template=7)
    with pytest.raises(CheckpointError, match="chat_template"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 3}', '{"version":"1.0"}', "\x00\xff"])
def test_a_broken_tokenizer_json_is_one_clear_sentence(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer") as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_tokenizer_json_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("content", ["{", "[1]", '"x"'])
def test_a_broken_tokenizer_config_is_named(folder: Path, content: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(folder)


def test_missing_files_say_what_to_do(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Tokenizer.from_folder(folder / "nowhere")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model.*save a fast tokenizer"):
        Tokenizer.from_folder(folder)


def test_text_that_is_no_text_is_refused() -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        BUNDLED.encode("ab\ud800")
    with pytest.raises(RequestError, match="not bytes"):
        BUNDLED.encode(b"ab")  # type: ignore[arg-type]


SOURCES = {
    "bundled": lambda: BUNDLED,
    "byte level": lambda: Tokenizer(byte_level_backend(), {}, {}, "test"),
    "llama": lambda: Tokenizer(llama_backend(), {}, {}, "test"),
    "metaspace": lambda: Tokenizer(metaspace_backend(), {}, {}, "test"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_long_texts_have_the_ids_that_short_ones_have(kind: str) -> None:
    """They take another way into the library."""
    tokenizer = SOURCES[kind]()
    unit = f"{ALPHABET}<s>the</s> a  b\n<|user|>"
    text = unit * (5000 // len(unit) + 1)
    assert len(text) > 4096
    for special in (True, False):
        judge = tokenizer._backend.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == judge
    with pytest.raises(RequestError, match="lone surrogate at character 5000"):
        tokenizer.encode("x" * 5000 + "\ud800")


# --------------------------------------------------------------------------------------------- how long a text may be


def bound_of(backend: Backend) -> int | None:
    return bytes_per_token(backend, json.loads(backend.to_str()))


def edited(backend: Backend, **sections: object) -> Backend:
    """The same with other rules, by their names in a tokenizer.json."""
    document = json.loads(backend.to_str())
    model = {**document["model"], **sections.pop("model", {})}  # type: ignore[dict-item]
    return Backend.from_str(json.dumps({**document, "model": model, **sections}))


BOUNDED = {
    "bundled": lambda: BUNDLED._backend,
    "byte level": byte_level_backend,
    "llama": llama_backend,
    "metaspace": metaspace_backend,
    "normal form": lambda: edited(byte_level_backend(), normalizer={"type": "NFC"}),
}


@pytest.mark.parametrize("kind", BOUNDED)
@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from([*ALPHABET, "the", "\u1fd3", "\u1100\u1161\u11a8", "a\u0308\u0304"]), max_size=60)
)
def test_no_text_has_more_bytes_than_its_tokens_can_stand_for(kind: str, parts: list[str]) -> None:
    text, backend = "".join(parts), BOUNDED[kind]()
    bound = bound_of(backend)
    assert bound is not None and bound < 400
    assert len(text.encode()) <= bound * len(backend.encode(text, add_special_tokens=False).ids)


def test_the_longest_piece_makes_the_bound() -> None:
    ids = BUNDLED._backend.get_vocab().values()
    assert bound_of(BUNDLED._backend) == max(len(BUNDLED.pieces.bytes_of(i, False)) for i in ids)


UNBOUNDED = {
    "strips": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "lowers": {"normalizer": {"type": "Lowercase"}},
    "collapses": {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
    "shortens": {"normalizer": {"type": "Replace", "pattern": {"String": "ab"}, "content": "a"}},
    "drops spaces": {"pre_tokenizer": {"type": "WhitespaceSplit"}},
    "drops what it splits at": {
        "pre_tokenizer": {"type": "Split", "pattern": {"String": "x"}, "behavior": "Removed", "invert": False}
    },
    "knows no bytes": {"model": {"byte_fallback": False}},
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_tokenizers_that_can_make_any_text_short_have_no_bound(kind: str) -> None:
    assert bound_of(edited(llama_backend(), **UNBOUNDED[kind])) is None


def test_a_token_that_takes_the_space_beside_it_has_no_bound() -> None:
    backend = edited(byte_level_backend())
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    assert bound_of(backend) is None
    longer = edited(byte_level_backend())
    longer.add_tokens(["<a token of its own, longer than all of the others together>"])
    assert bound_of(longer) == len("<a token of its own, longer than all of the others together>")


def test_normal_forms_shrink_no_character_by_more_than_the_bound_says() -> None:
    for form in ("NFC", "NFD"):
        for text in map(chr, (*range(0xD800), *range(0xE000, 0x30000))):
            assert len(text.encode()) <= 4 * len(unicodedata.normalize(form, text).encode())
