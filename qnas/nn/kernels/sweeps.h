// The two sweeps along rows that all quadratic kernels are made of. Rows are dense vectors of one
// group of channels, padded with zeros at both ends, so that no inner loop knows of borders.

#pragma once

#include <initializer_list>
#include <type_traits>

#include "lanes.h"

namespace qnas {

// One row of a convolution: N taps, Step columns apart, at `row`, `row + Step`, ...
template <int V>
struct Taps {
    const Vec<V>* row;     // the input that the first tap of output column 0 meets
    const Vec<V>* weight;  // N weights, Step apart
};

// out[c] = from[c] + sum over rows i and taps n of taps[i].row[c + n Step] taps[i].weight[n Step],
// for c below `columns`, which is at least T. `from` may be null (zero) or `out`. Where one tile is the
// whole row (Whole), the zeros beyond its ends are not multiplied.
template <int V, int N, int Step, int T, bool Whole>
void convolve_tiles(const Taps<V>* taps, int count, const Vec<V>* from, Vec<V>* out, int columns) {
    constexpr int kEnd = (N - 1) * Step / 2;  // columns of padding at either end that the taps meet
    // the last tile overlaps the one before it, so its start must be read before `out` is written
    Vec<V> last[T];
    const int end = columns - T;
    const bool in_place = from == out;
    if (in_place)
        for (int t = 0; t < T; ++t) last[t] = from[end + t];
    for (int start = 0;;) {
        Vec<V> sums[T];
        if (from == nullptr) {
            UNROLL for (int t = 0; t < T; ++t) sums[t] = Vec<V>{};
        } else {
            const Vec<V>* begin = in_place && start == end ? last : from + start;
            UNROLL for (int t = 0; t < T; ++t) sums[t] = begin[t];
        }
        for (int i = 0; i < count; ++i) {
            const Vec<V>* row = taps[i].row + start;
            Vec<V> weight[N];
            UNROLL for (int n = 0; n < N; ++n) weight[n] = taps[i].weight[n * Step];
            UNROLL for (int j = Whole ? kEnd : 0; j < T + (Whole ? 1 : 2) * kEnd; ++j) {
                const Vec<V> v = in_register(row[j]);
                UNROLL for (int n = 0; n < N; ++n) {
                    const int t = j - n * Step;
                    if (t >= 0 && t < T) sums[t] += v * weight[n];
                }
            }
        }
        UNROLL for (int t = 0; t < T; ++t) out[start + t] = sums[t];
        if (start == end) return;
        start = start + T < end ? start + T : end;
    }
}

template <int V>
using Convolve = void (*)(const Taps<V>*, int, const Vec<V>*, Vec<V>*, int);

// Columns of a tile: as even a division of the row as the compiled tiles allow.
inline int tile_columns(int columns) {
    const int tiles = (columns + kMaxTile - 1) / kMaxTile;
    const int even = (columns + tiles - 1) / tiles;
    for (int tile : {1, 2, 4, 7, 8, 10, 12, 14})
        if (even <= tile && tile <= kMaxTile) return tile;
    return kMaxTile;
}

template <int V, int N, int Step, bool Whole>
Convolve<V> convolve_for(int tile) {
    switch (tile) {
        case 1: return convolve_tiles<V, N, Step, 1, Whole>;
        case 2: return convolve_tiles<V, N, Step, 2, Whole>;
        case 4: return convolve_tiles<V, N, Step, 4, Whole>;
        case 7: return convolve_tiles<V, N, Step, 7, Whole>;
        case 8: return convolve_tiles<V, N, Step, 8, Whole>;
#if defined(__AVX512F__)
        case 10: return convolve_tiles<V, N, Step, 10, Whole>;
        case 12: return convolve_tiles<V, N, Step, 12, Whole>;
        case 14: return convolve_tiles<V, N, Step, 14, Whole>;
        case 16: return convolve_tiles<V, N, Step, 16, Whole>;
#endif
    }
    __builtin_unreachable();
}

// The same for N taps side by side, T columns at a time, whose sums go to done(column, sum) instead.
template <int V, int N, int T, class Done>
void convolve_to(const Taps<V>* taps, int count, int columns, Done done) {
    const int end = columns - T;
    for (int start = 0;;) {
        Vec<V> sums[T];
        UNROLL for (int t = 0; t < T; ++t) sums[t] = Vec<V>{};
        for (int i = 0; i < count; ++i) {
            const Vec<V>* row = taps[i].row + start;
            Vec<V> weight[N];
            UNROLL for (int n = 0; n < N; ++n) weight[n] = taps[i].weight[n];
            UNROLL for (int j = 0; j < T + N - 1; ++j) {
                const Vec<V> v = in_register(row[j]);
                UNROLL for (int n = 0; n < N; ++n) {
                    const int t = j - n;
                    if (t >= 0 && t < T) sums[t] += v * weight[n];
                }
            }
        }
        UNROLL for (int t = 0; t < T; ++t) done(start + t, sums[t]);
        if (start == end) return;
        start = start + T < end ? start + T : end;
    }
}

// Calls run(T) with T, a constant, columns of a tile as above: as even a division as the compiled ones allow.
template <class Run>
void with_columns(int columns, Run&& run) {
    constexpr int most = kLanes == 16 ? 8 : 4;
    const int tiles = (columns + most - 1) / most, even = (columns + tiles - 1) / tiles;
    if constexpr (most == 8) {
        if (even == 8) return run(std::integral_constant<int, 8>());
        if (even > 4) return run(std::integral_constant<int, 7>());
    }
    if (even > 2) return run(std::integral_constant<int, 4>());
    if (even == 2) return run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
}

// The rows that a weight gradient multiplies: one of the input, and three of gradients.
template <int V>
struct Pairing {
    const Vec<V>* row;  // the input that the first tap of output column 0 meets
    const Vec<V>* fields[3];
};

// to[f][n Step] += sum over rows and columns of pairing.row[c + n Step] pairing.fields[f][c]
template <int V, int N, int Step>
void correlate(const Pairing<V>* pairings, int count, int columns, Vec<V>* const to[3]) {
    constexpr int F = kFields;
    for (int first = 0; first < 3; first += F) {
        Vec<V> sums[F][N];
        UNROLL for (int f = 0; f < F; ++f)
            UNROLL for (int n = 0; n < N; ++n) sums[f][n] = to[first + f][n * Step];
        for (int i = 0; i < count; ++i) {
            const Vec<V>* row = pairings[i].row;
            const Vec<V>* fields[F];
            UNROLL for (int f = 0; f < F; ++f) fields[f] = pairings[i].fields[first + f];
            for (int c = 0; c < columns; ++c) {
                Vec<V> g[F];
                UNROLL for (int f = 0; f < F; ++f) g[f] = fields[f][c];
                UNROLL for (int n = 0; n < N; ++n) {
                    const Vec<V> v = in_register(row[c + n * Step]);
                    UNROLL for (int f = 0; f < F; ++f) sums[f][n] += v * g[f];
                }
            }
        }
        UNROLL for (int f = 0; f < F; ++f)
            UNROLL for (int n = 0; n < N; ++n) to[first + f][n * Step] = sums[f][n];
    }
}

template <int V>
using Correlate = void (*)(const Pairing<V>*, int, int, Vec<V>* const*);

template <int V, int N, int Step>
Convolve<V> convolve_for(int tile, bool whole) {
    return whole ? convolve_for<V, N, Step, true>(tile) : convolve_for<V, N, Step, false>(tile);
}

// The sweeps for N taps, Step apart, as they are chosen at run time: all of a row, or its two ends.
// `whole`: one tile is the whole row.
template <int V>
Convolve<V> choose_convolve(int taps, int step, int tile, bool whole) {
    switch (taps * 16 + step) {
        case 1 * 16 + 1: return convolve_for<V, 1, 1>(tile, whole);
        case 3 * 16 + 1: return convolve_for<V, 3, 1>(tile, whole);
        case 5 * 16 + 1: return convolve_for<V, 5, 1>(tile, whole);
        case 7 * 16 + 1: return convolve_for<V, 7, 1>(tile, whole);
        case 9 * 16 + 1: return convolve_for<V, 9, 1>(tile, whole);
        case 2 * 16 + 4: return convolve_for<V, 2, 4>(tile, whole);
        case 2 * 16 + 6: return convolve_for<V, 2, 6>(tile, whole);
    }
    __builtin_unreachable();
}

template <int V>
Correlate<V> choose_correlate(int taps, int step) {
    switch (taps * 16 + step) {
        case 1 * 16 + 1: return correlate<V, 1, 1>;
        case 3 * 16 + 1: return correlate<V, 3, 1>;
        case 5 * 16 + 1: return correlate<V, 5, 1>;
        case 7 * 16 + 1: return correlate<V, 7, 1>;
        case 9 * 16 + 1: return correlate<V, 9, 1>;
        case 2 * 16 + 4: return correlate<V, 2, 4>;
        case 2 * 16 + 6: return correlate<V, 2, 6>;
    }
    __builtin_unreachable();
}

}  // namespace qnas
