"""What a training step should take on a GPU that has not been measured yet, component by component.

    python -m bench.estimate [--models 180M 572M] [--tokens 32768] [--json]

Time of a matrix product: its FLOPs at the rate that large products reach, times the share that products of these widths are taken
to reach. Time of anything else: its least traffic (gpu_ops.py) at the speed of a copy, times the share that its kernel is taken
to reach. Two columns: `solid`, and `stretch`, where everything comes out well. Rates of the device and shares are assumptions,
each with its reason below; bench.gpu measures the shares, bench.throughput the sum.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch

from hyperllama.arena import arena_bytes, layout
from hyperllama.flops import window_flops
from hyperllama.settings import ModelConfig
from hyperllama.train.metrics import PEAK_FLOPS
from hyperllama.train.plan import activation_bytes

from .gpu_ops import PROBLEMS, SEQ_LEN
from .shapes import SHAPES, Shape

STEP_TOKENS = 524_288
PEAK = PEAK_FLOPS["H200"]
MATMUL, COPY = 790e12, 4.3e12  # FLOP/s of 8192^3 in bf16, bytes/s of a copy, that H200s are reported to reach
# share of MATMUL: K = 576 are nine steps of a tile, whose prologue and epilogue weigh; twice the width, less so
LINEAR = {"180M": (0.72, 0.82), "572M": (0.82, 0.90), "1.7B": (0.88, 0.93), "8B": (0.92, 0.95)}
HEAD = (0.85, 0.93)  # of MATMUL: 128256 columns fill the device at any width
ATTENTION = (
    (330e12, 430e12),
    (270e12, 350e12),
)  # FLOP/s of causal pairs at d = 64, forward and backward: published kernels
# share of COPY: what the compiled kernels' instructions and bytes in flight allow (NOTES.md), less a tenth where solid
SHARES = {
    "rms_norm": (0.81, 0.90), "rms_norm backward": (0.77, 0.85), "rope": (0.81, 0.90), "glu": (0.84, 0.93),
    "glu backward": (0.83, 0.92), "adamw": (0.84, 0.93), "grad_norm": (0.81, 0.90),
}  # fmt: skip
SOFTMAX, LOOK_UP, FILL = (0.76, 0.84), (0.75, 0.85), (0.85, 0.95)
GAPS = (1.03, 1.01)  # between kernels


@dataclass(frozen=True)
class Component:
    """FLOPs, bytes and seconds (solid, stretch) of one part of a micro-step."""

    name: str
    flops: int
    bytes: int
    seconds: tuple[float, float]


def components(name: str, shape: Shape, tokens: int) -> list[Component]:
    """A micro-step of `tokens` tokens, with its share of the optimizer step."""
    config = ModelConfig(**shape.settings(shape.num_layers), max_position_embeddings=SEQ_LEN)
    layers, width, heads = shape.num_layers, shape.hidden_size, shape.num_heads * shape.head_dim
    in_layers = config.num_parameters - shape.vocab_size * width * (1 if shape.tie_embeddings else 2)
    weights = in_layers - (2 * layers + 1) * width

    def products(what: str, flops: int, share: tuple[float, float]) -> Component:
        return Component(what, flops, 0, (flops / (MATMUL * share[0]), flops / (MATMUL * share[1])))

    def traffic(what: str, n_bytes: int, share: tuple[float, float]) -> Component:
        return Component(what, 0, n_bytes, (n_bytes / (COPY * share[0]), n_bytes / (COPY * share[1])))

    def op(kernel: str, calls: int) -> Component:
        return traffic(kernel, calls * PROBLEMS[kernel](shape, tokens).bytes, SHARES[kernel])

    pairs = tokens * (SEQ_LEN + 1) // 2
    forward, backward = (layers * k * heads * pairs for k in (4, 8))
    steps = STEP_TOKENS // tokens  # micro-steps that share an optimizer step

    def attention(what: str, flops: int, rates: tuple[float, float]) -> Component:
        return Component(what, flops, 0, (flops / rates[0], flops / rates[1]))

    return [
        products("linears", 6 * tokens * weights, LINEAR[name]),
        traffic("their fp32 gradient, read and written", 8 * weights, FILL),
        attention("attention", forward, ATTENTION[0]),
        attention("attention backward", backward, ATTENTION[1]),
        products("head", 6 * tokens * shape.vocab_size * width, HEAD),
        traffic("softmax and its gradient", 4 * tokens * shape.vocab_size, SOFTMAX),
        op("rms_norm", 2 * layers + 1),
        op("rms_norm backward", 2 * layers + 1),
        op("rope", 2 * layers),
        op("glu", layers),
        op("glu backward", layers),
        traffic("look-up and its gradient", 4 * tokens * width + 10 * tokens * width, LOOK_UP),
        traffic("adamw", 30 * config.num_parameters // steps, SHARES["adamw"]),
        traffic("grad_norm, zeroed gradient", 8 * config.num_parameters // steps, SHARES["grad_norm"]),
    ]


def estimate(name: str, tokens: int) -> dict[str, Any]:
    """The table of a model: components, and what they sum to."""
    shape = SHAPES[name]
    config = ModelConfig(**shape.settings(shape.num_layers), max_position_embeddings=SEQ_LEN)
    parts = components(name, shape, tokens)
    flops = tokens // SEQ_LEN * window_flops(config, SEQ_LEN, "causal")
    assert sum(part.flops for part in parts) == flops, "the components must be the FLOPs that MFU counts"
    seconds = [GAPS[i] * sum(part.seconds[i] for part in parts) for i in range(2)]
    arena = arena_bytes(layout(config)[1], torch.bfloat16, training=True)
    return {
        "model": name,
        "tokens": tokens,
        "components": [
            {"name": p.name, "flops": p.flops, "bytes": p.bytes, "ms": [1e3 * s for s in p.seconds]} for p in parts
        ],
        "ms": [1e3 * value for value in seconds],
        "tokens_per_second": [tokens / value for value in seconds],
        "mfu": [flops / value / PEAK for value in seconds],
        "memory_bytes": {"arena": arena, "activations": activation_bytes(config, torch.bfloat16, tokens)},
    }


def text(found: dict[str, Any]) -> str:
    """The estimate as a Markdown table."""
    lines = [
        f"| {found['model']}, {found['tokens']} tokens | GFLOP | GB | solid ms | stretch ms |",
        "|---|---|---|---|---|",
    ]
    for row in found["components"]:
        work = [
            f"{row['flops'] / 1e9:.0f}" if row["flops"] else "",
            f"{row['bytes'] / 1e9:.2f}" if row["bytes"] else "",
        ]
        lines.append(f"| {' | '.join([row['name'], *work, *(f'{ms:.2f}' for ms in row['ms'])])} |")
    lines.append(f"| all, with gaps | | | {' | '.join(f'{ms:.1f}' for ms in found['ms'])} |")
    lines.append(f"| tokens/s | | | {' | '.join(f'{rate / 1e3:.0f} k' for rate in found['tokens_per_second'])} |")
    lines.append(f"| MFU | | | {' | '.join(f'{share:.1%}' for share in found['mfu'])} |")
    gigabytes = {name: f"{value / 1e9:.1f}" for name, value in found["memory_bytes"].items()}
    lines.append(f"\nMemory: {' GB, '.join(f'{name} {value}' for name, value in gigabytes.items())} GB.")
    return "\n".join(lines)


def main() -> int:
    """Print the estimates."""
    parser = argparse.ArgumentParser(description="Predict a training step on an H200, component by component.")
    parser.add_argument("--models", nargs="+", default=["180M", "572M"], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro-step, a multiple of 2048 (%(default)s)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.tokens < SEQ_LEN or STEP_TOKENS % arguments.tokens:
        parser.error(f"--tokens: {STEP_TOKENS} must be a multiple of them, and they of {SEQ_LEN}")
    found = [estimate(name, arguments.tokens) for name in arguments.models]
    print(json.dumps(found, indent=1) if arguments.json else "\n\n".join(map(text, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
