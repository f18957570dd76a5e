"""Train the bundled tokenizer: a byte-level BPE of 2,048 entries, from this repository's own text.

Run from anywhere: ``python scripts/train_tokenizer.py``. It reads the prose, the Python sources and the Markdown
of the repository and writes jitgraph/assets/tokenizer. The same input gives the same files; the committed files
are what counts, so run it only to change them on purpose: every committed figure depends on its token counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 2048
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('the role must be user, assistant or system') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def corpus(root: Path) -> list[str]:
    """Texts to learn from, in a fixed order: prose, Python sources, Markdown."""
    files = [root / "jitgraph" / "assets" / "prose.txt"]
    files += sorted((root / "jitgraph").rglob("*.py"))
    files += sorted((root / "docs").rglob("*.md")) + sorted(root.glob("*.md"))
    return [path.read_text(encoding="utf-8") for path in files]


def train(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of exactly ``VOCAB_SIZE`` entries that puts BOS in front of every text.

    Raises:
        SystemExit: too little text for that many entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True) for text in (BOS, EOS, PAD, *ROLES)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"only {tokenizer.get_vocab_size()} of {VOCAB_SIZE} entries found; add text to learn from")
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the three files of a tokenizer folder; each appears whole or not at all."""
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": list(ROLES),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    special = {**named, "additional_special_tokens": list(ROLES)}
    contents = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for name, text in contents.items():
            draft = Path(scratch) / name
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(folder / name)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Train the bundled tokenizer from the repository's own text.")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository to learn from")
    parser.add_argument("--output", type=Path, default=None, help="folder to write (default: the package's asset)")
    arguments = parser.parse_args()
    output = arguments.output or arguments.root / "jitgraph" / "assets" / "tokenizer"
    tokenizer = train(corpus(arguments.root))
    write(tokenizer, output)
    prose = (arguments.root / "jitgraph" / "assets" / "prose.txt").read_text(encoding="utf-8")
    tokens = len(tokenizer.encode(prose).ids)
    print(f"{output}: {tokenizer.get_vocab_size()} entries; the prose of {len(prose.split())} words is {tokens} tokens")


if __name__ == "__main__":
    main()
