"""Are molecules what their SMILES say, and are test molecules really unknown to the training ones?"""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from ase.data import vdw_radii
from ase.neighborlist import natural_cutoffs, neighbor_list
from typer.testing import CliRunner

from campaign.cli import app
from campaign.config import load_campaign
from campaign.reference import CONFIGS
from potential.committee import Committee
from potential.config import PotentialSettings
from potential.model_file import save_committee
from sampler.batch import Walker
from sampler.config import BuilderSettings, MoleculeSettings, SamplerSettings
from sampler.cutting import cut_out
from sampler.engine import Tally, run_walkers
from sampler.geometries import molecule_frame, normal_modes
from sampler.molecules import conformer, draw_molecule, fragments, parse_molecule, read_library, split
from sampler.schedules import draw_schedule
from sampler.stage import build, sample
from shards.atoms import to_atoms
from shards.frame import Frame
from shards.reader import open_shard
from shards.schema import BOLTZMANN_eV_K, KCAL_MOL_eV
from shards.settings import SettingsError

pytestmark = pytest.mark.skipif(find_spec("rdkit") is None, reason="RDKit is not installed")

ELEMENTS = ("H", "C", "N", "O")
ACYCLIC = ("C", "N", "O", "CO", "C=O", "C=C", "CC", "CN", "C#N", "CCO", "COC", "CC=O", "NC=O")
SMILES = (*ACYCLIC, "C1CC1", "C1CO1", "CC1CC1")


def settings_of(**fields):
    return MoleculeSettings(**({"smiles": SMILES, "kinds": {"conformer": 1.0}} | fields))


def library_of(**fields):
    return read_library(ELEMENTS, settings_of(**fields))


