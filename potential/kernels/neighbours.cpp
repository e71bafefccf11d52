// Which atoms of a ragged batch of cells see each other, and across which periodic images?
//
// Every frame is cut into bins along its own lattice vectors, and its atoms are sorted by bin. An atom looks through the
// columns of bins along the third vector that a sphere of the cutoff can touch; atoms of a piece of a column lie one
// after the other. An axis shorter than the cutoff is walked round more than once, so that cells of all sizes take the
// same path. Distances are those of doubles, the same from both ends of a pair. A frame's list depends on that frame
// alone, and not on the number of threads.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "threads.h"

namespace {

constexpr double BINS_PER_CUTOFF[3] = {1.5, 1.5, 6};  // along a column, more bins cost nothing
constexpr double TOLERANCE_A = 1e-6;                  // widens the search only: borders of bins round to either side
constexpr double FLATTEST = 1e-12;                    // volume of a cell, beside that of a box with its edges
constexpr double MOST_TURNS = 1e9;                    // of an atom round its cell, so that shifts fit 32 bits
constexpr int64_t ATOMS_PER_PIECE = 128;

using Vector = double[3];

double dot(const Vector a, const Vector b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
void cross(const Vector a, const Vector b, Vector out) {
    for (int k = 0; k < 3; ++k) out[k] = a[(k + 1) % 3] * b[(k + 2) % 3] - a[(k + 2) % 3] * b[(k + 1) % 3];
}
void normalise(Vector v) {
    const double length = std::sqrt(dot(v, v));
    for (int k = 0; k < 3; ++k) v[k] /= length;
}

struct Batch {
    int64_t n_frames;
    const int64_t* first;                             // (n_frames + 1,), first atom of each frame
    const double *positions, *cells;                  // (N, 3) and (n_frames, 3, 3), A
    const bool* pbc;                                  // (n_frames, 3)
    double cutoff;
};

enum Status { DONE, NO_MEMORY, FLAT_CELL, NOT_FINITE };

// Atoms of one frame in the order of their bins.
class Grid {
public:
    double lattice[3][3];
    int64_t n_bins[3];
    bool periodic[3];
    double reach[3];                                  // bins within the cutoff, from the distance of lattice planes
    double width[3];                                  // of a bin: sum of (gap * width)^2 bounds the distance from below
    std::vector<int32_t> start;                       // first atom of each bin, and the end of the last
    std::vector<double> place[3], position[3];        // in units of bins; in A, inside the cell
    std::vector<int32_t> atom, wrap[3];               // number within the frame; turns that brought it into the cell

    Status build(const Batch& batch, int64_t frame);

private:
    Status complete(const double* cell, const bool* pbc);
    void choose_bins(const double (&extent)[3], int64_t n_atoms, double cutoff);
    void sort(const std::vector<double> (&fractional)[3], const double* positions);

    Vector reciprocal[3];
};

// The lattice with unit vectors, normal to it and to each other, along free axes; and its reciprocal vectors.
Status Grid::complete(const double* cell, const bool* pbc) {
    if (!std::all_of(cell, cell + 9, [](double x) { return std::isfinite(x); })) return NOT_FINITE;
    std::memcpy(lattice, cell, sizeof lattice);
    std::memcpy(periodic, pbc, sizeof periodic);
    const int n_periodic = periodic[0] + periodic[1] + periodic[2];
    for (int k = 0; k < 3; ++k) {
        double *mine = lattice[k], *next = lattice[(k + 1) % 3], *last = lattice[(k + 2) % 3];
        if (n_periodic == 0) {
            for (int x = 0; x < 3; ++x) mine[x] = x == k;
        } else if (n_periodic == 2 && !periodic[k]) {
            cross(next, last, mine), normalise(mine);
        } else if (n_periodic == 1 && periodic[k]) {
            int least = 0;
            for (int x = 1; x < 3; ++x) least = std::abs(mine[x]) < std::abs(mine[least]) ? x : least;
            const Vector axis = {double(least == 0), double(least == 1), double(least == 2)};
            cross(mine, axis, next), normalise(next);
            cross(mine, next, last), normalise(last);
        }
    }
    Vector normal;
    cross(lattice[1], lattice[2], normal);
    const double volume = dot(lattice[0], normal);
    double edges = 1;
    for (const Vector& edge : lattice) edges *= std::sqrt(dot(edge, edge));
    if (!(std::abs(volume) > FLATTEST * edges)) return FLAT_CELL;
    for (int k = 0; k < 3; ++k) {
        cross(lattice[(k + 1) % 3], lattice[(k + 2) % 3], reciprocal[k]);
        for (double& x : reciprocal[k]) x /= volume;
    }
    return DONE;
}

// Smallest eigenvalue of the Gram matrix of the normalised lattice vectors: |sum_k x_k e_k|^2 >= least * sum_k x_k^2.
double least_eigenvalue(const double (&lattice)[3][3]) {
    double g[3];
    for (int k = 0; k < 3; ++k) {
        const double *a = lattice[(k + 1) % 3], *b = lattice[(k + 2) % 3];
        g[k] = dot(a, b) / std::sqrt(dot(a, a) * dot(b, b));
    }
    const double p = std::sqrt((g[0] * g[0] + g[1] * g[1] + g[2] * g[2]) / 3);
    if (p < 1e-12) return 1 - 1e-9;
    const double angle = std::acos(std::clamp(g[0] * g[1] * g[2] / (p * p * p), -1.0, 1.0)) / 3;
    return std::max(1 + 2 * p * std::cos(angle + 2.0943951023931953) - 1e-9, 0.0);
}

void Grid::choose_bins(const double (&extent)[3], int64_t n_atoms, double cutoff) {
    double wanted[3];
    for (int k = 0; k < 3; ++k) {
        const double height = extent[k] / std::sqrt(dot(reciprocal[k], reciprocal[k]));
        wanted[k] = std::clamp(std::floor(height * BINS_PER_CUTOFF[k] / cutoff), 1.0, 1e6);
    }
    // Empty bins would cost more than they save.
    while (wanted[0] * wanted[1] * wanted[2] > 4.0 * n_atoms + 64) {
        double& most = *std::max_element(wanted, wanted + 3);
        most = std::ceil(most / 2);
    }
    const double shrink = std::sqrt(least_eigenvalue(lattice));
    for (int k = 0; k < 3; ++k) {
        const double share = extent[k] / wanted[k];
        n_bins[k] = int64_t(wanted[k]);
        reach[k] = (cutoff + TOLERANCE_A) * std::sqrt(dot(reciprocal[k], reciprocal[k])) / share;
        width[k] = shrink * share * std::sqrt(dot(lattice[k], lattice[k]));
    }
}

Status Grid::build(const Batch& batch, int64_t frame) {
    const int64_t n_atoms = batch.first[frame + 1] - batch.first[frame];
    const double* positions = batch.positions + 3 * batch.first[frame];
    const Status status = complete(batch.cells + 9 * frame, batch.pbc + 3 * frame);
    if (status != DONE) return status;
    std::vector<double> fractional[3];
    double extent[3];
    for (int k = 0; k < 3; ++k) {
        std::vector<double>& f = fractional[k];
        f.resize(n_atoms), wrap[k].resize(n_atoms);
        double lowest = std::numeric_limits<double>::infinity(), highest = -lowest;
        for (int64_t i = 0; i < n_atoms; ++i) {
            f[i] = dot(positions + 3 * i, reciprocal[k]);
            if (!(std::abs(f[i]) < MOST_TURNS)) return NOT_FINITE;
            lowest = std::min(lowest, f[i]), highest = std::max(highest, f[i]);
        }
        extent[k] = periodic[k] ? 1 : std::max(highest - lowest, TOLERANCE_A);
        for (int64_t i = 0; i < n_atoms; ++i) {
            const double origin = periodic[k] ? std::floor(f[i]) : lowest;
            wrap[k][i] = periodic[k] ? int32_t(origin) : 0;
            f[i] = (f[i] - origin) / extent[k];
        }
    }
    choose_bins(extent, n_atoms, batch.cutoff);
    sort(fractional, positions);
    return DONE;
}

// Counting sort over bins.
void Grid::sort(const std::vector<double> (&fractional)[3], const double* positions) {
    const int64_t n_atoms = int64_t(fractional[0].size());
    std::vector<int32_t> bin(n_atoms), turns[3];
    start.assign(n_bins[0] * n_bins[1] * n_bins[2] + 1, 0);
    for (int64_t i = 0; i < n_atoms; ++i) {
        int64_t key = 0;
        for (int k = 0; k < 3; ++k) {
            key = key * n_bins[k] + std::min(int64_t(fractional[k][i] * double(n_bins[k])), n_bins[k] - 1);
        }
        bin[i] = int32_t(key);
        ++start[key + 1];
    }
    for (size_t b = 1; b < start.size(); ++b) start[b] += start[b - 1];
    std::vector<int32_t> next(start.begin(), start.end() - 1);
    atom.resize(n_atoms);
    for (int64_t i = 0; i < n_atoms; ++i) atom[next[bin[i]]++] = int32_t(i);
    for (int k = 0; k < 3; ++k) {
        turns[k].swap(wrap[k]);
        wrap[k].resize(n_atoms), place[k].resize(n_atoms), position[k].resize(n_atoms);
    }
    for (int64_t slot = 0; slot < n_atoms; ++slot) {
        const int32_t i = atom[slot];
        for (int k = 0; k < 3; ++k) {
            wrap[k][slot] = turns[k][i];
            place[k][slot] = fractional[k][i] * double(n_bins[k]);
            position[k][slot] = positions[3 * i + k] - (turns[0][i] * lattice[0][k] + turns[1][i] * lattice[1][k] +
                                                       turns[2][i] * lattice[2][k]);
        }
    }
}

// Pairs of one atom that lie across the same image, as many as are between `end` and that of the run before.
struct Run { int32_t turn[3], end; };

// What was found for some atoms of one frame, in the order of their bins.
struct Piece {
    int64_t frame, low, high;                         // slots of the grid
    std::unique_ptr<int32_t[]> others;                // slots
    std::unique_ptr<Run[]> runs;
    std::unique_ptr<int32_t[]> n_runs;                // (high - low,)
};

template <class T> std::unique_ptr<T[]> copy(const T* from, size_t n) {
    std::unique_ptr<T[]> made(new T[n]);
    std::copy(from, from + n, made.get());
    return made;
}

// Looks round one atom after the other; what it finds is kept in room that is used again for the next piece.
class Search {
    std::vector<int32_t> others, n_runs;
    std::vector<Run> runs;
    size_t n_others = 0;

    void column(const Grid& grid, double cutoff, int64_t slot, int64_t column, int32_t turn_a, int32_t turn_b,
                double budget);
    void run(const Grid& grid, double cutoff, int64_t slot, int64_t first, int64_t last, const int32_t (&turn)[3]);

    // Bins [low, high] within `half` bins of `place`, and no further than the ends of an axis that is free.
    struct Range { int64_t low, high; };
    static Range within(const Grid& grid, int k, double place, double half) {
        const Range all = {int64_t(std::floor(place - half)), int64_t(std::floor(place + half))};
        if (grid.periodic[k]) return all;
        return {std::max<int64_t>(all.low, 0), std::min(all.high, grid.n_bins[k] - 1)};
    }
    // How far `place` is from bin `bin`, squared, as a lower bound of the distance; A^2.
    static double gap(const Grid& grid, int k, double place, int64_t bin) {
        const double apart = std::max({0.0, double(bin) - place, place - double(bin + 1)}) * grid.width[k];
        return apart * apart;
    }
    static double half(const Grid& grid, int k, double budget) {
        return std::min(grid.reach[k], std::sqrt(budget) / grid.width[k]);
    }
    static int64_t turns(int64_t bin, int64_t n_bins) {
        return int64_t(std::floor(double(bin) / double(n_bins)));
    }

public:
    void look(const Grid& grid, double cutoff, Piece& piece, int64_t* counts);
};

void Search::look(const Grid& grid, double cutoff, Piece& piece, int64_t* counts) {
    n_others = 0, n_runs.clear(), runs.clear();
    const double budget = (cutoff + TOLERANCE_A) * (cutoff + TOLERANCE_A);
    for (int64_t slot = piece.low; slot < piece.high; ++slot) {
        const size_t first = n_others, first_run = runs.size();
        const double a = grid.place[0][slot], b = grid.place[1][slot];
        const Range rows = within(grid, 0, a, half(grid, 0, budget));
        for (int64_t i = rows.low; i <= rows.high; ++i) {
            const double left = budget - gap(grid, 0, a, i);
            if (left < 0) continue;
            const int64_t turn_a = turns(i, grid.n_bins[0]), row = (i - turn_a * grid.n_bins[0]) * grid.n_bins[1];
            const Range columns = within(grid, 1, b, half(grid, 1, left));
            for (int64_t j = columns.low; j <= columns.high; ++j) {
                const double rest = left - gap(grid, 1, b, j);
                if (rest < 0) continue;
                const int64_t turn_b = turns(j, grid.n_bins[1]);
                column(grid, cutoff, slot, row + j - turn_b * grid.n_bins[1], int32_t(turn_a), int32_t(turn_b), rest);
            }
        }
        counts[grid.atom[slot]] = int64_t(n_others - first);
        n_runs.push_back(int32_t(runs.size() - first_run));
    }
    piece.others = copy(others.data(), n_others);
    piece.runs = copy(runs.data(), runs.size());
    piece.n_runs = copy(n_runs.data(), n_runs.size());
}

void Search::column(const Grid& grid, double cutoff, int64_t slot, int64_t column, int32_t turn_a, int32_t turn_b,
                    double budget) {
    const int64_t n = grid.n_bins[2];
    const int32_t* start = grid.start.data() + column * n;
    const double place = grid.place[2][slot];
    const Range bins = within(grid, 2, place, half(grid, 2, budget));
    for (int64_t k = bins.low; k <= bins.high;) {
        const int64_t turn = k >= 0 && k < n ? 0 : turns(k, n), last = std::min(bins.high, turn * n + n - 1);
        run(grid, cutoff, slot, start[k - turn * n], start[last - turn * n + 1], {turn_a, turn_b, int32_t(turn)});
        k = last + 1;
    }
}

void Search::run(const Grid& grid, double cutoff, int64_t slot, int64_t first, int64_t last,
                 const int32_t (&turn)[3]) {
    if (first == last) return;
    if (n_others + size_t(last - first) > others.size()) others.resize(2 * (n_others + size_t(last - first)));
    Vector move, own;
    for (int k = 0; k < 3; ++k) {
        move[k] = turn[0] * grid.lattice[0][k] + turn[1] * grid.lattice[1][k] + turn[2] * grid.lattice[2][k];
        own[k] = grid.position[k][slot];
    }
    const double *x = grid.position[0].data(), *y = grid.position[1].data(), *z = grid.position[2].data();
    const double limit = cutoff * cutoff;
    const int64_t itself = turn[0] || turn[1] || turn[2] ? -1 : slot;
    int32_t* out = others.data();
    size_t n = n_others;
    for (int64_t other = first; other < last; ++other) {
        const double dx = x[other] - own[0] + move[0], dy = y[other] - own[1] + move[1];
        const double dz = z[other] - own[2] + move[2];
        out[n] = int32_t(other);
        n += (dx * dx + dy * dy + dz * dz < limit) & (other != itself);
    }
    if (n == n_others) return;
    n_others = n;
    runs.push_back({{turn[0], turn[1], turn[2]}, int32_t(n)});
}

struct Found {
    Batch batch;
    std::vector<Grid> grids;
    std::vector<Piece> pieces;
};

Status build_grids(Found& found, int n_threads, int64_t* bad_frame) {
    std::atomic<int> worst{DONE};
    share_out(found.batch.n_frames, n_threads, [&](auto next) {
        for (int64_t frame; (frame = next()) >= 0;) {
            const Status status = found.grids[frame].build(found.batch, frame);
            if (status != DONE) worst = status, *bad_frame = frame;
        }
    });
    return Status(worst.load());
}

void search(Found& found, int n_threads, int64_t* row) {
    const int64_t* first = found.batch.first;
    for (int64_t frame = 0; frame < found.batch.n_frames; ++frame) {
        const int64_t n_atoms = first[frame + 1] - first[frame];
        for (int64_t low = 0; low < n_atoms; low += ATOMS_PER_PIECE) {
            found.pieces.push_back({frame, low, std::min(low + ATOMS_PER_PIECE, n_atoms), {}, {}, {}});
        }
    }
    share_out(int64_t(found.pieces.size()), n_threads, [&](auto next) {
        Search search;
        for (int64_t number; (number = next()) >= 0;) {
            Piece& piece = found.pieces[number];
            search.look(found.grids[piece.frame], found.batch.cutoff, piece, row + 1 + first[piece.frame]);
        }
    });
    row[0] = 0;
    for (int64_t i = 0; i < first[found.batch.n_frames]; ++i) row[i + 1] += row[i];
}

void write(const Grid& grid, const Piece& piece, int64_t first, const int64_t* row, int64_t* centre, int64_t* other,
           int32_t* shift) {
    const Run* run = piece.runs.get();
    const int32_t* from = piece.others.get();
    int32_t at = 0;
    for (int64_t slot = piece.low; slot < piece.high; ++slot) {
        const int64_t atom = first + grid.atom[slot];
        int64_t e = row[atom];
        for (const Run* last = run + piece.n_runs[slot - piece.low]; run < last; ++run) {
            int32_t turn[3];
            for (int k = 0; k < 3; ++k) turn[k] = run->turn[k] + grid.wrap[k][slot];
            for (; at < run->end; ++at, ++e) {
                const int32_t there = from[at];
                centre[e] = atom;
                other[e] = first + grid.atom[there];
                for (int k = 0; k < 3; ++k) shift[3 * e + k] = turn[k] - grid.wrap[k][there];
            }
        }
    }
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Search all frames; write row (n_atoms + 1,) and return what smelt_take_neighbours wants, or null with *status set,
// *bad_frame being a frame whose cell spans no space (2) or whose numbers are not finite (3).
EXPORT void* smelt_find_neighbours(int n_threads, int64_t n_frames, const int64_t* first, const double* positions,
                                   const double* cells, const bool* pbc, double cutoff, int64_t* row, int* status,
                                   int64_t* bad_frame) try {
    std::unique_ptr<Found> found(new Found{{n_frames, first, positions, cells, pbc, cutoff}, {}, {}});
    found->grids.resize(n_frames);
    *status = build_grids(*found, n_threads, bad_frame);
    if (*status != DONE) return nullptr;
    search(*found, n_threads, row);
    return found.release();
} catch (const std::bad_alloc&) {
    *status = NO_MEMORY;
    return nullptr;
}

// Write centre and other (row[-1],) and shift (row[-1], 3), and forget what was found; only the latter if `row` is null.
EXPORT void smelt_take_neighbours(void* handle, int n_threads, const int64_t* row, int64_t* centre, int64_t* other,
                                  int32_t* shift) {
    const std::unique_ptr<Found> found(static_cast<Found*>(handle));
    if (!row) return;
    share_out(int64_t(found->pieces.size()), n_threads, [&](auto next) {
        for (int64_t number; (number = next()) >= 0;) {
            const Piece& piece = found->pieces[number];
            write(found->grids[piece.frame], piece, found->batch.first[piece.frame], row, centre, other, shift);
        }
    });
}

}  // extern "C"
