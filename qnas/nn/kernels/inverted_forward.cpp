// The forward pass of an inverted residual in training (inverted.h).

#include <algorithm>
#include <cstdint>

#include "inverted.h"

namespace qnas {
namespace inverted {
namespace {

// Stores the sums of a tile of panel p, those of rows below `end` and of groups of the map.
template <int N, int T>
inline void store_tile(const Grouped& to, int64_t p, int64_t row, int64_t end, const Floats (&sums)[T][N]) {
    UNROLL for (int t = 0; t < T; ++t) {
        if (row + t >= end) break;
        UNROLL for (int v = 0; v < N; ++v) store<V>(to.at(2 * p + v, row + t), sums[t][v], V);
    }
}

// Computes a pointwise convolution, with weights (c_out, c_in), of rows that read(start, count, panels) writes into
// panels, and the statistics of the result.
template <class Read>
void pointwise(const Block& q, int64_t rows, int64_t c_in, int64_t c_out, const float* weight, const Read& read,
               const Grouped& to, float* mean, float* variance) {
    const Chunks chunks(rows);
    const Parts parts(chunks.count(), c_out);
    const Buffer weights = allocate(panels_of(c_out) * kPanel * c_in);
    pack_weights(weight, c_in, c_out, 1, c_in, weights.get());
#pragma omp parallel num_threads(q.useful_threads(double(rows) * c_in * c_out))
    {
        const Buffer memory = zeros(chunks.size * panels_of(c_in) * kPanel);
        const Panels from{memory.get(), chunks.size};
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) {
            const int64_t start = chunk * chunks.size, count = chunks.rows_of(chunk);
            read(start, count, from);
            for (int64_t p = 0; p < panels_of(c_out); ++p) {
                with_vectors(c_out - p * kPanel, [&](auto vectors) {
                    constexpr int N = decltype(vectors)::value;
                    multiply<N>(from, c_in, weights.get() + p * c_in * kPanel, nullptr, 0, count,
                                [&](int64_t row, const auto& sums) {
                                    store_tile<N>(to, p, start + row, start + count, sums);
                                });
                    for (int64_t group = 2 * p; group < 2 * p + N; ++group) {
                        RowMoments moments;
                        moments.add(to.at(group, start), count);
                        moments.store_to(parts.first(chunk, group), parts.second(chunk, group));
                    }
                });
            }
        }
    }
    parts.merge_moments([&](int64_t chunk) { return chunks.rows_of(chunk); }, mean, variance);
}

// What the depthwise convolution reads and writes for a group of one image.
struct ForwardMaps {
    const Input& input;
    const Depthwise& dw;
    int64_t group, image;
    Grouped h2;
    RowMoments& moments;

