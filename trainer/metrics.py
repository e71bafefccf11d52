"""How does one watch a training? Metrics on disk, in TensorBoard, and a bar where there is a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shards.files import write_atomically
from trainer.launch import TERMINAL

__all__ = ["Monitor"]

ERRORS = ("loss", "energy_meV_per_atom", "force_eV_per_A", "stress_GPa")


class Monitor:
    """Write each epoch to FOLDER/metrics.jsonl (one JSON object per line) and FOLDER/tensorboard.

    What an interrupted training wrote after its checkpoint, from `first_epoch` on, is dropped.
    """

    def __init__(self, folder: Path, first_epoch: int, max_epochs: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # only here: other ranks start without it

        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["epoch"] < first_epoch]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
        self._console = _console()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=self._console is None,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=max_epochs, completed=first_epoch, note="")
        self._bar.start()

    def record(self, row: dict[str, Any]) -> None:
        """Take one epoch: epoch, seconds, rates, and "train" and "valid" tables of lists over members."""
        self._file.write(json.dumps(row) + "\n")
        for phase in ("train", "valid"):
            for name in ERRORS:
                values = row[phase][name]
                for member, value in ((k, v) for k, v in enumerate(values) if v is not None):
                    self._board.add_scalar(f"{name}/{phase}/{member}", value, row["epoch"])
        for member, rate in enumerate(row["rates"]):
            self._board.add_scalar(f"learning_rate/{member}", rate, row["epoch"])
        energy, force = (_mean(row["valid"][name]) for name in ERRORS[1:3])
        self._bar.update(self._task, completed=row["epoch"] + 1, note=f"valid {energy:.1f} meV/atom, {force:.3f} eV/A")

    def close(self) -> None:
        self._bar.stop()
        self._board.close()
        self._file.close()


def _lines(path: Path) -> list[str]:
    """Return the whole lines; the last may have been cut by a crash."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _console() -> Console | None:
    if name := os.environ.get(TERMINAL):
        try:
            return Console(file=Path(name).open("w"), force_terminal=True)
        except OSError:  # the terminal is gone, or on another node
            return None
    return Console(stderr=True) if sys.stderr.isatty() else None


def _mean(values: list[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else math.nan
