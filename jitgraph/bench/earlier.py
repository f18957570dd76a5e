"""What happens to earlier results when a folder is used again: nothing measured is lost to a run that measures nothing.

Used by the run's own process alone. A run of all cases puts the whole folder aside. A case that is run again keeps its
earlier files beside the new ones (``.earlier``) until it is known which are worth more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jitgraph.bench import jobs
from jitgraph.bench.records import RAW, raw_path, read_json
from jitgraph.bench.watch import WATCH
from jitgraph.errors import OutputError

KEPT_LOG = "prepare.log"
"""Of the run at hand: written before anything is put aside."""
FOREIGN = "runtime-"
"""Beginning of the files of ``benchmarks/runtime.py``, which keeps a record of its own in the same folder."""
TABLES = (
    *(
        "case*.csv",
        "ablation_*",
        "peer*",
        "restart_table.*",
        "final_*_table.*",
        "approach_summary.*",
        "speedup_table.*",
        "summary.json",
    ),
    *("figures.json", "environment.json", "report.html", "comparison.html", "plots"),
)
SUFFIX = ".earlier"


def put_aside(folder: Path, note: Callable[[str], None]) -> None:
    """Empties a folder for a new study: earlier results move into ``earlier-N`` inside it, a record without a single
    sample is dropped.

    Raises:
        OutputError: they cannot be moved.
    """
    raw = [f for f in (folder / RAW).iterdir() if f.name != KEPT_LOG and not f.name.startswith(FOREIGN)]
    measured = any(file.suffix == ".jsonl" and file.name != WATCH and file.stat().st_size for file in raw)
    try:
        if not measured:
            for file in raw:
                file.unlink()
            return
        number = 1 + max((int(p.name[8:]) for p in folder.glob("earlier-*") if p.name[8:].isdigit()), default=0)
        target = folder / f"earlier-{number}"
        (target / RAW).mkdir(parents=True)
        for file in [found for pattern in TABLES for found in folder.glob(pattern)]:
            file.rename(target / file.name)
        for file in raw:
            file.rename(target / RAW / file.name)
    except OSError as error:
        raise OutputError(
            f"the earlier results in {folder} cannot be put aside ({error.strerror}): choose another --output"
        ) from error
    note(f"The earlier results are in {target}.")


class CaseRecord:
    """One case's two files, and their earlier selves while it runs again."""

    def __init__(self, folder: Path, case: str) -> None:
        self.facts = raw_path(folder, f"{case}.json")
        self.samples = raw_path(folder, f"{case}.jsonl")
        if self._saved(self.facts).exists():  # a run was killed between two of the lines below
            self._restore()

    @property
    def complete(self) -> bool:
        """Whether all rows of the case are there."""
        return (read_json(self.facts) or {}).get("status") == jobs.COMPLETE and self.samples.exists()

    def begin(self) -> None:
        """The case is about to run: what is there is saved."""
        self._was_complete = self.complete
        for file in (self.facts, self.samples):
            if file.exists():
                file.rename(self._saved(file))

    def settle(self, status: str) -> bool:
        """The case ended with ``status``. Returns whether its new record stands, or else the earlier one was restored.

        The new one stands where it is complete, where it proves the earlier one wrong (a failed gate), and where it
        has samples while the earlier one was incomplete too.
        """
        measured = self.samples.exists() and self.samples.stat().st_size > 0
        stands = (
            status in (jobs.COMPLETE, jobs.GATE_FAILED)
            or not self._saved(self.samples).exists()
            or (measured and not self._was_complete)
        )
        if stands:
            for file in (self.facts, self.samples):
                self._saved(file).unlink(missing_ok=True)
        else:
            self._restore()
        return stands

    def _restore(self) -> None:
        for file in (self.facts, self.samples):
            if self._saved(file).exists():
                self._saved(file).rename(file)
            else:
                file.unlink(missing_ok=True)

    @staticmethod
    def _saved(file: Path) -> Path:
        return file.with_name(file.name + SUFFIX)
