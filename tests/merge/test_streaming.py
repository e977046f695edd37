"""Folders in and out tensor by tensor: killed and gone on with, in shards, without torch, without room, damaged."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperllama import weights
from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import HyperClone, Operator, RandomCopies
from hyperllama.kernels import backend, native
from hyperllama.merge import parse_recipe, plan, run

MakeModel = Callable[..., Path]
ROOT = Path(__file__).parents[2]
METHODS = {
    "linear": {"normalize": True},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.5},
    "multislerp": {},
    "breadcrumbs": {"density": 0.5},
}


def recipe(method: str) -> str:
    """YAML of a merge of the folders a and b, onto the folder base."""
    models = [{"model": name, "parameters": {"weight": 1 + i}} for i, name in enumerate("ab")]
    base = {} if method in ("linear", "multislerp") else {"base_model": "base"}
    return yaml.safe_dump({"merge_method": method, "models": models, "parameters": METHODS[method], **base})


@pytest.fixture
def models(make_model: MakeModel, tmp_path: Path) -> Path:
    """The folder with a, b and base."""
    for seed, name in enumerate(("base", "a", "b")):
        make_model(name, seed, torch.bfloat16, vocab_size=600)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def merge(models: Path, method: str, out: str) -> dict[str, Any]:
    return run(plan(parse_recipe(recipe(method), "recipe"), models), models / out)


KILLED = """
import os, signal, sys
from hyperllama.merge import parse_recipe, plan, run
def progress(done, total, calls=[]):
    calls.append(done)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
run(plan(parse_recipe(sys.argv[1], "recipe"), "."), "out", progress=progress)
"""


def kill_in_the_middle(models: Path, code: str, *arguments: str) -> Path:
    """Run code that kills itself after seven tensors; returns the folder that it left."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=models, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (models / "out").exists()
    (left,) = models.glob(".out.*.tmp")
    return left


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_merge_goes_on_and_ends_in_the_same_bytes(models: Path, method: str) -> None:
    merge(models, method, "whole")
    left = kill_in_the_middle(models, KILLED, recipe(method))
    journal = (left / "journal").read_text().splitlines()
    assert len(journal) == 1 + 7
    with open(left / "journal", "a") as file:
        file.write(journal[3][:20])  # a line that was cut off
    damaged = json.loads(journal[2])["name"]
    with safe_open(str(left / "model.safetensors"), "pt") as handle:
        content = handle.get_tensor(damaged).view(torch.uint8).numpy().tobytes()
    file_bytes = bytearray((left / "model.safetensors").read_bytes())
    file_bytes[file_bytes.index(content)] ^= 1  # a page that never reached the disk
    (left / "model.safetensors").write_bytes(file_bytes)
    assert merge(models, method, "out")["resumed"] == 6
    assert contents(models / "out") == contents(models / "whole")
    assert not list(models.glob(".out*"))


