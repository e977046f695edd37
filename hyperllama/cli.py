"""The command line. Heavy imports happen inside the commands, so that --help and mistakes answer at once."""

import gc
import os
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# numpy has one small product to compute (evaluate/statistics.py): no threads that spin, waiting for it
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# looking for them takes a tenth of the start
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from hyperllama import __version__
from hyperllama.errors import Diverged, HyperLlamaError, Lost, Stopped, nearest
from hyperllama.files import check_free
from hyperllama.terminal import Bar, DryRun, Json, Quiet, existing, print_table, print_value

app = typer.Typer(
    name="hyperllama",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, grow, merge, evaluate and count Llama models.",
)

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
        if _is_first():
            print_value(plan.describe(), as_json)
        return
    from hyperllama.train.loop import train

    record = train(config, quiet=quiet)
    if _is_first():
        print_value(record if as_json else {key: record[key] for key in ("name", "ledger", "loss", "seconds")}, as_json)


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
    print_value(result, as_json)


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
        print_value(plan | {"writes": str(out)}, as_json)
        return
    with Bar("grow", disable=quiet) as progress:
        result = grow_folder(source, out, operators, tokenizer=tokenizer, logits=logits, sync=sync, progress=progress)
    verified = result["verified"]
    if as_json:
        print_value(result, True)
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
        print_value(rows, True)
    else:
        print_table([{key: "-" if cell is None else cell for key, cell in row.items()} for row in rows])


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
    from hyperllama.merge.executor import check_output, merge_on_gpu, run
    from hyperllama.merge.planner import plan
    from hyperllama.merge.recipe import read_recipe, with_extensions

    given = with_extensions(read_recipe(recipe), seed=seed, compat=compat)
    if search:
        if device != "cpu":
            raise HyperLlamaError(f"--device {device}: a search works on the CPU; merge by the recipe that it writes")
        _search_merge(given, out, dev or [], learn or [], evaluations, dry_run, as_json, quiet, sync)
        return
    if dev or learn:
        raise HyperLlamaError("--dev and --learn are for --search")
    planned = plan(given, Path.cwd())
    if dry_run:
        check_output(planned, out)
        merge_on_gpu(planned, device)
        print_value(planned.describe() | {"writes": str(out)}, as_json)
        return
    with Bar("merge", disable=quiet) as progress:
        summary = run(planned, out, sync=sync, progress=progress, device=device)
    print_value(summary, as_json)


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
        flops = Development(existing(dev), planned).flops
        plans = {"candidates": names, "evaluations": evaluations, "flops_per_evaluation": flops}
        print_value(plans | {"reads": [*map(str, dev), *map(str, learn)], "writes": [str(best), str(out)]}, as_json)
        return
    with Bar("search", disable=quiet) as progress:
        found = search(given, dev, evaluations, learn_texts=learn, progress=progress)
    if not as_json:
        print_table(found.rows)
    with Bar("merge", disable=quiet) as progress:
        summary = run(found.plan, out, sync=sync, progress=progress, found=found)
    write_text(best, found.plan.recipe.source)
    tried = {"tried": found.rows} if as_json else {}
    print_value({"recipe": str(best), "evaluations": found.evaluations, **tried, **summary}, as_json)


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

    if harness:
        from hyperllama.evaluate.harness import find_tasks, run_harness

        find_tasks(harness, task_folder)  # before hours of work

    with Bar("eval", disable=quiet) as progress:
        measured = [
            measure_folder(model, text or [], pairs or [], facts=facts or [], by=by, seq_len=seq_len, progress=progress)
            for model in models
        ]
    results = [model.summary() for model in measured]
    comparison = Comparison.of(measured)
    if harness:
        options: dict[str, Any] = {"task_folder": task_folder, "shots": shots, "limit": limit, "max_length": seq_len}
        for result, model in zip(results, models, strict=True):
            result["harness"] = run_harness(model, harness, **options)["tasks"]
    if csv is not None:
        comparison.write_csv(csv)
    if len(models) == 1:
        print_value(results[0], as_json)
    elif as_json:
        print_value({"models": results, **asdict(comparison)}, True)
    else:
        for title, rows in comparison.grids().items():
            print(title)
            print_table(rows)
        for result in results:
            print_value(
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
    print_value(shown | {"token_counts": state["card"]["token_counts"]}, as_json)


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
    jobs: Annotated[
        int,
        typer.Option(
            min=1, help="Of a study: processes that train, merge and measure at once; best with OMP_NUM_THREADS=1."
        ),
    ] = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run or resume a whole study: scales x languages x merges at equal FLOPs, and its report; or the paper's table of runs."""
    from hyperllama.recipes import read_yaml

    if "families" in (values := read_yaml(recipe)) and isinstance(values["families"], dict):
        _table_of_runs(recipe, overrides, write, show, recipes, dry_run, as_json)
        return
    if write is not None or show is not None:
        raise HyperLlamaError(
            f"{recipe} is a study, not a table of runs: --write and --print are for those (recipes/paper.yaml)"
        )
    if "seeds" in values:
        from hyperllama.experiment.seeds import describe_seeds, load_seeds, run_seeds

        _run_study(load_seeds(recipe, overrides), describe_seeds, partial(run_seeds, jobs=jobs), dry_run, as_json)
        return
    from hyperllama.experiment.recipe import load_experiment
    from hyperllama.experiment.run import describe, run_experiment

    _run_study(load_experiment(recipe, overrides), describe, partial(run_experiment, jobs=jobs), dry_run, as_json)


def _run_study(
    settings: Any, describe: Callable[[Any], Any], run: Callable[[Any], Any], dry_run: bool, as_json: bool
) -> None:
    """Print the plan, or run the study, which tells people of itself, and print its results for machines."""
    if dry_run:
        print_value(describe(settings), as_json)
        return
    results = run(settings)
    if as_json:
        print_value(results, True)


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
        print_value(describe(grid), as_json)
    elif show is not None:
        if show not in PRINTERS:
            raise HyperLlamaError(f"--print {show}: {nearest(show, PRINTERS)}")
        print(commands(grid, recipes, show), end="")
    elif write is not None:
        print_value(write_recipes(grid, write) | {"writes": str(write)}, as_json)
    else:
        _run_study(grid, describe, run_grid, False, as_json)


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
        print_value(rows, True)
    else:
        print_table(rows)


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


def _app(name: str | None) -> typer.Typer:
    """The app with the command `name` alone where it has one, else with all and their groups: Typer builds all that an app has."""
    chosen = copy(app)
    if found := [command for command in app.registered_commands if command.name == name]:
        chosen.registered_commands = found
        return chosen
    from hyperllama.bench.cli import app as bench_app
    from hyperllama.data.cli import data_app, tokenizer_app

    chosen.registered_groups = []
    chosen.add_typer(tokenizer_app, name="tokenizer")
    chosen.add_typer(data_app, name="data")
    chosen.add_typer(bench_app, name="bench")
    return chosen


def main() -> None:
    """Entry point: mistakes are one sentence and exit code 2, runs that can't go on 3 and 4, Ctrl-C is 130, SIGTERM 143."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["eval"], ["merge"]):
        arguments = spread_lists(arguments)
    try:
        code = _app(next(iter(arguments), None))(arguments, standalone_mode=False)
    except HyperLlamaError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Stopped as stop:
        _fail(str(stop) if _is_first() else "", 128 + stop.signal)
    except Diverged as error:
        _fail(str(error) if _is_first() else "", error.code)
    except Lost as error:
        _fail(str(error), error.code)
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        error.show()  # a usage error of the command line library
        sys.exit(getattr(error, "exit_code", 2))
    if code == 130:  # what the library makes of KeyboardInterrupt
        _fail("interrupted; nothing half-written was left", 130)
    if "torch" not in sys.modules:  # whose bindings count what is left
        gc.freeze()  # to look through all that was imported, and take it apart, is a tenth of a short command: the system does it
    sys.exit(code if isinstance(code, int) else 0)


def _is_first() -> bool:
    """Whether this process tells what all processes of a run know."""
    return os.environ.get("RANK", "0") == "0"


def _fail(sentence: str, code: int) -> None:
    if sentence:
        print(f"hyperllama: {sentence}", file=sys.stderr)
    sys.exit(code)
