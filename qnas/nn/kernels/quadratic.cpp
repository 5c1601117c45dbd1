// The quadratic depthwise convolution y = a b + c, a = W_a * x, b = W_b * x, c = W_c * x, forward and
// backward: alone (q), as the mixer x + q(LN(x)), and as the mixture x + sum_k p_k q_k(LN(x)) of nested
// kernels 3, 5, .., each of which is the centre of the next.
//
// All three are computed by the same code. A kernel is a set of rings (levels): level j adds the taps between
// kernel j - 1 and kernel j to the a and b of level j - 1. The plain operator has one level, with share 1. Since
// c is linear, its mixture is a convolution by W_c, where each tap is multiplied by the sum of the shares of all
// kernels that contain it.
//
// A task is one image and one group of channels (the lanes of a vector). It streams rows: x is normalised and
// copied into a ring buffer of dense padded rows, so that all products and their gradients stay in cache, whatever
// the stride between positions. The forward pass for three, five and seven taps across, and most of the backward
// pass for three, use minimal filtering (winograd.h), since direct sums already run at the machine's peak. The
// backward pass keeps only x and recomputes a and b. Images are divided into slices that do not depend on the
// number of threads. Each slice sums its weight gradients separately, and the slices are added in order, so results
// are bitwise the same for any number of threads.
//
// Memory: x, y and their gradients are dense (B, H, W, C); weights are dense (C, 1, k, k).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "buffers.h"
#include "groups.h"
#include "sweeps.h"
#include "winograd.h"

namespace qnas {
namespace {

constexpr int kMaxLevels = 4;
constexpr int kMaxKernel = 9;
constexpr int kMaxSlices = 32;
constexpr int kBlockColumns = 64;         // positions that a weight gradient sums over before it is written
constexpr int kTiledWidth = 12;           // least width of a map at which minimal filtering is faster
constexpr double kThreadWork = 1 << 18;   // multiply-adds below which a second thread costs more

struct Level {
    int width;  // taps across
    int inner;  // taps across of the level before, to which this one adds; 0 for the first
};

struct Problem {
    int batch, height, width, channels;
    int kernel;       // size of the weights
    int taps;         // taps across that can meet the map; those beyond only meet padding
    bool mixed;       // a mixture with shares
    int levels;
    Level level[kMaxLevels];
    float share[kMaxLevels];   // share of each level's kernel
    float beyond[kMaxLevels];  // sum of the shares of all kernels that contain a level's taps
    const float* x;
    const float* norm_weight;  // null: no normalisation and no residual
    const float* norm_bias;
    float epsilon;
    int threads;

    Buffer packed;   // weights, group after group: (direction, branch, tap) vectors
    Buffer factors;  // of minimal filtering, group after group: (row, point, block, branch) vectors
    Buffer mean, rstd;

    int groups() const { return groups_of(channels); }
    int radius() const { return taps / 2; }
    int area() const { return taps * taps; }
    size_t places() const { return size_t(height) * width; }
    Group group(int index) const { return group_of(channels, index); }
    template <int V>
    const Vec<V>* weights(int group, bool flipped) const {
        const size_t at = (size_t(group) * 2 + flipped) * 3 * area() * kLanes;
        return reinterpret_cast<const Vec<V>*>(packed.get() + at);
    }
    template <int V, int K>
    Vec<V>* factors_of(int group) const {
        return reinterpret_cast<Vec<V>*>(factors.get() + size_t(group) * K * kFactors<K> * kLanes);
    }
    // The level of a tap, which follows from its distance from the centre.
    int level_of(int ky, int kx) const {
        const int reach = std::max(std::abs(ky - radius()), std::abs(kx - radius()));
        int j = 0;
        while (level[j].width / 2 < reach) ++j;
        return j;
    }
};

// Packs the weights. The backward pass needs them flipped as well, and the forward weights of c without the shares.
void pack(Problem& q, const float* const* weights, bool backward) {
    const int area = q.area(), cut = (q.kernel - q.taps) / 2;
    q.packed = zeros(size_t(q.groups()) * 2 * 3 * area * kLanes);
    for (int index = 0; index < q.groups(); ++index) {
        const Group group = q.group(index);
        const int lanes = group.narrow ? 8 : kLanes;
        float* to = q.packed.get() + size_t(index) * 6 * area * kLanes;
        for (int f = 0; f < 3; ++f) {
            for (int ky = 0; ky < q.taps; ++ky) {
                for (int kx = 0; kx < q.taps; ++kx) {
                    const float scale = f == 2 ? q.beyond[q.level_of(ky, kx)] : 1.0f;
                    const size_t stride = size_t(q.kernel) * q.kernel;
                    const float* from =
                        weights[f] + group.first * stride + (ky + cut) * q.kernel + kx + cut;
                    const int tap = ky * q.taps + kx;
                    float* forward = to + (f * area + tap) * lanes;
                    float* flipped = to + 3 * area * kLanes + (f * area + area - 1 - tap) * lanes;
                    for (int i = 0; i < group.count; ++i) {
                        const float scaled = scale * from[i * stride];
                        forward[i] = backward ? from[i * stride] : scaled;
                        if (backward) flipped[i] = scaled;
                    }
                }
            }
        }
    }
}

template <int K>
void make_factors(Problem& q) {
    q.factors = allocate(size_t(q.groups()) * K * kFactors<K> * kLanes);
    for (int index = 0; index < q.groups(); ++index) {
        with_lanes(q.group(index), [&](auto lanes) {
            constexpr int V = decltype(lanes)::value;
            const Vec<V>* weights = q.weights<V>(index, false);
            for (int ky = 0; ky < K; ++ky)
                transform_weights<V, K>(weights + ky * K, q.area(), q.factors_of<V, K>(index) + ky * kFactors<K>);
        });
    }
}

// Computes the mean and 1 / standard deviation over channels at the positions [begin, end).
void measure_places(const Problem& q, size_t begin, size_t end) {
    for (size_t place = begin; place < end; ++place) {
        const Moments found = moments(q.x + place * q.channels, q.channels, q.epsilon);
        q.mean[place] = found.mean, q.rstd[place] = found.scale;
    }
}

// Rows of one group in a ring: row r of the map is in slot r mod slots, with zeros at both ends.
template <int V>
struct Rows {
    Vec<V>* start;
    int slots, pitch;
    Vec<V>* operator[](int r) const { return start + size_t(r % slots) * pitch; }
};

// A task's buffers: rings of `slots` rows each, and single rows.
struct Scratch {
    int rings, slots, pitch, wide, tile;
    size_t ring_floats, row_floats, half;
    Buffer memory;

