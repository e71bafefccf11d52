// What is multiplied in a layer? Said once for vectors (dense.h) and for tiles (tiles.h).
//
// Numbers lie as (width, BLOCK): a row per input or output, the atoms of the block in the lanes. Everything has internal
// linkage, as in simd.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace {

constexpr int BLOCK = 64;                             // atoms

// Inputs [begin, end).
struct Run { int begin, end; };
struct Runs {
    const Run* first;
    int n;
    const Run* begin() const { return first; }
    const Run* end() const { return first + n; }
};

// Weights as tiles want them (tiles.h), or null: panels from the first output on, and scales of what is summed over.
struct Packed {
    const char* strips;
    const float* scales;
};

// out[q] = start[q] + sum_i w[q step_out + i step_in] in[i] over n_lanes lanes, added to what is there if `add`.
// One of the steps is 1. runs: the i to sum over, all of them if null.
template <class T> struct Product {
    int n_in;
    const T* w;
    int64_t step_out, step_in;
    const T *in, *start;
    T* out;
    bool add;
    int n_lanes;
    Packed packed;
    char* room;                                       // for tiles
    const Runs* runs = nullptr;
    bool turned = false;                              // squares that tiles make on the way back stay (atoms, outputs)
    bool prepared = false;                            // `room` is as the last product of this kind and `in` left it
};

// out[q] += sum_r left[0][q, r] rows[0][r] + left[1][q, r] rows[1][r] over some inputs, which are in the lanes: `left`
// is (n_out, BLOCK), `rows` (n_rows, row_length), `out` (n_out, row_length).
template <class T> struct Outer {
    int n_rows, row_length;
    const T *left[2], *rows[2];
    T* out;
    char* room;                                       // for tiles
    bool prepared = false;                            // `room` is as the last call with this `left` left it
};

}  // namespace
