// Convolutions along rows with fewer multiplications (minimal filtering, Winograd; Lavin and Gray, arXiv
// 1509.09308), for three kernels on the same input. The input is transformed once for all rows of taps and all
// three kernels; for a single depthwise kernel, the transforms would cost more than they save.
//
// A tile is kTile output columns. For a row of r taps over n = r + kTile - 1 inputs, n products replace kTile r:
// both are evaluated as polynomials at n points, including infinity. Three taps use the points 0, 1, -1, inf
// for tiles of two columns; five use 0, 1, -1, inf, 2, -2, 1/2, -1/2 for tiles of four. Seven taps at ten points
// would lose a decimal. They are two blocks of four taps (the last is zero) at the points 0, 1, -1, inf, 1/2, -1/2,
// 2, where the second block uses the transformed inputs of the next tile. The number of products is 2/3, 2/5 and
// 1/2 of that of direct sums; the relative error is about 1e-7, 4e-7 and 4e-7, and 1e-7 with direct sums.
//
// The products at the first four points are summed in registers for two tiles and three kernels, then those at
// the others. Products are never written to memory, which would take longer than the multiplications.

#pragma once

#include <type_traits>

#include "lanes.h"

namespace qnas {

constexpr int kPassPoints = 4;                  // points of the first pass; the second has at most as many
constexpr int kAtInfinity = 3;                  // index of the point at infinity

// Rows of the gradients of a, b and c.
template <int V>
using Fields = const Vec<V>* [3];

template <int K>
struct Winograd;

// N(x) is the product of (x - p) over all finite points p. The weights' transform is the powers of `point`
// divided by `slope`, the derivative of N there. input() applies N(x) / (x - p), or N(x) for infinity. first() and
// second() apply the powers 0 to kTile - 1 of the points of their pass. gradient(), which only three taps have, is
// their transpose.

template <>
struct Winograd<3> {
    static constexpr int kInputs = 4, kTile = 2, kPoints = 4, kBlocks = 1, kTaps = 3;
    static constexpr int kTiles = kLanes == 16 ? 4 : 2;  // tiles with sums in registers at the same time
    static constexpr float point[4] = {1, -1, 0, 0};
    static constexpr float slope[4] = {2, 2, -1, 1};

    template <class F>
    static inline void input(const F* d, F* to) {
        to[0] = d[2] + d[1];
        to[1] = d[2] - d[1];
        to[2] = d[2] - d[0];
        to[3] = d[3] - d[1];
    }

    // the part of the points 1 and -1; each other point contributes to one column only
    template <class F>
    static inline void first(F* y) {
        const F s = y[0] + y[1];
        y[1] = y[0] - y[1];
        y[0] = s;
    }

    template <class F>
    static inline void gradient(const F* g, F* to) {
        to[0] = g[0] + g[1];
        to[1] = g[0] - g[1];
        to[2] = g[0];
        to[3] = g[1];
    }
};

template <>
struct Winograd<5> {
    static constexpr int kInputs = 8, kTile = 4, kPoints = 8, kBlocks = 1, kTaps = 5;
    static constexpr int kTiles = kLanes == 16 ? 2 : 1;
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
    static constexpr int kTiles = kLanes == 16 ? 2 : 1;
    static constexpr float point[7] = {0, 1, -1, 0, 0.5f, -0.5f, 2};
    static constexpr float slope[7] = {-0.5f, -1.5f, -4.5f, 1.0f, 0.5625f, 0.9375f, 22.5f};

