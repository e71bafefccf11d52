"""How many structures per second does one core take from a shard in shuffled batches?

Run: python -m benchmarks.batches. 20,000 structures of 54 to 162 atoms (mean 108), page cache warm, batches of 128 in
an order that is drawn anew for every turn. The peer reads the same columns through h5py, one structure at a time, which
is what a loader without a memory map does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from benchmarks.harness import Row, Times, compare, interleave, publish, settle
from benchmarks.machine import Machine
from shards import Frame, Label, Level, open_shard, write_labels

N_STRUCTURES, BATCH, N_PEER = 20_000, 128, 500
BYTES_PER_ATOM = 6 * 8 + 1


def rows() -> Iterator[tuple[Frame, Label]]:
    rng = np.random.default_rng(0)
    for n in rng.integers(54, 163, N_STRUCTURES):
        frame = Frame(np.full(n, 13), rng.normal(size=(n, 3)), np.eye(3) * 12, np.ones(3, dtype=bool))
        yield frame, Label(0.0, rng.normal(size=(n, 3)), np.eye(3))


def main() -> None:
    settle()
    machine = Machine.measure()
    order = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.h5"
        write_labels(path, Level("none", ""), list(rows()))
        shard = open_shard(path, verify=False)
        with h5py.File(path) as file:

            def ours() -> None:
                for batch in np.array_split(order.permutation(N_STRUCTURES), N_STRUCTURES // BATCH):
                    shard.gather(batch)

            def theirs() -> None:
                for i in order.integers(N_STRUCTURES, size=N_PEER):
                    start, stop = file["offset"][i : i + 2]
                    _ = [file[name][start:stop] for name in ("position_force", "number")]
                    _ = [file[name][i] for name in ("energy", "cell", "stress")]

            times = interleave({"peer": theirs, "ours": ours})
            _check(shard.gather(np.arange(40, 45)), file)
    per_structure = {"ours": Times(tuple(t / N_STRUCTURES for t in times["ours"].rounds))}
    per_structure["peer"] = Times(tuple(t / N_PEER for t in times["peer"].rounds))
    ratio, _ = compare(per_structure["peer"], per_structure["ours"])
    rates = sorted(1 / t for t in per_structure["ours"].rounds)
    floor = machine.seconds(n_bytes=2 * 108 * BYTES_PER_ATOM)
    publish(
        [
            Row(
                work="shuffled batches of structures from a shard, one core",
                value=rates[len(rates) // 2],
                unit="structures/s",
                at_least=150_000,
                aim=300_000,
                ours=f"{rates[len(rates) // 2]:,.0f}/s",
                peer=f"h5py {1 / per_structure['peer'].median:,.0f}/s ({ratio:.0f} x)",
                quartiles=(rates[1], rates[-2]),
                agreement="equal",
                roofline=floor / per_structure["ours"].median,
            )
        ]
    )


def _check(batch: object, file: h5py.File) -> None:
    low, high = file["offset"][40], file["offset"][45]
    both = np.hstack([batch.positions, batch.forces])  # type: ignore[attr-defined]
    assert np.array_equal(both, file["position_force"][low:high]), "the batch is not what is in the file"


if __name__ == "__main__":
    main()
