"""A folder's safetensors files: found, checked against the model's figures from their headers, then read.

Nothing is allocated before every name, shape and dtype is known to fit.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from jitgraph.errors import CheckpointError
from jitgraph.model.config_reader import ConfigReader, read_json
from jitgraph.model.device import torch_dtype
from jitgraph.model.packing import Progress, hf_shapes
from jitgraph.model.reading import Extent, read_into
from jitgraph.model.spec import ModelSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""Names in safetensors headers to PyTorch's; others are quantised or not weights."""


@dataclass(frozen=True)
class StoredTensor:
    """One header entry."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: ``F16``, ``BF16``, ``F32``, ``I8``, ..."""
    start: int
    """Where its bytes begin in the file."""

    def extent(self, elements: int) -> Extent:
        """Where its bytes lie, for a reader. Its dtype is one of ``DTYPES``."""
        dtype = torch_dtype(DTYPES[self.dtype])
        return Extent(self.file, self.start, elements * dtype.itemsize, dtype)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder by name."""

    folder: Path
    stored: dict[str, StoredTensor]

    @property
    def dtype(self) -> str | None:
        """What most of its tensors are stored in; None where that is no dtype of ours."""
        counts: dict[str, int] = {}
        for tensor in self.stored.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
        return DTYPES.get(max(counts, key=lambda name: counts[name])) if counts else None

    def check(self, spec: ModelSpec) -> None:
        """Compares with what the config asks for.

        Raises:
            CheckpointError: every missing, unexpected, misshapen and mistyped tensor, named in one message.
        """
        expected = hf_shapes(spec)
        missing = [name for name in expected if name not in self.stored]
        unexpected = [name for name in self.stored if name not in expected and not _ignorable(name, spec)]
        present = [(name, self.stored[name], shape) for name, shape in expected.items() if name in self.stored]
        misshapen = [f"{n} is {list(t.shape)} instead of {list(shape)}" for n, t, shape in present if t.shape != shape]
        mistyped = [f"{name} is {tensor.dtype}" for name, tensor, _ in present if tensor.dtype not in DTYPES]
        kinds = {
            "missing": missing,
            "unexpected": unexpected,
            "of another shape": misshapen,
            "of a dtype other than float16, bfloat16 and float32": mistyped,
        }
        parts = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
        if parts:
            raise CheckpointError(
                f"the tensors in {self.folder} do not fit its config.json (use files that belong together); "
                + "; ".join(parts)
            )

    def read(self, spec: ModelSpec, places: dict[str, torch.Tensor], progress: Progress | None = None) -> None:
        """Every tensor that the model needs into its place of ``hf_views``, converting dtype and device.

        Raises:
            CheckpointError: a file that became unreadable since its header was read, or a tied head that is none.
        """
        if spec.tie_embeddings and "lm_head.weight" in self.stored:
            self._check_tied()
        extents = {name: self.stored[name].extent(place.numel()) for name, place in places.items()}
        total, done = sum(place.nbytes for place in places.values()), 0

        def report(name: str) -> None:
            nonlocal done
            done += places[name].nbytes
            if progress is not None:
                progress("loading weights (MiB)", done >> 20, total >> 20)

        read_into(places, extents, report)

    def _check_tied(self) -> None:
        """A stored LM head must be the embedding that the config ties it to.

        Raises:
            CheckpointError: it is another matrix, so config and weights contradict each other.
        """
        pair = []
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            with _opened(self.stored[name].file) as file:
                pair.append(file.get_tensor(name))
        if not torch.equal(*pair):
            raise CheckpointError(
                f"config.json in {self.folder} ties lm_head.weight to the embedding (tie_word_embeddings) but the file "
                "holds another matrix: set tie_word_embeddings to false, or use files that belong together"
            )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a folder's safetensors, single or sharded.

    Raises:
        CheckpointError: no safetensors, a shard missing, a truncated or damaged file (by its name).
    """
    stored: dict[str, StoredTensor] = {}
    for path in _files(folder):
        with _opened(path) as file:
            starts = _starts(path)
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in stored:
                    raise CheckpointError(
                        f"{name} is in both {stored[name].file} and {path}: remove one of these files"
                    )
                view = file.get_slice(name)
                stored[name] = StoredTensor(path, tuple(view.get_shape()), str(view.get_dtype()), starts[name])
    return Checkpoint(folder, stored)


def is_downloaded(folder: Path) -> bool:
    """Whether all the weights that a snapshot of the hub names are there; its small files come first."""
    try:
        return bool(_files(folder))
    except CheckpointError:
        return False


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        index = ConfigReader(read_json(folder / INDEX_FILE, "download it again"), str(folder / INDEX_FILE))
        names = sorted(
            {ConfigReader({"file": v}, index.where).text("file") for v in index.table("weight_map").values()}
        )
        if not names:
            raise index.fail("weight_map", "names no file")
        for name in names:
            if Path(name).name != name:
                raise index.fail("weight_map", f"names {name!r}, which is not a file of this folder")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing though {INDEX_FILE} names it: download it again")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read: convert them with "
            "transformers' save_pretrained, which writes safetensors"
        )
    raise CheckpointError(f"{folder} holds no weights: it needs {SINGLE_FILE} or {INDEX_FILE} with its shards")


def _opened(path: Path) -> Any:
    """A safetensors file, open for reading."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def _starts(path: Path) -> dict[str, int]:
    """Where each tensor's bytes begin. The library has checked the header but does not give this away: eight bytes with
    the header's length, then JSON with offsets from its end."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        return {
            name: 8 + length + int(one["data_offsets"][0]) for name, one in header.items() if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged ({error}): download or write it again")


def _ignorable(name: str, spec: ModelSpec) -> bool:
    """Tables that old checkpoints stored though they follow from the config, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tie_embeddings and name == "lm_head.weight")