def test_what_was_left_of_another_merge_is_not_gone_on_with(models: Path, make_model: MakeModel) -> None:
    merge(models, "linear", "whole")
    kill_in_the_middle(models, KILLED, recipe("ties"))
    assert merge(models, "linear", "out")["resumed"] == 0
    assert contents(models / "out") == contents(models / "whole")
    kill_in_the_middle(
        shutil.copytree(models, models / "copy", ignore=lambda *_: ["out", "whole"]), KILLED, recipe("ties")
    )
    changed = load_file(models / "copy" / "a" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in changed.items()}, models / "copy" / "a" / "model.safetensors")
    assert merge(models / "copy", "ties", "out")["resumed"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_shards_in_and_out(models: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(models, method, "whole")
    whole = load_file(models / "whole" / "model.safetensors")
    monkeypatch.setattr(weights, "SHARD_BYTES", 2000)
    merge(models, method, "sharded")
    index = read_json(models / "sharded" / "model.safetensors.index.json")
    files = sorted(models.glob("sharded/*.safetensors"))
    assert len(files) == 3 and not (models / "sharded" / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    found: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 2000 or len(tensors) == 1
        found |= tensors
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    monkeypatch.undo()
    shutil.rmtree(models / "a")
    shutil.move(models / "sharded", models / "a")  # shards read back
    merge(models, "linear", "again")
    shutil.rmtree(models / "a")
    shutil.move(models / "whole", models / "a")
    merge(models, "linear", "once more")
    assert (models / "again" / "model.safetensors").read_bytes() == (
        models / "once more" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_without_the_library_the_bits_are_the_same(models: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(models, method, "native")
    native.library.cache_clear()
    monkeypatch.setattr(native, "_library_folders", lambda: [])
    monkeypatch.delenv("HYPERLLAMA_CSRC", raising=False)  # a folder that is named, as for sanitizers, must have it
    try:
        merge(models, method, "plain")
    finally:
        native.library.cache_clear()
    ours, theirs = contents(models / "native"), contents(models / "plain")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["hyperllama.json"] == theirs["hyperllama.json"]


def test_a_forced_backend_is_that_of_folders_too(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(models, "ties", "native")
    whole = grow_folder(models / "a", models / "grown", [HyperClone(2)])
    monkeypatch.setattr("hyperllama.kernels.raw.csrc", lambda name: pytest.fail(f"csrc's {name} was called"))
    with backend.use("reference"):
        merge(models, "ties", "plain")
        assert grow_folder(models / "a", models / "again", [HyperClone(2)]) == whole
    for one, other in (("native", "plain"), ("grown", "again")):
        assert contents(models / one) == contents(models / other)


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "dare_ties", "multislerp", "slerp", "model_stock"]
)
def test_merging_by_the_library_imports_neither_torch_nor_numpy(models: Path, method: str) -> None:
    base = {"linear": {}, "multislerp": {}}.get(method, {"base_model": "base"})
    listed = [
        {"model": name, "parameters": {"weight": 1, "density": 0.5}} for name in "ab"[: 1 if method == "slerp" else 2]
    ]
    made = {
        "merge_method": method,
        "models": listed,
        **base,
        **({"parameters": {"t": 0.3}} if method == "slerp" else {}),
    }
    (models / "recipe.yaml").write_text(yaml.safe_dump(made))
    without("torch", "numpy")("merge", "recipe.yaml", "out", "--quiet", cwd=models)
    assert load_file(models / "out" / "model.safetensors")


@pytest.mark.parametrize("arguments", [[], ["--noise-db", "10"], ["--factor", "3", "--dyadic"], ["--method", "net2wider"],
                                       ["--method", "identity"], ["--method", "lemon"]], ids=str)  # fmt: skip
def test_growing_by_the_library_imports_no_torch(models: Path, arguments: list[str]) -> None:
    said = without("torch")("grow", "a", "out", "--quiet", *arguments, cwd=models)
    assert ("function preserved" in said) == (
        arguments[-1:] not in (["net2wider"], ["lemon"])
    )  # those round shares in bf16


@pytest.mark.parametrize("arguments", [[], ["--noise-db", "10"], ["--factor", "4", "--ffn-factor", "2"]], ids=str)
def test_growing_by_even_tiles_imports_no_numpy(models: Path, arguments: list[str]) -> None:
    assert "function preserved" in without("torch", "numpy")("grow", "a", "out", "--quiet", *arguments, cwd=models)


def test_help_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    assert "merge" in without("torch", "numpy")("--help", cwd=tmp_path)


def without(*modules: str) -> Callable[..., str]:
    """A function that says what a command prints in a process in which the modules can't be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({modules})); sys.argv[0] = 'hyperllama'\n"
        "from hyperllama.cli import main; main()"
    )

    def call(*arguments: str, cwd: Path) -> str:
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return call


OPERATORS: dict[str, Operator] = {
    "even": HyperClone(2),
    "noise": HyperClone(2, noise_db=10.0),
    "random": RandomCopies(2, rule="net2wider"),
}
GROWN = KILLED.replace("from hyperllama.merge import parse_recipe, plan, run", "from hyperllama.grow.folder import grow_folder\n"
                       "from hyperllama.grow.operators import HyperClone, RandomCopies")  # fmt: skip
GROWN = GROWN.replace(
    'run(plan(parse_recipe(sys.argv[1], "recipe"), "."), "out"', 'grow_folder("a", "out", [eval(sys.argv[1])]'
)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_killed_growth_goes_on_and_ends_in_the_same_bytes(models: Path, operator: Operator) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        whole = grow_folder("a", "whole", [operator])
        left = kill_in_the_middle(models, GROWN, repr(operator))
        assert len((left / "journal").read_text().splitlines()) == 1 + 7
        assert grow_folder("a", "out", [operator]) == whole
    assert contents(models / "out") == contents(models / "whole")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, used=1 << 40, free=1000))
    yield


def test_a_disk_without_room_is_refused_before_any_output(models: Path, full_disk: None) -> None:
    before = sorted(path.name for path in models.iterdir())
    with pytest.raises(HyperLlamaError, match=r"out needs [\d,]+ bytes, the disk of .* has 1,000 left"):
        merge(models, "linear", "out")
    with pytest.raises(HyperLlamaError, match=r"out needs [\d,]+ bytes"):
        grow_folder(models / "a", models / "out", [HyperClone(2)])
    assert sorted(path.name for path in models.iterdir()) == before


HEADER = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
DAMAGE = {
    "empty": b"",
    "shorter than its header": (1000).to_bytes(8, "little") + b"{}",
    "header of no size": (0).to_bytes(8, "little"),
    "no JSON": (4).to_bytes(8, "little") + b"nope",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "cut": len(HEADER).to_bytes(8, "little") + HEADER.encode() + bytes(7),
    "longer than the header says": len(HEADER).to_bytes(8, "little") + HEADER.encode() + bytes(9),
    "shape and size differ": len(HEADER).to_bytes(8, "little") + HEADER.replace("[2]", "[3]").encode() + bytes(8),
    "a hole": len(HEADER).to_bytes(8, "little") + HEADER.replace("[0,8]", "[1,9]").encode() + bytes(9),
    "negative": len(HEADER).to_bytes(8, "little") + HEADER.replace("[2]", "[-2]").encode()[:-1] + b"}" + bytes(8),
    "no offsets": (9).to_bytes(8, "little") + b'{"a": {}}',
    "not text": (4).to_bytes(8, "little") + b"\xff\xfe\xff\xfe",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_before_any_output(models: Path, content: bytes) -> None:
    (models / "b" / "model.safetensors").write_bytes(content)
    with pytest.raises(HyperLlamaError, match=r"b/model.safetensors is damaged or not a safetensors file: .+"):
        merge(models, "linear", "out")
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "base"]


def test_a_shard_that_is_missing_is_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 2000)
    merge(models, "linear", "c")
    lost = sorted(models.glob("c/*.safetensors"))[2]
    lost.unlink()
    made = recipe("linear").replace("model: a", "model: c")
    with pytest.raises(HyperLlamaError, match=rf"c/model.safetensors.index.json names {lost.name}, which is not in"):
        plan(parse_recipe(made, "recipe"), models)


def test_tensors_of_several_dtypes_are_aligned_in_their_file(tmp_path: Path) -> None:
    tensors = [
        ("odd", "bfloat16", (3,)),
        ("wide", "float32", (5,)),
        ("half", "float16", (1,)),
        ("double", "float64", (2,)),
    ]
    writer = weights.WeightsWriter(tmp_path, [weights.NewTensor(*tensor) for tensor in tensors], "job")
    wanted = {name: torch.arange(shape[0]).to(getattr(torch, dtype)) for name, dtype, shape in tensors}
    for name, tensor in wanted.items():
        writer.write(name, tensor.view(torch.uint8).numpy())
    writer.close()
    found = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    ours = weights.TensorFile(tmp_path / "model.safetensors")
    assert all(
        ours.bytes(name).tobytes() == tensor.view(torch.uint8).numpy().tobytes() for name, tensor in wanted.items()
    )
    assert all(ours.raw(name).address % tensor.element_size() == 0 for name, tensor in wanted.items())
