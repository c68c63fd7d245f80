"""One progress bar for all long work: done/total, units per second, tokens per second, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Meter:
    """A bar on standard error, used as a context manager; silent when `enabled` is false.

    `enabled=None` draws only on a terminal, so logs and pipes stay clean.
    """

    def __init__(self, label: str, total: int | None, unit: str, enabled: bool | None = None):
        self.unit, self.tokens, self.done = unit, 0, 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if enabled is None else enabled),
        )
        self._task = self._progress.add_task(label, total=total, rate="")

    def __enter__(self) -> Meter:
        self._start = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, items: int, tokens: int = 0) -> None:
        """Count `items` finished units made of `tokens` tokens."""
        self.done += items
        self.tokens += tokens
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rate = f"{self.done / seconds:.1f} {self.unit}/s"
        if self.tokens:
            rate += f", {self.tokens / seconds:,.0f} tokens/s"
        self._progress.update(self._task, advance=items, rate=rate)
