// Depthwise convolutions of stride 1 or 2 and their gradients, on the rows of one group of channels of one image.
//
// Rows of the input and of the result's gradient are copied into dense padded rows that stay in cache. With stride
// 2, the even and the odd columns of the input are separate rows, its phases. The taps of one phase are adjacent
// there, so that every sweep has stride 1. Where the rows come from and where results go is up to a class `Maps`:
// depthwise.cpp reads plain maps, inverted.h normalises and activates them on the way.

#pragma once

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "groups.h"
#include "sweeps.h"

namespace qnas {

constexpr size_t kBandVectors = 1400;  // of the rows that a band copies: 90 kB stay in the second-level cache
constexpr int kMostColumns = kLanes == 16 ? 8 : 4;  // with sums in registers at the same time
constexpr int kMostRows = kLanes == 16 ? 3 : 1;     // of taps, with sums in registers at the same time

// The sizes of a convolution. The result has ceil(height / stride) rows.
struct Depthwise {
    int batch, channels, height, width, kernel, stride;
    int top, left;  // rows and columns of padding before the map

    int area() const { return kernel * kernel; }
    int out_height() const { return (height + stride - 1) / stride; }
    int out_width() const { return (width + stride - 1) / stride; }
    // Taps across in a phase: all, or with stride 2 the even or the odd ones.
    int taps(int phase) const { return stride == 1 ? kernel : (kernel + 1 - phase) / 2; }
    // The place of a phase's first tap in a row of packed weights.
    int first_tap(int phase) const { return phase == 0 ? 0 : taps(0); }
    int packed(int tap) const { return stride == 1 ? tap : first_tap(tap % 2) + tap / 2; }
    // The same with each phase in reverse, for the gradient of the input.
    int flipped(int tap) const {
        const int phase = stride == 1 ? 0 : tap % 2;
        return 2 * first_tap(phase) + taps(phase) - 1 - packed(tap);
    }
    // Zeros before a row of the gradient: taps that reach over its start.
    int before() const { return taps(0) - 1; }
    // Multiply-adds of a convolution.
    double work() const { return double(batch) * out_height() * out_width() * channels * area(); }
};

// Packs the weights, (C, 1, k, k), of a group as vectors (tap row, packed or flipped tap).
template <class Place>
void pack_taps(const Depthwise& p, const float* weight, const Group& group, int lanes, const Place& place, float* to) {
    for (int tap = 0; tap < p.area(); ++tap) {
        const int at = tap / p.kernel * p.kernel + place(tap % p.kernel);
        for (int i = 0; i < group.count; ++i)
            to[size_t(at) * lanes + i] = weight[size_t(group.first + i) * p.area() + tap];
    }
}

// A thread's copies of rows: `band` of the input and `kept` of the result's gradient, as rings in which a row has the
// place of its number modulo their size. The last row is of zeros, in the place of rows beyond the map.
struct Scratch {
    int band, kept;
    int pitch;  // vectors in a phase of a row of the input, and in a row of the gradient
    int phases;
    size_t vectors;
    Buffer memory;

    static Scratch forward(const Depthwise& p) { return Scratch(p, p.kernel, 0); }
    static Scratch backward(const Depthwise& p) {
        const size_t in_band = kBandVectors / (size_t(pitch_of(p)) * (p.stride + 1));
        const int band = std::max(1, std::min(p.height, int(in_band)));
        return Scratch(p, band, (band + p.kernel) / p.stride + 2);
    }
    template <int V>
    Vec<V>* start() const {
        return reinterpret_cast<Vec<V>*>(memory.get() + (V == kLanes ? 0 : vectors * kLanes));
    }