    Scratch(const Problem& q, int rings, int slots, int rows) : rings(rings), slots(slots) {
        tile = tile_columns(q.width);
        wide = std::max(q.width, tile);
        pitch = wide + 2 * q.radius();
        ring_floats = size_t(slots) * pitch * kLanes;
        row_floats = size_t(wide) * kLanes;
        half = rings * ring_floats + rows * row_floats;
        // a narrow group has memory of its own, since the zeros at the ends of its rows are at other addresses
        const bool narrow = q.group(q.groups() - 1).narrow;
        memory = zeros(narrow ? half + half / 2 : half);
    }
    template <int V>
    Rows<V> ring(int index) const {
        float* base = memory.get() + (V == kLanes ? 0 : half);
        const size_t floats = ring_floats / kLanes * V;
        return {reinterpret_cast<Vec<V>*>(base + index * floats), slots, pitch};
    }
    template <int V>
    Vec<V>* row(int index) const {
        float* base = memory.get() + (V == kLanes ? 0 : half);
        const size_t at = (rings * ring_floats + index * row_floats) / kLanes * V;
        return reinterpret_cast<Vec<V>*>(base + at);
    }
};

// Additional buffers for minimal filtering with K taps: a padded row of x and a ring of transformed rows.
template <int K>
struct TileScratch : Scratch {
    using W = Winograd<K>;
    int tiles, in_row;  // tiles in a map's row; vectors in a transformed row
    size_t line_vectors;
    Buffer tile_memory;

    TileScratch(const Problem& q, int rings, int slots) : Scratch(q, rings, slots, 0) {
        tiles = (q.width + W::kTile - 1) / W::kTile;
        in_row = W::kPoints * (tiles + W::kBlocks - 1);
        line_vectors = size_t(W::kTile) * (tiles + W::kBlocks - 1) + K;
        // a narrow group has a line of its own, since the zeros at its ends are at other addresses
        tile_memory = zeros((2 * line_vectors + size_t(slots + 1) * in_row) * kLanes);
    }
    template <int V>
    Vec<V>* line() const {
        return reinterpret_cast<Vec<V>*>(tile_memory.get() + (V == kLanes ? 0 : line_vectors * kLanes));
    }
    template <int V>
    Rows<V> transformed() const {
        return {reinterpret_cast<Vec<V>*>(tile_memory.get() + 2 * line_vectors * kLanes), slots, in_row};
    }
    // a transformed row of zeros
    template <int V>
    const Vec<V>* nothing() const {
        const size_t at = (2 * line_vectors + size_t(slots) * in_row) * kLanes;
        return reinterpret_cast<const Vec<V>*>(tile_memory.get() + at);
    }
};

// One task: a group of channels of one image.
template <int V>
struct Task {
    const Problem& q;
    const Scratch& scratch;
    int index;  // index of the group
    Group group;
    int image;
    size_t following;  // offset of the first row of the next task
    int distance;      // rows to prefetch ahead
    Convolve<V> full[kMaxLevels], ends[kMaxLevels] = {};

    Task(const Problem& q, const Scratch& scratch, int index, int image, int next_index, int next_image,
         int distance)
        : q(q),
          scratch(scratch),
          index(index),
          group(q.group(index)),
          image(image),
          following(next_image * q.places() * q.channels + next_index * kLanes),
          distance(distance) {
        for (int j = 0; j < q.levels; ++j) {
            const Level level = q.level[j];
            full[j] = sweep(level.width, 1);
            if (level.inner) ends[j] = sweep(2, level.width - 1);
        }
    }

    Convolve<V> sweep(int taps, int step) const {
        return choose_convolve<V>(taps, step, scratch.tile, scratch.wide == scratch.tile);
    }

    size_t offset(int row) const {
        return ((size_t(image) * q.height + row) * q.width) * q.channels + group.first;
    }

    // Offset to prefetch while `row` is processed, since the positions of a group are far apart in memory: a row
    // `distance` rows on, or beyond the end of this map a row of the next task.
    size_t soon(int row) const {
        const int target = row + distance;
        return target < q.height ? offset(target)
                                 : following + size_t(target - q.height) * q.width * q.channels;
    }

    // Offset to prefetch into the second-level cache while `row` is processed: a part of the image that this thread
    // will process next. The groups fetch one part each, in memory order, which is faster than group by group.
    size_t later(int row) const {
        const size_t places = size_t(index) * q.places() + size_t(row) * q.width;
        return (image + q.threads) * q.places() * q.channels + places * kLanes;
    }

    // The prefetches in one map while a row is processed column by column.
    struct Ahead {
        const float *soon, *later;
        size_t stride;
        void fetch(int column) const {
            __builtin_prefetch(soon + column * stride);
            __builtin_prefetch(later + column * kLanes, 0, 2);
        }
    };

    Ahead ahead(const float* map, int row) const {
        return {map + soon(row), map + later(row), size_t(q.channels)};
    }

