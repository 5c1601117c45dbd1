// Convolutions along rows with fewer multiplications (minimal filtering, Winograd; Lavin and Gray, arXiv
// 1509.09308), for three kernels of one input at once: the input is transformed once for all rows of taps
// and all three kernels, which makes transforms cheap that would not pay for one depthwise kernel.
//
// Four output columns are a tile. A row of r taps over n = r + 3 inputs is n products instead of 4 r: both
// are evaluated as polynomials at n points, infinity being one. Five taps take the points 0, 1, -1, 2, -2,
// 1/2, -1/2, inf. Seven at ten points would lose a decimal, so they are two blocks of four taps (the last
// is zero) at the points 0, 1, -1, 1/2, -1/2, 2, inf: the second block meets the next tile's inputs, which
// are transformed anyway. Products are 2/5 and 1/2 of the direct ones; the error is some 4e-7 of the
// result, where direct sums have 1e-7.

#pragma once

#include "lanes.h"

namespace qnas {

constexpr int kTile = 4;                      // output columns
constexpr int kChunk = kLanes == 16 ? 8 : 4;  // tiles whose sums are in registers at once

template <int K>
struct Winograd;

// Below, with N(x) the product of (x - p) over all finite points p, in the order named above: the weights'
// transform is the powers of `point` over `slope`, N's derivative there; input() applies N(x) / (x - p),
// at infinity N(x); output() the powers 0 to 3 of the points.

template <>
struct Winograd<5> {
    static constexpr int kPoints = 8, kBlocks = 1, kTaps = 5;
    static constexpr float point[7] = {0, 1, -1, 2, -2, 0.5f, -0.5f};
    static constexpr float slope[7] = {-1.0f, -4.5f, -4.5f, 90.0f, 90.0f, 1.40625f, 1.40625f};

    // d[0] to d[7] -> to[point * pitch]
    template <class F>
    static inline void input(const F* d, F* to, int pitch) {
        to[0] = (d[6] - d[0]) + 5.25f * (d[2] - d[4]);
        to[7 * pitch] = (d[7] - d[1]) + 5.25f * (d[3] - d[5]);
        F odd = d[5] - 4.25f * d[3] + d[1], even = d[6] - 4.25f * d[4] + d[2];
        to[1 * pitch] = even + odd;
        to[2 * pitch] = even - odd;
        odd = d[5] - 1.25f * d[3] + 0.25f * d[1], even = d[6] - 1.25f * d[4] + 0.25f * d[2];
        to[3 * pitch] = even + 2.0f * odd;
        to[4 * pitch] = even - 2.0f * odd;
        odd = d[5] - 5.0f * d[3] + 4.0f * d[1], even = d[6] - 5.0f * d[4] + 4.0f * d[2];
        to[5 * pitch] = even + 0.5f * odd;
        to[6 * pitch] = even - 0.5f * odd;
    }

    template <class F>
    static inline void output(const F* m, int pitch, F* y) {
        const F s1 = m[1 * pitch] + m[2 * pitch], d1 = m[1 * pitch] - m[2 * pitch];
        const F s2 = m[3 * pitch] + m[4 * pitch], d2 = m[3 * pitch] - m[4 * pitch];
        const F s3 = m[5 * pitch] + m[6 * pitch], d3 = m[5 * pitch] - m[6 * pitch];
        y[0] = (m[0] + s1) + (s2 + s3);
        y[1] = d1 + 2.0f * d2 + 0.5f * d3;
        y[2] = s1 + 4.0f * s2 + 0.25f * s3;
        y[3] = d1 + 8.0f * d2 + 0.125f * d3 + m[7 * pitch];
    }
};

template <>
struct Winograd<7> {
    static constexpr int kPoints = 7, kBlocks = 2, kTaps = 4;
    static constexpr float point[6] = {0, 1, -1, 0.5f, -0.5f, 2};
    static constexpr float slope[6] = {-0.5f, -1.5f, -4.5f, 0.5625f, 0.9375f, 22.5f};

