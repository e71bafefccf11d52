// What are the vectors of the pairs of a list; how do quantities of pairs become quantities of atoms (forces), and back?
//
// One plain pass over the list: PyTorch's index_add takes as long as the AEV for the same sums. What a thread writes no
// other thread writes, and always in the order of the list, so the answer does not depend on the number of threads.
#include <new>

#include "threads.h"

namespace {

struct Pairs {
    int64_t n_items, n_atoms, n_edges;
    const int64_t *row, *other;
};

// Atoms [low, high) of one item: the sum over their own pairs less that over the pairs in which they are the other.
template <class T> void sum(const Pairs& p, const T* pair, T* atom, int64_t low, int64_t high) {
    std::fill(atom + 3 * low, atom + 3 * high, T(0));
    for (int64_t i = 0; i < p.n_atoms; ++i) {
        T x = 0, y = 0, z = 0;
        for (int64_t e = p.row[i]; e < p.row[i + 1]; ++e) {
            const T* f = pair + 3 * e;
            x += f[0], y += f[1], z += f[2];
            const int64_t other = p.other[e];
            if (other < low || other >= high) continue;
            T* to = atom + 3 * other;
            to[0] -= f[0], to[1] -= f[1], to[2] -= f[2];
        }
        if (i >= low && i < high) atom[3 * i] += x, atom[3 * i + 1] += y, atom[3 * i + 2] += z;
    }
}

template <class T> void sums(const Pairs& p, const T* pair, T* atom, int n_threads) {
    const int64_t parts = p.n_items ? std::max<int64_t>(1, n_threads / p.n_items) : 1;
    share_out(p.n_items * parts, n_threads, [&](auto next) {
        for (int64_t turn; (turn = next()) >= 0;) {
            const int64_t item = turn / parts, part = turn % parts;
            sum(p, pair + 3 * item * p.n_edges, atom + 3 * item * p.n_atoms, part * p.n_atoms / parts,
                (part + 1) * p.n_atoms / parts);
        }
    });
}

template <class T> void differences(const Pairs& p, const T* atom, T* pair, int n_threads) {
    share_out(p.n_items, n_threads, [&](auto next) {
        for (int64_t item; (item = next()) >= 0;) {
            const T* from = atom + 3 * item * p.n_atoms;
            T* to = pair + 3 * item * p.n_edges;
            for (int64_t i = 0; i < p.n_atoms; ++i) {
                for (int64_t e = p.row[i]; e < p.row[i + 1]; ++e) {
                    for (int k = 0; k < 3; ++k) to[3 * e + k] = from[3 * i + k] - from[3 * p.other[e] + k];
                }
            }
        }
    });
}

constexpr int64_t ATOMS_PER_TURN = 256;

// From each centre to the image of its neighbour, in double until it is stored: the shift may be far larger.
template <class T> void vectors(const int64_t* row, const int64_t* other, const int32_t* shift, const int64_t* frame,
                                const T* positions, const T* cells, T* out, int64_t low, int64_t high) {
    for (int64_t i = low; i < high; ++i) {
        const T *own = positions + 3 * i, *cell = cells + 9 * frame[i];
        for (int64_t e = row[i]; e < row[i + 1]; ++e) {
            const T* there = positions + 3 * other[e];
            const int32_t* turn = shift + 3 * e;
            for (int k = 0; k < 3; ++k) {
                const double move = turn[0] * double(cell[k]) + turn[1] * double(cell[3 + k]) +
                                    turn[2] * double(cell[6 + k]);
                out[3 * e + k] = T(double(there[k]) - double(own[k]) + move);
            }
        }
    }
}

template <class T> void all_vectors(int n_threads, int64_t n_atoms, const int64_t* row, const int64_t* other,
                                    const int32_t* shift, const int64_t* frame, const void* positions,
                                    const void* cells, void* out) {
    share_out((n_atoms + ATOMS_PER_TURN - 1) / ATOMS_PER_TURN, n_threads, [&](auto next) {
        for (int64_t turn; (turn = next()) >= 0;) {
            vectors(row, other, shift, frame, static_cast<const T*>(positions), static_cast<const T*>(cells),
                    static_cast<T*>(out), turn * ATOMS_PER_TURN, std::min((turn + 1) * ATOMS_PER_TURN, n_atoms));
        }
    });
}

template <class T> void run(bool summing, const Pairs& p, const void* in, void* out, int n_threads) {
    const T* from = static_cast<const T*>(in);
    T* to = static_cast<T*>(out);
    summing ? sums(p, from, to, n_threads) : differences(p, from, to, n_threads);
}

}  // namespace

// summing: (n_items, n_edges, 3) to (n_items, n_atoms, 3), else the transposed operation. Returns 0, or 1 when there is
// no memory.
extern "C" __attribute__((visibility("default")))
int smelt_pairs(int summing, int is_double, int n_threads, int64_t n_items, int64_t n_atoms, int64_t n_edges,
                const int64_t* row, const int64_t* other, const void* in, void* out) try {
    const Pairs pairs{n_items, n_atoms, n_edges, row, other};
    is_double ? run<double>(summing, pairs, in, out, n_threads) : run<float>(summing, pairs, in, out, n_threads);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Vectors (n_edges, 3) from each centre to the image of its neighbour, for positions (n_atoms, 3) and cells (n, 3, 3).
extern "C" __attribute__((visibility("default")))
void smelt_pair_vectors(int is_double, int n_threads, int64_t n_atoms, const int64_t* row, const int64_t* other,
                        const int32_t* shift, const int64_t* frame_of_atom, const void* positions, const void* cells,
                        void* out) {
    (is_double ? all_vectors<double> : all_vectors<float>)(n_threads, n_atoms, row, other, shift, frame_of_atom,
                                                           positions, cells, out);
}
