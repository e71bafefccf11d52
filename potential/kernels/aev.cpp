// What is the AEV of an atom, its transposed derivative and its derivative, on one instruction set?
//
// Descriptor: ANI-1 (doi 10.1039/C6SC05720A, eqs. 3-4 with TorchANI's constants). With fc(r) = cos^2(pi r / 2 Rc),
//   radial   G[k]    = sum_j   1/4 exp(-EtaR (r_j - Rs_k)^2) fc(r_j)
//   angular  G[a][z] = sum_j<k Z_z R_a P,   Z_z = 2 ((1 + cos(th - th_z)) / 2)^Zeta,  th = acos(0.95 cos_jk),
//                      R_a = exp(-EtaA ((r_j + r_k)/2 - Rs_a)^2),  P = fc(r_j) fc(r_k)
// acos is never taken: cos(th - th_z) = c cos th_z + s sin th_z with c = 0.95 cos_jk, s = sqrt(1 - c^2) >= 0.31.
// Nothing is stored between the products: each recomputes the features, 128 pairs of neighbours at a time, and the
// sums over pairs are outer products R^T Z (small matrix products) with the pairs of neighbours in the lanes.
//
// Compiled once per instruction set with SMELT_SIMD naming the object's table. No function with external linkage but
// that table, hence no container or algorithm of the standard library: code compiled for one processor must never be
// linked in place of another's.
#include "aev.h"
#include "reach.h"
#include "simd.h"

#include <initializer_list>
#include <type_traits>