    template <class F>
    static inline void input(const F* d, F* to, int pitch) {
        F e[6];  // by x - 2
        for (int i = 0; i < 6; ++i) e[i] = d[i + 1] - 2.0f * d[i];
        to[0] = e[4] - 1.25f * e[2] + 0.25f * e[0];
        to[6 * pitch] = e[5] - 1.25f * e[3] + 0.25f * e[1];
        F odd = e[3] - 0.25f * e[1], even = e[4] - 0.25f * e[2];
        to[1 * pitch] = even + odd;
        to[2 * pitch] = even - odd;
        odd = e[3] - e[1], even = e[4] - e[2];
        to[3 * pitch] = even + 0.5f * odd;
        to[4 * pitch] = even - 0.5f * odd;
        to[5 * pitch] = d[5] - 1.25f * d[3] + 0.25f * d[1];
    }

    template <class F>
    static inline void output(const F* m, int pitch, F* y) {
        const F s1 = m[1 * pitch] + m[2 * pitch], d1 = m[1 * pitch] - m[2 * pitch];
        const F s2 = m[3 * pitch] + m[4 * pitch], d2 = m[3 * pitch] - m[4 * pitch];
        const F m3 = m[5 * pitch];
        y[0] = (m[0] + s1) + (s2 + m3);
        y[1] = d1 + 0.5f * d2 + 2.0f * m3;
        y[2] = s1 + 0.25f * s2 + 4.0f * m3;
        y[3] = d1 + 0.125f * d2 + (8.0f * m3 + m[6 * pitch]);
    }
};

// A row of K taps of each of three kernels, `area` apart, to the products' factors: for each point and
// block, three vectors.
template <int V, int K>
void transform_weights(const Vec<V>* weights, int area, Vec<V>* to) {
    using W = Winograd<K>;
    for (int p = 0; p < W::kPoints; ++p) {
        for (int block = 0; block < W::kBlocks; ++block) {
            const int first = block * W::kTaps, end = K - first < W::kTaps ? K - first : W::kTaps;
            for (int f = 0; f < 3; ++f) {
                const Vec<V>* row = weights + f * area + first;
                Vec<V> value{};
                if (p == W::kPoints - 1) {
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

// At one point, the products of T tiles with three kernels: to[f pitch + t] = sum over rows i and blocks k of
// rows[i][from + t + k] factors[i][at + 3 k + f].
template <int V, int T, int Blocks>
void multiply_point(const Vec<V>* const* rows, const Vec<V>* const* factors, int count, int from, int at,
                    Vec<V>* to, int pitch) {
    Vec<V> sums[3][T];
#pragma GCC unroll 3
    for (int f = 0; f < 3; ++f)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sums[f][t] = Vec<V>{};
    for (int i = 0; i < count; ++i) {
        const Vec<V>* row = rows[i] + from;
        const Vec<V>* factor = factors[i] + at;
#pragma GCC unroll 2
        for (int k = 0; k < Blocks; ++k) {
            const Vec<V> a = factor[3 * k], b = factor[3 * k + 1], c = factor[3 * k + 2];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const Vec<V> v = in_register(row[t + k]);
                sums[0][t] += v * a;
                sums[1][t] += v * b;
                sums[2][t] += v * c;
            }
        }
    }
#pragma GCC unroll 3
    for (int f = 0; f < 3; ++f)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) to[f * pitch + t] = sums[f][t];
}

template <int V>
using MultiplyPoint = void (*)(const Vec<V>* const*, const Vec<V>* const*, int, int, int, Vec<V>*, int);

template <int V, int Blocks>
MultiplyPoint<V> choose_multiply(int tiles) {
    switch (tiles) {
        case 1: return multiply_point<V, 1, Blocks>;
        case 2: return multiply_point<V, 2, Blocks>;
        case 3: return multiply_point<V, 3, Blocks>;
        case 4: return multiply_point<V, 4, Blocks>;
#if defined(__AVX512F__)
        case 5: return multiply_point<V, 5, Blocks>;
        case 6: return multiply_point<V, 6, Blocks>;
        case 7: return multiply_point<V, 7, Blocks>;
        case 8: return multiply_point<V, 8, Blocks>;
#endif
    }
    __builtin_unreachable();
}

}  // namespace qnas
