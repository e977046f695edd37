"""The training loop, on one page: fetch, forward, backward, reduce, clip, update, log."""

import gc
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from hyperllama import __version__
from hyperllama.checkpoint import Checkpointer, adam_v, checkpoints, export_model
from hyperllama.companions import ADAM_V, TOKEN_COUNTS, token_counts
from hyperllama.config import RunConfig
from hyperllama.data.loader import Loader, micro_batches, nothing
from hyperllama.errors import Diverged, HyperLlamaError, Stopped, WrongIndex
from hyperllama.files import read_json, write_json, write_text
from hyperllama.flops import Ledger, window_flops
from hyperllama.memory import give_back_freed_blocks, keep_freed_blocks, no_collections
from hyperllama.progress import console, progress_bar
from hyperllama.recipes import read_yaml
from hyperllama.settings import validated
from hyperllama.train.attention import attention_backend
from hyperllama.train.distributed import Processes, deterministic, processes
from hyperllama.train.folder import check_alike, only_run, plot_runs, write_environment
from hyperllama.train.metrics import Events, Metrics, PlainProgress, device_name, peak_flops, speed_text
from hyperllama.train.plan import PLACING, WATCHING, Plan, make_plan
from hyperllama.train.state import State
from hyperllama.train.watch import Evaluation, Logs, Profile