  private:
    Scratch(const Depthwise& p, int band, int kept) : band(band), kept(kept), pitch(pitch_of(p)), phases(p.stride) {
        vectors = size_t(pitch) * (size_t(band) * phases + kept + 1);
        // narrow groups have memory of their own, since the zeros around their rows are at other addresses
        const bool narrow = group_of(p.channels, groups_of(p.channels) - 1).narrow;
        memory = zeros(vectors * kLanes * (narrow ? 2 : 1));
    }
    // sweeps read a whole tile, and the taps beyond its end
    static int pitch_of(const Depthwise& p) { return std::max(kMostColumns, p.out_width()) + 2 * p.kernel; }
};

// sums[f][n] += sum over rows i and columns c of row[i][c + n] fields[i][f][c], for N taps and F rows of taps
template <int V, int N, int F>
struct Pairs {
    const Vec<V>* row;
    const Vec<V>* fields[F];
};

template <int V, int N, int F>
void correlate_rows(const Pairs<V, N, F>* pairs, int count, int columns, Vec<V>* const* to) {
    Vec<V> sums[F][N] = {};
    for (int i = 0; i < count; ++i) {
        const Vec<V>* row = pairs[i].row;
        const Vec<V>* fields[F];
        UNROLL for (int f = 0; f < F; ++f) fields[f] = pairs[i].fields[f];
        for (int c = 0; c < columns; ++c) {
            Vec<V> g[F];
            UNROLL for (int f = 0; f < F; ++f) g[f] = fields[f][c];
            UNROLL for (int n = 0; n < N; ++n) {
                const Vec<V> v = in_register(row[c + n]);
                UNROLL for (int f = 0; f < F; ++f) sums[f][n] += v * g[f];
            }
        }
    }
    UNROLL for (int f = 0; f < F; ++f)
        UNROLL for (int n = 0; n < N; ++n) to[f][n] += sums[f][n];
}

// One task: a group of channels of one image. `Maps` has
//
//     void read_x(int row, put) const      calls put(column, vector) for a row of the input
//     void read_grad(int row, put) const   the same for the result's gradient
//     float* target(int row) const         the start of a row of results: of the result's, or of the input's gradient
//     int64_t step() const                 floats between their columns
//     int lanes() const                    floats of a vector that are stored
//     void finish(int row)                 is called once a row of results is complete
template <int V, class Maps>
struct Task {
    const Depthwise& p;
    const Scratch& scratch;
    Maps& maps;
    const Vec<V>* weights;  // packed; flipped for `backward`
    // rows at the start of the rings, at most their size before any row in use: a division for each row is slow
    int x_start = 0, grad_start = 0;

    // Computes the convolution. `row_of_sums` has place for a row of the result.
    void forward(Vec<V>* row_of_sums) {
        int read = 0;
        for (int row = 0; row < p.out_height(); ++row) {
            const int first = row * p.stride - p.top, begin = std::max(0, first);
            x_start = begin - begin % scratch.band;
            for (; read < std::min(p.height, first + p.kernel); ++read) read_x(read);
            const int columns = p.out_width(), lanes = maps.lanes();
            const int64_t step = maps.step();
            float* const out = maps.target(row);
            for (int phase = 0; phase < p.stride; ++phase) {
                Taps<V> taps[9];
                int count = 0;
                for (int ky = 0; ky < p.kernel; ++ky) {
                    const int at = first + ky;
                    if (at < 0 || at >= p.height) continue;
                    taps[count++] = {x_row(at, phase), weights + ky * p.kernel + p.first_tap(phase)};
                }
                const bool is_first = phase == 0, is_last = phase + 1 == p.stride;
                with_sizes(p.taps(phase), columns, [&](auto n, auto tile) {
                    convolve_to<V, n, tile>(taps, count, std::max<int>(tile, columns), [=](int c, Vec<V> sum) {
                        if (c >= columns) return;
                        if (!is_first) sum += row_of_sums[c];
                        // the last tile overlaps the one before it: a sum must not be added twice
                        if (is_last)
                            store<V>(out + c * step, sum, lanes);
                        else
                            row_of_sums[c] = sum;
                    });
                });
            }
            maps.finish(row);
        }
    }

