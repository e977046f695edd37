"""Our merges against mergekit's, case by case, in scaled ULP: ULP at the larger of |golden| and the tensor's rms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hyperllama.merge import plan, read_recipe, run

CASES = [
    "linear_gradfilter_fp32",
    "linear_mixed_tied_untied_fp16",
    "linear_nodtype_fp32in",
    "linear_paper5",
    "linear_uneq_nonorm_fp16",
    "linear_uneq_norm_bf16",
    "slices_linear_fp16",
    "ta_grad_untied_fp16",
    "ta_paper5",
    "ta_uneq_nonorm_lam_bf16",
    "ta_uneq_norm_lam_fp32",
    "ties_d02_uneq_nonorm_bf16",
    "ties_d05_lam_fp32",
    "ties_densgrad_bf16",
    "ties_paper2_untied",
    "ties_paper5",
    "ties_perdens_fp32_outbf16",
    "ties_rescale_fp16",
]


def scaled_ulps(ours: Tensor, golden: Tensor) -> np.ndarray:
    """|ours - golden| per element, in ULP of the golden's dtype at max(|golden|, rms)."""
    finfo = torch.finfo(golden.dtype)
    truth = golden.double()
    size = truth.abs().maximum(truth.square().mean().sqrt()).clamp(min=finfo.tiny)
    ulp = torch.exp2(torch.floor(torch.log2(size))) * finfo.eps
    return ((ours.double() - truth).abs() / ulp).flatten().numpy()


def decided(ambiguous: dict[str, Tensor], name: str, size: int) -> np.ndarray:
    """The elements whose value the definition determines."""
    if name not in ambiguous:
        return np.ones(size, bool)
    return np.unpackbits(ambiguous[name].numpy().ravel())[:size] == 0


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, goldens: Path, tmp_path: Path) -> None:
    entry = json.loads((goldens / "manifest.json").read_text())["cases"][case]
    run(plan(read_recipe(goldens / entry["config"]), goldens), tmp_path / "out")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", goldens / "golden" / case))
    mask_file = goldens / "ambiguous" / f"{case}.safetensors"
    ambiguous = load_file(mask_file) if mask_file.is_file() else {}

    assert set(theirs) <= set(ours) if entry["subset"] else set(theirs) == set(ours)
    worst = 0.0
    for name, golden in theirs.items():
        assert ours[name].dtype == golden.dtype
        assert ours[name].shape == golden.shape
        errors = scaled_ulps(ours[name], golden)[decided(ambiguous, name, golden.numel())]
        worst = max(worst, float(errors.max(initial=0.0)))
    assert worst <= entry["tolerance"]["max_sulp"]

    config, golden_config = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", goldens / "golden" / case)
    )
    assert config["torch_dtype"] == golden_config["dtype"]
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in ours)  # mergekit's says tied for the mixed case
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "rms_norm_eps"):
        assert config[key] == golden_config[key]


@pytest.mark.parametrize("case", [case for case in CASES if "linear" in case and "mixed" not in case])
def test_linear_is_bit_equal_to_the_newer_mergekit(case: str, goldens: Path, tmp_path: Path) -> None:
    run(plan(read_recipe(goldens / "configs" / f"{case}.yaml"), goldens), tmp_path / "out")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", goldens / "golden015" / case))
    for name, golden in theirs.items():
        assert torch.equal(ours[name], golden), name
