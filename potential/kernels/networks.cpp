// What are the energies of all members for a block of atoms, and their gradients by the AEV, on one instruction set?
//
// A block's layers stay in the cache from the AEV to the gradient, which is what a chain of library matrix products
// cannot do.
//
// Compiled once per instruction set, as aev.cpp is and under the same rule: no external linkage but the table.
#include "networks.h"
#include "dense.h"

namespace {

static_assert(BLOCK == NETWORKS_BLOCK, "the entry points and the arithmetic cut atoms into the same blocks");

template <class T> class Networks {
    using D = Dense<T>;
    using Tiles = ::Tiles<T>;

    const NetworksJob& job;
    const int n_layers, length;
    const T alpha;
    int widest = 0, all_widths = 0, n_lanes = 0;      // lanes of the block in use, whole vectors
    T *input, *hidden, *front, *back, *total;         // (width, BLOCK) each; hidden holds all layers
    Run* runs;
    Runs filled{};                                    // inputs of the block
    char *room, *input_room;                          // of products, and of those by the input

public:
    size_t used = 0;

    Networks(const NetworksJob& job, void* workspace)
        : job(job), n_layers(int(job.n_layers)), length(int(job.widths[0])), alpha(T(job.celu_alpha)) {
        for (int k = 0; k < n_layers; ++k) {
            widest = job.widths[k] > widest ? int(job.widths[k]) : widest;
            all_widths += width(k + 1);
        }
        T* base = static_cast<T*>(workspace);
        for (T** piece : {&input, &total}) *piece = base + used, used += length * BLOCK;
        for (T** piece : {&front, &back}) *piece = base + used, used += widest * BLOCK;
        hidden = base + used, used += all_widths * BLOCK;
        used *= sizeof(T);
        for (char** piece : {&room, &input_room}) {
            *piece = static_cast<char*>(workspace) + used, used += Tiles::room_bytes(widest);
        }
        runs = reinterpret_cast<Run*>(static_cast<char*>(workspace) + used), used += sizeof(Run) * D::most_runs(length);
    }

    void run(int64_t first);
    void pack(int member, char* out) const {
        for (int k = 0; k < n_layers; ++k) {
            const bool shared = k == 0;               // the inputs, by all members
            Tiles::pack(width(k + 1), width(k), weight(k, member), shared ? int(job.n_members) : 1,
                        weight(k, shared ? 0 : member), packed_in(out, k, member));
        }
    }

private:
    int width(int layer) const { return int(job.widths[layer]); }
    const T* weight(int layer, int member) const {
        return static_cast<const T*>(job.weights[layer]) + int64_t(member) * width(layer) * width(layer + 1);
    }
    const T* bias(int layer, int member) const {
        return static_cast<const T*>(job.biases[layer]) + int64_t(member) * width(layer + 1);
    }

    // Where a layer's packed weights are, null if nowhere; on the way forth, and back for outputs from `first` on.
    template <class Byte> Byte* packed_in(Byte* all, int layer, int member) const {
        if (!all || Tiles::packed_bytes(width(layer + 1), width(layer)) == 0) return nullptr;
        return all + member * packed_bytes<T>(job.widths, n_layers) + packed_bytes<T>(job.widths, layer);
    }
    const char* packed(int layer, int member) const {
        return packed_in(static_cast<const char*>(job.packed), layer, member);
    }
    Packed forth(int layer, int member) const { return Tiles::forth(width(layer), packed(layer, member)); }
    Packed back_from(int layer, int member, int first) const {
        return Tiles::back(width(layer + 1), width(layer), packed(layer, member), first);
    }

    void propagate(int member);
    void backpropagate(int member);
};

// Hidden layers and energy of one member.
template <class T> void Networks<T>::propagate(int member) {
    const T* in = input;
    T* out = hidden;
    for (int k = 0; k < n_layers; ++k) {
        typename D::Product p{width(k), weight(k, member), width(k), 1, in, bias(k, member), out, false, n_lanes,
                              forth(k, member), room};
        if (k == 0) p.room = input_room, p.runs = &filled, p.prepared = member > 0;
        D::multiply(width(k + 1), p);
        if (k + 1 < n_layers) D::activate(width(k + 1), alpha, out, n_lanes);
        in = out, out += width(k + 1) * BLOCK;
    }
}

// From the energy back to the AEV: into `total`, added to the members before this one for the mean.
template <class T> void Networks<T>::backpropagate(int member) {
    const T* h = hidden + (all_widths - 1) * BLOCK;
    for (int t = 0; t < BLOCK; ++t) front[t] = 1;
    for (int k = n_layers - 1; k > 0; --k) {
        D::multiply(width(k), {width(k + 1), weight(k, member), 1, width(k), front, nullptr, back, false, n_lanes,
                               back_from(k, member, 0), room});
        h -= width(k) * BLOCK;
        D::apply_slope(width(k), alpha, h, back, back, n_lanes);
        T* swapped = front;
        front = back, back = swapped;
    }
    const Run all[] = {{0, length}};
    typename D::Product p{width(1), nullptr, 1, length, front, nullptr, nullptr, job.mean && member, n_lanes, {},
                          room};
    for (const Run& run : job.filled_only ? filled : Runs{all, 1}) {
        p.w = weight(0, member) + run.begin, p.out = total + run.begin * BLOCK;
        p.packed = back_from(0, member, run.begin), p.turned = Tiles::TURNS && p.packed.strips;
        D::multiply(run.end - run.begin, p);
        p.prepared = true;
    }
}

template <class T> void Networks<T>::run(int64_t first) {
    const int n_rows = int(job.n_rows - first < BLOCK ? job.n_rows - first : BLOCK);
    const int64_t* atoms = job.atoms + first;
    n_lanes = D::whole(n_rows);
    T *energies = static_cast<T*>(job.energies), *gradient = static_cast<T*>(job.gradient);
    const T* from[BLOCK];
    T* to[BLOCK];
    for (int r = 0; r < n_rows; ++r) from[r] = static_cast<const T*>(job.aev) + atoms[r] * length;
    D::to_lanes(length, n_rows, from, input);
    filled = D::filled(length, n_rows, {from}, runs);
    if (job.filled_only) memset(total, 0, sizeof(T) * length * BLOCK);
    for (int m = 0; m < job.n_members; ++m) {
        propagate(m);
        const T* energy = hidden + (all_widths - 1) * BLOCK;
        for (int r = 0; r < n_rows; ++r) energies[m * job.n_atoms + atoms[r]] = energy[r];
        if (!gradient) continue;
        backpropagate(m);
        if (job.mean && m + 1 < job.n_members) continue;
        T* row = job.mean ? gradient : gradient + m * job.n_atoms * length;
        for (int r = 0; r < n_rows; ++r) to[r] = row + atoms[r] * length;
        D::from_lanes(length, n_rows, total, job.mean ? T(1) / T(job.n_members) : T(1), to, Tiles::TURNS && packed(0, m));
    }
}

template <class T> size_t packed_bytes(const NetworksJob& job) {
    return packed_bytes<T>(job.widths, job.n_layers) * job.n_members;
}
template <class T> void pack(const NetworksJob& job, int64_t member, void* packed) {
    Networks<T>(job, nullptr).pack(int(member), static_cast<char*>(packed));
}
template <class T> size_t workspace_bytes(const NetworksJob& job) { return Networks<T>(job, nullptr).used; }

template <class T> void run(const NetworksJob& job, int64_t block, void* workspace) {
    typename Tiles<T>::Configured configured;
    Networks<T>(job, workspace).run(block * BLOCK);
}

}  // namespace

#define NAME_(level) level##_networks
#define NAME(level) NAME_(level)
extern const NetworksKernel NAME(SMELT_SIMD)[2];
const NetworksKernel NAME(SMELT_SIMD)[2] = {
    {packed_bytes<float>, pack<float>, workspace_bytes<float>, run<float>},
    {packed_bytes<double>, pack<double>, workspace_bytes<double>, run<double>},
};
