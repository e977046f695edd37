"""What every command shares: common options, and what it shows on the terminal. Heavy imports happen inside."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperllama.errors import HyperLlamaError

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def existing(paths: list[Path]) -> list[Path]:
    """The paths. Raises HyperLlamaError for one that does not exist."""
    for path in paths:
        if not path.exists():
            raise HyperLlamaError(f"{path} does not exist")
    return paths


class Bar:
    """A progress bar on standard error as a context manager that yields `progress(done, total)`; disabled, it does nothing.

    progress.stage(name) begins a bar of its own, in bytes, and returns what that is told.
    """

    def __init__(self, what: str, *, disable: bool = False):
        self.what, self.disable = what, disable
        self.task: Any = None

    def __enter__(self) -> "Bar":
        if not self.disable:
            from hyperllama.progress import console, progress_bar

            self.bar = progress_bar(console())
            self.bar.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        if not self.disable:
            if self.task is None:
                self.task = self.bar.add_task(self.what, total=None, figures="")
            self.bar.update(self.task, completed=done, total=total)

    def stage(self, name: str) -> Callable[[int, int], None]:
        """Begin a bar in bytes; returns what is told how far it is."""
        if self.disable:
            return lambda done, total: None
        task, begin = self.bar.add_task(name, total=None, figures=""), None

        def progress(done: int, total: int) -> None:
            nonlocal begin
            begin = begin or (time.monotonic(), done)  # what an earlier process did is not this one's speed
            speed = (done - begin[1]) / 1e6 / max(time.monotonic() - begin[0], 1e-3)
            self.bar.update(task, completed=done, total=total, figures=f"{speed:,.1f} MB/s" if speed else "")

        return progress

    def __exit__(self, *_: object) -> None:
        if not self.disable:
            self.bar.stop()


def print_value(value: Any, as_json: bool) -> None:
    """JSON for machines, indented keys and values for people; integers with separators."""
    if as_json:
        print(json.dumps(value, indent=1, ensure_ascii=False))
    else:
        _tree(value, 0)


def _tree(value: Any, depth: int) -> None:
    items = value.items() if isinstance(value, dict) else ((f"[{i}]", item) for i, item in enumerate(value))
    for key, item in items:
        if isinstance(item, dict) or (isinstance(item, list) and any(isinstance(i, dict | list) for i in item)):
            print(f"{'  ' * depth}{key}:")
            _tree(item, depth + 1)
        else:
            text = f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) else item
            print(f"{'  ' * depth}{key}: {', '.join(map(str, item)) if isinstance(item, list) else text}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in rows[0]:
        table.add_column(
            name.replace("_", " "), justify="left" if name in ("run", "name", "merge", "language") else "right"
        )
    for row in rows:
        table.add_row(
            *(
                f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}" if isinstance(cell, float) else str(cell or "-")
                for cell in row.values()
            )
        )
    Console().print(table)