def train(config: RunConfig, *, quiet: bool = False, label: str | None = None) -> dict[str, Any]:
    """Run, or resume, a training run; returns run.json's record. A finished run is left as it is.

    `label` is what the progress bar calls it (default: its name).

    Raises HyperLlamaError before any work for whatever make_plan refuses, when `out` holds another run, or when the processes were
    started unlike; Stopped after a signal; Diverged when too many steps in a row had no finite loss or gradient; Lost when another
    process is gone.
    """
    out = Path(config.out)
    with processes(config.device, config.timeout_seconds) as mine, deterministic(config.deterministic):
        if config.cuda_graphs is True and mine.device.type != "cuda":
            raise HyperLlamaError("cuda_graphs: this run has no CUDA device to record on")
        plan = make_plan(config)
        check_alike(plan, mine)
        check_folder(plan)
        if (out / "run.json").is_file():
            return read_json(out / "run.json")
        attention = attention_backend(plan, mine, quiet=quiet or not mine.is_main)
        with only_run(out, mine):
            check_folder(plan)  # again: what another run may have written before the lock was ours
            if mine.is_main:
                write_json(out / "attention.json", attention)
                write_text(out / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
                write_environment(out, plan, mine)
            if mine.device.type == "cpu":
                keep_freed_blocks()
            try:
                return _train(plan, mine, label or config.name, attention, quiet=quiet or not mine.is_main)
            except WrongIndex as error:
                raise HyperLlamaError(_wrong_index(error, plan)) from None
            finally:
                give_back_freed_blocks()


def _train(plan: Plan, mine: Processes, label: str, attention: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    config, out = plan.config, Path(plan.config.out)
    o, seq_len = config.optimizer, config.data.seq_len
    screen = console()
    say = Events(out / "events.jsonl", screen, write=mine.is_main)
    mine.doing(0, "reading the newest checkpoint")
    run = State.start(plan, mine, attention, say)
    _warn_of_symmetry(run, say)
    run.choose_graphs(say)
    peak = peak_flops(device_name(mine.device), mine.world, plan.dtype)
    logs = Logs(config, run.ledger.run, run.step, write=mine.is_main)
    metrics = Metrics(out / "metrics.jsonl", run.step, say, write=mine.is_main, log=logs)
    evaluation = Evaluation(config.evaluate, plan.tokenizer, seq_len, plan.steps, out)
    if mine.is_main:
        evaluation.forget(run.step)
    profile = Profile(config.profile, out, write=mine.is_main)
    tell = PlainProgress(screen, label, plan.steps, disable=quiet)
    saver = Checkpointer(out, config.checkpoint, mine, say)
    logged = run.windows

    def flush(**fields: Any) -> str:
        nonlocal logged
        windows, logged = run.windows - logged, run.windows
        flops = windows * window_flops(run.arena.config, seq_len, "causal")
        return speed_text(metrics.flush(windows * seq_len, flops, peak, **fields), plan.budget)

    def save() -> None:
        state = {**run.to_json(), **{key: metrics.last.get(key) for key in ("loss", "bits_per_byte")}}
        saver.save(run.step, run.pieces(), run.arena, state, metrics.secure)

    def told(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors; the others, which wait for the first process to write them, hear that it does."""
        for named in tensors:
            mine.alive()
            yield named

    def export(path: Path) -> dict[str, Any]:
        card = run.card()
        tensors = told(run.exchange.tensors())
        if mine.is_main:
            counts = plan.mixture.token_counts(run.windows, mine.alive)
            companions = {TOKEN_COUNTS: token_counts(counts, plan.model.vocab_size)}
            if config.export.adam_v:
                companions[ADAM_V] = adam_v(run.arena.logical("v"), run.arena.config, int(run.updates), o.beta2)
            export_model(path, run.arena.config, tensors, card, plan.tokenizer.path, plan.dtype, companions)
        for _ in tensors:  # the others send theirs
            pass
        return card

    with (
        _StopRequest() as stop,  # first: an interrupt in the middle of a collection would be lost
        logs,
        saver,
        no_collections(),
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
        task = bar.add_task(label, total=plan.steps, completed=run.step, figures="")
        while run.step < plan.steps:
            if plan.grows_at(run.windows):
                mine.doing(run.step + 1, "growing")
                run.grow()
                _warn_of_symmetry(run, say)
                run.choose_graphs(say)
            profile.before(run.step + 1)
            model, arena, exchange = run.model, run.arena, run.exchange
            count = min(config.global_batch, plan.windows - run.windows)
            mine.doing(run.step + 1, "reading the batch")
            batch = loader.batch(run.windows, count)
            targets = count * seq_len
            if config.data.mask_document_start and config.loss_mean == "tokens":
                targets = mine.sum_ints([int((batch.targets >= 0).sum())])[0]
            parts = mine.micro_batches(count, config.micro_batch)

            mine.doing(run.step + 1, "forward and backward")
            arena.zero_grad()
            loss = torch.zeros((), device=mine.device)
            micros = list(micro_batches(batch, config.micro_batch))
            if exchange.needs_all:
                idle = nothing(seq_len, documents=config.data.documents == "separate")
                micros += [idle] * (max(parts) - len(micros))
            for left, micro in zip(reversed(range(len(micros))), micros, strict=True):
                if config.loss_mean == "micro_batch":
                    targets = sum(parts) * int((micro.targets >= 0).sum())
                exchange.last = left == 0
                ids, micro_targets = (t.to(mine.device, non_blocking=True) for t in (micro.ids, micro.targets))
                borders = None if micro.cu_seqlens is None else micro.cu_seqlens.to(mine.device)
                loss += run.micro_step(ids, micro_targets, borders, 1 / max(1, targets))  # forward and backward
            mine.doing(run.step + 1, "summing the gradients")
            exchange.finish()
            mine.sum_(loss)

            run.step, run.windows = run.step + 1, run.windows + count
            norm = run.update(loss, plan.lr(run.step))  # clip, or skip the step; AdamW
            exchange.send()

            run.ledger.spent = plan.spent(run.windows)
            fields = {
                "step": run.step,
                "lr": plan.lr(run.step),
                "windows": run.windows,
                "batch": count,
                "tokens": run.windows * seq_len,
                "spent_flops": run.ledger.spent,
                "total_flops": run.ledger.total,
            }
            if run.step % config.log_every == 0 and (asymmetry := run.asymmetry()) is not None:
                fields["asymmetry"] = float(asymmetry)
            metrics.add(fields, torch.stack([loss, norm.to(loss.dtype)]))

            profile.after(run.step)
            figures: dict[str, Any] = {}
            if evaluation.due(run.step):
                mine.doing(run.step, "evaluating")
                began = time.perf_counter()
                exchange.settle()  # a compiled model does not wait for its weights
                figures = evaluation(model, run.step, mine, say)
                metrics.pause(time.perf_counter() - began)
            mine.doing(run.step, "logging and saving")
            due = config.checkpoint.every_steps and run.step % config.checkpoint.every_steps == 0
            border = run.windows in plan.milestones or plan.grows_at(run.windows) or run.step == plan.steps
            if run.step % config.log_every == 0 or due or border or figures:
                text = flush(**figures)
                bar.update(task, completed=run.step, figures=text)
                tell(run.step, text)
                gc.collect()
                if metrics.skipped_in_a_row >= config.max_skipped:
                    _saved_by_all(saver, mine)
                    raise Diverged(_diverged(metrics, out, run.step))
            if run.windows in plan.milestones:
                export(out / "milestones" / str(plan.milestones[run.windows]))
            if stop.agreed(mine) and run.step < plan.steps:
                flush()
                save()
                raise Stopped(stop.signal, _farewell(saver, mine, out, run.step, plan.steps))
            if due and run.step < plan.steps:
                save()

    with stop:  # nothing is saved after the last step: a signal waits for the model
        mine.doing(run.step, "writing the model")
        saver.wait()
        metrics.close()
        assert run.ledger.spent == plan.budget, "the ledger must end at the budget"
        record = {
            "name": config.name,
            "card": export(out / "model"),
            "ledger": run.ledger.to_json(),
            "loss": metrics.last.get("loss"),
            "bits_per_byte": metrics.last.get("bits_per_byte"),
            "plan": plan.describe(),
            "attention": attention,
            "cuda_graphs": run.graphs,
            "seconds": run.seconds,
            "device": device_name(mine.device),
            "processes": mine.world,
            "checkpoints": {"saved": saver.saved, "stalled_seconds": round(saver.stalled, 4)},
            "skipped_steps": metrics.skipped,
            "versions": {"hyperllama": __version__, "torch": torch.__version__},
        }
        if mine.is_main:
            write_json(out / "run.json", record)
            plot_runs({config.name: out}, out / "loss.png")
        if stop.agreed(mine):
            raise Stopped(stop.signal, "the run was done when the signal came; its model is written")
    return record


def _warn_of_symmetry(run: State, say: Events) -> None:
    """Say it when the model's copies are equal and the arithmetic will keep them so."""
    same_bits = run.mine.device.type == "cpu" or run.plan.config.deterministic
    if same_bits and run.asymmetry() == 0:
        say(
            "symmetric",
            "the model is a clone whose copies are equal, and deterministic arithmetic keeps them equal for ever: it can "
            "learn only what the smaller model could; grow.noise_db (or hyperllama grow --noise-db) makes them differ",
        )


def _wrong_index(error: WrongIndex, plan: Plan) -> str:
    """What a run says whose batches hold what the model's tables do not; nothing made from them has been saved."""
    shards = ", ".join(str(source.shards.path) for source in plan.mixture.sources)
    return (
        f"{error}: ids 0 to {plan.model.vocab_size - 1} and positions 0 to {plan.config.data.seq_len - 1} were expected, as "
        f"{plan.config.tokenizer} and {shards} promise; check them with hyperllama data inspect, or build the shards again with "
        f"this tokenizer. The same command {_next_start(Path(plan.config.out))}"
    )


def _saved_by_all(saver: Checkpointer, mine: Processes) -> bool:
    """Wait until every process has its part of the last save on disk, the first the whole; False when one of them failed.

    Who left before would have torchrun end the others in the middle of theirs.
    """
    return not mine.largest_int(int(not saver.wait()))


def _farewell(saver: Checkpointer, mine: Processes, out: Path, step: int, steps: int) -> str:
    """What a run says that was stopped by a signal, once its save is on disk or has failed."""
    if _saved_by_all(saver, mine):
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


def check_folder(plan: Plan) -> None:
    """Raise HyperLlamaError when `out` holds another run than the plan's, naming the first key that differs."""
    out, wanted = Path(plan.config.out), plan.config.model_dump(mode="json")
    file = out / "config.yaml"
    if not file.is_file():
        return
    stored = validated(RunConfig, read_yaml(file), str(file)).model_dump(
        mode="json"
    )  # with what has come since, at its default
    for key in wanted:
        if key not in WATCHING | PLACING and stored.get(key) != wanted[key]:
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
    """Turns SIGINT and SIGTERM into a wish that the loop reads between steps; a second SIGINT interrupts at once.

    A second SIGTERM does not: where a cluster signals all processes of a job, torchrun passes on to its own what they already have.
    """

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
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def agreed(self, mine: Processes) -> bool:
        """Whether any process got a signal; then all of them have it."""
        found = mine.largest_int(self.signal)
        if found:  # never written otherwise: a signal may have come since it was read
            self.signal = found
        return found != 0
