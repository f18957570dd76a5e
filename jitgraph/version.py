"""The version of the package, for every floor to tell."""

from __future__ import annotations

VERSION = "0.1.0"
