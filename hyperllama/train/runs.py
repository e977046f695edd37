"""Finished runs side by side."""

from pathlib import Path
from typing import Any

from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json
from hyperllama.flops import Ledger


def summaries(folders: list[Path]) -> list[dict[str, Any]]:
    """One row a finished run: a folder is a run, or holds runs.

    Raises HyperLlamaError for a folder that is neither.
    """
    return [_row(run / "run.json") for run in finished(folders)]


def finished(folders: list[Path]) -> list[Path]:
    """The folders of the finished runs in `folders`. Raises HyperLlamaError for one that is no run and holds none."""
    runs: list[Path] = []
    for folder in folders:
        files = [folder / "run.json"] if (folder / "run.json").is_file() else sorted(folder.glob("**/run.json"))
        if not files:
            raise HyperLlamaError(f"{folder} holds no finished run (no run.json)")
        runs += [file.parent for file in files]
    return runs


def _row(file: Path) -> dict[str, Any]:
    record = read_json(file)
    try:
        plan, ledger = record["plan"], Ledger.from_json(record["ledger"], file)
        return {
            "run": record["name"],
            "parameters": plan["parameters"],
            "tokens": plan["tokens"],
            "steps": plan["steps"],
            "spent_flops": ledger.spent,
            "total_flops": ledger.total,
            "loss": record["loss"],
            "bits_per_byte": record.get("bits_per_byte"),  # where the recipe has evaluate
            "seconds": record["seconds"],
        }
    except (KeyError, TypeError) as error:
        raise HyperLlamaError(f"{file} is not the record of a training run: {error!r}") from None
