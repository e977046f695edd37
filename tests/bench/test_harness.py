"""The harness: fair order, right statistics, no ratio without a passed check, one results file."""

import json
import math
import platform
import random
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperllama.bench import harness
from hyperllama.bench.environment import ROOT, device_slug, environment, without_paths
from hyperllama.bench.harness import (
    Case,
    CpuClock,
    Roof,
    Target,
    judgement,
    median_interval,
    missed,
    read_results,
    rotated,
    run,
    table,
    write_results,
)


class World:
    """A clock that moves only when a provider works, and the order in which providers worked."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, [""]
        self.clock = CpuClock(now=lambda: self.now)

    def provider(self, name: str, seconds: list[float], output: Any = 0) -> Any:
        """A set-up whose thunk's i-th call takes seconds[i], the last one repeating."""

        def setup() -> Any:
            left = list(seconds)

            def thunk() -> Any:
                self.now += left.pop(0) if len(left) > 1 else left[0]
                self.calls.append(name)
                return output

            return thunk

        return setup

    def case(
        self, check: Any = lambda output, expected: None if output == expected else "differs", **providers: Any
    ) -> Case:
        return Case("work", {"n": 3}, 8, 16, providers, check)


def refuse() -> Any:
    raise ImportError("no module in /usr/lib/python3/site-packages/fast.py")


