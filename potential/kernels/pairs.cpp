// What are the vectors of the pairs of a list; how do quantities of pairs become quantities of atoms (forces), and back?
//
// One plain pass over the list: PyTorch's index_add takes as long as the AEV for the same sums. What a thread writes no
// other thread writes, and always in the order of the list, so the answer does not depend on the number of threads.
#include <cmath>
#include <limits>
#include <new>
#include <numeric>

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

// Component k from atom i to the image of atom j that is `turn` cells away; in double, for shifts may be far larger.
template <class T> double apart(const T* positions, const T* cell, int64_t i, int64_t j, const int32_t* turn, int k) {
    const double direct = double(positions[3 * j + k]) - double(positions[3 * i + k]);
    if (!(turn[0] | turn[1] | turn[2])) return direct;  // most are
    return direct + (turn[0] * double(cell[k]) + turn[1] * double(cell[3 + k]) + turn[2] * double(cell[6 + k]));
}

// From each centre to the image of its neighbour; U is the type that is wanted, T that of positions and cells.
template <class T, class U> void vectors(const int64_t* row, const int64_t* other, const int32_t* shift,
                                         const int64_t* frame, const T* positions, const T* cells, U* out, int64_t low,
                                         int64_t high) {
    for (int64_t i = low; i < high; ++i) {
        const T* cell = cells + 9 * frame[i];
        for (int64_t e = row[i]; e < row[i + 1]; ++e) {
            for (int k = 0; k < 3; ++k) out[3 * e + k] = U(apart(positions, cell, i, other[e], shift + 3 * e, k));
        }
    }
}

template <class T, class U> void all_vectors(int n_threads, int64_t n_atoms, const int64_t* row, const int64_t* other,
                                             const int32_t* shift, const int64_t* frame, const void* positions,
                                             const void* cells, void* out) {
    share_out((n_atoms + ATOMS_PER_TURN - 1) / ATOMS_PER_TURN, n_threads, [&](auto next) {
        for (int64_t turn; (turn = next()) >= 0;) {
            vectors(row, other, shift, frame, static_cast<const T*>(positions), static_cast<const T*>(cells),
                    static_cast<U*>(out), turn * ATOMS_PER_TURN, std::min((turn + 1) * ATOMS_PER_TURN, n_atoms));
        }
    });
}

// Whether some atom of the frame has moved by more than half of `slack` from where the strained frame carried it.
template <bool STRAINED, class T> bool has_moved(const T* positions, const double* built, const double* strain,
                                                 double slack, int64_t low, int64_t high) {
    constexpr int LANES = 8;                          // independent maxima, so that none waits for another
    double farthest[LANES] = {}, odd[LANES] = {};     // x - x is 0 but for infinite x and what is not a number
    const auto look = [&](int64_t i, int lane) {
        const double* b = built + 3 * i;
        double squared = 0;
        for (int k = 0; k < 3; ++k) {
            const double carried = STRAINED ? b[0] * strain[k] + b[1] * strain[3 + k] + b[2] * strain[6 + k] : b[k];
            const double moved = double(positions[3 * i + k]) - carried;
            squared += moved * moved;
        }
        farthest[lane] = std::max(farthest[lane], squared);
        odd[lane] += squared - squared;
    };
    int64_t i = low;
    for (; i + LANES <= high; i += LANES)
        for (int lane = 0; lane < LANES; ++lane) look(i + lane, lane);
    for (; i < high; ++i) look(i, 0);
    const double most = *std::max_element(farthest, farthest + LANES);
    return std::accumulate(odd, odd + LANES, 0.0) != 0 || !(slack >= 0 && 4 * most <= slack * slack);
}

template <class T> int have_moved(int64_t n_frames, const int64_t* first, const T* positions, const double* built,
                                  const double* strain, const double* slack) {
    for (int64_t f = 0; f < n_frames; ++f) {
        if (strain ? has_moved<true>(positions, built, strain + 9 * f, slack[f], first[f], first[f + 1])
                   : has_moved<false>(positions, built, strain, slack[f], first[f], first[f + 1])) {
            return 1;
        }
    }
    return 0;
}

