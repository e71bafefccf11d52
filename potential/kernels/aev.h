// What do the entry points (entry.cpp) and the arithmetic (aev.cpp, compiled once per instruction set) agree on?
#pragma once
#include <cstddef>
#include <cstdint>

// The constants of the descriptor as Python passes them; lengths in angstrom, angles in radian.
struct AevShape {
    double radial_cutoff, angular_cutoff, eta_radial, eta_angular, zeta;
    int64_t n_species, n_radial, n_angular_radial, n_angular;
    const double *radial_shifts, *angular_shifts, *angle_cos, *angle_sin;
};

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

// The three products for atoms [begin, end); `workspace` is 64-byte aligned and belongs to the caller's thread.
struct AevKernel {
    size_t (*workspace_bytes)(const AevJob&);
    void (*forward)(const AevJob&, int64_t begin, int64_t end, void* workspace);
    void (*vjp)(const AevJob&, int64_t begin, int64_t end, void* workspace);
    void (*jvp)(const AevJob&, int64_t begin, int64_t end, void* workspace);
};
