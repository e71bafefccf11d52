"""Is every part that smelt needs here, in which version, and does it work? Each is really used, not only imported."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms
from rich.console import Console
from rich.text import Text

from labeler.config import LabelerSettings
from labeler.engine import MissingEngine
from trainer.launch import DEFAULT_LAUNCHER, rank_environment

__all__ = ["AbsentError", "Finding", "Part", "PartError", "a_task", "examine", "findings", "show"]

RANKS = 2
PATIENCE_S = 120.0
HELLO = "from mpi4py import MPI; c = MPI.COMM_WORLD; print('sum', c.allreduce(c.rank + 1), 'of', c.size)"
ALL_REDUCE = """
import horovod.torch as hvd, torch
hvd.init()
total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), op=hvd.Sum)
print('sum', int(total), 'of', hvd.size())
"""


class PartError(Exception):
    """A part that does not work; the message says what is wrong and what to do."""


class AbsentError(PartError):
    """A part that is not installed."""


@dataclass(frozen=True)
class Part:
    name: str
    check: Callable[[Path], str]  # scratch folder -> what was found and done; raises when it does not work
    needed: bool = True
    remedy: str = "run make setup"


@dataclass(frozen=True)
class Finding:
    """What came out of a check."""

    name: str
    word: str  # ok | missing | BROKEN
    text: str
    healthy: bool


def examine(console: Console) -> bool:
    """Print one line per part; whether smelt can work: nothing is broken, and what may be absent is optional."""
    verdicts = [show(finding, console) for finding in findings(PARTS)]
    return all(verdicts)


def show(finding: Finding, console: Console, where: str = "") -> bool:
    """Print a finding, and return whether it is a healthy one."""
    style = {"ok": "green", "missing": "yellow"}.get(finding.word, "") if finding.healthy else "bold red"
    console.print(
        Text.assemble((f"{finding.word:8}", style), where, (f"{finding.name:10}", "bold"), finding.text), soft_wrap=True
    )
    return finding.healthy


def findings(parts: Iterable[Part]) -> Iterator[Finding]:
    """Check one part after the other, each in a scratch folder of its own."""
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="smelt-doctor-") as scratch:
            try:
                yield Finding(part.name, "ok", part.check(Path(scratch)), True)
            except (AbsentError, MissingEngine, ImportError) as error:
                yield Finding(part.name, "missing", f"{error}: {part.remedy}", not part.needed)
            except Exception as error:
                lines = str(error).strip().splitlines()
                yield Finding(part.name, "BROKEN", lines[0] if lines else type(error).__name__, False)


def _python(scratch: Path) -> str:
    return f"{sys.version.split()[0]}, {sys.executable}"


def _compiler(scratch: Path) -> str:
    if shutil.which("g++") is None:
        raise AbsentError("no g++ on PATH")
    source, program = scratch / "hello.cpp", scratch / "hello"
    source.write_text("int main() { return 0; }\n")
    _output(["g++", "-o", str(program), str(source)])
    _output([str(program)])
    return f"g++ {_output(['g++', '-dumpfullversion'])}, builds a program"


def _torch(scratch: Path) -> str:
    import torch

    if float(torch.ones(3, 3).matmul(torch.ones(3, 1)).sum()) != 9.0:
        raise PartError(f"{torch.__version__} multiplies wrongly")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {', '.join(devices) or 'CPU only'}, {torch.get_num_threads()} threads"


def _kernels(scratch: Path) -> str:
    import torch

    from potential.aev import AEVParameters
    from potential.config import PotentialSettings
    from potential.kernels import aev_forward, implementation, native_available, reference

    if not native_available():
        raise AbsentError("the C++ kernels were not built")
    parameters = AEVParameters.from_settings(PotentialSettings(), 1)
    vec, row = 4 * torch.rand(12, 3, dtype=torch.float64), torch.tensor([0, 12])
    species = torch.zeros(12, dtype=torch.int64)
    error = (
        (aev_forward(vec, row, species, parameters) - reference.aev_forward(vec, row, species, parameters)).abs().max()
    )
    if error > 1e-10:
        raise PartError(f"the {implementation(vec)} kernels are {error:.1e} off the plain PyTorch ones")
    return f"{implementation(vec)}, as the plain PyTorch ones to {error:.0e}"


def _mpi(scratch: Path) -> str:
    says = _on_ranks(HELLO, scratch)
    vendor = _python_says("from mpi4py import MPI; print(MPI.Get_library_version().split(',')[0])").replace("v", "")
    return f"{vendor}, mpi4py {_version('mpi4py')}, {RANKS} ranks add up: {says}"


def _horovod(scratch: Path) -> str:
    says = _on_ranks(ALL_REDUCE, scratch)
    return f"{_version('horovod')}, {RANKS} ranks reduce: {says}"


def _h5py(scratch: Path) -> str:
    import h5py

    with h5py.File(scratch / "file.h5", "w") as file:
        file["column"] = [1.0, 2.0]
    with h5py.File(scratch / "file.h5") as file:
        if file["column"][()].sum() != 3.0:
            raise PartError(f"{h5py.__version__} reads other numbers than it wrote")
    return f"{h5py.__version__} with HDF5 {h5py.version.hdf5_version}, writes and reads"


def _ase(scratch: Path) -> str:
    from ase import __version__
    from ase.build import bulk
    from ase.calculators.emt import EMT

    atoms = bulk("Al")
    atoms.calc = EMT()
    return f"{__version__}, EMT gives {atoms.get_potential_energy():.3f} eV for fcc Al"


def _gpaw(scratch: Path) -> str:
    from ase.build import bulk

    from labeler.config import GpawSettings
    from labeler.stage import level

    cheap = GpawSettings(cutoff_eV=150.0, kpoint_spacing_per_A=1.0)
    settings = LabelerSettings(gpaw=cheap, time_limit_min=PATIENCE_S / 60)
    data = len(level(settings, ["Al"]).data)
    return f"{_version('gpaw')}, {data} PAW data set, {_labeled(settings, bulk('Al', cubic=True), scratch)}"


def _pyscf(scratch: Path) -> str:
    from ase.build import molecule

    from labeler.config import PyscfSettings

    cheap = PyscfSettings(functional="lda,vwn", basis="sto-3g")
    settings = LabelerSettings(engine="pyscf", pyscf=cheap, time_limit_min=PATIENCE_S / 60)
    return f"{_version('pyscf')}, {_labeled(settings, molecule('H2O'), scratch)}"


def _tblite(scratch: Path) -> str:
    from ase.build import molecule

    settings = LabelerSettings(
        engine="tblite.ase.TBLite", arguments={"method": "GFN2-xTB", "verbosity": 0}, time_limit_min=PATIENCE_S / 60
    )
    return f"{_version('tblite')}, {_labeled(settings, molecule('H2O'), scratch)}"


def _rdkit(scratch: Path) -> str:
    from rdkit import Chem

    n_atoms = Chem.AddHs(Chem.MolFromSmiles("CO")).GetNumAtoms()
    return f"{_version('rdkit')}, counts {n_atoms} atoms in methanol"


def _parsl(scratch: Path) -> str:
    from campaign.pools import ParslPools
    from campaign.site import Site

    with ParslPools(Site(name="doctor"), scratch) as pools:
        pid = pools.submit("sample", a_task).result(PATIENCE_S)["pid"]
    return f"{_version('parsl')}, a worker (pid {pid}) ran a task"


def a_task() -> dict[str, int]:
    return {"pid": os.getpid()}


def _scratch(scratch: Path) -> str:
    (scratch / "file").write_bytes(b"\0" * 1_000_000)
    return f"{scratch.parent} is writable, {shutil.disk_usage(scratch).free / 1e9:.0f} GB free"


def _on_ranks(program: str, scratch: Path) -> str:
    """What rank 0 of a program says, which each rank says alike."""
    script = scratch / "program.py"
    script.write_text(program)
    command = [word.format(ranks=RANKS) for word in DEFAULT_LAUNCHER]
    environment = rank_environment(os.environ, RANKS, DEFAULT_LAUNCHER, str(scratch))
    lines = _output([*command, sys.executable, str(script)], environment).splitlines()
    expected = f"sum {sum(range(1, RANKS + 1))} of {RANKS}"
    if lines != [expected] * RANKS:
        raise PartError(f"{RANKS} ranks said {lines}, expected {expected!r} of each")
    return expected


def _python_says(program: str) -> str:
    return _output([sys.executable, "-c", program])


def _output(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise AbsentError(f"{command[0]} is not on PATH") from None
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip(" -")]
        raise PartError(f"{Path(command[0]).name} ends with {done.returncode}: {said[-1] if said else 'no message'}")
    return done.stdout.strip()


def _labeled(settings: LabelerSettings, atoms: Atoms, scratch: Path) -> str:
    """What a label costs and says, sent through the labeler as any other."""
    from labeler.stage import label
    from shards import open_shard, write_frames
    from shards.atoms import from_atoms

    frames = write_frames(scratch / "frames.h5", [from_atoms(atoms)])
    outcome = label(Path(frames.path), [0], settings, sorted(set(atoms.symbols)), scratch / "labels", scratch)
    failures = [failure["message"] for failure in outcome.facts.get("failures", {}).values()]
    if outcome.failure or failures:
        raise PartError(outcome.failure.message if outcome.failure else failures[0])
    result = open_shard(Path(outcome.receipts[0].path)).label(0)
    return f"{result.energy:.2f} eV for {atoms.symbols} in {result.seconds:.1f} s"


def _version(package: str) -> str:
    return importlib.metadata.version(package)


PARTS = (
    Part("Python", _python),
    Part("C++", _compiler, needed=False, remedy="needed to build, not to run (package g++)"),
    Part("torch", _torch),
    Part("kernels", _kernels, needed=False, remedy="plain PyTorch is used, several times slower; make setup with g++"),
    Part("MPI", _mpi),
    Part("Horovod", _horovod),
    Part("HDF5", _h5py),
    Part("ASE", _ase),
    Part("GPAW", _gpaw, needed=False, remedy='needed for labeler.engine = "gpaw" only'),
    Part("PySCF", _pyscf, needed=False, remedy="needed for molecules only"),
    Part("tblite", _tblite, needed=False, remedy="needed for GFN2-xTB labels only"),
    Part("RDKit", _rdkit, needed=False, remedy="needed to build molecules from SMILES only"),
    Part("Parsl", _parsl),
    Part("scratch", _scratch),
)
