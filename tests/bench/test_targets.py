"""The list of targets: each is asked of a case that is there, at the same level, and judged by the newest measurement."""

import json
import re
from pathlib import Path

from hyperllama.bench import chaos, cpu, gpu, merge, merging, ops, pipeline, regress_trials
from hyperllama.bench.harness import Case, title
from hyperllama.bench.pipeline import Workspace
from hyperllama.bench.targets import GOALS, Goal, Measured, judged, read, table


def asked_for(case: Case) -> list[tuple[str, Goal]]:
    """The targets of the list that a case answers, by the name of what they are against."""
    name = title({"case": case.name, "params": case.params})
    return [
        (target.against, goal)
        for target in case.targets
        for goal in GOALS
        if goal.area in ("C++", "folders") and re.search(goal.case, name)
        and (goal.provider, goal.against) == (target.provider, target.against)
    ]  # fmt: skip


def test_every_target_that_a_cpu_case_judges_is_in_the_list_at_the_same_level() -> None:
    cases = [make(ops_shape, dtype, 1 << 16) for make, dtypes in ops.MEMORY_BOUND.values() for dtype in dtypes]
    cases += [
        ops.attention_case(1, 64, 4, 2, width, dtype, documents=documents, backward=True)
        for width in (32, 64) for dtype in (cpu.FP32, cpu.BF16) for documents in (False, True)
    ]  # fmt: skip
    found: set[Goal] = set()
    for case in cases:
        listed = asked_for(case)
        judged_here = [target for target in case.targets if target.least is not None]
        assert [target.against for target in judged_here] == [against for against, _ in listed], case.name
        for target, (_, goal) in zip(judged_here, listed, strict=True):
            if "attention" not in case.name or goal.least != 1.5:  # 1.3 where the CPU doesn't multiply bf16
                assert goal.least == target.least
            found.add(goal)
    for model, shape, _, dtype, floors, *_ in cpu.STEPS:
        name = f"step model={model} windows=1 T={shape.max_position_embeddings} tokens=1 dtype={ops.dtype_name(dtype)} malloc=users"
        of = {goal.against: goal for goal in GOALS if goal.case.startswith("^step") and re.search(goal.case, name)}
        wanted = dict(zip(("transformers", "transformers compiled", "matmul"), floors, strict=True))
        assert {against: goal.least for against, goal in of.items()} == {
            against: least for against, least in wanted.items() if least is not None
        }
        found |= set(of.values())
    left = [goal for goal in GOALS if goal.area == "C++" and goal not in found]
    assert [goal.case.split()[0] for goal in left] == [
        "^linear_cross_entropy"
    ]  # its weights would take half a gigabyte here


ops_shape = cpu.llama(64, 96, 2, 4, 2, 16, 128, 32)


def test_every_target_of_folders_has_a_case() -> None:
    for goal in GOALS:
        if goal.area == "folders" and goal.case.startswith("^merge"):
            method = merge.METHODS[re.search(r"method=(\w+)", goal.case)[1]]
            least = {"mergekit": method.against_tool, "floor": 1 / method.floors}.get(goal.against, 1.0)
            assert goal.least == least
            assert goal.against in ("mergekit", "floor", f"{merge.MERGE_GB} GB anonymous memory")


def test_every_target_beside_steps_and_folders_is_judged_by_the_program_that_measures_it(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    found = [
        pipeline.measured(pipeline.stall_case(space, 100_000), 1),
        pipeline.measured(pipeline.pairs_case(space, 20), 1),
    ]
    trial = {"slower": [], "seconds": 1.0}
    found += regress_trials.judged([{**trial, "slowed": None}, {**trial, "slowed": "a", "slower": ["a"]}])
    shares = {name: {"gap_closed": [0.4, 0.6], "seeds": {"1": 1.0, "2": 1.0}} for name in ("linear", "Adam's v")}
    found += chaos.judged({"kills": 50, "problems": []})
    found += merging.judged({family: shares for family in ("1x", "1x-cloned")})
    seen = set()
    for result in found:
        (target,) = result["targets"]
        name = re.sub(r"parameters=\d+", "parameters=180000000", title(result)).replace("pairs=20", "pairs=4000")
        (goal,) = (goal for goal in GOALS if re.search(goal.case, name))
        assert (goal.provider, goal.against, goal.least) == (target["provider"], target["against"], target["least"])
        assert target["met"] is True
        seen.add(goal)
    areas = {
        goal for goal in GOALS if goal.area in ("merges", "data", "gate") or re.match("\\^(stall|chaos)", goal.case)
    }
    assert [goal.case for goal in areas - seen] == ["^tokenize "]  # its peer is not installed here


def test_every_target_of_a_gpu_is_the_one_that_bench_gpu_judges() -> None:
    binding = [cell for cell in gpu.cells() if cell.mode == "cold" and cell.tokens == 65536 and cell.shape == "180M"]
    for cell in binding:
        for target in gpu.targets(cell, gpu.PROBLEMS[cell.op](gpu.SHAPES[cell.shape], cell.tokens)):
            if target.least is None:
                continue
            name = f"{cell.op} shape={cell.shape} tokens={cell.tokens} mode={cell.mode}"
            levels = {
                goal.least
                for goal in GOALS
                if goal.area == "Triton" and goal.provider == target.provider and re.search(goal.case, name)
                and re.fullmatch(goal.against, target.against)
            }  # fmt: skip
            assert levels == {target.least}, (name, target)


def test_the_newest_measurement_here_counts_and_one_from_elsewhere_is_named(tmp_path: Path) -> None:
    goal = Goal("C++", "CPU", "^op ", "csrc", "copy", 0.8)

    def write(device: str, date: str, median: float) -> None:
        measured = {"median": median, "low": None, "high": None}
        target = {"provider": "csrc", "against": "copy", "least": 0.8, "measured": measured, "met": median >= 0.8}
        result = {"case": "op", "params": {"n": 1}, "targets": [target]}
        document = {"date": date, "environment": {"device": device}, "results": [result]}
        (tmp_path / device).mkdir(exist_ok=True)
        (tmp_path / device / f"{date}.json").write_text(json.dumps(document))

    for device, date, median in (("a", "2026-01-01", 0.5), ("a", "2026-01-02", 0.9), ("b", "2026-01-03", 0.7)):
        write(device, date, median)
    (tmp_path / "merging.json").write_text('{"summary": {}}')  # no results of the harness
    measured = list(read(tmp_path))
    [row] = judged([goal], measured, {"a"})
    assert (row["measured"], row["met"], row["date"], row["here"]) == (0.9, True, "2026-01-02", True)
    [row] = judged([goal], measured, {"c"})
    assert (row["measured"], row["met"], row["here"]) == (0.7, False, False)
    assert "NO   b, not measured on this device" in table([row])
    [row] = judged([goal], [], {"c"})
    assert row["met"] is None and "not measured on this device (CPU)" in table([row])
    wrong = Measured("op n=1", "csrc", "copy", float("nan"), "a", "2026-01-04")  # it ran and its output was wrong
    assert judged([goal], [*measured, wrong], {"a"})[0]["met"] is False
