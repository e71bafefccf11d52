// What do the entry points (entry.cpp) and the arithmetic of training (training.cpp) agree on?
#pragma once
#include <cstddef>
#include <cstdint>

// The networks of one element: (n_layers + 1,) widths, and where each of the weights (out, in) begins, before its bias.
struct LayersShape {
    int64_t n_layers;
    const int64_t *widths, *offsets;
};

// Networks of all elements and members, in parameters (n_members, step), and some atoms.
struct LayersJob {
    int64_t n_members, n_elements, n_atoms, step;
    const LayersShape* shapes;        // (n_elements,)
    double celu_alpha;
    const void* parameters;
    const int64_t *atoms, *first;     // those of element e are atoms[first[e]] .. atoms[first[e + 1]]
    const void* aev;                  // (.., length), that of an atom in row rows[atom]
    const int64_t* rows;              // (n_atoms,), or null where atoms are rows
    void *energies, *g;               // (n_members, n_atoms) and dE/dAEV (n_members, n_atoms, length)
    void* tape;                       // (tape_numbers,): what the gradient needs of the forward pass
    const void *by_energy, *by_g;     // cotangents of energies and g
    void* gradient;                   // shaped like the parameters
    int64_t add;                      // to what is in the gradient, instead of writing over it
};

// A matrix in blocks of 3 x KEPT_WIDTH, those that are zero left out; what is beyond its last column is not read.
struct KeptJacobian {
    const void* values;               // (n_blocks, 3, KEPT_WIDTH)
    const int32_t* at;                // (n_blocks,), first column of each
    const int64_t* row;               // blocks of rows 3 i .. 3 i + 2 are row[i] .. row[i + 1]
};
constexpr int KEPT_WIDTH = 16;

// Structures with Jacobians (3 n + 6, n length) of forces and virial by g, n being the number of their atoms.
struct ResponseJob {
    int64_t n_members, length, n_atoms, n_structures;
    const int64_t* first;             // (n_structures + 1,), first atom of each
    const KeptJacobian* jacobians;
    const void *known_forces, *known_virial;  // (n_atoms, 3) and (n_structures, 6), not a number where there is none
    const void* scale;                // (n_members, n_structures)
    double force_scale, virial_scale, cap;
    const void* g;                    // (n_members, n_atoms, length)
    void *forces, *virial;            // (n_members, n_atoms, 3), (n_members, n_structures, 6)
    void* v;                          // (n_members, n_atoms, length), perhaps g itself
    double* errors;                   // (n_members, n_structures, N_ERRORS), added to
    // Forces that are known; of their errors, squares that go on linearly beyond the cap, and squares; the same of the
    // virial but for the second.
    static constexpr int N_ERRORS = 5;
};

// One element of one member, turn = member * n_elements + element, or one structure at a time; `workspace` is of as many
// bytes as are asked for, 64-byte aligned, and the caller's thread's.
struct TrainingKernel {
    int64_t (*tape_numbers)(const LayersJob&);
    size_t (*workspace_bytes)(const LayersJob&);
    void (*forward)(const LayersJob&, int64_t turn, void* workspace);
    void (*gradient)(const LayersJob&, int64_t turn, void* workspace);
    size_t (*response_bytes)(const ResponseJob&);
    void (*respond)(const ResponseJob&, int64_t structure, void* workspace);
};
