"""README's figures are those of bench/results."""

import json
import re
from pathlib import Path

import pytest

from hyperllama.bench import readme


def test_the_readme_has_the_figures_that_were_measured() -> None:
    page = readme.README.read_text(encoding="utf-8")
    assert readme.updated(page, readme.block()) == page and not readme.stale(), "run python -m bench.readme"
    for image in re.findall(r"!\[.*?\]\((.*?)\)", readme.block()):
        assert (readme.README.parent / image).stat().st_size < 200_000


def test_a_picture_of_other_results_is_noticed(tmp_path: Path) -> None:
    [source] = readme.RESULTS.glob("*/cpu.json")
    (tmp_path / "device").mkdir()
    copy = tmp_path / "device" / "cpu.json"
    copy.write_bytes(source.read_bytes())
    picture = copy.with_suffix(".png")
    assert readme.stale(tmp_path) == [picture]
    picture.write_bytes(source.with_suffix(".png").read_bytes())
    assert readme.stale(tmp_path) == []
    copy.write_bytes(source.read_bytes() + b"\n")
    assert readme.stale(tmp_path) == [picture]


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    [source] = readme.RESULTS.glob("*/cpu.json")
    document = json.loads(source.read_text(encoding="utf-8"))
    (tmp_path / "cpu.json").write_text(json.dumps(document))
    before = readme.block(tmp_path)
    step = next(result for result in document["results"] if result["case"] == "step")
    seconds = step["providers"]["csrc"]["seconds"]["median"]
    assert f"| {step['params']['tokens'] / seconds:,.0f} |" in before
    step["providers"]["csrc"]["seconds"]["median"] = seconds / 2
    (tmp_path / "cpu.json").write_text(json.dumps(document))
    after = readme.block(tmp_path)
    assert after != before and f"| {2 * step['params']['tokens'] / seconds:,.0f} |" in after


def test_what_is_outside_the_marks_stays() -> None:
    page = f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n"
    assert readme.updated(page, f"{readme.BEGIN}\nnew\n{readme.END}") == f"a\n{readme.BEGIN}\nnew\n{readme.END}\nb\n"
    with pytest.raises(ValueError, match="must have one line"):
        readme.updated("no marks", "")


def test_folders_figures_name_ours_and_the_public_tool(tmp_path: Path) -> None:
    interval = {"median": 2.0, "low": None, "high": None}
    ours = {"seconds": interval, "figures": {"peak_anonymous_bytes": 34e6, "cpu_seconds": 1.0}}
    target = {
        "provider": "ours",
        "against": "mergekit",
        "least": 15.0,
        "measured": interval | {"median": 16.25},
        "met": True,
    }
    result = {
        "case": "merge", "params": {"method": "ties", "models": 5, "size": "572M"}, "providers": {"ours": ours}, "targets": [target]
    }  # fmt: skip
    about = {"device": "D", "threads": 2, "torch": "T", "git": None}
    document = {"date": "2000-01-01", "command": ["merge.py"], "environment": about, "results": [result]}
    (tmp_path / "merge.json").write_text(json.dumps(document))
    assert "| merge ties, 572M | 2.00 | 0.034 | 16.2 |" in readme.block(tmp_path)
