// Products of tall thin matrices with small ones, for pointwise.cpp and inverted.h. A BLAS packs both operands
// for each product and reaches three quarters of the machine's peak at these sizes. Here, weights are packed once
// per call, and activations are written in the layout that the next product reads.
//
// This layout is panels of kPanel adjacent columns: a (rows, columns) matrix is stored as
// (columns / kPanel, pitch, kPanel), pitch >= rows. In weights, columns beyond the last are zero. A tile of sums
// stays in registers from the first to the last term, and each sum adds its terms in order. Results therefore do
// not depend on how rows and columns are divided.

#pragma once

#include <cstdint>
#include <type_traits>

#include "lanes.h"

namespace qnas {

constexpr int kPanel = 2 * kLanes;                    // columns
constexpr int kTileRows = kLanes == 16 ? 14 : 6;      // rows of a product's tile: 28 or 12 registers of sums
constexpr int kTileTerms = kLanes == 16 ? 8 : 4;      // rows of a tile in a sum of outer products

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Calls run(N), a constant, with the number of vectors (1 or 2) that the remaining `columns` of a panel fill.
template <class Run>
inline void with_vectors(int64_t columns, Run&& run) {
    with_constant<2, 1>(columns > kLanes ? 2 : 1, run);
}

// Packs a (terms, columns) matrix, at `from` with these strides, into panels of pitch `terms`.
inline void pack_weights(const float* from, int64_t terms, int64_t columns, int64_t by_term, int64_t by_column,
                         float* to) {
    for (int64_t first = 0; first < columns; first += kPanel, to += terms * kPanel) {
        const int64_t count = columns - first < kPanel ? columns - first : kPanel;
        if (by_column == 1) {
            for (int64_t k = 0; k < terms; ++k) {
                const float* term = from + k * by_term + first;
                for (int64_t n = 0; n < kPanel; ++n) to[k * kPanel + n] = n < count ? term[n] : 0.0f;
            }
            continue;
        }
        for (int64_t start = 0; start < terms; start += kLanes) {  // transpose a cache line at a time
            const int64_t end = start + kLanes < terms ? start + kLanes : terms;
            for (int64_t n = 0; n < kPanel; ++n) {
                const float* column = from + (first + n) * by_column;
                for (int64_t k = start; k < end; ++k)
                    to[k * kPanel + n] = n < count ? column[k * by_term] : 0.0f;
            }
        }
    }
}

// sums[t][v] += a[t Pitch] b(v): one term of T rows and N vectors.
template <int Pitch, int T, int N>
inline void add_term(const float* a, const float* b, Vec<kLanes> (&sums)[T][N]) {
    constexpr int V = kLanes;
    Vec<V> factor[N];
    UNROLL for (int v = 0; v < N; ++v) factor[v] = in_register(load<V>(b + v * V, V));
    UNROLL for (int t = 0; t < T; ++t) {
        const Vec<V> value = in_register(broadcast<V>(a[t * Pitch]));
        UNROLL for (int v = 0; v < N; ++v) sums[t][v] += value * factor[v];
    }
}

// sums[t][v] += sum over terms k of a(t, k) b(k, v), for T rows of panels `a` and N vectors of one panel b.
template <int T, int N>
inline void multiply_tile(const float* a, int64_t pitch, int64_t terms, const float* b, Vec<kLanes> (&sums)[T][N]) {
    for (int64_t first = 0; first < terms; first += kPanel, a += pitch * kPanel) {
        const int count = terms - first < kPanel ? int(terms - first) : kPanel;
        for (int k = 0; k < count; ++k, b += kPanel) add_term<kPanel>(a + k, b, sums);
    }
}

// Calls run(T, first), T a constant, for tiles of T rows that cover [begin, end), and one more row if their number
// is odd.
template <class Run>
inline void for_tiles(int64_t begin, int64_t end, Run&& run) {
    int64_t row = begin;
    for (; row + kTileRows <= end; row += kTileRows) run(std::integral_constant<int, kTileRows>(), row);
    switch ((end - row + 1) / 2) {
        case 1: return run(std::integral_constant<int, 2>(), row);
        case 2: return run(std::integral_constant<int, 4>(), row);
        case 3: return run(std::integral_constant<int, 6>(), row);
#if defined(__AVX512F__)
        case 4: return run(std::integral_constant<int, 8>(), row);
        case 5: return run(std::integral_constant<int, 10>(), row);
        case 6: return run(std::integral_constant<int, 12>(), row);
        case 7: return run(std::integral_constant<int, 14>(), row);
#endif
    }
}

// to (T rows of a panel of pitch kPanel, N vectors) += sum over rows r of a(r, t) b(r, v). `a` points to the
// first of T columns of a panel. The sum over these rows is computed first and then added: a single long sum
// over all rows would lose a digit.
template <int T, int N>
inline void accumulate_tile(const float* a, const float* b, int64_t rows, float* to) {
    constexpr int V = kLanes;
    Vec<V> sums[T][N] = {};
    for (int64_t r = 0; r < rows; ++r, a += kPanel, b += kPanel) add_term<1>(a, b, sums);
    UNROLL for (int t = 0; t < T; ++t)
        UNROLL for (int v = 0; v < N; ++v) {
            float* const total = to + t * kPanel + v * V;
            store<V>(total, load<V>(total, V) + sums[t][v], V);
        }
}

// A (rows, columns) matrix in panels that are `pitch` rows apart.
struct Panels {
    float* start;
    int64_t pitch;

    float* at(int64_t panel, int64_t row) const { return start + (panel * pitch + row) * kPanel; }
    // for a column that is the first of a vector
    float* of(int64_t row, int64_t column) const { return at(column / kPanel, row) + column % kPanel; }
};

// Computes rows [begin, end) of one panel of a product plus `first` (kPanel floats; null: zero), and calls
// done(row, sums) with the sums of each tile. Rows of a tile at `end` and beyond have no meaning.
template <int N, class Done>
inline void multiply(const Panels& a, int64_t terms, const float* b, const float* first, int64_t begin,
                     int64_t end, Done&& done) {
    for_tiles(begin, end, [&](auto tile, int64_t row) {
        constexpr int T = decltype(tile)::value, V = kLanes;
        Vec<V> sums[T][N];
        UNROLL for (int t = 0; t < T; ++t)
            UNROLL for (int v = 0; v < N; ++v) sums[t][v] = first == nullptr ? Vec<V>{} : load<V>(first + v * V, V);
        multiply_tile<T, N>(a.at(0, row), a.pitch, terms, b, sums);
        done(row, sums);
    });
}

// The same, written to a panel. `to` points to its row `begin`.
template <int N>
inline void multiply_to(const Panels& a, int64_t terms, const float* b, const float* first, int64_t begin,
                        int64_t end, float* to) {
    multiply<N>(a, terms, b, first, begin, end, [&](int64_t row, const auto& sums) {
        constexpr int T = std::extent_v<std::remove_reference_t<decltype(sums)>>, V = kLanes;
        UNROLL for (int t = 0; t < T; ++t)
            UNROLL for (int v = 0; v < N; ++v) store<V>(to + (row - begin + t) * kPanel + v * V, sums[t][v], V);
    });
}

// to (channels, one panel) += sum over `rows` of narrow(first + r, c) wide(r, e)
template <int N>
inline void accumulate(const Panels& narrow, int64_t first, int64_t channels, const float* wide, int64_t rows,
                       float* to) {
    for (int64_t c = 0; c < channels; c += kTileTerms)
        accumulate_tile<kTileTerms, N>(narrow.of(first, c), wide, rows, to + c * kPanel);
}

}  // namespace qnas
