// How is a block of atoms multiplied by weights, with one instruction set, so that it stays in registers and caches?
//
// A layer is a product of weights broadcast with vectors of atoms, or of tiles (tiles.h) where there are any. CELU:
// h = max(x, 0) + alpha (exp(min(x, 0) / alpha) - 1); its slope is 1 for h > 0 and 1 + h / alpha elsewhere. Everything has
// internal linkage, as in simd.h.
#pragma once
#include "aev.h"
#include "tiles.h"

#include <initializer_list>

namespace {

// Of the packed weights of n_layers layers.
template <class T> size_t packed_bytes(const int64_t* widths, int64_t n_layers) {
    size_t bytes = 0;
    for (int64_t k = 0; k < n_layers; ++k) bytes += Tiles<T>::packed_bytes(int(widths[k + 1]), int(widths[k]));
    return bytes;
}

template <class T> struct Dense {
    using S = Simd<T>;
    using V = typename S::V;
    static constexpr int W = S::W;

    static constexpr int whole(int n) { return (n + W - 1) / W * W; }

    using Product = ::Product<T>;
    using Outer = ::Outer<T>;
    using Tiles = ::Tiles<T>;

    static void multiply(int n_out, const Product& p) {
        const int first = Tiles::multiply(n_out, p);
        if (first == n_out) return;
        for_vectors<W>(0, p.n_lanes, [&](auto vectors, int t) {
            constexpr int C = vectors.value;
            halving<SUMS / C>(first, n_out, [&](auto outputs, int o) { tile<outputs.value, C>(p, o, t); });
        });
    }

    static void add_outer(int n_out, const Outer& p, const Run& inputs) {
        const int first = Tiles::add_outer(n_out, p, inputs);
        halving<SUMS / 2>(first, n_out, [&](auto outputs, int o) {  // tall tiles: atoms' inputs do not stay in the L1 cache
            for_vectors<W, 2>(inputs.begin, inputs.end, [&](auto vectors, int t) {
                outer<outputs.value, vectors.value>(p, o, t);
            });
        });
    }

    // The parts of rows of atoms that are not all zero in all arrays (n_rows, n_in); `runs` has room for all of them.
    static Runs filled(int n_in, int n_rows, std::initializer_list<const T* const*> arrays, Run* runs) {
        int n = 0;
        for (int low = 0; low < n_in; low += AEV_PART) {
            const int high = low + AEV_PART < n_in ? low + AEV_PART : n_in;
            bool any = false;
            for (const T* const* rows : arrays)
                for (int r = 0; r < n_rows && !any; ++r)
                    for (int i = low; i < high; ++i) any |= rows[r][i] != 0;
            if (!any) continue;
            if (n && runs[n - 1].end == low) runs[n - 1].end = high;
            else runs[n++] = {low, high};
        }
        return {runs, n};
    }
    static constexpr size_t most_runs(int n_in) { return n_in / AEV_PART + 1; }

    static void activate(int n, T alpha, T* x, int n_lanes) {
        const T rate = T(-1.44269504088896341) / alpha;
        for (int i = 0; i < n * BLOCK; i += BLOCK) {
            for (int t = i; t < i + n_lanes; t += W) {
                V value = S::load(x + t), negative = S::max(-value, T(0));
                S::store(x + t, S::max(value, T(0)) + (S::exp2(negative * rate) - T(1)) * alpha);
            }
        }
    }

    static INLINE V slope(V h, T alpha) { return S::max(-h, T(0)) * (T(-1) / alpha) + T(1); }

    static void apply_slope(int n, T alpha, const T* h, const T* in, T* out, int n_lanes) {
        for (int i = 0; i < n * BLOCK; i += BLOCK) {
            for (int t = i; t < i + n_lanes; t += W) S::store(out + t, S::load(in + t) * slope(S::load(h + t), alpha));
        }
    }

    // Rows of atoms (n_rows of them, at rows[r], of `width`) to lanes, zero in the other lanes of whole vectors; and back.
    static void to_lanes(int width, int n_rows, const T* const* rows, T* out) {
        const int n_lanes = whole(n_rows);
        for (int first = 0; first < n_lanes; first += W) {
            for (int low = 0; low < width; low += W) {
                const int n = n_rows - first < W ? n_rows - first : W;
                if (low + W <= width) {
                    V square[W];
                    for (int r = 0; r < W; ++r) square[r] = r < n ? S::load(rows[first + r] + low) : V{};
                    S::transpose(square);
                    for (int i = 0; i < W; ++i) S::store(out + (low + i) * BLOCK + first, square[i]);
                } else {
                    for (int i = low; i < width; ++i)
                        for (int r = 0; r < W; ++r) out[i * BLOCK + first + r] = r < n ? rows[first + r][i] : T(0);
                }
            }
        }
    }
    // turned: squares are (atoms, numbers) already, as products leave them that were asked for it.
    static void from_lanes(int width, int n_rows, const T* values, T scale, T* const* rows, bool turned = false) {
        for (int first = 0; first < n_rows; first += W) {
            for (int low = 0; low < width; low += W) {
                const int n = n_rows - first < W ? n_rows - first : W;
                if (low + W <= width) {
                    V square[W];
                    for (int i = 0; i < W; ++i) square[i] = S::load(values + (low + i) * BLOCK + first) * scale;
                    if (!turned) S::transpose(square);
                    for (int r = 0; r < n; ++r) S::store(rows[first + r] + low, square[r]);
                } else {
                    for (int r = 0; r < n; ++r)
                        for (int i = low; i < width; ++i) rows[first + r][i] = scale * values[i * BLOCK + first + r];
                }
            }
        }
    }

private:
    template <int R, int C> static void tile(const Product& p, int first, int t) {
        const T* w = p.w + first * p.step_out;
        T* out = p.out + first * BLOCK + t;
        V sum[R][C];
        repeat<R>([&](auto q) {
            const V start = S::all(p.start ? p.start[first + q] : T(0));
            repeat<C>([&](auto v) { sum[q][v] = p.add ? S::load(out + q * BLOCK + v * W) : start; });
        });
        const Run all[] = {{0, p.n_in}};
        for (const Run& run : p.runs ? *p.runs : Runs{all, 1}) {
            for (int i = run.begin; i < run.end; ++i) {
                V x[C];
                repeat<C>([&](auto v) { x[v] = S::load(p.in + i * BLOCK + t + v * W); });
                repeat<R>([&](auto q) {
                    const T factor = w[q * p.step_out + i * p.step_in];
                    repeat<C>([&](auto v) { sum[q][v] += x[v] * factor; });
                });
            }
        }
        repeat<R>([&](auto q) { repeat<C>([&](auto v) { S::store(out + q * BLOCK + v * W, sum[q][v]); }); });
    }

    template <int R, int C> static void outer(const Outer& p, int first, int t) {
        const int64_t length = p.row_length;
        T* out = p.out + first * length + t;
        V sum[R][C];
        repeat<R>([&](auto q) { repeat<C>([&](auto v) { sum[q][v] = S::load(out + q * length + v * W); }); });
        for (int which = 0; which < 2; ++which) {
            const T *left = p.left[which] + first * BLOCK, *row = p.rows[which] + t;
            for (int r = 0; r < p.n_rows; ++r, row += length) {
                V x[C];
                repeat<C>([&](auto v) { x[v] = S::load(row + v * W); });
                repeat<R>([&](auto q) {
                    const T factor = left[q * BLOCK + r];
                    repeat<C>([&](auto v) { sum[q][v] += x[v] * factor; });
                });
            }
        }
        repeat<R>([&](auto q) { repeat<C>([&](auto v) { S::store(out + q * length + v * W, sum[q][v]); }); });
    }
};

}  // namespace
