"""The command line. Heavy imports happen inside the commands, so that --help and mistakes answer at once."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # numpy's products are not used: no threads that spin, waiting for one
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for them takes a tenth of the start

import typer

from hyperllama import __version__
from hyperllama.bench.cli import app as bench_app
from hyperllama.errors import Diverged, HyperLlamaError, Lost, Stopped, nearest
from hyperllama.files import check_free

app = typer.Typer(
    name="hyperllama",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, grow, merge, evaluate and count Llama models.",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer.")
data_app = typer.Typer(no_args_is_help=True, help="Turn text into token shards, look into them, write sample text.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Sync = Annotated[
    bool, typer.Option("--sync", help="Have the disk hold the result before it appears: it then survives a power cut.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings that replace the recipe's.")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("train")
def train_command(
    recipe: Path, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Run or resume the training run of a YAML recipe; torchrun starts it on several processes."""
    from hyperllama.config import load_run

    config = load_run(recipe, overrides)
    if dry_run:
        from hyperllama.train.distributed import pick_device
        from hyperllama.train.loop import check_folder
        from hyperllama.train.plan import make_plan

        pick_device(config.device)
        plan = make_plan(config)
        check_folder(plan)
        _print(plan.describe(), as_json)
        return
    from hyperllama.train.loop import train

    record = train(config, quiet=quiet)
    if os.environ.get("RANK", "0") == "0":
        _print(record if as_json else {key: record[key] for key in ("name", "ledger", "loss", "seconds")}, as_json)


@tokenizer_app.command("train")
def tokenizer_train(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="txt, jsonl, jsonl.gz, or folders of them.")],
    out: Annotated[Path, typer.Option(help="File to write, for example tokenizer.model.")],
    vocab: Annotated[int, typer.Option(help="Tokens, the 256 bytes and control tokens included.")],
    seed: Annotated[int, typer.Option(help="Seed of the sampling of large files.")] = 0,
    dry_run: DryRun = False,
) -> None:
    """Train a sentencepiece tokenizer with byte fallback; every file weighs the same."""
    from hyperllama.data.tokenizer import train_tokenizer

    if dry_run:
        _print({"reads": [str(path) for path in _existing(texts)], "writes": str(out), "vocab_size": vocab}, False)
        return
    with _bar("tokenizer") as progress:
        tokenizer = train_tokenizer(texts, out, vocab, seed=seed, progress=progress)
    print(f"{out}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.fingerprint[:16]}")


