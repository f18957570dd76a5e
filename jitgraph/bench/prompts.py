"""The prompts of a run: the first n tokens of this project's own prose, the same ids for every case. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from jitgraph.errors import ConfigError


def make_prompts(text_ids: Sequence[int], lengths: Sequence[int]) -> dict[int, list[int]]:
    """Prompt length to its ids: no padding, nothing after the cut.

    Raises:
        ConfigError: the text is shorter than the longest prompt.
    """
    if lengths[-1] > len(text_ids):
        raise ConfigError(
            f"the benchmark's text has {len(text_ids)} tokens under this tokenizer: name shorter --prompt-lengths"
        )
    return {length: list(text_ids[:length]) for length in lengths}


def digests(prompts: Mapping[int, Sequence[int]]) -> dict[str, str]:
    """Prompt length to a fingerprint of its ids, to tell whether two runs had the same prompts."""
    return {str(n): hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16] for n, ids in prompts.items()}
