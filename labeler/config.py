"""What can be chosen about labels: the engine, its level of theory, its limits, and what counts as a sane result?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from shards.settings import Settings

__all__ = ["CompositeSettings", "GpawRung", "GpawSettings", "LabelerSettings", "PyscfSettings"]

_NAMED = ("gpaw", "emt", "pyscf", "composite")


class GpawRung(Settings):
    """One way of reaching self-consistency. Nothing here changes the converged number."""

    eigensolver: Literal["ppcg", "davidson", "rmm-diis"] = "ppcg"
    """Iterative eigensolver: ppcg for speed, davidson when it fails."""
    mixer: Literal["msr1", "pulay"] = "msr1"
    """Density mixer: msr1 (multi-secant) for speed, pulay with small steps when it fails."""
    mixing: float = Field(default=0.05, gt=0, le=1)
    """Share of the new density in each step. Lower it against charge sloshing in long cells."""
    mixing_history: int = Field(default=10, ge=1, le=20)
    """Number of past densities that the mixer uses."""
    mixing_weight: float = Field(default=20.0, ge=1)
    """How much long-wavelength density changes count: 1 treats all alike, 20-100 suits metals."""
    max_steps: int = Field(default=100, ge=1)
    """SCF steps after which this rung is given up."""


class GpawSettings(Settings):
    """Plane-wave PAW calculations with GPAW."""

    xc: Literal["LDA", "PBE", "RPBE", "revPBE"] = "PBE"
    """Exchange-correlation functional, with PAW data sets of its own."""
    cutoff_eV: float = Field(default=340.0, ge=100, le=2000)
    """Plane-wave cutoff, eV. Raise it until forces and stress stop changing: 220-340 for Al, 500+ for O, N, 3d."""
    kpoint_spacing_per_A: float = Field(default=0.3, ge=0.05, le=5)
    """Largest distance between k-points, 1/A (2 pi included). Along axis i the gamma-centred mesh has
    ceil(|b_i| / spacing) points, so all cell shapes are sampled alike and small cells get many points.
    0.2-0.3 for metals; as large as 5 (gamma only) for insulators in big cells."""
    smearing_eV: float = Field(default=0.1, gt=0, le=1)
    """Width of the Fermi-Dirac occupation, eV. Part of the level of theory: a wider one needs fewer k-points and
    gives a different (free) energy."""
    energy_tolerance_eV: float = Field(default=1e-4, gt=0, le=1e-2)
    """SCF: largest change of the energy over three steps, eV per valence electron."""
    density_tolerance: float = Field(default=1e-4, gt=0, le=1e-2)
    """SCF: largest change of the density, electrons per valence electron. Forces follow this one."""
    eigenstates_tolerance_eV2: float = Field(default=1e-6, gt=0, le=1e-2)
    """SCF: largest residual of the wave functions, eV^2 per valence electron."""
    ladder: tuple[GpawRung, ...] = Field(
        default=(
            GpawRung(),
            GpawRung(mixer="pulay", mixing=0.02, mixing_weight=100.0, max_steps=200),
            GpawRung(eigensolver="davidson", mixer="pulay", mixing=0.01, mixing_weight=100.0, max_steps=400),
        ),
        min_length=1,
    )
    """Ways to reach self-consistency, tried in turn when the one before did not converge."""


class PyscfSettings(Settings):
    """Density-functional theory of molecules with PySCF. The defaults are the level of ANI-1x."""

    functional: str = "wb97x"
    """Exchange-correlation functional, by PySCF's name."""
    basis: str = "6-31g*"
    """Gaussian basis set, by PySCF's name."""
    cartesian: bool = True
    """Six d functions per shell in place of five, as Pople's basis sets are meant (and Gaussian does); it moves the
    energy of water in 6-31G* by 46 meV. false for Dunning's and Karlsruhe's sets."""
    density_fitting: bool = False
    """Fit the Coulomb and exchange integrals: about half the time from ten atoms on, energies off by about 1 meV."""
    grid_level: int = Field(default=3, ge=0, le=9)
    """Fineness of the integration grid. 3 for energies to 1 meV; 4-5 for meta-GGAs."""
    scf_tolerance_Ha: float = Field(default=1e-9, gt=0, le=1e-5)
    """SCF: largest change of the energy between two steps, hartree."""


