"""Random frames and labels for the tests of shards."""

from __future__ import annotations

from dataclasses import asdict

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import strategies as st

from shards import Frame, Label, Level, Origin

LEVEL = Level("emt", "3.29.0", {"cutoffs": [1.5, None], "asap": True}, {"Al.upf": "ab" * 32})

finite = st.floats(-1e6, 1e6, allow_subnormal=True)
maybe_nan = finite | st.just(float("nan"))
energies = finite.map(lambda energy: energy + 0.0)  # SQLite, where ASE's .db files are kept, has no -0.0
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
origins = st.builds(
    Origin,
    kind=text,
    seed=st.integers(0, 2**64 - 1),
    model=text,
    trigger=text,
    time_fs=finite,
    energy_spread=maybe_nan,
    force_spread=maybe_nan,
)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    n = draw(st.integers(1, 6))
    pbc = draw(hnp.arrays(bool, 3))
    cell = np.eye(3) * 9 + draw(hnp.arrays(float, (3, 3), elements=st.floats(-1, 1)))
    return Frame(
        numbers=draw(hnp.arrays(np.int64, n, elements=st.integers(1, 118))),
        positions=draw(hnp.arrays(float, (n, 3), elements=finite)),
        cell=cell if pbc.any() or draw(st.booleans()) else np.zeros((3, 3)),
        pbc=pbc,
        charge=draw(st.integers(-9, 9)),
        spin=draw(st.integers(0, 9)),
        origin=draw(origins),
    )


@st.composite
def labeled(draw: st.DrawFn) -> tuple[Frame, Label]:
    frame = draw(frames())
    upper = draw(hnp.arrays(float, (3, 3), elements=finite))
    label = Label(
        energy=draw(energies),
        forces=draw(
            hnp.arrays(float, (frame.n_atoms, 3), elements=finite) | st.just(np.full((frame.n_atoms, 3), np.nan))
        ),
        stress=draw(st.sampled_from([np.triu(upper) + np.triu(upper, 1).T, np.full((3, 3), np.nan)])),
        energy_extrapolated=draw(energies | st.just(float("nan"))),
        seconds=draw(st.floats(0, 1e6)),
        host=draw(text),
        scf_steps=draw(st.integers(0, 1000)),
    )
    return frame, label


def assert_same_frame(got: Frame, expected: Frame, *, origin: bool = True) -> None:
    """Bit by bit; the id alone would not tell an origin."""
    assert got == expected
    for name in ("numbers", "positions", "cell", "pbc"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    if origin:
        np.testing.assert_equal(asdict(got.origin), asdict(expected.origin))


def assert_same_label(got: Label, expected: Label) -> None:
    np.testing.assert_equal(asdict(got), asdict(expected))


def example_rows(n_frames: int, seed: int = 0) -> list[tuple[Frame, Label]]:
    """Periodic cells of two elements with 2 to 5 atoms, and labels drawn at random."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n_frames):
        n = int(rng.integers(2, 6))
        frame = Frame(
            numbers=rng.choice([13, 29], n),
            positions=rng.normal(size=(n, 3)),
            cell=np.eye(3) * 8 + rng.normal(size=(3, 3)),
            pbc=True,
            origin=Origin("walker", seed=i, model="0123abcd", trigger="force_max", time_fs=1.5 * i, force_spread=0.1),
        )
        stress = rng.normal(size=(3, 3))
        label = Label(
            energy=float(rng.normal()),
            forces=rng.normal(size=(n, 3)),
            stress=stress + stress.T,
            energy_extrapolated=float(rng.normal()),
            seconds=1.0 + i,
            host="node-1",
            scf_steps=i,
        )
        rows.append((frame, label))
    return rows
