"""Finished runs side by side."""

from pathlib import Path
from typing import Any

from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json


def summaries(folders: list[Path]) -> list[dict[str, Any]]:
    """One row a finished run: a folder is a run, or holds runs.

    Raises HyperLlamaError for a folder that is neither.
    """
    rows = []
    for folder in folders:
        files = [folder / "run.json"] if (folder / "run.json").is_file() else sorted(folder.glob("**/run.json"))
        if not files:
            raise HyperLlamaError(f"{folder} holds no finished run (no run.json)")
        rows += [_row(read_json(file)) for file in files]
    return rows


def _row(record: dict[str, Any]) -> dict[str, Any]:
    plan, ledger = record["plan"], record["ledger"]
    inherited = sum(ledger["ancestors"].values())
    return {
        "run": record["name"],
        "parameters": plan["parameters"],
        "tokens": plan["tokens"],
        "steps": plan["steps"],
        "spent_flops": ledger["spent"],
        "total_flops": inherited + ledger["spent"],
        "loss": record["loss"],
        "seconds": record["seconds"],
    }
