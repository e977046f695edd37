"""Hugging Face datasets by name: the files of one that the hub's local cache holds, without a network.

The cache is the hub's own: models and datasets in one folder, a commit a folder of links.

    $HF_HUB_CACHE | $HF_HOME/hub | ~/.cache/huggingface/hub
        datasets--HuggingFaceFW--fineweb-2/
            refs/main                     the commit that a branch or tag stood at
            snapshots/<commit>/data/fao_Latn/train/000_00000.parquet

Fetching is the hub's command line's: the error names its command.
"""

import os
import re
from pathlib import Path

from hyperllama.data.text import SUFFIXES
from hyperllama.errors import HyperLlamaError

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\..*)")  # how the hub's own writer names the files of a split


def cache_folder() -> Path:
    """The hub's cache, where its own environment variables say it is."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def dataset_files(name: str, pattern: str, revision: str = "main") -> tuple[str, list[Path]]:
    """The commit and the files of the dataset `name` ("owner/name") that match the glob `pattern`, sorted by path.

    Raises HyperLlamaError when the cache has not got the dataset, the revision, any such file, or all parts of a file that is
    numbered -00000-of-00007; it names the command that fetches them.
    """
    owner, slash, rest = name.partition("/")
    if not (owner and slash and rest) or "/" in rest:
        raise HyperLlamaError(f"dataset {name!r} is not a name on the hub: expected owner/name")
    cache = cache_folder()
    version = "" if revision == "main" else f" --revision {revision}"
    fetch = f'fetch it with: hf download {name} --repo-type dataset{version} --include "{pattern}"'
    folder = cache / f"datasets--{owner}--{rest}"
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        raise HyperLlamaError(f"the dataset {name} at {revision} is not in the hub's cache {cache}; {fetch}")
    found = sorted(path for path in snapshot.glob(pattern) if path.name.endswith(SUFFIXES) and path.is_file())
    if not found:
        raise HyperLlamaError(f"{snapshot} has no text files that match {pattern}; {fetch}")
    here = {str(path) for path in found}
    for path in found:
        if part := _PART.fullmatch(str(path)):
            parts = [f"{part[1]}-{i:05d}-of-{part[3]}{part[4]}" for i in range(int(part[3]))]
            missing = [other for other in parts if other not in here]
            if missing:
                raise HyperLlamaError(f"{missing[0]} and {len(missing) - 1} other parts are not in the cache; {fetch}")
    return commit, found
