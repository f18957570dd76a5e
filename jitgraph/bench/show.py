"""What a run shows in the terminal: progress with what is left, the ceilings, the final tables."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from jitgraph.bench.ablation import AblationTable, ablation_caption, ablation_header, ablation_tables
from jitgraph.bench.finals import AVERAGE, TIE, caption, final_tables, header, peer_columns
from jitgraph.bench.plan import CASES, PROTOCOLS
from jitgraph.bench.remarks import remarks
from jitgraph.bench.study import Study
from jitgraph.bench.table_text import EMULATED, NO_VALUE


class Board:
    """A progress bar for the job at hand and one for the whole run."""

    def __init__(self, console: Console, jobs: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._whole: TaskID = self._progress.add_task("whole run", total=jobs)
        self._job: TaskID | None = None

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        """A job starts."""
        self._job = self._progress.add_task(title, total=None)

    def advance(self, done: int, total: int) -> None:
        """The job at hand is so far."""
        if self._job is not None:
            self._progress.update(self._job, completed=done, total=total)

    def end(self, message: str) -> None:
        """The job is over; ``message`` stays on the screen."""
        if self._job is not None:
            job, self._job = self._job, None  # first: an interrupt here must not end it twice
            self._progress.remove_task(job)
        self._progress.advance(self._whole)
        self.note(message)

    def note(self, message: str) -> None:
        """Something to know; stays on the screen."""
        self._progress.console.print(escape(message), highlight=False)


def show_study(console: Console, study: Study) -> None:
    """Ceilings, both final tables, remarks."""
    ceiling = study.ceiling
    if not study.rows:
        console.print("There are no samples to show: no case was measured.", highlight=False)
    if ceiling:
        console.print(
            f"Ceilings of {escape(study.device)}: read {ceiling['read_tb_s']:.3f} TB/s, "
            f"copy {ceiling['copy_tb_s']:.3f} TB/s, matrix products {ceiling['gemm_tflops']:.3g} TFLOP/s "
            f"({study.model['dtype']})",
            highlight=False,
        )
    for protocol in PROTOCOLS:
        for final in final_tables(study, protocol):
            if len(final.lines) > 1:
                console.print(_table(study, final.lines, caption(study, protocol, final.pacing)))
    peers = peer_columns(study)
    for protocol in PROTOCOLS if peers else ():
        for final in final_tables(study, protocol, peers):
            if len(final.lines) > 1:
                console.print(_table(study, final.lines, caption(study, protocol, final.pacing), peers))
    for ablation in ablation_tables(study):
        console.print(_ablation_table(study, ablation))
    for remark in remarks(study):
        console.print(escape(remark), highlight=False)


def _ablation_table(study: Study, ablation: AblationTable) -> Table:
    table = Table(title=escape(ablation_caption(study, ablation.pacing)), title_justify="left")
    for index, name in enumerate(ablation_header(study)):
        table.add_column(name.replace(" (", "\n("), overflow="fold", justify="right" if index else "left")
    for line in ablation.lines:
        table.add_row(*(cell or NO_VALUE for cell in line))
    return table


def _table(study: Study, lines: tuple[tuple[str, ...], ...], title: str, cases: tuple[str, ...] = CASES) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for index, name in enumerate(header(study, cases)):
        table.add_column(
            name.replace(" (", "\n("), overflow="fold", justify="left" if index == len(cases) + 1 else "right"
        )
    for line in lines:
        if line[0] == AVERAGE:
            table.add_section()
        winner = line[-1].removesuffix(EMULATED)  # its column's title says so
        table.add_row(
            *(cell or NO_VALUE for cell in line[:-1]), f"[bold]{winner}[/bold]" if winner not in ("", TIE) else winner
        )
    return table
