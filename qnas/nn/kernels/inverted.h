// An inverted residual in training, y = [x +] N3(PW2(A(N2(DW(A(N1(PW1(x)))))))), with batch norms N, an activation A
// and a depthwise convolution DW: forward, and backward. Without an expansion it begins with DW.
//
// In torch's operators, the time goes into passes over memory: each norm and each activation reads and writes maps of
// many times the input's channels. Here only the maps before the norms (h1, h2, h3) are stored, and each pass over
// one does all there is to do: a convolution adds up the statistics of its result while it is in cache, and whoever
// reads a map normalises and activates on the way. These maps are in groups of channels, (groups, rows, kLanes), whose
// rows are dense vectors for the depthwise convolution and the vectors of a product's tiles.
//
// Results are bitwise the same for any number of threads: rows are divided into chunks and images into slices that do
// not depend on it, and threads share rows where rows are independent and panels where sums run over rows.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "batch_norm.h"
#include "depthwise.h"
#include "products.h"

namespace qnas {
namespace inverted {

constexpr int V = kLanes;
using Floats = Vec<V>;

constexpr int64_t kChunkRows = 126;      // a multiple of every kTileRows
constexpr double kThreadWork = 1 << 20;  // multiply-adds below which a second thread costs more
constexpr double kPassWork = 8;          // of a pass over memory, for each number
constexpr double kTapWork = 4;           // of a depthwise convolution, for each multiply-add

struct Parameters {
    const float *expand, *norm1[2], *depthwise, *norm2[2], *project, *norm3[2];  // norms: weight, bias
};

struct Block {
    Depthwise dw;  // of the hidden channels
    int64_t c_in, hidden, c_out;
    Activation act;
    bool has_expand, is_residual;
    int threads;
    float epsilon;

    int64_t rows_in() const { return int64_t(dw.batch) * dw.height * dw.width; }
    int64_t rows_out() const { return int64_t(dw.batch) * dw.out_height() * dw.out_width(); }
    int64_t wide() const { return panels_of(hidden); }
    // `work` in multiply-adds of a product. An operation that waits for memory counts as several.
    int useful_threads(double work) const { return std::max(1, std::min(threads, int(work / kThreadWork))); }
};

// Rows in chunks of about the same number, a multiple of a tile's.
struct Chunks {
    int64_t rows, size;

    explicit Chunks(int64_t rows) : rows(rows) {
        const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
        size = ((rows + chunks - 1) / chunks + kTileRows - 1) / kTileRows * kTileRows;
    }
    int64_t count() const { return (rows + size - 1) / size; }
    int64_t rows_of(int64_t chunk) const { return std::min(size, rows - chunk * size); }
};

// Copies rows [start, start + count) of a dense map, (rows, channels), into panels.
inline void copy_rows(const float* from, int64_t channels, int64_t start, int64_t count, const Panels& to, int64_t at) {
    for (int64_t r = 0; r < count; ++r) {
        const float* row = from + (start + r) * channels;
        for_vectors(channels, [&](int64_t c, int n) { store<V>(to.of(at + r, c), load<V>(row + c, n), n); });
    }
}

// Reads a row of the depthwise convolution's input: h1, normalised and activated, or x itself.
struct Input {
    const Block& q;
    Grouped h1;
    const float* x;
    const Norm* norm;  // null without an expansion

    template <class Put>
    void read(int64_t group, int64_t row, const Put& put) const {
        if (norm == nullptr) {
            const int n = int(std::min<int64_t>(V, q.hidden - group * V));
            const float* from = x + row * q.hidden + group * V;
            for (int c = 0; c < q.dw.width; ++c, from += q.hidden) put(c, load<V>(from, n));
            return;
        }
        const Coefficients k = norm->at(group);
        const float* from = h1.at(group, row);
        with_kind(q.act.kind, [&](auto kind) {
            const Activation act = q.act;
            for (int c = 0; c < q.dw.width; ++c, from += V)
                put(c, act.value<decltype(kind)::value>(load<V>(from, V) * k.scale + k.shift));
        });
    }
};

// The maps before the norms, and the mean and the variance of each.
struct Stored {
    Grouped h1, h2, h3;
    float* statistics[6];
};

inline Block block_of(const int64_t* sizes, float epsilon) {
    const Depthwise dw{int(sizes[0]), int(sizes[4]), int(sizes[1]), int(sizes[2]),
                       int(sizes[6]), int(sizes[7]), int(sizes[8]), int(sizes[9])};
    const Kind kind = sizes[10] == 2 ? Kind::hswish : Kind::clamp;
    const float top = sizes[10] == 0 ? 6.0f : std::numeric_limits<float>::infinity();
    return {dw, sizes[3], sizes[4], sizes[5], {kind, top}, sizes[11] != 0, sizes[12] != 0, int(sizes[13]), epsilon};
}

inline Parameters parameters_of(const float* const* in) {
    return {in[0], {in[1], in[2]}, in[3], {in[4], in[5]}, in[6], {in[7], in[8]}};
}

inline Stored stored_of(const Block& q, float* const* at) {
    return {{at[0], q.rows_in()},
            {at[1], q.rows_out()},
            {at[2], q.rows_out()},
            {at[3], at[4], at[5], at[6], at[7], at[8]}};
}

}  // namespace inverted
}  // namespace qnas
