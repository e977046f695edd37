"""Which implementation runs, and what is said when one is missing."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import backend, native
from hyperllama.kernels.rms_norm import rms_norm

THREE = {name: (lambda: None) for name in backend.BACKENDS}
ROOT = Path(__file__).parents[2]


def chosen(device, dtype, implementations=THREE):
    function = backend.choose(implementations, torch.empty(1, device=device, dtype=dtype))
    return next(name for name, known in implementations.items() if known is function)


def test_the_device_and_dtype_of_a_call_choose():
    assert backend.library() is not None, "install the package: pip install -e ."
    assert chosen("cpu", torch.float32) == chosen("cpu", torch.bfloat16) == "csrc"
    assert chosen("cpu", torch.float64) == chosen("cpu", torch.float16) == chosen("meta", torch.float32) == "reference"


@pytest.mark.parametrize("name", ["csrc", "triton"])
def test_a_forced_kernel_leaves_dtypes_it_does_not_take_to_the_reference(name):
    with backend.use(name):
        assert chosen("cpu", torch.float32) == name
        assert chosen("cpu", torch.float64) == "reference"


def test_an_op_without_kernels_of_its_own_runs_its_reference():
    only = {"reference": THREE["reference"]}
    for name in backend.BACKENDS:
        with backend.use(name):
            assert chosen("cpu", torch.float32, only) == "reference"


def test_the_environment_forces_a_backend_and_use_goes_before_it(monkeypatch):
    monkeypatch.setenv("HYPERLLAMA_BACKEND", "reference")
    assert chosen("cpu", torch.float32) == "reference"
    with backend.use("csrc"):
        assert chosen("cpu", torch.float32) == "csrc"
    monkeypatch.setenv("HYPERLLAMA_BACKEND", "cuda")
    with pytest.raises(HyperLlamaError, match="'cuda' is not a backend"):
        chosen("cpu", torch.float32)


def test_a_folder_without_libraries_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HYPERLLAMA_CSRC", str(tmp_path))
    with pytest.raises(HyperLlamaError, match=f"HYPERLLAMA_CSRC: {tmp_path} has none of"):
        backend.library.__wrapped__()


def test_csrc_does_not_take_tensors_of_another_device():
    with pytest.raises(HyperLlamaError, match="runs on CPU tensors and these are on meta"), backend.use("csrc"):
        chosen("meta", torch.float32)


def test_the_backward_uses_the_forwards_backend(monkeypatch):
    x = torch.randn(3, 8, requires_grad=True)
    with backend.use("reference"):
        y = rms_norm(x, torch.ones(8), 1e-5)
    monkeypatch.setattr(backend, "library", lambda: pytest.fail("csrc was looked for"))
    y.sum().backward()


def test_a_missing_library_is_said_once_and_named_when_asked_for(monkeypatch, caplog):
    monkeypatch.delenv("HYPERLLAMA_CSRC", raising=False)  # `make sanitize` names a folder
    monkeypatch.setattr(native, "_library_folders", lambda: [])
    backend.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "hyperllama"):
            for _ in range(2):
                assert rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum() == 8
        assert [record.message for record in caplog.records] == [
            "hyperllama was installed without a C++ compiler: CPU ops use plain torch"
        ]
        with pytest.raises(HyperLlamaError, match=r"without a C\+\+ compiler"), backend.use("csrc"):
            rms_norm(torch.randn(2, 8), torch.randn(8), 1e-5)
    finally:
        backend.library.cache_clear()


def test_missing_triton_is_named_when_asked_for(monkeypatch):
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(HyperLlamaError, match="Triton is not installed"), backend.use("triton"):
        rms_norm(torch.randn(2, 8), torch.randn(8), 1e-5)


def test_wrong_indices_noted_on_a_device_are_told_once():
    flag = backend.wrong_index_flag(torch.empty(1))
    assert flag is backend.wrong_index_flag(torch.empty(2)) and flag.dtype == torch.int32
    flag.fill_(1 | 4)
    with pytest.raises(
        IndexError, match=r"^embedding: a token id is outside .*; rope: a position is outside the tables$"
    ):
        backend.check_indices(flag.device)
    backend.check_indices(flag.device)


def test_importing_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from hyperllama.kernels.rms_norm import rms_norm\n"
        "print(rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum().item())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "8.0", result.stderr[-2000:]


def test_denormals_survive_the_library():
    """Linked with -ffast-math, loading it would flush them to zero in the whole process."""
    assert backend.library() is not None
    assert torch.full((1,), 1e-40).mul(0.5).item() > 0


def test_launches_can_be_chosen_for_a_gpu_that_is_not_there():
    x = torch.empty(1)
    assert backend.gpu_of(x).arch == "interpreter"
    with backend.pretend(backend.GPUS["gfx942"]):
        assert (backend.gpu_of(x).multiprocessors, backend.gpu_of(x).warp, backend.gpu_of(x).capability) == (304, 64, 0)
    assert backend.gpu_of(x).arch == "interpreter" and backend.GPUS["sm_100"].capability == 100


def test_everything_imports_and_runs_without_triton():
    """As on a machine where only the package's own requirements are installed."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, pkgutil, torch, hyperllama.kernels, hyperllama.experiment.run\n"
        "names = [found.name for found in pkgutil.iter_modules(hyperllama.kernels.__path__)]\n"
        "assert [importlib.import_module('hyperllama.kernels.' + name) for name in names]\n"
        "from hyperllama.arena import Arena\n"
        "from hyperllama.settings import ModelConfig\n"
        "from hyperllama.model import Llama\n"
        "config = ModelConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,\n"
        "    vocab_size=128, max_position_embeddings=8)\n"
        "model = Llama(config, Arena(config, torch.float32, 'cpu', training=True)); model.init_weights(0)\n"
        "ids = torch.arange(8)[None]; model.loss(ids, ids, loss_weight=1 / 8).backward()\n"
        "assert model.arena.grad.isfinite().all() and model.arena.grad.any()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
