"""The repository is what it says it is, and stands beside other people's packages."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).parents[1]


def test_the_readmes_tree_has_every_file_once():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tree = (ROOT / "README.md").read_text().split("## The tree\n")[1].split("\n## ")[0]
    named = re.findall(r"^ {4}(\S+) +\S", tree, re.MULTILINE)
    results = {path for path in listed if path.startswith("bench/results/")}  # measurements come and go
    assert sorted(named) == sorted(set(listed) - results)


def test_the_peers_of_benchmarks_are_pinned_and_leave_torch_alone():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = [re.fullmatch(r"([\w-]+)==[\w.]+(; .*)?", peer)[1] for peer in extras["peers"]]
    assert {"transformers", "liger-kernel", "quack-kernels", "cut-cross-entropy", "xformers", "mergekit"} == set(names)
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"transformers=={tested['transformers']}" in extras["peers"]


FAKE = """
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return self
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
"""


def test_the_hub_package_called_kernels_and_ours_import_from_the_root(tmp_path):
    """transformers imports a distribution `kernels` of a version it likes; our folder must not stand in for it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FAKE)
    info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    script = (
        "import kernels, hyperllama.kernels.rms_norm as ours; from transformers import LlamaForCausalLM; "
        "from transformers.utils import is_kernels_available; import transformers.integrations.hub_kernels; "
        "assert is_kernels_available(); print(kernels.__file__, ours.__file__)"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = done.stdout.split()
    assert (
        Path(theirs) == tmp_path / "kernels" / "__init__.py"
        and Path(ours).resolve() == ROOT / "kernels" / "rms_norm.py"
    )
