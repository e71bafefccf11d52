// What is a vector of numbers on this processor, and what are its square root, exp2, log2 and cutoff function?
//
// Written with the vector extensions of GCC and Clang, so that the same source serves AVX-512, AVX2, SSE2 and NEON: the
// flags with which a file is compiled choose the width. Polynomials are Chebyshev interpolants made for this file; the
// stated errors are relative and exclude rounding. Everything has internal linkage: objects compiled for different
// processors must not share code.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

#ifndef __has_builtin
#define __has_builtin(x) 0
#endif
#define INLINE inline __attribute__((always_inline))

template <class T> struct Constants;

template <> struct Constants<float> {
    using Int = int32_t;
    static constexpr int MANTISSA_BITS = 23;
    static constexpr Int SQRT_HALF = 0x3f3504f3;           // bits of sqrt(1/2)
    static constexpr float ROUND = 12582912.0f;             // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float LOWEST_EXPONENT = -126.0f, TINY = 1e-30f;
    static constexpr bool LOG_BY_DIVISION = false;
    static constexpr float EXP2[] = {1.0f, 0.693146978f, 0.240222421f, 0.0555073374f, 0.00967151264f,
                                     0.00132647291f};  // 9e-8 on |x| <= 1/2
    static constexpr float LOG2[] = {1.44269496f, -0.721352788f, 0.480923242f, -0.360239641f, 0.287098701f,
                                     -0.248876853f, 0.234042363f, -0.14581172f};  // log2(1+x)/x, 2e-7
    static constexpr float SINPI[] = {3.14159264f, -5.16771008f, 2.55007739f, -0.598290411f, 0.0776559123f};  // 7e-9
    static constexpr float COSPI[] = {1.0f, -4.93480214f, 4.05870915f, -1.33521195f, 0.234937069f, -0.0243959321f};
};

template <> struct Constants<double> {
    using Int = int64_t;
    static constexpr int MANTISSA_BITS = 52;
    static constexpr Int SQRT_HALF = 0x3fe6a09e667f3bcd;
    static constexpr double ROUND = 6755399441055744.0;     // 1.5 * 2^52
    static constexpr double LOWEST_EXPONENT = -1022.0, TINY = 1e-200;
    static constexpr bool LOG_BY_DIVISION = true;
    static constexpr double EXP2[] = {1.0, 0.693147180559945309, 0.240226506959100982, 0.0555041086648215943,
                                      0.00961812910760688853, 0.00133335581464169353, 0.000154035304417360502,
                                      1.52527338298361184e-5, 1.32154425879216897e-6, 1.01780624458457735e-7,
                                      7.0725859492692237e-9, 4.45496059818651839e-10};  // 8e-18 on |x| <= 1/2
    // log2((1+s)/(1-s))/s in s^2, 1e-18 for (1+s)/(1-s) in [sqrt(1/2), sqrt(2)]
    static constexpr double LOG2[] = {2.88539008177792681, 0.961796693925989729, 0.577078016345520229,
                                      0.412198585840900534, 0.320598534913959861, 0.262334352504183019,
                                      0.220913084231176796, 0.213658956943192694};
    static constexpr double SINPI[] = {3.14159265358979324, -5.16771278004996961, 2.55016403987730047,
                                       -0.599264529318944681, 0.082145886573102895, -0.0073704305059169434,
                                       4.6629981618983938e-4, -2.19034970746260172e-5, 7.69782676822419065e-7};
    static constexpr double COSPI[] = {1.0, -4.93480220054467677, 4.058712126416497, -1.33526276884344709,
                                       0.235330630129532854, -0.0258068887370022033, 0.00192955627248171315,
                                       -1.04566553387487382e-4, 4.14956435394258551e-6};
};

