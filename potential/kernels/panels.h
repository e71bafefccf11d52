// How are vectors of atoms multiplied by weights, so that these arrive in time?
//
// A sum per output and vector of lanes stays in a register. Loads are as dear as products where another thread runs on the
// same core, so that tiles of sums are nearly square. Weights that serve many blocks of atoms are packed (pack): in panels
// of those of PANEL outputs side by side, input after input. On the way forth panels are read from front to back, which
// processors foresee; on the way back a tile of inputs reads PANEL neighbours of each of them in every panel.
//
// Everything has internal linkage, as in simd.h.
#pragma once
#include "product.h"
#include "simd.h"

namespace {

// Sums that registers hold beside what they are made of, and vectors of lanes among them.
constexpr int SUMS = BYTES == 64 ? 24 : 12, VECTORS = BYTES == 64 ? 4 : 2;
constexpr int PANEL = SUMS / VECTORS, AHEAD = 64;     // inputs by which weights are asked for beforehand

template <int N> struct Number {
    static constexpr int value = N;
    constexpr operator int() const { return N; }
};

// each(0), .., each(N - 1), without a loop: compilers keep in registers what no loop goes through.
template <class Each, int... I> INLINE void repeat(Each each, std::integer_sequence<int, I...>) { (each(Number<I>{}), ...); }
template <int N, class Each> INLINE void repeat(Each each) { repeat(each, std::make_integer_sequence<int, N>{}); }

// [at, end) by N at a time, what is left over by half as many, and so on; `each` is told how many and where.
template <int N, class Each> INLINE void halving(int at, int end, Each each) {
    for (; at + N <= end; at += N) each(Number<N>{}, at);
    if constexpr (N > 1) halving<N / 2>(at, end, each);
}

// Lanes [at, end) by as many vectors of W as possible, the last one cut off or not.
template <int W, int N = VECTORS, class Each> INLINE void for_vectors(int at, int end, Each each) {
    for (; at + N * W <= end; at += N * W) each(Number<N>{}, at);
    if constexpr (N > 1) for_vectors<W, N - 1>(at, end, each);
    else if (at < end) each(Number<1>{}, at);
}

template <class T> class Panels {
    using S = Simd<T>;
    using V = typename S::V;
    static constexpr int W = S::W;

public:
    static constexpr bool TURNS = false;              // squares on the way back, where that is wanted (Product.turned)

    struct Configured { Configured() {} };

    // Weights (n_out, n_in) when packed, for both ways.
    static size_t packed_bytes(int n_out, int n_in) {
        return n_out < PANEL ? 0 : sizeof(T) * PANEL * n_in * n_panels(n_out);
    }
    static Packed forth(int, const char* packed) { return {packed, nullptr}; }
    static Packed back(int, int, const char* packed, int first) {
        return {packed ? packed + sizeof(T) * PANEL * first : nullptr, nullptr};
    }
    static void pack(int n_out, int n_in, const T* w, int, const T*, char* packed) {
        if (packed_bytes(n_out, n_in) == 0) return;
        T* to = reinterpret_cast<T*>(packed);
        const T* row = w;
        for (int o = 0; o + PANEL <= n_out; o += PANEL, row += PANEL * n_in)
            for (int i = 0; i < n_in; ++i, to += PANEL) repeat<PANEL>([&](auto q) { to[q] = row[q * n_in + i]; });
        for (int i = 0; i < n_in && n_out % PANEL; ++i)
            for (int q = 0; q < PANEL; ++q) *to++ = q < n_out % PANEL ? row[q * n_in + i] : T(0);
    }

    static size_t room_bytes(int) { return 0; }

    // All outputs, if weights are packed; returns their number.
    static int multiply(int n_out, const Product<T>& p) {
        if (!p.packed.strips) return 0;
        for_vectors<W>(0, p.n_lanes, [&](auto vectors, int t) {
            constexpr int C = vectors.value, MOST = SUMS / C / PANEL;
            if (p.step_in == 1) {
                halving<MOST>(0, n_panels(n_out), [&](auto panels, int i) { forth<panels.value, C>(p, n_out, i, t); });
            } else {
                halving<SUMS / C>(0, n_out, [&](auto outputs, int o) { back<outputs.value, C>(p, o, t); });
            }
        });
        return n_out;
    }
    static int add_outer(int, const Outer<T>&, const Run&) { return 0; }

private:
    static constexpr int n_panels(int n_out) { return (n_out + PANEL - 1) / PANEL; }

    // Outputs of P panels.
    template <int P, int C> static void forth(const Product<T>& p, int n_out, int panel, int t) {
        const int64_t length = PANEL * p.step_out;
        const T* panels = reinterpret_cast<const T*>(p.packed.strips) + panel * length;
        const int first = panel * PANEL, n = n_out - first;
        V sum[P * PANEL][C];
        repeat<P * PANEL>([&](auto q) {
            const V start = S::all(p.start && q < n ? p.start[first + q] : T(0));
            repeat<C>([&](auto v) { sum[q][v] = start; });
        });
        const Run all[] = {{0, p.n_in}};
        for (const Run& run : p.runs ? *p.runs : Runs{all, 1}) {
            const T *w = panels + run.begin * PANEL, *in = p.in + run.begin * BLOCK + t;
            for (int i = run.begin; i < run.end; ++i, w += PANEL, in += BLOCK) {
                V x[C];
                repeat<C>([&](auto v) { x[v] = S::load(in + v * W); });
                repeat<P>([&](auto k) { __builtin_prefetch(w + k * length + AHEAD * PANEL); });
                repeat<P * PANEL>([&](auto q) {
                    const T factor = w[q / PANEL * length + q % PANEL];
                    repeat<C>([&](auto v) { sum[q][v] += x[v] * factor; });
                });
            }
        }
        T* out = p.out + first * BLOCK + t;
        const bool add = p.add;
        repeat<P * PANEL>([&](auto q) {
            if (q < n) put(sum[q], out + q * BLOCK, add);
        });
    }

    // Outputs [o, o + R), which are inputs on the way forth.
    template <int R, int C> static void back(const Product<T>& p, int o, int t) {
        const T *w = reinterpret_cast<const T*>(p.packed.strips) + o * PANEL, *in = p.in + t;
        V sum[R][C];
        repeat<R>([&](auto q) { repeat<C>([&](auto v) { sum[q][v] = V{}; }); });
        for (int left = p.n_in; left > 0; left -= PANEL, w += PANEL * p.step_in) {
            for (int i = 0; i < (left < PANEL ? left : PANEL); ++i, in += BLOCK) {
                V x[C];
                repeat<C>([&](auto v) { x[v] = S::load(in + v * W); });
                repeat<R>([&](auto q) {
                    const T factor = w[q * PANEL + i];
                    repeat<C>([&](auto v) { sum[q][v] += x[v] * factor; });
                });
            }
        }
        T* out = p.out + o * BLOCK + t;
        const bool add = p.add;
        repeat<R>([&](auto q) { put(sum[q], out + q * BLOCK, add); });
    }

    template <int C> static INLINE void put(const V (&sum)[C], T* out, bool add) {
        repeat<C>([&](auto v) { S::store(out + v * W, add ? S::load(out + v * W) + sum[v] : sum[v]); });
    }
};

}  // namespace
