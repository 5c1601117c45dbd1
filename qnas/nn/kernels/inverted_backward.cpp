// The backward pass of an inverted residual in training (inverted.h).

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "inverted.h"

namespace qnas {
namespace inverted {
namespace {

// The gradients of the inputs; null where not needed, but for those of norms.
struct Gradients {
    float *x, *expand, *norm1[2], *depthwise, *norm2[2], *project, *norm3[2];
};

// Sums over rows for N3: of y's gradient, and of its product with the normalised h3.
void sum_output(const Block& q, const Grouped& h3, const Norm& norm3, const float* grad, float* const to[2]) {
    const Chunks chunks(h3.rows);
    const Parts parts(chunks.count(), q.c_out);
#pragma omp parallel for num_threads(q.useful_threads(kPassWork * h3.rows * q.c_out))
    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) {
        const int64_t start = chunk * chunks.size, end = start + chunks.rows_of(chunk);
        for_vectors(q.c_out, [&](int64_t c, int n) {
            const Coefficients k = norm3.at(c / V);
            Floats sums{}, products{};
            for (int64_t row = start; row < end; ++row) {
                const Floats g = load<V>(grad + row * q.c_out + c, n);
                sums += g;
                products += g * k.normalised(load<V>(h3.at(c / V, row), V));
            }
            store<V>(parts.first(chunk, c / V), sums, V);
            store<V>(parts.second(chunk, c / V), products, V);
        });
    }
    parts.merge_sums(to[1], to[0]);
}

// How threads share a product's rows and a sum's panels. Several threads process more rows at a time, since they wait
// for one another twice each time.
struct Share {
    Chunks chunks;
    int threads;
    int64_t size;

    Share(const Block& q, int64_t rows, double work)
        : chunks(rows), threads(int(std::min<int64_t>(q.useful_threads(work), q.wide()))) {
        size = chunks.size * std::min<int64_t>(threads == 1 ? 1 : 4 * threads, chunks.count());
    }
    // A thread always has the same rows of maps: others may still read theirs from the time before.
    int64_t row(int thread, int all) const { return size / kTileRows * thread / all * kTileRows; }
};

int64_t tiled(int64_t channels) { return (channels + kTileTerms - 1) / kTileTerms * kTileTerms; }

// Computes g2, the gradient of N2(h2), and its sums, and the gradient of PW2's weights.
void project_backward(const Block& q, const Stored& stored, const Norm& norm2, const Norm& norm3, const float* grad,
                      const float* weight, const Grouped& g2, float* to_weight, float* const to_norm2[2]) {
    const int64_t rows = q.rows_out(), c_out = q.c_out, narrow = panels_of(c_out), wide = q.wide();
    const Share share(q, rows, double(rows) * q.hidden * c_out);
    const int64_t chunk = share.chunks.size;
    const Buffer weights = allocate(wide * kPanel * c_out), maps = zeros(share.size * narrow * kPanel);
    pack_weights(weight, c_out, q.hidden, q.hidden, 1, weights.get());
    const Panels grads{maps.get(), share.size};
    const Buffer of_weights = zeros(wide * tiled(c_out) * kPanel), sums = zeros(2 * wide * kPanel);
    const Panels total{of_weights.get(), tiled(c_out)};
#pragma omp parallel num_threads(share.threads)
    {
        const int own = omp_get_thread_num(), all = omp_get_num_threads();
        const Buffer memory = zeros(2 * chunk * kPanel);
        float *const inner = memory.get(), *const activated = inner + chunk * kPanel;
        for (int64_t start = 0; start < rows; start += share.size) {
            const int64_t count = std::min(share.size, rows - start);
            const int64_t begin = std::min(count, share.row(own, all)), end = std::min(count, share.row(own + 1, all));
            for_vectors(c_out, [&](int64_t c, int n) {
                const Coefficients k = norm3.at(c / V);
                for (int64_t r = begin; r < end; ++r) {
                    const Floats g = load<V>(grad + (start + r) * c_out + c, n);
                    store<V>(grads.of(r, c), k.back(load<V>(stored.h3.at(c / V, start + r), V), g), n);
                }
            });
#pragma omp barrier
            for (int64_t p = wide * own / all; p < wide * (own + 1) / all; ++p) {
                with_vectors(q.hidden - p * kPanel, [&](auto vectors) {
                    constexpr int N = decltype(vectors)::value;
                    for (int64_t row = 0; row < count; row += chunk) {  // sums run over a chunk, then over all chunks
                        const int64_t part = std::min(chunk, count - row);
                        multiply_to<N>(grads, c_out, weights.get() + p * c_out * kPanel, nullptr, row, row + part,
                                       inner);
                        for (int v = 0; v < N; ++v) {
                            const int64_t group = 2 * p + v;
                            const Coefficients k = norm2.at(group);
                            const float* h = stored.h2.at(group, start + row);
                            float *const g = g2.at(group, start + row), *const at = sums.get() + 2 * group * V;
                            Floats s{}, product{};
                            with_kind(q.act.kind, [&](auto kind) {
                                constexpr Kind K = decltype(kind)::value;
                                for (int64_t r = 0; r < part; ++r) {
                                    const Floats value = load<V>(h + r * V, V), z = value * k.scale + k.shift;
                                    const Floats back = q.act.back<K>(z, load<V>(inner + r * kPanel + v * V, V));
                                    store<V>(activated + r * kPanel + v * V, q.act.value<K>(z), V);
                                    store<V>(g + r * V, back, V);
                                    s += back;
                                    product += back * k.normalised(value);
                                }
                            });
                            store<V>(at, load<V>(at, V) + s, V);
                            store<V>(at + V, load<V>(at + V, V) + product, V);
                        }
                        if (to_weight != nullptr) accumulate<N>(grads, row, c_out, activated, part, total.at(p, 0));
                    }
                });
            }
#pragma omp barrier
        }
    }
    for (int64_t e = 0; e < q.hidden; ++e) {
        to_norm2[1][e] = sums[2 * (e / V) * V + e % V];
        to_norm2[0][e] = sums[(2 * (e / V) + 1) * V + e % V];
    }
    for (int64_t c = 0; c < c_out && to_weight != nullptr; ++c)
        for (int64_t p = 0; p < wide; ++p)
            std::copy_n(total.at(p, c), std::min<int64_t>(kPanel, q.hidden - p * kPanel),
                        to_weight + c * q.hidden + p * kPanel);
}

// What the depthwise convolution's gradients read and write for a group of one image. Results are written to `row`
// first. With stride 1, g1 may be in the memory of g2: all rows of g2 that are still needed were copied.
struct BackwardMaps {
    const Input& input;
    const Depthwise& dw;
    const Norm& norm2;
    int64_t group, image;
    Grouped h2, g2, g1;
    const float* residual;  // added to dx, may be null
    float* dx;              // without an expansion
    float* row_of_results;
    Floats sums{}, products{};