template <class T> struct Simd {
    using C = Constants<T>;
    using Int = typename C::Int;
    static constexpr int W = BYTES / sizeof(T);
    typedef T V __attribute__((vector_size(BYTES)));
    typedef Int I __attribute__((vector_size(BYTES)));
#if defined(__AVX512F__)
    typedef __mmask16 Mask;
#else
    typedef I Mask;
#endif
    typedef T Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));

    static INLINE V all(T value) { return V{} + value; }
    static INLINE V load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
    static INLINE void store(T* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

    static INLINE V max(V a, T bound);                // what is not a number stays so
    static INLINE V sqrt(V x);

    // The vector in a register, where a compiler would rather load it anew for each use.
    static INLINE V held(V v) {
#if defined(__SSE2__)
        asm("" : "+v"(v));
#endif
        return v;
    }

    // Lanes [first, last), and the vector at p with zero in all others.
    static INLINE Mask lanes(int first, int last);
    static INLINE V load_masked(const T* p, Mask mask);

    // The N numbers at p, over and over.
    template <int N> static INLINE V repeat(const T* p) {
        constexpr int SIZE = N * sizeof(T);
        if constexpr (SIZE == sizeof(int64_t)) {
            typedef int64_t Each __attribute__((vector_size(BYTES)));
            int64_t number;
            memcpy(&number, p, SIZE);
            return reinterpret_cast<V>(Each{} + number);
#if defined(__AVX512F__)
        } else if constexpr (SIZE == 16) {
            return (V)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(reinterpret_cast<const float*>(p)));
        } else if constexpr (SIZE == 32) {
            return (V)_mm512_maskz_broadcast_f64x4(0xff, _mm256_loadu_pd(reinterpret_cast<const double*>(p)));
#elif defined(__AVX2__)
        } else if constexpr (SIZE == 16) {
            return (V)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
        } else if constexpr (N == 1) {
            return V{} + *p;
        } else {
            V out;
            for (int i = 0; i < W; ++i) out[i] = p[i % N];
            return out;
        }
    }

    template <int N> static INLINE V polynomial(V x, const T (&c)[N]) {
        V p = all(c[N - 1]);
        for (int i = N - 2; i >= 0; --i) p = p * x + c[i];
        return p;
    }

    static INLINE V round(V x);
    static INLINE V scale(V x, V exponent);

    // 2^x; below the normal range 0 or the smallest normal number.
    static INLINE V exp2(V x) {
        V each[1] = {x};
        exp2(each);
        return each[0];
    }
    // Side by side: each alone would wait for its own products.
    template <int N> static INLINE void exp2(V (&x)[N]) {
        constexpr int LAST = sizeof(C::EXP2) / sizeof(T) - 1;
        V whole[N], p[N];
        for (int i = 0; i < N; ++i) {
#if defined(__AVX512F__)
            whole[i] = round(x[i]), x[i] -= whole[i];
#else
            x[i] = max(x[i], C::LOWEST_EXPONENT), whole[i] = x[i] + C::ROUND, x[i] -= whole[i] - C::ROUND;
#endif
            p[i] = all(C::EXP2[LAST]);
        }
        for (int k = LAST - 1; k >= 0; --k)
            for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + C::EXP2[k];
        for (int i = 0; i < N; ++i) {
#if defined(__AVX512F__)
            x[i] = scale(p[i], whole[i]);
#else
            x[i] = reinterpret_cast<V>(reinterpret_cast<I>(p[i]) + (reinterpret_cast<I>(whole[i]) << C::MANTISSA_BITS));
#endif
        }
    }

    // log2(x) of a normal, positive x.
    static INLINE V log2(V x) {
        I bits = reinterpret_cast<I>(x);
        I exponent = (bits - C::SQRT_HALF) >> C::MANTISSA_BITS;
        V t = reinterpret_cast<V>(bits - (exponent << C::MANTISSA_BITS)) - T(1);
        V whole = __builtin_convertvector(exponent, V);
        if (C::LOG_BY_DIVISION) {
            V s = t / (t + T(2));
            return whole + s * polynomial(s * s, C::LOG2);
        }
        return whole + t * polynomial(t, C::LOG2);
    }

    // sin(pi x) and cos(pi x) for 0 <= x <= 1/2.
    static INLINE void sincospi(V x, V& sine, V& cosine) {
        V square = x * x;
        sine = x * polynomial(square, C::SINPI);
        cosine = polynomial(square, C::COSPI);
    }

    static INLINE T sum(V v) {
        T total = 0;
        for (int i = 0; i < W; ++i) total += v[i];
        return total;
    }

    static INLINE T greatest(V v) { return -least(-v); }

