"""What can be chosen about random cells, and about the walkers that start from them?"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from ase.data import atomic_numbers
from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from shards.settings import Settings

__all__ = ["BuilderSettings", "MoleculeSettings", "SamplerSettings"]


def _ascending(value: tuple[Any, Any]) -> tuple[Any, Any]:
    if value[0] > value[1]:
        raise ValueError("must be [low, high] with low <= high")
    return value


def _elements(table: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(key for key in table if atomic_numbers.get(key, 0) < 1)
    if unknown:
        raise ValueError(f"not chemical symbols: {', '.join(unknown)}")
    return table


def _fractions(table: dict[str, float]) -> dict[str, float]:
    if abs(sum(table.values()) - 1) > 1e-6:
        raise ValueError(f"fractions must add up to 1, these add up to {sum(table.values()):.6g}")
    return table


def _weights(table: dict[str, float]) -> dict[str, float]:
    if not sum(table.values()) > 0:
        raise ValueError("at least one weight must be above 0")
    return table


def _composition_form(value: Any) -> str:
    return "word" if isinstance(value, str) else "fractions"


Kind = Literal["conformer", "normal_modes", "torsion", "dimer", "cluster", "box", "path"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
Range = Annotated[tuple[NotNegative, NotNegative], AfterValidator(_ascending)]
CountRange = Annotated[
    tuple[Annotated[int, Field(ge=1, le=10_000)], Annotated[int, Field(ge=1, le=10_000)]], AfterValidator(_ascending)
]
Fractions = Annotated[dict[str, NotNegative], AfterValidator(_elements), AfterValidator(_fractions)]
Composition = Annotated[
    Annotated[Literal["random"], Tag("word")] | Annotated[Fractions, Tag("fractions")],
    Discriminator(_composition_form),
]


class MoleculeSettings(Settings):
    """Molecules to start from, in place of random cells."""

    smiles: tuple[str, ...] = ()
    """The molecules, as SMILES, one connected molecule each. With none here and no `file`, random cells are built."""

    file: str = ""
    """More molecules: a text file whose lines begin with a SMILES (.smi), or an .sdf. A relative path is seen from the
    configuration's folder. Only who is bonded to whom is taken from it."""

    n_heavy: Annotated[
        tuple[Annotated[int, Field(ge=0, le=100)], Annotated[int, Field(ge=0, le=100)]], AfterValidator(_ascending)
    ] = (0, 8)
    """Range of the number of atoms that are not hydrogen; other molecules are left out. Start small and let a later
    campaign grow: the cost of a label grows with the third (density functional) to seventh power (CCSD(T)) of it."""

    fragments: bool = False
    """Cut molecules that are too large into all their connected parts that are not, capped with hydrogen."""

    per_size: Annotated[int, Field(ge=0)] = 0
    """Keep at most so many molecules of each number of heavy atoms, a random choice that stays as it is. 0: all."""

    ions_and_radicals: bool = False
    """Accept molecules that are charged or have unpaired electrons. The potential sees neither, so that the same
    geometry with another charge is noise to it: only for campaigns of one kind of them."""

    kinds: Annotated[dict[Kind, NotNegative], AfterValidator(_weights)] = Field(
        default={"conformer": 1.0, "normal_modes": 4.0}
    )
    """How often each kind of geometry is made, relative to each other: "conformer", "normal_modes", "torsion" (a
    single bond turned to a random angle), "dimer", "cluster", "box" (a periodic cell), "path" (between the sides of
    one of `reactions`). All begin at minima of a force field. Walkers in boxes follow the schedules of temperature and
    density: with wide ranges of both, a nanoreactor."""

    reactions: tuple[str, ...] = ()
    """Isomerisations for the kind "path": two molecules with >> between them, every atom with a map number, such as
    "[H:1][C:2]#[N:3]>>[C-:2]#[N+:3][H:1]"."""

    displacement_A: NotNegative = 0.05
    """Standard deviation of the coordinates in all kinds but normal_modes, A."""

    temperature_K: Range = (100.0, 1000.0)
    """Range of the temperature whose harmonic motion along the normal modes is drawn, K. Published: 600."""

    contact: PositiveRange = (0.65, 1.5)
    """Range of the closest contact in dimers and clusters, in sums of van der Waals radii; hydrogen bonds: 0.7."""

    cluster_size: Annotated[
        tuple[Annotated[int, Field(ge=2, le=100)], Annotated[int, Field(ge=2, le=100)]], AfterValidator(_ascending)
    ] = (3, 5)
    """Range of the number of molecules in a cluster."""

    box_size: CountRange = (8, 20)
    """Range of the number of molecules in a box."""

    box_density_g_cm3: PositiveRange = (0.3, 0.8)
    """Range of the density of a box, g/cm3. Molecules are put into it at random, so not too dense: walkers compress."""

    cut_molecules: Annotated[int, Field(ge=0, le=100)] = 2
    """What is kept of a box that a walker leaves: its most uncertain molecule with its nearest neighbours, so many
    molecules in all, without a cell. 0 keeps the box as it is, for a quantum code that treats periodic cells."""

    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of scaffolds (of acyclic molecules: formulas) set aside: no molecule of them, nor one of equal formula, is
    ever sampled. `smelt build --test` makes frames of them."""

    part: Literal["train", "test"] = "train"
    """Which molecules are built: "test" only to make a test set."""

    @model_validator(mode="after")
    def _paths_have_reactions(self) -> Self:
        if self.kinds.get("path") and not self.reactions:
            raise ValueError('kinds = { path = ... }: name the reactions in "reactions"')
        return self

    @property
    def given(self) -> bool:
        return bool(self.smiles or self.file)


class BuilderSettings(Settings):
    density_g_cm3: PositiveRange = (1.8, 4.05)
    """Range of the density of a random cell, g/cm3, drawn uniformly. Cover everything the potential shall be good
    for, from the expanded liquid to the compressed solid."""

    density_by_element_g_cm3: Annotated[dict[str, PositiveRange], AfterValidator(_elements)] = Field(default={})
    """For alloys of elements of different density: the range of each pure element, g/cm3, in place of
    density_g_cm3. The volume of a cell is the sum of its elements' volumes; one draw decides how dense all are."""

    n_atoms: CountRange = (55, 250)
    """Range of the number of atoms in a cell. Labels cost the cube of it: small cells for a demonstration."""

    minimum_distance_A: Annotated[float, Field(gt=0, le=10)] = 1.8
    """No two atoms of a random cell are closer than this, A, periodic images included. About 0.6 of the bond length."""

    minimum_distance_by_element_A: Annotated[dict[str, Positive], AfterValidator(_elements)] = Field(default={})
    """For elements of different size: the minimum distance between two atoms of each, A, in place of
    minimum_distance_A; unlike atoms keep the mean of their two."""

    composition: Composition = "random"
    """"random" draws every composition with the same probability, pure elements included; or a table of fractions
    that add up to 1, such as { Al = 0.25, Ni = 0.75 }."""

    shape_jitter: Annotated[float, Field(ge=0, le=0.3)] = 0.1
    """Random strain of the cubic cell before it is scaled to its density, largest component, dimensionless.
    0 keeps every cell cubic; 0.1 gives mildly triclinic ones, so that shear is in the data from the start."""

    molecules: MoleculeSettings = MoleculeSettings()
    """Molecules to start from, in place of random cells."""


