// The channel half of a QuadraBlock, y = x + PW2(GELU(PW1(LN(x)))), on rows of channels (the memory of a
// channels_last map): forward, and backward from x alone.
//
// Rows are processed in chunks that stay in cache, one panel of hidden channels after another (products.h defines
// panels). Each number is written in the layout that the next product reads, and GELU finds it in cache. The
// norm's scale is folded into PW1's weights and its shift into PW1's bias, so that neither takes a pass over rows.
// Nor do their gradients, which follow from that of the scaled weights.
//
// Threads share rows where rows are independent, and hidden panels where sums run over rows. Sums add their
// terms in order, so results are bitwise the same for any number of threads.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "buffers.h"
#include "products.h"

namespace qnas {
namespace {

constexpr int V = kLanes;
using Floats = Vec<V>;
using Ints = typename Lanes<V>::Int;

constexpr int64_t kChunkRows = 126;      // a multiple of every kTileRows
constexpr double kThreadWork = 1 << 20;  // multiply-adds below which a second thread costs more

// Beyond this limit, the normal distribution function is 0 or 1 in float32.
constexpr float kLimit = 5.42f;

// first u^n + .. + others[n - 1]
template <class... C>
inline Floats polynomial(Floats u, float first, C... others) {
    Floats value = broadcast<V>(first);
    ((value = value * u + others), ...);
    return value;
}

// The normal distribution function as 1/2 + x P(x^2) / Q(x^2), fitted by least squares that are reweighted to
// minimise the maximal error, which is 6e-9 in exact arithmetic and 2e-7 as computed.
inline Floats normal_cdf(Floats x) {
    Floats c = x > kLimit ? kLimit + Floats{} : x;
    c = c < -kLimit ? -kLimit + Floats{} : c;
    const Floats u = c * c;
    const Floats p = polynomial(u, 2.325692365915248e-08f, 6.357511327534115e-06f, 1.651812126279947e-04f,
                                4.655848806963157e-03f, 3.346484432194966e-02f, 3.989422433901239e-01f);
    const Floats q = polynomial(u, 1.2126442747938534e-06f, 7.263351013026391e-05f, 1.8638304368607536e-03f,
                                2.8429959014092773e-02f, 2.505499823941442e-01f, 1.0f);
    const Floats cdf = c * (p / q) + 0.5f;
    return x < -kLimit ? Floats{} : cdf;  // GELU would multiply a rounding error here by x
}

// The normal density: 2^n times a polynomial of degree 5 for 2^f / sqrt(2 pi), f in [-1/2, 1/2], fitted in the
// same way to a relative error of 7e-8.
inline Floats normal_density(Floats x) {
    const Floats square = x * x;
    const auto is_far = square > kLimit * kLimit;
    const Floats power = (is_far ? Floats{} : square) * -0.72134752044f;  // log2 exp(-x^2 / 2)
    const Ints n = __builtin_convertvector(power - 0.5f, Ints);  // power <= 0, so this rounds to the nearest
    const Floats f = power - __builtin_convertvector(n, Floats);
    const Floats e = polynomial(f, 5.296545023e-04f, 3.859982516e-03f, 2.214414214e-02f, 9.583439223e-02f,
                                2.765256317e-01f, 3.989423090e-01f);
    const Ints bits = reinterpret_cast<Ints>(e) + (n << 23);
    return is_far ? Floats{} : reinterpret_cast<Floats>(bits);
}

struct Half {
    int64_t rows, channels, hidden;
    float epsilon;
    const float *x, *norm_weight, *norm_bias, *expand, *expand_bias, *project, *project_bias;
    int threads;

    Half(const int64_t* sizes, float epsilon, const float* const* in)
        : rows(sizes[0]), channels(sizes[1]), hidden(sizes[2]), epsilon(epsilon), x(in[0]), norm_weight(in[1]),
          norm_bias(in[2]), expand(in[3]), expand_bias(in[4]), project(in[5]), project_bias(in[6]),
          threads(sizes[3]) {}

    int64_t wide() const { return panels_of(hidden); }
    int64_t narrow() const { return panels_of(channels); }
    // Rows of a chunk. All chunks have about the same number.
    int64_t chunk() const {
        const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
        return ((rows + chunks - 1) / chunks + kTileRows - 1) / kTileRows * kTileRows;
    }
    int useful_threads() const {
        return std::max(1, std::min(threads, int(double(rows) * channels * hidden / kThreadWork)));
    }
};

// PW1 with the norm's scale folded into its weights and the shift into its bias: the weights as (e, c) and in
// panels for the product with normalised rows, and the bias in panels.
struct Expansion {
    Buffer matrix, weights, shift;