#if __has_builtin(__builtin_shufflevector)
    // Lane i of v[k] becomes lane k of v[i].
    static INLINE void transpose(V (&v)[W]) { transpose_from<1>(v); }

    // Lane i of v[0], that of v[1], and so on, then lane i + 1 of all of them.
    template <int N> static INLINE void zip(V (&v)[N]) {
        for (int done = 1; done < N; done *= 2) {
            V next[N];
            for (int i = 0; i < N; ++i) next[i] = v[i % 2 * (N / 2) + i / 2];
            for (int i = 0; i < N; i += 2) zip(next[i], next[i + 1], std::make_integer_sequence<int, W>{});
            for (int i = 0; i < N; ++i) v[i] = next[i];
        }
    }

    // Lane i becomes the sum of lanes N i to N i + N - 1.
    template <int N> static INLINE V sums_of(V v) { return sums_of<N>(v, std::make_integer_sequence<int, W>{}); }

    // Of all lanes.
    static INLINE T least(V v) { return least_from<W / 2>(v, std::make_integer_sequence<int, W>{}); }

    // out[q] = sum of the lanes of v[q].
    static INLINE void sum4(const V (&v)[4], T* out) { sum4(v, out, std::make_integer_sequence<int, W>{}); }

private:
    // Exchange the lanes of `a` that have bit D with those of `b` that have not.
    template <int D, int... I> static INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
        const V first = __builtin_shufflevector(a, b, (I & D ? W + I - D : I)...);
        b = __builtin_shufflevector(a, b, (I & D ? W + I : I + D)...), a = first;
    }
    template <int D> static INLINE void transpose_from(V (&v)[W]) {
        if constexpr (D < W) {
            for (int i = 0; i < W; ++i)
                if (!(i & D)) exchange<D>(v[i], v[i | D], std::make_integer_sequence<int, W>{});
            transpose_from<2 * D>(v);
        }
    }
    template <int... I> static INLINE void zip(V& a, V& b, std::integer_sequence<int, I...>) {
        const V low = __builtin_shufflevector(a, b, (I % 2 ? W + I / 2 : I / 2)...);
        b = __builtin_shufflevector(a, b, ((I % 2 ? W : 0) + W / 2 + I / 2)...), a = low;
    }
    template <int N, int... I> static INLINE V sums_of(V v, std::integer_sequence<int, I...>) {
        if constexpr (N > 1) v += __builtin_shufflevector(v, v, (I ^ 1)...);
        if constexpr (N > 2) v += __builtin_shufflevector(v, v, (I ^ 2)...);
        if constexpr (N > 4) v += __builtin_shufflevector(v, v, (I ^ 4)...);
        return __builtin_shufflevector(v, v, (I * N % W)...);
    }
    template <int D, int... I> static INLINE T least_from(V v, std::integer_sequence<int, I...> lanes) {
        const V other = __builtin_shufflevector(v, v, (I ^ D)...);
        v = other < v ? other : v;
        if constexpr (D > 1) return least_from<D / 2>(v, lanes);
        else return v[0];
    }
    template <int... I> static INLINE void sum4(const V (&v)[4], T* out, std::integer_sequence<int, I...>) {
        V pair[2];
        for (int q = 0; q < 2; ++q) {
            V a = v[2 * q], b = v[2 * q + 1];
            pair[q] = __builtin_shufflevector(a, b, (I % 2 ? W + I - 1 : I)...) +
                      __builtin_shufflevector(a, b, (I % 2 ? W + I : I + 1)...);
        }
        if constexpr (W == 2) {
            for (int q = 0; q < 4; ++q) out[q] = pair[q / 2][q % 2];
        } else {
            V all = __builtin_shufflevector(pair[0], pair[1], (I % 4 < 2 ? I : W + I - 2)...) +
                    __builtin_shufflevector(pair[0], pair[1], (I % 4 < 2 ? I + 2 : W + I)...);
            if constexpr (W > 4) all += __builtin_shufflevector(all, all, (I ^ 4)...);
            if constexpr (W > 8) all += __builtin_shufflevector(all, all, (I ^ 8)...);
            for (int q = 0; q < 4; ++q) out[q] = all[q];
        }
    }
#else
    static INLINE void transpose(V (&v)[W]) {
        V rows[W];
        for (int i = 0; i < W; ++i)
            for (int k = 0; k < W; ++k) rows[i][k] = v[k][i];
        for (int i = 0; i < W; ++i) v[i] = rows[i];
    }
    template <int N> static INLINE void zip(V (&v)[N]) {
        V out[N];
        for (int i = 0; i < N * W; ++i) out[i / W][i % W] = v[i % N][i / N];
        for (int i = 0; i < N; ++i) v[i] = out[i];
    }
    template <int N> static INLINE V sums_of(V v) {
        V out{};
        for (int i = 0; i < W; ++i) out[i / N] += v[i];
        return out;
    }
    static INLINE T least(V v) {
        T found = v[0];
        for (int i = 1; i < W; ++i) found = v[i] < found ? v[i] : found;
        return found;
    }
    static INLINE void sum4(const V (&v)[4], T* out) {
        for (int q = 0; q < 4; ++q) out[q] = sum(v[q]);
    }