    // Writes a row of x, normalised, to `out`. Without `Fetch`, the caller prefetches between its sums, since memory
    // cannot deliver a row at once. This saves 10% with three taps, but costs 4% with five and seven.
    template <bool Fetch = true>
    void read(Vec<V>* out, int row) const {
        const float* x = q.x + offset(row);
        const Ahead of_x = ahead(q.x, row);
        const int width = q.width, count = group.count;  // copies: otherwise read again after each store
        const size_t stride = q.channels;
        if (q.norm_weight == nullptr) {
            for (int c = 0; c < width; ++c) {
                if constexpr (Fetch) of_x.fetch(c);
                out[c] = count == V ? load<V>(x + c * stride, V) : load<V>(x + c * stride, count);
            }
            return;
        }
        const Vec<V> weight = load<V>(q.norm_weight + group.first, group.count);
        const Vec<V> bias = load<V>(q.norm_bias + group.first, group.count);
        const size_t place = (size_t(image) * q.height + row) * q.width;
        const float *mean = q.mean.get() + place, *rstd = q.rstd.get() + place;
        for (int c = 0; c < width; ++c) {
            if constexpr (Fetch) __builtin_prefetch(of_x.soon + c * stride);  // measure_places has read the image already
            const Vec<V> v = load<V>(x + c * stride, count);
            out[c] = (v - mean[c]) * rstd[c] * weight + bias;
        }
    }

    // Whether a level has all taps of row `ky`, or only the two ends beside the level before.
    bool is_full(int j, int ky) const {
        return q.level[j].inner == 0 || std::abs(ky - q.radius()) > q.level[j].inner / 2;
    }

    // Collects the taps of level j (its full rows, or its ends) at output row `row` of the map.
    int collect(int j, bool fulls, const Rows<V>& from, const Vec<V>* weights, int row, Taps<V>* to) const {
        const int margin = (q.taps - q.level[j].width) / 2;
        const int low = std::max(margin, q.radius() - row);
        const int high = std::min(q.taps - margin, q.height - row + q.radius());
        int count = 0;
        for (int ky = low; ky < high; ++ky) {
            if (is_full(j, ky) != fulls) continue;
            to[count++] = {from[row + ky - q.radius()] + margin, weights + ky * q.taps + margin};
        }
        return count;
    }

    // Computes a or b from x at each level, into one row of `out` for each.
    void branch(const Rows<V>& x, const Vec<V>* weights, int row, Vec<V>* const* out) const {
        Taps<V> taps[kMaxKernel];
        for (int j = 0; j < q.levels; ++j) {
            int count = collect(j, true, x, weights, row, taps);
            full[j](taps, count, j ? out[j - 1] : nullptr, out[j], scratch.wide);
            if (q.level[j].inner == 0) continue;
            count = collect(j, false, x, weights, row, taps);
            if (count) ends[j](taps, count, out[j], out[j], scratch.wide);
        }
    }

    // Computes the rows [begin, end) of y.
    void forward(float* y, int begin, int end) const {
        const int radius = q.radius(), area = q.area(), levels = q.levels;
        const Rows<V> x = scratch.ring<V>(0);
        Vec<V>*a[kMaxLevels], *b[kMaxLevels];
        for (int j = 0; j < levels; ++j) {
            a[j] = scratch.row<V>(2 * j);
            b[j] = scratch.row<V>(2 * j + 1);
        }
        Vec<V>* c = scratch.row<V>(2 * levels);
        const Vec<V>* weights = q.weights<V>(index, false);
        const Convolve<V> outermost = sweep(q.taps, 1);
        Taps<V> taps[kMaxKernel];
        int next = std::max(0, begin - radius);  // next row of x to read
        for (int row = begin; row < end; ++row) {
            for (; next < std::min(row + radius + 1, q.height); ++next) read(x[next] + radius, next);
            branch(x, weights, row, a);
            branch(x, weights + area, row, b);
            int count = 0;
            for (int ky = std::max(0, radius - row); ky < std::min(q.taps, q.height - row + radius); ++ky)
                taps[count++] = {x[row + ky - radius], weights + 2 * area + ky * q.taps};
            outermost(taps, count, nullptr, c, scratch.wide);
            float* out = y + offset(row);
            const float* soon = y + this->soon(row);
            const float* in = q.x + offset(row);
            for (int column = 0; column < q.width; ++column) {
                Vec<V> v = c[column];
                if (!q.mixed) {
                    v += a[0][column] * b[0][column];
                } else {
                    for (int j = 0; j < levels; ++j) v += q.share[j] * a[j][column] * b[j][column];
                }
                const size_t at = size_t(column) * q.channels;
                __builtin_prefetch(soon + at, 1);
                if (q.norm_weight != nullptr) v += load<V>(in + at, group.count);
                store<V>(out + at, v, group.count);
            }
        }
    }

    // The same with minimal filtering, for K taps across.
    template <int K>
    void forward_tiled(const TileScratch<K>& tiled, float* y, int begin, int end) const {
        const int tiles = tiled.tiles;
        int next = std::max(0, begin - K / 2);
        for (int row = begin; row < end; ++row) {
            for (; next < std::min(row + K / 2 + 1, q.height); ++next) read_tiled(tiled, next);
            const Vec<V>*rows[K], *of_row[K];
            const int count = collect_tiled(tiled, row, rows, of_row);
            const Line to_y = line_of(y, row, K / 2);
            for_tiles<Winograd<K>::kTiles>(tiles, [&](auto group, int tile) {
                put<K, decltype(group)::value>(rows, of_row, count, tile, to_y);
            });
        }
    }

    // Writes a row of x, normalised and transformed, to its slot in the ring.
    template <int K>
    void read_tiled(const TileScratch<K>& tiled, int row) const {
        using W = Winograd<K>;
        const int tiles = tiled.tiles;
        Vec<V>* const line = tiled.template line<V>();
        Vec<V>* const to = tiled.template transformed<V>()[row];
        read<K != 3>(line + K / 2, row);
        constexpr int kKept = W::kInputs - W::kTile;
        Vec<V> in[W::kInputs];  // each is read once: a compiler must assume that writes change them
        UNROLL for (int i = 0; i < kKept; ++i) in[i] = line[i];
        for (int t = 0; t < tiles + W::kBlocks - 1; ++t) {
            UNROLL for (int i = kKept; i < W::kInputs; ++i) in[i] = line[W::kTile * t + i];
            W::input(in, to + W::kPoints * t);
            UNROLL for (int i = 0; i < kKept; ++i) in[i] = in[i + W::kTile];
        }
    }

