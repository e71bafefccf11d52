// In which floating-point mode and with which memory does a worker run?
#pragma once
#include <cstdlib>
#include <new>
#include <utility>

#include "threads.h"
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

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

// Memory of one worker, 64-byte aligned, not cleared. A thread keeps it for its next call: fresh pages take longer than
// some kernels do.
class Workspace {
    struct Memory {
        void* begin = nullptr;
        size_t bytes = 0;
        ~Memory() { std::free(begin); }
        void swap(Memory& other) { std::swap(begin, other.begin), std::swap(bytes, other.bytes); }
    };
    static Memory& kept() {
        thread_local Memory memory;
        return memory;
    }
    Memory memory;                                    // taken from what is kept, so that a call within a call has its own
public:
    explicit Workspace(size_t bytes) {
        memory.swap(kept());
        if (memory.bytes >= bytes + 64) return;
        std::free(memory.begin);
        memory.begin = std::malloc(memory.bytes = bytes + 64);
        if (!memory.begin) throw std::bad_alloc();
    }
    ~Workspace() { memory.swap(kept()); }
    Workspace(const Workspace&) = delete;
    char* aligned() const { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.begin) + 63) / 64 * 64); }
};

// turn(number, workspace) for all turns, on up to n_threads threads with a workspace each.
template <class Turn> void run(int64_t n_turns, int n_threads, size_t workspace_bytes, Turn turn) {
    share_out(n_turns, n_threads, [&](auto next) {
        FlushDenormals flush;
        Workspace workspace(workspace_bytes);
        for (int64_t number; (number = next()) >= 0;) turn(number, workspace.aligned());
    });
}

}  // namespace
