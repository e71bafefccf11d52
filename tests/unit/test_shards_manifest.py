"""Manifests: every acknowledged receipt survives crashes and rivals, and stands for the shard it names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from shards_examples import LEVEL, example_rows

from shards import (
    AlteredShardError,
    Manifest,
    ManifestError,
    MissingShardError,
    Receipt,
    open_shard,
    write_frames,
    write_labels,
)


def shard(folder: Path, seed: int) -> Receipt:
    return write_labels(folder / f"shard-{seed}.h5", LEVEL, example_rows(2, seed))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest(tmp_path / "train" / "manifest.jsonl")


def test_a_manifest_that_does_not_exist_yet_is_empty(manifest: Manifest) -> None:
    assert manifest.receipts() == ()
    assert manifest.n_frames == 0
    assert list(manifest.shards()) == []


def test_receipts_come_back_in_order_and_open(manifest: Manifest, tmp_path: Path) -> None:
    receipts = [shard(tmp_path, seed) for seed in range(3)]
    assert [manifest.append(receipt) for receipt in receipts] == [True, True, True]
    assert [receipt.digest for receipt in manifest.receipts()] == [receipt.digest for receipt in receipts]
    assert [opened.digest for opened in manifest.shards()] == [receipt.digest for receipt in receipts]
    assert manifest.n_frames == 6


def test_a_whole_folder_can_be_moved(tmp_path: Path) -> None:
    here = tmp_path / "here"
    Manifest(here / "manifest.jsonl").append(shard(here, 0))
    assert json.loads((here / "manifest.jsonl").read_text())["path"] == "shard-0.h5"
    here.rename(tmp_path / "there")
    assert len(list(Manifest(tmp_path / "there" / "manifest.jsonl").shards())) == 1


def test_the_same_content_is_listed_once(manifest: Manifest, tmp_path: Path) -> None:
    receipt = shard(tmp_path, 0)
    copy = write_labels(tmp_path / "copy.h5", LEVEL, example_rows(2, 0))
    assert manifest.append(receipt)
    assert not manifest.append(receipt)
    assert not manifest.append(copy)
    assert manifest.n_frames == 2


def test_many_receipts_are_added_at_once_each_content_once(manifest: Manifest, tmp_path: Path) -> None:
    receipts = [shard(tmp_path, seed) for seed in range(3)]
    manifest.append(receipts[1])
    assert manifest.append_all([*receipts, receipts[2]]) == 2
    assert [receipt.digest for receipt in manifest.receipts()] == [receipts[index].digest for index in (1, 0, 2)]
    assert manifest.append_all(receipts) == 0


def test_of_many_receipts_none_is_added_when_one_is_wrong(manifest: Manifest, tmp_path: Path) -> None:
    receipts = [shard(tmp_path, seed) for seed in range(2)]
    with pytest.raises(AlteredShardError, match="its receipt says 1"):
        manifest.append_all([receipts[0], replace(receipts[1], n_bytes=1)])
    assert manifest.receipts() == ()


@pytest.mark.parametrize("tail", [b'{"path": "shard-9.h5", "ki', b"\0\0\0\0", b'{"path": "a\xff'])
def test_a_torn_last_line_is_passed_over_and_repaired(manifest: Manifest, tmp_path: Path, tail: bytes) -> None:
    manifest.append(shard(tmp_path, 0))
    with manifest.path.open("ab") as file:
        file.write(tail)
    assert manifest.n_frames == 2
    manifest.append(shard(tmp_path, 1))
    assert manifest.n_frames == 4
    assert all(json.loads(line) for line in manifest.path.read_text().splitlines())


def test_a_manifest_cut_anywhere_keeps_its_whole_lines(manifest: Manifest, tmp_path: Path) -> None:
    for seed in range(2):
        manifest.append(shard(tmp_path, seed))
    content = manifest.path.read_bytes()
    for n_bytes in range(len(content)):
        manifest.path.write_bytes(content[:n_bytes])
        assert len(manifest.receipts()) == content[:n_bytes].count(b"\n")


@pytest.mark.parametrize("line", ["not JSON", '{"path": "x"}', "[1]", '{"color": 1}', ""])
def test_a_bad_line_in_the_middle_is_named(manifest: Manifest, tmp_path: Path, line: str) -> None:
    manifest.append(shard(tmp_path, 0))
    with manifest.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ManifestError, match=r"manifest\.jsonl:2: not a receipt"):
        manifest.receipts()
    with pytest.raises(ManifestError, match=r"manifest\.jsonl:2: not a receipt"):
        manifest.append(shard(tmp_path, 1))


def test_receipts_of_missing_or_altered_files_are_named(manifest: Manifest, tmp_path: Path) -> None:
    receipt = shard(tmp_path, 0)
    manifest.append(receipt)
    with pytest.raises(MissingShardError, match=r"gone\.h5: no such file, but there is a receipt"):
        manifest.append(replace(receipt, path=str(tmp_path / "gone.h5")))
    with pytest.raises(AlteredShardError, match=r"shard-0\.h5: \d+ bytes, its receipt says 1"):
        manifest.append(replace(receipt, n_bytes=1))
    write_frames(Path(receipt.path), [example_rows(1)[0][0]])
    for verify in (True, False):
        with pytest.raises(AlteredShardError, match=r"shard-0\.h5: not the shard that .*manifest\.jsonl lists"):
            list(manifest.shards(verify=verify))
    Path(receipt.path).unlink()
    with pytest.raises(MissingShardError, match=r"shard-0\.h5: no such file"):
        list(manifest.shards())


APPENDER = """
import sys
from pathlib import Path
from shards import Manifest, open_shard
manifest = Manifest(Path(sys.argv[1]))
for path in sys.argv[2:]:
    manifest.append(open_shard(Path(path)).receipt())
"""


def test_appenders_in_parallel_lose_and_double_nothing(manifest: Manifest, tmp_path: Path) -> None:
    paths = [shard(tmp_path, seed).path for seed in range(16)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shares = (paths[:11], paths[5:])  # six of them are offered by both
    appenders = [
        subprocess.Popen([sys.executable, "-c", APPENDER, str(manifest.path), *share], env=environment)
        for share in shares
    ]
    assert [appender.wait(60) for appender in appenders] == [0, 0]
    listed = [receipt.digest for receipt in manifest.receipts()]
    assert sorted(listed) == sorted(open_shard(Path(path)).digest for path in paths)