    // Collects the transformed rows of x for output row `row`, and the factors of each.
    template <int K>
    int collect_tiled(const TileScratch<K>& tiled, int row, const Vec<V>** rows, const Vec<V>** of_row) const {
        const Rows<V> x = tiled.template transformed<V>();
        const Vec<V>* const factors = q.factors_of<V, K>(index);
        int count = 0;
        for (int ky = std::max(0, K / 2 - row); ky < std::min(K, q.height - row + K / 2); ++ky) {
            rows[count] = x[row + ky - K / 2];
            of_row[count++] = factors + ky * kFactors<K>;
        }
        return count;
    }

    // Where to write a row of y, and the row of x to add to it.
    struct Line {
        const float* x;  // null without a norm
        float* y;
        const float* soon;
        size_t stride;
        int width, count;
        Ahead of_x;
    };

    Line line_of(float* y, int row, int radius) const {
        const float* x = q.norm_weight == nullptr ? nullptr : q.x + offset(row);
        return {x, y + offset(row), y + soon(row), size_t(q.channels), q.width, group.count,
                ahead(q.x, row + radius)};
    }

    // Computes T tiles of y. The line is a copy, which need not be read again after each store.
    template <int K, int T>
    void put(const Vec<V>* const* rows, const Vec<V>* const* of_row, int taps, int tile, Line line) const {
        using W = Winograd<K>;
        constexpr int kTile = W::kTile;
        Vec<V> sums[3][T][kTile] = {};
        convolve_tiled<V, K, 3, T>(rows, of_row, taps, tile * W::kPoints, sums);
        const int first = tile * kTile;
        if (line.x == nullptr && line.count == V && first + T * kTile <= line.width) {
            UNROLL for (int i = 0; i < T * kTile; ++i) {
                const size_t at = (first + i) * line.stride;
                if constexpr (K == 3) line.of_x.fetch(first + i);
                __builtin_prefetch(line.soon + at, 1);
                const int t = i / kTile, n = i % kTile;
                store<V>(line.y + at, sums[0][t][n] * sums[1][t][n] + sums[2][t][n], V);
            }
            return;
        }
        UNROLL for (int i = 0; i < T * kTile; ++i) {
            if (first + i >= line.width) break;
            const size_t at = (first + i) * line.stride;
            if constexpr (K == 3) line.of_x.fetch(first + i);
            __builtin_prefetch(line.soon + at, 1);
            const int t = i / kTile, n = i % kTile;
            Vec<V> v = sums[0][t][n] * sums[1][t][n] + sums[2][t][n];
            if (line.x != nullptr) v += load<V>(line.x + at, line.count);
            store<V>(line.y + at, v, line.count);
        }
    }

    // Writes the gradient of the operator's input to `dx` (with a norm: of the norm's output; null: not needed), and
    // adds to `sums` the gradients of the three weights, in the packed order, and that of each level's share through
    // a b. The gradient of c's weights is without the shares. Without `to_weights`, there are no weight gradients,
    // and the gradient of a share is that through a b + c.
    void backward(const float* grad, float* dx, Vec<V>* sums, int block, bool to_weights) const {
        const int radius = q.radius(), area = q.area(), levels = q.levels;
        const Rows<V> x = scratch.ring<V>(0), g = scratch.ring<V>(1);
        Rows<V> ga[kMaxLevels], gb[kMaxLevels];
        Vec<V>*a[kMaxLevels], *b[kMaxLevels], *c[kMaxLevels];
        const bool linear = q.mixed && !to_weights;
        Correlate<V> all[kMaxLevels] = {}, two[kMaxLevels] = {};
        for (int j = 0; j < levels; ++j) {
            ga[j] = scratch.ring<V>(2 + 2 * j);
            gb[j] = scratch.ring<V>(3 + 2 * j);
            a[j] = scratch.row<V>(2 * j);
            b[j] = scratch.row<V>(2 * j + 1);
            c[j] = scratch.row<V>(2 * levels + 1 + j);
            all[j] = choose_correlate<V>(q.level[j].width, 1);
            if (q.level[j].inner) two[j] = choose_correlate<V>(2, q.level[j].width - 1);
        }
        Vec<V>* to_x = scratch.row<V>(2 * levels);
        const Vec<V>* weights = q.weights<V>(index, false);
        int next = 0, next_dx = 0;
        for (int begin = 0; begin < q.height; begin += block) {
            const int end = std::min(begin + block, q.height);
            for (int row = begin; row < end; ++row) {
                for (; next < std::min(row + radius + 1, q.height); ++next) read(x[next] + radius, next);
                branch(x, weights, row, a);
                branch(x, weights + area, row, b);
                if (linear) branch(x, weights + 2 * area, row, c);
                spread(grad, a, b, linear ? c : nullptr, g[row] + radius, ga, gb, row, sums + 3 * area);
            }
            for (int j = 0; j < levels && to_weights; ++j)
                correlate_level(j, x, g, ga[j], gb[j], begin, end, all[j], two[j], sums);
            const int ready = end == q.height ? end : end - radius;
            for (; next_dx < ready; ++next_dx) {
                if (dx != nullptr) gather(g, ga, gb, next_dx, to_x, dx + offset(next_dx));
            }
        }
    }

