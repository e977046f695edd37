"""Scaling: exponents are fitted right, work is counted right, every series runs."""

import json
from pathlib import Path

import pytest

from hyperllama.bench import scaling
from hyperllama.bench.pipeline import Workspace
from hyperllama.bench.scaling import Point, Series, counted, fit, measure


def test_exponents_of_exact_powers_and_their_uncertainty() -> None:
    work = [10, 100, 1000, 10000]
    found = fit(work, [2e-9 * w**1.5 for w in work])
    assert found["exponent"] == pytest.approx(1.5) and found["standard_error"] == pytest.approx(0.0, abs=1e-9)
    noisy = fit(work, [1e-3, 1.3e-2, 0.9e-1, 1.1])
    assert abs(noisy["exponent"] - 1) < 3 * noisy["standard_error"] < 0.3
    assert fit([1, 2], [1.0, 2.0]) == {"exponent": pytest.approx(1.0), "standard_error": None}


def test_a_cost_that_grows_faster_than_its_work_is_told() -> None:
    def points(power: int) -> list[Point]:
        return [Point(n, 1000 * n, lambda n=n: lambda: sum(range(2000 * n**power))) for n in (1, 2, 4, 8)]

    fine, bad = (measure(Series("sums", "n", "steps", points(power)), 3) for power in (1, 2))
    assert not fine["faster_than_work"] and bad["faster_than_work"]
    assert "FASTER THAN ITS WORK" in scaling.table([bad]) and "FASTER" not in scaling.table([fine])


def test_a_size_that_fails_is_left_out_of_the_fit() -> None:
    def broken() -> None:
        raise MemoryError("too large")

    points = [Point(n, n, lambda n=n: lambda: sum(range(20_000 * n))) for n in (1, 2)]
    found = measure(Series("sums", "n", "steps", [*points, Point(3, 3, lambda: broken)]), 3)
    assert found["points"][2]["reason"] == "MemoryError: too large" and found["fit"]["standard_error"] is None


def test_whole_models_are_counted_up_to_8B() -> None:
    rows = {row["model"]: row for row in counted(2048)}
    assert list(rows) == ["180M", "572M", "1.7B", "8B"]
    assert rows["8B"]["parameters"] == 8_030_261_248  # Llama 3 8B, as published
    assert rows["180M"]["flops_per_window"]["causal"] < rows["180M"]["flops_per_window"]["dense"]


@pytest.mark.parametrize(
    "name", ["one block", "sequence length", "vocabulary", "merge linear", "merge ties", "data read"]
)
def test_every_series_runs_in_small(name: str, tmp_path: Path) -> None:
    series = scaling.all_series(True, Workspace(tmp_path))[name]()
    for point in series.points[:2]:
        assert type(point.work) is int and point.work > 0
        point.setup()()
    assert [point.work for point in series.points] == sorted(point.work for point in series.points)


def test_processes_share_one_runs_work_and_say_their_own_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    series = scaling.processes([1, 2], Workspace(tmp_path), 2)
    assert series.points[0].work == 2 * series.points[1].work
    thunk = series.points[1].setup()
    thunk()
    assert 0 < thunk.figures["seconds"] < 60
    record = json.loads((tmp_path / "processes" / "run.json").read_text())
    assert record["ledger"]["spent"] > 0