    template <class Put>
    void read_x(int row, const Put& put) const {
        input.read(group, (image * dw.height + row) * dw.width, put);
    }
    template <class Put>
    void read_grad(int row, const Put& put) const {
        const Coefficients k = norm2.at(group);
        const int64_t at = (image * dw.out_height() + row) * dw.out_width();
        const float *h = h2.at(group, at), *g = g2.at(group, at);
        for (int c = 0; c < dw.out_width(); ++c) put(c, k.back(load<V>(h + c * V, V), load<V>(g + c * V, V)));
    }
    float* target(int) const { return row_of_results; }
    int64_t step() const { return V; }
    int lanes() const { return V; }
    void finish(int row) {
        const int64_t at = (image * dw.height + row) * dw.width;
        if (input.norm == nullptr) {
            const int64_t channels = input.q.hidden, offset = at * channels + group * V;
            const int n = int(std::min<int64_t>(V, channels - group * V));
            for (int c = 0; c < dw.width; ++c) {
                Floats value = load<V>(row_of_results + c * V, V);
                if (residual != nullptr) value += load<V>(residual + offset + c * channels, n);
                store<V>(dx + offset + c * channels, value, n);
            }
            return;
        }
        const Coefficients k = input.norm->at(group);
        const float* h = input.h1.at(group, at);
        float* const to = g1.at(group, at);
        Floats s{}, product{};
        with_kind(input.q.act.kind, [&](auto kind) {
            const Activation act = input.q.act;
            for (int c = 0; c < dw.width; ++c) {
                const Floats value = load<V>(h + c * V, V);
                const Floats g = act.back<decltype(kind)::value>(value * k.scale + k.shift,
                                                                 load<V>(row_of_results + c * V, V));
                store<V>(to + c * V, g, V);
                s += g;
                product += g * k.normalised(value);
            }
        });
        sums += s;
        products += product;
    }
};

// Computes the gradient of the depthwise convolution's weights and g1, the gradient of N1(h1), with its sums; without
// an expansion, dx.
void depthwise_backward(const Block& q, const Input& input, const Stored& stored, const Norm& norm2,
                        const float* weight, const Grouped& g2, const Grouped& g1, const float* grad,
                        const Gradients& to) {
    const int64_t groups = groups_of(int(q.hidden)), per_group = int64_t(q.dw.area()) * V;
    const Slices slices{q.dw.batch};
    const bool needs_x = q.has_expand || to.x != nullptr;
    const Buffer flipped = zeros(groups * per_group);
    for (int64_t group = 0; group < groups; ++group)
        pack_taps(q.dw, weight, group_of(int(q.hidden), int(group)), V, [&](int tap) { return q.dw.flipped(tap); },
                  flipped.get() + group * per_group);
    const Buffer sums = zeros(to.depthwise == nullptr ? 0 : slices.count() * groups * per_group);
    const Parts parts(q.has_expand ? slices.count() : 0, q.hidden);
#pragma omp parallel num_threads(q.useful_threads(2 * kTapWork * q.dw.work()))
    {
        const Scratch scratch = Scratch::backward(q.dw);
        const Buffer row = zeros((q.dw.width + 2) * V);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < slices.count() * groups; ++task) {
            const int64_t slice = task / groups, group = task % groups;
            auto* own = to.depthwise == nullptr ? nullptr : reinterpret_cast<Floats*>(sums.get() + task * per_group);
            const auto* weights = reinterpret_cast<const Floats*>(flipped.get() + group * per_group);
            BackwardMaps maps{input, q.dw, norm2, group,     0,        stored.h2,
                              g2,    g1,   q.is_residual ? grad : nullptr, to.x, row.get()};
            for (maps.image = slices.begin(int(slice)); maps.image < slices.end(int(slice)); ++maps.image)
                Task<V, BackwardMaps>{q.dw, scratch, maps, weights}.backward(needs_x, own);
            if (!q.has_expand) continue;
            store<V>(parts.first(slice, group), maps.sums, V);
            store<V>(parts.second(slice, group), maps.products, V);
        }
    }
    if (q.has_expand) parts.merge_sums(to.norm1[1], to.norm1[0]);
    for (int64_t group = 0; group < groups && to.depthwise != nullptr; ++group)
        merge_taps(q.dw, group_of(int(q.hidden), int(group)), V, sums.get() + group * per_group, groups * per_group,
                   to.depthwise);
}

// Computes the gradients of x and of PW1's weights from g1.
void expand_backward(const Block& q, const Grouped& h1, const Grouped& g1, const Norm& norm1, const float* x,
                     const float* weight, const float* grad, float* dx, float* to_weight) {
    const int64_t rows = q.rows_in(), c_in = q.c_in, narrow = panels_of(c_in), wide = q.wide();
    const Share share(q, rows, double(rows) * q.hidden * c_in);
    const int64_t chunk = share.chunks.size;
    const Buffer weights = allocate(narrow * kPanel * q.hidden);
    pack_weights(weight, q.hidden, c_in, c_in, 1, weights.get());
    const Buffer maps = zeros(share.size * (narrow + wide) * kPanel);
    const Panels from{maps.get(), share.size}, slope{from.at(narrow, 0), share.size};
    const Buffer of_weights = zeros(wide * tiled(c_in) * kPanel);
    const Panels total{of_weights.get(), tiled(c_in)};
#pragma omp parallel num_threads(share.threads)
    {
        const int own = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t start = 0; start < rows; start += share.size) {
            const int64_t count = std::min(share.size, rows - start);
            const int64_t begin = std::min(count, share.row(own, all)), end = std::min(count, share.row(own + 1, all));
            copy_rows(x, c_in, start + begin, end - begin, from, begin);
#pragma omp barrier
            for (int64_t p = wide * own / all; p < wide * (own + 1) / all; ++p) {
                with_vectors(q.hidden - p * kPanel, [&](auto vectors) {
                    constexpr int N = decltype(vectors)::value;
                    for (int64_t row = 0; row < count; row += chunk) {
                        const int64_t part = std::min(chunk, count - row);
                        for (int v = 0; v < N; ++v) {
                            const Coefficients k = norm1.at(2 * p + v);
                            const float *h = h1.at(2 * p + v, start + row), *g = g1.at(2 * p + v, start + row);
                            float* const out = slope.at(p, row) + v * V;
                            for (int64_t r = 0; r < part; ++r)
                                store<V>(out + r * kPanel, k.back(load<V>(h + r * V, V), load<V>(g + r * V, V)), V);
                        }
                        if (to_weight != nullptr)
                            accumulate<N>(from, row, c_in, slope.at(p, row), part, total.at(p, 0));
                    }
                });
            }
#pragma omp barrier
            for (int64_t p = 0; p < narrow && dx != nullptr; ++p) {
                const int64_t left = c_in - p * kPanel, offset = start * c_in + p * kPanel;
                with_vectors(left, [&](auto vectors) {
                    constexpr int N = decltype(vectors)::value;
                    multiply<N>(slope, q.hidden, weights.get() + p * q.hidden * kPanel, nullptr, begin, end,
                                [&](int64_t row, const auto& sums) {
                                    constexpr int T = std::extent_v<std::remove_reference_t<decltype(sums)>>;
                                    UNROLL for (int t = 0; t < T; ++t) {
                                        if (row + t >= end) break;
                                        UNROLL for (int v = 0; v < N; ++v) {
                                            const int n = int(std::min<int64_t>(V, left - v * V));
                                            const int64_t at = offset + (row + t) * c_in + v * V;
                                            Floats value = sums[t][v];
                                            if (q.is_residual) value += load<V>(grad + at, n);
                                            store<V>(dx + at, value, n);
                                        }
                                    }
                                });
                });
            }
        }
    }
    for (int64_t e = 0; e < q.hidden && to_weight != nullptr; ++e)
        for (int64_t c = 0; c < c_in; ++c) to_weight[e * c_in + c] = total.of(c, e)[0];
}