    template <class F>
    static inline void input(const F* d, F* to) {
        F e[6];  // the factor x - 2
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
        Winograd<5>::first(m, y);  // has the same first points
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

// Number of factors (vectors) for one row of taps: one for each point, block and kernel.
template <int K>
constexpr int kFactors = Winograd<K>::kPoints * Winograd<K>::kBlocks * 3;

// Transforms a row of K taps of three kernels, `area` apart, into the factors of the products.
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

// Products of T tiles with the first F kernels at P points starting with `First`: sums[f][t][p] += sum over rows i
// and blocks k of rows[i] at tile t + k times the factor of kernel f. The first tile is at `from` in each row.
template <int V, int K, int First, int P, int F, int T>
inline void multiply_points(const Vec<V>* const* rows, const Vec<V>* const* factors, int count, int from,
                            Vec<V> (&sums)[F][T][P]) {
    using W = Winograd<K>;
    for (int i = 0; i < count; ++i) {
        const Vec<V>* row = rows[i] + from + First;
        const Vec<V>* factor = factors[i] + First * W::kBlocks * 3;
        UNROLL for (int p = 0; p < P; ++p) {
            Vec<V> v[T + W::kBlocks - 1];
            UNROLL for (int t = 0; t < T + W::kBlocks - 1; ++t) v[t] = in_register(row[t * W::kPoints + p]);
            UNROLL for (int k = 0; k < W::kBlocks; ++k) {
                UNROLL for (int f = 0; f < F; ++f) {
                    const Vec<V> by = in_register(factor[(p * W::kBlocks + k) * 3 + f]);
                    UNROLL for (int t = 0; t < T; ++t) sums[f][t][p] += v[t + k] * by;
                }
            }
        }
    }
}

// T tiles of the first F convolutions with K taps across: y[f][t][column], which must be zero before.
template <int V, int K, int F, int T>
inline void convolve_tiled(const Vec<V>* const* rows, const Vec<V>* const* factors, int count, int from,
                           Vec<V> (&y)[F][T][Winograd<K>::kTile]) {
    using W = Winograd<K>;
    if constexpr (K == 3) {
        // two points at a time: twice as many tiles then fit in registers and share each loaded factor
        multiply_points<V, K, 0, 2, F, T>(rows, factors, count, from, y);
        UNROLL for (int f = 0; f < F; ++f)
            UNROLL for (int t = 0; t < T; ++t) W::first(y[f][t]);
        multiply_points<V, K, 2, 2, F, T>(rows, factors, count, from, y);
    } else {
        Vec<V> sums[F][T][kPassPoints] = {};
        multiply_points<V, K, 0, kPassPoints, F, T>(rows, factors, count, from, sums);
        UNROLL for (int f = 0; f < F; ++f)
            UNROLL for (int t = 0; t < T; ++t) W::first(sums[f][t], y[f][t]);
        Vec<V> others[F][T][W::kPoints - kPassPoints] = {};
        multiply_points<V, K, kPassPoints, W::kPoints - kPassPoints, F, T>(rows, factors, count, from, others);
        UNROLL for (int f = 0; f < F; ++f)
            UNROLL for (int t = 0; t < T; ++t) W::second(others[f][t], y[f][t]);
    }
}

// Calls run(T, tile), T a constant and at most Most, for groups of T tiles that cover a row. The last group may
// overlap the one before it.
template <int Most, class Run>
inline void for_tiles(int tiles, Run&& run) {
    if constexpr (Most > 1) {
        if (tiles < Most) return for_tiles<Most / 2>(tiles, run);
    }
    for (int tile = 0;; tile = tile + Most < tiles - Most ? tile + Most : tiles - Most) {
        run(std::integral_constant<int, Most>(), tile);
        if (tile + Most >= tiles) return;
    }
}

// Weight gradients of R rows of taps at the points: to[r][f][p] += sum over rows i and tiles of the transformed
// rows[i + r] of x times the transformed gradients fields[i][f], which are zero beyond the map's end.
template <int V, int K, int R>
void correlate_tiled(const Vec<V>* const* rows, const Fields<V>* fields, int count, int tiles,
                     Vec<V> (*to)[3][Winograd<K>::kPoints]) {
    using W = Winograd<K>;
    constexpr int P = W::kPoints, F = kFields;
    for (int first = 0; first < 3; first += F) {
        Vec<V> sums[R][F][P];
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int f = 0; f < F; ++f)
                UNROLL for (int p = 0; p < P; ++p) sums[r][f][p] = to[r][first + f][p];
        for (int i = 0; i < count; ++i) {
            const Vec<V>*x[R], *of[F];
            UNROLL for (int r = 0; r < R; ++r) x[r] = rows[i + r];
            UNROLL for (int f = 0; f < F; ++f) of[f] = fields[i][first + f];
            for (int t = 0; t < tiles; ++t) {
                Vec<V> g[F][P];
                UNROLL for (int f = 0; f < F; ++f) W::gradient(of[f] + t * W::kTile, g[f]);
                UNROLL for (int p = P - 1; p >= 0; --p) {
                    UNROLL for (int r = 0; r < R; ++r) {
                        const Vec<V> v = in_register(x[r][t * P + p]);
                        UNROLL for (int f = 0; f < F; ++f) sums[r][f][p] += v * g[f][p];
                    }
                }
            }
        }
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int f = 0; f < F; ++f)
                UNROLL for (int p = 0; p < P; ++p) to[r][first + f][p] = sums[r][f][p];
    }
}

// Adds to one row of K taps its gradient from the sums at the points: the transpose of transform_weights.
template <int V, int K>
void transform_gradient(const Vec<V> (&from)[Winograd<K>::kPoints], Vec<V>* to) {
    using W = Winograd<K>;
    for (int p = 0; p < W::kPoints; ++p) {
        if (p == kAtInfinity) {
            to[K - 1] += from[p];
            continue;
        }
        Vec<V> value = from[p] / W::slope[p];
        for (int n = 0; n < K; ++n, value = value * W::point[p]) to[n] += value;
    }
}

}  // namespace qnas