class CompositeSettings(Settings):
    """The CCSD(T)*/CBS composite of ANI-1ccx with PySCF: energies only. Hartree-Fock and MP2 are extrapolated from
    cc-pVTZ and cc-pVQZ."""

    delta_basis: Literal["cc-pvdz", "cc-pvtz"] = "cc-pvtz"
    """Basis set of CCSD(T) - MP2. cc-pvtz is the published one; cc-pvdz is 20 times as fast for ethanol and about
    20 meV off."""
    hf_alpha: float = Field(default=5.46, gt=0)
    """Hartree-Fock approaches its limit as exp(-alpha sqrt(X)), X = 3, 4. Published: 5.46."""
    mp2_beta: float = Field(default=2.51, gt=0)
    """The correlation energy of MP2 approaches its limit as X^-beta. Published: 2.51."""
    scf_tolerance_Ha: float = Field(default=1e-9, gt=0, le=1e-5)
    """SCF: largest change of the energy between two steps, hartree."""
    ccsd_tolerance_Ha: float = Field(default=1e-7, gt=0, le=1e-5)
    """CCSD: largest change of the energy between two steps, hartree."""


class LabelerSettings(Settings):
    """How frames are labeled."""

    engine: str = "gpaw"
    """What computes: "gpaw", "pyscf" (density functionals for molecules), "composite" (CCSD(T)*/CBS for molecules),
    "emt" (ASE's effective medium theory, for tests), or any ASE calculator class by its dotted name, such as
    "tblite.ase.TBLite"."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments for a calculator given by dotted name. They are part of the level of theory; a file named
    here is known by the digest of its content, not by its place."""
    gpaw: GpawSettings = GpawSettings()
    """The level of theory when the engine is gpaw."""
    pyscf: PyscfSettings = PyscfSettings()
    """The level of theory when the engine is pyscf."""
    composite: CompositeSettings = CompositeSettings()
    """The level of theory when the engine is composite."""
    time_limit_min: float = Field(default=30.0, gt=0)
    """Wall time for one frame, all rungs of the ladder together, minutes. What runs longer is killed."""
    memory_limit_GB: float = Field(default=0.0, ge=0)
    """Address space of each process that computes, GB; 0 sets no limit."""
    ranks: int = Field(default=1, ge=1)
    """MPI ranks for each label. GPAW shares out its k-points over them; other engines run on one."""
    launcher: tuple[str, ...] = ("mpirun", "--oversubscribe", "--bind-to", "none", "-np")
    """Words before the number of ranks when there is more than one, or words in which {ranks} stands for it. A site's
    label.launcher takes their place."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for the process that computes, which otherwise sees only the few that it needs (PATH, HOME, ...)."""
    minimum_distance_A: float = Field(default=0.5, ge=0)
    """Frames with a shorter pair (periodic images included) are refused before any time is spent on them, A.
    About 0.6 of the bond length: 1.6 for Al, 0.6 with hydrogen."""
    max_force_eV_per_A: float = Field(default=100.0, gt=0)
    """A label with a larger force component is refused, eV/A."""
    max_energy_eV_per_atom: float = Field(default=1e5, gt=0)
    """A label whose energy per atom exceeds this in magnitude is refused, eV. The zero is the code's own: GPAW
    counts from free atoms (a few eV are normal), all-electron codes from bare nuclei (thousands are)."""
    keep_scratch: bool = False
    """Keep the scratch folders of labels that succeeded too; those of failures are always kept."""

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        words = engine.split(".")
        if engine not in _NAMED and (len(words) < 2 or not all(word.isidentifier() for word in words)):
            named = ", ".join(f'"{name}"' for name in _NAMED)
            raise ValueError(f'must be {named} or a class by dotted name ("ase.calculators.lj.LennardJones")')
        return engine

    @model_validator(mode="after")
    def _arguments_belong_to_dotted_engines(self) -> LabelerSettings:
        if self.arguments and self.engine in _NAMED:
            raise ValueError(f"arguments are for calculators given by dotted name; the engine is {self.engine}")
        if self.ranks > 1 and self.engine != "gpaw":
            raise ValueError(f"ranks = {self.ranks}: only the gpaw engine runs on several; the engine is {self.engine}")
        return self
