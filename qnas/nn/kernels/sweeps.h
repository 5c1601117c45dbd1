// The two sweeps along rows of which all quadratic kernels consist. Rows are dense vectors of one group of
// channels, padded with zeros at both ends, so that inner loops need no checks for borders.

#pragma once

#include <initializer_list>

#include "lanes.h"

namespace qnas {

// One row of a convolution: N taps, Step columns apart, at `row`, `row + Step`, ...
template <int V>
struct Taps {
    const Vec<V>* row;     // the input at the first tap of output column 0
    const Vec<V>* weight;  // N weights, Step apart
};

// sums[t] += sum over rows i and taps n of taps[i].row[start + t + n Step] taps[i].weight[n Step]. If one tile
// is the whole row (Whole), the zeros beyond its ends are skipped.
template <int V, int N, int Step, int T, bool Whole>
inline void add_taps(const Taps<V>* taps, int count, int start, Vec<V> (&sums)[T]) {
    constexpr int kEnd = (N - 1) * Step / 2;  // columns of padding at each end that the taps read
    for (int i = 0; i < count; ++i) {
        const Vec<V>* row = taps[i].row + start;
        Vec<V> weight[N];
        UNROLL for (int n = 0; n < N; ++n) weight[n] = taps[i].weight[n * Step];
        UNROLL for (int j = Whole ? kEnd : 0; j < T + (Whole ? kEnd : (N - 1) * Step); ++j) {
            const Vec<V> v = in_register(row[j]);
            UNROLL for (int n = 0; n < N; ++n) {
                const int t = j - n * Step;
                if (t >= 0 && t < T) sums[t] += v * weight[n];
            }
        }
    }
}

// out[c] = from[c] + the sums of add_taps, for c < `columns`, which is at least T. `from` may be null (zero) or `out`.
template <int V, int N, int Step, int T, bool Whole>
void convolve_tiles(const Taps<V>* taps, int count, const Vec<V>* from, Vec<V>* out, int columns) {
    // the last tile overlaps the one before it, so its start must be read before `out` is written
    Vec<V> last[T];
    const int end = columns - T;
    const bool in_place = from == out;
    if (in_place)
        for (int t = 0; t < T; ++t) last[t] = from[end + t];
    for (int start = 0;;) {
        Vec<V> sums[T] = {};
        if (from != nullptr) {
            const Vec<V>* begin = in_place && start == end ? last : from + start;
            UNROLL for (int t = 0; t < T; ++t) sums[t] = begin[t];
        }
        add_taps<V, N, Step, T, Whole>(taps, count, start, sums);
        UNROLL for (int t = 0; t < T; ++t) out[start + t] = sums[t];
        if (start == end) return;
        start = start + T < end ? start + T : end;
    }
}

template <int V>
using Convolve = void (*)(const Taps<V>*, int, const Vec<V>*, Vec<V>*, int);

// Columns of a tile, at most `most`. Divides the row as evenly as the compiled tile sizes allow.
inline int tile_columns(int columns, int most = kMaxTile) {
    const int tiles = (columns + most - 1) / most, even = (columns + tiles - 1) / tiles;
    for (int tile : {1, 2, 4, 7, 8, 10, 12, 14})
        if (even <= tile && tile <= most) return tile;
    return most;
}

// The same for N adjacent taps, T columns at a time; each sum is passed to done(column, sum) instead.
template <int V, int N, int T, class Done>
void convolve_to(const Taps<V>* taps, int count, int columns, Done done) {
    const int end = columns - T;
    for (int start = 0;;) {
        Vec<V> sums[T] = {};
        add_taps<V, N, 1, T, false>(taps, count, start, sums);
        UNROLL for (int t = 0; t < T; ++t) done(start + t, sums[t]);
        if (start == end) return;
        start = start + T < end ? start + T : end;
    }
}

// The rows that a weight gradient multiplies: one row of the input and three of gradients.
template <int V>
struct Pairing {
    const Vec<V>* row;  // the input at the first tap of output column 0
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

// Returns run(N, Step), constants, for N taps that are Step columns apart: a whole row of taps, or its two ends.
template <class Run>
auto with_taps(int taps, int step, Run&& run) {
    if (step == 1)
        return with_constant<1, 3, 5, 7, 9>(taps, [&](auto n) { return run(n, std::integral_constant<int, 1>()); });
    return with_constant<4, 6>(step, [&](auto apart) { return run(std::integral_constant<int, 2>(), apart); });
}

// Choose a sweep at run time, once per task. `whole`: one tile is the whole row.
template <int V>
[[gnu::noinline]] Convolve<V> choose_convolve(int taps, int step, int tile, bool whole) {
    return with_taps(taps, step, [&](auto n, auto apart) {
        return with_constant<1, 2, 4, 7, 8, 10, 12, 14, 16>(tile, [&](auto columns) {
            constexpr int T = columns <= kMaxTile ? columns : kMaxTile;
            return whole ? convolve_tiles<V, n, apart, T, true> : convolve_tiles<V, n, apart, T, false>;
        });
    });
}

template <int V>
[[gnu::noinline]] Correlate<V> choose_correlate(int taps, int step) {
    return with_taps(taps, step, [](auto n, auto apart) { return correlate<V, n, apart>; });
}

}  // namespace qnas
