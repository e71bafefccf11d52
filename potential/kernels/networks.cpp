// What are the energies of all members for a block of atoms, and their gradients by the AEV, on one instruction set?
//
// Atoms stand in the lanes, so that a layer is a product of a weight broadcast with vectors of atoms; a block's layers
// stay in the cache from the AEV to the gradient, which is what a chain of library matrix products cannot do.
// CELU: h = max(x, 0) + alpha (exp(min(x, 0) / alpha) - 1), whose slope is 1 for h > 0 and 1 + h / alpha elsewhere.
//
// Compiled once per instruction set, as aev.cpp is and under the same rule: no external linkage but the table.
#include "networks.h"
#include "simd.h"

#include <initializer_list>

namespace {

constexpr int BLOCK = NETWORKS_BLOCK;
constexpr int OUTPUTS = 4;          // outputs and vectors of atoms that share loads
constexpr int VECTORS = BYTES == 64 ? 4 : 2;

template <class T> class Networks {
    using S = Simd<T>;
    using V = typename S::V;
    static constexpr int W = S::W;

    const NetworksJob& job;
    const int n_layers, length;
    int widest = 0, all_widths = 0, n_lanes = 0;      // lanes of the block in use, whole vectors
    T *input, *hidden, *front, *back, *total;         // (width, BLOCK) each; hidden holds all layers

public:
    size_t used = 0;

    Networks(const NetworksJob& job, void* workspace)
        : job(job), n_layers(int(job.n_layers)), length(int(job.widths[0])) {
        for (int k = 0; k < n_layers; ++k) {
            widest = job.widths[k] > widest ? int(job.widths[k]) : widest;
            all_widths += int(job.widths[k + 1]);
        }
        T* base = static_cast<T*>(workspace);
        for (T** piece : {&input, &total}) *piece = base + used, used += length * BLOCK;
        for (T** piece : {&front, &back}) *piece = base + used, used += widest * BLOCK;
        hidden = base + used, used += all_widths * BLOCK;
        used *= sizeof(T);
    }

    void run(int64_t first);

private:
    int width(int layer) const { return int(job.widths[layer]); }
    const T* weight(int layer, int member) const {
        return static_cast<const T*>(job.weights[layer]) + int64_t(member) * width(layer) * width(layer + 1);
    }
    const T* bias(int layer, int member) const {
        return static_cast<const T*>(job.biases[layer]) + int64_t(member) * width(layer + 1);
    }

    struct Product {
        int n_in;
        const T* w;
        int64_t step_out, step_in;
        const T *in, *start;
        T* out;
        bool add;
    };
    template <int R, int C> void tile(const Product& p, int first, int t);
    template <int R> void row_of_tiles(const Product& p, int first);
    void multiply(int n_out, const Product& p);
    void activate(int n, T* x);
    void apply_slope(int n, const T* h, T* g);
    void propagate(int member);
    void backpropagate(int member);
    void store(const T* values, T scale, int n_rows, const int64_t* atoms, T* out);
};

// out[q] = start[q] + sum_i w[q step_out + i step_in] in[i] for R outputs and C vectors of atoms; added to what is
// there if `add`.
template <class T> template <int R, int C>
INLINE void Networks<T>::tile(const Product& p, int first, int t) {
    const T* w = p.w + first * p.step_out;
    T* out = p.out + first * BLOCK + t;
    V sum[R][C];
    for (int q = 0; q < R; ++q)
        for (int v = 0; v < C; ++v)
            sum[q][v] = p.add ? S::load(out + q * BLOCK + v * W) : S::all(p.start ? p.start[first + q] : T(0));
    for (int i = 0; i < p.n_in; ++i) {
        V x[C];
        for (int v = 0; v < C; ++v) x[v] = S::load(p.in + i * BLOCK + t + v * W);
        for (int q = 0; q < R; ++q) {
            const T factor = w[q * p.step_out + i * p.step_in];
            for (int v = 0; v < C; ++v) sum[q][v] += x[v] * factor;
        }
    }
    for (int q = 0; q < R; ++q)
        for (int v = 0; v < C; ++v) S::store(out + q * BLOCK + v * W, sum[q][v]);
}

template <class T> template <int R> void Networks<T>::row_of_tiles(const Product& p, int first) {
    int t = 0;
    for (; t + VECTORS * W <= n_lanes; t += VECTORS * W) tile<R, VECTORS>(p, first, t);
    if (t + 2 * W <= n_lanes) tile<R, 2>(p, first, t), t += 2 * W;
    for (; t < n_lanes; t += W) tile<R, 1>(p, first, t);
}

template <class T> void Networks<T>::multiply(int n_out, const Product& p) {
    int o = 0;
    for (; o + OUTPUTS <= n_out; o += OUTPUTS) row_of_tiles<OUTPUTS>(p, o);
    for (; o + 2 <= n_out; o += 2) row_of_tiles<2>(p, o);
    for (; o < n_out; ++o) row_of_tiles<1>(p, o);
}

template <class T> void Networks<T>::activate(int n, T* x) {
    const T alpha = T(job.celu_alpha), rate = T(-1.44269504088896341 / job.celu_alpha);
    for (int i = 0; i < n * BLOCK; i += BLOCK) {
        for (int t = i; t < i + n_lanes; t += W) {
            V value = S::load(x + t), negative = S::max(-value, T(0));
            S::store(x + t, S::max(value, T(0)) + (S::exp2(negative * rate) - T(1)) * alpha);
        }
    }
}

template <class T> void Networks<T>::apply_slope(int n, const T* h, T* g) {
    const T rate = T(-1 / job.celu_alpha);
    for (int i = 0; i < n * BLOCK; i += BLOCK) {
        for (int t = i; t < i + n_lanes; t += W) {
            V slope = S::max(-S::load(h + t), T(0)) * rate + T(1);
            S::store(g + t, S::load(g + t) * slope);
        }
    }
}

// Hidden layers and energy of one member.
template <class T> void Networks<T>::propagate(int member) {
    const T* in = input;
    T* out = hidden;
    for (int k = 0; k < n_layers; ++k) {
        multiply(width(k + 1), {width(k), weight(k, member), width(k), 1, in, bias(k, member), out, false});
        if (k + 1 < n_layers) activate(width(k + 1), out);
        in = out, out += width(k + 1) * BLOCK;
    }
}

// From the energy back to the AEV: into `total`, added to the members before this one for the mean.
template <class T> void Networks<T>::backpropagate(int member) {
    const T* h = hidden + (all_widths - 1) * BLOCK;
    for (int t = 0; t < BLOCK; ++t) front[t] = 1;
    for (int k = n_layers - 1; k >= 0; --k) {
        multiply(width(k), {width(k + 1), weight(k, member), 1, width(k), front, nullptr, k ? back : total,
                            k == 0 && job.mean && member});
        if (k == 0) return;
        h -= width(k) * BLOCK;
        apply_slope(width(k), h, back);
        T* swapped = front;
        front = back, back = swapped;
    }
}

// (length, BLOCK) to the rows of the atoms, times `scale`.
template <class T> void Networks<T>::store(const T* values, T scale, int n_rows, const int64_t* atoms, T* out) {
    for (int r = 0; r < n_rows; ++r) {
        T* to = out + atoms[r] * length;
        for (int i = 0; i < length; ++i) to[i] = scale * values[i * BLOCK + r];
    }
}

template <class T> void Networks<T>::run(int64_t first) {
    const int n_rows = int(job.n_rows - first < BLOCK ? job.n_rows - first : BLOCK);
    const int64_t* atoms = job.atoms + first;
    n_lanes = (n_rows + W - 1) / W * W;
    memset(input, 0, sizeof(T) * length * BLOCK);
    for (int r = 0; r < n_rows; ++r) {
        const T* from = static_cast<const T*>(job.aev) + atoms[r] * length;
        for (int i = 0; i < length; ++i) input[i * BLOCK + r] = from[i];
    }
    T *energies = static_cast<T*>(job.energies), *gradient = static_cast<T*>(job.gradient);
    for (int m = 0; m < job.n_members; ++m) {
        propagate(m);
        const T* energy = hidden + (all_widths - 1) * BLOCK;
        for (int r = 0; r < n_rows; ++r) energies[m * job.n_atoms + atoms[r]] = energy[r];
        if (!gradient) continue;
        backpropagate(m);
        if (!job.mean) store(total, 1, n_rows, atoms, gradient + m * job.n_atoms * length);
    }
    if (gradient && job.mean) store(total, T(1) / T(job.n_members), n_rows, atoms, gradient);
}

template <class T> size_t workspace_bytes(const NetworksJob& job) { return Networks<T>(job, nullptr).used; }

template <class T> void run(const NetworksJob& job, int64_t block, void* workspace) {
    Networks<T>(job, workspace).run(block * BLOCK);
}

}  // namespace

#define NAME_(level) level##_networks
#define NAME(level) NAME_(level)
extern const NetworksKernel NAME(SMELT_SIMD)[2];
const NetworksKernel NAME(SMELT_SIMD)[2] = {
    {workspace_bytes<float>, run<float>},
    {workspace_bytes<double>, run<double>},
};
