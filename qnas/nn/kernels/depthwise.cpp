// The gradients of a depthwise convolution of stride 1 or 2, padded by half its kernel.
//
// torch's own weight gradient is slow on a CPU for kernels of more than three taps across (lean_quadratic.py).
// Here, a task is one group of channels (the lanes of a vector) of one image. Bands of rows of x and of the result's
// gradient are copied into dense padded rows, which stay in cache for both gradients. With stride 2, the even
// and the odd columns of x are separate rows, its phases. The taps of one phase are adjacent there, so that every
// sweep has stride 1.
//
// Images are divided into slices that do not depend on the number of threads. Each slice sums its weight gradients
// separately, and the slices are added in order, so results are bitwise the same for any number of threads.
//
// Memory: maps are dense (B, H, W, C); weights are dense (C, 1, k, k), with k 3, 5, 7 or 9.

#include <algorithm>
#include <cstdint>

#include "buffers.h"
#include "groups.h"
#include "sweeps.h"

namespace qnas {
namespace {

constexpr int kMostSlices = 32;
constexpr size_t kBandVectors = 1400;  // of the rows that a band copies: 90 kB stay in the second-level cache
constexpr double kThreadWork = 1 << 18;             // multiply-adds below which a second thread costs more
constexpr int kMostColumns = kLanes == 16 ? 8 : 4;  // of x's gradient, with sums in registers at the same time
constexpr int kMostRows = kLanes == 16 ? 3 : 1;     // of taps, with sums in registers at the same time
constexpr int kMostPhases = 2;

struct Problem {
    int batch, channels, height, width, kernel, stride, threads;
    const float *x, *weight, *grad;

    int radius() const { return kernel / 2; }
    int area() const { return kernel * kernel; }
    int grad_height() const { return (height + stride - 1) / stride; }
    int grad_width() const { return (width + stride - 1) / stride; }
    // Taps across in a phase: all, or with stride 2 the even or the odd ones.
    int taps(int phase) const { return stride == 1 ? kernel : (kernel + 1 - phase) / 2; }
    // The place of a phase's first tap in a row of packed weights.
    int first_tap(int phase) const { return phase == 0 ? 0 : taps(0); }
    int packed(int tap) const { return stride == 1 ? tap : first_tap(tap % 2) + tap / 2; }
    // Zeros before a row of the gradient: taps that reach over its start.
    int before() const { return taps(0) - 1; }
};

// A thread's copies of rows. The last row of the gradient is of zeros, in the place of rows beyond the map.
struct Scratch {
    int band;          // rows of x
    int kept;          // rows of the gradient that a band of x needs
    int pitch;         // vectors in a phase of a row of x, and in a row of the gradient
    int phases;
    size_t vectors;
    Buffer memory;

    explicit Scratch(const Problem& p) : phases(p.stride) {
        // sweeps read a whole tile, and the taps beyond its end
        pitch = std::max(kMostColumns, (p.width + p.stride - 1) / p.stride) + 2 * p.kernel;
        const size_t in_band = kBandVectors / (size_t(pitch) * (phases + 1));
        band = std::max(1, std::min(p.height, int(in_band)));
        kept = (band + p.kernel) / p.stride + 2;
        vectors = size_t(pitch) * (size_t(band) * phases + kept + 1);
        // narrow groups have memory of their own, since the zeros around their rows are at other addresses
        const bool narrow = group_of(p.channels, groups_of(p.channels) - 1).narrow;
        memory = zeros(vectors * kLanes * (narrow ? 2 : 1));
    }
    template <int V>
    Vec<V>* start() const {
        return reinterpret_cast<Vec<V>*>(memory.get() + (V == kLanes ? 0 : vectors * kLanes));
    }
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

// One task: a group of channels of one image.
template <int V>
struct Task {
    const Problem& p;
    const Scratch& scratch;
    Group group;
    int image;
    const Vec<V>* flipped;  // (tap row, packed tap), each phase in reverse

