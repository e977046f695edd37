"""`hyperllama bench`: what each command runs, JSON for machines, exit codes."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from hyperllama.bench import cli, cpu, merge

runner = CliRunner()


def test_a_command_prints_what_was_measured_as_json(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "hyperllama", "bench"]
    done = subprocess.run([*program, "data", "--quick", "--json"], capture_output=True, text=True, check=True)
    [results] = json.loads(done.stdout).values()
    assert [result["case"] for result in results["results"]] == ["tokenize", "loader"]
    for result in results["results"]:
        assert result["providers"]["ours"]["seconds"]["median"] > 0 and result["params"]["tokens"] > 0
    done = subprocess.run(
        [*program, "checkpoint", "--quick", "--out", str(tmp_path)], capture_output=True, text=True, check=True
    )
    [path] = tmp_path.glob("*/checkpoint.json")
    assert [result["case"] for result in json.loads(path.read_text())["results"]] == ["stall", "save", "restore"]
    assert "GB/s" in done.stdout


def test_every_program_is_there_and_takes_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = [program for part in cli.PARTS.values() for program in (*part.cpu, *part.gpu)]
    for program in programs:
        command = cli.command_of(program, True, Path("results"))
        module = import_module(command[2])
        monkeypatch.setattr(sys, "argv", ["bench", "--help"])
        with pytest.raises(SystemExit):
            module.main()
        told = capsys.readouterr().out
        options = [argument for argument in command[3:] if argument.startswith("--")]
        assert "--out" in options and all(option in told for option in options), (program, options)


def test_kernels_and_throughput_share_the_cpu_benchmark_and_grow_and_merge_that_of_folders() -> None:
    def names(part: str, known: list[str]) -> set[str]:
        arguments = cli.PARTS[part].cpu[0].arguments
        return {name for name in known if re.search(arguments[arguments.index("--only") + 1], name)}

    jobs = [job.name for job in (*cpu.op_jobs(), *cpu.step_jobs(False))]
    assert names("kernels", jobs) == {job.name for job in cpu.op_jobs()}
    assert names("throughput", jobs) == {job.name for job in cpu.step_jobs(False)}
    cases = [f"{method} {how}" for method in merge.METHODS for how in ("from the shell", "without start-up")]
    assert names("merge", [*cases, "grow", "start"]) == set(cases)
    assert names("grow", [*cases, "grow", "start"]) == {"grow", "start"}


def test_all_runs_every_part_and_ends_with_the_worst_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fake(command: list[str], **_: Any) -> SimpleNamespace:
        ran.append(command[2].rpartition(".")[2])
        return SimpleNamespace(returncode=int(ran[-1] == "merge"))

    monkeypatch.setattr(cli.subprocess, "run", fake)
    assert runner.invoke(cli.app, ["all", "--quick"]).exit_code == 1
    assert ran == ["cpu", "cpu", "throughput", "merge", "merge", "pipeline", "pipeline", "pipeline"]
    assert runner.invoke(cli.app, ["data"]).exit_code == 0


def test_a_missed_target_is_exit_code_1(tmp_path: Path) -> None:
    measured = {"median": 0.5, "low": None, "high": None}
    target = {"provider": "csrc", "against": "copy", "least": 0.8, "measured": measured, "met": False}
    result = {"case": "grad_norm", "params": {"shape": "1", "dtype": "float32"}, "targets": [target]}
    assert runner.invoke(cli.app, ["targets", "--results", str(tmp_path)]).exit_code == 0
    (tmp_path / "a.json").write_text(
        json.dumps({"date": "2000-01-01", "environment": {"device": "D"}, "results": [result]})
    )
    told = runner.invoke(cli.app, ["targets", "--results", str(tmp_path)])
    assert told.exit_code == 1 and "0 met, 1 missed" in told.output
    rows = json.loads(runner.invoke(cli.app, ["targets", "--results", str(tmp_path), "--json"]).output)
    [row] = [row for row in rows if row["met"] is not None]
    assert (row["measured"], row["met"], row["device"]) == (0.5, False, "D")
    assert runner.invoke(cli.app, ["targets", "--results", str(tmp_path / "none")]).exit_code == 1  # main makes it 2