    // Computes the gradient of the input if `needs_x`, and adds that of the weights, packed, to `sums` (may be null).
    void backward(bool needs_x, Vec<V>* sums) {
        int read = 0;
        for (int begin = 0; begin < p.height; begin += scratch.band) {
            const int end = std::min(begin + scratch.band, p.height);
            // rows of the gradient that some tap pairs with a row of this band
            const int first = std::max(0, (begin + p.top - p.kernel + p.stride) / p.stride);
            const int last = std::min(p.out_height(), (end - 1 + p.top) / p.stride + 1);
            x_start = begin;
            grad_start = first - first % scratch.kept;
            for (read = std::max(read, first); read < last; ++read) {
                Vec<V>* const to = grad_place(read) + p.before();
                maps.read_grad(read, [=](int c, Vec<V> v) { to[c] = v; });
            }
            const auto grad_row = [&](int row) -> const Vec<V>* {
                return row < first || row >= last ? zero_row() : grad_place(row);
            };
            if (sums != nullptr) {
                for (int row = begin; row < end; ++row) read_x(row);
                correlate_band(begin, end, grad_row, sums);
            }
            for (int row = begin; row < end && needs_x; ++row) {
                convolve_row(row, grad_row);
                maps.finish(row);
            }
        }
    }

  private:
    static int in_ring(int at, int size) { return at < size ? at : at - size; }
    Vec<V>* grads() const { return scratch.start<V>() + size_t(scratch.band) * scratch.phases * scratch.pitch; }
    Vec<V>* grad_place(int row) const {
        return grads() + size_t(in_ring(row - grad_start, scratch.kept)) * scratch.pitch;
    }
    const Vec<V>* zero_row() const { return grads() + size_t(scratch.kept) * scratch.pitch; }
    Vec<V>* x_row(int row, int phase) const {
        const size_t at = size_t(in_ring(row - x_start, scratch.band)) * scratch.phases + phase;
        return scratch.start<V>() + at * scratch.pitch;
    }

    // Copies a row of the input: column u of the padded row is at u / stride of phase u % stride.
    void read_x(int row) const {
        if (p.stride == 1) {
            Vec<V>* const to = x_row(row, 0) + p.left;
            maps.read_x(row, [=](int c, Vec<V> v) { to[c] = v; });
            return;
        }
        Vec<V>* const to[2] = {x_row(row, 0), x_row(row, 1)};
        const int left = p.left;
        maps.read_x(row, [=](int c, Vec<V> v) { to[(c + left) % 2][(c + left) / 2] = v; });
    }

    // Calls run(N, T), constants, with the taps across and the columns of a tile.
    template <class Run>
    static void with_sizes(int across, int columns, const Run& run) {
        with_constant<1, 2, 3, 4, 5, 7, 9>(across, [&](auto n) {
            with_constant<1, 2, 4, 7, 8>(tile_columns(columns, kMostColumns), [&](auto tile) {
                if constexpr (tile <= kMostColumns) run(n, tile);
            });
        });
    }

    template <class Row>
    void correlate_band(int begin, int end, const Row& grad_row, Vec<V>* sums) const {
        // rows of taps `stride` apart meet the same row of x
        for (int parity = 0; parity < p.stride; ++parity) {
            const int rows = (p.kernel - parity + p.stride - 1) / p.stride;
            // as even as possible: four rows are two and two
            const int parts = (rows + kMostRows - 1) / kMostRows;
            for (int part = 0; part < parts; ++part) {
                const int from = rows * part / parts, to = rows * (part + 1) / parts;
                with_constant<1, 2, 3>(to - from, [&](auto fields) {
                    if constexpr (fields <= kMostRows)
                        for (int phase = 0; phase < p.stride; ++phase)
                            with_constant<1, 2, 3, 4, 5, 7, 9>(p.taps(phase), [&](auto taps) {
                                correlate_part<taps, fields>(begin, end, phase, parity + p.stride * from,
                                                             grad_row, sums);
                            });
                });
            }
        }
    }

