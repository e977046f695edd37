"""Text to tokens, ours against datatrove's, as whole processes of one core: MB of text a second of CPU time.

    python -m bench.tokenizing [--peer PYTHON] [--rounds 5] [--bytes 20000000] [--text FOLDER --tokenizer tokenizer.json]

`--peer` names a Python that has datatrove, tokenizers, orjson and humanize; without it ours is told alone. By default the text is
the built-in sample in six languages (made from templates: repetitive, which favours whoever caches words) and the tokenizer a
byte-level BPE of 8192 tokens trained on it. Both read the same JSONL, shuffle nothing, and end documents in the same token; before
anything is timed, their tokens are compared. Providers take turns; the exit code is 1 when ours is slower than the peer.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers

from hyperllama.data.ds import adopt
from hyperllama.data.sample import LANGUAGES, write_corpus
from hyperllama.data.shards import Shards
from hyperllama.data.text import iter_documents
from hyperllama.data.tokenizer import Tokenizer

from .environment import environment

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


def timed(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a process and its children. Raises RuntimeError with the end of its output."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environ = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - begin


def same_tokens(ours: Path, theirs: Path, tokenizer: Path) -> bool:
    """Whether both streams are the same."""
    adopt(theirs, Tokenizer.load(tokenizer), theirs / "adopted")
    first, second = (Shards.open(folder, verify=False) for folder in (ours, theirs / "adopted"))
    return np.array_equal(first.read(0, first.tokens), second.read(0, second.tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=20_000_000)
    parser.add_argument("--text", type=Path, help="folder of JSONL files")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer.json, which has " + EOS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        text, tokenizer = arguments.text, arguments.tokenizer
        if text is None or tokenizer is None:
            text, tokenizer = prepare(work, arguments.bytes)
        size = sum(document.num_bytes for document in iter_documents(text))
        commands = {
            "hyperllama": [sys.executable, "-m", "hyperllama", "data", "build", str(text), "--tokenizer", str(tokenizer),
                           "--out", str(work / "hyperllama"), "--processes", "1", "--quiet"],
        }  # fmt: skip
        if arguments.peer is not None:
            commands["datatrove"] = [str(arguments.peer), "-c", PEER, str(text), str(tokenizer), str(work / "datatrove"),
                                     str(work / "logs"), EOS]  # fmt: skip
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(arguments.rounds + 1):  # the first is not counted: it warms the page cache and is compared
            for name in sorted(commands, reverse=turn % 2 == 1):
                for folder in (work / name, work / "logs"):
                    shutil.rmtree(folder, ignore_errors=True)
                seconds = timed(commands[name])
                if turn:
                    samples[name].append(seconds)
            if (
                turn == 0
                and arguments.peer is not None
                and not same_tokens(work / "hyperllama", work / "datatrove", tokenizer)
            ):
                raise SystemExit("the tokens differ: this would not compare the same work")
        speed = {name: size / 1e6 / statistics.median(cpu for cpu, _ in rows) for name, rows in samples.items()}
        result = {
            name: {
                "cpu_mb_per_second": speed[name],
                "wall_mb_per_second": size / 1e6 / statistics.median(wall for _, wall in rows),
                "cpu_seconds": [round(cpu, 3) for cpu, _ in rows],
            }
            for name, rows in samples.items()
        }
        print(json.dumps({"text_bytes": size, **result, "environment": environment()}, indent=1))
        if arguments.peer is not None:
            ratio = speed["hyperllama"] / speed["datatrove"]
            print(f"hyperllama / datatrove, MB a CPU second: {ratio:.2f} (target 1.0)")
            raise SystemExit(ratio < 1)


if __name__ == "__main__":
    main()
