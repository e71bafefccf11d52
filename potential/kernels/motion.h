// What do the entry points (entry.cpp) and the arithmetic of moving atoms (motion.cpp) agree on?
#pragma once
#include <cstdint>

// Atoms of many frames: positions, velocities, forces (n_atoms, 3) in A, A/fs, eV/A; per atom 1/mass and the standard
// deviation of its random kicks; per frame the key of its random numbers and the number of its step.
struct MotionJob {
    int64_t n_atoms;
    double *positions, *velocities;
    const double *forces, *inverse_mass, *noise_scale;
    const int64_t *frame;              // (n_atoms,)
    const int64_t *first, *key, *step; // (n_frames,)
    double push, half_step, damping;   // of forces on velocities, of velocities on positions, of friction; no kicks if 1
};

struct MotionKernel {
    // Standard normal numbers, (n_atoms, 3), of atoms [begin, end).
    void (*normals)(const MotionJob&, float* out, int64_t begin, int64_t end);
    // Half a kick by the forces, half a step, friction and noise, half a step.
    void (*drift)(const MotionJob&, int64_t begin, int64_t end);
    // The other half of the kick; the largest force component, infinite if one is not a number.
    void (*kick)(const MotionJob&, int64_t begin, int64_t end);
    double (*largest_force)(const MotionJob&, int64_t begin, int64_t end);
};