    // F rows of taps from `ky` on.
    template <int N, int F, class Row>
    void correlate_part(int begin, int end, int phase, int ky, const Row& grad_row, Vec<V>* sums) const {
        constexpr int kMost = 64;
        Pairs<V, N, F> pairs[kMost];
        Vec<V>* to[F];
        for (int f = 0; f < F; ++f) to[f] = sums + (ky + f * p.stride) * p.kernel + p.first_tap(phase);
        int count = 0;
        for (int row = begin; row < end; ++row) {
            const int at = row + p.top - ky;
            if (at % p.stride != 0) continue;
            const int highest = at / p.stride;  // row of the gradient; each further row of taps meets the one before
            if (highest < 0 || highest - F + 1 >= p.out_height()) continue;
            pairs[count].row = x_row(row, phase);
            for (int f = 0; f < F; ++f) pairs[count].fields[f] = grad_row(highest - f) + p.before();
            if (++count == kMost) {
                correlate_rows<V, N, F>(pairs, count, p.out_width(), to);
                count = 0;
            }
        }
        correlate_rows<V, N, F>(pairs, count, p.out_width(), to);
    }

    // Computes a row of the gradient of x, one phase of columns after the other.
    template <class Row>
    void convolve_row(int row, const Row& grad_row) const {
        const int stride = p.stride, lanes = maps.lanes();
        const int64_t step = maps.step();
        float* const out = maps.target(row);
        for (int phase = 0; phase < stride; ++phase) {
            // padded column `stride i + phase`: the first one on the map, and the place of its first tap
            const int i = (p.left - phase + stride - 1) / stride;
            const int column = stride * i + phase - p.left;
            const int columns = (p.width - column + stride - 1) / stride;
            if (columns <= 0) continue;
            Taps<V> taps[9];
            int count = 0;
            for (int ky = 0; ky < p.kernel; ++ky) {
                const int at = row + p.top - ky;
                if (at < 0 || at % stride != 0 || at / stride >= p.out_height()) continue;
                taps[count++] = {grad_row(at / stride) + i + p.taps(0) - p.taps(phase),
                                 weights + ky * p.kernel + p.first_tap(phase)};
            }
            float* const to = out + column * step;
            const int64_t apart = stride * step;
            with_sizes(p.taps(phase), columns, [&](auto n, auto tile) {
                convolve_to<V, n, tile>(taps, count, std::max<int>(tile, columns), [=](int c, Vec<V> sum) {
                    if (c < columns) store<V>(to + c * apart, sum, lanes);
                });
            });
        }
    }
};

// The slices of a batch, which do not depend on the number of threads. Each sums gradients separately, and they are
// added in order, so results are bitwise the same for any number of threads.
struct Slices {
    static constexpr int kMost = 32;
    int batch;

    int count() const { return std::min(batch, kMost); }
    int begin(int slice) const { return int(int64_t(batch) * slice / count()); }
    int end(int slice) const { return begin(slice + 1); }
};

// Adds the slices' packed weight gradients of a group, at `sums` and `apart` floats from one another, in order.
inline void merge_taps(const Depthwise& p, const Group& group, int lanes, const float* sums, size_t apart, float* dw) {
    for (int tap = 0; tap < p.area(); ++tap) {
        const int from = tap / p.kernel * p.kernel + p.packed(tap % p.kernel);
        for (int i = 0; i < group.count; ++i) {
            float total = 0.0f;
            for (int slice = 0; slice < Slices{p.batch}.count(); ++slice)
                total += sums[slice * apart + size_t(from) * lanes + i];
            dw[size_t(group.first + i) * p.area() + tap] = total;
        }
    }
}

}  // namespace qnas
