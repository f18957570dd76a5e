"""Small tokenizers of the common kinds, built on the spot for the tests of ``jitgraph.text``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ALPHABET = "ab c.\n ▁é́ß你好漢字ไทย🙂👩🏽‍🚀🇩🇪\u200d\ufffd\x00"
"""ASCII, combining marks, CJK, Thai, emoji of 4 bytes and joined ones, U+FFFD itself, NUL."""
TEXTS = ["a cab can bake a bean", "you 你好 your 漢字 and 🙂🙂 too", "the baker, the train. the ferry\n\nthe end"] * 3


@cache
def byte_level_backend() -> Tokenizer:
    """Byte-level BPE as in GPT-2 and Llama 3, with few merges, so that characters split across tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=[AddedToken("<s>", special=True), AddedToken("</s>", special=True)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def _sentencepiece_like() -> models.BPE:
    words = ["▁the", "▁a", "a", "b", "c", "▁", "é", "你", "th", "e", "t", "h", ".", "▁b", "▁▁", "n", "d"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "a"), ("▁", "b"), ("t", "h"), ("▁", "▁")]
    return models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def llama_backend() -> Tokenizer:
    """Llama 2: spaces as U+2581, byte fallback, one leading space put in front and stripped again."""
    tokenizer = Tokenizer(_sentencepiece_like())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_specials(tokenizer)


@cache
def metaspace_backend() -> Tokenizer:
    """Metaspace on both sides, with byte fallback."""
    tokenizer = Tokenizer(_sentencepiece_like())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _with_specials(tokenizer)


def write_folder(folder: Path, tokenizer: Tokenizer) -> None:
    """Put a tokenizer.json into a folder, in place of any other tokenizer file."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.json"):
        path.unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
