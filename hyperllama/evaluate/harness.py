"""EleutherAI's lm-eval on our models: an adapter, and the command behind `hyperllama eval --harness`.

Importing this module registers the model type "hyperllama" with lm-eval. Tokens are scored as lm-eval's own `hf` model scores
them: nothing stands before a context that is not empty (`add_bos_token` puts the start token there), and an empty one is the
start token: BOS where the tokenizer has one, else EOS.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.folder import load_folder
from hyperllama.evaluate.generate import generate
from hyperllama.evaluate.score import score_continuations, start_token, window_length
from hyperllama.model import Llama

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise HyperLlamaError(f"--harness needs lm-eval: pip install 'hyperllama[eval]' ({error})") from None

_LONGEST_ANSWER = 256  # tokens, where a task names no limit: lm-eval's own default


@register_model("hyperllama")
class HarnessModel(TemplateLM):
    """A model folder, ours or foreign, as an lm-eval model; `pretrained` is the folder.

    Raises HyperLlamaError like load_folder, and for a window the model can't take.
    """

    def __init__(
        self,
        pretrained: str,
        max_length: int | None = None,
        add_bos_token: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise HyperLlamaError(f"the model hyperllama has no argument {min(unknown)!r}")
        if dtype not in ("float32", "bfloat16"):
            raise HyperLlamaError(f"dtype is {dtype!r}; float32 or bfloat16 was expected")
        self.model: Llama
        self.encoder: Tokenizer
        self.model, self.encoder = load_folder(pretrained, dtype=getattr(torch, dtype), device=device)
        self.max_length = window_length(self.model, max_length)
        self.add_bos_token = add_bos_token
        bos = self.encoder.bos_id
        self.start = start_token(self.encoder) if bos is None else bos

    @property
    def eot_token_id(self) -> int:
        """What ends a document, else what begins one."""
        return self.start if self.encoder.eos_id is None else self.encoder.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in for an empty context."""
        return self.start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with the start token where `add_bos_token` asks for it."""
        before = [self.start] if self.add_bos_token and add_special_tokens is not False else []
        return [*before, *self.encoder.encode(string)]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of the continuation of every (texts, context ids, continuation ids)."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        return score_continuations(self.model, pairs, seq_len=self.max_length)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in lm-eval's disjoint windows."""
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            totals.append(sum(found for found, _ in score_continuations(self.model, pairs, seq_len=self.max_length)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to one of a task's stop texts."""
        answers = []
        for request in requests:
            prompt, settings = request.args
            stop = settings.get("until") or []
            sampled = settings.get("do_sample", False)
            answers.append(
                generate(
                    self.model,
                    self.encoder,
                    prompt,
                    max_tokens=settings.get("max_gen_toks", _LONGEST_ANSWER),
                    temperature=float(settings.get("temperature") or 1.0) if sampled else 0.0,
                    start=self.start,
                    stop=[stop] if isinstance(stop, str) else stop,
                    begin=self.add_bos_token,
                )
            )
        return answers


def find_tasks(tasks: Sequence[str], task_folder: str | Path | None = None) -> TaskManager:
    """lm-eval's manager of these tasks. Raises HyperLlamaError for one that it does not know."""
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder), include_defaults=False)
    if not all(manager.match_tasks([task]) for task in tasks):  # reading all of lm-eval's own tasks takes seconds
        manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise HyperLlamaError(f"lm-eval knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists those it knows")
    return manager


def run_harness(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run lm-eval tasks on a model folder: {"model", "tasks": {task: {measure: value}}, "versions", "shots"}.

    task_folder: more tasks as YAML files; shots: examples before each question (default: the task's); limit: documents of each
    task; options: of HarnessModel. Raises HyperLlamaError for a task that lm-eval does not know, and like HarnessModel.
    """
    manager = find_tasks(tasks, task_folder)
    model = HarnessModel(str(folder), **options)
    found = simple_evaluate(
        model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
    )
    return {
        "model": str(folder),
        "tasks": {
            task: {key.removesuffix(",none"): value for key, value in measures.items() if key != "alias"}
            for task, measures in found["results"].items()
        },
        "versions": found["versions"],
        "shots": found["n-shot"],
    }