    const Vec<V>* zero_row() const { return start_of_grad() + size_t(scratch.kept) * scratch.pitch; }
    Vec<V>* start_of_grad() const {
        return scratch.start<V>() + size_t(scratch.band) * scratch.phases * scratch.pitch;
    }
    Vec<V>* x_row(int row, int phase) const {
        return scratch.start<V>() + (size_t(row) * scratch.phases + phase) * scratch.pitch;
    }

    // Copies rows of x: padded by the radius, column u is at u / stride of phase u % stride.
    void read_x(int begin, int end) const {
        const size_t step = p.channels;
        for (int row = begin; row < end; ++row) {
            const float* from = p.x + (size_t(image) * p.height + row) * p.width * step + group.first;
            if (p.stride == 1) {
                Vec<V>* to = x_row(row - begin, 0) + p.radius();
                for (int c = 0; c < p.width; ++c) to[c] = load<V>(from + c * step, group.count);
                continue;
            }
            Vec<V>* const to[2] = {x_row(row - begin, 0), x_row(row - begin, 1)};
            for (int c = 0; c < p.width; ++c) {
                const int u = c + p.radius();
                to[u % 2][u / 2] = load<V>(from + c * step, group.count);
            }
        }
    }

    void read_grad(int begin, int end) const {
        const size_t step = p.channels;
        const int width = p.grad_width();
        for (int row = begin; row < end; ++row) {
            const float* from = p.grad + (size_t(image) * p.grad_height() + row) * width * step + group.first;
            Vec<V>* to = start_of_grad() + size_t(row - begin) * scratch.pitch + p.before();
            for (int c = 0; c < width; ++c) to[c] = load<V>(from + c * step, group.count);
        }
    }

    // Writes the gradient of x to `dx` (may be null), and adds that of the weights, packed, to `sums` (may be null).
    void run(float* dx, Vec<V>* sums) const {
        const int height = p.grad_height(), radius = p.radius(), stride = p.stride;
        for (int begin = 0; begin < p.height; begin += scratch.band) {
            const int end = std::min(begin + scratch.band, p.height);
            // rows of the gradient that some tap pairs with a row of this band
            const int first = std::max(0, (begin + radius - p.kernel + stride) / stride);
            const int last = std::min(height, (end - 1 + radius) / stride + 1);
            read_grad(first, last);
            const auto grad_row = [&](int row) {
                return row < first || row >= last ? zero_row()
                                                  : start_of_grad() + size_t(row - first) * scratch.pitch;
            };
            if (sums != nullptr) {
                read_x(begin, end);
                correlate_band(begin, end, grad_row, sums);
            }
            for (int row = begin; row < end && dx != nullptr; ++row) convolve_row(row, grad_row, dx);
        }
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
            const int at = row + p.radius() - ky;
            if (at % p.stride != 0) continue;
            const int highest = at / p.stride;  // row of the gradient; each further row of taps meets the one before
            if (highest < 0 || highest - F + 1 >= p.grad_height()) continue;
            pairs[count].row = x_row(row - begin, phase);
            for (int f = 0; f < F; ++f) pairs[count].fields[f] = grad_row(highest - f) + p.before();
            if (++count == kMost) {
                correlate_rows<V, N, F>(pairs, count, p.grad_width(), to);
                count = 0;
            }
        }
        correlate_rows<V, N, F>(pairs, count, p.grad_width(), to);
    }

