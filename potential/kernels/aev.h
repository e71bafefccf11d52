// What do the entry points (entry.cpp) and the arithmetic (aev.cpp, compiled once per instruction set) agree on?
#pragma once
#include <cstddef>
#include <cstdint>

// 2 x^power for 0 <= x <= 1 in single precision: the polynomial sum_k terms[k] u^k, squared n_squarings times, where u goes
// from 1 at x = 1 to -1 at x = 1 - reach, and stays there: below, the power is as good as 0.
struct AevPower {
    static constexpr int N_TERMS = 10;
    double terms[N_TERMS];
    int64_t n_squarings;
};

// The constants of the descriptor as Python passes them; lengths in angstrom, angles in radian.
// by_zeta: of the powers Zeta and Zeta - 1. reach: of both, or 0 where no such polynomial is good enough.
struct AevShape {
    double radial_cutoff, angular_cutoff, eta_radial, eta_angular, zeta;
    int64_t n_species, n_radial, n_angular_radial, n_angular;
    const double *radial_shifts, *angular_shifts, *angle_cos, *angle_sin;
    double reach;
    AevPower by_zeta[2];
};

// Networks leave out AEVs by so many numbers, where they are zero: pairs of elements that no atom of a block sees.
constexpr int AEV_PART = 16;

// One product. `in` and `out` are (n_atoms, length) or (n_items, n_edges, 3) or (n_items, n_atoms, length).
struct AevJob {
    const AevShape* shape;
    int64_t n_atoms, n_edges, n_items, longest_row;
    const void* vec;         // (n_edges, 3)
    const int64_t* row;      // (n_atoms + 1,)
    const int64_t* species;  // (n_edges,) of the other atom
    const void* in;
    void* out;
};

// Pairs of atoms, sorted by centre: those of atom i are row[i] .. row[i + 1].
struct PairList {
    const int64_t *row, *other;
    const int32_t* shift;          // (n_edges, 3), lattice vectors to add to the other atom
    const int64_t *frame, *species; // (n_atoms,)
    const double *positions, *cells; // (n_atoms, 3) and (n_frames, 3, 3)
};

// What is summed for several items at a time has them last, filled up to whole vectors of any instruction set.
template <class T> static constexpr int64_t lanes_of(int64_t n_items) {
    constexpr int64_t LANES = 64 / sizeof(T);
    return n_items <= 1 ? n_items : (n_items + LANES - 1) / LANES * LANES;
}

// Atoms of one frame, and where what they do to that frame is added up.
struct AevUnit {
    int64_t frame, low, high;      // atoms [low, high)
    int64_t first_atom;            // of the frame
    void* forces;                  // (n_atoms of the frame, 3, lanes of items)
    double* virial;                // (n_items, 3, 3), or null
};

// Atoms of one element, of any units, that are worked on together.
struct AevBlock {
    const AevShape* shape;
    const PairList* list;
    int64_t n_items, longest_row, n_rows;
    const int64_t* atoms;          // (n_rows,)
    const AevUnit* const* unit;    // (n_rows,)
    void* aev;                     // (n_rows, length)
    const void* cotangent;         // (n_items, n_rows, length)
};

// The three products for atoms [begin, end), and for a block the AEVs and then what the cotangents do to forces and
// virials, with what its atoms see kept in the workspace in between; that is 64-byte aligned and the caller's thread's.
struct AevKernel {
    size_t (*workspace_bytes)(const AevJob&);
    void (*forward)(const AevJob&, int64_t begin, int64_t end, void* workspace);
    void (*vjp)(const AevJob&, int64_t begin, int64_t end, void* workspace);
    void (*jvp)(const AevJob&, int64_t begin, int64_t end, void* workspace);
    size_t (*block_bytes)(const AevBlock&);
    void (*describe)(const AevBlock&, void* workspace);
    void (*pull)(const AevBlock&, void* workspace);
};