    explicit Expansion(const Half& q)
        : matrix(allocate(q.hidden * q.channels)),
          weights(allocate(q.wide() * kPanel * q.channels)),
          shift(zeros(q.wide() * kPanel)) {
        for (int64_t e = 0; e < q.hidden; ++e) {
            Floats sums{};
            for_vectors(q.channels, [&](int64_t c, int n) {
                const Floats weight = load<V>(q.expand + e * q.channels + c, n);
                sums += weight * load<V>(q.norm_bias + c, n);
                store<V>(matrix.get() + e * q.channels + c, weight * load<V>(q.norm_weight + c, n), n);
            });
            shift[e] = q.expand_bias[e] + sum<V>(sums);
        }
        pack_weights(matrix.get(), q.channels, q.hidden, 1, q.channels, weights.get());
    }
};

// to = (row - mean) / sqrt(variance + epsilon). Returns 1 / sqrt(variance + epsilon).
inline float normalise(const Half& q, int64_t row, const Panels& to, int64_t at) {
    const float* x = q.x + row * q.channels;
    const auto [mean, scale] = moments(x, q.channels, q.epsilon);
    for_vectors(q.channels, [&, mean = mean, scale = scale](int64_t c, int n) {
        store<V>(to.of(at, c), (load<V>(x + c, n) - mean) * scale, n);
    });
    return scale;
}

void run_forward(const Half& q, float* y) {
    const Expansion expansion(q);
    const Buffer project = allocate(q.narrow() * kPanel * q.hidden), bias = zeros(q.narrow() * kPanel);
    pack_weights(q.project, q.hidden, q.channels, 1, q.hidden, project.get());
    std::copy(q.project_bias, q.project_bias + q.channels, bias.get());
    const int threads = q.useful_threads();
    const int64_t size = std::min(q.chunk(), (q.rows / threads / kTileRows + 1) * kTileRows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Buffer narrow = zeros(size * q.narrow() * kPanel), wide = zeros(size * q.wide() * kPanel);
        const Panels normed{narrow.get(), size}, activated{wide.get(), size};
#pragma omp for schedule(dynamic)
        for (int64_t start = 0; start < q.rows; start += size) {
            const int64_t rows = std::min(size, q.rows - start);
            for (int64_t r = 0; r < rows; ++r) normalise(q, start + r, normed, r);
            for (int64_t p = 0; p < q.wide(); ++p) {
                with_vectors(q.hidden - p * kPanel, [&](auto vectors) {
                    constexpr int N = decltype(vectors)::value;
                    float* const to = activated.at(p, 0);
                    multiply_to<N>(normed, q.channels, expansion.weights.get() + p * q.channels * kPanel,
                                   expansion.shift.get() + p * kPanel, 0, rows, to);
                    for (int64_t i = 0; i < rows * kPanel; i += kPanel) {
                        for (int v = 0; v < N * V; v += V) {
                            const Floats h = load<V>(to + i + v, V);
                            store<V>(to + i + v, h * normal_cdf(h), V);
                        }
                    }
                });
            }
            for (int64_t p = 0; p < q.narrow(); ++p) {
                const int64_t left = q.channels - p * kPanel;
                const int64_t offset = start * q.channels + p * kPanel;
                with_vectors(left, [&](auto vectors) {
                    constexpr int N = decltype(vectors)::value;
                    multiply<N>(activated, q.hidden, project.get() + p * q.hidden * kPanel,
                                bias.get() + p * kPanel, 0, rows, [&](int64_t row, const auto& sums) {
                                    constexpr int T = std::extent_v<std::remove_reference_t<decltype(sums)>>;
                                    UNROLL for (int t = 0; t < T; ++t) {
                                        if (row + t >= rows) break;
                                        UNROLL for (int v = 0; v < N; ++v) {
                                            const int n = int(std::min<int64_t>(V, left - v * V));
                                            const int64_t at = offset + (row + t) * q.channels + v * V;
                                            store<V>(y + at, load<V>(q.x + at, n) + sums[t][v], n);
                                        }
                                    }
                                });
                });
            }
        }
    }
}

struct Gradients {
    float* x;
    float *norm_weight, *norm_bias, *expand, *expand_bias;  // all null or none
    float *project, *project_bias;                          // both null or neither
};

// Computes GELU(h) for the rows of a panel and replaces the gradient of GELU(h) by that of h, whose sums over
// rows it adds to `total`.
template <int N>
inline void gelu_backward(const float* h, float* activated, float* grad, int64_t rows, float* total) {
    Floats sums[N];
    for (int v = 0; v < N; ++v) sums[v] = Floats{};
    for (int64_t i = 0; i < rows * kPanel; i += kPanel) {
        UNROLL for (int v = 0; v < N; ++v) {
            const Floats value = load<V>(h + i + v * V, V);
            const Floats cdf = normal_cdf(value);
            const Floats slope = load<V>(grad + i + v * V, V) * (cdf + value * normal_density(value));
            store<V>(activated + i + v * V, value * cdf, V);
            store<V>(grad + i + v * V, slope, V);
            sums[v] += slope;
        }
    }
    for (int v = 0; v < N; ++v) store<V>(total + v * V, load<V>(total + v * V, V) + sums[v], V);
}

// Computes the rows [begin, end) of dx from the gradient of the normalised rows.
inline void normalise_backward(const Half& q, const float* grad, const Panels& to_normed, const Panels& normed,
                               const float* rstd, int64_t start, int64_t begin, int64_t end, float* dx) {
    const int64_t channels = q.channels;
    for (int64_t r = begin; r < end; ++r) {
        const int64_t at = (start + r) * channels;
        Floats sums{}, products{};
        for_vectors(channels, [&](int64_t c, int n) {
            const Floats g = load<V>(to_normed.of(r, c), n);
            sums += g;
            products += g * load<V>(normed.of(r, c), n);
        });
        const float mean = sum<V>(sums) / channels, slope = sum<V>(products) / channels, scale = rstd[r];
        for_vectors(channels, [&](int64_t c, int n) {
            const Floats centred = load<V>(to_normed.of(r, c), n) - mean - load<V>(normed.of(r, c), n) * slope;
            store<V>(dx + at + c, load<V>(grad + at + c, n) + centred * scale, n);
        });
    }
}

void run_backward(const Half& q, const float* grad, const Gradients& to) {
    const int64_t channels = q.channels, hidden = q.hidden, wide = q.wide(), narrow = q.narrow();
    const bool expand_too = to.expand != nullptr, project_too = to.project != nullptr;
    const int threads = int(std::min<int64_t>(q.useful_threads(), wide));
    // several threads process more rows at a time, since they wait for one another twice each time
    const int64_t chunk = q.chunk(), together = threads == 1 ? 1 : 4 * threads;
    const int64_t size = chunk * std::min(together, (q.rows + chunk - 1) / chunk);
    const Expansion expansion(q);
    const Buffer project = allocate(wide * kPanel * channels), back = allocate(narrow * kPanel * hidden);
    pack_weights(q.project, channels, hidden, hidden, 1, project.get());
    pack_weights(expansion.matrix.get(), hidden, channels, channels, 1, back.get());
    const Buffer maps = zeros(size * (3 * narrow + wide) * kPanel), rstd = zeros(size);
    const Panels normed{maps.get(), size}, grad_y{normed.at(narrow, 0), size};
    const Panels to_normed{grad_y.at(narrow, 0), size}, slope{to_normed.at(narrow, 0), size};
    const int64_t padded = (channels + kTileTerms - 1) / kTileTerms * kTileTerms;
    const Buffer of_weights = zeros(2 * wide * padded * kPanel), of_shift = zeros(wide * kPanel);
    const Panels to_expand{of_weights.get(), padded}, to_project{to_expand.at(wide, 0), padded};
    const Buffer of_bias = zeros(narrow * kPanel), of_norm = allocate(2 * wide * channels);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int own = omp_get_thread_num(), all = omp_get_num_threads();
        // a thread always has the same rows of maps: others may still read theirs from the time before
        const int64_t tiles = size / kTileRows;
        const int64_t first = tiles * own / all * kTileRows, last = tiles * (own + 1) / all * kTileRows;
        const Buffer hidden_panels = zeros(2 * chunk * kPanel);
        float *const expanded = hidden_panels.get(), *const activated = expanded + chunk * kPanel;
        for (int64_t start = 0; start < q.rows; start += size) {
            const int64_t rows = std::min(size, q.rows - start);
            const int64_t begin = std::min(rows, first), end = std::min(rows, last);
            for (int64_t r = begin; r < end; ++r) {
                rstd[r] = normalise(q, start + r, normed, r);
                const float* from = grad + (start + r) * channels;
                for_vectors(channels,
                            [&](int64_t c, int n) { store<V>(grad_y.of(r, c), load<V>(from + c, n), n); });
            }
#pragma omp barrier
            for (int64_t p = wide * own / all; p < wide * (own + 1) / all; ++p) {
                with_vectors(hidden - p * kPanel, [&](auto vectors) {
                    constexpr int N = decltype(vectors)::value;
                    for (int64_t row = 0; row < rows; row += chunk) {  // sums run over a chunk, then over all chunks
                        const int64_t count = std::min(chunk, rows - row), stop = row + count;
                        multiply_to<N>(normed, channels, expansion.weights.get() + p * channels * kPanel,
                                       expansion.shift.get() + p * kPanel, row, stop, expanded);
                        multiply_to<N>(grad_y, channels, project.get() + p * channels * kPanel, nullptr, row,
                                       stop, slope.at(p, row));
                        float* const s = slope.at(p, row);
                        gelu_backward<N>(expanded, activated, s, count, of_shift.get() + p * kPanel);
                        if (project_too) accumulate<N>(grad_y, row, channels, activated, count, to_project.at(p, 0));
                        if (expand_too) accumulate<N>(normed, row, channels, s, count, to_expand.at(p, 0));
                    }
                });
            }
            for (int64_t p = narrow * own / all; project_too && p < narrow * (own + 1) / all; ++p) {
                for (int64_t row = 0; row < rows; row += chunk) {
                    Floats sums[2] = {};
                    for (int64_t r = row; r < std::min(rows, row + chunk); ++r) {
                        for (int v = 0; v < 2; ++v) sums[v] += load<V>(grad_y.at(p, r) + v * V, V);
                    }
                    for (int v = 0; v < 2; ++v) {
                        float* const total = of_bias.get() + p * kPanel + v * V;
                        store<V>(total, load<V>(total, V) + sums[v], V);
                    }
                }
            }
#pragma omp barrier
            for (int64_t p = 0; p < narrow; ++p) {
                with_vectors(channels - p * kPanel, [&](auto vectors) {
                    multiply_to<decltype(vectors)::value>(slope, hidden, back.get() + p * hidden * kPanel,
                                                          nullptr, begin, end, to_normed.at(p, begin));
                });
            }
            normalise_backward(q, grad, to_normed, normed, rstd.get(), start, begin, end, to.x);
        }
        // each thread finishes the panels that it summed
        for (int64_t p = wide * own / all; p < wide * (own + 1) / all; ++p) {
            const int64_t first = p * kPanel, count = std::min<int64_t>(kPanel, hidden - first);
            for (int64_t c = 0; project_too && c < channels; ++c)
                std::copy_n(to_project.at(p, c), count, to.project + c * hidden + first);
            float* const by_scale = of_norm.get() + 2 * p * channels;
            float* const by_shift = by_scale + channels;
            for (int64_t c = 0; expand_too && c < channels; c += V) {
                const int n = int(std::min<int64_t>(V, channels - c));
                float turned[kPanel][V] = {};  // panels are transposed
                for (int64_t term = 0; term < n; ++term)
                    for (int64_t i = 0; i < kPanel; ++i) turned[i][term] = to_expand.at(p, c + term)[i];
                const Floats scale = load<V>(q.norm_weight + c, n), bias = load<V>(q.norm_bias + c, n);
                Floats scales{}, shifts{};
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t at = (first + i) * channels + c;
                    const Floats weight = load<V>(q.expand + at, n), scaled = load<V>(turned[i], V);
                    const Floats shifted = broadcast<V>(of_shift[first + i]);
                    scales += weight * scaled;
                    shifts += weight * shifted;
                    store<V>(to.expand + at, scaled * scale + shifted * bias, n);
                }
                store<V>(by_scale + c, scales, n);
                store<V>(by_shift + c, shifts, n);
            }
        }
    }
    if (project_too) std::copy(of_bias.get(), of_bias.get() + channels, to.project_bias);
    if (!expand_too) return;
    std::copy(of_shift.get(), of_shift.get() + hidden, to.expand_bias);
    for (int64_t c = 0; c < channels; ++c) {
        float by_scale = 0.0f, by_shift = 0.0f;
        for (int64_t p = 0; p < wide; ++p) {
            by_scale += of_norm[2 * p * channels + c];
            by_shift += of_norm[(2 * p + 1) * channels + c];
        }
        to.norm_weight[c] = by_scale;
        to.norm_bias[c] = by_shift;
    }
}

}  // namespace
}  // namespace qnas

extern "C" {

// `sizes`: rows, channels, hidden channels, threads. `in`: x, the norm's weight and bias (c), the weight and bias of
// expand, (e, c) and (e), and those of project, (c, e) and (c). `out`: y.
void qnas_pointwise_forward(const int64_t* sizes, float epsilon, const float* const* in, float* const* out) {
    qnas::run_forward(qnas::Half(sizes, epsilon, in), out[0]);
}

// `in` has y's gradient in addition, at the end. `out`: the gradients of the inputs of the forward pass, in their
// order. Those of norm and expand may all be null, and so may both of project.
void qnas_pointwise_backward(const int64_t* sizes, float epsilon, const float* const* in, float* const* out) {
    qnas::run_backward(qnas::Half(sizes, epsilon, in), in[7],
                       {out[0], out[1], out[2], out[3], out[4], out[5], out[6]});
}

}  // extern "C"
