// Which instruction set, how many threads, and with which floating-point mode does a product of the AEV run?
//
// Plain C entry points without any torch or Python header, so that ctypes, a torch.library wrapper and a LAMMPS pair
// style can all call them. Atoms are independent, so the answer does not depend on the number of threads.
#include <cstdlib>
#include <exception>
#include <new>

#include "aev.h"
#include "threads.h"
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

extern const AevKernel smelt_plain[2];
#if defined(__x86_64__)
extern const AevKernel smelt_avx2[2], smelt_avx512[2];
#endif

namespace {

constexpr int64_t ATOMS_PER_TURN = 16;

// Flush denormals to zero while it lives, in this thread only: products of far Gaussians are denormal, and a denormal
// operand costs over 100 cycles.
class FlushDenormals {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();
public:
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
    uint64_t saved;
public:
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved));
        asm volatile("msr fpcr, %0" : : "r"(saved | (1ull << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved)); }
#else
public:
    FlushDenormals() {}
#endif
};

class Workspace {
    void* memory;
public:
    explicit Workspace(size_t bytes) : memory(std::calloc(bytes + 64, 1)) {
        if (!memory) throw std::bad_alloc();
    }
    ~Workspace() { std::free(memory); }
    Workspace(const Workspace&) = delete;
    void* aligned() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64); }
};

int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

const AevKernel& kernel_of(int level, bool is_double) {
#if defined(__x86_64__)
    if (level == 2) return smelt_avx512[is_double];
    if (level == 1) return smelt_avx2[is_double];
#endif
    return smelt_plain[is_double];
}

using Product = void (*)(const AevJob&, int64_t, int64_t, void*);

void run(const AevKernel& kernel, Product product, const AevJob& job, int n_threads) {
    const size_t bytes = kernel.workspace_bytes(job);
    share_out((job.n_atoms + ATOMS_PER_TURN - 1) / ATOMS_PER_TURN, n_threads, [&](auto next) {
        FlushDenormals flush;
        Workspace workspace(bytes);
        for (int64_t turn; (turn = next()) >= 0;) {
            const int64_t begin = turn * ATOMS_PER_TURN;
            product(job, begin, std::min(begin + ATOMS_PER_TURN, job.n_atoms), workspace.aligned());
        }
    });
}

}  // namespace

extern "C" {

// The highest level this processor can run: 0 plain, 1 AVX2 with FMA, 2 AVX-512.
__attribute__((visibility("default"))) int smelt_aev_level() { return best_level(); }

// product: 0 forward, 1 transposed derivative, 2 derivative. Returns 0, or 1 when memory or threads cannot be had.
__attribute__((visibility("default")))
int smelt_aev(int product, int level, int is_double, int n_threads, const AevShape* shape, int64_t n_items,
              int64_t n_atoms, int64_t n_edges, const void* vec, const int64_t* row, const int64_t* species,
              const void* in, void* out) try {
    AevJob job{shape, n_atoms, n_edges, n_items, 0, vec, row, species, in, out};
    for (int64_t i = 0; i < n_atoms; ++i) job.longest_row = std::max(job.longest_row, row[i + 1] - row[i]);
    const AevKernel& kernel = kernel_of(level, is_double);
    run(kernel, product == 0 ? kernel.forward : product == 1 ? kernel.vjp : kernel.jvp, job, n_threads);
    return 0;
} catch (const std::exception&) {
    return 1;
}

}  // extern "C"
