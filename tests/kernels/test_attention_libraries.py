"""Adapters to other people's attention, on a CPU and without the libraries.

Stand-ins with the libraries' documented signatures, made of plain torch, check what is passed: names, shapes, layouts, borders, and
the gradients that come back. That the libraries themselves then do as documented is for a GPU that has them.
"""

import importlib
import inspect
import sys
from types import ModuleType

import pytest
import torch

from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import attention_libraries as libraries
from hyperllama.kernels.attention import attention, attention_sdpa, forward_reference, obstacle

N, K, H = 6, 2, 16
BORDERS = torch.tensor([0, 4, 5, 20, 27, 40], dtype=torch.int32)


def ragged(q, k, v, lengths):
    """Causal attention of each of the sequences that lie one after the other in (N, heads, h)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    outs = []
    for q_, k_, v_ in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        scores = torch.einsum("thd,shd->hts", q_, k_) * q.shape[-1] ** -0.5
        seen = torch.ones(len(q_), len(q_), dtype=torch.bool).tril()
        outs.append(torch.einsum("hts,shd->thd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v_))
    return torch.cat(outs)


def check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    for t, heads in ((q, N), (k, K), (v, K)):
        assert t.shape == (40, heads, H) and t.stride(-1) == 1
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr(), "views of the packed buffer, not copies"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and int(cu_seqlens_q.diff().max()) <= max_seqlen_q == max_seqlen_k
    return cu_seqlens_q.diff().tolist()


class Calls(list):
    """What a stand-in was called with."""


def flash_attn_2(calls):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal and dropout_p == 0 and softmax_scale is None and not return_attn_probs
        calls.append(deterministic)
        return ragged(q, k, v, check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))

    return flash_attn_varlen_func


def flash_attn_3(calls, with_lse=False):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
        causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert causal and softmax_scale is None
        calls.append(deterministic)
        out = ragged(q, k, v, check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        return (out, torch.zeros(N, 40)) if with_lse else out

    return flash_attn_varlen_func


def flash_attn_4(calls):
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
        seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, aux_tensors=None, return_lse=False,
    ):  # fmt: skip
        assert causal and qv is None
        calls.append(deterministic)
        return ragged(q, k, v, check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)), None

    return flash_attn_varlen_func


def torch_varlen(calls):
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert window_size == (-1, 0) and enable_gqa and scale is None  # (-1, 0) is causal
        calls.append(False)
        return ragged(query, key, value, check_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k))

    return varlen_attn


def xformers(calls):
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert query.shape == key.shape == value.shape == (1, 40, N, H) and p == 0 and scale is None
        calls.append(False)
        return ragged(query[0], key[0], value[0], attn_bias.lengths)[None]

    return memory_efficient_attention


class BlockDiagonalCausalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        assert all(isinstance(n, int) and n > 0 for n in q_seqlen) and kv_seqlen is None
        mask = cls()
        mask.lengths = list(q_seqlen)
        return mask


STAND_INS = {
    "flash_attn_2": ("flash_attn", flash_attn_2),
    "flash_attn_3": ("flash_attn_interface", flash_attn_3),
    "flash_attn_3, older": ("flash_attn_interface", lambda calls: flash_attn_3(calls, with_lse=True)),
    "flash_attn_3, as a package": ("flash_attn_3.flash_attn_interface", flash_attn_3),
    "flash_attn_4": ("flash_attn.cute", flash_attn_4),
    "torch_varlen": ("torch.nn.attention.varlen", torch_varlen),
    "xformers": ("xformers.ops", xformers),
}


def module(name, **names):
    made = ModuleType(name)
    made.__path__ = []
    for key, value in names.items():
        setattr(made, key, value)
    return made


@pytest.fixture
def install(monkeypatch):
    """Puts stand-ins where the libraries would be; gives the list of their calls."""
    libraries.load.cache_clear()

    def put(case):
        calls = Calls()
        name, make = STAND_INS[case]
        function = make(calls)
        parts = name.split(".")
        for i in range(1, len(parts)):
            parent = ".".join(parts[:i])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, module(parent))
        monkeypatch.setitem(sys.modules, name, module(name, **{function.__name__: function}))
        if name.startswith("xformers"):
            monkeypatch.setitem(sys.modules, "xformers.ops.fmha", module("xformers.ops.fmha"))
            bias = module("xformers.ops.fmha.attn_bias", BlockDiagonalCausalMask=BlockDiagonalCausalMask)
            monkeypatch.setitem(sys.modules, bias.__name__, bias)
        return calls

    yield put
    libraries.load.cache_clear()


@pytest.mark.parametrize("borders", [None, BORDERS, torch.tensor([0, 0, 20, 20, 33, 40], dtype=torch.int32)])
@pytest.mark.parametrize("case", STAND_INS)
def test_libraries_get_what_their_documentation_asks_for(case, borders, install):
    calls = install(case)
    qkv = torch.randn(2, 20, (N + 2 * K) * H, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 20, N * H, dtype=torch.float64)
    out = libraries.attention_library(case.partition(",")[0], qkv, N, K, borders)
    expected = forward_reference(qkv, N, K, borders)[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, upstream)[0] for y in (out, expected)))
    assert calls == [False]


@pytest.mark.parametrize("name", [name for name, library in libraries.LIBRARIES.items() if library.deterministic])
def test_deterministic_runs_ask_for_it(name, install):
    calls = install(name)
    torch.use_deterministic_algorithms(True)
    try:
        libraries.attention_library(name, torch.randn(2, 20, (N + 2 * K) * H), N, K, None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == [True]


def test_the_signature_of_torchs_own_is_the_stand_ins():
    real = inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters
    ours = inspect.signature(torch_varlen(Calls())).parameters
    assert list(real)[:7] == list(ours)[:7]
    if set(libraries.LIBRARIES["torch_varlen"].needs) <= set(real):
        assert all(real[name].kind == ours[name].kind for name in ("window_size", "enable_gqa"))
    else:
        with pytest.raises(HyperLlamaError, match="a newer torch has it"):
            libraries.load("torch_varlen")


@pytest.mark.parametrize("name", [name for name in libraries.LIBRARIES if name != "torch_varlen"])
def test_a_library_that_is_not_there_is_named(name, install, monkeypatch):
    for path in libraries.LIBRARIES[name].modules:
        monkeypatch.setitem(sys.modules, path.partition(".")[0], None)  # as if not installed, wherever this runs
    with pytest.raises(HyperLlamaError, match=f"attention backend {name} needs {libraries.LIBRARIES[name].modules[0]}"):
        libraries.load(name)


def test_a_package_without_the_function_is_named(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn"))  # what flash-attn 4 alone leaves there
    with pytest.raises(HyperLlamaError, match=r"flash_attn_2 needs flash_attn, .*: pip install flash-attn"):
        libraries.load("flash_attn_2")


def test_a_torch_without_groups_is_named(install, monkeypatch):
    old = module("torch.nn.attention.varlen", varlen_attn=lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: 0)
    monkeypatch.setitem(sys.modules, old.__name__, old)
    with pytest.raises(HyperLlamaError, match="varlen_attn has no enable_gqa, window_size: a newer torch has it"):
        libraries.load("torch_varlen")


@pytest.mark.parametrize("name", libraries.KERNELS_OF_TORCH)
def test_torchs_kernels_are_asked_for_one_at_a_time(name, monkeypatch):
    seen = []

    def attention_of_torch(q, k, v, **options):
        cuda = torch.backends.cuda
        seen.append((cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), options))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_of_torch)
    attention_sdpa(torch.randn(2, 20, (N + 2 * K) * H), N, K, None, name)
    [(*enabled, options)] = seen
    assert enabled == [name == kernel for kernel in ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient")]
    assert options == {"attn_mask": None, "is_causal": True, "enable_gqa": name != "sdpa_efficient"}


def test_torchs_flash_kernel_on_a_cpu():
    qkv = torch.randn(2, 20, (N + 2 * K) * H)
    torch.testing.assert_close(attention(qkv, N, K, backend="sdpa_flash"), attention(qkv, N, K, backend="reference"))
    with pytest.raises(HyperLlamaError, match="attention backend sdpa_flash takes no documents"):
        attention(qkv, N, K, cu_seqlens=BORDERS, backend="sdpa_flash")


@pytest.mark.parametrize(
    ("name", "dtype", "head", "problem"),
    [
        ("flash_attn_2", torch.float32, 64, "takes bf16 and fp16; this is float32"),
        ("flash_attn_3", torch.bfloat16, 320, "takes heads up to 256; this is 320"),
        ("sdpa_cudnn", torch.float32, 64, "takes bf16 and fp16; this is float32"),
        ("triton", torch.float64, 64, "takes bf16, fp16 and fp32 and heads up to 128; this is float64, 64"),
        ("triton", torch.bfloat16, 192, "takes bf16, fp16 and fp32 and heads up to 128; this is bfloat16, 192"),
        ("flash_attn_2", torch.bfloat16, 64, None),
        ("xformers", torch.float32, 320, None),
        ("triton", torch.float32, 128, None),
    ],
)
def test_what_a_backend_does_not_take_on_a_gpu(name, dtype, head, problem):
    with torch._subclasses.FakeTensorMode():
        assert obstacle(name, torch.empty(1, 4, 3 * head, dtype=dtype, device="cuda"), 1, 1, None) == problem
