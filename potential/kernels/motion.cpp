// How do atoms move by one step of Langevin dynamics, and with which random numbers, on one instruction set?
//
// Random numbers are a function of (key of the frame, step, atom within the frame): Philox4x32-10 (Salmon et al., SC11,
// doi:10.1145/2063384.2063405), then Box and Muller's transform of the upper 24 bits of its four words. Nobody's numbers
// depend on batch mates, threads or processors.
//
// Compiled once per instruction set, as aev.cpp is and under the same rule: no external linkage but the table.
#include "motion.h"
#include "simd.h"

namespace {

constexpr int CHUNK = 64;                             // atoms at a time
using S = Simd<float>;
using V = S::V;
using I = S::I;
constexpr int W = S::W;

// Philox on the counters (index, low word of the step, high word of the step, 0) of CHUNK atoms.
struct Words { uint32_t word[4][CHUNK]; };

INLINE void philox(Words& w, uint32_t* low, uint32_t* high) {
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < CHUNK; ++i) {
            const uint64_t p = uint64_t(w.word[0][i]) * 0xD2511F53u, q = uint64_t(w.word[2][i]) * 0xCD9E8D57u;
            w.word[0][i] = uint32_t(q >> 32) ^ w.word[1][i] ^ low[i], w.word[1][i] = uint32_t(q);
            w.word[2][i] = uint32_t(p >> 32) ^ w.word[3][i] ^ high[i], w.word[3][i] = uint32_t(p);
            low[i] += 0x9E3779B9u, high[i] += 0xBB67AE85u;
        }
    }
}

INLINE V uniform(const uint32_t* words) {
    I bits;
    memcpy(&bits, words, sizeof bits);
    return __builtin_convertvector((bits >> 8) & 0xffffff, V) * 0x1p-24f;
}

INLINE V flip(V x, V sign) {
    const I top = I{} + INT32_MIN;
    return reinterpret_cast<V>(reinterpret_cast<I>(x) ^ (reinterpret_cast<I>(sign) & top));
}

// sqrt(-2 ln u) times cosine and sine of pi x, for u of (0, 1] and x of [-1, 1).
INLINE void box_muller(const uint32_t* radius, const uint32_t* angle, float* first, float* second) {
    for (int i = 0; i < CHUNK; i += W) {
        const V r = S::sqrt(S::max(S::log2(uniform(radius + i) + 0x1p-24f) * -1.386294361f, 0.0f));
        const V x = uniform(angle + i) * 2.0f - 1.0f, size = S::max(x, 0.0f) + S::max(-x, 0.0f);
        const V beyond = 0.5f - size;                 // negative in the left half of the circle
        V sine, cosine;
        S::sincospi(0.5f - (S::max(beyond, 0.0f) + S::max(-beyond, 0.0f)), sine, cosine);
        S::store(first + i, r * flip(cosine, beyond));
        if (second) S::store(second + i, r * flip(sine, x));
    }
}

// Three numbers for each of n atoms from `begin` on.
void draw(const MotionJob& job, int64_t begin, int n, float (&out)[3][CHUNK]) {
    Words w = {};
    uint32_t low[CHUNK] = {}, high[CHUNK] = {};
    for (int i = 0; i < n; ++i) {
        const int64_t frame = job.frame[begin + i], key = job.key[frame], step = job.step[frame];
        w.word[0][i] = uint32_t(begin + i - job.first[frame]);
        w.word[1][i] = uint32_t(step), w.word[2][i] = uint32_t(uint64_t(step) >> 32);
        low[i] = uint32_t(key), high[i] = uint32_t(uint64_t(key) >> 32);
    }
    philox(w, low, high);
    box_muller(w.word[0], w.word[1], out[0], out[1]);
    box_muller(w.word[2], w.word[3], out[2], nullptr);
}

INLINE int piece(int64_t at, int64_t end) { return int(end - at < CHUNK ? end - at : CHUNK); }

void normals(const MotionJob& job, float* out, int64_t begin, int64_t end) {
    float drawn[3][CHUNK];
    for (int64_t at = begin; at < end; at += CHUNK) {
        const int n = piece(at, end);
        draw(job, at, n, drawn);
        for (int i = 0; i < n; ++i)
            for (int k = 0; k < 3; ++k) out[3 * (at + i) + k] = drawn[k][i];
    }
}

// What multiplies each component of each of n atoms: the kick per force.
INLINE void pushes(const MotionJob& job, int64_t at, int n, double* out) {
    for (int i = 0; i < n; ++i)
        for (int k = 0; k < 3; ++k) out[3 * i + k] = job.push * job.inverse_mass[at + i];
}

void drift(const MotionJob& job, int64_t begin, int64_t end) {
    float drawn[3][CHUNK];
    double push[3 * CHUNK], noise[3 * CHUNK] = {};
    for (int64_t at = begin; at < end; at += CHUNK) {
        const int n = piece(at, end);
        pushes(job, at, n, push);
        if (job.damping != 1) {
            draw(job, at, n, drawn);
            for (int i = 0; i < n; ++i)
                for (int k = 0; k < 3; ++k) noise[3 * i + k] = job.noise_scale[at + i] * double(drawn[k][i]);
        }
        double *__restrict position = job.positions + 3 * at, *__restrict velocity = job.velocities + 3 * at;
        const double* __restrict force = job.forces + 3 * at;
        for (int x = 0; x < 3 * n; ++x) {
            const double before = velocity[x] + push[x] * force[x], after = job.damping * before + noise[x];
            position[x] += job.half_step * (before + after);
            velocity[x] = after;
        }
    }
}

void kick(const MotionJob& job, int64_t begin, int64_t end) {
    double push[3 * CHUNK];
    for (int64_t at = begin; at < end; at += CHUNK) {
        const int n = piece(at, end);
        pushes(job, at, n, push);
        double* __restrict velocity = job.velocities + 3 * at;
        const double* __restrict force = job.forces + 3 * at;
        for (int x = 0; x < 3 * n; ++x) velocity[x] += push[x] * force[x];
    }
}

double largest_force(const MotionJob& job, int64_t begin, int64_t end) {
    constexpr int LANES = 32;                         // independent maxima, so that none waits for another
    double largest[LANES] = {}, odd[LANES] = {};      // x - x is 0 but for infinite x and what is not a number
    int64_t x = 3 * begin;
    for (; x + LANES <= 3 * end; x += LANES) {
        for (int i = 0; i < LANES; ++i) {
            const double size = __builtin_fabs(job.forces[x + i]);
            largest[i] = size > largest[i] ? size : largest[i];
            odd[i] += size - size;
        }
    }
    for (; x < 3 * end; ++x) {
        const double size = __builtin_fabs(job.forces[x]);
        largest[0] = size > largest[0] ? size : largest[0];
        odd[0] += size - size;
    }
    for (int i = 1; i < LANES; ++i) {
        largest[0] = largest[i] > largest[0] ? largest[i] : largest[0];
        odd[0] += odd[i];
    }
    return odd[0] == 0 ? largest[0] : __builtin_inf();
}

}  // namespace

#define NAME_(level) level##_motion
#define NAME(level) NAME_(level)
extern const MotionKernel NAME(SMELT_SIMD);
const MotionKernel NAME(SMELT_SIMD) = {normals, drift, kick, largest_force};