    // The same for three taps across: a, b and the weight gradients by minimal filtering, the gradient of x by direct
    // sums, since each of its three fields would have to be transformed for a single kernel.
    void backward_tiled(const TileScratch<3>& tiled, const float* grad, float* dx, Vec<V>* sums, int block,
                        bool to_weights) const {
        const Rows<V> g = scratch.ring<V>(0), ga = scratch.ring<V>(1), gb = scratch.ring<V>(2);
        const Rows<V> x = tiled.template transformed<V>();
        Vec<V> at_points[3][3][Winograd<3>::kPoints] = {};  // by row of taps, and kernel
        const Vec<V>* rows[kBlockColumns + 2];
        Fields<V> fields[kBlockColumns];
        int next = 0, next_dx = 0;
        for (int begin = 0; begin < q.height; begin += block) {
            const int end = std::min(begin + block, q.height), count = end - begin;
            for (int row = begin; row < end; ++row) {
                for (; next < std::min(row + 2, q.height); ++next) read_tiled(tiled, next);
                spread_tiled(tiled, grad, row, g[row] + 1, ga[row] + 1, gb[row] + 1);
            }
            if (to_weights) {
                for (int i = 0; i < count + 2; ++i) {
                    const int row = begin + i - 1;
                    rows[i] = row < 0 || row == q.height ? tiled.template nothing<V>() : x[row];
                }
                for (int i = 0; i < count; ++i) {
                    const int row = begin + i;
                    fields[i][0] = ga[row] + 1, fields[i][1] = gb[row] + 1, fields[i][2] = g[row] + 1;
                }
                correlate_tiled<V, 3, 2>(rows, fields, count, tiled.tiles, at_points);
                correlate_tiled<V, 3, 1>(rows + 2, fields, count, tiled.tiles, at_points + 2);
            }
            const int ready = end == q.height ? end : end - 1;
            for (; next_dx < ready; ++next_dx)
                if (dx != nullptr) gather_three(g, ga, gb, next_dx, dx + offset(next_dx));
        }
        for (int ky = 0; ky < 3; ++ky)
            for (int f = 0; f < 3; ++f)
                transform_gradient<V, 3>(at_points[ky][f], sums + f * q.area() + 3 * ky);
    }

    // Computes the gradients of c, a and b along one row, for three taps across.
    void spread_tiled(const TileScratch<3>& tiled, const float* grad, int row, Vec<V>* g, Vec<V>* to_a,
                      Vec<V>* to_b) const {
        const float* from = grad + offset(row);
        // copies, which need not be read again after each store
        const int width = q.width, lanes = group.count, tiles = tiled.tiles;
        const size_t stride = q.channels;
        for (int c = 0; c < width; ++c) g[c] = load<V>(from + c * stride, lanes);
        const Vec<V>*rows[3], *of_row[3];
        const int count = collect_tiled(tiled, row, rows, of_row);
        const Ahead of_x = ahead(q.x, row + 1), of_grad = ahead(grad, row);
        for_tiles<Winograd<3>::kTiles>(tiles, [&](auto group, int tile) {
            constexpr int T = decltype(group)::value, kTile = Winograd<3>::kTile;
            spread_tiles<T>(rows, of_row, count, tile, g, to_a, to_b);
            UNROLL for (int i = 0; i < T * kTile; ++i) {
                of_x.fetch(tile * kTile + i);
                of_grad.fetch(tile * kTile + i);
            }
        });
    }

    // T tiles of the gradients of a and b. Beyond the map's end, g is zero, and so are they.
    template <int T>
    void spread_tiles(const Vec<V>* const* rows, const Vec<V>* const* of_row, int taps, int tile,
                      const Vec<V>* g, Vec<V>* to_a, Vec<V>* to_b) const {
        using W = Winograd<3>;
        Vec<V> sums[2][T][W::kTile] = {};
        convolve_tiled<V, 3, 2, T>(rows, of_row, taps, tile * W::kPoints, sums);
        UNROLL for (int i = 0; i < T * W::kTile; ++i) {
            const int column = tile * W::kTile + i, t = i / W::kTile, n = i % W::kTile;
            to_a[column] = g[column] * sums[1][t][n];
            to_b[column] = g[column] * sums[0][t][n];
        }
    }

    // Computes one row of the input's gradient, for three taps across.
    void gather_three(const Rows<V>& g, const Rows<V>& ga, const Rows<V>& gb, int row, float* dx) const {
        const Vec<V>* weights = q.weights<V>(index, true);
        Taps<V> taps[9];
        int count = collect(0, true, ga, weights, row, taps);
        count += collect(0, true, gb, weights + 9, row, taps + count);
        count += collect(0, true, g, weights + 18, row, taps + count);
        const int width = q.width, lanes = group.count;
        const size_t stride = q.channels;
        const float* soon = dx + 2 * width * stride;
        constexpr int kMost = kLanes == 16 ? 8 : 4;
        with_constant<1, 2, 4, 7, 8>(tile_columns(width, kMost), [&](auto tile) {
            if constexpr (tile <= kMost)
                convolve_to<V, 3, tile>(taps, count, std::max<int>(tile, width), [=](int column, Vec<V> sum) {
                    if (column >= width) return;
                    const size_t at = column * stride;
                    __builtin_prefetch(soon + at, 1);
                    store<V>(dx + at, sum, lanes);
                });
        });
    }

