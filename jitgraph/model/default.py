"""The model that stands where no name is given: the one that comes with the package. No torch.

Its folder is package data, a Hugging Face checkpoint like any other. Where it is not there, as in a checkout without
it, the small preset with random weights takes its place.
"""

from __future__ import annotations

from pathlib import Path

from jitgraph.text.prose import ASSETS

DEFAULT_MODEL = "default"
"""The name that means it."""
STAND_IN = "tiny"
"""The preset that takes its place."""
FOLDER = ASSETS / "model"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


def default_model_folder() -> Path | None:
    """Where the bundled model lies; None where it does not come with this installation."""
    return FOLDER if all((FOLDER / name).is_file() for name in NEEDED) else None