@data_app.command("build")
def data_build(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.yaml [a.b=c]... | TEXT...",
            help="A data recipe and settings that replace its own; or txt, jsonl (.gz, .zst), parquet, folders, globs.",
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.model, tokenizer.json, or a folder with one; default: the recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: the recipe's.")] = None,
    language: Annotated[str | None, typer.Option(help="TEXT: tag of documents that have none.")] = None,
    processes: Annotated[int | None, typer.Option(help="Default: one a core. Does not change the result.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokenize text into shards with a document index, checksums and token counts by language.

    What was interrupted or killed goes on with the same command.
    """
    from hyperllama.data.build import build
    from hyperllama.data.recipe import data_recipe
    from hyperllama.data.tokenizer import Tokenizer

    if processes is not None and processes < 1:
        raise HyperLlamaError(f"--processes is {processes}; at least 1 was expected")
    recipe = data_recipe(texts, tokenizer=tokenizer, out=out, language=language)
    if processes is not None:  # threads too, where one process does it all
        os.environ.setdefault("RAYON_NUM_THREADS", str(processes))
    loaded = Tokenizer.load(recipe.tokenizer, threads=processes)
    if dry_run:
        check_free(recipe.out)
        reads = [str(path) for source in recipe.sources for path in source.resolve()[1]]
        lists = [path for source in recipe.sources for path in (source.keep_ids, source.drop_ids) if path]
        _existing([Path(path) for path in lists])
        plan = {"reads": [*reads, *lists, recipe.tokenizer], "writes": recipe.out, "vocab_size": loaded.vocab_size}
        _print(plan, as_json)
        return
    with _bar("build", disable=quiet) as progress:
        cores = processes or len(os.sched_getaffinity(0))
        manifest = build(recipe, loaded, processes=cores, stage=progress.stage)
    shown = ("tokens", "documents", "bytes", "characters", "damaged", "languages", "taken", "dtype", "policy")
    _print({key: manifest[key] for key in shown}, as_json)


@data_app.command("inspect")
def data_inspect(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FOLDER | TEXT...", help="A shard folder; or files of text, folders, globs.")
    ],
    tokenizer: Annotated[Path | None, typer.Option(help="FOLDER: show sample texts with this tokenizer.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Verify a shard folder, or read text, and show counts by language, document lengths, samples and damaged records."""
    from hyperllama.data.shards import inspect
    from hyperllama.data.text import inspect_text
    from hyperllama.data.tokenizer import Tokenizer

    folder = paths[0]
    with _bar("inspect", disable=quiet) as progress:
        if len(paths) > 1 or folder.is_file() or (folder.is_dir() and not (folder / "manifest.json").exists()):
            report = inspect_text(paths, progress=progress)
        else:
            report = inspect(folder, Tokenizer.load(tokenizer) if tokenizer else None, progress=progress)
    _print(report, as_json)
    for name, state in report.get("files", {}).items():
        if state != "ok":
            raise HyperLlamaError(f"{folder / name} {state}: copy the shard folder again, or build it again")


@data_app.command("adopt")
def data_adopt(
    folder: Annotated[Path, typer.Argument(help="Folder of datatrove's .ds files with their .ds.index.")],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer that they were made with.")],
    out: Annotated[Path, typer.Option(help="Folder to write: an index, checksums, and links to the .ds files.")],
    language: Annotated[str, typer.Option(help="Tag of its documents.")] = "und",
    eos_token: Annotated[
        str | None, typer.Option(help="The token that ends documents; default: the tokenizer's EOS.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Use the token files of nanotron and datatrove where they lie: verify them and write a shard folder of links."""
    from hyperllama.data.ds import adopt
    from hyperllama.data.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    if dry_run:
        check_free(out)
        _print({"reads": [str(path) for path in sorted(folder.glob("*.ds"))], "writes": str(out)}, as_json)
        return
    with _bar("adopt", disable=quiet) as progress:
        manifest = adopt(folder, loaded, out, language=language, eos_token=eos_token, progress=progress)
    _print({key: manifest[key] for key in ("tokens", "documents", "languages", "dtype", "shard_lengths")}, as_json)


@data_app.command("mixture")
def data_mixture(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Shard folders.")],
    by: Annotated[str, typer.Option(help="size, temperature (size ** --exponent) or unimax.")] = "size",
    unit: Annotated[str, typer.Option(help="Of sizes and --budget: tokens or characters.")] = "tokens",
    budget: Annotated[float | None, typer.Option(help="What is read in all; UniMax shares it out.")] = None,
    max_epochs: Annotated[float, typer.Option(help="unimax: no folder more often.")] = 6.0,
    exponent: Annotated[float, typer.Option(help="temperature: 1 is by size, 0 is all alike.")] = 0.3,
    as_json: Json = False,
) -> None:
    """Show what a mixture takes of each folder: tokens, fertility, share, epochs. Writes nothing.

    The same settings under data.mix of a training recipe set the weights of its sources.
    """
    from hyperllama.config import MixSettings, validated
    from hyperllama.data.shards import Shards
    from hyperllama.data.weights import table

    mix = {"by": by, "unit": unit, "budget": budget, "max_epochs": max_epochs, "exponent": exponent}
    rows = table(
        [Shards.open(folder, verify=False) for folder in folders], validated(MixSettings, mix, "the command line")
    )
    if as_json:
        _print(rows, True)
    else:
        _table(rows)


@data_app.command("sample")
def data_sample(
    out: Annotated[Path, typer.Option(help="Folder to write: text/<language>/ and minimal_pairs/.")],
    n_bytes: Annotated[int, typer.Option("--bytes", help="Bytes of training text per language.")] = 1_000_000,
    dev_bytes: Annotated[int, typer.Option(help="Bytes of development text per language.")] = 50_000,
    pairs: Annotated[int, typer.Option(help="Minimal pairs per language.")] = 200,
    seed: int = 0,
    dry_run: DryRun = False,
) -> None:
    """Write the built-in sample corpus in six languages: text to try the software on, not to draw conclusions from."""
    from hyperllama.data.sample import LANGUAGES, write_corpus

    if dry_run:
        check_free(out)
        _print({"languages": list(LANGUAGES), "bytes": n_bytes, "dev_bytes": dev_bytes, "writes": str(out)}, False)
        return
    write_corpus(out, LANGUAGES, n_bytes, seed=seed, dev_bytes=dev_bytes, pairs=pairs)
    print(f"{out}: {len(LANGUAGES)} languages")


@app.command("flops")
def flops_command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER|RECIPE", help="Model folder or training recipe.")],
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window; default: the recipe's, or the model's longest.")
    ] = None,
    with_: Annotated[
        str | None, typer.Option("--with", metavar="grow:N", help="Also the clone by N and what both share.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="FLOPs: suggest a shape when the shared quantum is over 5 % of it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count parameters and training FLOPs per window, as exact integers."""
    from hyperllama.flops import growth_quantum, window_flops

    model, default = _shape(source)
    length = default if seq_len is None else seq_len
    if length < 1:
        raise HyperLlamaError(f"--seq-len is {length}; at least 1 token was expected")
    result: dict[str, Any] = {
        "parameters": model.num_parameters,
        "seq_len": length,
        "dense_flops_per_window": window_flops(model, length, "dense"),
        "causal_flops_per_window": window_flops(model, length, "causal"),
    }
    if with_ is not None:
        kind, _, number = with_.partition(":")
        if kind != "grow" or not number.isdigit() or int(number) < 2:
            raise HyperLlamaError(f"--with {with_}: write grow:N with an integer N of at least 2, for example grow:2")
        grown = model.grown(int(number))
        result["grown"] = {
            "parameters": grown.num_parameters,
            "dense_flops_per_window": window_flops(grown, length, "dense"),
            "causal_flops_per_window": window_flops(grown, length, "causal"),
        }
        result["shared_quantum"] = growth_quantum(model, length, int(number), budget)
    _print(result, as_json)


@app.command("grow")
def grow_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Hugging Face Llama folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]...",
            help="Applied in turn: hyperclone, lemon, net2wider, fpi, aki (wider), stack, interleave, solar, identity "
            "(deeper), vocabulary.",
        ),
    ] = "hyperclone",
    factor: Annotated[int | None, typer.Option(help="Integer by which every width grows; default: 2.")] = None,
    ffn_factor: Annotated[int | None, typer.Option(help="The FFN's factor; default: --factor.")] = None,
    dyadic: Annotated[
        bool, typer.Option("--dyadic", help="hyperclone: shares are powers of two, exact in bf16 by any factor.")
    ] = False,
    depth_factor: Annotated[int | None, typer.Option(help="Times as many layers; default: 2.")] = None,
    drop: Annotated[
        int | None, typer.Option(help="solar: layers each of the two copies leaves out; default: a quarter.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="NEW", help="vocabulary: the tokenizer with more tokens, file or folder.")
    ] = None,
    noise_db: Annotated[
        float | None, typer.Option(help="hyperclone: signal-to-noise ratio of the paired noise; default: none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of random maps.")] = 0,
    logits: Annotated[
        bool,
        typer.Option("--logits", help="Compare logits too, on random tokens: takes both models in memory, as fp32."),
    ] = False,
    sync: Sync = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Grow a model wider, deeper or by tokens, and verify by every weight whether it still computes the same function."""
    from hyperllama.grow.operators import make_operators

    pieces = None
    if tokenizer is not None:
        from hyperllama.data.tokenizer import Tokenizer
        from hyperllama.grow.vocabulary import token_pieces

        pieces = token_pieces(Tokenizer.load(source), Tokenizer.load(tokenizer))
    operators = make_operators(
        method.split(","), factor=factor, ffn_factor=ffn_factor, depth_factor=depth_factor, drop=drop, dyadic=dyadic,
        noise_db=noise_db, seed=seed, pieces=pieces,
    )  # fmt: skip
    from hyperllama.grow.folder import check_output, grow_folder, plan_growth

    if dry_run:
        plan = plan_growth(source, operators)
        check_output(plan, out)
        _print(plan | {"writes": str(out)}, as_json)
        return
    with _bar("grow", disable=quiet) as progress:
        result = grow_folder(source, out, operators, tokenizer=tokenizer, logits=logits, sync=sync, progress=progress)
    verified = result["verified"]
    if as_json:
        _print(result, True)
        return
    before, after = result["parameters"]["before"], result["parameters"]["after"]
    print(f"{out}: {before:,} -> {after:,} parameters")
    claim = "preserved" if verified["preserved"] else "NOT preserved"
    if not verified["claimed"]:
        print(f"function {claim}: {method} does not keep it; checked: all weights are finite")
    else:
        if not verified["preserved"]:
            claim += " (the copies' shares are rounded to the weights' dtype)"
        elif "vocabulary" in method.split(","):
            claim += " (on the old tokens)"
        print(
            f"function {claim}: the copies of every weight were summed and compared, in {verified['tensors']} tensors; largest "
            f"difference {verified['max_difference']:.3g} of a tensor's largest weight"
        )
    if logits:
        found = verified["logits"]
        print(
            f"largest logit difference on {found['tokens']} random tokens, in fp32: {found['max_logit_difference']:.3g} "
            f"(largest logit {found['max_logit']:.3g})"
        )


@app.command("symmetry")
def symmetry_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a clone.")],
    factor: Annotated[int | None, typer.Option(help="Width factor of the clone; default: its card's.")] = None,
    ffn_factor: Annotated[int | None, typer.Option(help="The FFN's factor; default: --factor.")] = None,
    as_json: Json = False,
) -> None:
    """Measure, tensor by tensor, the share of a clone's energy that its copies do not have in common (0: still equal)."""
    from hyperllama.grow.symmetry import symmetry

    rows = symmetry(folder, factor, ffn_factor)
    if as_json:
        _print(rows, True)
    else:
        _table([{key: "-" if cell is None else cell for key, cell in row.items()} for row in rows])


@app.command("merge")
def merge_command(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="mergekit YAML; paths relative to the working folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    seed: Annotated[int | None, typer.Option(help="Seed of random masks, in place of the recipe's.")] = None,
    compat: Annotated[str | None, typer.Option(help="mergekit: round every operation as it does.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Try methods and weights; merge by the best.")] = False,
    dev: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="--search: text to choose by, a file for each language."),
    ] = None,
    learn: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="--search: other text, to learn coefficients on.")
    ] = None,
    evaluations: Annotated[int, typer.Option(help="--search: passes over the text of --dev, at most.")] = 32,
    device: Annotated[str, typer.Option(help="cuda or cuda:N: merge on a GPU, copies overlapped.")] = "cpu",
    sync: Sync = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models by a mergekit recipe; a merge that was killed goes on with the same command."""
    from hyperllama.merge.executor import check_output, run
    from hyperllama.merge.planner import plan
    from hyperllama.merge.recipe import read_recipe, with_extensions

    given = with_extensions(read_recipe(recipe), seed=seed, compat=compat)
    if search:
        _search_merge(given, out, dev or [], learn or [], evaluations, dry_run, as_json, quiet, sync)
        return
    if dev or learn:
        raise HyperLlamaError("--dev and --learn are for --search")
    planned = plan(given, Path.cwd())
    if dry_run:
        check_output(planned, out)
        _print(planned.describe() | {"writes": str(out)}, as_json)
        return
    with _bar("merge", disable=quiet) as progress:
        summary = run(planned, out, sync=sync, progress=progress, device=device)
    _print(summary, as_json)


def _search_merge(
    given: Any,
    out: Path,
    dev: list[Path],
    learn: list[Path],
    evaluations: int,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    sync: bool,
) -> None:
    """Search, write the best recipe beside OUT as OUT.yaml, merge by it."""
    from hyperllama.files import write_text
    from hyperllama.merge.executor import check_output, run
    from hyperllama.merge.planner import plan
    from hyperllama.merge.search import Development, candidates, search

    if not dev:
        raise HyperLlamaError("--search needs --dev FILE..., text to choose by, a file for each language")
    planned, best = plan(given, Path.cwd()), out.with_name(f"{out.name}.yaml")
    check_output(planned, out)
    if best.exists():
        raise HyperLlamaError(f"{best}, where the best recipe goes, already exists: name another OUT, or remove it")
    if dry_run:
        names = [candidate.describe() for candidate in candidates(given, planned)]
        flops = Development(_existing(dev), planned).flops
        plans = {"candidates": names, "evaluations": evaluations, "flops_per_evaluation": flops}
        _print(plans | {"reads": [*map(str, dev), *map(str, learn)], "writes": [str(best), str(out)]}, as_json)
        return
    with _bar("search", disable=quiet) as progress:
        found = search(given, dev, evaluations, learn_texts=learn, progress=progress)
    if not as_json:
        _table(found.rows)
    with _bar("merge", disable=quiet) as progress:
        summary = run(found.plan, out, sync=sync, progress=progress, found=found)
    write_text(best, found.plan.recipe.source)
    tried = {"tried": found.rows} if as_json else {}
    _print({"recipe": str(best), "evaluations": found.evaluations, **tried, **summary}, as_json)


@app.command("eval")
def eval_command(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Model folders; the first is what the others are held against."),
    ],
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Text to measure bits per byte on.")
    ] = None,
    pairs: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Minimal pairs, JSONL with good, bad and phenomenon.")
    ] = None,
    facts: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER...", help="Facts in mParaRel's form: patterns/<language>/, tuples/<language>/."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="Pairs and facts: sentence; word (pairs: up to the end of the words that differ); length (per character)."
        ),
    ] = "sentence",
    harness: Annotated[
        list[str] | None, typer.Option(metavar="TASK...", help="Tasks of lm-eval (pip install 'hyperllama[eval]').")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="--harness: a folder with more tasks, as YAML.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="--harness: examples before a question; default: the task's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="--harness: documents of each task, at most.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Window in tokens; default: the model's longest.")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Also write the comparison of text (and FILE-pairs.csv: of pairs) as CSV.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models: bits per byte of text, accuracy on minimal pairs and facts, tasks of lm-eval.

    Several models are compared: text by paired bootstrap over documents, pairs by McNemar's exact test.
    """
    if not (text or pairs or facts or harness):
        raise HyperLlamaError(
            "nothing to evaluate: give --text FILE..., --pairs FILE..., --facts FOLDER... or --harness TASK..."
        )
    if csv is not None and not (text or pairs):
        raise HyperLlamaError("--csv is for --text and --pairs")
    if twice := {model for model in models if models.count(model) > 1}:
        raise HyperLlamaError(f"{min(twice)} is named twice: models are compared by their names")
    from hyperllama.evaluate import measure_folder
    from hyperllama.evaluate.compare import Comparison

    with _bar("eval", disable=quiet) as progress:
        measured = [
            measure_folder(model, text or [], pairs or [], facts=facts or [], by=by, seq_len=seq_len, progress=progress)
            for model in models
        ]
    results = [model.summary() for model in measured]
    comparison = Comparison.of(measured)
    if harness:
        from hyperllama.evaluate.harness import run_harness

        options: dict[str, Any] = {"task_folder": task_folder, "shots": shots, "limit": limit, "max_length": seq_len}
        for result, model in zip(results, models, strict=True):
            result["harness"] = run_harness(model, harness, **options)["tasks"]
    if csv is not None:
        comparison.write_csv(csv)
    if len(models) == 1:
        _print(results[0], as_json)
    elif as_json:
        _print({"models": results, **asdict(comparison)}, True)
    else:
        for title, rows in comparison.grids().items():
            print(title)
            _table(rows)
        for result in results:
            _print(
                {result["model"]: {key: result[key] for key in ("facts", "harness", "flops") if key in result}}, False
            )


@app.command("generate")
def generate_command(
    folder: Path,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    seed: int = 0,
) -> None:
    """Continue a prompt with a model folder."""
    from hyperllama.evaluate import folder_start, generate, load_folder

    model, tokenizer = load_folder(folder)
    start = folder_start(folder, tokenizer)
    print(generate(model, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, start=start))


@app.command("export")
def export_command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN[/checkpoints/STEP]", help="A checkpoint, or a run: its newest.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    counts: Annotated[
        bool,
        typer.Option(
            help="Count the tokens that the model has seen, in the run's shards, into token_counts.safetensors."
        ),
    ] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, also of a run that is going on."""
    from hyperllama.checkpoint import export_checkpoint, plan_export
    from hyperllama.train.plan import counted_tokens

    check_free(out)
    checkpoint, state = plan_export(source)
    if not dry_run:
        checkpoint, state = export_checkpoint(source, out, counted_tokens if counts else lambda state, model: {})
    ledger = state["card"]["ledger"]
    shown = {"reads": str(checkpoint), "writes": str(out), "step": state["step"], "spent_flops": ledger["spent"]}
    _print(shown | {"token_counts": state["card"]["token_counts"]}, as_json)


@app.command("experiment")
def experiment_command(
    recipe: Path,
    overrides: Overrides = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A table of runs: write every recipe it stands for, run nothing."),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(
            "--print", metavar="torchrun|slurm", help="A table of runs: print the commands of what is not finished."
        ),
    ] = None,
    recipes: Annotated[
        str, typer.Option(metavar="FOLDER", help="--print: where --write put the recipes.")
    ] = "recipes-of-paper",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run or resume a whole study: scales x languages x merges at equal FLOPs, and its report; or the paper's table of runs."""
    from hyperllama.config import read_yaml

    if "families" in (values := read_yaml(recipe)) and isinstance(values["families"], dict):
        _table_of_runs(recipe, overrides, write, show, recipes, dry_run, as_json)
        return
    if write is not None or show is not None:
        raise HyperLlamaError(
            f"{recipe} is a study, not a table of runs: --write and --print are for those (recipes/paper.yaml)"
        )
    if "seeds" in values:
        from hyperllama.experiment.seeds import describe_seeds, load_seeds, run_seeds

        several = load_seeds(recipe, overrides)
        if dry_run:
            _print(describe_seeds(several), as_json)
            return
        found = run_seeds(several)
        if as_json:
            _print(found, True)
        return
    from hyperllama.experiment.recipe import load_experiment
    from hyperllama.experiment.run import describe, run_experiment

    settings = load_experiment(recipe, overrides)
    if dry_run:
        _print(describe(settings), as_json)
        return
    results = run_experiment(settings)
    if as_json:
        _print(results, True)


def _table_of_runs(
    recipe: Path,
    overrides: list[str] | None,
    write: Path | None,
    show: str | None,
    recipes: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    from hyperllama.experiment.campaign import PRINTERS, commands, describe, run_grid, write_recipes
    from hyperllama.experiment.paper import load_paper, paper_grid

    grid = paper_grid(load_paper(recipe, overrides))
    if dry_run:
        if write is not None:
            check_free(write)
        _print(describe(grid), as_json)
    elif show is not None:
        if show not in PRINTERS:
            raise HyperLlamaError(f"--print {show}: {nearest(show, PRINTERS)}")
        print(commands(grid, recipes, show), end="")
    elif write is not None:
        _print(write_recipes(grid, write) | {"writes": str(write)}, as_json)
    else:
        results = run_grid(grid)
        if as_json:
            _print(results, True)


@app.command("runs")
def runs_command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...")],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw losses against FLOPs into this file (.png, .svg).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare finished runs: shape, exact FLOPs, tokens, loss, speed."""
    from hyperllama.train.runs import finished, summaries

    rows = summaries(folders)
    if plot is not None:
        from hyperllama.train.folder import plot_runs

        runs = finished(folders)
        names = [run.name for run in runs]
        plot_runs({run.name if names.count(run.name) == 1 else str(run): run for run in runs}, plot)
    if as_json:
        _print(rows, True)
    else:
        _table(rows)


def _shape(source: Path) -> tuple[Any, int]:
    """(model shape, default window) of a model folder or a training recipe."""
    if source.is_dir():
        from hyperllama.hub import model_config, read_config

        config = model_config(read_config(source), source)
        return config, config.max_position_embeddings
    from hyperllama.config import load_run

    run = load_run(source)
    if run.init_from is not None:
        return _shape(Path(run.init_from))[0], run.data.seq_len
    assert run.model is not None  # a recipe has a model or init_from
    vocab = run.model.vocab_size
    if vocab is None or Path(run.tokenizer).exists():
        from hyperllama.data.tokenizer import Tokenizer

        vocab = Tokenizer.load(run.tokenizer).vocab_size
    return run.model.resolve(vocab, run.data.seq_len), run.data.seq_len


def _existing(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.exists():
            raise HyperLlamaError(f"{path} does not exist")
    return paths


class _bar:
    """A progress bar on standard error as a context manager that yields `progress(done, total)`; disabled, it does nothing.

    progress.stage(name) begins a bar of its own, in bytes, and returns what that is told.
    """

    def __init__(self, what: str, *, disable: bool = False):
        self.what, self.disable = what, disable

    def __enter__(self) -> Any:
        if not self.disable:
            from hyperllama.progress import console, progress_bar

            self.bar = progress_bar(console())
            self.bar.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        if not self.disable:
            self.task = getattr(self, "task", None) or self.bar.add_task(self.what, total=None, figures="")
            self.bar.update(self.task, completed=done, total=total)

    def stage(self, name: str) -> Any:
        if self.disable:
            return lambda done, total: None
        task, begin = self.bar.add_task(name, total=None, figures=""), None

        def progress(done: int, total: int) -> None:
            nonlocal begin
            begin = begin or (time.monotonic(), done)  # what an earlier process did is not this one's speed
            speed = (done - begin[1]) / 1e6 / max(time.monotonic() - begin[0], 1e-3)
            self.bar.update(task, completed=done, total=total, figures=f"{speed:,.1f} MB/s" if speed else "")

        return progress

    def __exit__(self, *_: object) -> None:
        if not self.disable:
            self.bar.stop()


def _print(value: Any, as_json: bool) -> None:
    """JSON for machines, indented keys and values for people; integers with separators."""
    if as_json:
        print(json.dumps(value, indent=1, ensure_ascii=False))
    else:
        _tree(value, 0)


def _tree(value: Any, depth: int) -> None:
    items = value.items() if isinstance(value, dict) else ((f"[{i}]", item) for i, item in enumerate(value))
    for key, item in items:
        if isinstance(item, dict) or (isinstance(item, list) and any(isinstance(i, dict | list) for i in item)):
            print(f"{'  ' * depth}{key}:")
            _tree(item, depth + 1)
        else:
            text = f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) else item
            print(f"{'  ' * depth}{key}: {', '.join(map(str, item)) if isinstance(item, list) else text}")


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in rows[0]:
        table.add_column(
            name.replace("_", " "), justify="left" if name in ("run", "name", "merge", "language") else "right"
        )
    for row in rows:
        table.add_row(
            *(
                f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}" if isinstance(cell, float) else str(cell or "-")
                for cell in row.values()
            )
        )
    Console().print(table)


def spread_lists(
    arguments: list[str], options: tuple[str, ...] = ("--text", "--pairs", "--facts", "--harness", "--dev", "--learn")
) -> list[str]:
    """`--text a b` as `--text a --text b`: options of `eval` and `merge` take several files."""
    spread: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in options else None
            if option is None:
                spread.append(argument)
        elif option is not None:
            spread += [option, argument]
        else:
            spread.append(argument)
    return spread


def main() -> None:
    """Entry point: mistakes are one sentence and exit code 2, runs that can't go on 3 and 4, Ctrl-C is 130, SIGTERM 143."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["eval"], ["merge"]):
        arguments = spread_lists(arguments)
    try:
        code = app(arguments, standalone_mode=False)
    except HyperLlamaError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Stopped as stop:
        _fail(str(stop), 128 + stop.signal)
    except (Diverged, Lost) as error:
        _fail(str(error), error.code)
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        error.show()  # a usage error of the command line library
        sys.exit(getattr(error, "exit_code", 2))
    if code == 130:  # what the library makes of KeyboardInterrupt
        _fail("interrupted; nothing half-written was left", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str, code: int) -> None:
    print(f"hyperllama: {sentence}", file=sys.stderr)
    sys.exit(code)
