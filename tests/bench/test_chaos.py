"""A short chaos test; `python -m bench.chaos` is the whole one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def chaos(*arguments: str, **environment: str) -> dict:
    command = [sys.executable, "-m", "bench.chaos", "--json", *arguments]
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | one_thread | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_disturbed_run_ends_in_the_bits_of_an_undisturbed_one():
    found = chaos("--kills", "4")
    assert found["kills"] >= 5 and found["kills_in_saves"] >= 1, "one of them in the run of two processes"
    assert (found["flips"], found["full_disks"], found["stopped_ranks"], found["problems"]) == (1, 1, 1, [])


def test_where_no_disk_can_be_mounted_a_limit_stands_in(tmp_path):
    found = chaos("--kills", "4", "--only-one", PATH=str(tmp_path))
    assert (found["tmpfs"], found["full_disks"], found["problems"]) == (False, 1, [])
