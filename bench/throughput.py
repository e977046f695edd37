"""Whole training runs in turns: `hyperllama train` itself against the newest transformers, with what its users add to it.

    python -m bench.throughput [--models 180M 572M] [--rounds 10 --steps 5] [--micro 16] [--out bench/results]     on a GPU
    python -m bench.throughput --overhead                                                                     on a CPU

    ours                         train/loop.py, untouched: its loader, logging, optimizer; it waits between steps for its turn
    transformers                 LlamaForCausalLM, sdpa; Liger's ops where installed; torch.compile; fp32 weights under bf16
                                 autocast and AdamW(fused=True), so the same state as ours: fp32 masters, gradients and moments
    transformers bf16            the same with everything in bf16: less work and less exact, for those who train so

All read the same windows through our loader, 524,288 tokens an optimizer step, from the same weights; first losses and
gradient norms are compared. A sample is --steps whole optimizer steps, by the wall clock, the device waited for at its end.
Each has a process of its own that keeps its memory. Speed is tokens/s; MFU is causal FLOPs (flops.py) over the device's dense
bf16 peak. The clocks are read before every sample.

--overhead: how much of a step at 15M parameters on this CPU is not an op. `loop, next to no work` is the same loop over as
many layers and micro-batches of next to nothing: what Python, autograd and dispatch cost whatever the size. Its time over the
loop's is an upper bound of the loop's overhead; `step` is bench/training.py's bare step on the same windows. Target: 3 %.

Not yet run on a GPU. Exit 1: a target was measured and missed.
"""

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperllama.config import RunConfig
from hyperllama.data.loader import Loader, micro_batches
from hyperllama.flops import window_flops
from hyperllama.hub import hf_config
from hyperllama.names import EMBEDDING, HEAD
from hyperllama.settings import ModelConfig, validated
from hyperllama.train.loop import train
from hyperllama.train.metrics import device_name, peak_flops
from hyperllama.train.plan import make_plan

from .cpu import M15, llama
from .environment import device_slug, environment
from .harness import Case, CpuClock, Result, Target, Thunk, judgement, limit, missed, run, table, write_results
from .ops import relative_error
from .shapes import SHAPES
from .training import BETA1, BETA2, CLIP, DECAY, EPS, LR, beginning, our_step
from .worker import Ask, apart

STEP_TOKENS = 524_288
MFU_TARGETS = {"180M": 0.43, "572M": 0.50}  # of one H200
LIMITS = {"loss": 2e-3, "norm": 5e-2}  # of the first step, relative: bf16 autocast and bf16 weights round differently
Told = list[tuple[float, float]]  # loss and gradient norm of every step so far


