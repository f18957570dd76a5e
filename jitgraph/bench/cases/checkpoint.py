"""A checkpoint folder for engines that read one: the plan's own, or a preset written to disk with the weights that
every case has. No torch at import."""

from __future__ import annotations

import tempfile
from pathlib import Path

from jitgraph.bench.plan import Plan


class Checkpoint:
    """Where a case's engine finds the plan's weights; a folder that was made for it is removed by ``close``."""

    def __init__(self) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def path(self, plan: Plan) -> str:
        """The folder."""
        from jitgraph.model.loader import find_model

        source = find_model(plan.model, weights=plan.weights)
        if source.folder is not None and plan.weights == "checkpoint":
            return str(source.folder)
        from jitgraph.model.export import export_model

        self._temporary = tempfile.TemporaryDirectory(prefix="jitgraph-export-")
        target = Path(self._temporary.name) / "model"
        return str(export_model(plan.model, target, seed=plan.seed, dtype=plan.dtype, device=plan.device))

    @staticmethod
    def weights_gib(path: str) -> float:
        """Size of a folder's weights."""
        return sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 2**30

    def close(self) -> None:
        """Removes what ``path`` made."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None
