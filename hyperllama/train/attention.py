"""Which attention a run uses: what its recipe names; with `auto` on a GPU the fastest, measured once and kept with the run."""

from pathlib import Path
from typing import Any

import torch

from hyperllama.errors import HyperLlamaError
from hyperllama.files import read_json
from hyperllama.kernels import attention_libraries
from hyperllama.kernels.attention import BACKENDS, obstacle, unmeasured
from hyperllama.kernels.attention_choice import Problem, measure, pick, table
from hyperllama.progress import console
from hyperllama.settings import ModelConfig
from hyperllama.train.distributed import Processes
from hyperllama.train.plan import Plan

FILE = "attention.json"


def attention_backend(plan: Plan, mine: Processes, *, quiet: bool) -> dict[str, Any]:
    """The record for run.json: {"backend": name} and, where it was measured, every measurement; "grown": that of the grown model.

    A resumed run goes on with what attention.json in its folder names. On a CPU, whose bits a clock must not decide, `auto`
    measures nothing. Raises HyperLlamaError for a backend that is not installed or can't run this model.
    """
    file = Path(plan.config.out) / FILE
    known = read_json(file) if plan.config.attention == "auto" and mine.device.type != "cpu" and file.is_file() else {}
    record = _choice(plan, plan.model, mine, known, quiet)
    if plan.growth is not None:
        record["grown"] = _choice(plan, plan.growth.model, mine, known.get("grown", {}), quiet)
    return record


def _choice(plan: Plan, model: ModelConfig, mine: Processes, known: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """The record for one shape; `known`: what an earlier start of the run has found."""
    config, file = plan.config, Path(plan.config.out) / FILE
    width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    like = torch.empty(0, config.data.seq_len, width, dtype=plan.dtype, device=mine.device)
    documents = config.data.documents == "separate"
    borders = torch.zeros(1, dtype=torch.int32, device=mine.device) if documents else None
    if config.attention != "auto":
        return {"backend": _able(config.attention, like, model, borders, "attention")}
    if mine.device.type == "cpu":
        return {"backend": unmeasured(like, model.num_heads, model.num_kv_heads, borders)}
    if known:
        if known.get("backend") not in BACKENDS:
            raise HyperLlamaError(
                f"{file}: backend is {known.get('backend')!r}; one of {', '.join(BACKENDS)} was expected"
            )
        _able(known["backend"], like, model, borders, str(file))
        return {key: value for key, value in known.items() if key != "grown"}
    problem = Problem(
        config.micro_batch, config.data.seq_len, model.num_heads, model.num_kv_heads, model.head_dim, plan.dtype, mine.device,
        documents,
    )  # fmt: skip
    rows = measure(problem)
    chosen = pick(rows, deterministic=torch.are_deterministic_algorithms_enabled())
    # every process has measured; the first one's choice is everybody's
    chosen = BACKENDS[mine.largest_int(BACKENDS.index(chosen) if mine.is_main else -1)]
    if not quiet:
        console().print(table(rows, chosen), markup=False)
    return {"backend": chosen, "measured": [row.to_json() for row in rows]}


def _able(backend: str, like: torch.Tensor, model: ModelConfig, borders: torch.Tensor | None, where: str) -> str:
    """`backend`, when it is there and can do this."""
    if problem := obstacle(backend, like, model.num_heads, model.num_kv_heads, borders):
        raise HyperLlamaError(f"{where}: attention backend {backend} {problem}")
    if backend in attention_libraries.LIBRARIES:
        attention_libraries.load(backend)
    return backend