#endif
};

#if defined(__AVX512F__)

// The unmasked forms of these make GCC 12 warn about its own header.
constexpr __mmask16 ALL16 = 0xffff;
constexpr __mmask8 ALL8 = 0xff;
template <> INLINE Simd<float>::V Simd<float>::max(V a, float b) {
    return (V)_mm512_maskz_max_ps(ALL16, (__m512)all(b), (__m512)a);
}
template <> INLINE Simd<double>::V Simd<double>::max(V a, double b) {
    return (V)_mm512_maskz_max_pd(ALL8, (__m512d)all(b), (__m512d)a);
}
template <> INLINE Simd<float>::V Simd<float>::sqrt(V x) { return (V)_mm512_maskz_sqrt_ps(ALL16, (__m512)x); }
template <> INLINE Simd<double>::V Simd<double>::sqrt(V x) { return (V)_mm512_maskz_sqrt_pd(ALL8, (__m512d)x); }
template <> INLINE Simd<float>::V Simd<float>::round(V x) { return (V)_mm512_maskz_roundscale_ps(ALL16, (__m512)x, 0); }
template <> INLINE Simd<double>::V Simd<double>::round(V x) {
    return (V)_mm512_maskz_roundscale_pd(ALL8, (__m512d)x, 0);
}
template <> INLINE Simd<float>::V Simd<float>::scale(V x, V e) {
    return (V)_mm512_maskz_scalef_ps(ALL16, (__m512)x, (__m512)e);
}
template <> INLINE Simd<double>::V Simd<double>::scale(V x, V e) {
    return (V)_mm512_maskz_scalef_pd(ALL8, (__m512d)x, (__m512d)e);
}
template <class T> INLINE __mmask16 Simd<T>::lanes(int first, int last) {
    return __mmask16((last < 16 ? (1u << last) - 1 : 0xffffu) & (first > 0 ? 0xffffu << first : 0xffffu));
}
template <> INLINE Simd<float>::V Simd<float>::load_masked(const float* p, __mmask16 mask) {
    return (V)_mm512_maskz_loadu_ps(mask, p);
}
template <> INLINE Simd<double>::V Simd<double>::load_masked(const double* p, __mmask16 mask) {
    return (V)_mm512_maskz_loadu_pd(__mmask8(mask), p);
}

#else

template <class T> INLINE typename Simd<T>::Mask Simd<T>::lanes(int first, int last) {
    I lane{};
    for (int i = 0; i < W; ++i) lane[i] = i;
    return (lane >= Int(first)) & (lane < Int(last));
}
template <class T> INLINE typename Simd<T>::V Simd<T>::load_masked(const T* p, Mask mask) {
    return reinterpret_cast<V>(reinterpret_cast<I>(load(p)) & mask);
}

#if defined(__AVX2__)
template <> INLINE Simd<float>::V Simd<float>::max(V a, float b) { return (V)_mm256_max_ps((__m256)all(b), (__m256)a); }
template <> INLINE Simd<double>::V Simd<double>::max(V a, double b) {
    return (V)_mm256_max_pd((__m256d)all(b), (__m256d)a);
}
template <> INLINE Simd<float>::V Simd<float>::sqrt(V x) { return (V)_mm256_sqrt_ps((__m256)x); }
template <> INLINE Simd<double>::V Simd<double>::sqrt(V x) { return (V)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__SSE2__)
template <> INLINE Simd<float>::V Simd<float>::max(V a, float b) { return (V)_mm_max_ps((__m128)all(b), (__m128)a); }
template <> INLINE Simd<double>::V Simd<double>::max(V a, double b) {
    return (V)_mm_max_pd((__m128d)all(b), (__m128d)a);
}
template <> INLINE Simd<float>::V Simd<float>::sqrt(V x) { return (V)_mm_sqrt_ps((__m128)x); }
template <> INLINE Simd<double>::V Simd<double>::sqrt(V x) { return (V)_mm_sqrt_pd((__m128d)x); }
#else
template <class T> INLINE typename Simd<T>::V Simd<T>::max(V a, T bound) { return a < bound ? all(bound) : a; }
template <class T> INLINE typename Simd<T>::V Simd<T>::sqrt(V x) {
    for (int i = 0; i < W; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
}
#endif
#endif

}  // namespace
