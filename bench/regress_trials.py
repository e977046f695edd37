"""What the regression gate is worth on this machine: trials of it on equal versions, and on one that is 5 % slower on purpose.

    python -m bench.regress_trials --work DIR --out FILE [--equal 40] [--slowed 20] [--minutes 8] [--seconds 40]

The working tree is installed twice, once; it stays in DIR. A trial is the gate itself (regress.py) on three of its cases, for at
most --seconds. In a slowed one head wastes 5 % of the time of one of them, in turn, by waiting. Run it again: it goes on where it
stopped, after --minutes at the latest. FILE has every trial with its ratios and, for both kinds, how many gave an alarm.
"""

import argparse
import datetime
import re
import sys
import time
from pathlib import Path
from typing import Any

from hyperllama.files import read_json, write_json

from .environment import environment
from .harness import Result, judgement, missed, outcome
from .regress import Gate, Installation, checkout, install
from .sequential import WORTH

CASES = ("adamw csrc", "attention forward+backward csrc", "step tiny")


def installed(work: Path) -> tuple[Installation, Installation]:
    """The working tree, twice."""
    base, head = Installation("base", work / "base"), Installation("head", work / "head")
    for version in (base, head):
        if not (version.library / "COMMIT").is_file():
            install(checkout(), None, version.name, work)
    return base, head


def trial(versions: tuple[Installation, Installation], slowed: str | None, seconds: float) -> dict[str, Any]:
    """One run of the gate: which case was slowed, which cases it found slower, and the ratios it saw."""
    only = re.compile("|".join(f"^{re.escape(case)}$" for case in CASES))
    base, head = versions
    gate = Gate(base, head, only, {slowed: WORTH} if slowed else {})
    began = time.monotonic()
    gate.run(seconds)
    report = gate.report()
    return {
        "slowed": slowed, "slower": report["slower"], "undecided": report["undecided"], "failed": gate.failures,
        "seconds": round(time.monotonic() - began, 1), "sweeps": gate.sweeps,
        "ratios": {name: [round(ratio, 4) for ratio in found.ratios] for name, found in gate.trials.items()},
    }  # fmt: skip


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Trials and alarms of both kinds; an alarm of another case than the slowed one counts as false."""
    equal, slowed = ([t for t in trials if bool(t["slowed"]) is kind] for kind in (False, True))
    return {
        "equal": {"trials": len(equal), "alarms": sum(bool(t["slower"]) for t in equal)},
        "slowed": {
            "trials": len(slowed), "caught": sum(t["slowed"] in t["slower"] for t in slowed),
            "false_alarms": sum(bool(set(t["slower"]) - {t["slowed"]}) for t in slowed),
        },
        "longest_seconds": max((t["seconds"] for t in trials), default=0.0),
    }  # fmt: skip


def judged(trials: list[dict[str, Any]]) -> list[Result]:
    """The two promises as targets: at most one false alarm in 40, at least 19 slowdowns of 20 caught."""
    found = summary(trials)
    equal, slowed = found["equal"], found["slowed"]
    shares = (
        ("equal", equal["trials"], equal["trials"] - equal["alarms"], "trials without an alarm", 39 / 40),
        ("slowed", slowed["trials"], slowed["caught"], "trials that catch it", 19 / 20),
    )
    return [
        outcome("gate", {"versions": kind, "trials": count}, "share", what, least, good / count)
        for kind, count, good, what, least in shares
        if count
    ]


def main() -> int:
    """Run trials of both kinds in turn; 1 when they break a promise: one false alarm of 40, one miss of 20."""
    parser = argparse.ArgumentParser(description="Try the regression gate on equal versions and on a slower one.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the two installations, kept")
    parser.add_argument("--out", type=Path, required=True, help="results file; trials that it has are not repeated")
    parser.add_argument("--equal", type=int, default=40, help="trials of equal versions (%(default)s)")
    parser.add_argument("--slowed", type=int, default=20, help="trials of a slower version (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no trial that could end later (%(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of a trial, at most (%(default)s)")
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes - given.seconds
    versions = installed(given.work)
    commit = (versions[0].library / "COMMIT").read_text(encoding="utf-8")
    trials: list[dict[str, Any]] = read_json(given.out)["trials"] if given.out.is_file() else []
    while time.monotonic() < until:
        found = summary(trials)
        wanted = {kind: getattr(given, kind) - found[kind]["trials"] for kind in ("equal", "slowed")}
        if max(wanted.values()) <= 0:
            break
        # both kinds advance together, so that a change of the machine meets both
        slow = wanted["slowed"] * max(given.equal, 1) > wanted["equal"] * max(given.slowed, 1) or wanted["equal"] <= 0
        trials.append(trial(versions, CASES[found["slowed"]["trials"] % len(CASES)] if slow else None, given.seconds))
        print({key: value for key, value in trials[-1].items() if key != "ratios"}, flush=True)
        about = {"date": datetime.date.today().isoformat(), "environment": environment(), "commit": commit}
        write_json(given.out, {**about, "summary": summary(trials), "results": judged(trials), "trials": trials})
    print(summary(trials), judgement(judged(trials)), sep="\n")
    return 1 if missed(judged(trials)) else 0


if __name__ == "__main__":
    sys.exit(main())
