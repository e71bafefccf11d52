"""What exactly is a rank asked to do? One JSON file that pins the data set, the settings and the seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from potential.config import PotentialSettings
from shards.files import write_atomically
from shards.manifest import Manifest
from shards.outcome import Receipt
from trainer.config import TrainerSettings, TransferSettings

__all__ = ["Job", "read_job", "write_job"]

# How the work is done, not what comes out: a training may be resumed with other values of these.
EXECUTION = {"ranks", "checkpoint_every_s", "jacobian_memory_GB", "memory_share", "max_epochs", "max_minutes"}


@dataclass(frozen=True)
class Job:
    """A training of `elements` on the shards of `receipts`, into the folder `dest`; start: a model file, or "".

    transfer: None unless the model of `start` is carried to another level. replay: shards to borrow forces from.
    """

    receipts: tuple[Receipt, ...]
    potential: PotentialSettings
    settings: TrainerSettings
    elements: tuple[str, ...]
    dest: Path
    seed: int
    start: str
    transfer: TransferSettings | None = None
    replay: tuple[Receipt, ...] = ()

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over everything that decides the result."""
        table = _table(self)
        for name in {"receipts", "replay"} & set(table):
            table[name] = [receipt["digest"] for receipt in table[name]]
        table["settings"] = self.settings.model_dump(mode="json", exclude=EXECUTION)
        del table["dest"]
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def of_manifest(
        cls,
        manifest: Path,
        potential: PotentialSettings,
        settings: TrainerSettings,
        elements: Sequence[str],
        dest: Path,
        seed: int,
        start: Path | None,
        transfer: TransferSettings | None = None,
        replay: Path | None = None,
    ) -> Job:
        """Pin the data set as it is now: the manifest may grow while the training runs."""
        receipts = Manifest(manifest.absolute()).receipts()
        warm = str(start.absolute()) if start is not None and settings.warm_start else ""
        borrowed = Manifest(replay.absolute()).receipts() if replay is not None else ()
        return cls(receipts, potential, settings, tuple(elements), dest.absolute(), seed, warm, transfer, borrowed)


def write_job(job: Job, path: Path) -> None:
    write_atomically(path, json.dumps(_table(job), indent=1).encode())


def read_job(path: Path) -> Job:
    table = json.loads(path.read_text(encoding="utf-8"))
    return Job(
        receipts=tuple(Receipt(**row) for row in table["receipts"]),
        potential=PotentialSettings.model_validate_json(json.dumps(table["potential"])),
        settings=TrainerSettings.model_validate_json(json.dumps(table["settings"])),
        elements=tuple(table["elements"]),
        dest=Path(table["dest"]),
        seed=table["seed"],
        start=table["start"],
        transfer=TransferSettings.model_validate_json(json.dumps(table["transfer"])) if table.get("transfer") else None,
        replay=tuple(Receipt(**row) for row in table.get("replay", ())),
    )


def _table(job: Job) -> dict[str, Any]:
    table = {
        "receipts": [asdict(receipt) for receipt in job.receipts],
        "potential": job.potential.model_dump(mode="json"),
        "settings": job.settings.model_dump(mode="json"),
        "elements": list(job.elements),
        "dest": str(job.dest),
        "seed": job.seed,
        "start": job.start,
    }
    if job.transfer is None:
        return table
    replay = [asdict(receipt) for receipt in job.replay]
    return table | {"transfer": job.transfer.model_dump(mode="json"), "replay": replay}