    template <class Put>
    void read_x(int row, const Put& put) const {
        input.read(group, (image * dw.height + row) * dw.width, put);
    }
    template <class Put>
    void read_grad(int, const Put&) const {}
    float* target(int row) const { return h2.at(group, (image * dw.out_height() + row) * dw.out_width()); }
    int64_t step() const { return V; }
    int lanes() const { return V; }
    void finish(int row) { moments.add(target(row), dw.out_width()); }
};

void depthwise_forward(const Block& q, const Input& input, const float* weight, const Grouped& h2, float* mean,
                       float* variance) {
    const int64_t groups = groups_of(int(q.hidden)), per_group = int64_t(q.dw.area()) * V;
    const Parts parts(q.dw.batch, q.hidden);
    const Buffer taps = zeros(groups * per_group);
    for (int64_t group = 0; group < groups; ++group)
        pack_taps(q.dw, weight, group_of(int(q.hidden), int(group)), V, [&](int tap) { return q.dw.packed(tap); },
                  taps.get() + group * per_group);
#pragma omp parallel num_threads(q.useful_threads(kTapWork * q.dw.work()))
    {
        const Scratch scratch = Scratch::forward(q.dw);
        const Buffer sums = allocate((q.dw.out_width() + kMostColumns) * V);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < groups * q.dw.batch; ++task) {
            const int64_t group = task % groups, image = task / groups;
            RowMoments moments;
            ForwardMaps maps{input, q.dw, group, image, h2, moments};
            Task<V, ForwardMaps>{q.dw, scratch, maps,
                                 reinterpret_cast<const Floats*>(taps.get() + group * per_group)}
                .forward(reinterpret_cast<Floats*>(sums.get()));
            moments.store_to(parts.first(image, group), parts.second(image, group));
        }
    }
    const int64_t places = int64_t(q.dw.out_height()) * q.dw.out_width();
    parts.merge_moments([=](int64_t) { return places; }, mean, variance);
}

// Normalises and activates rows of a map into panels.
void activate_rows(const Block& q, const Grouped& map, const Norm& norm, int64_t start, int64_t count,
                   const Panels& to) {
    for (int64_t group = 0; group < groups_of(int(q.hidden)); ++group) {
        const Coefficients k = norm.at(group);
        const float* from = map.at(group, start);
        float* out = to.of(0, group * V);
        with_kind(q.act.kind, [&](auto kind) {
            for (int64_t r = 0; r < count; ++r)
                store<V>(out + r * kPanel,
                         q.act.value<decltype(kind)::value>(load<V>(from + r * V, V) * k.scale + k.shift), V);
        });
    }
}

// y = N3(h3), plus x in a residual block.
void finish_forward(const Block& q, const Grouped& h3, const Norm& norm3, const float* x, float* y) {
    const Chunks chunks(h3.rows);
#pragma omp parallel for num_threads(q.useful_threads(kPassWork * h3.rows * q.c_out))
    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) {
        const int64_t start = chunk * chunks.size, end = start + chunks.rows_of(chunk);
        for_vectors(q.c_out, [&](int64_t c, int n) {
            const Coefficients k = norm3.at(c / V);
            for (int64_t row = start; row < end; ++row) {
                Floats value = load<V>(h3.at(c / V, row), V) * k.scale + k.shift;
                if (q.is_residual) value += load<V>(x + row * q.c_out + c, n);
                store<V>(y + row * q.c_out + c, value, n);
            }
        });
    }
}

void run_forward(const Block& q, const float* x, const Parameters& w, const Stored& stored, float* y) {
    float* const* s = stored.statistics;
    if (q.has_expand)
        pointwise(
            q, q.rows_in(), q.c_in, q.hidden, w.expand,
            [&](int64_t start, int64_t count, const Panels& to) { copy_rows(x, q.c_in, start, count, to, 0); },
            stored.h1, s[0], s[1]);
    const Norm norm1(q.has_expand ? q.hidden : 0, w.norm1[0], w.norm1[1], s[0], s[1], q.epsilon);
    const Input input{q, stored.h1, x, q.has_expand ? &norm1 : nullptr};
    depthwise_forward(q, input, w.depthwise, stored.h2, s[2], s[3]);
    const Norm norm2(q.hidden, w.norm2[0], w.norm2[1], s[2], s[3], q.epsilon);
    pointwise(
        q, q.rows_out(), q.hidden, q.c_out, w.project,
        [&](int64_t start, int64_t count, const Panels& to) { activate_rows(q, stored.h2, norm2, start, count, to); },
        stored.h3, s[4], s[5]);
    finish_forward(q, stored.h3, Norm(q.c_out, w.norm3[0], w.norm3[1], s[4], s[5], q.epsilon), x, y);
}

}  // namespace
}  // namespace inverted
}  // namespace qnas

extern "C" {

// `sizes`: batch, height and width of x, channels of x, of the hidden maps and of y, kernel, stride, rows and columns
// of padding before the map, activation (0 ReLU6, 1 ReLU, 2 Hardswish), whether there is an expansion, whether x is
// added, threads. `in`: x, and weights: expand (e, c), norm1 (weight, bias), depthwise (e, 1, k, k), norm2, project
// (c, e), norm3; null for those of an expansion that is not there. `out`: y; h1, h2 and h3 in groups of channels; mean
// and (biased) variance of each norm.
void qnas_inverted_forward(const int64_t* sizes, float epsilon, const float* const* in, float* const* out) {
    const qnas::inverted::Block q = qnas::inverted::block_of(sizes, epsilon);
    qnas::inverted::run_forward(q, in[0], qnas::inverted::parameters_of(in + 1),
                                qnas::inverted::stored_of(q, out + 1), out[0]);
}

}  // extern "C"
