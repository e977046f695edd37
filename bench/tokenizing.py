"""Text to tokens, ours against datatrove's, as whole processes of one core: CPU seconds, start-up included.

    python -m bench.tokenizing [--peer PYTHON] [--rounds 5] [--bytes N] [--text FOLDER --tokenizer tokenizer.json] [--out FOLDER]

`--peer` names a Python that has datatrove, tokenizers, orjson and humanize; without it ours is told alone. By default the text is
the built-in sample in six languages (made from templates: repetitive, which favours whoever caches words) and the tokenizer a
byte-level BPE of 8192 tokens trained on it. Both read the same JSONL, shuffle nothing, and end documents in the same token; before
anything is timed, their tokens are compared. The exit code is 1 when ours is slower than the peer.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hyperllama.data.ds import adopt
from hyperllama.data.sample import LANGUAGES, write_corpus
from hyperllama.data.shards import Shards
from hyperllama.data.text import iter_documents
from hyperllama.data.tokenizer import Tokenizer

from .environment import device_slug, environment
from .harness import Case, CpuClock, Target, judgement, missed, run, table, write_results
from .merge import Process

EOS = "<|endoftext|>"
PEER = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
text, tokenizer, out, logs, eos = sys.argv[1:]
steps = [JsonlReader(text), DocumentTokenizer(out, tokenizer, eos_token=eos, shuffle_documents=False)]
LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=logs).run()
"""


def prepare(work: Path, n_bytes: int) -> tuple[Path, Path]:
    """One JSONL of the sample text, and a tokenizer.json."""
    write_corpus(work / "corpus", LANGUAGES, n_bytes // len(LANGUAGES), seed=0, dev_bytes=1000, pairs=1)
    (work / "text").mkdir()
    file = work / "text" / "all.jsonl"
    file.write_bytes(b"".join(path.read_bytes() for path in sorted(work.glob("corpus/text/*/train.jsonl"))))
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, special_tokens=[EOS], show_progress=False)
    texts = (document.text for i, document in enumerate(iter_documents(file)) if i % 20 == 0)
    made.train_from_iterator(texts, trainer)
    made.save(str(work / "tokenizer.json"))
    return work / "text", work / "tokenizer.json"


def same_tokens(ours: Path, theirs: Path, tokenizer: Path) -> str | None:
    """What is wrong with our stream, given datatrove's; None where they are the same."""
    adopt(theirs, Tokenizer.load(tokenizer), theirs / "adopted")
    first, second = (Shards.open(folder, verify=False) for folder in (ours, theirs / "adopted"))
    same = np.array_equal(first.read(0, first.tokens), second.read(0, second.tokens))
    return None if same else "the tokens differ"


def children_seconds() -> float:
    """CPU seconds of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tokenize_case(text: Path, tokenizer: Path, work: Path, peer: Path | None, what: str) -> Case:
    """The text by datatrove, where there is a Python that has it, and by us."""
    out = {who: work / f"out-{who}" for who in ("ours", "datatrove")}
    ours = [sys.executable, "-m", "hyperllama", "data", "build", str(text), "--tokenizer", str(tokenizer)]
    ours += ["--out", str(out["ours"]), "--processes", "1", "--quiet"]
    providers: dict[str, Callable[[], Any]] = {"ours": partial(Process, ours, work, out["ours"])}
    if peer is not None:
        theirs = [str(peer), "-c", PEER, str(text), str(tokenizer), str(out["datatrove"]), str(work / "out-logs"), EOS]
        providers = {"datatrove": partial(Process, theirs, work, out["datatrove"])} | providers
    return Case(
        "tokenize",
        {"text": what, "bytes": sum(document.num_bytes for document in iter_documents(text))},
        flops=0,
        bytes=0,
        providers=providers,
        check=lambda output, expected: same_tokens(output, expected, tokenizer),
        targets=(Target("ours", "datatrove", 1.0),) if peer is not None else (),
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=20_000_000)
    parser.add_argument("--text", type=Path, help="folder of JSONL files")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer.json, which has " + EOS)
    parser.add_argument("--out", type=Path, help="write <out>/<device>/tokenizing.json")
    arguments = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        text, tokenizer, what = arguments.text, arguments.tokenizer, "given"
        if text is None or tokenizer is None:
            (text, tokenizer), what = prepare(work, arguments.bytes), "sample"

        def clear() -> None:
            for folder in work.glob("out-*"):
                shutil.rmtree(folder)

        case = tokenize_case(text, tokenizer, work, arguments.peer, what)
        clock = CpuClock(clear, children_seconds)
        result = run(case, rounds=arguments.rounds, warmup=1, cpu_time=True, min_sample=0, clock=clock)
    print(table([result]), judgement([result]), sep="\n\n")
    for name, found in result["providers"].items():
        if found["seconds"]:
            print(f"{name}: {result['params']['bytes'] / 1e6 / found['seconds']['median']:.1f} MB a CPU second")
    if arguments.out:
        write_results(arguments.out / device_slug(environment("cpu")["device"]) / "tokenizing.json", [result])
    return 1 if missed([result]) else 0


if __name__ == "__main__":
    sys.exit(main())
