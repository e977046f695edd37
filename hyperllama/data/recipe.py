"""A data recipe: which documents become one folder of shards, as YAML.

    documents of a source     files | a dataset     keep_ids, drop_ids: split by published ids
          |  deduplicate                            exact copies, over all sources; the first one stays
          v
      shuffle                                       each source by its own seed
          |  skip; fraction, documents, characters, share   how much of it
          v
      folder                                        sources one after another, or mixed (shuffle of the recipe)

Everything is a function of the recipe and the text: neither the number of processes nor an interruption changes a byte.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hyperllama.data.datasets import dataset_files
from hyperllama.data.text import Keys, text_files
from hyperllama.errors import HyperLlamaError
from hyperllama.recipes import override, read_yaml
from hyperllama.settings import Settings, validated


class TextSource(Settings):
    """Documents of files or of a dataset, and how many of them are taken."""

    name: str | None = Field(None, min_length=1, description="seeds its shuffle; default: what it reads")
    files: str | list[str] | None = Field(None, description="files, folders, globs ...")
    dataset: str | None = Field(None, description="... or a Hugging Face dataset, owner/name, in the hub's cache")
    dataset_files: str | None = Field(None, description="glob of the dataset's files")
    revision: str = Field("main", description="of the dataset: branch, tag or commit")
    text_key: str = Field("text", description="JSON key or parquet column")
    lang_key: str | None = Field("lang", description="where a document's own language tag is; null: nowhere")
    id_key: str | None = Field(None, description="where its id is")
    language: str | None = Field(None, description="tag of documents that have none")
    keep_ids: str | None = Field(None, description="file of ids, one a line: only these documents")
    drop_ids: str | None = Field(None, description="file of ids, one a line: all but these")
    shuffle: bool = Field(False, description="take the documents in a random order")
    skip: float | None = Field(None, gt=0, lt=1, description="share of its documents to pass over first, rounded down")
    fraction: float | None = Field(None, gt=0, le=1, description="share of the documents that are left, rounded down")
    documents: int | None = Field(None, gt=0, description="at most this many")
    characters: int | None = Field(None, gt=0, description="stop before the document that reaches this")
    share: float | None = Field(None, gt=0, lt=1, description="as many characters as make this share of the folder")

    @model_validator(mode="after")
    def _consistent(self) -> "TextSource":
        if (self.files is None) == (self.dataset is None):
            raise ValueError("give either files or dataset, not both or none")
        if (self.dataset is None) != (self.dataset_files is None):
            raise ValueError("dataset and dataset_files belong together")
        if (self.keep_ids or self.drop_ids) and self.id_key is None:
            raise ValueError("keep_ids and drop_ids need id_key")
        if self.keep_ids and self.drop_ids:
            raise ValueError("give keep_ids or drop_ids, not both")
        budgets = ("fraction", "documents", "characters", "share")
        if sum(getattr(self, key) is not None for key in budgets) > 1:
            raise ValueError(f"give at most one of {', '.join(budgets)}")
        return self

    @property
    def keys(self) -> Keys:
        """What its records' keys are called."""
        return Keys(self.text_key, self.lang_key, self.id_key if self.keep_ids or self.drop_ids else None)

    @property
    def label(self) -> str:
        """Its name, else what it reads."""
        return self.name or (f"{self.dataset}/{self.dataset_files}" if self.dataset else str(self.files))

    def resolve(self) -> tuple[str | None, list[Path]]:
        """The dataset's commit, if it is one, and the files. Raises HyperLlamaError as text_files and dataset_files do."""
        if self.dataset is not None and self.dataset_files is not None:
            return dataset_files(self.dataset, self.dataset_files, self.revision)
        assert self.files is not None  # the validator requires one of the two
        return None, text_files([self.files] if isinstance(self.files, str) else self.files)


class DataRecipe(Settings):
    """One folder of shards."""

    out: str = Field(description="folder to write")
    tokenizer: str = Field(description="tokenizer.model, tokenizer.json, or a folder with one")
    sources: list[TextSource] = Field(min_length=1)
    seed: int = Field(42, ge=0, lt=2**63, description="of all shuffles")
    deduplicate: bool = Field(False, description="leave out exact copies of a document's text")
    shuffle: bool = Field(False, description="mix the documents of all sources")
    damaged: Literal["error", "skip"] = Field("error", description="skip: leave damaged records out, and count them")
    bos: bool = Field(False, description="BOS before every document; EOS ends each in any case")
    eos_token: str | None = Field(None, description="the token that ends documents; default: the tokenizer's EOS")
    shard_tokens: int = Field(2**27, gt=0, description="tokens in a file of the folder")

    @model_validator(mode="after")
    def _consistent(self) -> "DataRecipe":
        labels = [source.label for source in self.sources]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two sources are called {twice!r}: give each its own name")
        shares = [source.share for source in self.sources if source.share is not None]
        if len(shares) == len(self.sources) or sum(shares) >= 1:
            raise ValueError("shares are of the whole folder: they must leave room for a source without one")
        return self

    @property
    def id_lists(self) -> list[Path]:
        """The files of ids that its sources name."""
        return [Path(path) for source in self.sources for path in (source.keep_ids, source.drop_ids) if path]


def load_data_recipe(path: str | Path, assignments: list[str] | None = None) -> DataRecipe:
    """Read a data recipe and its overrides.

    Raises HyperLlamaError naming the file and every key that is unknown, missing, of the wrong type or contradictory.
    """
    return validated(DataRecipe, override(read_yaml(path), assignments or []), str(path))


def data_recipe(
    arguments: list[str], *, tokenizer: Path | None = None, out: Path | None = None, language: str | None = None
) -> DataRecipe:
    """The recipe that `data build` is given: a YAML file and overrides, or texts; the options replace the recipe's keys.

    Raises HyperLlamaError as load_data_recipe does, and for texts without a tokenizer or an output.
    """
    given = {key: str(path) for key, path in (("tokenizer", tokenizer), ("out", out)) if path is not None}
    if arguments[0].endswith((".yaml", ".yml")):
        if language is not None:
            raise HyperLlamaError("--language is for texts; in a recipe it is a key of each source")
        return load_data_recipe(arguments[0], [*arguments[1:], *(f"{key}={json.dumps(given[key])}" for key in given)])
    if missing := {"tokenizer", "out"} - set(given):
        raise HyperLlamaError(f"texts need --{min(missing)}")
    source = {"files": arguments, "language": language}
    return validated(DataRecipe, {**given, "sources": [source]}, "the command line")