@pytest.mark.parametrize(
    "smiles", ["[H][H]", "O", "[C-]#[O+]", "CC(=O)N", "c1ccoc1", "C1CC1", "[CH3]", "[NH4+]", "[H]"]
)
def test_frame_has_the_atoms_the_charge_and_the_bonds_of_its_smiles(smiles):
    from rdkit import Chem

    settings = settings_of(smiles=(smiles,), ions_and_radicals=True, displacement_A=0.02, test_fraction=0)
    frame = molecule_frame(read_library(ELEMENTS, settings), settings, seed=3)
    graph = Chem.AddHs(Chem.MolFromSmiles(parse_molecule(smiles).smiles))
    assert frame.numbers.tolist() == [atom.GetAtomicNum() for atom in graph.GetAtoms()]
    assert frame.charge == Chem.GetFormalCharge(graph)
    # All electrons that are not unpaired are in pairs.
    assert (frame.numbers.sum() - frame.charge - frame.spin) % 2 == 0
    assert not frame.pbc.any()
    atoms = to_atoms(frame)
    first, second = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.25))
    found = set(zip(first.tolist(), second.tolist(), strict=True))
    bonds = {(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in graph.GetBonds()}
    assert found == bonds | {(second, first) for first, second in bonds}


def test_frame_depends_on_its_seed_alone():
    library, settings = library_of(), settings_of()
    assert molecule_frame(library, settings, 5) == molecule_frame(library, settings, 5)
    assert len({molecule_frame(library, settings, seed).id for seed in range(20)}) == 20


def test_conformers_of_a_flexible_molecule_differ_beyond_their_displacement():
    settings = settings_of(smiles=("OCCCCO",), displacement_A=0.0, test_fraction=0)
    library = read_library(ELEMENTS, settings)
    ends = [molecule_frame(library, settings, seed).positions[[0, 5]] for seed in range(12)]
    lengths = [np.linalg.norm(first - last) for first, last in ends]
    assert max(lengths) - min(lengths) > 0.5


@pytest.mark.parametrize("test_fraction", [0.1, 0.3, 0.6])
def test_training_and_test_molecules_share_no_formula_and_no_ring_scaffold(test_fraction):
    molecules = [parse_molecule(smiles) for smiles in (*SMILES, "CC1CO1", "OC1CC1", "C=CC", "OC=C", "CC#N")]
    train, test = split(molecules, test_fraction)
    assert train
    assert test
    assert not {each.formula for each in train} & {each.formula for each in test}
    assert not {each.scaffold for each in train if each.scaffold} & {each.scaffold for each in test if each.scaffold}


def test_the_parts_of_a_library_are_disjoint_and_the_test_part_comes_from_the_command_line(tmp_path):
    train, test = library_of(test_fraction=0.3), library_of(test_fraction=0.3, part="test")
    assert not set(train) & set(test)
    config = tmp_path / "config.toml"
    (tmp_path / "list.smi").write_text("# molecules\n" + "\n".join(f"{smiles} name" for smiles in SMILES))
    config.write_text(
        '[campaign]\nname = "x"\nelements = ["H", "C", "N", "O"]\n'
        '[builder.molecules]\nfile = "list.smi"\ntest_fraction = 0.3\n'
    )
    assert load_campaign(config).builder.molecules.file == str(tmp_path / "list.smi")
    made = CliRunner().invoke(app, ["build", str(config), str(tmp_path / "test.h5"), "--frames", "30", "--test"])
    assert made.exit_code == 0, made.output
    counts = {tuple(np.bincount(frame.numbers, minlength=9)) for frame in open_shard(tmp_path / "test.h5").frames()}

    def formulas(library):
        frames = [molecule_frame([molecule], settings_of(), 0) for molecule in library]
        return {tuple(np.bincount(frame.numbers, minlength=9)) for frame in frames}

    assert counts <= formulas(test)
    assert not counts & formulas(train)


@pytest.mark.parametrize(("smiles", "n_modes"), [("O", 3), ("O=C=O", 4), ("[H][H]", 1), ("CCO", 21)])
def test_normal_modes_are_harmonic_and_as_many_as_there_are_inner_motions(smiles, n_modes):
    from rdkit.Chem import rdForceFieldHelpers

    mol = conformer(parse_molecule(smiles), np.random.default_rng(0))
    stiffness, modes = normal_modes(mol)
    assert modes.shape == (n_modes, mol.GetNumAtoms(), 3)
    np.testing.assert_allclose(np.linalg.norm(modes, axis=(1, 2)), 1.0)
    # Along the stiffest mode the energy rises by k a^2 / 2; 0.005 A is small enough for the third order to vanish.
    fields = rdForceFieldHelpers
    if fields.MMFFHasAllMoleculeParams(mol):
        field = fields.MMFFGetMoleculeForceField(mol, fields.MMFFGetMoleculeProperties(mol))
    else:
        field = fields.UFFGetMoleculeForceField(mol)
    start, step = np.array(mol.GetConformer().GetPositions()), 0.005 * modes[-1]
    before, middle, after = (field.CalcEnergy((start + k * step).ravel().tolist()) for k in (-1, 0, 1))
    assert (after + before - 2 * middle) * KCAL_MOL_eV == pytest.approx(stiffness[-1] * 0.005**2, rel=0.01)


def test_normal_modes_have_the_energy_of_their_temperature():
    """Harmonic motion has k T / 2 per mode; water in MMFF is nearly harmonic at 50 K."""
    settings = settings_of(smiles=("O",), kinds={"normal_modes": 1.0}, temperature_K=(50.0, 50.0), test_fraction=0)
    library = read_library(ELEMENTS, settings)
    mol = conformer(library[0], np.random.default_rng(0))
    from rdkit.Chem import rdForceFieldHelpers as Fields

    field = Fields.MMFFGetMoleculeForceField(mol, Fields.MMFFGetMoleculeProperties(mol))
    lowest = field.CalcEnergy()
    frames = [molecule_frame(library, settings, seed) for seed in range(300)]
    energies = [field.CalcEnergy(frame.positions.ravel().tolist()) - lowest for frame in frames]
    expected = 3 * 0.5 * BOLTZMANN_eV_K * 50.0 / KCAL_MOL_eV
    # The mean of 300 draws of three squares scatters by sqrt(2 / 900) = 5 %.
    assert np.mean(energies) == pytest.approx(expected, rel=0.2)


def test_torsions_turn_a_bond_and_keep_bond_lengths():
    settings = settings_of(smiles=("OCCO",), kinds={"torsion": 1.0}, displacement_A=0.0, test_fraction=0)
    frames = [molecule_frame(read_library(ELEMENTS, settings), settings, seed) for seed in range(30)]
    lengths = [np.linalg.norm(frame.positions[1] - frame.positions[2]) for frame in frames]
    assert max(lengths) - min(lengths) < 0.05
    angles = np.array([to_atoms(frame).get_dihedral(0, 1, 2, 3) for frame in frames])
    assert len(np.unique(np.round(angles / 30))) > 5


@pytest.mark.parametrize(("kind", "sizes"), [("dimer", {2}), ("cluster", {3, 4})])
def test_neighbours_touch_as_closely_as_asked(kind, sizes):
    settings = settings_of(
        smiles=("O",), kinds={kind: 1.0}, displacement_A=0.0, contact=(0.8, 0.8), cluster_size=(3, 4), test_fraction=0
    )
    library = read_library(ELEMENTS, settings)
    frames = [molecule_frame(library, settings, seed) for seed in range(12)]
    assert {frame.n_atoms // 3 for frame in frames} == sizes
    for frame in frames:
        molecule_of_atom = np.arange(frame.n_atoms) // 3
        distances = np.linalg.norm(frame.positions[:, None] - frame.positions, axis=2)
        radii = vdw_radii[frame.numbers]
        relative = distances / (radii[:, None] + radii)
        others = molecule_of_atom[:, None] != molecule_of_atom
        assert relative[others].min() == pytest.approx(0.8)
        touching = [(relative[k * 3 : k * 3 + 3][:, molecule_of_atom < k]).min() for k in range(1, frame.n_atoms // 3)]
        assert touching == pytest.approx([0.8] * len(touching))


def test_box_has_its_density_and_molecules_that_keep_their_distance():
    settings = settings_of(
        smiles=("O", "C"),
        kinds={"box": 1.0},
        displacement_A=0.0,
        box_size=(8, 8),
        box_density_g_cm3=(0.6, 0.6),
        contact=(0.8, 1.0),
        test_fraction=0,
    )
    frame = molecule_frame(read_library(ELEMENTS, settings), settings, 4)
    atoms = to_atoms(frame)
    assert frame.pbc.all()
    # amu / A^3 in g/cm^3, https://physics.nist.gov/cuu/Constants/
    assert atoms.get_masses().sum() / atoms.get_volume() * 1.66053907 == pytest.approx(0.6)
    first, second, distance = neighbor_list("ijd", atoms, 4.0)
    closest = distance / (vdw_radii[frame.numbers[first]] + vdw_radii[frame.numbers[second]])
    bonds = neighbor_list("i", atoms, natural_cutoffs(atoms, mult=1.25))
    n_molecules = frame.n_atoms - len(bonds) / 2  # trees
    assert n_molecules == 8
    # Between bonded distances (up to H-H in methane, 0.75) and contacts nothing is left but the contacts.
    assert not ((closest > 0.77) & (closest < 0.8)).any()


def test_cut_is_the_most_uncertain_molecule_with_its_nearest_neighbours():
    edge, water = 12.0, np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    # The second lies across the boundary; its nearest is the third, in the next cell.
    places = np.array([[4.0, 4.0, 4.0], [11.8, 6.0, 6.0], [2.2, 6.0, 6.0], [7.0, 10.0, 1.0]])
    positions = (np.concatenate([water + place for place in places])) % edge
    frame = Frame(np.tile([8, 1, 1], 4), positions, edge * np.eye(3), np.ones(3, dtype=bool))
    uncertainty = np.repeat([0.1, 0.5, 0.2, 0.3], 3)
    cut = cut_out(frame, uncertainty, 2)
    assert not cut.pbc.any()
    assert cut.numbers.tolist() == [8, 1, 1] * 2
    distances = np.linalg.norm(cut.positions[:, None] - cut.positions, axis=2)
    expected = np.concatenate([water + places[1], water + places[2] + [edge, 0, 0]])
    np.testing.assert_allclose(distances, np.linalg.norm(expected[:, None] - expected, axis=2), atol=1e-9)
    assert cut_out(frame, uncertainty, 9).n_atoms == 12


def test_cut_with_an_odd_electron_is_dropped():
    frame = Frame(np.array([8, 1]), np.array([[1.0, 1, 1], [1.97, 1, 1]]), 9 * np.eye(3), np.ones(3, dtype=bool))
    assert cut_out(frame, np.ones(2), 1) is None


def test_walkers_in_boxes_leave_dimers(tmp_path):
    potential = PotentialSettings(
        radial_cutoff_A=4.0, angular_cutoff_A=3.0, n_radial=4, n_angular_radial=2, n_angular=2, hidden=(8,), n_members=3
    )
    save_committee(Committee.from_settings(potential, ELEMENTS, seed=1), tmp_path / "model.safetensors", {})
    molecules = settings_of(smiles=("O",), kinds={"box": 1.0}, box_size=(4, 6), test_fraction=0)
    sampler = SamplerSettings(
        timestep_fs=0.25, slots=4, check_every=5, min_time_ps=0.0, max_time_ps=0.02, minimum_distance_A=0.5,
        force_mean_threshold_eV_A=1e-4, temperature_start_K=(300.0, 300.0), settle_steps=0,
    )  # fmt: skip
    builder = BuilderSettings(molecules=molecules)
    sample(tmp_path / "model.safetensors", builder, sampler, 4, 5, tmp_path / "a.h5")
    frames = list(open_shard(tmp_path / "a.h5").frames())
    assert frames
    assert all(sorted(frame.numbers) == [1, 1, 1, 1, 8, 8] and not frame.pbc.any() for frame in frames)
    assert {frame.origin.kind for frame in frames} == {"walker"}


def test_nanoreactor_heats_and_compresses_boxes_of_molecules():
    config = load_campaign(CONFIGS / "nanoreactor-gfn2.toml")
    settings = config.builder.molecules.model_copy(update={"kinds": {"box": 1.0}})
    library = read_library(ELEMENTS, settings)
    committee = Committee.from_settings(config.potential, ELEMENTS, seed=1).to(torch.float32)
    # Every walker goes on to the end of its schedule, and leaves the last box.
    never = {"force_mean_threshold_eV_A": 1e6, "energy_threshold_meV": 0.0, "max_force_eV_A": 1e6}
    never |= {"max_temperature_K": 1e6, "minimum_distance_A": 0.0}
    blind = config.sampler.model_copy(
        update=never | {"max_time_ps": 0.1, "on_timeout": "most_uncertain", "settle_steps": 0}
    )
    starts = {seed: molecule_frame(library, settings, seed) for seed in range(8)}
    walkers = [Walker(seed, start, draw_schedule(blind, seed)) for seed, start in starts.items()]
    ends = list(run_walkers(iter(walkers), committee, blind, tally=Tally()))
    factors = {}
    for end in ends:
        frame, start = end.frame, starts[end.frame.origin.seed]
        assert frame.pbc.all()
        schedule = draw_schedule(blind, frame.origin.seed)
        factors[frame.origin.seed] = start.volume_A3 / frame.volume_A3
        assert factors[frame.origin.seed] == pytest.approx(schedule.density_factor(frame.origin.time_fs), rel=1e-3)
        assert sorted(frame.numbers) == sorted(start.numbers)
    assert len(factors) == len(starts)
    assert min(factors.values()) < 1.1
    assert max(factors.values()) > 2.5


HCN = "[H:1][C:2]#[N:3]>>[C-:2]#[N+:3][H:1]"


def test_points_of_a_path_lead_from_one_side_of_a_reaction_to_the_other():
    settings = settings_of(
        smiles=("C", "C#N"), kinds={"path": 1.0}, reactions=(HCN,), displacement_A=0.0, test_fraction=0
    )
    library = read_library(ELEMENTS, settings)
    frames = [molecule_frame(library, settings, seed) for seed in range(25)]
    assert all(frame.numbers.tolist() == [1, 6, 7] for frame in frames)
    to_carbon, to_nitrogen = (
        np.array([np.linalg.norm(frame.positions[0] - frame.positions[other]) for frame in frames]) for other in (1, 2)
    )
    # Hydrogen is bonded to carbon at one end, to nitrogen at the other, and never lost or pressed on either between.
    assert to_carbon.min() < 1.3 < to_carbon.max()
    assert to_nitrogen.min() < 1.3 < to_nitrogen.max()
    assert np.minimum(to_carbon, to_nitrogen).max() < 2.2
    assert np.minimum(to_carbon, to_nitrogen).min() > 0.9


@pytest.mark.parametrize(
    ("reaction", "words"),
    [
        ("C", "must be two molecules"),
        ("[H:1][C:2]#[N:3]>>[C-:2]#[NH+:3]", "every atom, hydrogen included, needs a map number"),
        ("[H:1][Cl:2]>>[Cl:2][H:1]", "holds Cl"),
        ("[H:1][C:2]#[N:3]>>[H:1].[C:2]#[N:3]", "is not one molecule"),
        ("[H:1][O:2][H:3]>>[H:3][O:2][H:1]", "formula H2O is set aside for tests"),
    ],
)
def test_impossible_reactions_are_named(reaction, words):
    settings = settings_of(reactions=(reaction,), kinds={"path": 1.0}, test_fraction=0.2)
    with pytest.raises(SettingsError, match=words):
        read_library(ELEMENTS, settings)


def test_kinds_are_mixed_by_their_weights():
    settings = settings_of(smiles=("O",), kinds={"conformer": 3.0, "dimer": 1.0, "torsion": 0.0}, test_fraction=0)
    library = read_library(ELEMENTS, settings)
    n_dimers = sum(molecule_frame(library, settings, seed).n_atoms == 6 for seed in range(200))
    # 50 expected, with a standard deviation of 6.
    assert 30 < n_dimers < 70


def test_fragments_of_ethyl_acetate_are_its_connected_parts():
    found = {each.smiles for each in fragments(parse_molecule("CCOC(C)=O"), 2)}
    assert found == {"C", "O", "CC", "CO", "C=O"}


def test_large_molecules_count_by_their_fragments():
    library = library_of(smiles=("CCCCCCCCO",), fragments=True, n_heavy=(1, 2), test_fraction=0)
    assert [each.smiles for each in library] == ["C", "O", "CC", "CO"]


def test_sizes_are_kept_in_range_and_thinned_to_the_same_choice():
    library = library_of(n_heavy=(2, 3), per_size=2, test_fraction=0)
    assert [each.n_heavy for each in library] == [2, 2, 3, 3]
    assert library == library_of(n_heavy=(2, 3), per_size=2, test_fraction=0)
    assert set(library) < set(library_of(n_heavy=(2, 3), per_size=3, test_fraction=0))


def test_every_size_is_drawn_alike():
    stream = np.random.default_rng(0)
    library = library_of(test_fraction=0)
    drawn = np.bincount([draw_molecule(library, stream).n_heavy for _ in range(3000)])[1:]
    # Three standard deviations of 3000 draws over four sizes.
    assert np.abs(drawn - 750).max() < 3 * np.sqrt(3000 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"smiles": ("C1CC",)}, r"builder\.molecules\.smiles: 'C1CC': not a molecule"),
        ({"smiles": ("CCl",)}, "'CCl': holds Cl: not among the elements H, C, N, O"),
        ({"smiles": ("C.O",)}, "'C.O': several molecules"),
        ({"smiles": ("[OH-]",)}, "charge -1, 0 unpaired electrons: the potential sees neither"),
        ({"smiles": ("[CH3]",)}, "charge 0, 1 unpaired electrons"),
        ({"n_heavy": (40, 50)}, "no molecule is left to train on, of 16 given and 0 of 40 to 50 heavy atoms"),
        ({"smiles": (), "file": "/nowhere.smi"}, "no such file"),
    ],
)
def test_impossible_molecules_are_named(fields, words):
    with pytest.raises(SettingsError, match=words):
        library_of(**fields)


def test_line_of_a_file_is_named(tmp_path):
    (tmp_path / "list.smi").write_text("C methane\n\nnonsense\n")
    with pytest.raises(SettingsError, match=r"list\.smi:3: 'nonsense'"):
        library_of(file=str(tmp_path / "list.smi"))


def test_sdf_is_read(tmp_path):
    from rdkit import Chem

    with Chem.SDWriter(str(tmp_path / "two.sdf")) as writer:
        for smiles in ("CO", "CC#N"):
            writer.write(Chem.MolFromSmiles(smiles))
    library = library_of(smiles=(), file=str(tmp_path / "two.sdf"), test_fraction=0)
    assert [each.smiles for each in library] == ["CO", "CC#N"]


def test_walkers_start_from_molecules_and_leave_molecules(tmp_path):
    potential = PotentialSettings(
        radial_cutoff_A=4.0, angular_cutoff_A=3.0, n_radial=4, n_angular_radial=2, n_angular=2, hidden=(8,), n_members=3
    )
    save_committee(Committee.from_settings(potential, ELEMENTS, seed=1), tmp_path / "model.safetensors", {})
    builder = BuilderSettings(molecules=settings_of())
    assert build(ELEMENTS, builder, 5, 1, tmp_path / "starts.h5").facts["n_frames"] == 5
    sampler = SamplerSettings(
        timestep_fs=0.25, slots=4, check_every=5, min_time_ps=0.0, max_time_ps=0.02, minimum_distance_A=0.5,
        force_mean_threshold_eV_A=1e-4, temperature_start_K=(300.0, 300.0), temperature_end_K=(1000.0, 1000.0),
    )  # fmt: skip
    outcome = sample(tmp_path / "model.safetensors", builder, sampler, 8, 5, tmp_path / "a.h5")
    frames = list(open_shard(tmp_path / "a.h5").frames())
    assert outcome.facts["walkers"] == 8
    assert len(frames) > 0
    known = {tuple(sorted(molecule_frame([each], settings_of(), 0).numbers)) for each in library_of()}
    assert {tuple(sorted(frame.numbers)) for frame in frames} <= known
    assert not any(frame.pbc.any() for frame in frames)


def test_missing_rdkit_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rdkit", None)
    with pytest.raises(SettingsError, match=r'pip install "smelt\[molecules\]"'):
        library_of()