    // Computes a row of the gradient of x, one phase of columns after the other.
    template <class Row>
    void convolve_row(int row, const Row& grad_row, float* dx) const {
        const int radius = p.radius(), stride = p.stride, lanes = group.count, width = p.width;
        const size_t step = p.channels;
        float* out = dx + (size_t(image) * p.height + row) * p.width * step + group.first;
        for (int phase = 0; phase < stride; ++phase) {
            // padded column `stride i + phase`: the first one on the map, and the place of its first tap
            const int i = (radius - phase + stride - 1) / stride;
            const int column = stride * i + phase - radius;
            const int columns = (width - column + stride - 1) / stride;
            if (columns <= 0) continue;
            Taps<V> taps[9];
            int count = 0;
            for (int ky = 0; ky < p.kernel; ++ky) {
                const int at = row + radius - ky;
                if (at < 0 || at % stride != 0 || at / stride >= p.grad_height()) continue;
                taps[count++] = {grad_row(at / stride) + i + p.taps(0) - p.taps(phase),
                                 flipped + ky * p.kernel + p.first_tap(phase)};
            }
            float* const to = out + column * step;
            const size_t apart = stride * step;
            with_constant<1, 2, 3, 4, 5, 7, 9>(p.taps(phase), [&](auto across) {
                with_constant<1, 2, 4, 7, 8>(tile_columns(columns, kMostColumns), [&](auto tile) {
                    if constexpr (tile <= kMostColumns)
                        convolve_to<V, across, tile>(taps, count, std::max<int>(tile, columns),
                                                     [=](int c, Vec<V> sum) {
                                                         if (c < columns) store<V>(to + c * apart, sum, lanes);
                                                     });
                });
            });
        }
    }
};

void run_backward(const Problem& p, float* dx, float* dw) {
    const int groups = groups_of(p.channels), area = p.area();
    const int slices = std::min(p.batch, kMostSlices);
    const double work = 2.0 * p.batch * p.grad_height() * p.grad_width() * p.channels * area;
    const int threads = std::max(1, std::min(p.threads, int(work / kThreadWork)));
    const size_t per_group = size_t(area) * kLanes;
    const Buffer flipped = zeros(groups * per_group);
    for (int index = 0; index < groups; ++index) {
        const Group group = group_of(p.channels, index);
        const int lanes = group.narrow ? 8 : kLanes;
        for (int tap = 0; tap < area; ++tap) {
            const int ky = tap / p.kernel, kx = tap % p.kernel;
            const int phase = p.stride == 1 ? 0 : kx % 2;
            const int within = p.packed(kx) - p.first_tap(phase);
            const int to = ky * p.kernel + p.first_tap(phase) + p.taps(phase) - 1 - within;
            for (int i = 0; i < group.count; ++i)
                flipped[index * per_group + size_t(to) * lanes + i] =
                    p.weight[size_t(group.first + i) * area + tap];
        }
    }
    const Buffer sums = zeros(dw == nullptr ? 0 : slices * groups * per_group);
#pragma omp parallel num_threads(threads)
    {
        const Scratch scratch(p);
#pragma omp for schedule(dynamic)
        for (int task = 0; task < slices * groups; ++task) {
            const int slice = task / groups, index = task % groups;
            const Group group = group_of(p.channels, index);
            const int begin = int64_t(p.batch) * slice / slices, end = int64_t(p.batch) * (slice + 1) / slices;
            with_lanes(group, [&](auto lanes) {
                constexpr int V = decltype(lanes)::value;
                const auto* weights = reinterpret_cast<const Vec<V>*>(flipped.get() + index * per_group);
                auto* own = dw == nullptr ? nullptr
                                          : reinterpret_cast<Vec<V>*>(sums.get() + task * per_group);
                for (int image = begin; image < end; ++image)
                    Task<V>{p, scratch, group, image, weights}.run(dx, own);
            });
        }
    }
    for (int index = 0; index < groups && dw != nullptr; ++index) {
        const Group group = group_of(p.channels, index);
        const int lanes = group.narrow ? 8 : kLanes;
        for (int tap = 0; tap < area; ++tap) {
            const int from = tap / p.kernel * p.kernel + p.packed(tap % p.kernel);
            for (int i = 0; i < group.count; ++i) {
                float total = 0.0f;
                for (int slice = 0; slice < slices; ++slice)
                    total += sums[(size_t(slice) * groups + index) * per_group + size_t(from) * lanes + i];
                dw[size_t(group.first + i) * area + tap] = total;
            }
        }
    }
}

}  // namespace
}  // namespace qnas

extern "C" {

// `sizes`: batch, channels, height and width of x, kernel, stride, threads. `in`: x, the weights, the result's
// gradient. `out`: the gradients of x and of the weights; a null one is not computed.
void qnas_depthwise_backward(const int64_t* sizes, float, const float* const* in, float* const* out) {
    const qnas::Problem p{int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]), int(sizes[4]),
                          int(sizes[5]), int(sizes[6]), in[0],         in[1],         in[2]};
    qnas::run_backward(p, out[0], out[1]);
}

}  // extern "C"