    // Computes the gradients of c, and of a and b at each level, along one row. `linear` is c at each level if its
    // part of the shares' gradient is needed, otherwise null.
    void spread(const float* of_map, Vec<V>* const* a, Vec<V>* const* b, Vec<V>* const* linear, Vec<V>* g,
                const Rows<V>* ga, const Rows<V>* gb, int row, Vec<V>* sums) const {
        const int levels = q.levels, width = q.width, lanes = group.count;
        const size_t stride = q.channels;
        const float* grad = of_map + offset(row);
        const Ahead of_grad = ahead(of_map, row);
        if (!q.mixed) {
            Vec<V>*to_a = ga[0][row] + q.radius(), *to_b = gb[0][row] + q.radius();
            const Vec<V>*const of_a = a[0], *const of_b = b[0];
            for (int c = 0; c < width; ++c) {
                of_grad.fetch(c);
                const Vec<V> v = load<V>(grad + c * stride, lanes);
                g[c] = v;
                to_a[c] = v * of_b[c];
                to_b[c] = v * of_a[c];
            }
            return;
        }
        Vec<V>*to_a[kMaxLevels], *to_b[kMaxLevels];
        Vec<V> products[kMaxLevels];
        for (int j = 0; j < levels; ++j) {
            to_a[j] = ga[j][row] + q.radius();
            to_b[j] = gb[j][row] + q.radius();
            products[j] = sums[j];
        }
        for (int c = 0; c < width; ++c) {
            of_grad.fetch(c);
            const Vec<V> v = load<V>(grad + c * stride, lanes);
            g[c] = v;
            Vec<V> for_a{}, for_b{};
            for (int j = levels - 1; j >= 0; --j) {  // a ring's taps belong to its own and all larger kernels
                const Vec<V> va = v * a[j][c], vb = v * b[j][c];
                products[j] += va * b[j][c];
                if (linear != nullptr) products[j] += v * linear[j][c];
                for_a += q.share[j] * vb;
                for_b += q.share[j] * va;
                to_a[j][c] = for_a;
                to_b[j][c] = for_b;
            }
        }
        for (int j = 0; j < levels; ++j) sums[j] = products[j];
    }

    void correlate_level(int j, const Rows<V>& x, const Rows<V>& g, const Rows<V>& ga, const Rows<V>& gb,
                         int begin, int end, Correlate<V> all, Correlate<V> two, Vec<V>* sums) const {
        const int radius = q.radius(), margin = (q.taps - q.level[j].width) / 2;
        Pairing<V> pairs[kBlockColumns];
        for (int ky = margin; ky < q.taps - margin; ++ky) {
            int count = 0;
            const int low = std::max(begin, radius - ky), high = std::min(end, q.height + radius - ky);
            for (int row = low; row < high; ++row) {
                pairs[count++] = {x[row + ky - radius] + margin,
                                  {ga[row] + radius, gb[row] + radius, g[row] + radius}};
            }
            if (count == 0) continue;
            Vec<V>* const first = sums + ky * q.taps + margin;
            Vec<V>* const to[3] = {first, first + q.area(), first + 2 * q.area()};
            (is_full(j, ky) ? all : two)(pairs, count, q.width, to);
        }
    }

