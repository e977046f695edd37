"""Text to shards: surveyed, chosen, tokenized by any number of processes, assembled. Ends in the same bytes each time.

    survey      every file is read once: length, digest, language and place of each document       36 bytes a document
        |                                                                                       (survey.py)
    choose      numbers of the documents to take, in the order of the output                        in memory (choose.py)
        |
    tokenize    units of some 32 MB of text, each by one process into a file of its own
        |
    assemble    documents copied from the units' files in the order of the output, hashed

Survey and units are finished files in a work folder beside the output, `.NAME.work`: what stopped goes on after the last of
them. The text is read twice; tokenizing takes some twenty times as long as reading. Units are cut by the survey alone, so no
result depends on the number of processes. Memory is some MB a process, the survey, and the longest document.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import hyperllama
from hyperllama.data import units as units_module
from hyperllama.data.assemble import assemble
from hyperllama.data.choose import choose
from hyperllama.data.recipe import DataRecipe
from hyperllama.data.survey import Input, Survey, load_survey
from hyperllama.data.text import Progress
from hyperllama.data.tokenizer import Tokenizer
from hyperllama.data.units import (
    Job,
    Unit,
    cut_units,
    lengths_path,
    mask_of,
    save_array,
    survey_job_file,
    survey_path,
    tokenize_unit,
)
from hyperllama.errors import HyperLlamaError, Lost
from hyperllama.files import atomic_file, atomic_folder, check_free, write_json
from hyperllama.settings import validated

Stage = Callable[[str], Progress]  # stage(name) begins a stage of the work and returns what its progress is told


def build_shards(
    texts: Iterable[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    language: str | None = None,
    shard_tokens: int = 2**27,
    processes: int = 1,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """Tokenize `texts` (files, folders and globs) into the new shard folder `out` and return its manifest.

    A document's language is its own tag, else `language`, else the name of its folder if known, else "und".
    Arguments and errors as in build.
    """
    source = {"files": [str(text) for text in texts], "language": language}
    values = {"out": str(out), "tokenizer": str(tokenizer.path), "sources": [source], "shard_tokens": shard_tokens}
    return build(validated(DataRecipe, values, "build_shards"), tokenizer, processes=processes, stage=stage)


def build(
    recipe: DataRecipe, tokenizer: Tokenizer, *, processes: int = 1, stage: Stage | None = None
) -> dict[str, Any]:
    """Make the shard folder of a data recipe and return its manifest; goes on with what an earlier call finished.

    processes: with more than one, each loads the tokenizer's file and uses one core; with one, it is used as it is.
    Raises HyperLlamaError when `recipe.out` exists or another process is building it, a text is bad (see iter_documents), a
    list of ids is missing, nothing is left to write, or the tokenizer has no EOS; Lost when a process was killed.
    """
    out = Path(recipe.out)
    check_free(out)
    stage = stage or (lambda name: lambda done, total: None)
    eos, bos = _ends(recipe, tokenizer)
    inputs, commits = _inputs(recipe)
    for path in recipe.id_lists:
        if not path.is_file():
            raise HyperLlamaError(f"the list of ids {path} does not exist")
    read = [*(file.path for file in inputs), *recipe.id_lists]
    plan = json.dumps(
        {
            "recipe": recipe.model_dump(exclude={"out", "tokenizer", "shard_tokens"}),
            "tokenizer": tokenizer.fingerprint,
            "ends": [eos, bos],
            "files": [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in read],
            "unit_bytes": units_module.UNIT_BYTES,
            "code_version": hyperllama.__version__,
        }
    )
    with _work_folder(out, plan) as work:
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        job = Job(inputs, work, recipe.damaged == "skip", dtype, bos, eos)
        with _Workers(processes, tokenizer, job) as workers:
            surveys = _survey(workers, job, stage("survey"))
            order, taken = choose(recipe, inputs, surveys)
            if len(order) == 0:
                raise HyperLlamaError(f"{out}: no document is left: ids, fraction or budget leave all of them out")
            save_array(work / "chosen.npy", mask_of(order, sum(len(survey.records) for survey in surveys)))
            units = cut_units(surveys)
            _tokenize(workers, units, surveys, order, stage("tokenize"))
        with atomic_folder(out) as folder:
            manifest = assemble(folder, recipe, tokenizer, job, units, surveys, order, stage("assemble"))
            manifest |= {"damaged": sum(survey.damaged for survey in surveys), "taken": taken, "commits": commits}
            write_json(folder / "manifest.json", manifest)
        shutil.rmtree(work)
    return manifest


def _ends(recipe: DataRecipe, tokenizer: Tokenizer) -> tuple[int, int | None]:
    """Ids of EOS and, where the recipe wants one, BOS."""
    eos = tokenizer.eos_id
    if recipe.eos_token is not None:
        if recipe.eos_token not in tokenizer.tokens():
            raise HyperLlamaError(f"eos_token: {tokenizer.path} has no token {recipe.eos_token!r}")
        eos = tokenizer.tokens().index(recipe.eos_token)
    if eos is None:
        raise HyperLlamaError(f"tokenizer {tokenizer.path} has no EOS token, which every document in a shard ends with")
    if recipe.bos and tokenizer.bos_id is None:
        raise HyperLlamaError(f"bos: tokenizer {tokenizer.path} has no BOS token")
    return eos, tokenizer.bos_id if recipe.bos else None


def _inputs(recipe: DataRecipe) -> tuple[list[Input], dict[str, str]]:
    """Every file of every source, and the commit of each dataset."""
    inputs: list[Input] = []
    commits = {}
    for number, source in enumerate(recipe.sources):
        commit, files = source.resolve()
        if commit is not None:
            commits[source.label] = commit
        inputs += [Input(path, source.keys, source.language, number) for path in files]
    return inputs, commits


@contextmanager
def _work_folder(out: Path, plan: str) -> Iterator[Path]:
    """The work folder of `out`, for this process alone: what is in it was made for the same plan.

    It stays when the process is killed or interrupted, for the next one; after a mistake of the user it is removed.
    """
    work = out.absolute().with_name(f".{out.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise HyperLlamaError(f"{out} is being built by another process") from None
        saved = work / "plan.json"
        if not (saved.is_file() and saved.read_text(encoding="utf-8") == plan):
            for file in work.iterdir():
                if file.name != "lock":
                    file.unlink()
            with atomic_file(saved) as temporary:
                temporary.write_text(plan, encoding="utf-8")
        try:
            yield work
        except HyperLlamaError:
            shutil.rmtree(work)
            raise


# ---- processes


_worker: tuple[Tokenizer, Job] | None = None  # of a worker process, set once when it starts


def _start_worker(tokenizer: Path, job: Job, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the whole group: workers end without a word
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives a parent that is killed
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Tokenizer.load(tokenizer, threads=1), job


def _survey_task(number: int) -> int:
    assert _worker is not None
    return survey_job_file(_worker[1], number)


def _unit_task(unit: Unit) -> Unit:
    assert _worker is not None
    return tokenize_unit(*_worker, unit)


class _Workers:
    """`processes` of them, or this process alone; gives results as they come."""

    def __init__(self, processes: int, tokenizer: Tokenizer, job: Job) -> None:
        self.processes, self.tokenizer, self.job = processes, tokenizer, job
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def survey(self, files: list[int]) -> Iterator[int]:
        """Survey files; yield their numbers."""
        yield from self._map(_survey_task, lambda number: survey_job_file(self.job, number), files)

    def tokenize(self, units: list[Unit]) -> Iterator[Unit]:
        """Tokenize units; yield them."""
        yield from self._map(_unit_task, lambda unit: tokenize_unit(self.tokenizer, self.job, unit), units)

    def _map(self, task: Callable[[Any], Any], here: Callable[[Any], Any], arguments: list[Any]) -> Iterator[Any]:
        if self.processes == 1 or len(arguments) < 2:
            yield from map(here, arguments)
            return
        if self.pool is None:
            start = (self.tokenizer.path, self.job, os.getpid())
            self.pool = ProcessPoolExecutor(self.processes, get_context("spawn"), _start_worker, start)
        try:
            for future in as_completed([self.pool.submit(task, argument) for argument in arguments]):
                yield future.result()
        except BrokenProcessPool:
            raise Lost(
                "a process of the build was killed, perhaps for want of memory: the same command goes on"
            ) from None


# ---- survey


def _survey(workers: _Workers, job: Job, progress: Progress) -> list[Survey]:
    sizes = [file.path.stat().st_size for file in job.files]
    missing = [i for i in range(len(job.files)) if not survey_path(job, i).is_file()]
    done = sum(sizes) - sum(sizes[i] for i in missing)
    progress(done, sum(sizes))
    for number in workers.survey(missing):
        done += sizes[number]
        progress(done, sum(sizes))
    return [load_survey(survey_path(job, i)) for i in range(len(job.files))]


# ---- tokenize


def _tokenize(
    workers: _Workers, units: list[Unit], surveys: Sequence[Survey], order: np.ndarray, progress: Progress
) -> None:
    chosen = mask_of(order, sum(len(survey.records) for survey in surveys))

    def text(unit: Unit) -> int:
        here = chosen[unit.offset + unit.first : unit.offset + unit.last]
        return int(surveys[unit.file].sizes[unit.first : unit.last][here].sum(dtype=np.int64))

    todo = [unit for unit in units if not lengths_path(workers.job, unit).is_file()]
    total = sum(map(text, units))
    done = total - sum(map(text, todo))
    progress(done, total)
    for unit in workers.tokenize(todo):
        done += text(unit)
        progress(done, total)