class SamplerSettings(Settings):
    timestep_fs: Annotated[float, Field(gt=0, le=5)] = 1.0
    """Time step, fs. 1 suits metals; use <= 0.5 with hydrogen."""

    friction_per_ps: Annotated[float, Field(ge=0, le=1000)] = 2.0
    """Langevin friction, 1/ps. 0 is constant energy. 2 lets the temperature follow its schedule within 0.5 ps."""

    temperature_start_K: Range = (100.0, 5000.0)
    """Range of the temperature a walker starts at, K."""

    temperature_end_K: Range = (100.0, 5000.0)
    """Range of the temperature a walker drifts to until max_time_ps, K."""

    temperature_amplitude_K: Range = (0.0, 2000.0)
    """Range of the height of the temperature pulses on top of the drift, K."""

    temperature_period_ps: PositiveRange = (2.0, 50.0)
    """Range of the time from one temperature pulse to the next, ps."""

    density_end_factor: PositiveRange = (0.9, 1.1)
    """Range of the density a walker drifts to until max_time_ps, as a factor on the density it starts with."""

    density_amplitude_factor: Range = (0.0, 0.1)
    """Range of the height of the compression pulses on top of the drift, as a factor on the density at the start."""

    density_period_ps: PositiveRange = (0.5, 50.0)
    """Range of the time from one compression pulse to the next, ps."""

    max_time_ps: Annotated[float, Field(gt=0, le=1e6)] = 20.0
    """A walker that has not been stopped by then is given up, ps."""

    min_time_ps: NotNegative = 0.05
    """Committee disagreement stops a walker only after this time, ps, so that the random start itself is not all
    that is ever labeled. 0 accepts the start."""

    check_every: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Steps between checks of the committee spread and of the guards; temperature and density follow their schedules
    at the same rhythm. Forces of every member are computed at checks only."""

    force_mean_threshold_eV_A: Positive = 0.05
    """A walker stops when the standard deviation of the force components over the committee, mean over its cell,
    is above this, eV/A. The first knob: about the force error that is aimed at."""

    force_max_factor: Annotated[float, Field(ge=1)] = 3.0
    """... or when the largest one is above this factor times force_mean_threshold_eV_A."""

    energy_threshold_meV: NotNegative = 0.0
    """... or when the standard deviation of the total energy over the committee / sqrt(n_atoms) is above this, meV.
    0 is off: in periodic bulk it grows with the cell, and the force spread is the cleaner signal."""

    minimum_distance_A: NotNegative = 1.2
    """A walker ends, and its frame is dropped, when two atoms (periodic images included) are closer than this, A.
    Below every distance a quantum code should be asked about."""

    max_temperature_K: Positive = 20_000.0
    """A walker hotter than this has run away, K. Disordered starts release several thousand kelvin by themselves."""

    max_force_eV_A: Positive = 100.0
    """A walker with a larger force component, or one that is not finite, has run away, eV/A."""

    elevated_fraction: NotNegative = 0.5
    """When a walker runs away or comes too close, its last good frame is kept if the spread there was above this
    fraction of a threshold. 0 keeps all of them; a large number none."""

    on_timeout: Literal["none", "most_uncertain", "last"] = "none"
    """What a walker returns that reached max_time_ps: nothing, the frame that its committee was least sure of, or the
    last one. The former is most often of its hottest time; the last of a walker that cooled down is what it settled in,
    such as a crystal."""

    settle_steps: Annotated[int, Field(ge=0, le=1000)] = 10
    """Steps of capped steepest descent on the committee before the dynamics of a walker start: they take the edge
    off the worst contacts of a random cell. 0 is off."""

    settle_step_A: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Largest displacement of an atom in one step of that descent, A."""

    slots: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Walkers that advance together in one batch. One that ends is replaced at once."""

    walkers_per_task: Annotated[int, Field(ge=1)] = 32
    """Walkers that one sampling task runs before it returns and the next one loads a newer model."""

    skin_A: Annotated[float, Field(gt=0, le=3)] = 0.8
    """Neighbours are listed this far beyond the cutoff, A; the list is rebuilt when an atom has moved half of it."""

    duplicate_distance: NotNegative = 0.02
    """Two frames are near-duplicates when their fingerprints (mean and spread of the symmetry functions per element)
    differ by less than this, relative to their size. 0 keeps all but identical frames."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """Where the walkers run: cpu, cuda, cuda:1, ..."""

    @model_validator(mode="after")
    def _times_fit(self) -> Self:
        if self.min_time_ps >= self.max_time_ps:
            raise ValueError(f"min_time_ps = {self.min_time_ps} must be smaller than max_time_ps = {self.max_time_ps}")
        return self
