"""The regression gate: it measures what it says, tells slower from equal, and its exit codes. Speed is not judged here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperllama.bench import regress
from hyperllama.bench.regress import Gate, Installation, WorkerError, copy_tree, one_round, workers
from hyperllama.bench.regress_trials import judged
from hyperllama.bench.regress_worker import make_clock
from hyperllama.bench.sequential import Trial
from hyperllama.errors import HyperLlamaError
from hyperllama.kernels import native

ROOT = Path(__file__).parents[2]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def version(name: str, folder: Path) -> Installation:
    """What pip makes of this source, without the minute that compiling takes: the library is the one that is installed."""
    made = Installation(name, folder / name)
    ignored = shutil.ignore_patterns("__pycache__", "results", "lib")
    shutil.copytree(ROOT / "hyperllama", made.library / "hyperllama", ignore=ignored)
    (made.library / "COMMIT").write_text(f"commit of {name}")
    if found := native.library():
        (made.library / "hyperllama" / "lib").mkdir()
        shutil.copy2(found._name, made.library / "hyperllama" / "lib")
    return made


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Installation, Installation]:
    folder = tmp_path_factory.mktemp("versions")
    base, head = version("base", folder), version("head", folder)
    broken = head.library / "hyperllama" / "kernels" / "grad_norm.py"
    broken.write_text(broken.read_text() + "\n\ndef grad_norm(grad):\n    raise ValueError('lost')\n")
    (base.library / "hyperllama" / "grow" / "folder.py").unlink()
    return base, head


def test_each_version_runs_its_own_code_and_says_so(versions: tuple[Installation, Installation]) -> None:
    base, head = versions
    with workers(versions) as pair:
        for worker, made in zip(pair, versions, strict=True):
            assert Path(worker.told["path"]) == (made.library / "hyperllama").resolve()
            assert worker.told["commit"] == f"commit of {made.name}"
            worker.ask("fresh", threads=1, cpu=None)
        with pytest.raises(WorkerError, match="head: ValueError: lost"):
            one_round(pair, "grad_norm csrc", 0)
        with pytest.raises(WorkerError, match="base: ModuleNotFoundError"):
            one_round(pair, "grow folder", 0)
        assert abs(one_round(pair, "loader", 0)) < 1  # both are still there, and measure the same thing
    with pytest.raises(WorkerError, match=r"hyperllama came from .*, not from"):
        wrong = Installation("base", base.folder.parent / "elsewhere")
        wrong.library.mkdir(parents=True)
        (wrong.library / "hyperllama").symlink_to(head.library / "hyperllama")
        with workers([wrong]):
            pass


def test_a_slow_version_is_told_from_an_equal_one_and_lost_code_from_new_code(
    versions: tuple[Installation, Installation],
) -> None:
    only = re.compile("^(loader|grad_norm csrc|grow folder)$")
    gate = Gate(*versions, only, slow={"loader": 1.0})
    said: list[str] = []
    gate.run(40, said.append)
    report = gate.report()
    json.dumps(report)
    assert report["cases"]["loader"]["verdict"] == "slower"
    assert report["cases"]["loader"]["head_over_base"]["median"] > 1.3
    assert report["cases"]["grad_norm csrc"] == {"verdict": "broken", "reason": "head: ValueError: lost"}
    assert report["cases"]["grow folder"]["verdict"] == "not in base"
    assert report["verdict"] == "regression" and "slower: loader" in said[-1]
    text = regress.table(report)
    assert text.splitlines()[-1].startswith("regression: loader") and "broken  head: ValueError: lost" in text


def test_the_clock_leaves_out_waiting_for_a_cpu_and_counts_other_waiting() -> None:
    now, allowed = make_clock(), os.sched_getaffinity(0)
    if now is time.perf_counter:
        pytest.skip("this kernel tells NO delay of a thread: the gate's clock is the wall's")
    cpu = min(allowed)
    command = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nprint(flush=True)\nwhile True: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE)
    try:
        assert neighbour.stdout is not None and neighbour.stdout.readline()
        os.sched_setaffinity(0, {cpu})
        spent, ours, wall = time.thread_time(), now(), time.perf_counter()
        while time.perf_counter() - wall < 1.0:
            pass
        ours, wall, spent = now() - ours, time.perf_counter() - wall, time.thread_time() - spent
        assert spent < 0.8 * wall  # the neighbour did take its part
        assert ours == pytest.approx(spent, rel=0.1)
        began = now()
        time.sleep(0.2)
        assert now() - began >= 0.19
    finally:
        os.sched_setaffinity(0, allowed)
        neighbour.kill()
        neighbour.wait()


def test_trials_are_judged_by_what_the_gate_promises() -> None:
    equal = [{"slowed": None, "slower": ["a"] * (i == 0), "seconds": 1.0} for i in range(40)]
    slowed = [{"slowed": "a", "slower": ["a"] * (i > 0), "seconds": 1.0} for i in range(20)]
    assert [result["targets"][0]["met"] for result in judged([*equal, *slowed])] == [True, True]
    equal[1]["slower"], slowed[1]["slower"] = ["b"], ["b"]
    assert [result["targets"][0]["met"] for result in judged([*equal, *slowed])] == [False, False]
    assert judged([]) == []


def test_a_process_that_dies_takes_its_case_along_and_no_other(versions: tuple[Installation, Installation]) -> None:
    with workers(versions) as pair:
        base, process = pair[0], pair[0].process.pid
        base.ask("fresh", threads=1, cpu=None)
        child = int(Path(f"/proc/{process}/task/{process}/children").read_text())
        os.kill(child, signal.SIGKILL)
        with pytest.raises(WorkerError, match="its process ended with code -9"):
            base.ask("sample", seconds=0.0)
        with pytest.raises(WorkerError, match="its process"):
            base.ask("fresh", threads=1, cpu=None)
        pair[1].ask("fresh", threads=1, cpu=None)
        pair[1].kill()
        with pytest.raises(WorkerError, match="its process"):
            pair[1].ask("prepare", case="loader")
    gate = Gate(*versions)
    gate.trials = {"lost": Trial(2), "kept": Trial(2)}
    gate.failures["lost"] = "base: its process ended with code -9"
    del gate.trials["lost"]
    assert gate.report()["verdict"] == "pass" and gate.report()["not_in_base"] == ["lost"]
    assert "warning: time was over" in regress.table(gate.report())


def test_faults_of_the_resource_gate_are_a_regression_too(versions: tuple[Installation, Installation]) -> None:
    pytest.importorskip("triton")
    program = versions[1].library / "hyperllama" / "bench" / "resources.py"
    program.write_text("import sys\nprint('3 launches')\nprint('kernel: spills', file=sys.stderr)\nsys.exit(1)\n")
    found = regress.resource_gate(versions[1])
    assert found == {"exit": 1, "summary": "3 launches", "faults": ["kernel: spills"]}
    report = {**Gate(*versions).report(), "verdict": "regression", "resources": found}
    assert regress.table(report).splitlines()[-2:] == ["kernel: spills", "regression: Triton kernels"]


def test_the_working_tree_is_copied_as_it_is_without_what_git_ignores(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "package").mkdir(parents=True)
    for name, text in {"a": "1", "b": "1", ".gitignore": "ignored\n"}.items():
        (source / name).write_text(text)
    (source / "link").symlink_to("package")
    git(source, "init", "-q")
    git(source, "add", "-A")
    git(source, "commit", "-qm", "first")
    first = git(source, "rev-parse", "HEAD")
    assert copy_tree(source, None, tmp_path / "clean") == first
    (source / "a").write_text("2")
    (source / "b").unlink()
    (source / "package" / "new").write_text("3")
    (source / "ignored").write_text("4")
    assert copy_tree(source, None, tmp_path / "tree") == f"{first} and changes"
    assert (tmp_path / "tree" / "a").read_text() == "2" and (tmp_path / "tree" / "link" / "new").read_text() == "3"
    assert not (tmp_path / "tree" / "b").exists() and not (tmp_path / "tree" / "ignored").exists()
    assert copy_tree(source, first, tmp_path / "commit") == first
    assert (tmp_path / "commit" / "a").read_text() == "1" and not (tmp_path / "commit" / "package" / "new").exists()


def test_mistakes_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for arguments, sentence in (
        ({"ref": "no-such-branch"}, "--base no-such-branch: git knows no such commit"),
        ({"ref": "--help"}, "--base --help: git knows no such commit"),
        ({"ref": "HEAD", "only": "("}, "no regular expression"),
        ({"ref": "HEAD", "minutes": 0.0}, "--minutes"),
        ({"ref": "HEAD", "threads": 0}, "--threads"),
    ):
        with pytest.raises(HyperLlamaError, match=sentence):
            regress.judge(**arguments)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HyperLlamaError, match="no git checkout of HyperLlama"):
        regress.judge("HEAD")


def test_the_command_exits_with_1_for_a_regression_and_2_for_a_mistake(
    versions: tuple[Installation, Installation], tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from hyperllama.bench import regress; from hyperllama.cli import main\n"
        f"folder = Path({str(versions[0].folder.parent)!r})\n"
        "regress.install = lambda repository, ref, name, _: regress.Installation(name, folder / name)\nmain()"
    )

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, "bench", "regress", *arguments],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = command(
        "--base", "HEAD", "--only", "grad_norm csrc", "--no-resources", "--json", "--out", str(tmp_path / "r")
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["broken"] == ["grad_norm csrc"] and report["head"]["commit"] == "commit of head"
    assert json.loads((tmp_path / "r").read_text()) == report
    done = command("--base", "nothing")
    assert done.returncode == 2 and done.stderr.startswith("hyperllama: --base nothing: git knows no such commit")
