"""bench.throughput in small on a CPU: the same work is compared, in turns, through the real loop. Nothing here is about speed."""

import json

import pytest

from hyperllama.bench import cpu, throughput

TINY = cpu.llama(32, 48, 2, 2, 1, 16, 256, 16)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("throughput")
    return throughput.throughput(
        "tiny", TINY, folder, windows=6, micro=4, their_micro=2, steps=2, rounds=2, device="cpu", compiled=False,
        liger=False, precision="fp32",
    )  # fmt: skip


def test_both_sides_do_the_same_whole_steps(measured):
    json.dumps(measured)
    assert {name: found["reason"] for name, found in measured["providers"].items()} == {
        "transformers": None,
        "ours": None,
    }
    assert measured["params"]["tokens"] == 2 * 6 * 16
    assert all(len(found["samples"]) == 2 for found in measured["providers"].values())
    assert measured["providers"]["ours"]["ratio"]["median"] > 0


def test_targets_of_an_h200_are_told_elsewhere(measured):
    (target,) = measured["targets"]
    assert (target["provider"], target["against"]) == ("ours", "transformers") and target["met"] is None


def test_on_an_h200_mfu_and_memory_are_judged(measured, monkeypatch):
    monkeypatch.setattr(throughput, "device_name", lambda device: "NVIDIA H200")
    found = {
        "samples": [1.0, 1.1, 0.9],
        "seconds": {"median": 1.0},
        "figures": {"peak_bytes": 60 * 10**9, "clocks": []},
    }
    result = {"providers": {"ours": dict(found)}, "targets": []}
    throughput.judged(result, "572M", int(0.6 * 989.4e12), "cuda")
    assert result["providers"]["ours"]["figures"]["mfu"] == pytest.approx(0.6)
    assert {target["against"]: target["met"] for target in result["targets"]} == {
        "seconds at 50% MFU": True,
        "50 GB": False,
    }


def test_a_run_that_is_not_the_same_mathematics_has_no_ratio():
    told = {"right": [(5.0, 1.0)], "off": [(5.2, 1.0)]}
    assert throughput.same_work(lambda _: told["right"], lambda _: told["right"]) is None
    assert "first loss" in throughput.same_work(lambda _: told["off"], lambda _: told["right"])


def test_overhead_runs_the_loop_the_step_and_the_loop_without_work(tmp_path):
    result = throughput.overhead(tmp_path, TINY, windows=2, micro=1, rounds=1)
    assert set(result["providers"]) == {"loop", "step", "loop, next to no work"}
    assert all(found["samples"] for found in result["providers"].values()), result["providers"]
    (target,) = result["targets"]
    assert target["against"] == "3 % that is not an op" and target["met"] is not None


def test_the_command_line_of_a_gpu_gives_every_setting(measured, monkeypatch):
    asked = {}
    monkeypatch.setattr(throughput.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(throughput, "throughput", lambda *_, **settings: asked.update(settings) or measured)
    monkeypatch.setattr("sys.argv", ["throughput", "--models", "180M", "--cuda-graphs"])
    assert throughput.main() == 0 and asked["cuda_graphs"] and asked["device"] == "cuda"