def recipe(
    folder: Path,
    model: ModelConfig,
    windows: int,
    micro: int,
    steps: int,
    device: str,
    precision: str,
    log_every: int = 10,
    cuda_graphs: bool = False,
) -> RunConfig:
    """A run at a constant rate over shards of random tokens in `folder`, which are made when they are missing."""
    random_shards(folder, model.vocab_size, model.max_position_embeddings)
    shape = {"hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "activation"}
    values = {
        "name": "throughput",
        "out": str(folder / "run"),
        "seed": 0,
        "tokenizer": str(folder / "tokenizer.json"),
        "model": {"tie_embeddings": model.tie_embeddings, **model.model_dump(include=shape)},
        "data": {"sources": [{"path": str(folder / "shards")}], "seq_len": model.max_position_embeddings},
        "budget": {"steps": steps},
        "global_batch": windows,
        "micro_batch": micro,
        "optimizer": {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY, "clip_norm": CLIP},
        "schedule": {"warmup_steps": 0, "decay_fraction": 0.0, "offset": 0},
        "device": device,
        "precision": precision,
        "log_every": log_every,
        "cuda_graphs": cuda_graphs,
    }
    return validated(RunConfig, values, "the benchmark's recipe")


def random_shards(folder: Path, vocab: int, seq_len: int) -> None:
    """A tokenizer of `vocab` words without meaning and shards of 256 windows of them, each word as likely as the others."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from hyperllama.data.build import build_shards
    from hyperllama.data.tokenizer import Tokenizer as Ours

    if (folder / "shards").exists():
        return
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, vocab)}}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    ids = torch.randint(1, vocab, (256, seq_len + 1), generator=torch.Generator().manual_seed(0))
    with (folder / "text.jsonl").open("w") as file:
        for row in ids.tolist():
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n")
    build_shards([folder / "text.jsonl"], Ours.load(folder / "tokenizer.json"), folder / "shards", language="und")


def our_run(config: RunConfig, steps: int) -> dict[str, Callable[[], Any]]:
    """`hyperllama train` on a recipe, `steps` optimizer steps a turn: it waits where it asks for its batch."""
    go, come, ended = threading.Semaphore(0), threading.Semaphore(0), []
    read = Loader.batch

    def batch(loader: Loader, *window: int) -> Any:
        come.release()  # the step before is done, and logged
        go.acquire()
        return read(loader, *window)

    def work() -> None:
        try:
            train(config, quiet=True)
        except BaseException as error:
            ended.append(error)
        come.release()

    Loader.batch = batch  # type: ignore  # of this process, which runs nothing else
    threading.Thread(target=work, name="train", daemon=True).start()

    def arrive() -> None:
        come.acquire()
        if ended:
            raise ended[0]

    def turn() -> int:
        for _ in range(steps):
            go.release()
            arrive()
        wait()
        return memory()

    def told() -> Told:
        lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines]

    arrive()
    return {"run": turn, "told": told}


def their_run(config: RunConfig, steps: int, compiled: bool, liger: bool, pure: bool) -> dict[str, Callable[[], Any]]:
    """The same run by transformers' Llama; `pure`: everything in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plan = make_plan(config)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # its GLU takes silu alone
        apply_liger_kernel_to_llama(
            rope=True, rms_norm=True, fused_linear_cross_entropy=True, cross_entropy=False,
            swiglu=plan.model.activation == "silu",
        )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    dtype = torch.bfloat16 if pure else torch.float32
    settings = LlamaConfig(**hf_config(plan.model, dtype), use_cache=False)
    model = LlamaForCausalLM._from_config(settings, dtype=dtype, attn_implementation="sdpa").to(device)
    weights = beginning(plan.model, 1, torch.float32)[0].logical("weights")
    model.load_state_dict(weights if HEAD in weights else {**weights, HEAD: weights[EMBEDDING]})
    model.train()
    forward: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, fused=True
    )
    loader = Loader(plan.mixture, config.global_batch, pin_memory=device.type == "cuda")
    told: list[Tensor] = []

    def step() -> None:
        batch = loader.batch(len(told) * config.global_batch)
        parts, loss = list(micro_batches(batch, config.micro_batch)), torch.zeros((), device=device)
        for part in parts:
            ids, targets = (x.to(device, non_blocking=True) for x in (part.ids, part.targets))
            mixed = nullcontext() if pure or config.precision == "fp32" else torch.autocast(device.type, torch.bfloat16)
            with mixed:  # targets are the next tokens already
                part_loss = forward(input_ids=ids, labels=targets, shift_labels=targets).loss / len(parts)
            part_loss.backward()
            loss += part_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        told.append(torch.stack([loss, norm.float()]))
        if len(told) % config.log_every == 0:
            told[-1].tolist()

    def turn() -> int:
        for _ in range(steps):
            step()
        wait()
        return memory()

    return {"run": turn, "told": lambda: [tuple(values.tolist()) for values in told]}


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def memory() -> int:
    """The most bytes that tensors of this process have had on the GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


class Turn:
    """A turn of a process; `figures` are what it says besides."""

    def __init__(self, ask: Ask, device: str):
        self.ask, self.device = ask, device
        self.figures: dict[str, Any] = {"peak_bytes": 0, "clocks": []}

    def __call__(self) -> Ask:
        self.figures["peak_bytes"] = self.ask("run")
        return self.ask

    def note_clocks(self) -> None:
        """Read the device's clocks, between samples."""
        self.figures["clocks"].append(environment(self.device)["clocks"])


