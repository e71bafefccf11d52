// How do a loss on energies and forces and its gradient pass through the networks, on one instruction set?
// And through a Jacobian that was kept, from dE/dAEV to forces and back?
//
// The loss depends on energies E and on g = dE/dAEV. Its gradient by the parameters is that of c E + <v, g>, c and v being
// the loss's derivatives: v runs through the layers as a tangent t, and the way back (z_back) collects both (Pearlmutter,
// doi:10.1162/neco.1994.6.1.147). Weights get z_back h^T + pull t^T, with pull = dE/dz.
//
// Compiled once per instruction set, as aev.cpp is and under the same rule: no external linkage but the table.
#include "training.h"
#include "dense.h"

namespace {

// How many numbers of the tape belong to one member's networks of an element: h and dE/dz of hidden layers, packed weights.
template <class T> int64_t tape_numbers(const LayersJob& job, int64_t element) {
    const LayersShape& shape = job.shapes[element];
    int64_t all_hidden = 0;
    for (int64_t k = 1; k < shape.n_layers; ++k) all_hidden += shape.widths[k];
    const int64_t n_blocks = (job.first[element + 1] - job.first[element] + BLOCK - 1) / BLOCK;
    const int64_t packed_numbers = packed_bytes<T>(shape.widths, shape.n_layers) / sizeof(T);
    return n_blocks ? 2 * all_hidden * BLOCK * n_blocks + packed_numbers : 0;
}

template <class T> int64_t tape_numbers(const LayersJob& job) {
    int64_t numbers = 0;
    for (int64_t e = 0; e < job.n_elements; ++e) numbers += job.n_members * tape_numbers<T>(job, e);
    return numbers;
}

template <class T> class Layers {
    using D = Dense<T>;
    using Tiles = ::Tiles<T>;
    using S = Simd<T>;
    using V = typename S::V;
    static constexpr int W = S::W;

    const LayersJob& job;
    const int64_t member, element;
    const LayersShape& shape;
    const int64_t *atoms, n_atoms;                    // of the element
    const int n_hidden, length;
    const T alpha;
    int widest = 0, all_hidden = 0;
    int64_t numbers = 0;                              // of padded parameters
    T *input, *tangents, *tilts, *back, *z_back;      // (width, BLOCK); tangents and tilts hold all layers
    T *rows, *tangent_rows;                           // (BLOCK, widest in whole vectors)
    T *sums, *bias_sums;
    char* room;                                       // of products
    Run* runs;

public:
    size_t used = 0;

    Layers(const LayersJob& job, int64_t member, int64_t element, void* workspace)
        : job(job), member(member), element(element), shape(job.shapes[element]), atoms(job.atoms + job.first[element]),
          n_atoms(job.first[element + 1] - job.first[element]), n_hidden(int(shape.n_layers) - 1),
          length(int(shape.widths[0])), alpha(T(job.celu_alpha)) {
        for (int k = 0; k <= n_hidden; ++k) {
            widest = width(k) > widest ? width(k) : widest;
            if (k) all_hidden += width(k);
            numbers += int64_t(width(k + 1)) * D::whole(width(k));
        }
        T* base = static_cast<T*>(workspace);
        const auto take = [&](T*& piece, size_t n) { piece = base + used, used += (n + W - 1) / W * W; };
        take(input, size_t(length) * BLOCK);
        take(tangents, size_t(length + all_hidden) * BLOCK), take(tilts, size_t(all_hidden) * BLOCK);
        for (T** piece : {&back, &z_back}) take(*piece, size_t(widest) * BLOCK);
        for (T** piece : {&rows, &tangent_rows}) take(*piece, size_t(D::whole(widest)) * BLOCK);
        take(sums, size_t(numbers)), take(bias_sums, size_t(all_hidden + 1));
        used *= sizeof(T);
        room = static_cast<char*>(workspace) + used, used += Tiles::room_bytes(widest);
        runs = reinterpret_cast<Run*>(static_cast<char*>(workspace) + used), used += sizeof(Run) * D::most_runs(length);
    }

    void forward();
    void gradient();

private:
    int width(int layer) const { return int(shape.widths[layer]); }
    const T* weight(int layer) const {
        return static_cast<const T*>(job.parameters) + member * job.step + shape.offsets[layer];
    }
    const T* bias(int layer) const { return weight(layer) + int64_t(width(layer)) * width(layer + 1); }
    T* tape() const {
        int64_t before = 0;
        for (int64_t e = 0; e < element; ++e) before += job.n_members * tape_numbers<T>(job, e);
        return static_cast<T*>(job.tape) + before + member * tape_numbers<T>(job, element);
    }
    T* tape(int64_t first) const { return tape() + first / BLOCK * 2 * all_hidden * BLOCK; }
    // Where a layer's packed weights are, null if nowhere; on the way forth, and back for outputs from `first` on.
    char* packed(int layer) const {
        if (Tiles::packed_bytes(width(layer + 1), width(layer)) == 0) return nullptr;
        T* after_blocks = tape((n_atoms + BLOCK - 1) / BLOCK * BLOCK);
        return reinterpret_cast<char*>(after_blocks) + packed_bytes<T>(shape.widths, layer);
    }
    Packed forth(int layer) const { return Tiles::forth(width(layer), packed(layer)); }
    Packed back_from(int layer, int first) const {
        return Tiles::back(width(layer + 1), width(layer), packed(layer), first);
    }
    // Of the block that begins with this atom: how many atoms, and their rows of an array (n_atoms, per_atom).
    int rows_from(int64_t first) const { return int(n_atoms - first < BLOCK ? n_atoms - first : BLOCK); }
    template <class U> void block_rows(U* array, int64_t first, int64_t per_atom, U** out) const {
        const int n_rows = rows_from(first);
        for (int r = 0; r < n_rows; ++r) out[r] = array + atoms[first + r] * per_atom;
    }
    void aev_rows(int64_t first, const T** out) const {
        const T* aev = static_cast<const T*>(job.aev);
        if (!job.rows) return block_rows(aev, first, length, out);
        for (int r = 0; r < rows_from(first); ++r) out[r] = aev + job.rows[atoms[first + r]] * length;
    }
    // What is this member's of an array (n_members, n_atoms, per_atom).
    T* own(void* array, int64_t per_atom) const { return static_cast<T*>(array) + member * job.n_atoms * per_atom; }
    const T* own(const void* array, int64_t per_atom) const {
        return static_cast<const T*>(array) + member * job.n_atoms * per_atom;
    }

    void forward_block(int64_t first);
    void gradient_block(int64_t first);
    void push(const T* hidden, int n_lanes, const Runs& filled);
    void last_layer(const T* weights, const T* by_energy, const T* hidden, int n_lanes);
    void bend(int n, const T* tilt, const T* pull, const T* hidden, T* bias_sum, int n_lanes);
    void store();
    void put(int n, const T* sum, T* out) const;
};

template <class T> void Layers<T>::forward() {
    for (int k = 0; k <= n_hidden && n_atoms; ++k) {
        Tiles::pack(width(k + 1), width(k), weight(k), 1, weight(k), packed(k));
    }
    for (int64_t first = 0; first < n_atoms; first += BLOCK) forward_block(first);
}

template <class T> void Layers<T>::forward_block(int64_t first) {
    const T* from[BLOCK];
    T* to[BLOCK];
    const int n_rows = rows_from(first), n_lanes = D::whole(n_rows);
    aev_rows(first, from);
    D::to_lanes(length, n_rows, from, input);
    T *out = tape(first), *pull = out + 2 * all_hidden * BLOCK;
    const Runs filled = D::filled(length, n_rows, {from}, runs);
    const T* in = input;
    for (int k = 0; k < n_hidden; ++k) {
        typename D::Product p{width(k), weight(k), width(k), 1, in, bias(k), out, false, n_lanes, forth(k), room};
        if (k == 0) p.runs = &filled;
        D::multiply(width(k + 1), p);
        D::activate(width(k + 1), alpha, out, n_lanes);
        in = out, out += width(k + 1) * BLOCK;
    }
    const T* last = weight(n_hidden);
    D::multiply(1, {width(n_hidden), last, width(n_hidden), 1, in, bias(n_hidden), back, false, n_lanes,
                    forth(n_hidden), room});
    T* energies = own(job.energies, 1);
    for (int r = 0; r < n_rows; ++r) energies[atoms[first + r]] = back[r];

    const T* above = nullptr;
    for (int k = n_hidden; k >= 1; --k) {
        pull -= width(k) * BLOCK, out -= width(k) * BLOCK;
        if (above) {
            D::multiply(width(k), {width(k + 1), weight(k), 1, width(k), above, nullptr, pull, false, n_lanes,
                                   back_from(k, 0), room});
        } else {
            for (int j = 0; j < width(k); ++j)
                for (int t = 0; t < n_lanes; t += W) S::store(pull + j * BLOCK + t, S::all(last[j]));
        }
        D::apply_slope(width(k), alpha, out, pull, pull, n_lanes);
        above = pull;
    }
    typename D::Product p{width(1), nullptr, 1, length, above, nullptr, nullptr, false, n_lanes, {}, room};
    for (const Run& run : filled) {                   // what is zero stays zero: no atom of the block moves it
        p.w = weight(0) + run.begin, p.out = input + run.begin * BLOCK;
        p.packed = back_from(0, run.begin), p.turned = Tiles::TURNS && p.packed.strips;
        D::multiply(run.end - run.begin, p);
        p.prepared = true;
    }
    block_rows(own(job.g, length), first, length, to);
    D::from_lanes(length, n_rows, input, 1, to, Tiles::TURNS && packed(0));
}

template <class T> void Layers<T>::gradient() {
    memset(sums, 0, sizeof(T) * numbers);
    memset(bias_sums, 0, sizeof(T) * (all_hidden + 1));
    for (int64_t first = 0; first < n_atoms; first += BLOCK) gradient_block(first);
    store();
}

template <class T> void Layers<T>::gradient_block(int64_t first) {
    const T *aev[BLOCK], *by_g[BLOCK], *by_energy[BLOCK];
    const int n_rows = rows_from(first), n_lanes = D::whole(n_rows);
    aev_rows(first, aev);
    block_rows(own(job.by_g, length), first, length, by_g);
    block_rows(own(job.by_energy, 1), first, 1, by_energy);
    T weights[BLOCK];
    D::to_lanes(1, n_rows, by_energy, weights);
    D::to_lanes(length, n_rows, by_g, tangents);
    const Runs filled = D::filled(length, n_rows, {aev, by_g}, runs);
    const T *hidden = tape(first), *pull = hidden + 2 * all_hidden * BLOCK;
    push(hidden, n_lanes, filled);
    last_layer(weight(n_hidden), weights, hidden, n_lanes);

    hidden += all_hidden * BLOCK;
    const T *tilt = tilts + all_hidden * BLOCK, *tangent = tangents + (length + all_hidden) * BLOCK;
    T *sum = sums + numbers - D::whole(width(n_hidden)), *bias_sum = bias_sums + all_hidden;
    T* row[BLOCK];
    for (int k = n_hidden - 1; k >= 0; --k) {         // from hidden layer k + 1 to its input
        const int n_out = width(k + 1), n_in = width(k), row_length = D::whole(n_in);
        hidden -= n_out * BLOCK, pull -= n_out * BLOCK, tilt -= n_out * BLOCK, tangent -= n_out * BLOCK;
        bias_sum -= n_out, sum -= n_out * row_length;
        bend(n_out, tilt, pull, hidden, bias_sum, n_lanes);
        for (T* array : {rows, tangent_rows}) {
            for (int r = 0; r < n_rows; ++r) {
                row[r] = array + r * row_length;
                for (int i = n_in; i < row_length; ++i) row[r][i] = 0;
            }
            const bool values = array == rows;
            if (k) D::from_lanes(n_in, n_rows, (values ? hidden : tangent) - n_in * BLOCK, 1, row);
            for (int r = 0; !k && r < n_rows; ++r) memcpy(row[r], values ? aev[r] : by_g[r], sizeof(T) * length);
        }
        // Atoms are what is summed over.
        typename D::Outer outer{n_rows, row_length, {z_back, pull}, {rows, tangent_rows}, sum, room};
        const Run all[] = {{0, n_in}};
        for (const Run& run : k ? Runs{all, 1} : filled) D::add_outer(n_out, outer, run), outer.prepared = true;
        if (k) D::multiply(n_in, {n_out, weight(k), 1, n_in, z_back, nullptr, back, false, n_lanes,
                               back_from(k, 0), room});
    }
}

// Tangents of all layers, and tilts = dz along the tangent.
template <class T> void Layers<T>::push(const T* hidden, int n_lanes, const Runs& filled) {
    const T* in = tangents;
    T *out = tangents + length * BLOCK, *tilt = tilts;
    for (int k = 0; k < n_hidden; ++k) {
        const int n = width(k + 1);
        typename D::Product p{width(k), weight(k), width(k), 1, in, nullptr, tilt, false, n_lanes, forth(k), room};
        if (k == 0) p.runs = &filled;
        D::multiply(n, p);
        D::apply_slope(n, alpha, hidden, tilt, out, n_lanes);
        in = out, out += n * BLOCK, tilt += n * BLOCK, hidden += n * BLOCK;
    }
}

// The output's own weights; and the way back begins.
template <class T> void Layers<T>::last_layer(const T* weights, const T* by_energy, const T* hidden, int n_lanes) {
    const int n = width(n_hidden), before = (all_hidden - n) * BLOCK;
    const T *h = hidden + before, *tangent = tangents + length * BLOCK + before;
    T* sum = sums + numbers - D::whole(n);
    for (int j = 0; j < n; ++j) {
        V total{};
        for (int t = 0; t < n_lanes; t += W) {
            const V c = S::load(by_energy + t);
            total += c * S::load(h + j * BLOCK + t) + S::load(tangent + j * BLOCK + t);
            S::store(back + j * BLOCK + t, c * weights[j]);
        }
        sum[j] += S::sum(total);
    }
    V total{};
    for (int t = 0; t < n_lanes; t += W) total += S::load(by_energy + t);
    bias_sums[all_hidden] += S::sum(total);
}

// z_back = tilt pull CELU'' / CELU' + back CELU'; CELU'' is CELU' / alpha where h < 0.
template <class T>
void Layers<T>::bend(int n, const T* tilt, const T* pull, const T* hidden, T* bias_sum, int n_lanes) {
    for (int j = 0; j < n; ++j) {
        V total{};
        for (int i = j * BLOCK; i < j * BLOCK + n_lanes; i += W) {
            const V h = S::load(hidden + i), curved = S::load(tilt + i) * S::load(pull + i) * (T(1) / alpha);
            const V z = (h < T(0) ? curved : V{}) + S::load(back + i) * D::slope(h, alpha);
            S::store(z_back + i, z);
            total += z;
        }
        bias_sum[j] += S::sum(total);
    }
}

template <class T> void Layers<T>::store() {
    const T *sum = sums, *bias_sum = bias_sums;
    for (int k = 0; k <= n_hidden; ++k) {
        T* out = static_cast<T*>(job.gradient) + member * job.step + shape.offsets[k];
        for (int o = 0; o < width(k + 1); ++o, sum += D::whole(width(k)), out += width(k)) put(width(k), sum, out);
        put(width(k + 1), bias_sum, out), bias_sum += width(k + 1);
    }
}

template <class T> void Layers<T>::put(int n, const T* sum, T* out) const {
    if (!job.add) memcpy(out, sum, sizeof(T) * n);
    else for (int i = 0; i < n; ++i) out[i] += sum[i];
}

// ---- a Jacobian that was kept --------------------------------------------------------------------------------------

// Forces F = J g and what their residuals return, v = J^T r, in one pass over J: the blocks of three rows at a time, which
// are still in the cache when they are needed again.
template <class T> class Response {
    using S = Simd<T>;
    using V = typename S::V;
    static constexpr int W = S::W, MEMBERS = BYTES == 64 ? 4 : 2;
    static constexpr int PAGE = 4096 / sizeof(T);     // beyond which processors do not foresee

    const ResponseJob& job;
    const KeptJacobian& jacobian;
    const int64_t structure, low, n_atoms, n_columns;
    const T* g;
    T* v;                                             // (n_members, n_columns)

public:
    Response(const ResponseJob& job, int64_t structure, void* workspace)
        : job(job), jacobian(job.jacobians[structure]), structure(structure), low(job.first[structure]),
          n_atoms(job.first[structure + 1] - low), n_columns(n_atoms * job.length),
          g(static_cast<const T*>(job.g) + low * job.length), v(static_cast<T*>(workspace)) {}

    void run() {
        memset(v, 0, sizeof(T) * job.n_members * n_columns);
        for (int64_t row = 0; row < n_atoms + 2; ++row) {
            int64_t m = 0;
            for (; m + MEMBERS <= job.n_members; m += MEMBERS) three_rows<MEMBERS>(row, m);
            for (; m < job.n_members; ++m) three_rows<1>(row, m);
        }
        T* out = static_cast<T*>(job.v) + low * job.length;
        for (int64_t m = 0; m < job.n_members; ++m) memcpy(out + m * step(), v + m * n_columns, sizeof(T) * n_columns);
    }

private:
    int64_t step() const { return job.n_atoms * job.length; }  // of g, from member to member

    // whole(values, column) for the blocks of a row, then part(value, r, column) for numbers of the last if it is cut off.
    template <class Whole, class Part> INLINE void for_each_block(int64_t row, Whole whole, Part part) const {
        const int64_t begin = jacobian.row[row], n_blocks = jacobian.row[row + 1] - begin, end = n_columns;
        const T* values = static_cast<const T*>(jacobian.values) + begin * 3 * KEPT_WIDTH;
        const int32_t* columns = jacobian.at + begin;
        const int64_t n_whole = n_blocks - (n_blocks && columns[n_blocks - 1] + KEPT_WIDTH > end);
        for (int64_t b = 0; b < n_whole; ++b, values += 3 * KEPT_WIDTH) whole(values, columns[b]);
        if (n_whole == n_blocks) return;
        for (int r = 0; r < 3; ++r)
            for (int64_t i = columns[n_whole]; i < end; ++i) part(values[r * KEPT_WIDTH + i - columns[n_whole]], r, i);
    }

    template <int M> void three_rows(int64_t row, int64_t m) {
        V sum[3][M] = {};
        T rest[3][M] = {};
        const T* in[M];
        for (int k = 0; k < M; ++k) in[k] = g + (m + k) * step();
        for_each_block(row,
            [&](const T* values, int64_t at) {
                for (int i = 0; i < 3 * KEPT_WIDTH; i += 64 / sizeof(T)) __builtin_prefetch(values + PAGE + i);
                for (int c = 0; c < KEPT_WIDTH; c += W) {
                    V x[M];
                    for (int k = 0; k < M; ++k) x[k] = S::load(in[k] + at + c);
                    for (int r = 0; r < 3; ++r) {
                        const V y = S::load(values + r * KEPT_WIDTH + c);
                        for (int k = 0; k < M; ++k) sum[r][k] += y * x[k];
                    }
                }
            },
            [&](T value, int r, int64_t i) {
                for (int k = 0; k < M; ++k) rest[r][k] += value * in[k][i];
            });
        T residual[3][M];
        bool any = false;
        for (int r = 0; r < 3; ++r)
            for (int k = 0; k < M; ++k) {
                residual[r][k] = respond(3 * row + r, m + k, S::sum(sum[r][k]) + rest[r][k]);
                any |= residual[r][k] != 0;
            }
        if (any) add<M>(row, m, residual);
    }

    // Store what was predicted, and return the derivative of the loss by it.
    T respond(int64_t row, int64_t m, T predicted) const {
        const bool force = row < 3 * n_atoms;
        const int64_t at = force ? 3 * low + row : 6 * structure + row - 3 * n_atoms;
        if (force) static_cast<T*>(job.forces)[3 * m * job.n_atoms + at] = predicted;
        else static_cast<T*>(job.virial)[6 * m * job.n_structures + at] = predicted;
        const T known = static_cast<const T*>(force ? job.known_forces : job.known_virial)[at];
        if (known != known) return 0;
        const T off = predicted - known, cap = T(job.cap), capped = off > cap ? cap : off < -cap ? -cap : off;
        const T scale = static_cast<const T*>(job.scale)[m * job.n_structures + structure];
        double* errors = job.errors + ResponseJob::N_ERRORS * (m * job.n_structures + structure);
        if (!force) {
            errors[3] += 1, errors[4] += double(off * off);
            return scale * T(job.virial_scale / double(n_atoms)) * off;
        }
        errors[0] += 1, errors[1] += double(capped * (2 * off - capped)), errors[2] += double(off * off);
        return scale * T(job.force_scale / double(n_atoms)) * capped;
    }

    template <int M> void add(int64_t row, int64_t m, const T (&residual)[3][M]) {
        T* out[M];
        for (int k = 0; k < M; ++k) out[k] = v + (m + k) * n_columns;
        for_each_block(row,
            [&](const T* values, int64_t at) {
                for (int c = 0; c < KEPT_WIDTH; c += W) {
                    V y[3];
                    for (int r = 0; r < 3; ++r) y[r] = S::load(values + r * KEPT_WIDTH + c);
                    for (int k = 0; k < M; ++k) {
                        T* to = out[k] + at + c;
                        S::store(to, S::load(to) + y[0] * residual[0][k] + y[1] * residual[1][k] + y[2] * residual[2][k]);
                    }
                }
            },
            [&](T value, int r, int64_t i) {
                for (int k = 0; k < M; ++k) out[k][i] += value * residual[r][k];
            });
    }
};

template <class T> size_t workspace_bytes(const LayersJob& job) {
    size_t most = 0;
    for (int64_t e = 0; e < job.n_elements; ++e) {
        const size_t used = Layers<T>(job, 0, e, nullptr).used;
        most = used > most ? used : most;
    }
    return most;
}
template <class T> void forward(const LayersJob& job, int64_t turn, void* workspace) {
    typename Tiles<T>::Configured configured;
    Layers<T>(job, turn / job.n_elements, turn % job.n_elements, workspace).forward();
}
template <class T> void gradient(const LayersJob& job, int64_t turn, void* workspace) {
    typename Tiles<T>::Configured configured;
    Layers<T>(job, turn / job.n_elements, turn % job.n_elements, workspace).gradient();
}
template <class T> size_t response_bytes(const ResponseJob& job) {
    int64_t most = 0;
    for (int64_t s = 0; s < job.n_structures; ++s) {
        const int64_t n_atoms = job.first[s + 1] - job.first[s];
        most = n_atoms > most ? n_atoms : most;
    }
    return sizeof(T) * job.n_members * most * job.length;
}
template <class T> void respond(const ResponseJob& job, int64_t structure, void* workspace) {
    Response<T>(job, structure, workspace).run();
}

template <class T> constexpr TrainingKernel kernel() {
    return {tape_numbers<T>, workspace_bytes<T>, forward<T>, gradient<T>, response_bytes<T>, respond<T>};
}

}  // namespace

#define NAME_(level) level##_training
#define NAME(level) NAME_(level)
extern const TrainingKernel NAME(SMELT_SIMD)[2];
const TrainingKernel NAME(SMELT_SIMD)[2] = {kernel<float>(), kernel<double>()};
