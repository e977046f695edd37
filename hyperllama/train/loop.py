"""The training loop, on one page: fetch, forward, backward, reduce, clip, update, log."""

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor

from hyperllama import __version__
from hyperllama.arena import Arena
from hyperllama.checkpoint import Checkpointer, adam_v, checkpoints, export_model, load, newest, slices
from hyperllama.companions import ADAM_V, TOKEN_COUNTS
from hyperllama.companions import token_counts as token_counts_companion
from hyperllama.config import RunConfig, read_yaml
from hyperllama.data.loader import Loader, micro_batches
from hyperllama.errors import Diverged, HyperLlamaError, Stopped
from hyperllama.files import read_json, write_json, write_text
from hyperllama.flops import Ledger, window_flops
from hyperllama.hub import read_weights
from hyperllama.kernels.adamw import adamw
from hyperllama.kernels.grad_norm import grad_norm
from hyperllama.memory import give_back_freed_blocks, keep_freed_blocks
from hyperllama.model import Llama
from hyperllama.progress import console, progress_bar
from hyperllama.train.attention import attention_backend
from hyperllama.train.distributed import Processes, processes
from hyperllama.train.folder import plot_runs, write_environment
from hyperllama.train.metrics import Events, Metrics, device_name, peak_flops, speed_text
from hyperllama.train.plan import WATCHING, Plan, make_plan
from hyperllama.train.schedule import lr_ratio