namespace {

constexpr double PI = 3.14159265358979324, LOG2_E = 1.44269504088896341;
constexpr int CHUNK = 128;                            // pairs of neighbours whose features stay in the L1 cache
constexpr int ROW = 2 * CHUNK;                        // a feature of these, and its derivative
constexpr int BLOCK = 4;                              // shifts are handled by fours, padded
constexpr int ROWS = BYTES == 64 ? 4 : 2;             // ROWS x BLOCK accumulators fit the register file
constexpr int BESIDE = BYTES == 64 ? 8 : 4;           // features that are computed side by side
constexpr int MOST_ROWS = BYTES == 64 ? 4 : 3;        // twice so many sums of several items fit the register file
constexpr int PULLS = 5;                              // sums over pairs of several items, of each neighbour
constexpr int BINS = 16, FEW = 24;                    // of squared distances, by which more neighbours than so few are sorted
constexpr double SHRINK = 0.95;                       // keeps the derivative of acos finite

constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// Hands out 64-byte aligned pieces of the workspace; with base = null it only counts.
struct Arena {
    char* base;
    size_t used = 0;
    template <class U> U* take(size_t n) {
        U* piece = reinterpret_cast<U*>(base + used);
        used += (n * sizeof(U) + 63) / 64 * 64;
        return piece;
    }
};

// The neighbours of one atom within a cutoff, sorted by species and distance; each species begins at a multiple of the
// lane count and is padded with neighbours beyond the cutoff, whose fc is exactly 0.
template <class T> struct Neighbours {
    T *x, *y, *z, *r, *inverse, *fc, *dfc;            // unit vector, distance, 1/r, cutoff function, its derivative
    int *edge, *species, *begin, *end;                // edge within the row; per species present: index, slots
    int n_slots, n_present;

    void allocate(Arena& arena, int n_slots_max, int n_present_max) {
        for (T** a : {&x, &y, &z, &r, &inverse, &fc, &dfc}) *a = arena.take<T>(n_slots_max);
        edge = arena.take<int>(n_slots_max);
        for (int** a : {&species, &begin, &end}) *a = arena.take<int>(n_present_max);
    }
};

struct Segment { int j, k, n, at; };                  // pairs (j, k..k+n) at `at` in the chunk
// What of a chunk belongs to two species: all of it, or what is left from the chunk before, or for the next.
struct Range { int first, second, begin, end; bool is_first, is_last; };

// What an atom sees: vectors (n, 3) and species (n,).
template <class T> struct Edges {
    const T* vec;
    const int64_t* species;
    int n;
};

// One array for each cotangent or tangent.
template <class T> struct Items {
    T* first;
    int64_t step;
    T* operator[](int item) const { return first + item * step; }
};

template <class T> class Worker {
    using S = Simd<T>;
    using V = typename S::V;
    using Int = typename S::Int;
    using I = typename S::I;
    static constexpr int W = S::W;
    static constexpr int RESULT = CHUNK + 2 * W;      // a result per pair, with a vector of slack at both ends
    template <int N> using Constant = std::integral_constant<int, N>;

    const AevShape& shape;
    const int n_species, n_radial, n_a, n_z, a_pad, z_pad, n_items;
    T radial_rate, angular_rate;                      // -eta log2(e)
    Ladder<T> radial_ladder, angular_ladder;
    T terms[2][AevPower::N_TERMS];                    // of the powers Zeta and Zeta - 1
    int whole_zeta;                                   // Zeta if it is a small whole number, else 0
    bool fitted;                                      // powers of Zeta are polynomials
    double reach;                                     // u = 1 + 2 (x - 1) / reach for x = (1 + cos(th - th_z)) / 2
    T start, half, slope;                             // u without cosine and sine; dx/du; of dZ
    T *radial_shift, *angular_shift, *turn_cos, *turn_sin; // u = turn_cos cos(th) + turn_sin sin(th) + 1 - 1 / reach
    int *near, *bin, *count;
    // one chunk of pairs: geometry, features with derivatives, results
    T *cosine, *mean_r, *weight, *R, *dR, *Z, *dZ, *U, *dU, *tangents, *results;
    Segment* segments;
    Range* ranges;
    Span* radial_spans;                               // shifts within reach of each vector of slots
    int n_segments = 0, n_ranges = 0, slots_max = 0;
    V* sums;                                          // (n_items, a_pad, z_pad) lanes of the outer products
    T *coefficients, *per_slot, *of_first, *scratch;
    // Of several items at once, that are in the lanes (see vjp_of_items).
    const int item_lanes, n_groups;                   // lanes of each; groups of items that fill a vector
    const Window window;
    int n_rows, most_rows, shell_step, group_size;    // rows of item_lanes angles; numbers of a shell, and of all of them
    T *after, *window_cos, *window_sin;               // where windows begin, and by what they are turned
    T *factors, *angles_of_pair;
    Int* in_reach;                                    // of each pair: first shell in R, how many, first of the numbers
    V *numbers, *pulled;

public:
    const int length;
    const int64_t lanes;                              // of items, as they are put out
    Neighbours<T> radial, angular;                    // of the atom at work: look() finds them, or a caller puts them here

    Worker(const AevShape& shape, int64_t n_items, int64_t longest_row, Arena& arena)
        : shape(shape), n_species(int(shape.n_species)), n_radial(int(shape.n_radial)),
          n_a(int(shape.n_angular_radial)), n_z(int(shape.n_angular)), a_pad(round_up(n_a, BLOCK)),
          z_pad(round_up(n_z, BLOCK)), n_items(int(n_items)),
          item_lanes(n_items > 1 ? lanes_for(int(n_items)) : 1),
          n_groups(round_up(int(n_items), W / item_lanes) / (W / item_lanes)),
          window(shape, sizeof(T) == sizeof(float) && shape.reach > 0),
          length(n_species * n_radial + n_species * (n_species + 1) / 2 * n_a * n_z), lanes(lanes_of<T>(n_items)) {
        const int rows = (window.n + item_lanes - 1) / item_lanes, times = (rows + MOST_ROWS - 1) / MOST_ROWS;
        most_rows = (rows + times - 1) / times, n_rows = times * most_rows;
        shell_step = n_z - window.n + n_rows * item_lanes, group_size = round_up(a_pad * shell_step, W);
        radial_rate = T(-shape.eta_radial * LOG2_E), angular_rate = T(-shape.eta_angular * LOG2_E);
        for (int which : {0, 1})
            for (int k = 0; k < AevPower::N_TERMS; ++k) terms[which][k] = T(shape.by_zeta[which].terms[k]);
        radial_ladder = {shape.eta_radial, LOG2_E, shape.radial_shifts, n_radial};
        angular_ladder = {shape.eta_angular, LOG2_E, shape.angular_shifts, n_a};
        whole_zeta = shape.zeta <= 64 && shape.zeta == int(shape.zeta) ? int(shape.zeta) : 0;
        fitted = sizeof(T) == sizeof(float) && shape.reach > 0, reach = fitted ? shape.reach : 1;
        start = T(1 - 1 / reach), half = T(reach / 2), slope = T(SHRINK * shape.zeta * reach / 2);
        allocate(arena, int(longest_row));
        if (arena.base) fill_constants();
    }

    void look(const Edges<T>& edges) {
        find(radial, edges, T(shape.radial_cutoff)), find(angular, edges, T(shape.angular_cutoff));
    }
    void allocate(Neighbours<T>& list, Arena& arena, int edges) const {
        list.allocate(arena, most_slots(edges), most_present(edges));
    }

    void forward(T* out);
    void vjp(int n_edges, Items<const T> cotangent, T* out); // out: (n_edges, 3, lanes)
    void jvp(Items<const T> tangent, Items<T> out);

private:
    int most_present(int edges) const { return int(lesser(n_species, edges)); }
    int most_slots(int edges) const { return edges + (most_present(edges) + 2) * W; }

    void allocate(Arena& arena, int edges) {
        int radial_pad = round_up(n_radial, BLOCK);
        slots_max = round_up(most_slots(edges), W);
        radial_shift = arena.take<T>(radial_pad), angular_shift = arena.take<T>(a_pad);
        turn_cos = arena.take<T>(z_pad), turn_sin = arena.take<T>(z_pad);
        for (Neighbours<T>* list : {&radial, &angular}) allocate(*list, arena, edges);
        scratch = arena.take<T>(3 * slots_max);
        near = arena.take<int>(edges + 1), bin = arena.take<int>(edges + 1), count = arena.take<int>(n_species * BINS);
        for (T** a : {&cosine, &mean_r, &weight}) *a = arena.take<T>(CHUNK + W);
        // With slack: a range need not end where a vector does.
        R = arena.take<T>(a_pad * ROW + 2 * W), Z = arena.take<T>(z_pad * ROW + 2 * W);
        U = arena.take<T>((a_pad > z_pad ? a_pad : z_pad) * ROW + 2 * W);
        dR = R + CHUNK, dZ = Z + CHUNK, dU = U + CHUNK;
        tangents = arena.take<T>(n_items * 3 * (CHUNK + W));
        results = arena.take<T>(3 * RESULT);
        segments = arena.take<Segment>(CHUNK), ranges = arena.take<Range>(CHUNK);
        radial_spans = arena.take<Span>(slots_max / W + 1);
        sums = arena.take<V>((n_items > 1 ? n_items : 1) * a_pad * z_pad); // AEVs have no items
        const int n_numbers = n_items > 1 ? group_size : a_pad * z_pad;
        coefficients = arena.take<T>(size_t(n_items) * (radial_pad > n_numbers ? radial_pad : n_numbers) + 2 * W);
        per_slot = arena.take<T>(size_t(n_items) * 4 * slots_max), of_first = arena.take<T>(4 * slots_max);
        if (n_items < 2) return;
        for (T** a : {&after, &window_cos, &window_sin}) *a = arena.take<T>(z_pad);
        angles_of_pair = arena.take<T>(n_rows * item_lanes * ROW), in_reach = arena.take<Int>(3 * CHUNK);
        factors = arena.take<T>(PULLS * slots_max), numbers = arena.take<V>(size_t(n_groups) * group_size);
        pulled = arena.take<V>(size_t(n_groups) * PULLS * slots_max);
    }

    void fill_constants() {
        for (int k = 0; k < round_up(n_radial, BLOCK); ++k) {
            radial_shift[k] = k < n_radial ? T(shape.radial_shifts[k]) : 0;
        }
        for (int a = 0; a < a_pad; ++a) angular_shift[a] = a < n_a ? T(shape.angular_shifts[a]) : 0;
        for (int z = 0; z < z_pad; ++z) turn_cos[z] = z < n_z ? T(shape.angle_cos[z] / reach) : 0;
        for (int z = 0; z < z_pad; ++z) turn_sin[z] = z < n_z ? T(shape.angle_sin[z] / reach) : 0;
        memset(R + n_a * ROW, 0, sizeof(T) * ((a_pad - n_a) * ROW + 2 * W));
        memset(Z + n_z * ROW, 0, sizeof(T) * ((z_pad - n_z) * ROW + 2 * W));
        memset(U, 0, sizeof(T) * ((a_pad > z_pad ? a_pad : z_pad) * ROW + 2 * W));
        for (int i = 0; n_items > 1 && i < window.n_starts; ++i) {
            after[i] = i ? T(window.after(i)) : 2;
            window_cos[i] = T(window.cos_from_first(i)), window_sin[i] = T(window.sin_from_first(i));
        }
    }

    // Shifts (evenly spaced, else all of them) within reach of any lane of r.
    static INLINE Span within(V r, const Ladder<T>& ladder) {
        const T low = (S::least(r) - ladder.reach - ladder.first) * ladder.per_step;
        const T high = (S::greatest(r) + ladder.reach - ladder.first) * ladder.per_step;
        const int n = ladder.n;
        return {low > 0 ? low < n ? int(low) : n : 0, high >= 0 ? high < n ? int(high) + 1 : n : 0};
    }

    // Offset of the angular block of species i <= j: rows of the upper triangle, one after the other.
    int angular_block(int i, int j) const {
        return n_species * n_radial + (i * n_species - i * (i - 1) / 2 + (j - i)) * n_a * n_z;
    }

    // Quantity q of every neighbour for one tangent; and of one neighbour for one cotangent, where those of a vector of
    // neighbours are side by side.
    T* slot_array(int item, int q) const { return per_slot + (4 * item + q) * slots_max; }
    T* of_slot(int item, int q, int slot) const {
        return per_slot + ((slot / W * n_items + item) * 4 + q) * W + slot % W;
    }
    // Lanes of each of n items, n > 1, so that vectors are filled.
    static constexpr int lanes_for(int n) { return 2 * n > W ? 1 : 4 * n > W ? 2 : 8 * n > W ? 4 : 8; }
    // run(item_lanes, most_rows), both constant.
    template <class Run> INLINE void with_sizes(Run run) {
        const auto with_lanes = [&](auto lanes) {
            if (most_rows == 1) return run(lanes, Constant<1>{});
            if (most_rows == 2) return run(lanes, Constant<2>{});
            if (most_rows == 3) return run(lanes, Constant<3>{});
            if constexpr (MOST_ROWS > 3) run(lanes, Constant<4>{});
        };
        if (item_lanes == 1) with_lanes(Constant<1>{});
        if constexpr (W >= 4) if (item_lanes == 2) with_lanes(Constant<2>{});
        if constexpr (W >= 8) if (item_lanes == 4) with_lanes(Constant<4>{});
        if constexpr (W >= 16) if (item_lanes == 8) with_lanes(Constant<8>{});
    }

    void find(Neighbours<T>& list, const Edges<T>& edges, T cutoff);
    void measure(Neighbours<T>& list, T cutoff);
    template <class Fill, class Flush> INLINE void for_each_chunk(Fill fill, Flush flush);
    INLINE void pair_geometry(int j, int k, int n, int at);
    INLINE void pair_weight(int j, int k, int n, int at);
    void pair_tangents(int j, int k, int n, int at);
    void tangent_factors(int n, int item);
    template <bool DERIVATIVE> void features(int n) {
        fitted ? features<DERIVATIVE, true>(n) : features<DERIVATIVE, false>(n);
    }
    template <bool DERIVATIVE, bool FITTED> void features(int n);
    template <bool DERIVATIVE, bool FITTED> void bends(V c, V s, V dc, V ds, int n, int t);
    template <bool DERIVATIVE, bool FITTED, int N> void bends_from(int first, V c, V s, V dc, V ds, int t);
    template <bool DERIVATIVE> void shells(V r, V p, int t);
    template <bool DERIVATIVE, int N> void shells_from(int first, V r, V p, int t);
    template <bool SECOND>
    void outer(const Range& range, const T* left, const T* right, const T* left2, const T* right2, V* sum);
    void store_sums(const Range& range, V* sum, T* out);
    void find_radial_spans();
    void radial_forward(T* out);
    template <int M> void radial_vjp(Items<const T> cotangent, int item);
    void items_in_lanes(int number, int i, V (&rows)[W]);
    void store_radial(T* out);
    template <int M> void radial_jvp(Items<T> out, int item);
    void load_coefficients(const Range& range, const T* cotangent);
    void contract(const Range& range);
    template <int C> void contract_at(int t);
    void scatter();
    void add_first();
    void add_angular(T* out);
    void vjp_of_one(const T* cotangent, T* out);
    void vjp_of_items(Items<const T> cotangent, T* out);
    void load_factors();
    void features_in_reach(int n) { fitted ? features_in_reach<true>(n) : features_in_reach<false>(n); }
    template <bool FITTED> void features_in_reach(int n);
    template <int LANES> void gather_angles(int n);
    template <int LANES> void load_numbers(const Range& range, Items<const T> cotangent);
    template <int LANES, int N> void contract_items(const Segment* segment, const Segment* end, int group, int row);
    template <int LANES> void add_items(T* out);
    void load_tangents(const Neighbours<T>& list, const T* tangent, int item);
};

// ---- neighbours ----------------------------------------------------------------------------------------------------

// Edges of the row shorter than the cutoff, by counting sort over species and squared distances.
template <class T> void Worker<T>::find(Neighbours<T>& list, const Edges<T>& edges, T cutoff) {
    const T* v = edges.vec;
    const int64_t* species = edges.species;
    T* squared = scratch;
    int n_near = 0;
    for (int e = 0; e < edges.n; ++e) {
        near[n_near] = e;
        squared[n_near] = v[3 * e] * v[3 * e] + v[3 * e + 1] * v[3 * e + 1] + v[3 * e + 2] * v[3 * e + 2];
        n_near += squared[n_near] < cutoff * cutoff;
    }
    const int n_bins = n_near > FEW ? BINS : 1;
    const T rate = T(n_bins) / (cutoff * cutoff);
    for (int b = 0; b < n_species * n_bins; ++b) count[b] = 0;
    for (int i = 0; i < n_near; ++i) {
        bin[i] = int(species[near[i]]) * n_bins + int(lesser(int64_t(squared[i] * rate), n_bins - 1));
        ++count[bin[i]];
    }
    list.n_present = list.n_slots = 0;
    for (int s = 0; s < n_species; ++s) {
        const int begin = list.n_slots;
        int end = begin;
        for (int* in_bin = count + s * n_bins; in_bin < count + (s + 1) * n_bins; ++in_bin) {
            const int n = *in_bin;
            *in_bin = end, end += n;
        }
        if (end == begin) continue;
        const int g = list.n_present++;
        list.species[g] = s, list.begin[g] = begin, list.end[g] = end;
        list.n_slots = round_up(end, W);
        for (int i = end; i < list.n_slots; ++i) list.x[i] = 2 * cutoff, list.y[i] = list.z[i] = 0;
    }
    for (int i = 0; i < n_near; ++i) {
        const int e = near[i], slot = count[bin[i]]++;
        list.x[slot] = v[3 * e], list.y[slot] = v[3 * e + 1], list.z[slot] = v[3 * e + 2], list.edge[slot] = e;
    }
    measure(list, cutoff);
}

// Distances, unit vectors and cutoff functions from the vectors held in x, y, z.
template <class T> void Worker<T>::measure(Neighbours<T>& list, T cutoff) {
    for (int i = 0; i < list.n_slots; i += W) {
        V x = S::load(list.x + i), y = S::load(list.y + i), z = S::load(list.z + i);
        V r = S::sqrt(S::max(x * x + y * y + z * z, S::C::TINY)), inverse = T(1) / r, sine, cosine;
        S::sincospi(S::max(T(0.5) - r * (T(0.5) / cutoff), T(0)), sine, cosine);
        S::store(list.x + i, x * inverse), S::store(list.y + i, y * inverse), S::store(list.z + i, z * inverse);
        S::store(list.r + i, r), S::store(list.inverse + i, inverse);
        S::store(list.fc + i, sine * sine), S::store(list.dfc + i, sine * cosine * T(-PI / cutoff));
    }
}

// ---- radial part ---------------------------------------------------------------------------------------------------

template <class T> void Worker<T>::find_radial_spans() {
    for (int i = 0; i < radial.n_slots; i += W) {
        radial_spans[i / W] = within(S::load(radial.r + i), radial_ladder);
    }
}

template <class T> void Worker<T>::radial_forward(T* out) {
    find_radial_spans();
    for (int g = 0; g < radial.n_present; ++g) {
        for (int k = 0; k < n_radial; k += BLOCK) {
            V total[BLOCK] = {};
            for (int i = radial.begin[g]; i < radial.end[g]; i += W) {
                if (radial_spans[i / W].end <= k || radial_spans[i / W].begin >= k + BLOCK) continue;
                V r = S::load(radial.r + i), fc = S::load(radial.fc + i), e[BLOCK];
                for (int q = 0; q < BLOCK; ++q) e[q] = r - radial_shift[k + q], e[q] *= e[q] * radial_rate;
                S::exp2(e);
                for (int q = 0; q < BLOCK; ++q) total[q] += fc * e[q];
            }
            T values[BLOCK];
            S::sum4(total, values);
            for (int q = 0; q < BLOCK && k + q < n_radial; ++q) {
                out[radial.species[g] * n_radial + k + q] = T(0.25) * values[q];
            }
        }
    }
}

// dE/dr of each neighbour for M cotangents from `item` on: quantity 0.
template <class T> template <int M> void Worker<T>::radial_vjp(Items<const T> cotangent, int item) {
    for (int g = 0; g < radial.n_present; ++g) {
        for (int k = 0; k < n_radial; ++k) {
            for (int m = 0; m < M; ++m) {
                coefficients[k * M + m] = T(0.25) * cotangent[item + m][radial.species[g] * n_radial + k];
            }
        }
        for (int i = radial.begin[g]; i < radial.end[g]; i += W) {
            const V r = S::load(radial.r + i);
            const Span span = radial_spans[i / W];
            V value[M] = {}, slope[M] = {};
            for (int k = span.begin; k < span.end; ++k) {
                V d = r - radial_shift[k], e = S::exp2(d * d * radial_rate), de = d * e;
                for (int m = 0; m < M; ++m) {
                    value[m] += coefficients[k * M + m] * e;
                    slope[m] += coefficients[k * M + m] * de;
                }
            }
            V fc = S::load(radial.fc + i) * T(-2 * shape.eta_radial), dfc = S::load(radial.dfc + i);
            for (int m = 0; m < M; ++m) S::store(of_slot(item + m, 0, i), value[m] * dfc + slope[m] * fc);
        }
    }
}

// dE/dr of W items from `number` on, zero beyond the last: a vector of items for each slot from i on.
template <class T> INLINE void Worker<T>::items_in_lanes(int number, int i, V (&rows)[W]) {
    for (int q = 0; q < W; ++q) rows[q] = number + q < n_items ? S::load(of_slot(number + q, 0, i)) : V{};
    S::transpose(rows);
}

// Along the directions of neighbours: out (n_edges, 3, lanes).
template <class T> void Worker<T>::store_radial(T* out) {
    const Neighbours<T>& a = radial;
    for (int g = 0; g < a.n_present; ++g) {
        for (int first = a.begin[g]; first < a.end[g]; first += W) {
            const int end = int(lesser(first + W, a.end[g]));
            for (int number = 0; number < n_items; number += W) {
                V rows[W];
                if (lanes > 1) items_in_lanes(number, first, rows);
                for (int i = first; i < end; ++i) {
                    T* to = out + 3 * a.edge[i] * lanes + number;
                    if (lanes > 1) {
                        S::store(to, rows[i - first] * a.x[i]), S::store(to + lanes, rows[i - first] * a.y[i]);
                        S::store(to + 2 * lanes, rows[i - first] * a.z[i]);
                    } else {
                        const T change = *of_slot(0, 0, i);
                        to[0] = change * a.x[i], to[1] = change * a.y[i], to[2] = change * a.z[i];
                    }
                }
            }
        }
    }
}

template <class T> template <int M> void Worker<T>::radial_jvp(Items<T> out, int item) {
    for (int g = 0; g < radial.n_present; ++g) {
        for (int k = 0; k < n_radial; ++k) {
            V total[round_up(M, 4)] = {};
            for (int i = radial.begin[g]; i < radial.end[g]; i += W) {
                if (k < radial_spans[i / W].begin || k >= radial_spans[i / W].end) continue;
                V d = S::load(radial.r + i) - radial_shift[k];
                V slope = S::load(radial.dfc + i) + S::load(radial.fc + i) * d * T(-2 * shape.eta_radial);
                slope *= S::exp2(d * d * radial_rate);
                for (int m = 0; m < M; ++m) total[m] += slope * S::load(slot_array(item + m, 0) + i);
            }
            T values[round_up(M, 4)];
            for (int m = 0; m < M; m += 4) S::sum4(*reinterpret_cast<V(*)[4]>(total + m), values + m);
            for (int m = 0; m < M; ++m) out[item + m][radial.species[g] * n_radial + k] = T(0.25) * values[m];
        }
    }
}

// ---- pairs of neighbours -------------------------------------------------------------------------------------------

// All pairs, those of the same two species in a row, packed into chunks: fill(j, k, n, at) computes what belongs to the
// pairs (j, k..k+n), flush(n) uses a chunk of n pairs, n a multiple of the lane count.
template <class T> template <class Fill, class Flush> INLINE void Worker<T>::for_each_chunk(Fill fill, Flush flush) {
    int n = 0;
    n_segments = n_ranges = 0;
    for (int first = 0; first < angular.n_present; ++first) {
        for (int second = first; second < angular.n_present; ++second) {
            const int last = angular.end[second];
            int begin = n;
            bool is_first = true;
            for (int j = angular.begin[first]; j < angular.end[first]; ++j) {
                for (int k = first == second ? j + 1 : angular.begin[second], taken; k < last; k += taken) {
                    if (n == CHUNK) {
                        if (n > begin) ranges[n_ranges++] = {first, second, begin, n, is_first, false}, is_first = false;
                        flush(n), n = n_segments = n_ranges = begin = 0;
                    }
                    taken = int(lesser(last - k, CHUNK - n));
                    segments[n_segments++] = {j, k, taken, n};
                    fill(j, k, taken, n);
                    n += taken;
                }
            }
            if (n > begin) ranges[n_ranges++] = {first, second, begin, n, is_first, true};
        }
    }
    if (!n) return;
    for (T* a : {cosine, mean_r, weight}) S::store(a + n, V{});
    for (int i = 0; i < 3 * n_items; ++i) S::store(tangents + i * (CHUNK + W) + n, V{});
    flush(round_up(n, W));
}

template <class T> INLINE void Worker<T>::pair_geometry(int j, int k, int n, int at) {
    const Neighbours<T> a = angular;                  // a copy: the stores below cannot change its pointers
    T *to_cosine = cosine + at, *to_mean = mean_r + at;
    const T x = a.x[j] * T(SHRINK), y = a.y[j] * T(SHRINK), z = a.z[j] * T(SHRINK), r = a.r[j];
    for (int i = 0; i < n; i += W) {
        S::store(to_cosine + i, S::load(a.x + k + i) * x + S::load(a.y + k + i) * y + S::load(a.z + k + i) * z);
        S::store(to_mean + i, (S::load(a.r + k + i) + r) * T(0.5));
    }
}

template <class T> INLINE void Worker<T>::pair_weight(int j, int k, int n, int at) {
    const T *fc = angular.fc + k, by = angular.fc[j];
    T* to = weight + at;
    for (int i = 0; i < n; i += W) S::store(to + i, S::load(fc + i) * by);
}

// x^n by squaring: five to eleven products for n up to 64, a quarter of a logarithm and a power of two.
template <class V> INLINE V whole_power(V x, int n) {
    V out = n & 1 ? x : V{} + 1;
    for (n >>= 1; n; n >>= 1) {
        x *= x;
        if (n & 1) out *= x;
    }
    return out;
}

// Z and R of each pair of the chunk. With DERIVATIVE also dZ = dZ/dcos, dR = dR/d(mean r), and R without the weight P.
template <class T> template <bool DERIVATIVE, bool FITTED> void Worker<T>::features(int n) {
    for (int t = 0; t < n; t += W) {
        const V c = S::load(cosine + t), s = S::sqrt(T(1) - c * c);
        bends<DERIVATIVE, FITTED>(c, s, V{} + 1, DERIVATIVE ? -c / s : c, n_z, t);
        shells<DERIVATIVE>(S::load(mean_r + t), DERIVATIVE ? V{} : S::load(weight + t), t);
    }
}

// Z of the first n angles for a vector of pairs, with the cosine and sine of th and what they change by with cos(th).
template <class T> template <bool DERIVATIVE, bool FITTED>
INLINE void Worker<T>::bends(V c, V s, V dc, V ds, int n, int t) {
    int z = 0;
    for (; z + BESIDE <= n; z += BESIDE) bends_from<DERIVATIVE, FITTED, BESIDE>(z, c, s, dc, ds, t);
    for (; z + 6 <= n; z += 6) bends_from<DERIVATIVE, FITTED, 6>(z, c, s, dc, ds, t);
    for (; z + BLOCK <= n; z += BLOCK) bends_from<DERIVATIVE, FITTED, BLOCK>(z, c, s, dc, ds, t);
    for (; z < n; ++z) bends_from<DERIVATIVE, FITTED, 1>(z, c, s, dc, ds, t);
}

// R of all shifts for a vector of pairs.
template <class T> template <bool DERIVATIVE> INLINE void Worker<T>::shells(V r, V p, int t) {
    int a = 0;
    for (; a + BESIDE <= n_a; a += BESIDE) shells_from<DERIVATIVE, BESIDE>(a, r, p, t);
    for (; a + BLOCK <= n_a; a += BLOCK) shells_from<DERIVATIVE, BLOCK>(a, r, p, t);
    for (; a < n_a; ++a) shells_from<DERIVATIVE, 1>(a, r, p, t);
}

// N of them side by side: each alone would wait for its own products.
template <class T> template <bool DERIVATIVE, bool FITTED, int N>
INLINE void Worker<T>::bends_from(int first, V c, V s, V dc, V ds, int t) {
    const AevPower& power = shape.by_zeta[DERIVATIVE];
    const T *by_cos = turn_cos + first, *by_sin = turn_sin + first;
    V u[N], x[N], y[N];
    for (int z = 0; z < N; ++z) {
        u[z] = S::max(c * by_cos[z] + (s * by_sin[z] + start), T(-1)), x[z] = u[z] * half + (T(1) - half);
    }
    if constexpr (FITTED) {
        for (int z = 0; z < N; ++z) y[z] = S::all(terms[DERIVATIVE][AevPower::N_TERMS - 1]);
        for (int k = AevPower::N_TERMS - 2; k >= 0; --k)
            for (int z = 0; z < N; ++z) y[z] = y[z] * u[z] + terms[DERIVATIVE][k];
        for (int64_t i = 0; i < power.n_squarings; ++i)
            for (int z = 0; z < N; ++z) y[z] *= y[z];
    } else {
        const T exponent = T(shape.zeta - DERIVATIVE);
        for (int z = 0; z < N; ++z) {
            x[z] = S::max(x[z], S::C::TINY);
            y[z] = whole_zeta ? whole_power(x[z], whole_zeta - DERIVATIVE) * T(2)
                              : S::exp2(S::log2(x[z]) * exponent + T(1));
        }
    }
    T* to = Z + first * ROW + t;
    for (int z = 0; z < N; ++z, to += ROW) {
        S::store(to, DERIVATIVE ? x[z] * y[z] : y[z]);
        if (DERIVATIVE) S::store(to + CHUNK, (dc * by_cos[z] + ds * by_sin[z]) * (y[z] * slope));
    }
}

template <class T> template <bool DERIVATIVE, int N> INLINE void Worker<T>::shells_from(int first, V r, V p, int t) {
    const T stretch = T(-2 * shape.eta_angular);
    V d[N], e[N];
    for (int a = 0; a < N; ++a) d[a] = r - angular_shift[first + a], e[a] = d[a] * d[a] * angular_rate;
    S::exp2(e);
    T* to = R + first * ROW + t;
    for (int a = 0; a < N; ++a, to += ROW) {
        S::store(to, DERIVATIVE ? e[a] : e[a] * p);
        if (DERIVATIVE) S::store(to + CHUNK, e[a] * d[a] * stretch);
    }
}

// sum[a][z] += left_a right_z (+ left2_a right2_z) over a range, lane by lane.
template <class T> template <bool SECOND>
void Worker<T>::outer(const Range& range, const T* left, const T* right, const T* left2, const T* right2, V* sum) {
    for (int a = 0; a < a_pad; a += ROWS) {
        for (int z = 0; z < z_pad; z += BLOCK) {
            V block[ROWS][BLOCK];
            for (int p = 0; p < ROWS; ++p)
                for (int q = 0; q < BLOCK; ++q) block[p][q] = sum[(a + p) * z_pad + z + q];
            const auto add = [&](int t, auto load) {
                for (int p = 0; p < ROWS; ++p) {
                    V f = load(left + (a + p) * ROW + t);
                    for (int q = 0; q < BLOCK; ++q) block[p][q] += f * load(right + (z + q) * ROW + t);
                    if (!SECOND) continue;
                    V f2 = load(left2 + (a + p) * ROW + t);
                    for (int q = 0; q < BLOCK; ++q) block[p][q] += f2 * load(right2 + (z + q) * ROW + t);
                }
            };
            int t = range.begin;
            for (; t + W <= range.end; t += W) add(t, [](const T* p) { return S::load(p); });
            // What lies beyond may be another atom's, and not a number.
            const typename S::Mask mask = S::lanes(0, range.end - t);
            if (t < range.end) add(t, [mask](const T* p) { return S::load_masked(p, mask); });
            for (int p = 0; p < ROWS; ++p)
                for (int q = 0; q < BLOCK; ++q) sum[(a + p) * z_pad + z + q] = block[p][q];
        }
    }
}

// Put the sums of two species where they belong, and begin anew.
template <class T> void Worker<T>::store_sums(const Range& range, V* sum, T* out) {
    out += angular_block(angular.species[range.first], angular.species[range.second]);
    for (int a = 0; a < n_a; ++a) {
        for (int z = 0; z < n_z; z += BLOCK) {
            T values[BLOCK];
            S::sum4(*reinterpret_cast<const V(*)[BLOCK]>(sum + a * z_pad + z), values);
            for (int q = 0; q < BLOCK && z + q < n_z; ++q) out[a * n_z + z + q] = values[q];
        }
    }
    memset(sum, 0, sizeof(V) * a_pad * z_pad);
}

// ---- transposed derivative of the angular part ---------------------------------------------------------------------

// With g_z = sum_a R_a G[a][z] and h_z = sum_a dR_a G[a][z], the three numbers of a pair:
// results = (sum_z g_z Z_z, sum_z h_z Z_z, sum_z g_z dZ_z), still without the weight P.
template <class T> void Worker<T>::contract(const Range& range) {
    int t = range.begin;
    for (; t + W < range.end; t += 2 * W) contract_at<2>(t); // two vectors share loads
    for (; t < range.end; t += W) contract_at<1>(t);
}

template <class T> void Worker<T>::load_coefficients(const Range& range, const T* cotangent) {
    cotangent += angular_block(angular.species[range.first], angular.species[range.second]);
    for (int a = 0; a < n_a; ++a) {
        T* to = coefficients + a * z_pad;
        memcpy(to, cotangent + a * n_z, sizeof(T) * n_z), memset(to + n_z, 0, sizeof(T) * (z_pad - n_z));
    }
}

template <class T> template <int C> INLINE void Worker<T>::contract_at(int t) {
    const T *g = coefficients, *r = R + t, *dr = dR + t, *zeta = Z + t, *dzeta = dZ + t;
    V value[C] = {}, by_r[C] = {}, by_cosine[C] = {};
    for (int z = 0; z < z_pad; z += BLOCK) {
        V left[BLOCK][C] = {}, dleft[BLOCK][C] = {};
        for (int a = 0; a < n_a; ++a) {
            V f[C], df[C];
            for (int v = 0; v < C; ++v) f[v] = S::load(r + a * ROW + v * W), df[v] = S::load(dr + a * ROW + v * W);
            for (int q = 0; q < BLOCK; ++q) {
                const T factor = g[a * z_pad + z + q];
                for (int v = 0; v < C; ++v) left[q][v] += f[v] * factor, dleft[q][v] += df[v] * factor;
            }
        }
        for (int q = 0; q < BLOCK; ++q) {
            for (int v = 0; v < C; ++v) {
                V f = S::load(zeta + (z + q) * ROW + v * W);
                value[v] += left[q][v] * f, by_r[v] += dleft[q][v] * f;
                by_cosine[v] += left[q][v] * S::load(dzeta + (z + q) * ROW + v * W);
            }
        }
    }
    T* out = results + W + t;
    for (int v = 0; v < C; ++v, out += W) {
        S::store(out, value[v]), S::store(out + RESULT, by_r[v]), S::store(out + 2 * RESULT, by_cosine[v]);
    }
}

// Add the pairs' results to their two neighbours: (dE/dr, dE/du (3)) of k in of_slot, those of j in `of_first`.
// Two places, because a vector load that overlaps a scalar just stored has to wait for it.
template <class T> void Worker<T>::scatter() {
    const Neighbours<T> a = angular;                  // a copy, as above
    for (int s = 0; s < n_segments; ++s) {
        const Segment& g = segments[s];
        const int end = g.k + g.n;
        const T fc = a.fc[g.j], x = fc * a.x[g.j], y = fc * a.y[g.j], z = fc * a.z[g.j], dfc = a.dfc[g.j];
        V by_r{}, by_fc{}, total[4] = {};
        for (int k = g.k / W * W; k < end; k += W) {
            const typename S::Mask mask = S::lanes(g.k - k, end - k);
            const V fck = S::load(a.fc + k);
            const T* pair = results + W + g.at + (k - g.k);
            const V value = S::load_masked(pair, mask), change = S::load_masked(pair + RESULT, mask) * (fck * T(0.5));
            const V turn = S::load_masked(pair + 2 * RESULT, mask) * fck;
            T* second = of_slot(0, 0, k);
            S::store(second, S::load(second) + (change + value * S::load(a.dfc + k)) * fc);
            S::store(second + W, S::load(second + W) + turn * x);
            S::store(second + 2 * W, S::load(second + 2 * W) + turn * y);
            S::store(second + 3 * W, S::load(second + 3 * W) + turn * z);
            by_r += change, by_fc += value * fck;
            total[1] += turn * S::load(a.x + k), total[2] += turn * S::load(a.y + k);
            total[3] += turn * S::load(a.z + k);
        }
        total[0] = by_r * fc + by_fc * dfc;
        for (int q = 1; q < 4; ++q) total[q] *= fc;
        T values[4], *out = of_first + 4 * g.j;
        S::sum4(total, values);
        for (int q = 0; q < 4; ++q) out[q] += values[q];
    }
}

// Put what pairs did to their first neighbours to the rest.
template <class T> void Worker<T>::add_first() {
    for (int slot = 0; slot < angular.n_slots; ++slot) {
        for (int q = 0; q < 4; ++q) *of_slot(0, q, slot) += of_first[4 * slot + q];
    }
}

// dE/dvec = dE/dr u + (t - (u.t) u) / r with t = dE/du, added to out (n_edges, 3).
template <class T> void Worker<T>::add_angular(T* out) {
    const Neighbours<T>& a = angular;
    for (int i = 0; i < a.n_slots; i += W) {
        T *by_r = of_slot(0, 0, i), *by_x = by_r + W, *by_y = by_x + W, *by_z = by_y + W;
        V x = S::load(a.x + i), y = S::load(a.y + i), z = S::load(a.z + i), inverse = S::load(a.inverse + i);
        V tx = S::load(by_x), ty = S::load(by_y), tz = S::load(by_z);
        V along = S::load(by_r) - (x * tx + y * ty + z * tz) * inverse;
        S::store(by_x, along * x + tx * inverse);
        S::store(by_y, along * y + ty * inverse);
        S::store(by_z, along * z + tz * inverse);
    }
    for (int g = 0; g < a.n_present; ++g) {
        for (int i = a.begin[g]; i < a.end[g]; ++i) {
            for (int k = 0; k < 3; ++k) out[3 * a.edge[i] + k] += *of_slot(0, k + 1, i);
        }
    }
}

template <class T> void Worker<T>::vjp_of_one(const T* cotangent, T* out) {
    memset(per_slot, 0, sizeof(T) * 4 * angular.n_slots);
    memset(of_first, 0, sizeof(T) * 4 * angular.n_slots);
    for_each_chunk([&](int j, int k, int n, int at) { pair_geometry(j, k, n, at); },
        [&](int n) {
            features<true>(n);
            for (const Range* range = ranges; range < ranges + n_ranges; ++range) {
                if (range->is_first) load_coefficients(*range, cotangent);
                contract(*range);
            }
            scatter();
        });
    add_first();
    add_angular(out);
}

// ---- the same for several items at once ----------------------------------------------------------------------------
//
// Items are in the lanes. So each pair takes the shifts within its own reach only, and what it does to its neighbours
// needs no sums over lanes. Where there are fewer items than lanes, each has LANES of them, for as many angles. Of every
// neighbour five sums over its pairs are kept, `pulled`, with fc and u of the other neighbour:
//   (value fc, by_r fc, by_cosine fc u), where value = sum_z g_z Z_z, by_r = sum_z h_z Z_z, by_cosine = sum_z g_z dZ_z

template <class T> void Worker<T>::vjp_of_items(Items<const T> cotangent, T* out) {
    load_factors();
    with_sizes([&](auto lanes, auto rows) {
        constexpr int LANES = decltype(lanes)::value, N = decltype(rows)::value;
        memset(pulled, 0, sizeof(V) * n_groups * PULLS * angular.n_slots);
        for_each_chunk([&](int j, int k, int n, int at) { pair_geometry(j, k, n, at); },
            [&](int n) {
                features_in_reach(n);
                gather_angles<LANES>(n);
                const Segment *segment = segments, *end = segments;
                for (const Range* range = ranges; range < ranges + n_ranges; ++range, segment = end) {
                    while (end < segments + n_segments && end->at < range->end) ++end;
                    if (range->is_first) load_numbers<LANES>(*range, cotangent);
                    for (int group = 0; group < n_groups; ++group)
                        for (int row = 0; row < n_rows; row += N) contract_items<LANES, N>(segment, end, group, row);
                }
            });
        add_items<LANES>(out);
    });
}

template <class T> void Worker<T>::load_factors() {
    const Neighbours<T>& a = angular;
    for (int i = 0; i < a.n_slots; ++i) {
        T* f = factors + PULLS * i;
        f[0] = f[1] = a.fc[i], f[2] = a.fc[i] * a.x[i], f[3] = a.fc[i] * a.y[i], f[4] = a.fc[i] * a.z[i];
    }
}

// As features<true>, but Z of the angles within reach of each pair, as if turned to the first ones; and what is in reach.
template <class T> template <bool FITTED> void Worker<T>::features_in_reach(int n) {
    const Ladder<T> ladder = angular_ladder;          // copies, as above
    const T from = ladder.first + ladder.reach, to = ladder.first - ladder.reach, n_shells = T(n_a);
    const Int most = a_pad, step = shell_step;
    for (int t = 0; t < n; t += W) {
        const V c = S::load(cosine + t), s = S::sqrt(T(1) - c * c), cotangent = c / s, r = S::load(mean_r + t);
        V begin{}, x = V{} + 1, y{};
        for (int i = 1; i < window.n_starts; ++i) {
            const auto later = c < after[i];
            begin = later ? V{} + T(i) : begin, x = later ? V{} + window_cos[i] : x, y = later ? V{} + window_sin[i] : y;
        }
        bends<true, FITTED>(c * x + s * y, s * x - c * y, x - cotangent * y, -(y + cotangent * x), window.n, t);
        shells<true>(r, V{}, t);
        const V low = S::max((r - from) * ladder.per_step + T(1), T(0));
        const V high = S::max((r - to) * ladder.per_step + T(1), T(0));
        I first = __builtin_convertvector(low < n_shells ? low : V{} + n_shells, I);
        const I last = __builtin_convertvector(high < n_shells ? high : V{} + n_shells, I);
        const I count = (last - first + 1) & ~1;      // by twos
        first = first < most - count ? first : most - count;
        I* out = reinterpret_cast<I*>(in_reach + t);
        out[0] = first * ROW, out[CHUNK / W] = count, out[2 * CHUNK / W] = first * step + __builtin_convertvector(begin, I);
    }
}

// Rows of LANES angles, side by side for each pair, and of their derivatives.
template <class T> template <int LANES> void Worker<T>::gather_angles(int n) {
    T* to = angles_of_pair;
    for (int z = 0; z < n_rows * LANES; z += LANES) {
        for (const T* from : {Z + z * ROW, dZ + z * ROW}) {
            for (int t = 0; t < n; t += W) {
                V v[LANES];
                for (int i = 0; i < LANES; ++i) v[i] = z + i < window.n ? S::load(from + i * ROW + t) : V{};
                S::zip(v);
                for (int i = 0; i < LANES; ++i) S::store(to + t * LANES + i * W, v[i]);
            }
            to += LANES * CHUNK;
        }
    }
}

// numbers[group][a][z]: in the lanes LANES m + i, cotangent m of the group at (a, z + i).
template <class T> template <int LANES> void Worker<T>::load_numbers(const Range& range, Items<const T> cotangent) {
    const int block = angular_block(angular.species[range.first], angular.species[range.second]);
    memset(coefficients, 0, sizeof(T) * n_items * group_size);
    for (int m = 0; m < n_items; ++m) {
        T* to = coefficients + m * group_size;
        for (int a = 0; a < n_a; ++a) memcpy(to + a * shell_step, cotangent[m] + block + a * n_z, sizeof(T) * n_z);
    }
    for (int group = 0; group < n_groups; ++group) {
        for (int i = 0; i < group_size; i += W) {
            V rows[W];
            for (int lane = 0; lane < W; ++lane) {
                const int m = group * (W / LANES) + lane / LANES;
                rows[lane] = m < n_items ? S::load(coefficients + m * group_size + i + lane % LANES) : V{};
            }
            S::transpose(rows);
            for (int q = 0; q < W; ++q) numbers[group * group_size + i + q] = rows[q];
        }
    }
}

// Add up what the pairs of these segments do to their neighbours, by the angles of N rows from `row` on.
template <class T> template <int LANES, int N>
void Worker<T>::contract_items(const Segment* segment, const Segment* end, int group, int row) {
    // Copies, as above.
    const V* const of_group = numbers + group * group_size + row * LANES;
    const T *const of_shells = R, *const of_angles = angles_of_pair + row * LANES * ROW, *const factors = this->factors;
    const Int* const in_reach = this->in_reach;
    V* const pulled = this->pulled + group * PULLS;
    const size_t slot_step = n_groups * PULLS, shell_step = this->shell_step;
    for (; segment < end; ++segment) {
        V sum[PULLS] = {}, by_first[PULLS], *second = pulled + segment->k * slot_step;
        for (int q = 0; q < PULLS; ++q) by_first[q] = V{} + factors[PULLS * segment->j + q];
        const T *shells = of_shells + segment->at, *angles = of_angles + segment->at * LANES;
        const T* by_second = factors + PULLS * segment->k;
        const Int* pair = in_reach + segment->at;
        for (const Int* last = pair + segment->n; pair < last; ++pair) {
            const T* r = shells + pair[0];
            const V* g = of_group + pair[2 * CHUNK];
            V left[N] = {}, dleft[N] = {};
            for (Int a = pair[CHUNK]; a > 0; a -= 2) {
                for (int each = 0; each < 2; ++each) {
                    for (int q = 0; q < N; ++q) {
                        const V factor = S::held(g[q * LANES]);
                        left[q] += factor * r[each * ROW], dleft[q] += factor * r[each * ROW + CHUNK];
                    }
                    g += shell_step;
                }
                r += 2 * ROW;
            }
            V value{}, by_r{}, by_cosine{};
            for (int q = 0; q < N; ++q) {
                const T* z = angles + q * LANES * ROW;
                const V bend = S::template repeat<LANES>(z), slope = S::template repeat<LANES>(z + LANES * CHUNK);
                value += left[q] * bend, by_r += dleft[q] * bend, by_cosine += left[q] * slope;
            }
            const V pull[PULLS] = {value, by_r, by_cosine, by_cosine, by_cosine};
            for (int q = 0; q < PULLS; ++q) sum[q] += pull[q] * by_second[q], second[q] += pull[q] * by_first[q];
            shells += 1, angles += LANES, second += slot_step, by_second += PULLS;
        }
        for (int q = 0; q < PULLS; ++q) pulled[segment->j * slot_step + q] += sum[q];
    }
}

// dE/dvec as by add_angular, with dE/dr = value dfc + by_r fc / 2, added to out (n_edges, 3, lanes).
template <class T> template <int LANES> void Worker<T>::add_items(T* out) {
    const Neighbours<T>& a = angular;
    for (int g = 0; g < a.n_present; ++g) {
        for (int i = a.begin[g]; i < a.end[g]; ++i) {
            const T fc = a.fc[i], u[3] = {a.x[i], a.y[i], a.z[i]};
            for (int group = 0; group < n_groups; ++group) {
                V sum[PULLS], along{};
                for (int q = 0; q < PULLS; ++q) sum[q] = S::template sums_of<LANES>(pulled[(i * n_groups + group) * PULLS + q]);
                for (int k = 0; k < 3; ++k) sum[2 + k] *= fc * a.inverse[i], along -= sum[2 + k] * u[k];
                along += sum[0] * a.dfc[i] + sum[1] * (fc / 2);
                for (int k = 0; k < 3; ++k) {
                    T* to = out + (3 * a.edge[i] + k) * lanes + group * (W / LANES);
                    S::store(to, S::load(to) + along * u[k] + sum[2 + k]);
                }
            }
        }
    }
}

// ---- derivative along tangents -------------------------------------------------------------------------------------

// per_slot = (dr, du (3)) of each neighbour along the tangent `item`, where dr = u.dv and du = (dv - u dr) / r.
template <class T> void Worker<T>::load_tangents(const Neighbours<T>& list, const T* tangent, int item) {
    T *vx = scratch, *vy = vx + slots_max, *vz = vy + slots_max;
    for (int g = 0; g < list.n_present; ++g) {
        for (int i = list.begin[g]; i < list.end[g]; ++i) {
            const T* v = tangent + 3 * list.edge[i];
            vx[i] = v[0], vy[i] = v[1], vz[i] = v[2];
        }
        for (int i = list.end[g]; i < round_up(list.end[g], W); ++i) vx[i] = vy[i] = vz[i] = 0;
    }
    T* out = slot_array(item, 0);
    for (int i = 0; i < list.n_slots; i += W) {
        V x = S::load(list.x + i), y = S::load(list.y + i), z = S::load(list.z + i);
        V inverse = S::load(list.inverse + i);
        V dx = S::load(vx + i), dy = S::load(vy + i), dz = S::load(vz + i), dr = x * dx + y * dy + z * dz;
        S::store(out + i, dr);
        S::store(out + slots_max + i, (dx - x * dr) * inverse);
        S::store(out + 2 * slots_max + i, (dy - y * dr) * inverse);
        S::store(out + 3 * slots_max + i, (dz - z * dr) * inverse);
    }
}

// tangents = (P d(mean r), dP, P dcos) of the pairs, for every item.
template <class T> void Worker<T>::pair_tangents(int j, int k, int n, int at) {
    const Neighbours<T>& a = angular;
    for (int m = 0; m < n_items; ++m) {
        const T* dr = slot_array(m, 0);
        const T *dx = dr + slots_max, *dy = dx + slots_max, *dz = dy + slots_max;
        T* out = tangents + 3 * m * (CHUNK + W) + at;
        for (int i = k; i < k + n; i += W, out += W) {
            V fc = S::load(a.fc + i), drk = S::load(dr + i);
            V dcos = S::load(dx + i) * a.x[j] + S::load(dy + i) * a.y[j] + S::load(dz + i) * a.z[j];
            dcos += S::load(a.x + i) * dx[j] + S::load(a.y + i) * dy[j] + S::load(a.z + i) * dz[j];
            V p = fc * a.fc[j];
            S::store(out, (drk + dr[j]) * p * T(0.5));
            S::store(out + CHUNK + W, S::load(a.dfc + i) * drk * a.fc[j] + fc * (a.dfc[j] * dr[j]));
            S::store(out + 2 * (CHUNK + W), dcos * p);
        }
    }
}

// Factors of the two products of an item, d(R P)^T Z + (R P)^T dZ: U = d(R P) and dU = P dZ.
template <class T> void Worker<T>::tangent_factors(int n, int item) {
    const T* by_r = tangents + 3 * item * (CHUNK + W);
    for (int t = 0; t < n; t += W) {
        V alpha = S::load(by_r + t), beta = S::load(by_r + CHUNK + W + t);
        V gamma = S::load(by_r + 2 * (CHUNK + W) + t);
        for (int a = 0; a < n_a; ++a) {
            S::store(U + a * ROW + t, alpha * S::load(dR + a * ROW + t) + beta * S::load(R + a * ROW + t));
        }
        for (int z = 0; z < n_z; ++z) S::store(dU + z * ROW + t, gamma * S::load(dZ + z * ROW + t));
    }
}

// ---- one atom ------------------------------------------------------------------------------------------------------

template <class T> void Worker<T>::forward(T* out) {
    memset(out, 0, sizeof(T) * length);
    radial_forward(out);
    memset(sums, 0, sizeof(V) * a_pad * z_pad);
    for_each_chunk([&](int j, int k, int n, int at) { pair_geometry(j, k, n, at), pair_weight(j, k, n, at); },
        [&](int n) {
            features<false>(n);
            for (const Range* range = ranges; range < ranges + n_ranges; ++range) {
                outer<false>(*range, R, Z, nullptr, nullptr, sums);
                if (range->is_last) store_sums(*range, sums, out);
            }
        });
}

template <class T> void Worker<T>::vjp(int n_edges, Items<const T> cotangent, T* out) {
    memset(out, 0, sizeof(T) * 3 * lanes * n_edges);
    find_radial_spans();
    int item = 0;
    for (; item + 8 <= n_items; item += 8) radial_vjp<8>(cotangent, item);
    for (; item + 4 <= n_items; item += 4) radial_vjp<4>(cotangent, item);
    for (; item < n_items; ++item) radial_vjp<1>(cotangent, item);
    store_radial(out);
    if (n_items > 1) vjp_of_items(cotangent, out);
    else if (n_items == 1) vjp_of_one(cotangent[0], out);
}

template <class T> void Worker<T>::jvp(Items<const T> tangent, Items<T> out) {
    for (int m = 0; m < n_items; ++m) memset(out[m], 0, sizeof(T) * length);
    for (int m = 0; m < n_items; ++m) load_tangents(radial, tangent[m], m);
    find_radial_spans();
    int item = 0;
    for (; item + 8 <= n_items; item += 8) radial_jvp<8>(out, item);
    for (; item + 4 <= n_items; item += 4) radial_jvp<4>(out, item);
    for (; item < n_items; ++item) radial_jvp<1>(out, item);
    for (int m = 0; m < n_items; ++m) load_tangents(angular, tangent[m], m);
    memset(sums, 0, sizeof(V) * n_items * a_pad * z_pad);
    for_each_chunk([&](int j, int k, int n, int at) { pair_geometry(j, k, n, at), pair_tangents(j, k, n, at); },
        [&](int n) {
            features<true>(n);
            for (int m = 0; m < n_items; ++m) {
                tangent_factors(n, m);
                for (const Range* range = ranges; range < ranges + n_ranges; ++range) {
                    V* sum = sums + m * a_pad * z_pad;
                    outer<true>(*range, U, Z, R, dU, sum);
                    if (range->is_last) store_sums(*range, sum, out[m]);
                }
            }
        });
}

// ---- many atoms ----------------------------------------------------------------------------------------------------

template <class T> size_t workspace_bytes(const AevJob& job) {
    Arena arena{nullptr};
    Worker<T> worker(*job.shape, job.n_items, job.longest_row, arena);
    arena.take<T>(3 * worker.lanes * job.longest_row);
    return arena.used;
}

enum Product { FORWARD, VJP, JVP };

template <class T, Product PRODUCT> void run(const AevJob& job, int64_t begin, int64_t end, void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    Worker<T> worker(*job.shape, job.n_items, job.longest_row, arena);
    const T *vec = static_cast<const T*>(job.vec), *in = static_cast<const T*>(job.in);
    T *out = static_cast<T*>(job.out), *gradient = arena.take<T>(3 * worker.lanes * job.longest_row);
    const int64_t per_atom = job.n_atoms * worker.length, per_edge = 3 * job.n_edges;
    for (int64_t atom = begin; atom < end; ++atom) {
        const int64_t first = job.row[atom], at = atom * worker.length;
        const Edges<T> edges{vec + 3 * first, job.species + first, int(job.row[atom + 1] - first)};
        worker.look(edges);
        if (PRODUCT == FORWARD) worker.forward(out + at);
        if (PRODUCT == VJP) {
            worker.vjp(edges.n, {in + at, per_atom}, gradient);
            for (int64_t m = 0; m < job.n_items; ++m)
                for (int i = 0; i < 3 * edges.n; ++i) out[m * per_edge + 3 * first + i] = gradient[i * worker.lanes + m];
        }
        if (PRODUCT == JVP) worker.jvp({in + 3 * first, per_edge}, {out + at, per_atom});
    }
}

// What an atom of a block sees, kept from its AEV until its forces.
template <class T> struct View {
    T* vec;
    int64_t* other;
    int n_edges;
    Neighbours<T> radial, angular;
};

// A worker that takes the edges of its atoms from a list of pairs.
template <class T> struct Collector {
    const AevBlock& block;
    const PairList& list;
    Arena arena;
    Worker<T> worker;
    T* gradient;
    int64_t* species;
    View<T>* views;

    Collector(const AevBlock& block, void* workspace)
        : block(block), list(*block.list), arena{static_cast<char*>(workspace)},
          worker(*block.shape, block.n_items, block.longest_row, arena) {
        gradient = arena.take<T>(3 * worker.lanes * block.longest_row);
        species = arena.take<int64_t>(block.longest_row + 1);
        views = arena.take<View<T>>(block.n_rows);
        for (int64_t r = 0; r < block.n_rows; ++r) {  // sets pointers only: the rest is as an earlier call left it
            View<T> unused;
            View<T>& view = workspace ? views[r] : unused;
            view.vec = arena.take<T>(3 * block.longest_row + 3), view.other = arena.take<int64_t>(block.longest_row + 1);
            for (Neighbours<T>* each : {&view.radial, &view.angular}) {
                worker.allocate(*each, arena, int(block.longest_row));
            }
        }
    }

    // Pairs within the larger cutoff.
    Edges<T> collect(int64_t atom, View<T>& view) {
        const double *own = list.positions + 3 * atom, *cell = list.cells + 9 * list.frame[atom];
        const AevShape& shape = *block.shape;
        const double cutoff = shape.radial_cutoff > shape.angular_cutoff ? shape.radial_cutoff : shape.angular_cutoff;
        int n = 0;
        for (int64_t e = list.row[atom]; e < list.row[atom + 1]; ++e) {
            const double* there = list.positions + 3 * list.other[e];
            const int32_t* turn = list.shift + 3 * e;
            T* v = view.vec + 3 * n;
            for (int k = 0; k < 3; ++k) {
                v[k] = T(there[k] - own[k] + (turn[0] * cell[k] + turn[1] * cell[3 + k] + turn[2] * cell[6 + k]));
            }
            view.other[n] = list.other[e];
            n += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] < T(cutoff * cutoff);
        }
        for (int i = 0; i < n; ++i) species[i] = list.species[view.other[i]];
        view.n_edges = n;
        return {view.vec, species, n};
    }

