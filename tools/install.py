"""How does a clean checkout become a working environment in .venv? Needs the standard library, g++ and make.

Every step leaves a stamp with what it was made from, written when the step is complete: a second run does only what
has changed, and a run that was interrupted goes on at the step it was in.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITECONFIG = ROOT / "tools" / "gpaw-siteconfig.py"
TOOLCHAIN = ROOT / "tools" / "horovod" / "toolchain.cmake"
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
STAMPS = ENVIRONMENT / ".setup"
LOGS = ROOT / "build" / "setup"  # outside .venv, which the first step empties
REPORT_EVERY_S = 30.0  # between two progress lines where there is no terminal


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


class Shell:
    """Run the commands of one step with their output in a log, showing how long it takes and how far it is."""

    def __init__(self, name: str, title: str) -> None:
        self.log = LOGS / f"{name}.log"
        self._title = title
        self._start = self._reported = time.monotonic()
        self.log.unlink(missing_ok=True)
        print(title, end=" ..." if sys.stdout.isatty() else " ...\n", flush=True)

    def run(self, command: list[str], **variables: str) -> None:
        """Raises SetupError, with the log's first errors and its path, when the command fails."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment() | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    self._report()
                    time.sleep(0.2)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._end_line()
                raise
        if process.returncode != 0:
            self._end_line()
            raise SetupError(f"{self._title} failed\n{self._reason()}\n  the whole log: {self.log}")

    def pip(self, *arguments: str, **variables: str) -> None:
        self.run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments], **variables)

    def finish(self) -> None:
        print(f"{self._again()} done, {self._elapsed()}", flush=True)

    def _reason(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        first = next(
            (i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), len(lines) - 5
        )
        return "\n".join(f"  {line.strip()}" for line in lines[max(first, 0) :][:5])

    def _report(self) -> None:
        share = re.findall(r"\[ *(\d+%)\]", self.log.read_text(errors="replace"))
        state = f"{share[-1] + ', ' if share else ''}{self._elapsed()}"
        if sys.stdout.isatty():
            print(f"{self._again()} ... {state}", end="", flush=True)
        elif time.monotonic() - self._reported >= REPORT_EVERY_S:
            self._reported = time.monotonic()
            print(f"{self._title} ... {state}", flush=True)

    def _end_line(self) -> None:
        if sys.stdout.isatty():
            print(flush=True)

    def _again(self) -> str:
        return f"\r\033[K{self._title}" if sys.stdout.isatty() else self._title

    def _elapsed(self) -> str:
        minutes, seconds = divmod(round(time.monotonic() - self._start), 60)
        return f"{minutes}:{seconds:02d}"


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    key: str  # digest of everything that the result depends on
    perform: Callable[[Shell], None]

    @property
    def stamp(self) -> Path:
        return STAMPS / self.name

    def is_done(self) -> bool:
        return self.stamp.is_file() and self.stamp.read_text() == self.key


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a running command too
    lock = os.open(ROOT, os.O_RDONLY)
    try:
        wait_for_turn(lock)
        set_up(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def wait_for_turn(lock: int) -> None:
    """Let one set-up of a checkout run at a time: the lock is held until this process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("set-up: waiting for another one in this checkout", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def set_up(project: dict[str, Any]) -> None:
    todo = [step for step in plan(project) if not step.is_done()]
    if not todo:
        return
    check_machine()
    LOGS.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(todo, start=1):
        shell = Shell(step.name, f"set-up {number}/{len(todo)}: {step.what}")
        step.perform(shell)
        shell.finish()
        STAMPS.mkdir(exist_ok=True)
        step.stamp.write_text(step.key)


def plan(project: dict[str, Any]) -> list[Step]:
    pins, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    horovod = project["tool"]["smelt"]["horovod"]
    torch = [pin for pin in pins if pin.startswith("torch==")]
    packages = [*pins, *extras["molecules"], *extras["horovod"], *extras["dev"]]
    kernels = ROOT / "potential" / "kernels"
    sources = [ROOT / "setup.py", *sorted([*kernels.glob("*.cpp"), *kernels.glob("*.h")])]
    distribution = (project["project"], project["tool"]["setuptools"])
    return [
        Step("environment", "Python environment", digest(sys.version, sys.base_prefix, ROOT), create_environment),
        Step("torch", torch[0], digest(torch), lambda shell: shell.pip("install", *torch)),
        Step("packages", f"{len(packages)} packages", digest(packages), lambda shell: shell.pip("install", *packages)),
        Step(
            "gpaw",
            extras["gpaw"][0],
            digest(extras["gpaw"], SITECONFIG),
            lambda shell: install_gpaw(shell, extras["gpaw"]),
        ),
        Step(
            "horovod",
            f"horovod=={horovod['version']}, built once in 3 to 8 minutes",
            digest(torch, horovod, TOOLCHAIN),
            lambda shell: install_horovod(shell, horovod),
        ),
        Step("smelt", "smelt", digest(*distribution, *sources), install_project),
    ]


def digest(*parts: object) -> str:
    """sha256 over values and, of files, contents."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.read_bytes() if isinstance(part, Path) and part.is_file() else repr(part).encode())
    return whole.hexdigest()


def check_machine() -> None:
    """Raises SetupError that names all that is missing, with the Debian packages that have it."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    missing = [f"{tool} (package {tool})" for tool in ("g++", "make") if shutil.which(tool) is None]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append(f"Python.h (package {python}-dev)")
    try:
        import ensurepip  # noqa: F401  Debian moves it from Python into python3-venv
    except ImportError:
        missing.append(f"Python's venv (package {python}-venv)")
    if missing:
        raise SetupError(f"this machine lacks {', '.join(missing)}")


def create_environment(shell: Shell) -> None:
    shell.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)])


def install_gpaw(shell: Shell, pins: list[str]) -> None:
    shell.pip("install", *[pin for pin in pins if pin.startswith("gpaw-data==")])
    # pip keeps the wheels it builds without regard to the siteconfig, so none may come from its cache.
    shell.pip("install", "--no-cache-dir", *pins, GPAW_CONFIG=str(SITECONFIG))


def install_project(shell: Shell) -> None:
    shell.pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def install_horovod(shell: Shell, horovod: dict[str, str]) -> None:
    """Install Horovod's wheel from the user's cache, where it is built when it is not there yet."""
    torch = python_says("import sys, torch; print(sys.implementation.cache_tag, torch.__version__, sep='-torch')")
    recipe = digest(horovod, TOOLCHAIN, sorted(horovod_choices().items()))[:8]
    folder = cache_folder() / f"horovod-{horovod['version']}-{torch}-{platform.machine()}-{recipe}"
    if not folder.exists():
        build_horovod(shell, horovod, folder)
    shell.pip("install", "--no-deps", "--force-reinstall", *map(str, folder.glob("*.whl")))
    python_says("import horovod.torch as hvd; assert hvd.mpi_built(), 'Horovod was built without MPI'")


def build_horovod(shell: Shell, horovod: dict[str, str], folder: Path) -> None:
    """Build the unmodified source distribution against the installed torch and MPI, and publish `folder` by rename.

    It is built for CPUs unless HOROVOD_GPU_OPERATIONS asks for more; all HOROVOD_ variables are handed on.
    """
    variables = {
        "CMAKE_TOOLCHAIN_FILE": str(TOOLCHAIN),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # Horovod's gloo asks for less, which CMake 4 refuses
        "MAKEFLAGS": f"-j{compile_jobs()}",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
        pin, made = Path(scratch, "horovod.txt"), Path(scratch, "made")
        pin.write_text(f"horovod=={horovod['version']} --hash=sha256:{horovod['sha256']}\n")
        # --no-cache-dir: pip would take a wheel that was built against another torch.
        options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", "horovod", "--verbose")
        shell.pip("wheel", *options, "-r", str(pin), "-w", str(made), **(variables | horovod_choices()))
        if not folder.exists():  # another checkout may have been faster
            made.rename(folder)


def horovod_choices() -> dict[str, str]:
    """What the user's environment says about how to build Horovod."""
    return {name: value for name, value in os.environ.items() if name.startswith("HOROVOD_")}


def compile_jobs() -> int:
    """As many as there are cores, as long as each has the 2 GB that torch's headers take."""
    memory_GB = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_GB / 2)))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smelt" / "wheels"


def python_says(program: str) -> str:
    """Run a program in the environment's Python. Raises SetupError, with the last line of its error, when it fails."""
    done = subprocess.run([str(PYTHON), "-c", program], cwd="/", env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"an installed package does not work: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def _environment() -> dict[str, str]:
    """This process's, with .venv first on PATH and without what a `make` above says to a `make` below."""
    kept = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return kept | {"PATH": f"{PYTHON.parent}:{os.environ['PATH']}"}


if __name__ == "__main__":
    sys.exit(main())