def train(config: RunConfig, *, quiet: bool = False, label: str | None = None) -> dict[str, Any]:
    """Run, or resume, a training run; returns run.json's record. A finished run is left as it is.

    `label` is what the progress bar calls it (default: its name).

    Raises HyperLlamaError before any work for whatever make_plan refuses, or when `out` holds another run; Stopped after a signal;
    Diverged when too many steps in a row had no finite loss or gradient; Lost when another process is gone.
    """
    out = Path(config.out)
    with processes(config.device, config.timeout_seconds) as mine:
        plan = make_plan(config)
        check_folder(plan)
        if (out / "run.json").is_file():
            return read_json(out / "run.json")
        attention = attention_backend(plan, mine, quiet=quiet or not mine.is_main)
        if mine.is_main:
            write_json(out / "attention.json", attention)
            write_text(out / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            write_environment(out, plan, mine)
        if mine.device.type == "cpu":
            keep_freed_blocks()
        try:
            return _train(plan, mine, label or config.name, attention, quiet=quiet or not mine.is_main)
        finally:
            give_back_freed_blocks()


def _train(plan: Plan, mine: Processes, label: str, attention: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    config, out = plan.config, Path(plan.config.out)
    o, seq_len = config.optimizer, config.data.seq_len
    arena = Arena(plan.model, plan.dtype, mine.device, training=True)
    model = Llama(plan.model, arena, backend=attention["backend"])
    screen = console()
    say = Events(out / "events.jsonl", screen, write=mine.is_main)
    mine.doing(0, "reading the newest checkpoint")
    step, updates, ledger, counts, earlier = _start(plan, model, mine, say)
    lr, at = torch.zeros((), device=mine.device), torch.tensor(updates, device=mine.device)
    causal = window_flops(plan.model, seq_len, "causal")
    peak = peak_flops(device_name(mine.device), mine.world, plan.dtype)
    metrics = Metrics(out / "metrics.jsonl", step, say, write=mine.is_main)
    saver = Checkpointer(out, config.checkpoint, mine, say)
    began = time.perf_counter()
    windows = counted = logged = step * config.global_batch

    def token_counts() -> dict[str, int]:
        nonlocal counts, counted
        fresh = plan.mixture.tokens_by_language(counted, windows - counted)
        counts = {tag: counts.get(tag, 0) + fresh.get(tag, 0) for tag in sorted({*counts, *fresh})}
        counted = windows
        return counts

    def save() -> None:
        state = {"windows": windows, "card": _card(plan, ledger, token_counts()), "loss": metrics.last["loss"]}
        state["updates"] = int(at)
        state["seconds"] = round(earlier + time.perf_counter() - began, 2)
        saver.save(step, slices(arena, mine.rank, mine.world), arena, state, problem=metrics.problem)

    def export(path: Path) -> dict[str, Any]:
        card = _card(plan, ledger, token_counts())
        if mine.is_main:
            companions = {
                TOKEN_COUNTS: token_counts_companion(plan.mixture.token_counts(windows), plan.model.vocab_size)
            }
            if config.export.adam_v:
                companions[ADAM_V] = adam_v(arena, int(at), o.beta2)
            export_model(path, arena, card, plan.tokenizer.path, plan.dtype, companions)
        return card

    with (
        _StopRequest() as stop,
        Loader(
            plan.mixture,
            config.global_batch,
            mine.rank,
            mine.world,
            documents=config.data.documents == "separate",
            mask_first_token_of_document=config.data.mask_document_start,
            pin_memory=mine.device.type == "cuda",
        ) as loader,
        progress_bar(screen, disable=quiet) as bar,
    ):
        task = bar.add_task(label, total=plan.steps, completed=step, figures="")
        while step < plan.steps:
            count = min(config.global_batch, plan.windows - windows)
            mine.doing(step + 1, "reading the batch")
            batch = loader.batch(windows, count)
            targets = count * seq_len
            if config.data.mask_document_start:
                targets = mine.sum_ints([int((batch.targets >= 0).sum())])[0]

            mine.doing(step + 1, "forward and backward")
            arena.grad.zero_()
            loss = torch.zeros((), device=mine.device)
            for micro in micro_batches(batch, config.micro_batch):
                ids, micro_targets = (t.to(mine.device, non_blocking=True) for t in (micro.ids, micro.targets))
                borders = None if micro.cu_seqlens is None else micro.cu_seqlens.to(mine.device)
                part = model.loss(
                    ids, micro_targets, loss_weight=1 / max(1, targets), cu_seqlens=borders, z_loss=o.z_loss
                )
                part.backward()
                loss += part.detach()
            mine.doing(step + 1, "summing the gradients")
            mine.sum_(arena.grad)
            mine.sum_(loss)

            step, windows = step + 1, windows + count
            norm = grad_norm(arena.grad)
            clip = clip_or_skip(loss, norm, o.clip_norm)
            at += clip > 0
            adamw(
                arena.master,
                arena.grad,
                arena.m,
                arena.v,
                None if arena.weights is arena.master else arena.weights,
                lr=lr.fill_(o.lr * lr_ratio(config.schedule, step, plan.steps)),
                beta1=o.beta1,
                beta2=o.beta2,
                eps=o.eps,
                weight_decay=o.weight_decay,
                step=at,
                clip=clip,
            )

            ledger.spent += count * plan.cost
            fields = {
                "step": step,
                "lr": o.lr * lr_ratio(config.schedule, step, plan.steps),
                "windows": windows,
                "batch": count,
                "tokens": windows * seq_len,
                "spent_flops": ledger.spent,
                "total_flops": ledger.total,
            }
            metrics.add(fields, torch.stack([loss, norm.to(loss.dtype)]))

            mine.doing(step, "logging and saving")
            due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
            if step % config.log_every == 0 or step == plan.steps or due or windows in plan.milestones:
                line = metrics.flush((windows - logged) * seq_len, (windows - logged) * causal, peak)
                logged = windows
                bar.update(task, completed=step, figures=speed_text(line))
                if metrics.skipped_in_a_row >= config.max_skipped:
                    saver.wait()
                    raise Diverged(_diverged(metrics, out, step))
            if windows in plan.milestones:
                export(out / "milestones" / str(plan.milestones[windows]))
            if stop.agreed(mine) and step < plan.steps:
                metrics.flush((windows - logged) * seq_len, (windows - logged) * causal, peak)
                save()
                raise Stopped(stop.signal, _farewell(saver, out, step, plan.steps))
            if due and step < plan.steps:
                save()

    mine.doing(step, "writing the model")
    saver.wait()
    metrics.close()
    assert ledger.spent == plan.budget, "the ledger must end at the budget"
    record = {
        "name": config.name,
        "card": export(out / "model"),
        "ledger": ledger.to_json(),
        "loss": metrics.last.get("loss"),
        "plan": plan.describe(),
        "attention": attention,
        "seconds": round(earlier + time.perf_counter() - began, 2),
        "device": device_name(mine.device),
        "processes": mine.world,
        "checkpoints": {"saved": saver.saved, "stalled_seconds": round(saver.stalled, 4)},
        "skipped_steps": metrics.skipped,
        "versions": {"hyperllama": __version__, "torch": torch.__version__},
    }
    if mine.is_main:
        write_json(out / "run.json", record)
        plot_runs({config.name: out}, out / "loss.png")
    mine.barrier()
    if stop.signal:
        raise Stopped(stop.signal, "the run was done when the signal came; its model is written")
    return record


def clip_or_skip(loss: Tensor, norm: Tensor, limit: float | None) -> Tensor:
    """What gradients are multiplied by, decided on the device: 0, with which adamw skips the step, when anything is not finite."""
    clip = torch.ones_like(norm) if limit is None else torch.clamp(limit / (norm + 1e-6), max=1.0)
    return torch.where(torch.isfinite(loss) & torch.isfinite(norm), clip, 0.0)


def _start(plan: Plan, model: Llama, mine: Processes, say: Events) -> tuple[int, int, Ledger, dict[str, int], float]:
    """Fill the arena from the newest checkpoint, a model folder, or at random.

    Returns (steps done, steps not skipped, ledger, token counts, seconds).
    """
    arena, out = model.arena, Path(plan.config.out)
    if saved := newest(out, mine, say):
        folder, state = saved
        load(folder, state, arena, slices(arena))
        if arena.weights is not arena.master:
            arena.weights.copy_(arena.master)
        say.note("resumed", step=state["step"], checkpoint=folder.name, processes=mine.world)
        card = state["card"]
        ledger = Ledger.from_json(card["ledger"], folder)
        return state["step"], state["updates"], ledger, card["token_counts"], state["seconds"]
    if plan.start is not None:
        read_weights(plan.start, plan.model, arena.logical("weights"))
        arena.master_from_weights()
    else:
        model.init_weights(plan.config.seed)
    say.note("started", processes=mine.world)
    return 0, 0, plan.ledger, {}, 0.0


def _farewell(saver: Checkpointer, out: Path, step: int, steps: int) -> str:
    """What a run says that was stopped by a signal, once its save is on disk or has failed."""
    if saver.wait():
        return f"saved after step {step} of {steps}; the same command goes on from there"
    return f"step {step} of {steps} could not be saved ({saver.failed}); the same command {_next_start(out)}"


def _diverged(metrics: Metrics, out: Path, step: int) -> str:
    """What a run says that has skipped too many steps in a row."""
    return (
        f"the last {metrics.skipped_in_a_row} updates up to step {step} were skipped because loss or gradient was not finite "
        f"({out}/events.jsonl names their windows); the weights are those before them, and the same command {_next_start(out)}"
    )


def _next_start(out: Path) -> str:
    kept = checkpoints(out)
    return f"goes on from {kept[-1]}" if kept else "starts again: there is no checkpoint"


def _check_same_inputs(path: Path, record: dict[str, Any], plan: Plan) -> None:
    """Raise HyperLlamaError when what the settings point to has changed since `path` was written."""
    ledger = record.get("ledger") if isinstance(record, dict) else None
    if Ledger.from_json(ledger, path).run != plan.ledger.run:
        raise HyperLlamaError(
            f"{path} was made from other data, another start or another budget than this recipe now has: "
            "choose another out, or remove the folder"
        )


def _card(plan: Plan, ledger: Ledger, token_counts: dict[str, int]) -> dict[str, Any]:
    """What the exported model says of itself."""
    made_from: list[dict[str, Any]] = [
        {"path": str(s.shards.path), "sha256": s.shards.fingerprint} for s in plan.mixture.sources
    ]
    if plan.start is not None:
        made_from.append({"path": str(plan.start.path), "sha256": plan.start_hashes})
    return {
        "kind": "train",
        "ledger": ledger.to_json(),
        "token_counts": token_counts,
        "made_from": made_from,
        "tokenizer": plan.tokenizer.fingerprint,
        "config": plan.config.model_dump(mode="json"),
    }


def check_folder(plan: Plan) -> None:
    """Raise HyperLlamaError when `out` holds another run than the plan's, naming the first key that differs."""
    out, wanted = Path(plan.config.out), plan.config.model_dump(mode="json")
    if not (out / "config.yaml").is_file():
        return
    stored = read_yaml(out / "config.yaml")
    for key in wanted:
        if key not in ("device", *WATCHING) and stored.get(key) != wanted[key]:
            raise HyperLlamaError(
                f"{out} holds a run with another {key} ({json.dumps(stored.get(key))}, now {json.dumps(wanted[key])}): "
                "choose another out, or remove the folder"
            )
    if (out / "run.json").is_file():
        _check_same_inputs(out / "run.json", read_json(out / "run.json"), plan)
    for folder in reversed(checkpoints(out)):
        try:
            card = read_json(folder / "state.json")["card"]
        except (HyperLlamaError, KeyError, TypeError):  # damaged: `newest` tells
            continue
        _check_same_inputs(folder / "state.json", card, plan)
        break


class _StopRequest:
    """Turns SIGINT and SIGTERM into a wish that the loop reads between steps; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals stay with whoever has them
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, mine: Processes) -> bool:
        """Whether any process got a signal; then all of them have it."""
        found = mine.largest_int(self.signal)
        if found:  # never written otherwise: a signal may have come since it was read
            self.signal = found
        return found != 0
