// Which shifts of the angular and radial functions are more than 0 beside 1, at a distance or an angle?
//
// Everything has internal linkage, as in simd.h.
#pragma once
#include "aev.h"
#include "simd.h"

namespace {

// Shifts [begin, end).
struct Span { int begin, end; };

// Shifts that are evenly spaced, and how far from its own a Gaussian is more than 0 beside 1. Where they are not, all are
// within reach.
template <class T> struct Ladder {
    T first = 0, per_step = 0, reach = 0;
    int n = 0;

    Ladder() {}
    Ladder(double eta, double log2_e, const double* shifts, int n) : n(n) {
        const double step = n > 1 ? (shifts[n - 1] - shifts[0]) / (n - 1) : 0;
        bool even = step > 0;
        for (int k = 0; k < n; ++k) even &= __builtin_fabs(shifts[0] + k * step - shifts[k]) < 0.01 * step;
        const double far = __builtin_sqrt((sizeof(T) == sizeof(float) ? 27 : 56) / (eta * log2_e)) + 0.01 * step;
        first = T(shifts[0]), per_step = T(even ? 1 / step : 1), reach = T(even ? far : 1e30);
    }
};

// Angles of which a Z is more than 0 beside 1: at most n in a row. They begin with number i where cos(th) is below
// after(i), and not after(i + 1). Not `narrow`, or not evenly spaced: all of them.
struct Window {
    const double *c, *s, near;                        // cosine of how far an angle reaches
    int n, n_starts = 1;

    Window(const AevShape& shape, bool narrow)
        : c(shape.angle_cos), s(shape.angle_sin), near(1 - 2 * shape.reach), n(int(shape.n_angular)) {
        if (!narrow || near <= 0 || !even()) return;
        int within = 1;
        while (within < n && cos_from_first(within) > 2 * near * near - 1) ++within;
        n_starts = n - within + 1, n = within;
    }

    // Of angle i less the first.
    double cos_from_first(int i) const { return c[i] * c[0] + s[i] * s[0]; }
    double sin_from_first(int i) const { return s[i] * c[0] - c[i] * s[0]; }

    // Cosine of where the reach of angle i - 1 ends; -2 if that is beyond pi.
    double after(int i) const {
        const double far = __builtin_sqrt(1 - near * near), sine = s[i - 1] * near + c[i - 1] * far;
        return sine > 0 ? c[i - 1] * near - s[i - 1] * far : -2;
    }

private:
    bool even() const {
        for (int i = 1; i < n; ++i) {
            const double x = cos_from_first(1), y = sin_from_first(1);
            const double off = __builtin_fabs(c[i - 1] * x - s[i - 1] * y - c[i]) +
                               __builtin_fabs(s[i - 1] * x + c[i - 1] * y - s[i]);
            if (y <= 0 || off > 1e-7) return false;
        }
        return true;
    }
};

}  // namespace
