"""What the regression gate times: ops of csrc and of plain torch, a step, the loop, data, checkpoints, folders; a GPU's kernels.

All are small, between 1 and 50 ms, so that a round of all of them takes seconds. They are built from other benchmarks' cases. Each
imports what it needs only when built, so that a version without it lacks one case and not all.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .pipeline import Workspace

Thunk = Callable[[], Any]
TRAFFIC = 16 << 20  # bytes of a memory-bound op on a CPU: one to ten ms
TEXT, PARAMETERS, STEPS = 100_000, 500_000, 3
GPU_TOKENS = 16384
IN_PLAIN_TORCH = ("rms_norm backward", "glu forward", "adamw", "merge_linear")


def cases(work: Path) -> dict[str, Callable[[], Thunk]]:
    """Name -> what makes the function to time. `work` is a folder that stays; what cases read is made there once."""
    found = dict(_cpu_ops())
    found["step tiny"] = _step
    for name, arguments in {
        "tokenize": (TEXT,), "loader": (1_000_000, 16), "save": (PARAMETERS,), "restore": (PARAMETERS,), "loop": (STEPS,)
    }.items():  # fmt: skip
        found[name] = partial(_pipeline, name, work, arguments)
    found |= {f"{method} folders": partial(_merge, method, work) for method in ("linear", "ties")}
    found["grow folder"] = partial(_grow, work)
    if torch.cuda.is_available():
        found |= dict(_gpu_ops())
    return found


def _cpu_ops() -> Iterator[tuple[str, Callable[[], Thunk]]]:
    bf16, fp32 = torch.bfloat16, torch.float32

    def memory_bound(name: str, backend: str, dtype: torch.dtype) -> Thunk:
        from .cpu import M180
        from .ops import MEMORY_BOUND

        make, dtypes = MEMORY_BOUND[name]
        return make(M180, dtype if dtype in dtypes else dtypes[0], TRAFFIC).providers[backend]()

    def attention(backward: bool) -> Thunk:
        from .ops import attention_case

        return attention_case(1, 512, 9, 3, 64, bf16, documents=True, backward=backward).providers["csrc"]()

    def head(backend: str) -> Thunk:
        from .cpu import M15
        from .ops import linear_cross_entropy_case

        return linear_cross_entropy_case(128, M15, bf16).providers[backend]()

    for name in (
        "rms_norm forward", "rms_norm backward", "rope forward", "glu forward", "glu backward", "softmax_gradient",
        "embedding_backward_", "adamw", "grad_norm", "merge_linear", "merge_task_arithmetic", "merge_ties", "grow",
    ):  # fmt: skip
        yield f"{name} csrc", partial(memory_bound, name, "csrc", bf16)
    yield "attention forward csrc", partial(attention, False)
    yield "attention forward+backward csrc", partial(attention, True)
    yield "linear_cross_entropy csrc", partial(head, "csrc")
    for name in IN_PLAIN_TORCH:
        yield f"{name} torch", partial(memory_bound, name, "reference", fp32)


def _step() -> Thunk:
    """Loss, backward, norm and update of a model of a few thousand weights: mostly what calling an op costs."""
    from .cpu import TINY
    from .training import our_step

    return our_step(TINY, 2, torch.float32, "csrc")


def _pipeline(name: str, work: Path, arguments: tuple[int, ...]) -> Thunk:
    from . import pipeline

    case = getattr(pipeline, f"{name}_case")(Workspace(work), *arguments)
    return next(iter(case.providers.values()))()


def _models(work: Path) -> list[Path]:
    from .cpu import llama
    from .merge import make_models

    return make_models(work / "models", llama(256, 688, 3, 4, 2, 64, 4096, 256))


def _merge(method: str, work: Path) -> Thunk:
    from hyperllama.merge import plan, read_recipe, run

    from .merge import merge_of

    merge, out = merge_of(method, _models(work), work, ""), work / f"merged-{method}"

    def thunk() -> None:
        shutil.rmtree(out, ignore_errors=True)
        run(plan(read_recipe(merge.recipe), work), out)

    return thunk


def _grow(work: Path) -> Thunk:
    from hyperllama.grow.folder import grow_folder
    from hyperllama.grow.operators import HyperClone

    source, out = _models(work)[0], work / "grown"

    def thunk() -> None:
        shutil.rmtree(out, ignore_errors=True)
        grow_folder(source, out, [HyperClone(2, 2)])

    return thunk


def _gpu_ops() -> Iterator[tuple[str, Callable[[], Thunk]]]:
    """Every kernel as a model of 180M parameters launches it; attention names its backend itself."""
    from .gpu_ops import PROBLEMS
    from .shapes import SHAPES

    def problem(name: str) -> Thunk:
        from hyperllama.kernels.backend import use

        made = PROBLEMS[name](SHAPES["180M"], GPU_TOKENS)
        inputs = made.inputs("cuda")

        def thunk() -> Any:
            with use(None if "auto" in made.peers else "triton"):
                return made.call(*inputs)

        return thunk

    for name in PROBLEMS:
        yield f"{name} triton", partial(problem, name)
