"""Model files: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from potential.committee import Committee
from potential.config import PotentialSettings
from potential.model_file import ModelFileError, load_committee, read_metadata, save_committee
from potential.structures import Structures
from shards.frame import Frame

OLD_SAMPLE = Path(__file__).parent / "data" / "model-v1.safetensors"
TINY = PotentialSettings(
    radial_cutoff_A=4.0,
    angular_cutoff_A=3.0,
    first_shift_A=1.0,
    n_radial=3,
    n_angular_radial=2,
    n_angular=2,
    hidden=(4,),
    hidden_by_element={"Cu": (3, 2)},
    n_members=2,
)


def tiny_committee() -> Committee:
    committee = Committee.from_settings(TINY, ["Al", "Cu"], seed=7)
    committee.self_energies = torch.tensor([-1.25, 2.5], dtype=torch.float64)
    return committee


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_committee(tiny_committee(), path, {"level": "abc", "epochs": 3})
    return path


def test_committee_comes_back_bit_by_bit(path):
    saved, loaded = tiny_committee(), load_committee(path)
    assert (loaded.elements, loaded.aev, loaded.hidden) == (saved.elements, saved.aev, saved.hidden)
    assert torch.equal(loaded.self_energies, saved.self_energies)
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert loaded.dtype == torch.float32
    assert load_committee(path, dtype=torch.float64).dtype == torch.float64
    assert read_metadata(path) == {"level": "abc", "epochs": 3}


def test_digest_is_that_of_the_content_and_the_same_wherever_it_is_written(path, tmp_path):
    committee = tiny_committee()
    again = save_committee(committee, tmp_path / "again.safetensors", {"level": "abc", "epochs": 3})
    assert again == committee.digest == load_committee(path).digest
    assert save_committee(committee, tmp_path / "other.safetensors", {"level": "abd"}) != again
    assert len(again) == 32
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "again.safetensors",
        "model.safetensors",
        "other.safetensors",
    ]


def test_sample_of_version_1_gives_the_energies_it_was_made_with():
    """The file is never made again: every later version of smelt must read it."""
    committee = load_committee(OLD_SAMPLE, dtype=torch.float64)
    frame = Frame([13, 29, 13], [[0, 0, 0], [0, 0, 2.4], [2.1, 0.5, 0.3]])
    got = committee.evaluate(Structures.from_frames([frame], committee.elements), forces="none")
    assert got.energy_members[:, 0].tolist() == pytest.approx(read_metadata(OLD_SAMPLE)["energies_eV"], abs=1e-9)


@pytest.mark.parametrize("length", [0, 5, 40, 500, -1])
def test_truncated_file_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelFileError, match=str(path)):
        load_committee(path)


def test_altered_weights_are_refused(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="the file was altered"):
        load_committee(path)


def rewrite_header(path: Path, **changes) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    header = json.loads(table["__metadata__"]["smelt"]) | changes
    table["__metadata__"]["smelt"] = json.dumps(header)
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_other_version_is_refused(path):
    rewrite_header(path, format_version=2)
    with pytest.raises(ModelFileError, match="format version 2: this smelt reads version 1"):
        load_committee(path)


def test_weights_of_another_shape_than_the_header_says_are_refused(path):
    rewrite_header(path, hidden=[[5], [3, 2]])
    with pytest.raises(ModelFileError, match=r"damaged model file.*networks\.0"):
        load_committee(path)


def test_foreign_safetensors_and_missing_files_are_refused(tmp_path):
    import safetensors.torch

    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(ModelFileError, match="not a committee of smelt"):
        load_committee(foreign)
    with pytest.raises(ModelFileError, match="cannot be read: No such file"):
        load_committee(tmp_path / "missing.safetensors")
