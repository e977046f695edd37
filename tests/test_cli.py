"""Every command as a user types it: what it prints, what it writes, and how it refuses."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hyperllama import __version__, cli
from hyperllama.data.tokenizer import train_tokenizer
from hyperllama.terminal import Bar
from tests.study import SEQ_LEN, settings


class Outcome:
    """What a command left behind: exit code, standard output, standard error."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["hyperllama", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(ended.value.code, printed.out, printed.err)

    return call


@pytest.fixture
def refuse(run, tmp_path):
    """Run a command that must be refused: one sentence with `parts`, exit code 2, no file written."""

    def call(*arguments: object, parts: list[str]) -> None:
        before = files(tmp_path)
        outcome = run(*arguments)
        assert outcome.code == 2, outcome.err
        lines = [line for line in outcome.err.splitlines() if line.startswith("hyperllama: ")]
        assert len(lines) == 1 and "Traceback" not in outcome.err
        for part in parts:
            assert part in lines[0]
        assert files(tmp_path) == before

    return call


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(study, tmp_path_factory):
    """A trained model folder, by the command."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings(study, out)))
    command = [sys.executable, "-m", "hyperllama", "train", str(recipe), "--quiet", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ledger"]["spent"] > 0
    return out / "model"


@pytest.fixture
def recipe(study, tmp_path):
    def write(**changes: object) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(settings(study, tmp_path / "run", **changes)))
        return file

    return write


def damaged(folder: Path, to: Path, name: str, *, cut: int = 0) -> Path:
    """A copy of a folder in which one file is shorter by `cut` bytes, or has one bit flipped in the middle."""
    shutil.copytree(folder, to)
    file = next(to.rglob(name))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0 if cut else 1
    file.write_bytes(content[: len(content) - cut])
    return to


# What the commands do


def test_help_names_the_verbs_and_version_is_the_packages(run):
    text = run("--help").out
    for verb in (
        "train",
        "grow",
        "symmetry",
        "merge",
        "eval",
        "flops",
        "generate",
        "experiment",
        "runs",
        "data",
        "tokenizer",
    ):
        assert verb in text
        assert run(verb, "--help").code == 0
    assert run("--version").out.strip() == __version__


@pytest.mark.parametrize("first", ["json", "torch"])
def test_the_end_takes_apart_what_torch_brought_and_nothing_else(first):
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count() > 1000))\n"
        f"import {first}; sys.argv = ['hyperllama', 'merge', '--help']; from hyperllama.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(first != "torch") and not done.stderr


def test_a_dry_run_prints_exact_integers_and_writes_nothing(run, recipe, tmp_path):
    file = recipe()
    before = files(tmp_path)
    plan = run("train", file, "--dry-run", "--json", "global_batch=10").json
    assert plan["steps"] == 5 and plan["tokens"] == 50 * SEQ_LEN
    assert plan["budget_flops"] == 50 * plan["flops_per_window_dense"] == plan["total_flops"]
    assert {"memory_bytes", "reads", "writes", "parameters"} <= set(plan)
    assert f"{plan['budget_flops']:,}" in run("train", file, "--dry-run").out
    assert files(tmp_path) == before


def test_tokenizer_and_shards_from_txt_jsonl_and_gz(run, tmp_path):
    sentence = "the quick brown fox jumps over the lazy dog and runs away from here "
    words = [sentence * 3 + str(i) for i in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(words))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "swift", "lang": "swe"}) + "\n")
    texts = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]
    tokenizer, out = tmp_path / "t.model", tmp_path / "shards"
    assert run("tokenizer", "train", *texts, "--out", tokenizer, "--vocab", 300, "--dry-run").code == 0
    assert not tokenizer.exists()
    assert "300 tokens" in run("tokenizer", "train", *texts, "--out", tokenizer, "--vocab", 300).out
    build = ("data", "build", *texts, "--tokenizer", tokenizer, "--out", out, "--language", "eng", "--json")
    assert run(*build, "--dry-run").json["writes"] == str(out) and not out.exists()
    built = run(*build).json
    assert set(built["languages"]) == {"eng", "swe"}
    seen = run("data", "inspect", out, "--tokenizer", tokenizer, "--json").json
    assert seen["tokens"] == built["tokens"] and seen["documents"] == built["documents"]


def test_flops_of_a_folder_and_of_the_recipe_that_made_it(run, model, recipe):
    of_folder = run("flops", model, "--seq-len", SEQ_LEN, "--with", "grow:2", "--json").json
    of_recipe = run("flops", recipe(), "--seq-len", SEQ_LEN, "--with", "grow:2", "--json").json
    assert of_folder == of_recipe
    assert {"parameters", "dense_flops_per_window", "causal_flops_per_window", "shared_quantum"} <= set(of_folder)
    assert of_folder["shared_quantum"]["flops"] % of_folder["grown"]["dense_flops_per_window"] == 0


def test_growth_methods_and_symmetry(run, refuse, model, tmp_path):
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    deep = run("grow", model, tmp_path / "deep", "--method", "lemon,identity", "--ffn-factor", 3, "--json").json
    assert deep["model"]["num_layers"] == 2 * layers
    assert [step["method"] for step in deep["growth"]] == ["lemon", "identity"]
    assert deep["verified"]["preserved"] and deep["verified"]["claimed"]
    quantum = deep["shared_quantum"]
    assert quantum["windows_grown"] * deep["dense_flops_per_window"]["after"] == quantum["flops"]
    said = run("grow", model, tmp_path / "stack", "--method", "stack").out
    assert "NOT preserved: stack does not keep it; checked: all weights are finite" in said
    assert run("grow", model, tmp_path / "third", "--factor", 3, "--dyadic", "--json").json["verified"]["preserved"]

    rows = run("symmetry", tmp_path / "third", "--factor", 3, "--json").json
    assert rows[-1]["name"] == "all" and rows[0]["column_asymmetry"] == 0
    assert "column" in run("symmetry", tmp_path / "third").out
    refuse("symmetry", model, parts=["give --factor"])
    refuse("grow", model, tmp_path / "new", "--method", "stak", parts=["did you mean 'stack'"])
    refuse(
        "grow", model, tmp_path / "new", "--method", "stack", "--noise-db", 10, parts=["--noise-db is for hyperclone"]
    )
    refuse("grow", model, tmp_path / "new", "--method", "vocabulary", parts=["--tokenizer"])


def test_grow_merge_eval_generate_and_runs(run, model, study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "base")
    assert run("grow", "base", "big", "--dry-run", "--json").json["writes"] == "big" and not Path("big").exists()
    said = run("grow", "base", "big", "--noise-db", 10, "--seed", 3, "--logits").out
    assert "function preserved" in said and "largest logit difference on" in said
    assert run("grow", "base", "plain", "--json").json["verified"]["preserved"]

    merge = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in ("big", "plain")]}
    Path("merge.yaml").write_text(yaml.safe_dump(merge | {"dtype": "float32"}))
    assert "writes" in run("merge", "merge.yaml", "merged", "--dry-run", "--json").json
    assert not Path("merged").exists()
    merged = run("merge", "merge.yaml", "merged", "--json").json
    spent = json.loads((model / "hyperllama.json").read_text())["ledger"]
    assert merged["ledger"]["ancestors"] == {spent["run"]: spent["spent"]}

    dev = study / "corpus" / "text"
    texts = [dev / "eng" / "dev.jsonl", dev / "swe" / "dev.jsonl"]
    pairs = study / "corpus" / "minimal_pairs" / "eng.jsonl"
    figures = {}
    for name in ("base", "big", "merged"):
        AutoModelForCausalLM.from_pretrained(name)
        result = run("eval", name, "--text", *texts, "--pairs", pairs, "--json").json
        assert set(result["texts"]) == set(map(str, texts))
        for figure in result["texts"].values():
            assert {"documents", "bytes", "tokens", "nll_nats", "bits_per_byte", "perplexity"} <= set(figure)
        assert {"pairs", "accuracy", "by_phenomenon"} <= set(result["pairs"][str(pairs)])
        figures[name] = result["texts"][str(texts[0])]["bits_per_byte"]
    assert figures["big"] == pytest.approx(figures["base"], rel=1e-5)
    assert figures["merged"] == pytest.approx(figures["base"], rel=1e-3)

    drawn = ("generate", "base", "--prompt", "The", "--max-tokens", 5, "--temperature", 1.0, "--seed", 4)
    assert run(*drawn).out == run(*drawn).out != ""
    (row,) = run("runs", model.parent, "--json").json
    assert row["spent_flops"] == spent["spent"] and row["tokens"] == 50 * SEQ_LEN
    assert run("runs", model.parent).code == 0


# How they refuse


def test_an_unknown_command_or_option_is_a_usage_error(run):
    for arguments in (["grwo"], ["grow", "--factr", "2"], ["merge"]):
        outcome = run(*arguments)
        assert outcome.code == 2 and "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "none"], ["flops", "none", "--seq-len", "8"], ["grow", "none", "out"], ["merge", "none", "out"],
        ["eval", "none", "--text", "none"], ["generate", "none", "--prompt", "a"], ["experiment", "none"], ["runs", "none"],
        ["data", "inspect", "none"], ["data", "build", "none", "--tokenizer", "none", "--out", "out"],
        ["tokenizer", "train", "none", "--out", "out", "--vocab", "300"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)  # fmt: skip
def test_a_missing_file_is_named(refuse, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    refuse(*arguments, parts=["none"])


@pytest.mark.parametrize(("content", "sentence"), [(b"", "empty"), (b"good\n\xff\xfe bad", "UTF-8")])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_and_undecodable_text_is_refused(refuse, study, model, tmp_path, name, content, sentence):
    text = tmp_path / name
    text.write_bytes(content)
    tokenizer = study / "tokenizer.model"
    refuse("data", "build", text, "--tokenizer", tokenizer, "--out", tmp_path / "out", parts=[name])
    refuse("tokenizer", "train", text, "--out", tmp_path / "t.model", "--vocab", 300, parts=[name])
    refuse("eval", model, "--text", text, parts=[name])


def test_an_unknown_key_is_named_with_the_nearest(refuse, recipe):
    refuse("train", recipe(), "optimizer.lr_=1", parts=["recipe.yaml", "unknown key optimizer.lr_", "'lr'"])
    refuse("train", recipe(), "--dry-run", "optimiser.lr=1", parts=["unknown key optimiser", "'optimizer'"])


def test_a_budget_that_is_not_whole_windows_names_the_nearest(refuse, run, recipe):
    cost = run("train", recipe(), "--dry-run", "--json").json["flops_per_window_dense"]
    budget = {"flops": 3 * cost + 1}
    refuse("train", recipe(budget=budget), parts=[str(3 * cost), str(4 * cost)])
    refuse("train", recipe(budget=budget), "--dry-run", parts=[str(3 * cost), str(4 * cost)])


@pytest.mark.parametrize("cut", [0, 7], ids=["bit-flipped", "truncated"])
def test_a_damaged_shard_is_refused(refuse, study, recipe, tmp_path, cut):
    folder = damaged(study / "shards" / "eng", tmp_path / "eng", "*.bin", cut=cut)
    refuse("data", "inspect", folder, parts=[str(folder)])
    refuse("train", recipe(data={"sources": [{"path": str(folder)}], "seq_len": SEQ_LEN}), parts=[str(folder)])


def test_a_truncated_model_is_refused_by_every_reader(refuse, study, model, recipe, tmp_path):
    folder = damaged(model, tmp_path / "cut", "model.safetensors", cut=100)
    merge = tmp_path / "merge.yaml"
    merge.write_text(
        yaml.safe_dump({"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1}}]})
    )
    broken = "cut/model.safetensors"
    refuse("grow", folder, tmp_path / "out", parts=[broken])
    refuse("merge", merge, tmp_path / "out", parts=[broken])
    refuse("eval", folder, "--text", study / "corpus" / "text" / "eng" / "dev.jsonl", parts=[broken])
    file = recipe(init_from=str(folder))
    file.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "model"}))
    refuse("train", file, parts=[broken])


def test_a_tokenizer_that_is_not_the_shards_or_the_models_is_refused(refuse, study, model, recipe, tmp_path):
    other = tmp_path / "other.model"
    train_tokenizer([study / "corpus" / "text" / "swe" / "train.jsonl"], other, 600, seed=1)
    refuse("train", recipe(tokenizer=str(other)), parts=["shards/eng", "other.model"])
    folder = shutil.copytree(model, tmp_path / "model")
    shutil.copy(other, folder / "tokenizer.model")
    refuse("eval", folder, "--text", study / "corpus" / "text" / "eng" / "dev.jsonl", parts=["600 tokens", "512"])


def test_a_vocabulary_larger_than_the_model_is_refused(refuse, study, recipe):
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 384}
    refuse("train", recipe(model=shape), parts=["vocab_size is 384", "512 tokens"])


def test_models_of_different_shapes_are_not_merged(refuse, run, model, tmp_path):
    assert run("grow", model, tmp_path / "big").code == 0
    models = [{"model": str(path), "parameters": {"weight": 1}} for path in (model, tmp_path / "big")]
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    refuse("merge", tmp_path / "merge.yaml", tmp_path / "out", parts=[str(model), "big"])


def test_output_that_exists_is_kept(refuse, model, study, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    refuse("grow", model, out, parts=["out already exists"])
    tokenizer, text = study / "tokenizer.model", study / "corpus" / "text" / "eng" / "dev.jsonl"
    refuse("data", "build", text, "--tokenizer", tokenizer, "--out", out, parts=["out already exists"])


def test_weights_with_nan_are_not_merged(refuse, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    models = [{"model": str(folder), "parameters": {"weight": 1}}]
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    refuse("merge", tmp_path / "merge.yaml", tmp_path / "out", parts=["model.norm.weight"])


def test_ctrl_c_in_the_middle_of_building_leaves_nothing_but_what_goes_on(run, study, tmp_path):
    text = tmp_path / "long.jsonl"
    line = (study / "corpus" / "text" / "eng" / "train.jsonl").read_text()
    text.write_text(line * 400)
    command = [
        "data",
        "build",
        str(text),
        "--tokenizer",
        str(study / "tokenizer.model"),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "hyperllama", *command], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.work/plan.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.work", "long.jsonl"]
    text.write_text(line)  # another text: what was done for the old one is not used
    assert run(*command, "--processes", 1).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.jsonl", "out"]


def test_a_data_recipe_with_overrides_builds_what_inspect_and_mixture_show(run, refuse, study, tmp_path):
    text = study / "corpus" / "text" / "swe" / "train.jsonl"
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text.read_text() + "{\n")
    recipe = {"out": "never", "tokenizer": str(study / "tokenizer.model"), "sources": [{"files": str(bad)}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    build = ("data", "build", tmp_path / "r.yaml", f"out={tmp_path / 'swe'}")
    refuse(*build, parts=["bad.jsonl line", "is not JSON"])
    assert run(*build, "damaged=skip", "--dry-run").code == 0 and not (tmp_path / "swe").exists()
    built = run(*build, "damaged=skip", "sources.0.documents=20", "--json").json
    assert (built["documents"], built["damaged"]) == (20, 1)
    shown = run("data", "inspect", tmp_path / "swe", "--json").json
    assert shown["bad_documents"] == 0 and "bad.jsonl line" in shown["damages"][0]
    of_text = run("data", "inspect", bad, "--json").json
    assert of_text["damaged"] == 1 and of_text["languages"]["swe"]["documents"] == len(text.read_text().splitlines())
    rows = run(
        "data", "mixture", tmp_path / "swe", study / "shards" / "eng", "--by", "unimax", "--budget", 1000, "--json"
    )
    assert [row["taken_tokens"] for row in rows.json] == [500, 500]
    assert "swe" in run("data", "mixture", tmp_path / "swe").out
    refuse("data", "mixture", tmp_path / "swe", "--by", "unimax", parts=["needs a budget"])
    refuse("data", "build", text, parts=["--out"])
    refuse("data", "build", tmp_path / "r.yaml", "source=1", parts=["unknown key source", "sources"])


def test_several_models_are_compared_on_text_pairs_and_facts(run, refuse, study, model, tmp_path):
    other = tmp_path / "grown"
    assert run("grow", model, other).code == 0
    corpus = study / "corpus"
    texts = [corpus / "text" / language / "dev.jsonl" for language in ("eng", "swe")]
    pairs = corpus / "minimal_pairs" / "eng.jsonl"
    for kind, rows in {
        "patterns": [{"pattern": "[X] is [Y]"}, {"pattern": "[Y] of [X]"}],
        "tuples": [{"sub_label": "a", "obj_label": "b"}, {"sub_label": "c", "obj_label": "d"}],
    }.items():
        (tmp_path / "facts" / kind / "eng").mkdir(parents=True)
        (tmp_path / "facts" / kind / "eng" / "P1.jsonl").write_text("\n".join(map(json.dumps, rows)))
    measures = ("--text", *texts, "--pairs", pairs, "--facts", tmp_path / "facts")
    csv = tmp_path / "out.csv"
    result = run("eval", model, other, *measures, "--csv", csv, "--quiet", "--json").json
    assert [entry["model"] for entry in result["models"]] == [str(model), str(other)]
    assert len(result["text"]) == 4 and len(result["tests"]) == 1
    assert max(abs(row["change"]) for row in result["text"]) < 1e-4  # a clone without noise is the same function
    assert len(csv.read_text().splitlines()) == 5 and (tmp_path / "out-pairs.csv").exists()
    assert result["models"][0]["facts"][str(tmp_path / "facts")]["languages"]["eng"]["facts"] == 2
    printed = run("eval", model, other, *measures, "--by", "length", "--quiet")
    assert printed.code == 0 and "bits per byte" in printed.out and "accuracy" in printed.out
    refuse("eval", model, model, "--text", texts[0], parts=["is named twice"])
    refuse("eval", model, "--pairs", pairs, "--by", "letter", parts=["by sentence, word, length", "not by 'letter'"])
    refuse("eval", model, "--facts", tmp_path / "facts", "--csv", csv, parts=["--csv is for"])


def test_runs_draws_what_it_compares(refuse, run, model, tmp_path):
    assert run("runs", model.parent, "--plot", tmp_path / "losses.svg").code == 0
    drawn = (tmp_path / "losses.svg").read_text()
    assert drawn.startswith("<?xml") and "tiny" in drawn
    refuse("runs", model.parent, "--plot", tmp_path / "losses.doc", parts=["losses.doc", ".png"])


def test_export_writes_the_newest_or_a_named_checkpoint(refuse, run, recipe, tmp_path):
    out, exported = tmp_path / "run", tmp_path / "exported"
    refuse("export", out, exported, parts=["neither a checkpoint nor a run"])
    assert run("train", recipe(checkpoint={"every_steps": 2}), "--quiet").code == 0
    planned = run("export", out, exported, "--dry-run", "--json").json
    assert (planned["step"], planned["writes"], exported.exists()) == (6, str(exported), False)
    assert run("export", out / "checkpoints" / "step-00000004", exported, "--json").json["step"] == 4
    card = json.loads((exported / "hyperllama.json").read_text())
    assert card["ledger"]["spent"] * 6 == planned["spent_flops"] * 4
    AutoModelForCausalLM.from_pretrained(exported)
    refuse("export", out, exported, parts=["already exists"])


def test_a_run_does_not_go_on_with_other_data(refuse, run, study, recipe, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(study / "shards" / "eng", shards)
    file = recipe(data={"sources": [{"path": str(shards)}], "seq_len": SEQ_LEN}, checkpoint={"every_steps": 2})
    assert run("train", file, "--quiet").code == 0
    shutil.rmtree(shards)
    shutil.copytree(study / "shards" / "swe", shards)
    for arguments in (["--quiet"], ["--dry-run"]):
        refuse("train", file, *arguments, parts=["run.json", "other data"])
    (tmp_path / "run" / "run.json").unlink()
    refuse("train", file, "--quiet", parts=["step-00000006", "other data"])
    exported = tmp_path / "exported"
    refuse("export", tmp_path / "run", exported, parts=["shards is not what the run read", "--no-counts"])
    assert run("export", tmp_path / "run", exported, "--no-counts", "--json").json["step"] == 6
    assert not (exported / "token_counts.safetensors").exists()


def test_a_dry_run_refuses_what_the_run_would(refuse, run, study, model, recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    merge = tmp_path / "merge.yaml"
    merge.write_text(
        yaml.safe_dump({"merge_method": "linear", "models": [{"model": str(model), "parameters": {"weight": 1}}]})
    )
    refuse("merge", merge, out, "--dry-run", parts=["out already exists"])
    refuse("grow", model, out, "--dry-run", parts=["out already exists"])
    refuse("grow", model, tmp_path / "new", "--noise-db", "nan", "--dry-run", parts=["nan dB"])
    refuse("grow", model, tmp_path / "new", "--noise-db", "nan", "--factor", 3, parts=["nan dB"])
    refuse("data", "sample", "--out", out, "--dry-run", parts=["out already exists"])
    refuse("train", recipe(), "--dry-run", "device=cuda", parts=["no CUDA device"])
    refuse("train", recipe(), "--dry-run", "attention=flash_attn", parts=["attention"])
    assert run("train", recipe(), "--quiet").code == 0
    refuse("train", recipe(seed=8), "--dry-run", parts=["another seed"])


def test_odd_values_are_sentences_too(refuse, run, model, tmp_path):
    refuse("flops", model, "--seq-len", 0, parts=["--seq-len is 0"])
    refuse("generate", model, "--prompt", "a", "--temperature", "nan", parts=["temperature is nan"])
    refuse("generate", model, "--prompt", "\udcff", parts=["prompt is not UTF-8"])
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"good": "\\ud800 a", "bad": "b", "phenomenon": "p"}\n')
    refuse("eval", model, "--pairs", pairs, parts=["pairs.jsonl line 1", "surrogate"])
    (tmp_path / "run.json").write_text('{"name": "x"}')
    refuse("runs", tmp_path, parts=["run.json", "not the record"])


def test_a_folder_named_like_a_tokenizer_keeps_its_own(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "llama.model")
    assert run("grow", tmp_path / "llama.model", tmp_path / "big").code == 0
    assert (tmp_path / "big" / "tokenizer.model").is_file()


def test_the_working_folder_can_be_the_output(run, study, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text, tokenizer = study / "corpus" / "text" / "eng" / "dev.jsonl", study / "tokenizer.model"
    assert run("data", "build", text, "--tokenizer", tokenizer, "--out", ".").code == 0
    assert (tmp_path / "here" / "manifest.json").is_file()


def test_a_bar_stays_one_line():
    with Bar("work") as progress:
        for done in range(3):
            progress(done, 3)
        assert len(progress.bar.tasks) == 1