// Shortest of the listed pairs of atoms [low, high). Images in cells next to each other, which are nearly all, come from
// a table: whether a pair is within one cell is as good as random in small ones, and a branch on it costs most.
template <class T> double shortest(const int64_t* row, const int64_t* other, const int32_t* shift, const T* positions,
                                   const T* cell, int64_t low, int64_t high) {
    double moves[27][3], least = std::numeric_limits<double>::infinity();
    const auto move = [&](const int32_t* turn, int k) {
        return turn[0] * double(cell[k]) + turn[1] * double(cell[3 + k]) + turn[2] * double(cell[6 + k]);
    };
    for (int n = 0; n < 27; ++n) {
        const int32_t turn[3] = {n / 9 - 1, n / 3 % 3 - 1, n % 3 - 1};
        for (int k = 0; k < 3; ++k) moves[n][k] = move(turn, k);
    }
    for (int64_t i = low; i < high; ++i) {
        for (int64_t e = row[i]; e < row[i + 1]; ++e) {
            const int32_t* turn = shift + 3 * e;
            const uint32_t a = turn[0] + 1, b = turn[1] + 1, c = turn[2] + 1;
            const bool near = (a < 3) & (b < 3) & (c < 3);
            double squared = 0;
            for (int k = 0; k < 3; ++k) {
                const double direct = double(positions[3 * other[e] + k]) - double(positions[3 * i + k]);
                const double d = direct + (near ? moves[9 * a + 3 * b + c][k] : move(turn, k));
                squared += d * d;
            }
            least = squared < least ? squared : least;
        }
    }
    return std::sqrt(least);
}

constexpr int64_t FEW_ATOMS = 512;                    // so that all pairs are sooner gone through than those listed

