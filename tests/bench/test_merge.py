"""The benchmark of merges on models of a few thousand weights: same work, figures, verdicts."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from hyperllama.bench import harness, merge
from hyperllama.grow.folder import grow_folder
from hyperllama.grow.operators import HyperClone
from hyperllama.settings import ModelConfig

TINY = ModelConfig(
    hidden_size=32, intermediate_size=48, num_layers=8, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=128,
    max_position_embeddings=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return merge.make_models(tmp_path_factory.mktemp("models"), TINY)


def test_models_are_plain_llamas_near_their_base(models: list[Path]) -> None:
    loaded, info = LlamaForCausalLM.from_pretrained(models[1], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base, other = (
        load_file(path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float() for path in models[:2]
    )
    assert float(base.std()) == pytest.approx(0.03, rel=0.1)
    assert float((other - base).std()) == pytest.approx(0.003, rel=0.1)
    assert sum(p.numel() for p in loaded.parameters()) == TINY.num_parameters


@pytest.mark.parametrize("method", merge.METHODS)
def test_every_merge_runs_from_the_shell_and_inside(models: list[Path], tmp_path: Path, method: str) -> None:
    made = merge.merge_of(method, models, tmp_path, "tiny")
    assert len(made.inputs) == 5 + merge.METHODS[method].base
    inside = merge.inside_case(made, tmp_path)
    result = harness.run(inside, rounds=1, warmup=0, min_sample=0, clock=harness.CpuClock(partial(clear, tmp_path)))
    assert result["providers"]["ours"]["reason"] is None and result["targets"][0]["measured"]
    if method == "linear":
        shell = merge.shell_case(made, tmp_path, None)
        result = harness.run(shell, rounds=1, warmup=0, min_sample=0, clock=harness.CpuClock(partial(clear, tmp_path)))
        merge.judge_process(result, 1e-6)
        assert 1e6 < result["providers"]["ours"]["figures"]["peak_anonymous_bytes"] < 0.5e9
        assert [target["met"] for target in result["targets"]] == [True, False]


def clear(folder: Path) -> None:
    for out in folder.glob("out-*"):
        subprocess.run(["rm", "-r", str(out)], check=True)


def test_the_floor_writes_every_byte(models: list[Path], tmp_path: Path) -> None:
    merge.floor([models[0] / "model.safetensors"], tmp_path / "out", (9 << 20) + 5)()
    assert (tmp_path / "out").stat().st_size == (9 << 20) + 5
    content = np.fromfile(tmp_path / "out", np.uint8)
    assert content[:-5].reshape(-1, 4096).any(1).all() and content[-5:].any()


def test_another_merge_is_no_match(models: list[Path]) -> None:
    check: Any = merge._differs("linear")
    assert check(models[0], models[0]) is None
    assert "relative difference" in check(models[0], models[1])


def test_the_plain_clone_is_our_clone(models: list[Path], tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, merge.PEER_CLONE, models[0], tmp_path / "plain", "2"], check=True, capture_output=True
    )
    grow_folder(models[0], tmp_path / "ours", [HyperClone(2)])
    plain, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "ours"))
    assert all((plain[name] == ours[name]).all() for name in ours if name != "model.norm.weight")


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3: no such thing"):
        merge.Process(
            [sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], tmp_path
        )()
