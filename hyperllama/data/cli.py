"""`hyperllama tokenizer ...` and `hyperllama data ...`. Heavy imports happen inside the commands."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hyperllama.errors import HyperLlamaError
from hyperllama.files import check_free
from hyperllama.terminal import Bar, DryRun, Json, Quiet, existing, print_table, print_value

tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer.")
data_app = typer.Typer(no_args_is_help=True, help="Turn text into token shards, look into them, write sample text.")


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
        print_value({"reads": [str(path) for path in existing(texts)], "writes": str(out), "vocab_size": vocab}, False)
        return
    with Bar("tokenizer") as progress:
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
        lists = existing(recipe.id_lists)
        plan = {
            "reads": [*reads, *map(str, lists), recipe.tokenizer],
            "writes": recipe.out,
            "vocab_size": loaded.vocab_size,
        }
        print_value(plan, as_json)
        return
    with Bar("build", disable=quiet) as progress:
        cores = processes or len(os.sched_getaffinity(0))
        manifest = build(recipe, loaded, processes=cores, stage=progress.stage)
    shown = ("tokens", "documents", "bytes", "characters", "damaged", "languages", "taken", "dtype", "policy")
    print_value({key: manifest[key] for key in shown}, as_json)


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
    with Bar("inspect", disable=quiet) as progress:
        if len(paths) == 1 and (folder / "manifest.json").is_file():
            report = inspect(folder, Tokenizer.load(tokenizer) if tokenizer else None, progress=progress)
        else:
            report = inspect_text(paths, progress=progress)
    print_value(report, as_json)
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
    from hyperllama.data.ds import adopt, ds_files
    from hyperllama.data.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    if dry_run:
        check_free(out)
        print_value({"reads": [str(path) for path in ds_files(folder)], "writes": str(out)}, as_json)
        return
    with Bar("adopt", disable=quiet) as progress:
        manifest = adopt(folder, loaded, out, language=language, eos_token=eos_token, progress=progress)
    print_value({key: manifest[key] for key in ("tokens", "documents", "languages", "dtype", "shard_lengths")}, as_json)


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
    from hyperllama.config import MixSettings
    from hyperllama.data.shards import Shards
    from hyperllama.data.weights import table
    from hyperllama.settings import validated

    mix = {"by": by, "unit": unit, "budget": budget, "max_epochs": max_epochs, "exponent": exponent}
    rows = table(
        [Shards.open(folder, verify=False) for folder in folders], validated(MixSettings, mix, "the command line")
    )
    if as_json:
        print_value(rows, True)
    else:
        print_table(rows)


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
        print_value({"languages": list(LANGUAGES), "bytes": n_bytes, "dev_bytes": dev_bytes, "writes": str(out)}, False)
        return
    write_corpus(out, LANGUAGES, n_bytes, seed=seed, dev_bytes=dev_bytes, pairs=pairs)
    print(f"{out}: {len(LANGUAGES)} languages")
