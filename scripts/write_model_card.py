"""Writes the card of the bundled model from the record of its training.

    python scripts/write_model_card.py [--training FOLDER/training.json] [--docs docs]

Makes ``default_model.md`` and ``images/default_model_loss.svg`` in the folder of the documents. Every figure, file name
and sample in them is the record's, which ``train_default_model.py`` writes; nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ROOT / "jitgraph" / "assets" / "model" / "training.json"
CARD, CURVE = "default_model.md", "images/default_model_loss.svg"
WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 120, 20, 44
"""Margins of the plot, in its own units."""


TEMPLATE = """
# The bundled model

A Llama of {millions:.1f} million parameters that continues Python code: {layers} layers of width {hidden}, {heads}
heads with {kv_heads} for keys and values, MLPs of {intermediate}, {vocabulary:,} entries, a context of {context:,}
tokens, tied embeddings, float16. It comes with the package, so that the first command works without a network and
within seconds on a CPU. It is for trying things out, for tests and for examples.

```
jitgraph generate --prompt "def read_json(path):"
```

This page is made from the record of the training by `scripts/write_model_card.py`.

## What it learned from

The standard library of Python {python}, without its tests: {files} files, of which {trained} were trained on
({training_ids:,} tokens, with each function and class once more as a text of its own) and {held_out} were held out
({held_out_ids:,} tokens). Which ones are held out follows from their names alone. Nothing else was used, for the
tokenizer neither.

Python and its standard library are Copyright (c) 2001 Python Software Foundation, All Rights Reserved, and licensed
under the [PSF License Version 2](https://docs.python.org/3/license.html) (SPDX: PSF-2.0); the file `NOTICE` says so
as well.

## How it was trained

`scripts/train_default_model.py`, {steps} steps of {batch} windows of {context:,} tokens on one {device} with PyTorch
{torch}, seed {seed}. AdamW, a peak rate of {peak_rate:g} after {warm_up} steps, then half a cosine to {last_rate:g}.
The weights are those of the look with the least loss on the held-out files.

![Loss by step, of training and of the held-out files]({curve})

## How good it is

Perplexity on the held-out files: **{held_out_perplexity:.2f}** a token (loss {held_out_loss:.3f} nats). What it
writes after some prompts, taking the likeliest token each time:

{samples}

## Limits

It knows the form of Python, not what a program is for: names, calls and comments look right and need not be. It knows
no other language, does not follow instructions and has no chat template. It may repeat lines of the library that it
learned from. Do not run what it writes without reading it.

## Files

SHA-256 of all names and texts: `{files_sha256}`.

{listings}
"""


def card(record: dict[str, Any]) -> str:
    """The card in Markdown."""
    outside = record["held_out_files"]
    trained = [name for name in record["files"] if name not in set(outside)]
    counts = {"files": len(record["files"]), "trained": len(trained), "held_out": len(outside)}
    blocks = {
        "{samples}": "\n\n".join(map(_code, record["samples"].values())),
        "{listings}": f"{_listing('Trained on', trained)}\n\n{_listing('Held out', outside)}",
    }
    figures = {**record["plan"], **record, **counts, "millions": record["parameters"] / 1e6, "curve": CURVE}
    parts = [
        blocks[part] if part in blocks else _wrapped(part.format(**figures)) for part in TEMPLATE.strip().split("\n\n")
    ]
    return "\n\n".join(parts) + "\n"


def _code(text: str) -> str:
    """A sample in a fence that nothing in it ends."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}python\n{text.rstrip()}\n{fence}"


def _wrapped(part: str) -> str:
    """Prose at the width of this project's documents; all else as it is."""
    if part.startswith(("#", "```", "!")):
        return part
    return textwrap.fill(part, 132, break_long_words=False, break_on_hyphens=False)


def _listing(title: str, names: list[str]) -> str:
    """A list of files that opens on a click."""
    lines = textwrap.fill(", ".join(names), 132, break_long_words=False, break_on_hyphens=False)
    return f"<details><summary>{title}: {len(names)} files</summary>\n\n{lines}\n\n</details>"


# ----------------------------------------------------------------------------------------------------------------- plot


def curve(looks: list[dict[str, float]]) -> str:
    """The loss of training and of the held-out files by step, as SVG for light and dark pages."""
    last = max(look["step"] for look in looks)
    losses = [look[kind] for look in looks for kind in ("train", "held_out")]
    low, high = math.floor(min(losses)), math.ceil(max(losses))
    high += low == high

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [_HEAD]
    for tick in range(low, high + 1):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for step in (0, last // 2, last):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{int(step):,}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    middle = f"{HEIGHT / 2:.0f}"
    turned = f'transform="rotate(-90 14 {middle})" text-anchor="middle"'
    parts.append(f'<text x="14" y="{middle}" {turned}>loss, nats a token</text>')
    ends = sorted((looks[-1][kind], kind) for kind in ("train", "held_out"))
    apart = y(ends[0][0]) - y(ends[1][0])
    shift = max(0.0, 14 - apart) / 2  # the two names do not touch
    for (loss, kind), move in zip(ends, (shift, -shift), strict=True):
        points = " ".join(f"{x(look['step']):.1f},{y(look[kind]):.1f}" for look in looks)
        name = {"train": "training", "held_out": "held-out files"}[kind]
        parts.append(f'<polyline class="{kind}" points="{points}"/>')
        parts.append(f'<text class="{kind}" x="{WIDTH - RIGHT + 8}" y="{y(loss) + 4 + move:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


_HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"
 font-family="sans-serif" font-size="12">
<title>Loss by step, of training and of the held-out files</title>
<style>
text {{ fill: #444 }} .grid {{ stroke: #ddd }} polyline {{ fill: none; stroke-width: 2 }}
polyline.train {{ stroke: #1f6fb2 }} text.train {{ fill: #1f6fb2 }}
polyline.held_out {{ stroke: #b2561f }} text.held_out {{ fill: #b2561f }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #bbb }} .grid {{ stroke: #444 }}
polyline.train {{ stroke: #6db3ef }} text.train {{ fill: #6db3ef }}
polyline.held_out {{ stroke: #efa06d }} text.held_out {{ fill: #efa06d }}
}}
</style>"""


def documents(record: dict[str, Any]) -> dict[str, str]:
    """Paths below the folder of the documents, and what stands there."""
    return {CARD: card(record), CURVE: curve(record["curve"])}


def main(arguments: list[str] | None = None) -> int:
    """Command entry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--training", type=Path, default=TRAINING, help="training.json of the model")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the documents")
    options = parser.parse_args(arguments)
    for name, text in documents(json.loads(options.training.read_text(encoding="utf-8"))).items():
        path = options.docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
