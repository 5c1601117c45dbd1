// Convolutions along rows with fewer multiplications (minimal filtering, Winograd; Lavin and Gray, arXiv
// 1509.09308), for three kernels of one input at once: the input is transformed once for all rows of taps
// and all three kernels, which makes transforms cheap that would not pay for one depthwise kernel.
//
// kTile output columns are a tile. A row of r taps over n = r + kTile - 1 inputs is n products instead of
// kTile r: both are evaluated as polynomials at n points, infinity being one. Three taps take the points 0, 1,
// -1, inf for tiles of two columns; five take 0, 1, -1, inf, 2, -2, 1/2, -1/2 for four. Seven at ten points would
// lose a decimal, so they are two blocks of four taps (the last is zero) at the points 0, 1, -1, inf, 1/2, -1/2,
// 2: the second block meets the next tile's inputs, which are transformed anyway. Products are 2/3, 2/5 and 1/2
// of the direct ones; the error is some 1e-7, 4e-7 and 4e-7 of the result, where direct sums have 1e-7.
//
// The first four points, which all have, are summed in registers for two tiles and three kernels, then the
// others: the products themselves are never in memory, whose writes take longer than the multiplications.

#pragma once

#include <type_traits>

#include "lanes.h"

namespace qnas {

constexpr int kPassPoints = 4;                  // of a pass; the points of the second are fewer
constexpr int kPair = kLanes == 16 ? 2 : 1;     // tiles whose sums are in registers at once
constexpr int kAtInfinity = 3;                  // its place among the points

template <int K>
struct Winograd;

// Below, with N(x) the product of (x - p) over all finite points p, in the order named above: the weights'
// transform is the powers of `point` over `slope`, N's derivative there; input() applies N(x) / (x - p),
// at infinity N(x); first() and second() the powers 0 to kTile - 1 of the points of their pass.

template <>
struct Winograd<3> {
    static constexpr int kInputs = 4, kTile = 2, kPoints = 4, kBlocks = 1, kTaps = 3;
    static constexpr float point[4] = {0, 1, -1, 0};
    static constexpr float slope[4] = {-1, 2, 2, 1};

    template <class F>
    static inline void input(const F* d, F* to) {
        to[0] = d[2] - d[0];
        to[1] = d[2] + d[1];
        to[2] = d[2] - d[1];
        to[3] = d[3] - d[1];
    }

    template <class F>
    static inline void first(const F* m, F* y) {
        y[0] = m[0] + (m[1] + m[2]);
        y[1] = (m[1] - m[2]) + m[3];
    }

    template <class F>
    static inline void second(const F*, F*) {}
};

template <>
struct Winograd<5> {
    static constexpr int kInputs = 8, kTile = 4, kPoints = 8, kBlocks = 1, kTaps = 5;
    static constexpr float point[8] = {0, 1, -1, 0, 2, -2, 0.5f, -0.5f};
    static constexpr float slope[8] = {-1.0f, -4.5f, -4.5f, 1.0f, 90.0f, 90.0f, 1.40625f, 1.40625f};

    // d[0] to d[7] -> to[point]
    template <class F>
    static inline void input(const F* d, F* to) {
        to[0] = (d[6] - d[0]) + 5.25f * (d[2] - d[4]);
        to[3] = (d[7] - d[1]) + 5.25f * (d[3] - d[5]);
        F odd = d[5] - 4.25f * d[3] + d[1], even = d[6] - 4.25f * d[4] + d[2];
        to[1] = even + odd;
        to[2] = even - odd;
        odd = d[5] - 1.25f * d[3] + 0.25f * d[1], even = d[6] - 1.25f * d[4] + 0.25f * d[2];
        to[4] = even + 2.0f * odd;
        to[5] = even - 2.0f * odd;
        odd = d[5] - 5.0f * d[3] + 4.0f * d[1], even = d[6] - 5.0f * d[4] + 4.0f * d[2];
        to[6] = even + 0.5f * odd;
        to[7] = even - 0.5f * odd;
    }

    template <class F>
    static inline void first(const F* m, F* y) {
        const F s = m[1] + m[2], d = m[1] - m[2];
        y[0] = m[0] + s;
        y[1] = d;
        y[2] = s;
        y[3] = d + m[3];
    }

    template <class F>
    static inline void second(const F* m, F* y) {
        const F s2 = m[0] + m[1], d2 = m[0] - m[1], s3 = m[2] + m[3], d3 = m[2] - m[3];
        y[0] += s2 + s3;
        y[1] += 2.0f * d2 + 0.5f * d3;
        y[2] += 4.0f * s2 + 0.25f * s3;
        y[3] += 8.0f * d2 + 0.125f * d3;
    }
};

template <>
struct Winograd<7> {
    static constexpr int kInputs = 7, kTile = 4, kPoints = 7, kBlocks = 2, kTaps = 4;
    static constexpr float point[7] = {0, 1, -1, 0, 0.5f, -0.5f, 2};
    static constexpr float slope[7] = {-0.5f, -1.5f, -4.5f, 1.0f, 0.5625f, 0.9375f, 22.5f};

