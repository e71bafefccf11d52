// On which instruction set do the kernels run, and how are single products called?
//
// Plain C entry points without any torch or Python header, so that ctypes, a torch.library wrapper and a LAMMPS pair
// style can all call them. Atoms are independent, so the answer does not depend on the number of threads.
#include <algorithm>

#include "levels.h"
#include "run.h"
#if defined(SMELT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT __attribute__((visibility("default")))

namespace {

constexpr int64_t ATOMS_PER_TURN = 16;

// Whether there are tiles, and the kernel lets this process have their registers, which it must ask for once.
bool has_tiles() {
#if defined(SMELT_AMX) && defined(__linux__)
    constexpr unsigned AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25;
    constexpr long ASK_FOR = 0x1023, TILE_REGISTERS = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_TILE) && (d & AMX_INT8) &&
           syscall(SYS_arch_prctl, ASK_FOR, TILE_REGISTERS) == 0;
#else
    return false;
#endif
}

int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return has_tiles() ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

}  // namespace

extern "C" {

// The highest level this processor can run: 0 plain, 1 AVX2 with FMA, 2 AVX-512, 3 AMX.
EXPORT int smelt_level() { return best_level(); }

// product: 0 forward, 1 transposed derivative, 2 derivative. Returns 0, or 1 when there is no memory.
EXPORT int smelt_aev(int product, int level, int is_double, int n_threads, const AevShape* shape, int64_t n_items,
                     int64_t n_atoms, int64_t n_edges, const void* vec, const int64_t* row, const int64_t* species,
                     const void* in, void* out) try {
    AevJob job{shape, n_atoms, n_edges, n_items, 0, vec, row, species, in, out};
    for (int64_t i = 0; i < n_atoms; ++i) job.longest_row = std::max(job.longest_row, row[i + 1] - row[i]);
    const AevKernel& kernel = AEV[level][is_double];
    const auto atoms = product == 0 ? kernel.forward : product == 1 ? kernel.vjp : kernel.jvp;
    run((n_atoms + ATOMS_PER_TURN - 1) / ATOMS_PER_TURN, n_threads, kernel.workspace_bytes(job),
        [&](int64_t turn, void* workspace) {
            const int64_t begin = turn * ATOMS_PER_TURN;
            atoms(job, begin, std::min(begin + ATOMS_PER_TURN, n_atoms), workspace);
        });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// How many bytes the packed weights of all members take, 0 if there is nothing to be packed; and pack them.
EXPORT int64_t smelt_packed_bytes(int level, int is_double, const NetworksJob* job) {
    return int64_t(NETWORKS[level][is_double].packed_bytes(*job));
}
EXPORT int smelt_pack(int level, int is_double, int n_threads, const NetworksJob* job, void* packed) try {
    run(job->n_members, n_threads, 0,
        [&](int64_t member, void*) { NETWORKS[level][is_double].pack(*job, member, packed); });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

EXPORT int smelt_networks(int level, int is_double, int n_threads, const NetworksJob* job) try {
    const NetworksKernel& kernel = NETWORKS[level][is_double];
    run((job->n_rows + NETWORKS_BLOCK - 1) / NETWORKS_BLOCK, n_threads, kernel.workspace_bytes(*job),
        [&](int64_t turn, void* workspace) { kernel.run(*job, turn, workspace); });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// How many numbers the tape has.
EXPORT int64_t smelt_tape(int level, int is_double, const LayersJob* job) {
    return TRAINING[level][is_double].tape_numbers(*job);
}

// Forward pass of the networks, or (backward) the gradient of a loss on its results. Members and elements are shared out
// over threads. Returns 0, or 1 when there is no memory.
EXPORT int smelt_layers(int backward, int level, int is_double, int n_threads, const LayersJob* job) try {
    const TrainingKernel& kernel = TRAINING[level][is_double];
    const auto pass = backward ? kernel.gradient : kernel.forward;
    run(job->n_members * job->n_elements, n_threads, kernel.workspace_bytes(*job),
        [&](int64_t turn, void* workspace) { pass(*job, turn, workspace); });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Forces and virials from kept Jacobians, and what their residuals return. Structures are shared out over threads.
// Returns 0, or 1 when there is no memory.
EXPORT int smelt_respond(int level, int is_double, int n_threads, const ResponseJob* job) try {
    const TrainingKernel& kernel = TRAINING[level][is_double];
    run(job->n_structures, n_threads, kernel.response_bytes(*job),
        [&](int64_t structure, void* workspace) { kernel.respond(*job, structure, workspace); });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// These take microseconds, less than a thread takes to start, so they run on the caller's.
EXPORT void smelt_normals(int level, const MotionJob* job, float* out) {
    MOTION[level]->normals(*job, out, 0, job->n_atoms);
}

EXPORT void smelt_drift(int level, const MotionJob* job) { MOTION[level]->drift(*job, 0, job->n_atoms); }

// Returns whether no force component is above the limit or not a number; only then are velocities changed.
EXPORT int smelt_kick(int level, const MotionJob* job, double max_force) {
    if (!(MOTION[level]->largest_force(*job, 0, job->n_atoms) <= max_force)) return 0;
    MOTION[level]->kick(*job, 0, job->n_atoms);
    return 1;
}

}  // extern "C"
