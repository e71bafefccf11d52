"""What becomes of frames that are sent to be labeled, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from pair_calculator import PairRepulsion

from labeler.config import LabelerSettings
from labeler.engine import MissingEngine
from labeler.stage import label, level
from shards.frame import Frame
from shards.outcome import FailureClass, Outcome
from shards.ranks import MPI_FOLDER
from shards.reader import open_shard
from shards.settings import SettingsError, parse_settings
from shards.writer import write_frames

ELEMENTS = ["Al"]


def crystal(repeat, seed=0):
    """A rattled fcc cell of `repeat` atoms in a row."""
    atoms = bulk("Al", "fcc", 4.0) * (repeat, 1, 1)
    atoms.rattle(0.1, seed=seed)
    return atoms


def frame_of(atoms):
    return Frame(atoms.numbers, atoms.positions, np.array(atoms.cell), atoms.pbc)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "calculators"))
    return tmp_path


def send(workplace, frames, settings, indices=None, **limits):
    write_frames(workplace / "frames.h5", frames)
    wanted = range(len(frames)) if indices is None else indices
    folders = workplace / "labels", workplace / "scratch"
    return label(workplace / "frames.h5", wanted, settings, ELEMENTS, *folders, **limits)


def settings_of(engine="emt", **fields):
    return parse_settings(LabelerSettings, {"engine": engine, **fields})


def faulty(fault, n_atoms=0, note="", **fields):
    arguments = {"fault": fault, "n_atoms": n_atoms, "note": str(note)}
    return settings_of("faulty_calculator.Faulty", arguments=arguments, **fields)


def only_failure(outcome):
    (failure,) = outcome.facts["failures"].values()
    return failure


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone, or gone between opening and reading
        return False


def wait_until(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_emt_labels_equal_those_of_ase_itself(workplace):
    atoms = [crystal(3, 1), crystal(4, 2)]
    outcome = send(workplace, [frame_of(each) for each in atoms], settings_of())
    assert outcome.failure is None
    assert len(outcome.receipts) == 2
    for each in atoms:
        shard = open_shard(workplace / "labels" / f"{frame_of(each).id}.h5")
        stored = shard.label(0)
        each.calc = EMT()
        assert stored.energy == each.get_potential_energy(force_consistent=True)
        assert stored.energy_extrapolated == each.get_potential_energy()
        np.testing.assert_array_equal(stored.forces, each.get_forces())
        np.testing.assert_array_equal(stored.stress, each.get_stress(voigt=False))
        assert shard.level == level(settings_of(), ELEMENTS)
        assert stored.seconds > 0
    assert not list((workplace / "scratch").iterdir())


def test_outcome_of_labels_survives_json(workplace):
    outcome = send(workplace, [frame_of(crystal(2))], faulty("fail"))
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == outcome


def test_labels_that_are_there_are_adopted_and_not_computed_again(workplace):
    frames = [frame_of(crystal(n)) for n in (2, 3, 4)]
    first = send(workplace, frames, settings_of(), indices=[0, 2])
    files = {path: path.stat().st_mtime_ns for path in (workplace / "labels").iterdir()}
    second = send(workplace, frames, settings_of(), indices=[0, 1, 2, 1])
    assert second.facts["adopted"] == 2
    assert set(second.facts["seconds"]) == {frames[1].id}
    assert len(second.receipts) == 3
    assert set(first.receipts) < set(second.receipts)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in files.items())


def test_damaged_label_is_computed_again(workplace):
    frame = frame_of(crystal(2))
    (receipt,) = send(workplace, [frame], settings_of()).receipts
    path = Path(receipt.path)
    path.write_bytes(path.read_bytes()[:-40])
    again = send(workplace, [frame], settings_of())
    assert again.facts["adopted"] == 0
    assert again.receipts[0].path == receipt.path
    assert len(open_shard(path)) == 1


def test_label_of_another_level_is_never_overwritten(workplace):
    frame = frame_of(crystal(2))
    (receipt,) = send(workplace, [frame], settings_of()).receipts
    before = Path(receipt.path).read_bytes()
    with pytest.raises(SettingsError, match=r"its level of theory is .* give each level its own folder"):
        send(workplace, [frame], faulty("have_one_energy"))
    assert Path(receipt.path).read_bytes() == before


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("segfault", "crash", "SIGSEGV"),
        ("be_killed", "memory", "SIGKILL"),
        ("leave", "crash", "exit code 3: the code has had enough"),
        ("fail", "crash", "the licence server did not answer"),
        ("fail_to_converge", "scf", "did not converge in 250 cycles"),
        ("go_on_unconverged", "scf", "converged = False"),
        ("give_nan", "bad_label", "forces not finite"),
        ("give_huge_energy", "bad_label", "max_energy_eV_per_atom"),
    ],
)
def test_frame_that_fails_is_classified_and_costs_no_other_its_label(workplace, fault, kind, message):
    frames = [frame_of(crystal(n)) for n in (2, 3, 4)]
    outcome = send(workplace, frames, faulty(fault, n_atoms=3))
    assert outcome.failure is None
    assert [Path(receipt.path).stem for receipt in outcome.receipts] == [frames[0].id, frames[2].id]
    assert list(outcome.facts["failures"]) == [frames[1].id]
    failure = only_failure(outcome)
    assert FailureClass(failure["kind"]) == kind
    assert message in failure["message"]
    assert Path(failure["log"]).is_file()


def test_memory_limit_turns_hunger_into_a_failure(workplace):
    outcome = send(workplace, [frame_of(crystal(2))], faulty("want_memory", memory_limit_GB=4.0))
    assert only_failure(outcome)["kind"] == "memory"


def test_code_without_free_energy_and_stress_gives_a_label_that_says_so(workplace):
    atoms = crystal(2)
    (receipt,) = send(workplace, [frame_of(atoms)], faulty("have_one_energy")).receipts
    stored = open_shard(Path(receipt.path)).label(0)
    atoms.calc = PairRepulsion()
    assert stored.energy == atoms.get_potential_energy()
    assert np.isnan(stored.energy_extrapolated)
    assert not stored.has_stress


def test_time_limit_ends_a_frame_and_all_its_processes_but_not_the_batch(workplace):
    frames = [frame_of(crystal(n)) for n in (2, 3)]
    note = workplace / "pids"
    outcome = send(workplace, frames, faulty("sleep", n_atoms=2, note=note, time_limit_min=0.1))
    failure = only_failure(outcome)
    assert failure["kind"] == "walltime"
    assert "killed after 6 s" in failure["message"]
    assert [Path(receipt.path).stem for receipt in outcome.receipts] == [frames[1].id]
    assert not any(alive(pid) for pid in json.loads(note.read_text()))


def test_frames_that_might_not_be_finished_by_the_deadline_are_handed_back(workplace):
    frames = [frame_of(crystal(n)) for n in (1, 2, 3, 4)]
    settings = faulty("nap", time_limit_min=0.1)
    outcome = send(workplace, frames, settings, deadline=time.time() + 6 + 2)
    done = [Path(receipt.path).stem for receipt in outcome.receipts]
    assert outcome.failure is None
    assert outcome.facts["failures"] == {}
    assert outcome.facts["postponed"]
    assert done + outcome.facts["postponed"] == [frame.id for frame in frames]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_labeler(workplace, number):
    note = workplace / "pids"
    write_frames(workplace / "frames.h5", [frame_of(crystal(2))])
    script = (
        # A shell starts background jobs with SIGINT ignored, and pytest may be one.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from labeler.stage import label\n"
        "from labeler.config import LabelerSettings; from shards.settings import parse_settings\n"
        "place = Path(sys.argv[1]); settings = parse_settings(LabelerSettings, eval(sys.argv[2]))\n"
        "label(place / 'frames.h5', [0], settings, ['Al'], place / 'labels', place / 'scratch')\n"
    )
    settings = faulty("sleep", note=note).model_dump(mode="json")
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(Path(label.__code__.co_filename).parents[1])])
    command = [sys.executable, "-c", script, str(workplace), repr(settings)]
    labeler = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
    try:
        wait_until(note.exists, limit_s=60)
        pids = json.loads(note.read_text())
        assert all(map(alive, pids))
        labeler.send_signal(number)
        labeler.wait(60)
    finally:
        labeler.kill()
    wait_until(lambda: not any(map(alive, pids)))


def test_codes_see_a_clean_environment(workplace, monkeypatch):
    for name in ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_JOB_ID", "PMI_SIZE", "GPAW_MPI_BACKEND", "SECRET"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("GPAW_SETUP_PATH", "/data")
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    note = workplace / "environment.json"
    send(workplace, [frame_of(crystal(2))], faulty("write_environment", note=note, environment={"VASP_PP_PATH": "/pp"}))
    seen = json.loads(note.read_text())
    assert not [name for name in seen if name.startswith(("PMIX", "OMPI_COMM", "SLURM", "PMI_")) or name == "SECRET"]
    assert "GPAW_MPI_BACKEND" not in seen
    assert seen[MPI_FOLDER].startswith("/tmp/smelt-")
    assert not Path(seen[MPI_FOLDER]).exists()  # its own, gone with it
    assert (seen["GPAW_SETUP_PATH"], seen["VASP_PP_PATH"], seen["OMP_NUM_THREADS"]) == ("/data", "/pp", "1")


def test_frames_that_no_code_should_see_are_refused_with_the_reason(workplace):
    close = Atoms("Al2", positions=[[0, 0, 0], [0, 0, 3.7]], cell=[4, 4, 4.0], pbc=True)  # 0.3 A through the boundary
    charged = Frame([13], [[0, 0, 0]], np.eye(3) * 4, True, charge=1)
    foreign = Frame([29], [[0, 0, 0]], np.eye(3) * 4, True)
    frames = [frame_of(close), charged, foreign]
    failures = send(workplace, frames, settings_of(minimum_distance_A=1.6)).facts["failures"]
    assert {failure["kind"] for failure in failures.values()} == {"geometry"}
    assert "0.300 A apart" in failures[frames[0].id]["message"]
    assert "charge 1" in failures[frames[1].id]["message"]
    assert "it holds Cu; elements are Al" in failures[frames[2].id]["message"]
    assert not (workplace / "scratch").exists()


def test_force_bound_refuses_a_label(workplace):
    outcome = send(workplace, [frame_of(crystal(2))], settings_of(max_force_eV_per_A=1e-3))
    assert "labeler.max_force_eV_per_A is 0.001" in only_failure(outcome)["message"]


@pytest.mark.parametrize("engine", ["no_such_code.Calculator", "ase.calculators.emt.NoSuchClass"])
def test_missing_engine_fails_the_whole_task_before_it_starts(workplace, engine):
    outcome = send(workplace, [frame_of(crystal(2))], settings_of(engine))
    assert outcome.failure.kind is FailureClass.MISSING
    assert "install the package that holds it, or correct the name" in outcome.failure.message


def test_missing_launcher_is_said_before_anything_starts():
    with pytest.raises(MissingEngine, match="launcher 'no-such-mpirun' is not on PATH"):
        level(settings_of("gpaw", ranks=2, launcher=["no-such-mpirun", "-n"]), ELEMENTS)


def test_process_that_cannot_start_fails_the_whole_task_at_once(workplace):
    outcome = send(workplace, [frame_of(crystal(n)) for n in (2, 3)], settings_of(environment={"PYTHONHOME": "/none"}))
    assert outcome.failure.kind is FailureClass.CRASH
    assert "before the first frame" in outcome.failure.message
    assert Path(outcome.failure.log).is_file()
    assert outcome.facts["failures"] == {}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"engine": "vasp"},
            'engine = \'vasp\': .*must be "gpaw", "emt", "pyscf", "composite" or a class by dotted name',
        ),
        ({"engine": "emt", "arguments": {"x": 1}}, "arguments are for calculators given by dotted name"),
        ({"engine": "emt", "ranks": 2}, "only the gpaw engine runs on several"),
        ({"gpaw": {"cutof_eV": 1}}, "labeler.gpaw.cutof_eV = 1: unknown key; did you mean cutoff_eV"),
        ({"gpaw": {"ladder": []}}, "labeler.gpaw.ladder"),
        ({"time_limit_min": 0}, "labeler.time_limit_min = 0: .*greater than 0"),
    ],
)
def test_impossible_settings_are_refused(table, message):
    with pytest.raises(SettingsError, match=message):
        parse_settings(LabelerSettings, table, "labeler")


def test_level_knows_what_changes_the_number_and_nothing_else(tmp_path):
    def digest(**fields):
        return level(settings_of("ase.calculators.lj.LennardJones", **fields), ELEMENTS).digest

    plain = digest(arguments={"sigma": 2.5})
    assert digest(arguments={"sigma": 2.6}) != plain
    assert digest(arguments={"sigma": 2.5}, time_limit_min=1.0, environment={"X": "1"}, max_force_eV_per_A=3.0) == plain


def test_file_in_the_arguments_is_known_by_its_content(tmp_path):
    digests = []
    for folder, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "Al.pot"
        path.write_text(content)
        digests.append(level(settings_of("ase.calculators.eam.EAM", arguments={"potential": str(path)}), ["Al"]).digest)
    assert digests[0] == digests[1] != digests[2]
