"""What looks at a run and does not change it: evaluation, samples, other programs' logs, a profile of some steps."""

import json
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hyperllama.config import EvaluateSettings, ProfileSettings, RunConfig
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.generate import generate
from hyperllama.evaluate.text import evaluate_text
from hyperllama.files import write_text
from hyperllama.model import Llama
from hyperllama.train.distributed import Processes
from hyperllama.train.metrics import Events

Line = dict[str, Any]  # of metrics.jsonl


def check_watching(config: RunConfig, steps: int, vocab_size: int) -> None:
    """Raise HyperLlamaError for a log whose package is not installed, a text that is missing, a start token outside the
    vocabulary, a profile whose steps never come."""
    wanted = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb is not None}
    for package, on in wanted.items():
        if on and find_spec(package) is None:
            raise HyperLlamaError(f"log.{package}: {package} is not installed; `pip install hyperllama[log]` brings it")
    for path in config.evaluate.text if config.evaluate else ():
        if not Path(path).exists():
            raise HyperLlamaError(f"evaluate.text: {path} does not exist")
    start = config.evaluate.start_token if config.evaluate else None
    if start is not None and start >= vocab_size:
        raise HyperLlamaError(
            f"evaluate.start_token: {start} is no token of this model; 0 to {vocab_size - 1} were expected"
        )
    if config.profile and config.profile.start + config.profile.steps - 1 > steps:
        raise HyperLlamaError(f"profile: the run has {steps} steps, fewer than profile.start + profile.steps - 1")


class Evaluation:
    """Bits per byte of texts, and continuations of prompts, every so many steps and at the end.

    All processes compute it, and get the same: with fsdp they need each other for it. One writes.
    """

    def __init__(self, settings: EvaluateSettings | None, tokenizer: Tokenizer, seq_len: int, steps: int, out: Path):
        self.settings, self.tokenizer, self.seq_len, self.steps = settings, tokenizer, seq_len, steps
        self.samples = out / "samples.jsonl"

    def forget(self, step: int) -> None:
        """Remove the samples of steps after `step`, from where a run goes on."""
        if not self.samples.is_file():
            return
        kept = []
        with self.samples.open(encoding="utf-8", errors="replace") as file:  # splitlines would cut at U+2028
            for line in file:
                with suppress(ValueError):  # a full disk cut this line off
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
        write_text(self.samples, "".join(kept))

    def due(self, step: int) -> bool:
        """Whether there is something to do after `step`."""
        return self.settings is not None and (step % self.settings.every == 0 or step == self.steps)

    def __call__(self, model: Llama, step: int, mine: Processes, say: Events) -> Line:
        """Fields for the line of `step`; samples go to samples.jsonl. A model whose loss is not finite is told, and has none."""
        settings = self.settings
        assert settings is not None
        start = settings.start_token
        try:
            scored = evaluate_text(
                model,
                self.tokenizer,
                settings.text,
                start=start,
                seq_len=self.seq_len,
                progress=lambda *_: mine.alive(),
            )
        except HyperLlamaError as error:
            say("not_evaluated", f"step {step}: {error}", step=step)
            return {"bits_per_byte": None}
        for prompt in settings.prompts if mine.is_main else ():
            text = generate(model, self.tokenizer, prompt, max_tokens=settings.sample_tokens, start=start)
            mine.alive()
            with (
                suppress(OSError),
                self.samples.open("a", encoding="utf-8") as file,
            ):  # a full disk: metrics.jsonl tells
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        return {"bits_per_byte": scored["bits_per_byte"], "evaluated_bytes": scored["bytes"]}


class Logs:
    """Gives other programs every line of metrics.jsonl, of a run of the id `run` that goes on after `step`; a context manager."""

    def __init__(self, config: RunConfig, run: str, step: int, *, write: bool):
        self.tensorboard: Any = None
        self.wandb: Any = None
        out, settings = Path(config.out), config.log
        if write and settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        if write and settings.wandb is not None:
            import wandb

            self.wandb = wandb.init(
                project=settings.wandb, name=config.name, id=run, resume="allow", dir=str(out),
                config=config.model_dump(mode="json"),
            )  # fmt: skip

    def __call__(self, line: Line) -> None:
        """Log a line."""
        if self.tensorboard is not None:
            for name, value in numbers(line).items():
                self.tensorboard.add_scalar(name, value, line["step"])
            if "time" in line:  # the end of an interval
                self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(numbers(line), step=line["step"])

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def numbers(line: Line) -> dict[str, float]:
    """The figures of a line by name, those under "time" as time/...; the step and what is null are left out."""
    flat = {**line, **{f"time/{name}": value for name, value in line.get("time", {}).items()}}
    return {
        name: float(value)
        for name, value in flat.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class Profile:
    """Records some steps of one process: <out>/profile/trace.json for a trace viewer, ops.txt with a line an op."""

    def __init__(self, settings: ProfileSettings | None, out: Path, *, write: bool):
        self.settings, self.folder = settings if write else None, out / "profile"
        self.profiler: Any = None

    def before(self, step: int) -> None:
        """Begin when `step` is the first of the window."""
        if self.settings is not None and step == self.settings.start:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=kinds, record_shapes=True, acc_events=True)
            self.profiler.start()
            self.began = time.perf_counter()

    def after(self, step: int) -> None:
        """End and write when `step` was the last of the window."""
        if self.profiler is None or self.settings is None or step < self.settings.start + self.settings.steps - 1:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        self.profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self.profiler.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=60)
        head = f"steps {self.settings.start} to {step}: {seconds:.3f} seconds, the profiler's own work included\n"
        (self.folder / "ops.txt").write_text(head + table)
        self.profiler = None
