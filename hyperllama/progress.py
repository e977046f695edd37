"""Progress of long commands, on standard error."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column


def console() -> Console:
    """Standard error, for people: lines are never wrapped, and a file or pipe gets the width the bars need."""
    made = Console(stderr=True, soft_wrap=True, highlight=False)
    if not made.is_terminal:
        made.width = 140
    return made


def progress_bar(console: Console, *, disable: bool = False) -> Progress:
    """The bar of every long command: what, how far, elapsed, left, and a free text of figures."""
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
        console=console,
        disable=disable,
    )
