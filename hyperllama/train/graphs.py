"""CUDA graphs: work over tensors that stay where they are, recorded once and launched as one; and whether that is faster.

Not yet run on a GPU.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

WARM_UP = 3  # calls before work is recorded: kernels compile, libraries take their workspaces

Work = Callable[[], object]


def record(work: Work) -> Callable[[], None]:
    """Record the CUDA kernels that `work` launches, without running them; returns what launches them."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # other threads read batches into pinned memory and write checkpoints meanwhile: what they ask of CUDA is none of the graph's
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def seconds_of(
    ways: Mapping[str, Work],
    wait: Work,
    *,
    rounds: int = 5,
    calls: int = 4,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of one call of each way, by the host's clock, in turns: medians of `rounds` samples of `calls` calls.

    wait: until the device is done. A sample holds what the host takes to launch where that is more than the device's work.
    """
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            wait()
            began = clock()
            for _ in range(calls):
                work()
            wait()
            samples[name].append((clock() - began) / calls)
    return {name: median(found) for name, found in samples.items()}