    void describe() {
        for (int64_t r = 0; r < block.n_rows; ++r) {
            View<T>& view = views[r];
            worker.radial = view.radial, worker.angular = view.angular;
            worker.look(collect(block.atoms[r], view));
            worker.forward(static_cast<T*>(block.aev) + r * worker.length);
            view.radial = worker.radial, view.angular = worker.angular;
        }
    }

    // After describe() with the same block and workspace.
    void pull() {
        for (int64_t r = 0; r < block.n_rows; ++r) {
            const View<T>& view = views[r];
            worker.radial = view.radial, worker.angular = view.angular;
            const T* cotangent = static_cast<const T*>(block.cotangent) + r * worker.length;
            worker.vjp(view.n_edges, {cotangent, block.n_rows * worker.length}, gradient);
            if (worker.lanes == 1) add<T>(0, view, block.atoms[r], *block.unit[r]);
            for (int64_t m = 0; worker.lanes > 1 && m < block.n_items; m += Simd<T>::W) {
                add<typename Simd<T>::V>(m, view, block.atoms[r], *block.unit[r]);
            }
        }
    }

    static INLINE T get(const T* p, T) { return *p; }
    static INLINE typename Simd<T>::V get(const T* p, typename Simd<T>::V) { return Simd<T>::load(p); }
    static INLINE void put(T* p, T value) { *p = value; }
    static INLINE void put(T* p, typename Simd<T>::V value) { Simd<T>::store(p, value); }