def test_providers_take_turns_and_every_one_goes_first_equally_often() -> None:
    world = World()
    run(world.case(**{name: world.provider(name, [1.0]) for name in "abc"}), rounds=6, warmup=0, clock=world.clock)
    setups, scaling = 3, 3
    timed = world.calls[1 + setups :]
    first_round = timed[: 3 + scaling]  # each provider's calls are scaled before its first sample
    assert first_round == list("aabbcc")
    rounds = ["".join(timed[i : i + 3]) for i in range(len(first_round), len(timed), 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab"]
    assert [rotated(list("abc"), turn)[0] for turn in range(6)] == list("abcabc")


def test_a_roof_that_does_not_run_costs_no_times() -> None:
    world = World()
    case = replace(
        world.case(a=world.provider("a", [1.0])), roofs={"copy": Roof(refuse)}, targets=(Target("a", "copy", 0.9),)
    )
    result = run(case, rounds=6, warmup=0, clock=world.clock)
    assert len(result["providers"]["a"]["samples"]) == 6
    assert "ImportError" in result["providers"]["copy"]["reason"] and result["targets"][0]["met"] is None


def test_ratio_is_the_median_of_paired_ratios_so_that_drift_cancels() -> None:
    world = World()
    drift = [1.0, 1.0, *(1.0 + 0.5 * turn for turn in range(9))]  # set-up call, scaling, rounds
    slow, fast = world.provider("slow", drift), world.provider("fast", [took / 4 for took in drift])
    result = run(world.case(slow=slow, fast=fast), rounds=9, warmup=0, clock=world.clock)
    found = result["providers"]["fast"]
    assert found["ratio"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert found["samples"] == pytest.approx([took / 4 for took in drift[2:]])
    assert found["seconds"]["median"] == pytest.approx(0.75)
    assert found["seconds"]["low"] == pytest.approx(0.375) and found["seconds"]["high"] == pytest.approx(1.125)
    assert result["providers"]["slow"]["ratio"]["median"] == 1.0


def test_warm_up_rounds_are_not_kept() -> None:
    world = World()
    a = world.provider("a", [100.0, 100.0, 50.0, 50.0, 1.0])  # set-up, scaling, two warm-up rounds
    assert run(world.case(a=a), rounds=3, warmup=2, clock=world.clock)["providers"]["a"]["samples"] == [1.0, 1.0, 1.0]


def test_short_calls_are_repeated_until_a_sample_is_long_enough() -> None:
    world = World()
    found = run(world.case(a=world.provider("a", [1e-5])), rounds=2, clock=world.clock, min_sample=2e-3)["providers"][
        "a"
    ]
    assert found["repeats"] >= 200
    assert found["samples"] == pytest.approx([1e-5, 1e-5])


def test_cold_calls_are_timed_one_by_one_without_the_flush() -> None:
    world = World()

    def flush() -> None:
        world.now += 7.0

    clock = CpuClock(flush, lambda: world.now)
    assert clock.seconds(world.provider("a", [0.5])(), 4) == 2.0
    assert world.now == 4 * 7.5


@pytest.mark.parametrize("n", [6, 9, 10, 15, 51])
def test_interval_of_the_median_covers_it_as_often_as_promised(n: int) -> None:
    rank = {value: i for i, value in enumerate(range(n))}
    interval = median_interval(range(n))
    assert interval["low"] is not None and interval["high"] is not None
    k = rank[int(interval["low"])] + 1
    assert interval["high"] == n - k

    def misses(k: int) -> float:
        return 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    assert misses(k) <= 0.05 < misses(k + 1)
    draw, inside = random.Random(n), 0
    for _ in range(2000):
        found = median_interval([draw.expovariate(1.0) for _ in range(n)])
        assert found["low"] is not None and found["high"] is not None
        inside += found["low"] <= math.log(2) <= found["high"]
    assert inside / 2000 > 0.94


def test_five_samples_have_a_median_but_no_interval() -> None:
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "low": None, "high": None}


def test_a_provider_that_cannot_be_set_up_is_recorded_without_paths() -> None:
    world = World()
    providers = run(world.case(a=world.provider("a", [1.0]), b=refuse), rounds=2, clock=world.clock)["providers"]
    assert providers["a"]["seconds"] is not None
    assert providers["b"] == {
        "reason": "ImportError: no module in fast.py", "repeats": None, "samples": [], "seconds": None, "ratio": None,
        "figures": None,
    }  # fmt: skip


def test_a_provider_that_breaks_later_is_recorded_and_the_others_go_on() -> None:
    world = World()
    calls = iter(range(4))

    def breaks() -> Any:
        def thunk() -> int:
            world.now += 1.0
            if next(calls, None) is None:
                raise RuntimeError("out of memory")
            return 0

        return thunk

    case = world.case(a=world.provider("a", [1.0]), b=breaks)
    providers = run(case, rounds=4, warmup=0, clock=world.clock)["providers"]
    assert providers["b"]["reason"] == "RuntimeError: out of memory" and providers["b"]["seconds"] is None
    assert len(providers["a"]["samples"]) == 4


def test_a_failed_check_gives_a_time_but_no_ratio() -> None:
    world = World()
    case = world.case(a=world.provider("a", [1.0], 5), b=world.provider("b", [0.5], 6), c=world.provider("c", [0.5], 5))
    providers = run(case, rounds=6, clock=world.clock)["providers"]
    assert providers["b"]["reason"] == "no ratio: differs" and providers["b"]["ratio"] is None
    assert providers["b"]["seconds"]["median"] == 0.5
    assert providers["c"]["ratio"]["median"] == 2.0


def test_without_a_check_or_a_reference_there_is_no_ratio() -> None:
    world = World()
    unchecked = world.case(None, a=world.provider("a", [1.0]), b=world.provider("b", [1.0]))
    found = run(unchecked, rounds=1, clock=world.clock)["providers"]["b"]
    assert found["ratio"] is None and found["reason"] == "no ratio: the case has no check"
    orphan = run(world.case(a=refuse, b=world.provider("b", [1.0])), rounds=1, clock=world.clock)["providers"]["b"]
    assert orphan["ratio"] is None and orphan["reason"] == "no ratio: the reference a did not run"


def judged(world: World, *targets: Target, roofs: Any = None, **providers: Any) -> dict[str, Any]:
    case = Case("work", {"n": 3}, 8, 16, providers, world.case().check, roofs or {}, targets)
    return run(case, rounds=6, warmup=0, clock=world.clock)


def test_a_target_is_judged_on_the_median_of_paired_ratios() -> None:
    world = World()
    drift = [1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    slow, fast = world.provider("slow", drift), world.provider("fast", [took / 2 for took in drift])
    targets = Target("fast", "slow", 2.0), Target("fast", "slow", 2.1), Target("fast", "slow", None)
    result = judged(world, *targets, slow=slow, fast=fast)
    assert [target["met"] for target in result["targets"]] == [True, False, None]
    assert all(target["measured"] == {"median": 2.0, "low": 2.0, "high": 2.0} for target in result["targets"])
    assert missed([result, result]) == 2
    lines = judgement([result]).splitlines()
    assert lines[1].startswith("work n=3: fast >= 2 x slow") and lines[1].split()[-1] == "yes"
    assert lines[2].split()[-1] == "NO" and lines[3].startswith("work n=3: fast / slow") and lines[3].split()[-1] == "-"


def test_a_roof_takes_turns_unchecked_and_counts_as_the_work_of_the_case() -> None:
    world = World()
    roofs = {"copy": Roof(world.provider("copy", [0.5], "other work"), scale=3.0)}
    result = judged(world, Target("a", "copy", 0.75), roofs=roofs, a=world.provider("a", [2.0]))
    assert world.calls[-2:] in (["a", "copy"], ["copy", "a"])
    found = result["providers"]["copy"]
    assert found["seconds"]["median"] == 1.5 and found["reason"] is None and found["ratio"] is None
    assert result["targets"][0]["measured"]["median"] == 0.75 and result["targets"][0]["met"] is True


def test_a_wrong_output_misses_its_target_and_what_did_not_run_is_not_judged() -> None:
    world = World()
    a, wrong = world.provider("a", [1.0], 5), world.provider("wrong", [0.1], 6)
    targets = Target("wrong", "a", 2.0), Target("gone", "a", 2.0), Target("a", "gone", 2.0), Target("a", "wrong", 2.0)
    result = judged(world, *targets, a=a, wrong=wrong, gone=refuse)
    assert [target["met"] for target in result["targets"]] == [False, None, None, None]
    assert all(target["measured"] is None for target in result["targets"])
    orphan = judged(world, Target("a", "copy", 1.0), roofs={"copy": Roof(a)}, gone=refuse, a=a)
    assert orphan["targets"][0]["met"] is None and missed([orphan]) == 0


def test_results_file_comes_back_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    case = Case(
        "work", {"n": 3}, 2**80 + 1, 2**70 + 1, {"a": world.provider("a", [0.1])}, targets=(Target("a", "a", 1.0),)
    )
    results = [run(case, rounds=7, clock=world.clock)]
    monkeypatch.setattr(sys, "argv", ["/home/someone/bench/ops.py", "--out", "/home/someone/results", "--rounds=7"])
    file = tmp_path / "deep" / "results.json"
    write_results(file, results, {"copy": {"bytes_per_second": 1.5}})
    document = read_results(file)
    assert document["results"] == results
    assert document["results"][0]["flops"] == 2**80 + 1 and isinstance(document["results"][0]["bytes"], int)
    assert document["roofs"] == {"copy": {"bytes_per_second": 1.5}}
    assert document["command"] == ["ops.py", "--out", "results", "--rounds=7"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", document["date"])
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0, 2 was expected"):
        read_results(tmp_path / "old.json")


def test_environment_names_the_machine_but_not_whose_it_is() -> None:
    found = environment("cpu")
    text = json.dumps(found)
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["python"] == platform.python_version() and found["clocks"] is None
    assert not {socket.gethostname(), platform.node()} & set(re.findall(r"[\w.-]+", text))
    assert str(ROOT) not in text and f"{Path.home()}/" not in text
    assert not re.search(r'"(/|[A-Z]:\\)', text)


def test_paths_are_cut_to_their_last_part() -> None:
    assert without_paths("cannot open /a/b/c.so: no '/x/y' here") == "cannot open c.so: no 'y' here"
    assert without_paths("3 GB/s, a/b and 1 / 2") == "3 GB/s, a/b and 1 / 2"
    assert device_slug("NVIDIA H200 (141 GB)") == "nvidia-h200-141-gb"


def test_table_shows_times_rates_ratios_and_reasons() -> None:
    world = World()
    case = world.case(a=world.provider("a", [2e-3]), b=world.provider("b", [1e-3]), c=refuse)
    text = table([run(case, rounds=6, clock=world.clock)])
    lines = text.splitlines()
    assert lines[1] == "work n=3"
    assert "2 ms" in lines[2] and "1.000" in lines[2]
    assert "1 ms" in lines[3] and "2.000" in lines[3] and "1.6e-05" in lines[3] and "8e-06" in lines[3]
    assert lines[4].endswith("ImportError: no module in fast.py")
    steps = Case("step", {"tokens": 512}, 8, 16, {"a": world.provider("a", [0.5])})
    assert "1024" in table([run(steps, rounds=1, clock=world.clock)])


def test_roofs_are_measured_in_whole_numbers_of_work() -> None:
    copied = harness.copy_bandwidth(size=1 << 16, rounds=1)
    assert copied["bytes"] == 2 << 16 and copied["bytes_per_second"] == copied["bytes"] / copied["seconds"]
    product = harness.matmul_rate(size=32, rounds=1)
    assert product["flops"] == 2 * 32**3 and product["flops_per_second"] == product["flops"] / product["seconds"]


def test_reference_and_kernel_of_rms_norm_agree_so_that_a_ratio_exists() -> None:
    result = run(harness.rms_norm_case("cpu", rows=8, hidden=64), rounds=1, warmup=0, min_sample=0.0)
    assert set(result["providers"]) == {"reference", "csrc"} and result["bytes"] == 4 * (2 * 8 * 64 + 64)
    kernel = result["providers"]["csrc"]
    assert kernel["ratio"] is not None or kernel["reason"].startswith("HyperLlamaError")


def test_runs_from_the_repository_root() -> None:
    for module in ("bench.harness", "bench.cpu"):
        told = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert told.returncode == 0 and "--quick" in told.stdout
