// How are matrices of floats multiplied by AMX tiles, which hold integers of eight bits?
//
// Numbers that are summed over share a scale, in which each is an integer of three digits of eight bits with signs: next to
// the largest of them as precise as a float (Ozaki's scheme on integers, arXiv:2306.11975). Of the nine
// products of the digits of two numbers the six largest are formed. So that what is small does not count for little because
// of that, weights are balanced first. Sums of integers are exact: their order does not matter, and an atom's result does
// not depend on others in its block.
//
// What is summed over comes DEPTH numbers at a time: a step. The digits of SIDE x DEPTH numbers are a panel of three tiles.
// Weights are packed into panels once (pack), activations for each product (or less often: Product.prepared).
#pragma once
#include "panels.h"

#include <utility>

namespace {

// Where there are no tiles vectors serve.
template <class T> struct Tiles : Panels<T> {};

#if defined(__AMX_INT8__)

template <> class Tiles<float> {
    using S = Simd<float>;
    using V = S::V;
    using I = S::I;
    static constexpr int SIDE = 16, PARTS = 4, DEPTH = PARTS * SIDE, DIGITS = 3, TILE = 1024, PANEL = DIGITS * TILE;
    static constexpr int ROW = TILE / SIDE, UNITS = 64;  // bytes

public:
    static constexpr bool TURNS = true;

    // While it lives, this thread's registers for tiles have the shape that is used here.
    class Configured {
        struct alignas(64) Shapes { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; };
    public:
        Configured() {
            Shapes shapes{1, 0, {}, {}, {}};
            for (int k = 0; k < 8; ++k) shapes.row_bytes[k] = ROW, shapes.rows[k] = SIDE;
            asm volatile("ldtilecfg %0" : : "m"(shapes));
        }
        ~Configured() { asm volatile("tilerelease"); }
        Configured(const Configured&) = delete;
    };

    // Weights (n_out, n_in) when packed: for the way forth, then for the way back, whose outputs are the inputs, scales and
    // panels for SIDE outputs after one another. Only whole tiles are packed, and of layers with less nothing is.
    static size_t packed_bytes(int n_out, int n_in) {
        constexpr int MOST = 40'000;                  // sums of three products of digits stay below 2^31
        if (n_out < SIDE || n_in < SIDE || n_out > MOST || n_in > MOST) return 0;
        const size_t there = 2 * scales_bytes(n_in) + n_out / SIDE * strip_bytes(n_in);
        return there + 2 * scales_bytes(n_out) + n_in / SIDE * strip_bytes(n_out);
    }
    static Packed forth(int n_in, const char* packed) {
        if (!packed) return {};
        return {packed + 2 * scales_bytes(n_in), reinterpret_cast<const float*>(packed)};
    }
    static Packed back(int n_out, int n_in, const char* packed, int first) {
        if (!packed) return {};
        packed += 2 * scales_bytes(n_in) + n_out / SIDE * strip_bytes(n_in);
        const char* strips = packed + 2 * scales_bytes(n_out);
        return {strips + first / SIDE * strip_bytes(n_out), reinterpret_cast<const float*>(packed)};
    }

    // Inputs get their scales by all weights (n_networks, n_out, n_in) of networks that share them, which begin at first.
    static void pack(int n_out, int n_in, const float* w, int n_networks, const float* first, char* packed) {
        if (packed_bytes(n_out, n_in) == 0) return;
        const Packed there = forth(n_in, packed), back_again = back(n_out, n_in, packed, 0);
        const float* by = balance<false>(n_networks * n_out, n_in, first, const_cast<float*>(there.scales));
        char* strip = const_cast<char*>(there.strips);
        for (int o = 0; o + SIDE <= n_out; o += SIDE, strip += strip_bytes(n_in)) {
            pack_rows(n_in, w + o * n_in, n_in, by, strip);
        }
        by = balance<true>(n_out, n_in, w, const_cast<float*>(back_again.scales));
        strip = const_cast<char*>(back_again.strips);
        for (int i = 0; i + SIDE <= n_in; i += SIDE, strip += strip_bytes(n_out)) weave(n_out, w + i, n_in, by, strip);
    }

    // ---- products --------------------------------------------------------------------------------------------------

    // Of layers up to this width.
    static size_t room_bytes(int width) {
        const size_t outer = OuterRoom(nullptr, width).used, product = Room(nullptr, width).used;
        return outer > product ? outer : product;
    }

    // The first outputs of n_out, as many as tiles hold; returns their number.
    static int multiply(int n_out, const Product<float>& p) {
        n_out = n_out / SIDE * SIDE;
        if (n_out == 0 || !p.packed.strips) return 0;
        if (p.step_in == 1) Tiles(p).run<true>(n_out);
        else Tiles(p).run<false>(n_out);
        return n_out;
    }

    // The same of a sum over atoms, whose scale is each output's and each input's.
    static int add_outer(int n_out, const Outer<float>& p, const Run& inputs) {
        n_out = n_out / SIDE * SIDE;
        if (n_out == 0) return 0;
        const OuterRoom room(p.room, n_out);
        char *strips = room.left, *levels = room.levels[0], *former = room.levels[1];
        for (int s = 0; s < 2; ++s, strips += n_out / SIDE * ATOMS_BYTES) {
            for (int o = 0; o < n_out && !p.prepared; o += SIDE) {
                pack_rows(p.n_rows, p.left[s] + o * BLOCK, BLOCK, nullptr, strips + o / SIDE * ATOMS_BYTES);
            }
            for (int i = inputs.begin; i < inputs.end; i += SIDE) {
                weave(p.n_rows, p.rows[s] + i, p.row_length, nullptr, room.right);
                load<5>(room.right), load<6>(room.right + TILE), load<7>(room.right + 2 * TILE);
                const char* left = strips;
                for (int o = 0; o < n_out; o += SIDE, left += ATOMS_BYTES) {
                    clear_sums();
                    load<3>(left), add<0, 3, 5>(), add<1, 3, 6>(), add<2, 3, 7>();
                    load<4>(left + TILE), add<1, 4, 5>(), add<2, 4, 6>();
                    load<3>(left + 2 * TILE), add<2, 3, 5>();
                    store_sums(levels), std::swap(levels, former);
                    if (o) finish(p, o - SIDE, i, left - ATOMS_BYTES, room.right, levels);
                }
                finish(p, n_out - SIDE, i, left - ATOMS_BYTES, room.right, former);
            }
        }
        return n_out;
    }

private:
    static constexpr int n_steps_of(int width) { return (width + DEPTH - 1) / DEPTH; }
    static constexpr int clamp(int n) { return n < 0 ? 0 : n > SIDE ? SIDE : n; }

    // Scales, and their inverses after them; of 1 beyond the last.
    static constexpr size_t scales_bytes(int width) { return sizeof(float) * DEPTH * n_steps_of(width); }
    // Panels for SIDE outputs, and what a first digit of 1 is worth in each of them.
    static constexpr size_t strip_bytes(int width) { return n_steps_of(width) * PANEL + UNITS; }
    static const float* units_of(const char* strip, int width) {
        return reinterpret_cast<const float*>(strip + n_steps_of(width) * PANEL);
    }
    static constexpr size_t ATOMS_BYTES = PANEL + UNITS;  // of a strip that is summed over the atoms of a block

    struct Room {
        size_t used;
        char* levels[2];                              // sums in use, and the last ones
        char* strips;                                 // of tiles of atoms
        int32_t *n_steps, *steps;                     // of the sum: those in which not all is zero
        Room(char* room, int width)
            : levels{room, room + PANEL}, strips(room + 2 * PANEL),
              n_steps(reinterpret_cast<int32_t*>(strips + BLOCK / SIDE * strip_bytes(width))), steps(n_steps + 1) {
            used = reinterpret_cast<char*>(steps + n_steps_of(width)) - room;
            used = (used + 63) / 64 * 64;
        }
    };
    struct OuterRoom {
        char *levels[2], *right, *left;               // strips: one of inputs, those of all outputs for both sums
        size_t used;
        OuterRoom(char* room, int n_out)
            : levels{room, room + PANEL}, right(room + 2 * PANEL), left(right + ATOMS_BYTES),
              used(left - room + n_out / SIDE * 2 * ATOMS_BYTES) {}
    };

    const Product<float>& p;
    const Room room;
    const int n_tiles;                                // of atoms

    explicit Tiles(const Product<float>& p) : p(p), room(p.room, p.n_in), n_tiles(p.n_lanes / SIDE) {}

    // Weights are the left factor on the way forth, with outputs in the rows of a tile, and the right one on the way back,
    // with outputs in its columns. The last sums are finished while the next are made.
    template <bool FORTH> void run(int n_out) {
        if (!p.prepared) prepare<FORTH>();
        const int n_steps = *room.n_steps;
        if (n_steps == 0) return start(n_out);
        const int64_t bytes = strip_bytes(p.n_in), bytes_ahead = (bytes / 64 / (n_tiles * n_steps) + 1) * 64;
        const char* strip = p.packed.strips;
        char *levels = room.levels[0], *former = room.levels[1];
        for (int o = 0; o < n_out; o += SIDE, strip += bytes) {
            const char* ahead = strip + bytes;
            for (int t = 0; t < n_tiles; ++t) {
                const char* panel = room.strips + t * bytes;
                clear_sums();
                for (int s = 0; s < n_steps; ++s, panel += PANEL, ahead += bytes_ahead) {
                    for (int i = 0; i < bytes_ahead; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T1);
                    const char* weights = strip + room.steps[s] * PANEL;
                    add_products(FORTH ? weights : panel, FORTH ? panel : weights);
                    if (s) continue;
                    if (t) finish<FORTH>(o, t - 1, strip, former);
                    else if (o) finish<FORTH>(o - SIDE, n_tiles - 1, strip - bytes, former);
                }
                store_sums(levels), std::swap(levels, former);
            }
        }
        finish<FORTH>(n_out - SIDE, n_tiles - 1, strip - bytes, former);
    }

    // Outputs if all that is summed over is zero.
    void start(int n_out) const {
        for (int o = 0; o < n_out; ++o)
            for (int t = 0; t < p.n_lanes; t += SIDE) S::store(p.out + o * BLOCK + t, before(o, p.out + o * BLOCK + t));
    }
    INLINE V before(int o, const float* out) const { return p.add ? S::load(out) : S::all(p.start ? p.start[o] : 0); }

    template <bool FORTH> void prepare() const {
        const Run all[] = {{0, p.n_in}};
        int n = 0;
        for (const Run& run : p.runs ? *p.runs : Runs{all, 1}) {
            int s = run.begin / DEPTH;
            for (s += n && room.steps[n - 1] == s; s * DEPTH < run.end; ++s) room.steps[n++] = s;
        }
        *room.n_steps = n;
        for (int t = 0; t < n_tiles; ++t) {
            char* strip = room.strips + t * strip_bytes(p.n_in);
            weave(p.n_in, p.in + t * SIDE, BLOCK, p.packed.scales, strip, room.steps, n);
            for (int k = 0; k < n * DIGITS && !FORTH; ++k) turn_over(strip + k * TILE);
        }
    }
    static void turn_over(char* tile) {
        float* rows = reinterpret_cast<float*>(tile);
        V square[SIDE];
        for (int r = 0; r < SIDE; ++r) square[r] = S::load(rows + r * SIDE);
        S::transpose(square);
        for (int r = 0; r < SIDE; ++r) S::store(rows + r * SIDE, square[r]);
    }

    // Outputs o .. o + SIDE of a tile of atoms, from sums of digits.
    template <bool FORTH> INLINE void finish(int o, int t, const char* strip, const char* levels) const {
        const float *outputs = units_of(strip, p.n_in), *atoms = units_of(room.strips + t * strip_bytes(p.n_in), p.n_in);
        const V lanes = S::load(FORTH ? atoms : outputs);
        float* out = p.out + o * BLOCK + t * SIDE;
        V square[SIDE];
        for (int r = 0; r < SIDE; ++r) {
            square[r] = sum(levels, r) * (FORTH ? outputs : atoms)[r];
            if (FORTH || p.turned) S::store(out + r * BLOCK, square[r] * lanes + before(o + r, out + r * BLOCK));
        }
        if (FORTH || p.turned) return;
        for (V& row : square) row *= lanes;
        S::transpose(square);
        for (int i = 0; i < SIDE; ++i) S::store(out + i * BLOCK, square[i] + before(o + i, out + i * BLOCK));
    }

    static INLINE void finish(const Outer<float>& p, int o, int i, const char* left, const char* right,
                              const char* levels) {
        const V inputs = S::load(units_of(right, BLOCK));
        for (int r = 0; r < SIDE; ++r) {
            float* out = p.out + int64_t(o + r) * p.row_length + i;
            S::store(out, sum(levels, r) * units_of(left, BLOCK)[r] * inputs + S::load(out));
        }
    }

    // ---- digits ----------------------------------------------------------------------------------------------------

    static INLINE I sizes(V v) { return (I)v & 0x7fffffff; }  // in whose order what is not a number comes last
    static INLINE I larger(I a, I b) { return (I)_mm512_maskz_max_epi32(ALL16, (__m512i)a, (__m512i)b); }
    static INLINE I largest_of(I v) {
        int most = 0;
        for (int i = 0; i < SIDE; ++i) most = v[i] > most ? v[i] : most;
        return I{} + most;
    }

    // By how much to multiply so that numbers up to `largest` are integers, and what a first digit of 1 is worth then.
    struct Scale {
        static constexpr float LIMIT = 8355000.0f;    // below 127 * (256 * 256 + 256 + 1)
        V factor, unit;
        explicit INLINE Scale(I largest) {
            const V most = (V)_mm512_maskz_max_ps(ALL16, (__m512)S::all(1e-30f), (__m512)(V)largest);
            factor = LIMIT / most, unit = most * (65536.0f / LIMIT) + (most - most);  // not a number if infinite
        }
    };

    // Scales of what weights (n_out, n_in) are multiplied by, inputs or (ACROSS) outputs: powers of two near the mean size
    // of its weights. Scaled weights are alike then, and what is scaled is as large as what it adds to sums. Returns the
    // inverses.
    template <bool ACROSS> static const float* balance(int n_out, int n_in, const float* w, float* scales) {
        const int n = ACROSS ? n_out : n_in, n_weights = ACROSS ? n_in : n_out;
        float* inverses = scales + scales_bytes(n) / sizeof(float);
        memset(scales, 0, scales_bytes(n));
        for (int o = 0; o < n_out; ++o) {
            V sum{};
            for (int i = 0; i < n_in; i += SIDE) {
                const I bits = sizes(S::load_masked(w + o * n_in + i, S::lanes(0, clamp(n_in - i))));
                const V size = (V)(bits & (bits < 0x7f000000));  // if it is finite, and not too large to be summed
                if (ACROSS) sum += size;
                else S::store(scales + i, S::load(scales + i) + size);
            }
            if (ACROSS) scales[o] = S::sum(sum);
        }
        for (int k = 0; k < n_steps_of(n) * DEPTH; ++k) {
            const float mean = scales[k] / float(n_weights);
            int bits;
            memcpy(&bits, &mean, sizeof(bits));
            bits = mean < 1e-15f || mean > 1e15f ? 127 << 23 : bits & 0x7f800000;  // 1, or less its mantissa
            memcpy(scales + k, &bits, sizeof(bits)), inverses[k] = 1 / scales[k];
        }
        return inverses;
    }

    // SIDE rows of n numbers, `step` from row to row, and what they are worth. by: factors of numbers, or null.
    static void pack_rows(int n, const float* rows, int64_t step, const float* by, char* strip) {
        for (int r = 0; r < SIDE; ++r, rows += step) {
            const auto part = [&](int k) {
                const V v = S::load_masked(rows + k, S::lanes(0, clamp(n - k)));
                return by ? v * S::load(by + k) : v;
            };
            I largest{};
            for (int k = 0; k < n; k += SIDE) largest = larger(largest, sizes(part(k)));
            const Scale scale(largest_of(largest));
            for (int k = 0; k < n; k += DEPTH) {
                const V v[PARTS] = {part(k), part(k + SIDE), part(k + 2 * SIDE), part(k + 3 * SIDE)};
                store_digits(v, scale.factor, strip + k / DEPTH * PANEL + r * ROW);
            }
            const_cast<float*>(units_of(strip, n))[r] = scale.unit[0];
        }
    }

    // n numbers in each of SIDE lanes, `step` from one to the next, and what they are worth; of the steps in a list, or
    // of all.
    static INLINE void weave(int n, const float* from, int64_t step, const float* by, char* strip,
                             const int32_t* steps = nullptr, int n_steps = 0) {
        if (!steps) n_steps = n_steps_of(n);
        const auto number = [&](int k) { return by ? S::load(from + k * step) * by[k] : S::load(from + k * step); };
        I largest{};
        for (int i = 0; i < n_steps; ++i) {
            const int first = (steps ? steps[i] : i) * DEPTH, end = first + DEPTH < n ? first + DEPTH : n;
            for (int k = first; k < end; ++k) largest = larger(largest, sizes(number(k)));
        }
        const Scale scale(largest);
        S::store(const_cast<float*>(units_of(strip, n)), scale.unit);
        for (int i = 0; i < n_steps; ++i) {
            const int first = (steps ? steps[i] : i) * DEPTH;
            for (int j = 0; j < SIDE; ++j) {
                V v[PARTS];
                for (int c = 0; c < PARTS; ++c) v[c] = first + c * SIDE + j < n ? number(first + c * SIDE + j) : V{};
                store_digits(v, scale.factor, strip + i * PANEL + j * ROW);
            }
        }
    }

    // Digits of four vectors, those of a lane together: the first ones at out, the last ones at out + 2 TILE.
    static INLINE void store_digits(const V (&v)[PARTS], V factor, char* out) {
        I n[PARTS];
        for (int c = 0; c < PARTS; ++c) {             // digits between 0 and 255, until 128 is taken from them
            n[c] = (I)_mm512_maskz_cvtps_epi32(ALL16, (__m512)(v[c] * factor + 8421504.0f));  // 0x808080
        }
        const auto bytes = [](I even, I odd) { return (even & 0x00ff00ff) | (odd & int(0xff00ff00)); };
        const auto words = [](I low, I high) { return (low & 0xffff) | (high & int(0xffff0000)); };
        const I ends[] = {bytes(n[0], n[1] << 8), bytes(n[2], n[3] << 8)};
        const I middle[] = {bytes(n[0] >> 8, n[1]), bytes(n[2] >> 8, n[3])};
        const int signs = int(0x80808080);
        _mm512_store_si512(out, (__m512i)(words(ends[0] >> 16, ends[1]) ^ signs));
        _mm512_store_si512(out + TILE, (__m512i)(words(middle[0], middle[1] << 16) ^ signs));
        _mm512_store_si512(out + 2 * TILE, (__m512i)(words(ends[0], ends[1] << 16) ^ signs));
    }

    // ---- registers: 0 to 2 sums of products of digits, 3 to 5 the left digits, 6 and 7 the right ones -------------------

    template <int TO> static INLINE void load(const char* from) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(int64_t(ROW)), "i"(TO) : "memory");
    }
    template <int FROM> static INLINE void store(char* to) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(int64_t(ROW)), "i"(FROM) : "memory");
    }
    template <int TO, int LEFT, int RIGHT> static INLINE void add() {
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(TO), "i"(LEFT), "i"(RIGHT));
    }
    static INLINE void clear_sums() { asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2"); }
    static INLINE void store_sums(char* to) { store<0>(to), store<1>(to + TILE), store<2>(to + 2 * TILE); }
    static INLINE void add_products(const char* left, const char* right) {
        load<3>(left), load<6>(right), add<0, 3, 6>();
        load<4>(left + TILE), add<1, 4, 6>();
        load<7>(right + TILE), add<1, 3, 7>();
        load<5>(left + 2 * TILE), add<2, 5, 6>();
        add<2, 4, 7>();
        load<6>(right + 2 * TILE), add<2, 3, 6>();
    }

    // Row r of sums, in units of the first digits.
    static INLINE V sum(const char* levels, int r) {
        const auto level = [&](int k) {
            return (V)_mm512_maskz_cvtepi32_ps(ALL16, _mm512_load_si512(levels + k * TILE + r * ROW));
        };
        return level(0) + level(1) * (1.0f / 256) + level(2) * (1.0f / 65536);
    }
};

#endif

}  // namespace
