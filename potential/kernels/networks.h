// What do the entry points (entry.cpp) and the arithmetic of the networks (networks.cpp) agree on?
#pragma once
#include <cstddef>
#include <cstdint>

// Networks of all members for one element: layers 0 .. n_layers - 1, CELU after all but the last, one output.
struct NetworksJob {
    int64_t n_members, n_layers, n_rows, n_atoms;
    const int64_t* widths;        // (n_layers + 1,), the first is the length of the AEV, the last is 1
    const void* const* weights;   // per layer (n_members, out, in)
    const void* const* biases;    // per layer (n_members, out)
    const void* packed;           // the weights of all layers and members as pack() leaves them, or null
    double celu_alpha;
    const int64_t* atoms;         // (n_rows,): which atoms are of this element
    const void* aev;              // (n_atoms, length)
    void* energies;               // (n_members, n_atoms)
    void* gradient;               // (n_members or 1, n_atoms, length), or null
    int64_t mean;                 // gradient is the mean over members
    int64_t filled_only;          // of inputs that are zero for all atoms of a block the gradient may be left zero
};

// Rows [block, block + 1) * NETWORKS_BLOCK of the job; `workspace` is 64-byte aligned and belongs to the thread.
constexpr int64_t NETWORKS_BLOCK = 64;

struct NetworksKernel {
    size_t (*packed_bytes)(const NetworksJob&);       // of all members, 0 if there is nothing to be packed
    void (*pack)(const NetworksJob&, int64_t member, void* packed);
    size_t (*workspace_bytes)(const NetworksJob&);
    void (*run)(const NetworksJob&, int64_t block, void* workspace);
};
