"""How do finished labels get from single files into the data sets, each exactly once?

A label is a file RUN/labels/<frame>.h5 from the moment its worker has published it. The driver records it in the
ledger, merges recorded ones into a shard of a data set, and only then removes the file. Each step can be cut off
by a crash and is completed by `reconcile`:

    file published, not recorded          -> recorded
    shard written, not in the manifest    -> overwritten by the next merge, which uses the same name
    shard in the manifest, not recorded   -> recorded
    merge recorded, files still there     -> removed
    file begun, its worker killed         -> removed when the next driver ends
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from campaign.ledger import Ledger
from shards.manifest import Manifest
from shards.outcome import Receipt
from shards.reader import ShardError, open_shard, read_receipt
from shards.schema import PARTIAL_SUFFIX
from shards.writer import merge_labels

__all__ = [
    "PARTS",
    "discard_unfinished",
    "label_path",
    "manifest_path",
    "merge",
    "published_label",
    "reconcile",
    "record_labels",
]

PARTS = {"train": False, "holdout": True}  # part of the data -> held out?


def label_path(run_dir: Path, frame: str) -> Path:
    return run_dir / "labels" / f"{frame}.h5"


def manifest_path(run_dir: Path, part: str) -> Path:
    return run_dir / "data" / part / "manifest.jsonl"


def published_label(run_dir: Path, frame: str, level: str) -> Receipt | None:
    """Receipt of a frame's label at this level of theory; None when there is no such file.

    Raises:
        ShardError: there is one that cannot be read. Its data are read in the merge.
    """
    path = label_path(run_dir, frame)
    if not path.is_file():
        return None
    receipt = read_receipt(path)
    return receipt if receipt.level == level else None


def record_labels(run_dir: Path, ledger: Ledger, frames: Iterable[str], level: str) -> None:
    """Record those of these frames whose label is there."""
    events: list[tuple[str, dict[str, Any]]] = []
    for frame in frames:
        try:
            receipt = published_label(run_dir, frame, level)
        except ShardError:
            continue  # the end of its task decides
        if receipt is not None:
            path = label_path(run_dir, frame).relative_to(run_dir).as_posix()
            events.append(("labeled", {"frame": frame, "receipt": asdict(replace(receipt, path=path))}))
    ledger.append_all(events)


def merge(run_dir: Path, ledger: Ledger) -> None:
    """Move all recorded labels into the data sets."""
    for part, holdout in PARTS.items():
        frames = list(ledger.replay.unmerged(holdout=holdout))
        if not frames:
            continue
        manifest = Manifest(manifest_path(run_dir, part))
        shard = manifest.path.with_name(f"labels-{len(manifest.receipts()) + 1:06d}.h5")
        receipt = merge_labels(shard, [label_path(run_dir, frame) for frame in frames])
        manifest.append(receipt)
        ledger.append("merged", part=part, receipt=_relative(receipt, run_dir), frames=frames)
        for frame in frames:
            label_path(run_dir, frame).unlink(missing_ok=True)


def reconcile(run_dir: Path, ledger: Ledger, level: str) -> None:
    """Complete whatever a former driver was doing with labels when it was killed."""
    for part in PARTS:
        for receipt in Manifest(manifest_path(run_dir, part)).receipts():
            relative = _relative(receipt, run_dir)
            if not ledger.replay.is_merged(relative["path"]):
                ledger.append("merged", part=part, receipt=relative, frames=open_shard(Path(receipt.path)).ids)
    published = list((run_dir / "labels").glob("*.h5"))
    record_labels(run_dir, ledger, [path.stem for path in published if ledger.replay.awaits(path.stem)], level)
    for path in published:
        if ledger.replay.is_known(path.stem) and not (
            ledger.replay.is_unmerged(path.stem) or ledger.replay.awaits(path.stem)
        ):
            path.unlink()


def discard_unfinished(run_dir: Path) -> None:
    """Remove what workers that were killed had begun to write. To be called when none is at work."""
    for path in (run_dir / "labels").glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def _relative(receipt: Receipt, run_dir: Path) -> dict[str, Any]:
    path = Path(receipt.path).resolve().relative_to(run_dir.resolve())
    return asdict(replace(receipt, path=path.as_posix()))
