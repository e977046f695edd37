"""lm-eval on our model and on its own `hf` model of the same folder: the same numbers. Local tasks, no network."""

import json
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import yaml

from hyperllama.data.tokenizer import Tokenizer
from hyperllama.errors import HyperLlamaError
from hyperllama.evaluate.score import score_continuations
from hyperllama.hub import folded, hf_config, write_folder
from tests.evaluate.conftest import TEXT, sentence
from tests.reference import random_model

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is NOT installed, its adapter was NOT tested: pip install 'hyperllama[eval]'"
)


WINDOW = 64  # tokens, here characters: longer than a choice, shorter than the texts of the task `whole`


@pytest.fixture
def folder(tmp_path: Path, config) -> Path:
    """A random model with a tokenizer.json, which transformers reads the same way; it has EOS and no BOS."""
    words = sorted({character for character in TEXT})
    merges = [("t", "h"), ("th", "e"), ("o", "l"), ("b", "o")]
    vocabulary = {token: i for i, token in enumerate([*words, *map("".join, merges), "<|endoftext|>", "?"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="?"))
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "t").mkdir()
    made.save(str(tmp_path / "t" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path / "t")
    changes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": WINDOW}
    model = random_model(config.model_copy(update=changes), torch.float32)
    tensors = folded(model.config, model.arena.logical("weights").items(), torch.float32)
    write_folder(tmp_path / "m", hf_config(model.config, torch.float32), tensors, {}, tokenizer_from=tokenizer.path)
    return tmp_path / "m"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A task of choices, one of whole texts, one of answers written out, of local files."""
    rows = [
        {
            "question": sentence(i, 2 + i % 4),
            "choices": [" " + sentence(i + 50, 1), " " + sentence(i + 60, 2)],
            "gold": i % 2,
        }
        for i in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    for name, settings in {
        "choices": {
            "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "whole": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}{{choices[1]}} "
            "{{question}}{{question}}", "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "written": {
            "output_type": "generate_until", "doc_to_target": "{{choices[0]}}", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 5, "do_sample": False},
        },
    }.items():  # fmt: skip
        (tmp_path / "tasks").mkdir(exist_ok=True)
        text = yaml.safe_dump({"task": f"local_{name}", **common, **settings})
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    return tmp_path / "tasks"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


def test_every_request_and_measure_agrees_with_lm_evals_own_model(folder, tasks, offline):
    pytest.importorskip(
        "accelerate", reason="accelerate is NOT installed, lm-eval's own model was NOT compared with ours"
    )
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from hyperllama.evaluate.harness import HarnessModel

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = HFLM(str(folder), device="cpu", batch_size=4, dtype="float32")
    found = [
        lm_eval.simple_evaluate(
            model,
            tasks=["local_choices", "local_whole", "local_written"],
            task_manager=manager,
            num_fewshot=0,
            bootstrap_iters=0,
        )
        for model in (HarnessModel(str(folder), device="cpu"), theirs)
    ]
    for ours, other in zip(*(sorted(result["samples"].items()) for result in found), strict=True):
        for a, b in zip(ours[1], other[1], strict=True):
            assert _numbers(a["filtered_resps"]) == pytest.approx(_numbers(b["filtered_resps"]), abs=1e-4)
    for task, measures in found[1]["results"].items():
        for key, value in measures.items():
            if isinstance(value, float):
                assert found[0]["results"][task][key] == pytest.approx(value, abs=1e-4)
    answers = [[sample["resps"][0][0] for sample in result["samples"]["local_written"]] for result in found]
    assert answers[0] == answers[1] and any(answers[0])


def _numbers(value) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_the_command_prints_the_tasks_figures(folder, tasks, offline, monkeypatch, capsys):
    from hyperllama import cli

    arguments = [
        "eval",
        str(folder),
        "--harness",
        "local_choices",
        "--task-folder",
        str(tasks),
        "--limit",
        "5",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["hyperllama", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    result = json.loads(printed[printed.index("{") :])
    assert 0 <= result["harness"]["local_choices"]["acc"] <= 1
    monkeypatch.setattr(sys, "argv", ["hyperllama", "eval", str(folder), "--harness", "no_such_task"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "knows no task no_such_task" in capsys.readouterr().err


def test_a_context_longer_than_the_window_is_cut_on_the_left(folder):
    from hyperllama.evaluate.harness import HarnessModel

    model = HarnessModel(str(folder), device="cpu")
    ids = model.tok_encode(TEXT)
    continuation = ids[100:105]
    long, short = ([(ids[k:100], continuation)] for k in (0, 100 - (WINDOW + 1 - 5)))
    assert score_continuations(model.model, long, seq_len=WINDOW) == score_continuations(
        model.model, short, seq_len=WINDOW
    )
    with pytest.raises(HyperLlamaError, match="a continuation of 65 tokens does not fit a window of 64"):
        score_continuations(model.model, [([1], ids[:65])], seq_len=WINDOW)
    with pytest.raises(HyperLlamaError, match="without context"):
        score_continuations(model.model, [([], [1])], seq_len=WINDOW)
    with pytest.raises(HyperLlamaError, match="no argument 'typo'"):
        HarnessModel(str(folder), typo=1)
