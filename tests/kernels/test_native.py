"""Which library a CPU gets, without torch; and one OpenMP runtime for both."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperllama.kernels import native

ROOT = Path(__file__).parents[2]
AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512vl", "avx512bw", "avx512dq"}


@pytest.mark.parametrize(
    ("flags", "asked", "names"),
    [
        (set(), None, ["base"]),
        (AVX2, None, ["v3", "base"]),
        (AVX512, None, ["v4", "v3", "base"]),
        (AVX512 | {"avx512_bf16"}, None, ["v4_bf16", "v4", "v3", "base"]),
        (AVX512 | {"avx512_bf16"}, "avx2", ["v3", "base"]),
        (AVX512, "default", ["base"]),
        (AVX2, "avx512", ["v3", "base"]),
        (AVX512, "nonsense", ["v4", "v3", "base"]),
    ],
)
def test_the_best_library_that_the_cpu_and_the_user_allow(flags: set[str], asked: str | None, names: list[str]) -> None:
    assert native._names(flags, asked) == names


def test_this_cpu_is_what_torch_says_it_is() -> None:
    level = {"AVX512": "v4", "AVX2": "v3"}.get(torch.backends.cpu.get_cpu_capability(), "base")
    names = native._names(set(native._cpuinfo("flags").split()), native.os.environ.get("ATEN_CPU_CAPABILITY"))
    assert next(name for name in names if name != "v4_bf16") == level
    assert ("v4_bf16" in names) == (level == "v4" and torch.cpu._is_avx512_bf16_supported())


@pytest.mark.parametrize("first", ["torch", "hyperllama.kernels.native"])
def test_one_openmp_runtime_whichever_comes_first(first: str) -> None:
    code = (
        f"import {first}; from hyperllama.kernels.native import library, threads; before = threads()\n"
        "assert library() is not None\n"
        "import torch; torch.ones(1 << 16).sum(); torch.set_num_threads(2)\n"
        "print(before, threads(), open('/proc/self/maps').read())"
    )
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[:2] == ["1", "2"]
    assert len(set(re.findall(r"\S*lib[gi]omp\S*", done.stdout))) == 1