// The shortest distance between n atoms of a cell that repeats itself along all axes, or (cell null) along none. Infinite
// if it is not shorter than half the least height of the cell: for what is shorter, the image is the one in the cell that
// is centred on the other atom.
template <class T> double shortest_of_few(const T* positions, const T* cell, int64_t n) {
    constexpr int LANES = 8;                          // independent minima, so that none waits for another
    constexpr double ROUND = 6755399441055744.0;      // 1.5 * 2^52: adding it rounds to an integer
    double at[3][FEW_ATOMS], own[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1}, limit = std::numeric_limits<double>::infinity();
    double inverse[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
    const double round = cell ? ROUND : 0, whole = cell ? 1 : 0;
    if (cell) {
        for (int x = 0; x < 9; ++x) own[x] = double(cell[x]);
        for (int k = 0; k < 3; ++k) {
            const double *a = own + 3 * ((k + 1) % 3), *b = own + 3 * ((k + 2) % 3);
            for (int x = 0; x < 3; ++x) inverse[3 * x + k] = a[(x + 1) % 3] * b[(x + 2) % 3] - a[(x + 2) % 3] * b[(x + 1) % 3];
        }
        const double volume = own[0] * inverse[0] + own[1] * inverse[3] + own[2] * inverse[6];
        for (double& each : inverse) each /= volume;
        for (int k = 0; k < 3; ++k) {
            double squared = 0;
            for (int x = 0; x < 3; ++x) squared += inverse[3 * x + k] * inverse[3 * x + k];
            limit = std::min(limit, 0.25 / squared);
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const T* p = positions + 3 * i;
        for (int k = 0; k < 3; ++k) {
            at[k][i] = double(p[0]) * inverse[k] + double(p[1]) * inverse[3 + k] + double(p[2]) * inverse[6 + k];
        }
    }
    double least[LANES];
    std::fill(least, least + LANES, std::numeric_limits<double>::infinity());
    const auto look = [&](int64_t i, int64_t j, int lane) {
        double turn[3], squared = 0;
        for (int k = 0; k < 3; ++k) {
            turn[k] = at[k][j] - at[k][i];
            turn[k] -= whole * ((turn[k] + round) - round);
        }
        for (int x = 0; x < 3; ++x) {
            const double apart = turn[0] * own[x] + turn[1] * own[3 + x] + turn[2] * own[6 + x];
            squared += apart * apart;
        }
        least[lane] = squared < least[lane] ? squared : least[lane];
    };
    for (int64_t i = 1; i < n; ++i) {
        int64_t j = 0;
        for (; j + LANES <= i; j += LANES)
            for (int lane = 0; lane < LANES; ++lane) look(i, j + lane, lane);
        for (; j < i; ++j) look(i, j, 0);
    }
    const double squared = *std::min_element(least, least + LANES);
    return squared < limit ? std::sqrt(squared) : std::numeric_limits<double>::infinity();
}

// The shortest listed distance of a frame of atoms [low, high).
template <class T> double shortest_of_frame(const bool* pbc, const int64_t* row, const int64_t* other,
                                            const int32_t* shift, const T* positions, const T* cell, int64_t low,
                                            int64_t high) {
    const bool periodic = pbc[0] & pbc[1] & pbc[2], free = !(pbc[0] | pbc[1] | pbc[2]);
    // If any pair is listed, the shortest is.
    if (high - low <= FEW_ATOMS && (periodic | free) && row[high] > row[low]) {
        const double found = shortest_of_few(positions + 3 * low, periodic ? cell : nullptr, high - low);
        if (std::isfinite(found)) return found;
    }
    return shortest(row, other, shift, positions, cell, low, high);
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

// Vectors (n_edges, 3) from each centre to the image of its neighbour, for positions (n_atoms, 3) and cells (n, 3, 3)
// of one type, and vectors of the same or another.
extern "C" __attribute__((visibility("default")))
void smelt_pair_vectors(int from_double, int to_double, int n_threads, int64_t n_atoms, const int64_t* row,
                        const int64_t* other, const int32_t* shift, const int64_t* frame_of_atom,
                        const void* positions, const void* cells, void* out) {
    const auto from_doubles = to_double ? all_vectors<double, double> : all_vectors<double, float>;
    const auto from_floats = to_double ? all_vectors<float, double> : all_vectors<float, float>;
    (from_double ? from_doubles : from_floats)(n_threads, n_atoms, row, other, shift, frame_of_atom, positions, cells,
                                               out);
}

// Whether a frame holds an atom that has moved by more than half of slack (n_frames,) from built (n_atoms, 3) times
// strain (n_frames, 3, 3), or from built itself if strain is null.
extern "C" __attribute__((visibility("default")))
int smelt_moved(int is_double, int64_t n_frames, const int64_t* first, const void* positions, const double* built,
                const double* strain, const double* slack) {
    return is_double ? have_moved(n_frames, first, static_cast<const double*>(positions), built, strain, slack)
                     : have_moved(n_frames, first, static_cast<const float*>(positions), built, strain, slack);
}

// out: (n_frames,), the shortest listed distance of each frame, infinite where there is none.
extern "C" __attribute__((visibility("default")))
void smelt_shortest(int is_double, int n_threads, int64_t n_frames, const int64_t* first, const bool* pbc,
                    const int64_t* row, const int64_t* other, const int32_t* shift, const void* positions,
                    const void* cells, double* out) {
    const auto find = [&](auto* at, auto* cell, int64_t f) {
        return shortest_of_frame(pbc + 3 * f, row, other, shift, at, cell + 9 * f, first[f], first[f + 1]);
    };
    share_out(n_frames, n_threads, [&](auto next) {
        for (int64_t f; (f = next()) >= 0;) {
            out[f] = is_double ? find(static_cast<const double*>(positions), static_cast<const double*>(cells), f)
                               : find(static_cast<const float*>(positions), static_cast<const float*>(cells), f);
        }
    });
}
