"""Whole optimizer steps on a CPU: transformers' Llama as its users run it, against ours as the trainer runs it.

    transformers            LlamaForCausalLM, sdpa, eager; AdamW(fused=True), clip_grad_norm_; all in the dtype of the case
    transformers compiled   the same under torch.compile
    reference               our model and optimizer in plain torch
    csrc                    our model and optimizer as `hyperllama train` runs them on a CPU
    matmul                  the roof: the step's FLOPs (causal) at the rate of a 2048 x 2048 x 2048 product

All start from the same weights, see the same windows and use the same betas, eps, decay and clipping. In bf16 ours does more
work, not less: it keeps fp32 masters, gradients and moments, where transformers keeps everything in bf16. The check compares
the first step's loss, gradient norm and some whole gradients, so that a ratio means the same mathematics.

Each has a process of its own, because their users' processes differ: `hyperllama train` makes glibc keep freed blocks, and
transformers leaves malloc as it is. That choice is worth much to both, so `Malloc` can also give all the same one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hyperllama.arena import Arena, arena_bytes
from hyperllama.flops import window_flops
from hyperllama.hub import hf_config
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.backend import use
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.model import Llama
from hyperllama.names import EMBEDDING, FINAL_NORM, HEAD
from hyperllama.settings import ModelConfig

from .harness import Case, Target, Thunk, matmul_roof
from .ops import dtype_name, relative_error
from .worker import apart

LR, BETA1, BETA2, EPS, DECAY, CLIP = 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0
PEERS = ("transformers", "transformers compiled", "csrc", "reference")  # in the order in which memory is given out
# whose processes keep freed blocks: ours, as their users have them; all; none
Malloc = Literal["users", "kept", "default"]
# bytes that are foreseen for the processes of a case, which are all there at once because they take turns
MEMORY = 18 << 30
MATMUL = 2048
# of loss, gradient norm and gradients, relative; two bf16 models round differently in every layer, and transformers' own
# gradients and norm are rounded to bf16
LIMITS = {torch.float32: (1e-5, 1e-4, 1e-3), torch.bfloat16: (5e-4, 1e-2, 5e-2)}


class Step(NamedTuple):
    """What a step returns: loss and norm of the gradient, and the gradients before clipping for whoever asks in time."""

    loss: Tensor
    norm: Tensor
    gradients: Callable[[], dict[str, Tensor]]


def compared(config: ModelConfig) -> tuple[str, ...]:
    """The weights whose gradients are compared: both ends of the stack, and one of every kind of path through it."""
    first, last = "model.layers.0", f"model.layers.{config.num_layers - 1}"
    return (
        EMBEDDING, FINAL_NORM, f"{first}.self_attn.k_proj.weight", f"{first}.mlp.gate_proj.weight",
        f"{last}.self_attn.v_proj.weight", f"{last}.mlp.down_proj.weight",
    )  # fmt: skip


def step_case(
    name: str, config: ModelConfig, windows: int, dtype: torch.dtype, targets: dict[str, float | None],
    peers: tuple[str, ...] = PEERS, malloc: Malloc | None = "users",
) -> Case:  # fmt: skip
    """One optimizer step on `windows` full windows; `targets`: how much of `against` csrc has to reach, None to tell it.

    Without `malloc` all run in this process. A provider that would take the case beyond MEMORY bytes is left out with a
    MemoryError.
    """
    seq_len = config.max_position_embeddings
    tokens = windows * seq_len
    activations = tokens * config.num_layers * (12 * config.hidden_size + 4 * config.intermediate_size) * dtype.itemsize
    used = 0

    def reserve(n_bytes: int) -> None:
        nonlocal used
        if used + n_bytes > MEMORY:
            raise MemoryError(
                f"{(used + n_bytes) / 2**30:.1f} GiB with the providers before it, {MEMORY / 2**30:.1f} at most"
            )
        used += n_bytes

    def started(build: Callable[[], Thunk], ours: bool) -> Thunk:
        if malloc is None:
            return build()
        return answered(apart(partial(answers, build), keep=malloc == "kept" or (malloc == "users" and ours)))

    def ours(backend: str) -> Callable[[], Thunk]:
        def setup() -> Thunk:
            reserve(arena_bytes(config.num_parameters, dtype, training=True) + activations)
            return started(partial(our_step, config, windows, dtype, backend), ours=True)

        return setup

    def theirs(compiled: bool) -> Callable[[], Thunk]:
        def setup() -> Thunk:
            # weights, gradients, two moments; logits, their fp32 copy and its gradient
            reserve(4 * config.num_parameters * dtype.itemsize + activations + 12 * tokens * config.vocab_size)
            return started(partial(their_step, config, windows, dtype, compiled), ours=False)

        return setup

    providers = {
        "transformers": theirs(compiled=False), "transformers compiled": theirs(compiled=True),
        "csrc": ours("csrc"), "reference": ours("reference"),
    }  # fmt: skip
    flops = windows * window_flops(config, seq_len, "causal")
    return Case(
        "step",
        {
            "model": name, "windows": windows, "T": seq_len, "tokens": tokens, "dtype": dtype_name(dtype),
            "malloc": malloc or "shared",
        },
        flops,
        0,
        {peer: providers[peer] for peer in peers},
        lambda output, expected: disagreement(output, expected, dtype),
        {"matmul": matmul_roof(flops, dtype, MATMUL)},
        tuple(
            Target("csrc", against, least) for against, least in targets.items() if against in (*peers, "matmul")
        ),
    )  # fmt: skip


def answers(build: Callable[[], Thunk]) -> dict[str, Callable[[], Any]]:
    """A step as a worker offers it: numbers and arrays only."""
    step, last = build(), None

    def run() -> tuple[float, float]:
        nonlocal last
        last = step()
        return float(last.loss), float(last.norm)

    def gradients() -> dict[str, Any]:
        return {} if last is None else {name: grad.float().numpy() for name, grad in last.gradients().items()}

    return {"run": run, "gradients": gradients}


def answered(ask: Callable[[str], Any]) -> Thunk:
    """The step of a worker as one of this process."""

    def gradients() -> dict[str, Tensor]:
        return {name: torch.from_numpy(grad) for name, grad in ask("gradients").items()}

    def run() -> Step:
        loss, norm = ask("run")
        return Step(torch.tensor(loss), torch.tensor(norm), gradients)

    return run


def beginning(config: ModelConfig, windows: int, dtype: torch.dtype) -> tuple[Arena, Tensor, Tensor]:
    """The weights that all start from, the ids of full windows, and their targets."""
    start = Arena(config, dtype, "cpu", training=False)
    Llama(config, start).init_weights(0)
    shape = (2, windows, config.max_position_embeddings)
    return start, *torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def our_step(config: ModelConfig, windows: int, dtype: torch.dtype, backend: str) -> Thunk:
    """A training step of ours as train/loop.py takes it."""
    start, ids, labels = beginning(config, windows, dtype)
    arena = Arena(config, dtype, "cpu", training=True)
    arena.weights.copy_(start.weights)
    arena.master_from_weights()
    model = Llama(config, arena, backend="sdpa" if backend == "reference" else "auto")
    lr, at = torch.tensor(LR), torch.tensor(0)

    def gradients() -> dict[str, Tensor]:
        views = arena.logical("grad")
        return {name: views[name] for name in compared(config)}

    def step() -> Step:
        with use(backend):
            arena.grad.zero_()
            loss = model.loss(ids, labels, loss_weight=1 / labels.numel())
            loss.backward()
            norm = grad_norm(arena.grad)
            adamw(
                arena.master, arena.grad, arena.m, arena.v, arena.weights if arena.rounds else None,
                lr=lr, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, step=at.add_(1),
                clip=torch.clamp(CLIP / (norm + 1e-6), max=1.0),
            )  # fmt: skip
        return Step(loss.detach(), norm, gradients)

    return step


def their_step(config: ModelConfig, windows: int, dtype: torch.dtype, compiled: bool) -> Thunk:
    """A training step of transformers' Llama with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    start, ids, labels = beginning(config, windows, dtype)
    settings = LlamaConfig(**hf_config(config, dtype), use_cache=False)
    # in the dtype from the start: a later .to(bf16) would round RoPE's frequencies too
    model = LlamaForCausalLM._from_config(settings, dtype=dtype, attn_implementation="sdpa")
    weights = start.logical("weights")
    model.load_state_dict(weights if HEAD in weights else {**weights, HEAD: weights[EMBEDDING]})
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, fused=True
    )
    forward: Any = torch.compile(model) if compiled else model
    parameters = dict(model.named_parameters())

    def step() -> Step:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(input_ids=ids, labels=labels, shift_labels=labels).loss  # labels are the next tokens already
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

        def gradients() -> dict[str, Tensor]:
            clip = torch.clamp(CLIP / (norm + 1e-6), max=1.0)
            return {name: parameters[name].grad / clip for name in compared(config)}

        return Step(loss.detach(), norm, gradients)

    return step


def disagreement(output: Step, expected: Step, dtype: torch.dtype) -> str | None:
    """Why two first steps were not the same mathematics, or None."""
    ours, theirs = output.gradients(), expected.gradients()
    errors = {
        "loss": relative_error(output.loss, expected.loss),
        "gradient norm": relative_error(output.norm, expected.norm),
    }
    errors |= {f"gradient of {name}": relative_error(ours[name], theirs[name]) for name in ours}
    loss, norm, gradient = LIMITS[dtype]
    for name, error in errors.items():
        limit = {"loss": loss, "gradient norm": norm}.get(name, gradient)
        if not error <= limit:
            return f"the first {name} differs by {error:.2g}, at most {limit:.2g} was expected"
    return None