void run_backward(const Block& q, const float* x, const Parameters& w, const Stored& stored, const float* grad,
                  const Gradients& to) {
    float* const* s = stored.statistics;
    Norm norm1(q.has_expand ? q.hidden : 0, w.norm1[0], w.norm1[1], s[0], s[1], q.epsilon);
    Norm norm2(q.hidden, w.norm2[0], w.norm2[1], s[2], s[3], q.epsilon);
    Norm norm3(q.c_out, w.norm3[0], w.norm3[1], s[4], s[5], q.epsilon);
    sum_output(q, stored.h3, norm3, grad, to.norm3);
    norm3.set_sums(to.norm3[1], to.norm3[0], q.c_out, q.rows_out());
    const int64_t width = padded(q.hidden);
    const Buffer of_h2 = allocate(q.rows_out() * width);
    const Grouped g2{of_h2.get(), q.rows_out()};
    project_backward(q, stored, norm2, norm3, grad, w.project, g2, to.project, to.norm2);
    norm2.set_sums(to.norm2[1], to.norm2[0], q.hidden, q.rows_out());
    const bool is_apart = q.has_expand && q.dw.stride > 1;
    const Buffer of_h1 = allocate(is_apart ? q.rows_in() * width : 0);
    const Grouped g1{is_apart ? of_h1.get() : of_h2.get(), q.rows_in()};
    const Input input{q, stored.h1, x, q.has_expand ? &norm1 : nullptr};
    depthwise_backward(q, input, stored, norm2, w.depthwise, g2, g1, grad, to);
    if (!q.has_expand) return;
    norm1.set_sums(to.norm1[1], to.norm1[0], q.hidden, q.rows_in());
    expand_backward(q, stored.h1, g1, norm1, x, w.expand, grad, to.x, to.expand);
}

}  // namespace
}  // namespace inverted
}  // namespace qnas

extern "C" {

// `in`: those of the forward pass, then its outputs without y, then y's gradient. `out`: the gradients of the forward
// pass's inputs in their order. Null ones, which those of norms must not be, are not computed.
void qnas_inverted_backward(const int64_t* sizes, float epsilon, const float* const* in, float* const* out) {
    const qnas::inverted::Block q = qnas::inverted::block_of(sizes, epsilon);
    // these are only read
    const qnas::inverted::Stored stored = qnas::inverted::stored_of(q, const_cast<float* const*>(in + 10));
    qnas::inverted::run_backward(q, in[0], qnas::inverted::parameters_of(in + 1), stored, in[19],
                                 {out[0], out[1], {out[2], out[3]}, out[4], {out[5], out[6]}, out[7],
                                  {out[8], out[9]}});
}

}  // extern "C"
