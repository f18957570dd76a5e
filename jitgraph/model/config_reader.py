"""Typed access to a JSON object, so that a bad value is refused by its key's name. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jitgraph.errors import CheckpointError

REQUIRED = object()
"""The default of a key that must be there."""


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file; ``advice`` is what to do where the file does not exist.

    Raises:
        CheckpointError: no such file, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: {advice}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except ValueError as error:  # includes a text that is not UTF-8
        raise CheckpointError(f"{path} is not valid JSON ({error}): download or write it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


class ConfigReader:
    """Reads keys of one JSON object; ``where`` opens every message. A null reads as an absent key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, problem: str) -> CheckpointError:
        """The error that names ``key``."""
        return CheckpointError(f"{self.where}: {key} {problem}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: Any = REQUIRED, minimum: int = 1) -> int:
        """A whole number of at least ``minimum``."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.fail(key, f"must be a whole number of at least {minimum}, not {value!r}")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number above zero."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self.fail(key, f"must be a finite number above zero, not {value!r}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number above zero, or None where absent."""
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {value!r}")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"must be a text, not {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where absent."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(key, f"must be a list of texts, not {value!r}")
        return tuple(value)

    def table(self, key: str) -> dict[str, Any]:
        """A nested object; empty where absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.fail(key, f"must be an object, not {value!r}")
        return dict(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Ids given as null, one number or a list; a negative id means none, as older files write it."""
        value = self._get(key, [])
        ids = value if isinstance(value, list) else [value]
        for item in ids:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.fail(key, f"must be a token id or a list of token ids, not {value!r}")
        return tuple(dict.fromkeys(item for item in ids if item >= 0))

    def _get(self, key: str, default: Any) -> Any:
        if self.has(key):
            return self.values[key]
        if default is REQUIRED:
            raise self.fail(key, "is missing")
        return default
