"""Merging beside copies and files, with the CPU as the device: the bytes of the executor's own path, resumed, refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hyperllama.cli import app
from hyperllama.errors import HyperLlamaError
from hyperllama.hub import streamed_folder
from hyperllama.kernels.backend import use
from hyperllama.merge import device, executor, parse_recipe, plan, run
from hyperllama.weights import NewTensor
from tests.merge.test_streaming import METHODS, contents, models, recipe  # noqa: F401


def through_the_threads(monkeypatch) -> None:
    """Let "cpu" go the way of a GPU."""
    monkeypatch.setattr(
        executor, "merge_on_gpu", lambda plan, name: lambda *rest: device.merge_on(torch.device("cpu"), *rest)
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_same_folder_as_without_it(models: Path, method: str, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(device, "PIECE", 1000)  # several to a tensor, and a last one that is not whole
    planned = plan(parse_recipe(recipe(method), "recipe"), models)
    with use("csrc"):
        run(planned, models / "plain")
        through_the_threads(monkeypatch)
        seen: list[int] = []
        result = run(planned, models / "out", progress=lambda done, total: seen.append(done))
    assert contents(models / "out") == contents(models / "plain")
    assert seen == sorted(set(seen)) and seen[-1] == planned.bytes_written and len(seen) == result["tensors"]


def test_what_was_finished_is_not_done_again(models: Path, monkeypatch) -> None:  # noqa: F811
    planned = plan(parse_recipe(recipe("ties"), "recipe"), models)
    through_the_threads(monkeypatch)
    run(planned, models / "whole")

    def stop(done: int, total: int) -> None:
        if len(stopped := stops) < 6:
            stopped.append(done)
        else:
            raise KeyboardInterrupt

    stops: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        run(planned, models / "out", progress=stop)
    assert not (models / "out").exists()
    tensors = [NewTensor(step.name, step.dtype, step.shape) for step in planned.steps]
    with streamed_folder(models / "part", tensors, "job") as writer:
        hashes = list(device.merge_on(torch.device("cpu"), planned.steps[:3], planned.folders, writer))
        assert list(writer.done) == [step.name for step in planned.steps[:3]]
        rest = list(device.merge_on(torch.device("cpu"), planned.steps[3:], planned.folders, writer))
        assert not list(device.merge_on(torch.device("cpu"), [], planned.folders, writer))
        writer.complete(planned.config, {}, None)
    assert len(hashes) == 3 and len(rest) == len(planned.steps) - 3
    found, expected = (load_file(models / name / "model.safetensors") for name in ("part", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_result_that_is_not_finite_leaves_nothing(models: Path, make_model, monkeypatch) -> None:  # noqa: F811
    make_model("huge", 3, torch.bfloat16, vocab_size=600, change=lambda t: [x.fill_(3e38) for x in t.values()])
    value = yaml.safe_load(recipe("linear"))
    value["models"] = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "huge")]
    value |= {"parameters": {"normalize": False}, "dtype": "float16"}
    through_the_threads(monkeypatch)
    with pytest.raises(
        HyperLlamaError, match=r"embed_tokens\.weight merged from a, huge has NaN or infinity as float16"
    ):
        run(plan(parse_recipe(yaml.safe_dump(value), "recipe"), models), models / "out")
    assert not (models / "out").exists()


def test_devices_that_are_not_there_and_merges_that_need_the_cpu_are_refused(models: Path) -> None:  # noqa: F811
    planned = plan(parse_recipe(recipe("linear"), "recipe"), models)
    with pytest.raises(HyperLlamaError, match="'gpu' is no device: cpu, cuda or cuda:N was expected"):
        run(planned, models / "out", device="gpu")
    with pytest.raises(HyperLlamaError, match=r"device cuda:\d+: this machine has \d+ GPUs"):
        run(planned, models / "out", device=f"cuda:{torch.cuda.device_count()}")
    value = yaml.safe_load(recipe("linear")) | {"hyperllama": {"regmean": {"texts": ["a.txt", "b.txt"]}}}
    planned = plan(parse_recipe(json.dumps(value), "recipe"), models)
    with pytest.raises(HyperLlamaError, match="importance, learn and regmean merge on the CPU"):
        run(planned, models / "out", device="cpu:0")


def test_the_command_refuses_a_device_before_any_work(models: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(models)
    (models / "r.yaml").write_text(recipe("linear"))
    missing = f"cuda:{torch.cuda.device_count()}"
    for rest, sentence in (
        (["--dry-run"], "this machine has"),
        (["--search", "--dev", "r.yaml"], "a search works on the CPU"),
    ):
        with pytest.raises(HyperLlamaError, match=sentence):
            app(["merge", "r.yaml", "out", "--device", missing, *rest], standalone_mode=False)
