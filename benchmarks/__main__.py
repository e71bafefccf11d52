"""All comparisons with peers, one after the other, in one table: python -m benchmarks [NAME ...], or `make bench`.

Every script runs in a process of its own, the rows come back as JSON, and the table is kept with date and hardware
under benchmarks/results/.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import ROWS, Row
from benchmarks.machine import KNOWN, Machine, describe
from benchmarks.table import show

RESULTS = Path(__file__).with_name("results")
SCRIPTS: dict[str, list[str]] = {
    "md": ["benchmarks.md"],
    "md-memory-kept": ["benchmarks.md", "--memory-kept"],
    "training": ["benchmarks.training"],
    "molecules": ["benchmarks.molecules"],
    "walkers": ["benchmarks.walkers"],
    "batches": ["benchmarks.batches"],
    "neighbours": ["benchmarks.neighbours"],
    "threads": ["benchmarks.threads"],
    "ranks": ["benchmarks.ranks"],
}


def run(name: str, machine: str) -> list[Row]:
    print(f"{name} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = os.environ | threads | {ROWS: str(path), KNOWN: machine}
        subprocess.run([sys.executable, "-m", *SCRIPTS[name]], check=True, env=environment)
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def keep(rows: list[Row], facts: dict[str, Any]) -> Path:
    """Write JSON and table, and return the path of the table."""
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{facts['date']}-{'gpu' if facts['gpu'] != 'none' else 'cpu'}"
    document = {"facts": facts, "rows": [asdict(row) for row in rows]}
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = io.StringIO()
    show(rows, text, title(facts))
    stem.with_suffix(".txt").write_text(text.getvalue(), encoding="utf-8")
    return stem.with_suffix(".txt")


def title(facts: dict[str, Any]) -> str:
    rates = facts["machine"]
    return (
        f"{facts['date']}, {facts['cpu']} ({facts['instructions']}, {facts['cores']} cores, load {facts['load']:.1f}),"
        f" torch {facts['torch']}; one thread: {rates['flops'] / 1e9:.0f} GFLOP/s, {rates['bytes'] / 1e9:.0f} GB/s;"
        f" commit {facts['commit']}"
    )


def main(names: list[str]) -> None:
    if unknown := sorted(set(names) - set(SCRIPTS)):
        raise SystemExit(f"no benchmark {', '.join(unknown)}: there are {', '.join(SCRIPTS)}")
    machine = Machine.measure()
    load = os.getloadavg()[0]
    rows = [row for name in names or SCRIPTS for row in run(name, json.dumps(asdict(machine)))]
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    facts = describe() | {
        "date": datetime.date.today().isoformat(), "machine": asdict(machine), "load": load, "commit": commit
    }  # fmt: skip
    show(rows, sys.stdout, title(facts))
    if facts["gpu"] == "none":
        print("Rows that need a GPU are open: benchmarks/results/OPEN.md has the commands.")
    if not names:
        print(f"kept in {keep(rows, facts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