class NotingClock(CpuClock):
    """The wall clock; clocks of a GPU are read before every sample."""

    def seconds(self, thunk: Thunk, repeats: int) -> float:
        if isinstance(thunk, Turn) and thunk.device != "cpu":
            thunk.note_clocks()
        return super().seconds(thunk, repeats)


def same_work(output: Ask, expected: Ask) -> str | None:
    """Why two runs did not begin as the same mathematics, or None."""
    ours, theirs = output("told")[0], expected("told")[0]
    for (name, most), a, b in zip(LIMITS.items(), ours, theirs, strict=True):
        error = relative_error(torch.tensor(a), torch.tensor(b))
        if not error <= most:
            return (
                f"the first {name} is {a:.6g} and {b:.6g}: they differ by {error:.2g}, at most {most:.2g} was expected"
            )
    return None


def throughput(
    name: str, model: ModelConfig, folder: Path, *, windows: int, micro: int, their_micro: int, steps: int, rounds: int,
    device: str, compiled: bool = True, liger: bool = True, cuda_graphs: bool = False, precision: str = "bf16",
) -> Result:  # fmt: skip
    """Time whole optimizer steps of `windows` windows, ours and theirs in turns; the harness's result."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = partial(
        recipe,
        folder,
        model,
        windows,
        steps=(rounds + 4) * steps + 1,
        device=device,
        precision=precision,
        log_every=steps,
    )

    def started(build: Callable[[], dict[str, Callable[[], Any]]], ours: bool) -> Callable[[], Thunk]:
        return lambda: Turn(apart(build, keep=ours), device)

    theirs = partial(their_run, settings(their_micro), steps, compiled, liger)
    providers = {
        "transformers": started(partial(theirs, False), False),
        "ours": started(partial(our_run, settings(micro, cuda_graphs=cuda_graphs), steps), True),
        **({"transformers bf16": started(partial(theirs, True), False)} if precision == "bf16" else {}),
    }
    seq_len = model.max_position_embeddings
    tokens = windows * seq_len * steps
    params: dict[str, int | float | str] = {
        "model": name, "tokens": tokens, "steps": steps, "micro_batch": micro, "their_micro_batch": their_micro,
        "compiled": str(compiled), "liger": str(liger), "cuda_graphs": str(cuda_graphs),
    }  # fmt: skip
    flops = windows * steps * window_flops(model, seq_len, "causal")
    case = Case("train", params, flops, 0, providers, same_work, targets=(Target("ours", "transformers", 1.5),))
    result = run(case, rounds=rounds, warmup=1, device=device, min_sample=0.0, clock=NotingClock())
    return judged(result, name, flops, device)


def judged(result: Result, name: str, flops: int, device: str) -> Result:
    """The result with its MFU and, on an H200, what was asked of it: MFU, and at 572M at most 50 GB."""
    kind = device_name(torch.device(device))
    peak = peak_flops(kind, 1, torch.bfloat16)
    ours = result["providers"]["ours"]
    for found in result["providers"].values():
        if peak and found["seconds"]:
            found["figures"] = {**(found["figures"] or {}), "mfu": flops / peak / found["seconds"]["median"]}
    if "H200" not in kind:
        for target in result["targets"]:
            target["least"] = target["met"] = None  # told: the targets are an H200's
    elif peak and ours["samples"]:
        if name in MFU_TARGETS:
            least = MFU_TARGETS[name]
            result["targets"].append(
                limit("ours", f"seconds at {least:.0%} MFU", flops / peak / least, ours["samples"])
            )
        if name == "572M":
            result["targets"].append(limit("ours", "50 GB", 50e9, [ours["figures"]["peak_bytes"]]))
    return result


def overhead(folder: Path, model: ModelConfig = M15, windows: int = 8, micro: int = 4, rounds: int = 11) -> Result:
    """The loop, the loop with next to no work, and the bare step, in turns on this CPU, one optimizer step a sample."""
    nothing = llama(8, 8, model.num_layers, 1, 1, 8, 128, 8)

    def loop(name: str, shape: ModelConfig) -> Callable[[], Thunk]:
        def setup() -> Thunk:
            (folder / name).mkdir(parents=True)
            config = recipe(folder / name, shape, windows, micro, (rounds + 4) * 4, "cpu", "bf16")
            return Turn(apart(partial(our_run, config, 1), keep=True), "cpu")

        return setup

    def bare() -> Thunk:
        return Turn(apart(partial(bare_step, model, windows), keep=True), "cpu")

    providers = {"loop": loop("loop", model), "step": bare, "loop, next to no work": loop("nothing", nothing)}
    tokens = windows * model.max_position_embeddings
    params: dict[str, int | float | str] = {"model": "15M", "windows": windows, "micro_batch": micro, "tokens": tokens}
    flops = windows * window_flops(model, model.max_position_embeddings, "causal")
    result = run(Case("overhead", params, flops, 0, providers), rounds=rounds, warmup=2, min_sample=0.0)
    times = [result["providers"][name]["samples"] for name in ("loop, next to no work", "loop")]
    shares = [little / whole for little, whole in zip(*times, strict=True)]
    result["targets"].append(limit("loop", "3 % that is not an op", 0.03, shares))
    return result


def bare_step(model: ModelConfig, windows: int) -> dict[str, Callable[[], Any]]:
    """bench/training.py's step on all windows at once, so with fewer and larger ops than the loop's micro-batches."""
    step = our_step(model, windows, torch.bfloat16, "csrc")

    def turn() -> int:
        step()
        return 0

    return {"run": turn}


def main() -> int:
    """Measure, print, write; 1 when a target was measured and missed."""
    parser = argparse.ArgumentParser(description="Whole training runs in turns: ours against transformers.")
    parser.add_argument("--cuda-graphs", action="store_true", help="ours replays micro-batches as CUDA graphs")
    parser.add_argument("--models", nargs="+", default=["180M", "572M"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=10, help="samples of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a sample (%(default)s)")
    parser.add_argument("--micro", type=int, default=16, help="our windows of 2048 tokens a micro-batch (%(default)s)")
    parser.add_argument("--their-micro", type=int, default=8, help="transformers' (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="transformers without torch.compile")
    parser.add_argument("--no-liger", action="store_true", help="... and without Liger's ops")
    parser.add_argument(
        "--overhead", action="store_true", help="the loop's own overhead at 15M parameters, on this CPU"
    )
    parser.add_argument("--out", type=Path, help="write <out>/<device>/throughput.json, after every model")
    arguments = parser.parse_args()
    device = "cpu" if arguments.overhead or not torch.cuda.is_available() else "cuda"
    if device == "cpu" and not arguments.overhead:
        parser.error("torch sees no GPU: only --overhead is measured on a CPU")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.overhead:
            results.append(overhead(Path(temporary)))
        for name in () if arguments.overhead else arguments.models:
            shape = SHAPES[name]
            model = ModelConfig(**shape.settings(shape.num_layers), max_position_embeddings=2048)
            results.append(throughput(
                name, model, Path(temporary) / name, windows=STEP_TOKENS // 2048, micro=arguments.micro,
                their_micro=arguments.their_micro, steps=arguments.steps, rounds=arguments.rounds, device=device,
                compiled=not arguments.no_compile, liger=not arguments.no_liger, cuda_graphs=arguments.cuda_graphs,
            ))  # fmt: skip
            save(arguments.out, device, results)
        save(arguments.out, device, results)
    print(table(results), judgement(results), sep="\n\n")
    for result in results:
        for name, found in result["providers"].items():
            if found["figures"] and "mfu" in found["figures"]:
                print(f"{result['params']['model']} {name}: MFU {found['figures']['mfu']:.1%}")
    return 1 if missed(results) else 0


def save(out: Path | None, device: str, results: list[Result]) -> None:
    """Write the results so far."""
    if out:
        write_results(out / device_slug(environment(device)["device"]) / "throughput.json", results)


if __name__ == "__main__":
    sys.exit(main())
