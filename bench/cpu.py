"""Whole training steps on a CPU: the C++ ops against the plain-torch references, same weights, same windows.

python -m bench.cpu [--quick] [--out bench/results]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hyperllama.arena import Arena
from hyperllama.config import ModelConfig
from hyperllama.experiment.recipe import load_experiment
from hyperllama.flops import window_flops
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.backend import use
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.model import Llama

from .environment import device_slug, environment
from .harness import Case, Thunk, copy_bandwidth, matmul_rate, run, table, write_results

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"


def step_case(name: str, config: ModelConfig, windows: int, dtype: torch.dtype) -> Case:
    """One optimizer step on full windows; every provider has a model of its own, and returns the step's loss."""
    seq_len = config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(config.vocab_size, (2, windows, seq_len), generator=generator)
    lr, one, clip = torch.tensor(1e-3), torch.tensor(1), torch.tensor(1.0)

    def provider(backend: str) -> Callable[[], Thunk]:
        def setup() -> Thunk:
            arena = Arena(config, dtype, "cpu", training=True)
            model = Llama(config, arena)
            model.init_weights(0)

            def step() -> Any:
                with use(backend):
                    arena.grad.zero_()
                    loss = model.loss(ids, targets, loss_weight=1 / targets.numel())
                    loss.backward()
                    grad_norm(arena.grad)
                    weights = None if arena.weights is arena.master else arena.weights
                    adamw(
                        arena.master, arena.grad, arena.m, arena.v, weights, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8,
                        weight_decay=0.1, step=one, clip=clip,
                    )  # fmt: skip
                return loss.detach()

            return step

        return setup

    def check(loss: torch.Tensor, expected: torch.Tensor) -> str | None:
        error = float((loss - expected).abs() / expected)
        limit = 1e-5 if dtype == torch.float32 else 1e-3
        return None if error <= limit else f"the first loss differs by {error:.2g}, at most {limit:.2g} was expected"

    params: dict[str, int | float | str] = {
        "model": name,
        "windows": windows,
        "dtype": str(dtype).removeprefix("torch."),
    }
    flops = windows * window_flops(config, seq_len, "causal")
    return Case("step", params, flops, 0, {name: provider(name) for name in ("reference", "csrc")}, check)


def main() -> None:
    """Time the demo's model and its clone in both precisions."""
    parser = argparse.ArgumentParser(description="Time training steps: C++ ops against plain torch.")
    parser.add_argument("--quick", action="store_true", help="9 rounds instead of 31")
    parser.add_argument("--out", type=Path, help="write <out>/<device>/cpu.json")
    arguments = parser.parse_args()
    rounds = 9 if arguments.quick else 31
    roofs = {"copy": copy_bandwidth(), "matmul": matmul_rate()}
    demo = load_experiment(RECIPE)
    small = demo.model.resolve(demo.vocab, demo.seq_len)
    results = [
        run(step_case(name, shape, demo.global_batch, dtype), rounds=rounds)
        for dtype in (torch.float32, torch.bfloat16)
        for name, shape in (("demo 1x", small), ("demo 2x", small.grown(demo.factor)))
    ]
    print(table(results))
    if arguments.out:
        path = arguments.out / device_slug(environment("cpu")["device"]) / "cpu.json"
        write_results(path, results, roofs)
        print(path)


if __name__ == "__main__":
    main()
