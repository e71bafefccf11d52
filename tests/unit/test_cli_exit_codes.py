"""What a person or a script gets from the command line when something is wrong, and when it is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from campaign import cli
from shards import open_shard

EMT = """
[campaign]
name = "test"
elements = ["Al"]
[builder]
n_atoms = [2, 4]
[labeler]
engine = "emt"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "emt.toml"
    path.write_text(EMT)
    return path


def smelt(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, standard output, lines of standard error."""
    code = cli._run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_version_is_the_distribution_s(capsys):
    code, out, _ = smelt(capsys, "--version")
    assert (code, out) == (0, "smelt 0.1.0\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["smell"], "No such command 'smell'"),
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "nowhere.toml"], "nowhere.toml: no such file"),
        (["status", "nowhere"], "nowhere: not a run directory"),
        (["convert", "nowhere.h5", "there.xyz"], "nowhere.h5"),
        (["evaluate", "nowhere.safetensors", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, says):
    code, out, errors = smelt(capsys, *arguments)
    assert (code, out, len(errors)) == (2, "", 1)
    assert says in errors[0]


def test_faults_of_a_config_are_named_before_anything_starts(capsys, config, tmp_path):
    config.write_text(EMT.replace('name = "test"', "sead = 1").replace("[2, 4]", "[4, 2]"))
    code, _, errors = smelt(capsys, "run", config, "--run-dir", tmp_path / "run")
    assert code == 2
    assert [error.split(":")[1].split("=")[0].strip() for error in errors] == [
        "campaign.name",
        "campaign.sead",
        "builder.n_atoms",
    ]
    assert "did you mean seed?" in errors[1]
    assert not (tmp_path / "run").exists()


def test_missing_quantum_code_is_bad_input(capsys, config, tmp_path):
    config.write_text(EMT.replace('"emt"', '"nowhere.Calculator"'))
    code, _, errors = smelt(capsys, "run", config, "--run-dir", tmp_path / "run")
    assert code == 2
    assert "nowhere" in errors[0]
    assert not (tmp_path / "run").exists()


def test_shard_cut_in_half_is_bad_input(capsys, config, tmp_path):
    shard = tmp_path / "frames.h5"
    assert smelt(capsys, "build", config, shard, "--frames", "3")[0] == 0
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    code, _, errors = smelt(capsys, "label", config, shard, tmp_path / "labels")
    assert code == 2
    assert str(shard) in errors[0]


def test_labels_are_kept_and_counted_once(capsys, config, tmp_path):
    frames, labels = tmp_path / "frames.h5", tmp_path / "labels"
    smelt(capsys, "build", config, frames, "--frames", "2")
    assert smelt(capsys, "label", config, frames, labels, "--index", "1")[0] == 0
    assert smelt(capsys, "label", config, frames, labels)[0] == 0
    assert sorted(path.stem for path in labels.glob("*.h5")) == sorted(open_shard(frames).ids)
    assert len((labels / "manifest.jsonl").read_text().splitlines()) == 2


def test_failed_frame_is_exit_code_1_with_its_reason(capsys, config, tmp_path):
    frames = tmp_path / "frames.h5"
    smelt(capsys, "build", config, frames, "--frames", "1")
    config.write_text(EMT + "max_force_eV_per_A = 1e-9\n")
    code, out, errors = smelt(capsys, "label", config, frames, tmp_path / "labels")
    assert code == 1
    assert errors[-1] == "smelt: 1 of 1 frames failed"
    assert "bad_label" in out


def test_frame_that_is_not_there_is_refused_by_number(capsys, config, tmp_path):
    frames = tmp_path / "frames.h5"
    smelt(capsys, "build", config, frames, "--frames", "2")
    code, _, errors = smelt(capsys, "label", config, frames, tmp_path / "labels", "--index", "2")
    assert (code, errors) == (2, [f"smelt: --index 2: {frames} has frames 0 to 1"])


def test_bug_is_not_taken_for_bad_input(monkeypatch):
    def broken(*arguments: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("campaign.config.load_campaign", broken)
    with pytest.raises(KeyError):
        cli._run(["run", "any.toml"])


def test_interrupt_is_exit_code_130(monkeypatch, capsys):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("campaign.config.load_campaign", interrupted)
    code, _, errors = smelt(capsys, "run", "any.toml")
    assert (code, errors) == (130, ["smelt: interrupted; the same command goes on from here"])


def test_stage_verbs_run_without_parsl(config, tmp_path):
    program = f"""
import sys
sys.modules["parsl"] = None  # importing it would fail
from campaign.cli import _run
assert _run(["build", {str(config)!r}, {str(tmp_path / "frames.h5")!r}, "--frames", "1"]) == 0
assert _run(["label", {str(config)!r}, {str(tmp_path / "frames.h5")!r}, {str(tmp_path / "labels")!r}]) == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
