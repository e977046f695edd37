"""A provider of a case in a process of its own, with an allocator of its own choice, that takes turns with the others.

Only the one that is asked runs. What a question costs (some 0.1 ms) is counted to the provider.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from hyperllama.memory import keep_freed_blocks

Ask = Callable[[str], Any]


class WorkerError(Exception):
    """What went wrong in a worker, in one line."""


def apart(build: Callable[[], dict[str, Callable[[], Any]]], *, keep: bool) -> Ask:
    """Start a process that calls `build` and answers to the names of what it returns, until the function here is dropped.

    `build` and all answers are pickled; `keep`: the process keeps freed blocks, otherwise malloc is as glibc has it.
    Raises WorkerError, also later, with the error of the other process.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, build, keep, torch.get_num_threads()), daemon=True)
    process.start()
    there.close()

    def answer() -> Any:
        try:
            error, value = here.recv()
        except EOFError:
            process.join()
            raise WorkerError(f"its process ended with code {process.exitcode}") from None
        if error:
            raise WorkerError(error)
        return value

    def ask(name: str) -> Any:
        here.send(name)
        return answer()

    answer()
    return ask


def _serve(connection: Connection, build: Callable[[], dict[str, Callable[[], Any]]], keep: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    if keep:
        keep_freed_blocks()
    answers: dict[str, Callable[[], Any]] = {}
    name = ""
    while True:
        try:
            if answers:
                connection.send((None, answers[name]()))
            else:
                answers = build()
                connection.send((None, None))
        except Exception as error:
            connection.send((f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", None))
        try:
            name = connection.recv()
        except EOFError:  # nobody will ask again
            return
