"""What set-up does when there is nothing to do, when something is missing, when a command fails; what doctor says."""

import importlib.util
import io
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from campaign import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/install.py, with its environment, stamps and logs in a temporary folder."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "install", module)
    spec.loader.exec_module(module)
    for name in ("ENVIRONMENT", "STAMPS", "LOGS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, name, tmp_path / name)
    return module


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_set_up_that_is_complete_does_nothing(install, capsys):
    for step in install.plan(project()):
        step.stamp.write_text(step.key)
    install.set_up(project())
    assert capsys.readouterr().out == ""


def test_changed_pin_repeats_only_the_steps_that_hang_on_it(install):
    for step in install.plan(project()):
        step.stamp.write_text(step.key)
    changed = project()
    changed["tool"]["smelt"]["horovod"]["version"] = "0.28.2"
    assert [step.name for step in install.plan(changed) if not step.is_done()] == ["horovod"]


def test_interrupted_step_is_taken_up_again(install):
    def interrupted(shell: object) -> None:
        raise KeyboardInterrupt

    done = []
    names = ("first", "second", "third")
    first, second, third = (
        install.Step(name, name, "key", lambda shell, name=name: done.append(name)) for name in names
    )
    install.plan = lambda table: [first, install.Step("second", "second", "key", interrupted), third]
    with pytest.raises(KeyboardInterrupt):
        install.set_up({})
    install.plan = lambda table: [first, second, third]
    install.set_up({})
    assert done == ["first", "second", "third"]


def test_missing_tools_are_named_with_their_packages(install, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(install.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(install.SetupError) as raised:
        install.check_machine()
    python = f"python3.{sys.version_info.minor}"
    assert str(raised.value) == (
        f"this machine lacks g++ (package g++), make (package make), Python.h (package {python}-dev)"
    )


def test_failing_command_shows_the_end_of_its_log(install):
    shell = install.Shell("compile", "compiling")
    with pytest.raises(install.SetupError, match="fatal: no space left") as raised:
        shell.run([sys.executable, "-c", "import sys; sys.exit('fatal: no space left')"])
    assert str(shell.log) in str(raised.value)


def test_what_a_make_above_says_does_not_reach_the_commands(install, monkeypatch, tmp_path):
    monkeypatch.setenv("MAKEFLAGS", "--jobserver-auth=3,4")
    shell = install.Shell("flags", "flags")
    shell.run([sys.executable, "-c", "import os; print(os.environ.get('MAKEFLAGS'))"])
    assert shell.log.read_text() == "None\n"


def test_every_dependency_is_pinned_exactly():
    table = project()["project"]
    pins = [*table["dependencies"], *(pin for extra in table["optional-dependencies"].values() for pin in extra)]
    assert all("==" in pin for pin in pins)
    assert len({pin.partition("==")[0] for pin in pins}) == len(pins)


def examine(monkeypatch: pytest.MonkeyPatch, *parts: doctor.Part) -> tuple[bool, list[str]]:
    monkeypatch.setattr(doctor, "PARTS", parts)
    stream = io.StringIO()
    healthy = doctor.examine(Console(file=stream, width=80))
    return healthy, stream.getvalue().splitlines()


def test_doctor_tells_missing_from_broken(monkeypatch):
    def absent(scratch: Path) -> str:
        raise ModuleNotFoundError("No module named 'horovod'")

    def broken(scratch: Path) -> str:
        raise RuntimeError("libmpi.so: cannot open")

    healthy, lines = examine(monkeypatch, doctor.Part("Horovod", absent), doctor.Part("MPI", broken))
    assert not healthy
    assert lines == [
        "missing Horovod   No module named 'horovod': run make setup",
        "BROKEN  MPI       libmpi.so: cannot open",
    ]


def test_optional_part_may_be_absent_but_not_broken(monkeypatch):
    def absent(scratch: Path) -> str:
        raise doctor.AbsentError("no g++ on PATH")

    def broken(scratch: Path) -> str:
        raise doctor.PartError("g++ ends with 1")

    assert examine(monkeypatch, doctor.Part("C++", absent, needed=False))[0]
    assert not examine(monkeypatch, doctor.Part("C++", broken, needed=False))[0]


def test_doctor_finds_this_environment_whole(monkeypatch):
    """All but GPAW and Parsl, which the tests of the labeler and of the campaign run for longer."""
    healthy, lines = examine(monkeypatch, *(part for part in doctor.PARTS if part.name not in ("GPAW", "Parsl")))
    assert healthy, lines
    assert any("ranks reduce: sum 3 of 2" in line for line in lines)