    template <class F>
    static inline void input(const F* d, F* to) {
        F e[6];  // by x - 2
        for (int i = 0; i < 6; ++i) e[i] = d[i + 1] - 2.0f * d[i];
        to[0] = e[4] - 1.25f * e[2] + 0.25f * e[0];
        to[3] = e[5] - 1.25f * e[3] + 0.25f * e[1];
        F odd = e[3] - 0.25f * e[1], even = e[4] - 0.25f * e[2];
        to[1] = even + odd;
        to[2] = even - odd;
        odd = e[3] - e[1], even = e[4] - e[2];
        to[4] = even + 0.5f * odd;
        to[5] = even - 0.5f * odd;
        to[6] = d[5] - 1.25f * d[3] + 0.25f * d[1];
    }

    template <class F>
    static inline void first(const F* m, F* y) {
        Winograd<5>::first(m, y);  // the same points
    }

    template <class F>
    static inline void second(const F* m, F* y) {
        const F s = m[0] + m[1], d = m[0] - m[1];
        y[0] += s + m[2];
        y[1] += 0.5f * d + 2.0f * m[2];
        y[2] += 0.25f * s + 4.0f * m[2];
        y[3] += 0.125f * d + 8.0f * m[2];
    }
};

// Vectors of one row of taps of three kernels: for each point and block, one of each kernel.
template <int K>
constexpr int kFactors = Winograd<K>::kPoints * Winograd<K>::kBlocks * 3;

// A row of K taps of each of three kernels, `area` apart, to the products' factors.
template <int V, int K>
void transform_weights(const Vec<V>* weights, int area, Vec<V>* to) {
    using W = Winograd<K>;
    for (int p = 0; p < W::kPoints; ++p) {
        for (int block = 0; block < W::kBlocks; ++block) {
            const int first = block * W::kTaps, end = K - first < W::kTaps ? K - first : W::kTaps;
            for (int f = 0; f < 3; ++f) {
                const Vec<V>* row = weights + f * area + first;
                Vec<V> value{};
                if (p == kAtInfinity) {
                    if (end == W::kTaps) value = row[end - 1];
                } else {
                    for (int i = end - 1; i >= 0; --i) value = value * W::point[p] + row[i];  // Horner
                    value = value / W::slope[p];
                }
                to[(p * W::kBlocks + block) * 3 + f] = value;
            }
        }
    }
}

// The products of T tiles with three kernels at P points from `First` on: sums[f][t][p] = sum over rows i and
// blocks k of rows[i] at tile t + k times the factor of f. `rows` point to what the first tile meets.
template <int V, int K, int First, int P, int T>
inline void multiply_points(const Vec<V>* const* rows, const Vec<V>* const* factors, int count, int from,
                            Vec<V> (&sums)[3][T][P]) {
    using W = Winograd<K>;
#pragma GCC unroll 3
    for (int f = 0; f < 3; ++f)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) sums[f][t][p] = Vec<V>{};
    for (int i = 0; i < count; ++i) {
        const Vec<V>* row = rows[i] + from + First;
        const Vec<V>* factor = factors[i] + First * W::kBlocks * 3;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            Vec<V> v[T + W::kBlocks - 1];
#pragma GCC unroll 3
            for (int t = 0; t < T + W::kBlocks - 1; ++t) v[t] = in_register(row[t * W::kPoints + p]);
#pragma GCC unroll 2
            for (int k = 0; k < W::kBlocks; ++k) {
#pragma GCC unroll 3
                for (int f = 0; f < 3; ++f) {
                    const Vec<V> by = in_register(factor[(p * W::kBlocks + k) * 3 + f]);
#pragma GCC unroll 2
                    for (int t = 0; t < T; ++t) sums[f][t][p] += v[t + k] * by;
                }
            }
        }
    }
}

// T tiles of three convolutions by K taps across: y[f][t][column].
template <int V, int K, int T>
inline void convolve_tiled(const Vec<V>* const* rows, const Vec<V>* const* factors, int count, int from,
                           Vec<V> (&y)[3][T][Winograd<K>::kTile]) {
    using W = Winograd<K>;
    Vec<V> sums[3][T][kPassPoints];
    multiply_points<V, K, 0, kPassPoints, T>(rows, factors, count, from, sums);
#pragma GCC unroll 3
    for (int f = 0; f < 3; ++f)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) W::first(sums[f][t], y[f][t]);
    if constexpr (W::kPoints > kPassPoints) {
        Vec<V> others[3][T][W::kPoints - kPassPoints];
        multiply_points<V, K, kPassPoints, W::kPoints - kPassPoints, T>(rows, factors, count, from, others);
#pragma GCC unroll 3
        for (int f = 0; f < 3; ++f)
#pragma GCC unroll 2
            for (int t = 0; t < T; ++t) W::second(others[f][t], y[f][t]);
    }
}

}  // namespace qnas