    // Forces and virial of the item `first`, or of a vector of items.
    template <class N> void add(int64_t first, const View<T>& view, int64_t atom, const AevUnit& unit) {
        const int64_t lanes = sizeof(N) == sizeof(T) ? 1 : worker.lanes;
        const T* g = gradient + first;
        T* forces = static_cast<T*>(unit.forces) - 3 * lanes * unit.first_atom + first;
        N total[3] = {};
        for (int i = 0; i < view.n_edges; ++i) {
            T* to = forces + 3 * lanes * view.other[i];
            for (int k = 0; k < 3; ++k) {
                const N each = get(g + (3 * i + k) * lanes, N{});
                total[k] += each, put(to + k * lanes, get(to + k * lanes, N{}) - each);
            }
        }
        T* own = forces + 3 * lanes * atom;
        for (int k = 0; k < 3; ++k) put(own + k * lanes, get(own + k * lanes, N{}) + total[k]);
        if (!unit.virial) return;
        N virial[9] = {};
        for (int i = 0; i < view.n_edges; ++i)
            for (int k = 0; k < 3; ++k)
                for (int l = 0; l < 3; ++l) virial[3 * k + l] += get(g + (3 * i + l) * lanes, N{}) * view.vec[3 * i + k];
        for (int64_t m = first; m < lesser(block.n_items, first + int64_t(sizeof(N) / sizeof(T))); ++m) {
            for (int k = 0; k < 9; ++k) {
                unit.virial[9 * m + k] += double(reinterpret_cast<const T*>(virial + k)[m - first]);
            }
        }
    }
};

template <class T> size_t block_bytes(const AevBlock& block) { return Collector<T>(block, nullptr).arena.used; }
template <class T> void describe(const AevBlock& block, void* workspace) { Collector<T>(block, workspace).describe(); }
template <class T> void pull(const AevBlock& block, void* workspace) { Collector<T>(block, workspace).pull(); }

template <class T> constexpr AevKernel kernel() {
    return {workspace_bytes<T>, run<T, FORWARD>, run<T, VJP>, run<T, JVP>, block_bytes<T>, describe<T>, pull<T>};
}

}  // namespace

#define NAME_(level) level##_aev
#define NAME(level) NAME_(level)
extern const AevKernel NAME(SMELT_SIMD)[2];
const AevKernel NAME(SMELT_SIMD)[2] = {kernel<float>(), kernel<double>()};