    // Computes one row of the input's gradient: the fields convolved with the flipped kernels.
    void gather(const Rows<V>& g, const Rows<V>* ga, const Rows<V>* gb, int row, Vec<V>* line,
                float* dx) const {
        const int area = q.area(), top = q.levels - 1;
        const Vec<V>* weights = q.weights<V>(index, true);
        Taps<V> taps[3 * kMaxKernel];
        int count = 0;
        for (int ky = std::max(0, q.radius() - row); ky < std::min(q.taps, q.height - row + q.radius()); ++ky)
            taps[count++] = {g[row + ky - q.radius()], weights + 2 * area + ky * q.taps};
        count += collect(top, true, ga[top], weights, row, taps + count);
        count += collect(top, true, gb[top], weights + area, row, taps + count);
        full[top](taps, count, nullptr, line, scratch.wide);
        for (int j = top; j >= 0; --j) {
            if (j != top) {
                count = collect(j, true, ga[j], weights, row, taps);
                count += collect(j, true, gb[j], weights + area, row, taps + count);
                if (count) full[j](taps, count, line, line, scratch.wide);
            }
            if (q.level[j].inner == 0) continue;
            count = collect(j, false, ga[j], weights, row, taps);
            count += collect(j, false, gb[j], weights + area, row, taps + count);
            if (count) ends[j](taps, count, line, line, scratch.wide);
        }
        const int width = q.width, lanes = group.count;
        const size_t stride = q.channels;
        const float* soon = dx + 2 * width * stride;
        for (int c = 0; c < width; ++c) {
            __builtin_prefetch(soon + c * stride, 1);
            store<V>(dx + c * stride, line[c], lanes);
        }
    }
};

// The backward pass of the norm for one image. Replaces the gradient of the norm's output in `dx` by that of x,
// including the residual, and adds to the gradients of weight and bias.
void finish_norm(const Problem& q, int image, const float* grad, float* dx, float* to_weight,
                 float* to_bias) {
    constexpr int V = kLanes;
    const int channels = q.channels;
    for (size_t place = image * q.places(); place < (image + 1) * q.places(); ++place) {
        const float* x = q.x + place * channels;
        const float* g = grad + place * channels;
        float* d = dx + place * channels;
        const float mean = q.mean[place], rstd = q.rstd[place];
        Vec<V> sums{}, products{};
        for_vectors(channels, [&](int c, int n) {
            const Vec<V> out = load<V>(d + c, n);
            const Vec<V> unit = (load<V>(x + c, n) - mean) * rstd;  // arbitrary in lanes beyond n, where `out` is zero
            const Vec<V> scaled = out * load<V>(q.norm_weight + c, n);
            sums += scaled;
            products += scaled * unit;
            store<V>(to_weight + c, load<V>(to_weight + c, n) + out * unit, n);
            store<V>(to_bias + c, load<V>(to_bias + c, n) + out, n);
        });
        const float by_one = sum<V>(sums) / channels, by_unit = sum<V>(products) / channels;
        for_vectors(channels, [&](int c, int n) {
            const Vec<V> unit = (load<V>(x + c, n) - mean) * rstd;
            const Vec<V> scaled = load<V>(d + c, n) * load<V>(q.norm_weight + c, n);
            store<V>(d + c, load<V>(g + c, n) + rstd * (scaled - by_one - unit * by_unit), n);
        });
    }
}

int useful_threads(const Problem& q, int branches) {
    const double work = double(q.batch) * q.places() * q.channels * q.area() * branches;
    return std::max(1, std::min(q.threads, int(work / kThreadWork)));
}

Problem make_problem(const int64_t* sizes, float epsilon, const float* const* in, bool backward) {
    Problem q{};
    q.batch = sizes[0], q.channels = sizes[1], q.height = sizes[2], q.width = sizes[3];
    q.kernel = sizes[4], q.threads = sizes[5];
    q.x = in[0], q.norm_weight = in[4], q.norm_bias = in[5], q.epsilon = epsilon;
    const float* const shares = in[6];
    const int reach = 2 * std::max(q.height, q.width) - 1;
    q.taps = std::max(1, std::min(q.kernel, reach));
    q.mixed = shares != nullptr;
    q.levels = 1;
    q.level[0] = {q.taps, 0};
    q.share[0] = q.beyond[0] = 1.0f;
    if (q.mixed) {
        // kernels beyond the map's reach act as the largest one within it, so their shares are added
        q.levels = 0;
        for (int kernel = 3; kernel <= q.kernel; kernel += 2) {
            const float share = shares[(kernel - 3) / 2];
            const int width = std::min(kernel, q.taps);
            if (q.levels && q.level[q.levels - 1].width == width) {
                q.share[q.levels - 1] += share;
                continue;
            }
            const int inner = q.levels ? q.level[q.levels - 1].width : 0;
            q.level[q.levels] = {width, inner};
            q.share[q.levels++] = share;
        }
        float total = 0.0f;
        for (int j = q.levels - 1; j >= 0; --j) q.beyond[j] = total += q.share[j];
    }
    pack(q, in + 1, backward);
    if (q.norm_weight != nullptr) {
        q.mean = zeros(q.batch * q.places());
        q.rstd = zeros(q.batch * q.places());
    }
    return q;
}

// Whether minimal filtering is faster than direct sums. With five and seven taps it is not on narrow maps, where
// direct sums skip the padding.
bool is_tiled(const Problem& q) {
    return !q.mixed && (q.taps == 3 || ((q.taps == 5 || q.taps == 7) && q.width >= kTiledWidth));
}

// Calls run(task, scratch, begin, end) for all tasks and bands of rows, in parallel. `make` makes a thread's scratch.
template <class Make, class Run>
void for_tasks(const Problem& q, Make&& make, Run&& run) {
    const int threads = useful_threads(q, 3), groups = q.groups();
    const int tasks = q.batch * groups;
    // divide maps into bands of rows if there are few tasks per thread
    const int wanted = tasks < 4 * threads && threads > 1 ? (4 * threads + tasks - 1) / tasks : 1;
    const int bands = std::max(1, std::min(wanted, q.height / q.taps));
    // images to measure together: a single thread takes one, which is then still in cache
    const int step = threads == 1 && q.norm_weight != nullptr ? 1 : q.batch;
    // a thread takes the groups of an image one after another, since they are adjacent in memory
    const int chunk = threads == 1 ? std::max(1, tasks) : tasks < 8 * threads * groups ? 1 : groups;
#pragma omp parallel num_threads(threads)
    {
        const auto scratch = make();
        for (int first = 0; first < q.batch; first += step) {
            if (q.norm_weight != nullptr) {
#pragma omp for schedule(static)
                for (int line = first * q.height; line < (first + step) * q.height; ++line)
                    measure_places(q, size_t(line) * q.width, size_t(line + 1) * q.width);
            }
#pragma omp for schedule(dynamic, chunk)
            for (int task = first * groups * bands; task < (first + step) * groups * bands; ++task) {
                const int band = task % bands, group = task / bands % groups;
                const int image = task / bands / groups;
                const int begin = q.height * band / bands, end = q.height * (band + 1) / bands;
                with_lanes(q.group(group), [&](auto lanes) {
                    const int after = group + 1 < groups ? group + 1 : 0, next = after ? image : image + 1;
                    const Task<decltype(lanes)::value> one(q, scratch, group, image, after, next, 2);
                    run(one, scratch, begin, end);
                });
            }
        }
    }
}

void run_forward(Problem& q, float* y) {
    if (!is_tiled(q)) {
        return for_tasks(
            q, [&] { return Scratch(q, 1, q.taps, 2 * q.levels + 1); },
            [&](const auto& task, const Scratch&, int begin, int end) { task.forward(y, begin, end); });
    }
    with_constant<3, 5, 7>(q.taps, [&](auto taps) {
        using Tiled = TileScratch<decltype(taps)::value>;
        make_factors<taps>(q);
        for_tasks(
            q, [&] { return Tiled(q, 0, q.taps); },
            [&](const auto& task, const Tiled& tiled, int begin, int end) { task.forward_tiled(tiled, y, begin, end); });
    });
}

struct Gradients {
    float* x;            // may be null if the norm's gradients are not needed
    float* weights[3];   // (C, 1, k, k); all null or none
    float* norm_weight;  // null, with its bias, if not needed
    float* norm_bias;
    float* shares;       // of the kernels 3, 5, ..; null without shares
};

void run_backward(Problem& q, const float* const* weights, const float* grad, const Gradients& to) {
    const int threads = useful_threads(q, 8), groups = q.groups(), area = q.area();
    const int slices = std::min(q.batch, kMaxSlices);
    const int per_group = 3 * area + q.levels;  // vectors
    const size_t padded = size_t(groups) * kLanes;
    const size_t per_slice = padded * (per_group + 2);
    const Buffer sums = zeros(slices * per_slice);
    const bool normed = q.norm_weight != nullptr;
    const bool to_weights = to.weights[0] != nullptr;
    const int block =
        std::max(1, std::min(q.height, (kBlockColumns + q.width - 1) / std::max(1, q.width)));
    // the backward pass of a norm needs all channels of an image
    const int parts = normed ? 1 : groups;
    // called by all threads, which share the work
    const auto run = [&](const auto& scratch, auto&& backward) {
#pragma omp for schedule(dynamic)
        for (int task = 0; task < slices * parts; ++task) {
            const int slice = task / parts, part = task % parts;
            float* own = sums.get() + slice * per_slice;
            float* for_norm = own + padded * per_group;
            const int begin = int64_t(q.batch) * slice / slices;
            const int end = int64_t(q.batch) * (slice + 1) / slices;
            for (int image = begin; image < end; ++image) {
                if (normed) measure_places(q, image * q.places(), (image + 1) * q.places());
                for (int group = normed ? 0 : part; group < (normed ? groups : part + 1); ++group) {
                    with_lanes(q.group(group), [&](auto lanes) {
                        constexpr int V = decltype(lanes)::value;
                        auto* mine = reinterpret_cast<Vec<V>*>(own + size_t(group) * per_group * kLanes);
                        // the next task: without a norm another image of this group, with a norm another group
                        // of this image; after the last of these, the first of the next group or image
                        int next_group = group, next_image = image;
                        int& inner = normed ? next_group : next_image;
                        int& outer = normed ? next_image : next_group;
                        if (++inner == (normed ? groups : end)) inner = normed ? 0 : begin, ++outer;
                        backward(Task<V>(q, scratch, group, image, next_group, next_image, 2), mine);
                    });
                }
                if (normed && to.x != nullptr) finish_norm(q, image, grad, to.x, for_norm, for_norm + padded);
            }
        }
    };
    const bool tiled = q.taps == 3 && is_tiled(q);
    if (tiled) make_factors<3>(q);
#pragma omp parallel num_threads(threads)
    if (tiled) {
        const TileScratch<3> scratch(q, 3, block + 2);
        run(scratch, [&](const auto& task, auto* sums) {
            task.backward_tiled(scratch, grad, to.x, sums, block, to_weights);
        });
    } else {
        const Scratch scratch(q, 2 + 2 * q.levels, block + 2 * q.radius(), 3 * q.levels + 1);
        run(scratch, [&](const auto& task, auto* sums) { task.backward(grad, to.x, sums, block, to_weights); });
    }
    // slices are added in order, regardless of which thread computed them
    const int cut = (q.kernel - q.taps) / 2;
    const size_t stride = size_t(q.kernel) * q.kernel;
    for (int f = 0; f < 3; ++f) {
        if (to.weights[f] != nullptr) std::memset(to.weights[f], 0, q.channels * stride * sizeof(float));
    }
    double products[kMaxLevels] = {}, linear[kMaxLevels] = {};
    std::unique_ptr<float[]> total(new float[size_t(per_group) * kLanes]);
    for (int index = 0; index < groups; ++index) {
        const Group group = q.group(index);
        const int lanes = group.narrow ? 8 : kLanes, count = per_group * lanes;
        std::memset(total.get(), 0, count * sizeof(float));
        for (int slice = 0; slice < slices; ++slice) {
            const float* own = sums.get() + slice * per_slice + size_t(index) * per_group * kLanes;
            for (int i = 0; i < count; ++i) total[i] += own[i];
        }
        for (int f = 0; f < 3; ++f) {
            if (to.weights[f] == nullptr) continue;
            for (int ky = 0; ky < q.taps; ++ky) {
                for (int kx = 0; kx < q.taps; ++kx) {
                    const int j = q.level_of(ky, kx);
                    const size_t at = group.first * stride + (ky + cut) * q.kernel + kx + cut;
                    const float* from = total.get() + (f * area + ky * q.taps + kx) * lanes;
                    for (int i = 0; i < group.count; ++i) {
                        to.weights[f][at + i * stride] = f == 2 ? from[i] * q.beyond[j] : from[i];
                        if (f == 2 && q.mixed)
                            linear[j] += double(from[i]) * weights[2][at + i * stride];
                    }
                }
            }
        }
        const float* outputs = total.get() + 3 * area * lanes;
        for (int i = 0; i < group.count; ++i) {
            for (int j = 0; j < q.levels; ++j) products[j] += outputs[j * lanes + i];
        }
    }
    if (to.shares != nullptr) {
        // q_k = a_k b_k + c_k, where c_k sums the linear terms of all levels within k
        double within = 0.0;
        int j = 0;
        for (int kernel = 3; kernel <= q.kernel; kernel += 2) {
            if (kernel == 3) within += linear[0];
            else if (j + 1 < q.levels && q.level[j + 1].width == kernel) within += linear[++j];
            to.shares[(kernel - 3) / 2] = float(products[j] + within);
        }
    }
    if (to.norm_weight != nullptr) {
        for (int c = 0; c < q.channels; ++c) {
            float weight = 0.0f, bias = 0.0f;
            for (int slice = 0; slice < slices; ++slice) {
                const float* own = sums.get() + slice * per_slice + padded * per_group;
                weight += own[c];
                bias += own[padded + c];
            }
            to.norm_weight[c] = weight;
            to.norm_bias[c] = bias;
        }
    }
}

}  // namespace
}  // namespace qnas

extern "C" {

int qnas_lanes() { return qnas::kLanes; }

// `sizes`: batch, channels, height, width, kernel, threads. `in`: x, w_a, w_b, w_c, the norm's weight and bias, the
// shares. Without a norm (null) there is no residual. The shares are null for a single kernel, otherwise one for
// each of the kernels 3, 5, .., k. `out`: y.
void qnas_quadratic_forward(const int64_t* sizes, float epsilon, const float* const* in, float* const* out) {
    qnas::Problem q = qnas::make_problem(sizes, epsilon, in, false);
    qnas::run_forward(q, out[0]);
}

// `in` has y's gradient in addition, at the end. `out`: the gradients of the inputs of the forward pass, in their
// order; a null one is not computed.
void qnas_quadratic_backward(const int64_t* sizes, float epsilon, const float* const* in, float* const* out) {
    qnas::Problem q = qnas::make_problem(sizes, epsilon, in, true);
    qnas::run_backward(q, in + 1, in[7],
                       {out[0], {out[1], out[2], out[3]}, out[4], out[5], out[6]});
}

}  // extern "C"
