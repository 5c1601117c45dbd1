// The elementwise parts of the channel half of a QuadraBlock, y = x + PW2(GELU(PW1(LN(x)))), on rows of
// channels (the memory of a channels_last map). The matrix products between them are the caller's
// (pointwise.py): a BLAS does them at the machine's peak, and what is left is to read and write each
// number once while it lies in cache.
//
// Every output is summed in an order that does not depend on the number of threads: they share rows where
// rows are independent, columns where sums run over rows.

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace {

using qnas::keep;
using qnas::load;
using qnas::store;
using qnas::sum;
using qnas::Vec;

constexpr int V = qnas::kLanes;
using Floats = Vec<V>;
using Ints = typename qnas::Lanes<V>::Int;

// Call body(start, n) for each vector of [first, end): n is V but for the last, so that a compiler makes the
// many and the last separate code.
template <typename Body>
inline void for_vectors(int64_t first, int64_t end, const Body& body) {
    int64_t i = first;
    for (; i + V <= end; i += V) body(i, V);
    if (i < end) body(i, int(end - i));
}

// Beyond it the normal distribution function is 0 or 1 to float32.
constexpr float kLimit = 5.42f;

// The normal distribution function as 1/2 + x P(x^2) / Q(x^2): least squares, reweighted towards the least
// maximal error, which is 6e-9 in exact arithmetic and 2e-7 as computed.
inline Floats normal_cdf(Floats x) {
    Floats c = x > kLimit ? kLimit + Floats{} : x;
    c = c < -kLimit ? -kLimit + Floats{} : c;
    const Floats u = c * c;
    Floats p = 2.325692365915248e-08f * u + 6.357511327534115e-06f;
    p = p * u + 1.651812126279947e-04f;
    p = p * u + 4.655848806963157e-03f;
    p = p * u + 3.346484432194966e-02f;
    p = p * u + 3.989422433901239e-01f;
    Floats q = 1.2126442747938534e-06f * u + 7.263351013026391e-05f;
    q = q * u + 1.8638304368607536e-03f;
    q = q * u + 2.8429959014092773e-02f;
    q = q * u + 2.505499823941442e-01f;
    q = q * u + 1.0f;
    const Floats cdf = c * (p / q) + 0.5f;
    return x < -kLimit ? Floats{} : cdf;  // what rounding leaves there would grow with x
}

// The normal density: 2^n times a fifth-degree 2^f / sqrt(2 pi) for f in [-1/2, 1/2], fitted like the
// above to a relative error of 7e-8.
inline Floats normal_density(Floats x) {
    const Floats square = x * x;
    const auto is_far = square > kLimit * kLimit;
    const Floats power = (is_far ? Floats{} : square) * -0.72134752044f;  // log2 exp(-x^2 / 2)
    const Ints n = __builtin_convertvector(power - 0.5f, Ints);  // not positive: rounds to the nearest
    const Floats f = power - __builtin_convertvector(n, Floats);
    Floats e = 5.296545023e-04f * f + 3.859982516e-03f;
    e = e * f + 2.214414214e-02f;
    e = e * f + 9.583439223e-02f;
    e = e * f + 2.765256317e-01f;
    e = e * f + 3.989423090e-01f;
    const Ints bits = reinterpret_cast<Ints>(e) + (n << 23);
    return is_far ? Floats{} : reinterpret_cast<Floats>(bits);
}

}  // namespace

extern "C" {

// normed (rows, c) = (x - mean) / sqrt(variance + eps) over each row, and rstd (rows), the reciprocal roots.
void qnas_pointwise_norm(const float* x, int64_t rows, int64_t c, float eps, float* normed, float* rstd,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = x + r * c;
        float* out = normed + r * c;
        Floats sums{}, squares{};
        for_vectors(0, c, [&](int64_t i, int n) { sums += load<V>(row + i, n); });
        const float mean = sum<V>(sums) / c;
        for_vectors(0, c, [&](int64_t i, int n) {
            const Floats centred = keep<V>(load<V>(row + i, n) - mean, n);
            squares += centred * centred;
        });
        const float scale = 1.0f / std::sqrt(sum<V>(squares) / c + eps);
        for_vectors(0, c, [&](int64_t i, int n) {
            store<V>(out + i, (load<V>(row + i, n) - mean) * scale, n);
        });
        rstd[r] = scale;
    }
}

// activated (count) = GELU(h) = h cdf(h), which may be h itself.
void qnas_pointwise_gelu(const float* h, float* activated, int64_t count, int threads) {
    const int64_t vectors = (count + V - 1) / V;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; ++share) {
        const int64_t last = vectors * (share + 1) / threads * V;
        for_vectors(vectors * share / threads * V, last < count ? last : count, [&](int64_t i, int n) {
            const Floats value = load<V>(h + i, n);
            store<V>(activated + i, value * normal_cdf(value), n);
        });
    }
}

// activated = GELU(h), which may be h itself, (rows, hidden); grad, that of GELU(h), becomes that of h, whose
// column sums are added to grad_bias (hidden).
void qnas_pointwise_gelu_backward(const float* h, float* activated, float* grad, int64_t rows, int64_t hidden,
                                  float* grad_bias, int threads) {
    const int64_t vectors = (hidden + V - 1) / V;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t share = 0; share < threads; ++share) {
        const int64_t first = vectors * share / threads * V;
        const int64_t last = vectors * (share + 1) / threads * V;
        const int64_t end = last < hidden ? last : hidden;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = r * hidden;
            for_vectors(first, end, [&](int64_t i, int n) {
                const Floats value = load<V>(h + row + i, n);
                const Floats cdf = normal_cdf(value);
                const Floats slope = load<V>(grad + row + i, n) * (cdf + value * normal_density(value));
                store<V>(activated + row + i, value * cdf, n);
                store<V>(grad + row + i, slope, n);
                store<V>(grad_bias + i, load<V>(grad_bias + i, n) + slope, n);
            });
        }
    }
}

// grad_x (rows, c) = grad_y + the gradient through the normalisation, from the gradient of its result and
// from what qnas_pointwise_norm wrote.
void qnas_pointwise_norm_backward(const float* grad_y, const float* grad_normed, const float* normed,
                                  const float* rstd, int64_t rows, int64_t c, float* grad_x, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = r * c;
        Floats sums{}, products{};
        for_vectors(row, row + c, [&](int64_t i, int n) {
            const Floats grad = load<V>(grad_normed + i, n);
            sums += grad;
            products += grad * load<V>(normed + i, n);
        });
        const float mean = sum<V>(sums) / c, slope = sum<V>(products) / c, scale = rstd[r];
        for_vectors(row, row + c, [&](int64_t i, int n) {
            const Floats centred = load<V>(grad_normed + i, n) - mean - load<V>(normed + i, n) * slope;
            store<V>(grad_x + i, load<V>(grad_y + i, n) + centred * scale, n);
        });
    }
}

}  // extern "C"
