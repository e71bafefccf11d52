// What are the energies, forces and stress of a batch, from positions and a list of pairs, in one pass?
//
// Atoms are taken in blocks of one element: AEVs, networks of all members, and back to forces while all of it is in the
// cache. Nothing is as long as the list of pairs but the list itself. Atoms that see the same elements go together: parts
// of their AEVs are zero, and the networks leave them out.
//
// A frame is one unit, or a number of units that depends on its size alone. Within a unit atoms come by element, then by
// the elements that they see, then in order, and what they add up (forces on the frame, its virial, energies) belongs to
// that unit; units are added up in order. So the answer depends neither on batch mates nor on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "levels.h"
#include "run.h"

namespace {

constexpr int64_t ATOMS_PER_UNIT = 128, MOST_UNITS = 16, ATOMS_PER_TASK = 8192;

// Mean and population standard deviation over members (n_members, n).
template <class T> void spread(int64_t n_members, int64_t n, const T* members, T* mean, T* deviation) {
    constexpr int64_t CHUNK = 256;
    double sum[CHUNK], squares[CHUNK];
    for (int64_t first = 0; first < n; first += CHUNK) {
        const int64_t size = std::min(CHUNK, n - first);
        std::fill(sum, sum + size, 0.0), std::fill(squares, squares + size, 0.0);
        for (int64_t m = 0; m < n_members; ++m)
            for (int64_t x = 0; x < size; ++x) sum[x] += double(members[m * n + first + x]);
        for (int64_t x = 0; x < size; ++x) sum[x] /= double(n_members), mean[first + x] = T(sum[x]);
        for (int64_t m = 0; m < n_members; ++m) {
            for (int64_t x = 0; x < size; ++x) {
                const double off = double(members[m * n + first + x]) - sum[x];
                squares[x] += off * off;
            }
        }
        for (int64_t x = 0; x < size; ++x) deviation[first + x] = T(std::sqrt(squares[x] / double(n_members)));
    }
}

struct EvaluateJob {
    const AevShape* shape;
    PairList list;
    int64_t n_atoms, n_frames, n_items;               // n_items: cotangents, of the members or of their mean; or none
    const int64_t* first;                             // (n_frames + 1,)
    const NetworksJob* networks;                      // per element, without what belongs to a block
    const double* self_energies;                      // per element
    double* energy;                                   // (n_members, n_frames)
    void* forces;                                     // (n_items, n_atoms, 3)
    void* stress;                                     // (n_items, n_frames, 3, 3), or null
    void *mean, *deviation;                           // (n_atoms, 3), of the forces over items, or null
};

struct Buffer {
    AevUnit unit;
    std::vector<double> energy, virial;               // (n_members,) and (n_items, 3, 3)
    std::unique_ptr<char[]> forces;                   // of a frame of several units
};

template <class T> class Evaluation {
    const EvaluateJob& job;
    const AevKernel& aev;
    const NetworksKernel& networks;
    const int64_t n_members, length, lanes;           // of items, in the forces of a unit
    int64_t longest_row = 0;
    std::vector<Buffer> units;

    // The parts of a thread's workspace.
    struct Scratch {
        int64_t atoms[NETWORKS_BLOCK], rows[NETWORKS_BLOCK];
        const AevUnit* unit[NETWORKS_BLOCK];
        double* energy[NETWORKS_BLOCK];
        T *aev, *energies, *cotangent;
        char *for_aev, *for_networks;
    };

public:
    Evaluation(const EvaluateJob& job, const AevKernel& aev, const NetworksKernel& networks)
        : job(job), aev(aev), networks(networks), n_members(job.networks[0].n_members),
          length(job.networks[0].widths[0]), lanes(lanes_of<T>(job.n_items)) {
        for (int64_t i = 0; i < job.n_atoms; ++i) {
            longest_row = std::max(longest_row, job.list.row[i + 1] - job.list.row[i]);
        }
        for (int64_t f = 0; f < job.n_frames; ++f) add_units(f);
    }

    void run(int n_threads) {
        std::vector<int64_t> tasks = {0};             // units tasks[i] .. tasks[i + 1]
        const int64_t n_shares = n_threads > 1 ? 4 * n_threads : 1;  // more than threads, so that they end together
        const int64_t atoms_per_task = std::clamp<int64_t>(job.n_atoms / n_shares, 64, ATOMS_PER_TASK);
        int64_t n_atoms = 0;
        for (size_t u = 0; u < units.size(); ++u) {
            n_atoms += units[u].unit.high - units[u].unit.low;
            if (n_atoms >= atoms_per_task || u + 1 == units.size()) tasks.push_back(int64_t(u) + 1), n_atoms = 0;
        }
        size_t bytes = 0;
        Scratch scratch;
        divide(nullptr, scratch, bytes);
        ::run(int64_t(tasks.size()) - 1, n_threads, bytes, [&](int64_t number, char* workspace) {
            size_t used = 0;
            Scratch scratch;
            divide(workspace, scratch, used);
            for (int64_t element = 0; element < job.shape->n_species; ++element) {
                evaluate(tasks[number], tasks[number + 1], element, scratch);
            }
        });
        for (int64_t f = 0, u = 0; f < job.n_frames; ++f) u = add_up(f, u);
        if (job.mean) {
            spread(job.n_items, 3 * job.n_atoms, static_cast<const T*>(job.forces), static_cast<T*>(job.mean),
                   static_cast<T*>(job.deviation));
        }
    }

private:
    void add_units(int64_t frame) {
        const int64_t low = job.first[frame], n = job.first[frame + 1] - low;
        const int64_t n_units = std::clamp<int64_t>(n / ATOMS_PER_UNIT, 1, MOST_UNITS);
        const bool alone = n_units == 1 && lanes <= 1;
        std::vector<double> energy(n_members), virial(job.stress ? 9 * job.n_items : 0);
        for (int64_t k = 0; k < n_units; ++k) {
            const size_t bytes = alone ? 0 : sizeof(T) * 3 * n * lanes;
            units.push_back({{frame, low + n * k / n_units, low + n * (k + 1) / n_units, low,
                              static_cast<T*>(job.forces) + 3 * low, nullptr},
                             energy, virial, std::unique_ptr<char[]>(alone ? nullptr : new char[bytes]())});
            if (!alone) units.back().unit.forces = units.back().forces.get();
            if (job.stress) units.back().unit.virial = units.back().virial.data();
        }
        for (int64_t m = 0; m < job.n_items; ++m) {
            std::memset(static_cast<T*>(job.forces) + 3 * (m * job.n_atoms + low), 0, sizeof(T) * 3 * n);
        }
    }

    // Cut a workspace into its parts; count only if `base` is null.
    void divide(char* base, Scratch& scratch, size_t& used) {
        const auto take = [&](size_t bytes) {
            char* piece = base ? base + used : nullptr;
            used += (bytes + 63) / 64 * 64;
            return piece;
        };
        scratch.aev = reinterpret_cast<T*>(take(sizeof(T) * NETWORKS_BLOCK * length));
        scratch.energies = reinterpret_cast<T*>(take(sizeof(T) * NETWORKS_BLOCK * n_members));
        scratch.cotangent = reinterpret_cast<T*>(take(sizeof(T) * NETWORKS_BLOCK * length * job.n_items));
        scratch.for_aev = take(aev.block_bytes(block_of(NETWORKS_BLOCK, scratch)));
        size_t most = 0;
        for (int64_t e = 0; e < job.shape->n_species; ++e) most = std::max(most, networks.workspace_bytes(job.networks[e]));
        scratch.for_networks = take(most);
        for (int64_t r = 0; r < NETWORKS_BLOCK; ++r) scratch.rows[r] = r;
    }

    AevBlock block_of(int64_t n_rows, Scratch& scratch) const {
        return {job.shape, &job.list, job.n_items, longest_row, n_rows, scratch.atoms, scratch.unit, scratch.aev,
                scratch.cotangent};
    }

    struct Atom { uint64_t sees; int64_t atom, unit; };

    // Atoms of one element in units [begin, end), block after block.
    void evaluate(int64_t begin, int64_t end, int64_t element, Scratch& scratch) {
        std::vector<Atom> atoms;
        for (int64_t u = begin; u < end; ++u) {
            for (int64_t i = units[u].unit.low; i < units[u].unit.high; ++i) {
                if (job.list.species[i] == element) atoms.push_back({elements_seen(i), i, u});
            }
        }
        std::stable_sort(atoms.begin(), atoms.end(), [](const Atom& a, const Atom& b) { return a.sees < b.sees; });
        int64_t n_rows = 0;
        for (const Atom& each : atoms) {
            scratch.atoms[n_rows] = each.atom, scratch.unit[n_rows] = &units[each.unit].unit;
            scratch.energy[n_rows] = units[each.unit].energy.data();
            if (++n_rows == NETWORKS_BLOCK) evaluate_block(n_rows, element, scratch), n_rows = 0;
        }
        if (n_rows) evaluate_block(n_rows, element, scratch);
    }

    // A number for which elements, and whether more than one atom of each, are within the angular cutoff.
    uint64_t elements_seen(int64_t atom) const {
        const int64_t n_species = job.shape->n_species;
        if (n_species == 1) return 0;
        const double *own = job.list.positions + 3 * atom, *cell = job.list.cells + 9 * job.list.frame[atom];
        const double cutoff = job.shape->angular_cutoff;
        uint64_t once = 0, twice = 0;
        for (int64_t e = job.list.row[atom]; e < job.list.row[atom + 1]; ++e) {
            const double* there = job.list.positions + 3 * job.list.other[e];
            const int32_t* turn = job.list.shift + 3 * e;
            double squared = 0;
            for (int k = 0; k < 3; ++k) {
                const double apart =
                    there[k] - own[k] + (turn[0] * cell[k] + turn[1] * cell[3 + k] + turn[2] * cell[6 + k]);
                squared += apart * apart;
            }
            if (squared >= cutoff * cutoff) continue;
            const uint64_t bit = uint64_t(1) << job.list.species[job.list.other[e]] % 32;
            twice |= once & bit, once |= bit;
        }
        return once << 32 | twice;
    }

    void evaluate_block(int64_t n_rows, int64_t element, Scratch& scratch) {
        const AevBlock block = block_of(n_rows, scratch);
        aev.describe(block, scratch.for_aev);
        NetworksJob mine = job.networks[element];
        mine.n_rows = mine.n_atoms = n_rows;
        mine.atoms = scratch.rows, mine.aev = scratch.aev, mine.energies = scratch.energies;
        mine.gradient = job.n_items ? scratch.cotangent : nullptr, mine.mean = job.n_items == 1;
        mine.filled_only = 1;
        networks.run(mine, 0, scratch.for_networks);
        for (int64_t r = 0; r < n_rows; ++r) {
            for (int64_t m = 0; m < n_members; ++m) scratch.energy[r][m] += double(scratch.energies[m * n_rows + r]);
        }
        if (job.n_items) aev.pull(block, scratch.for_aev);
    }

    // Units of a frame from number u on; returns the first one of the next frame.
    int64_t add_up(int64_t frame, int64_t u) {
        const int64_t low = job.first[frame], high = job.first[frame + 1], n_numbers = 3 * (high - low);
        std::vector<double> energy(n_members), virial(9 * job.n_items);
        for (int64_t i = low; i < high; ++i) {
            for (double& sum : energy) sum += job.self_energies[job.list.species[i]];
        }
        for (; u < int64_t(units.size()) && units[u].unit.frame == frame; ++u) {
            const Buffer& mine = units[u];
            for (int64_t m = 0; m < n_members; ++m) energy[m] += mine.energy[m];
            for (size_t k = 0; k < mine.virial.size(); ++k) virial[k] += mine.virial[k];
            if (!mine.forces) continue;
            const T* from = reinterpret_cast<const T*>(mine.forces.get());
            for (int64_t m = 0; m < job.n_items; ++m) {
                T* to = static_cast<T*>(job.forces) + 3 * (m * job.n_atoms + low);
                for (int64_t x = 0; x < n_numbers; ++x) to[x] += from[x * lanes + m];
            }
        }
        for (int64_t m = 0; m < n_members; ++m) job.energy[m * job.n_frames + frame] = energy[m];
        for (int64_t m = 0; job.stress && m < job.n_items; ++m) store_stress(frame, m, virial.data() + 9 * m);
        return u;
    }

    // Symmetric, per volume; not a number where the cell has none.
    void store_stress(int64_t frame, int64_t item, const double* virial) {
        const double *a = job.list.cells + 9 * frame, *b = a + 3, *c = a + 6;
        const double volume = std::abs(a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2]) +
                                       a[2] * (b[0] * c[1] - b[1] * c[0]));
        T* out = static_cast<T*>(job.stress) + 9 * (item * job.n_frames + frame);
        for (int k = 0; k < 9; ++k) {
            const double mean = (virial[k] + virial[k % 3 * 3 + k / 3]) / 2;
            out[k] = T(volume > 0 ? mean / volume : std::numeric_limits<double>::quiet_NaN());
        }
    }
};

}  // namespace

extern "C" __attribute__((visibility("default")))
void smelt_spread(int is_double, int64_t n_members, int64_t n, const void* members, void* mean, void* deviation) {
    const auto find = [&](auto* of) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(of)>>;
        spread(n_members, n, of, static_cast<T*>(mean), static_cast<T*>(deviation));
    };
    is_double ? find(static_cast<const double*>(members)) : find(static_cast<const float*>(members));
}

// Energies of all members, and if there are cotangents forces and stress. Returns 0, or 1 when there is no memory.
extern "C" __attribute__((visibility("default")))
int smelt_evaluate(int level, int is_double, int n_threads, const EvaluateJob* job) try {
    if (is_double) {
        Evaluation<double>(*job, AEV[level][1], NETWORKS[level][1]).run(n_threads);
    } else {
        Evaluation<float>(*job, AEV[level][0], NETWORKS[level][0]).run(n_threads);
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
