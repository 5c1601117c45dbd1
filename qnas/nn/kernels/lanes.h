// Vectors over channels: one vector holds V channels of one place.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>
#define QNAS_MASKED 1
#endif

namespace qnas {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxTile = 16;   // output columns whose sums are in registers at once
constexpr int kFields = 3;     // gradient fields that a weight gradient reads at once
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kMaxTile = 8;    // half as many registers
constexpr int kFields = 1;
#else
constexpr int kLanes = 4;
constexpr int kMaxTile = 8;
constexpr int kFields = 1;
#endif

// Returns run(N), N the one of these numbers that `value` is, as a constant.
template <int N, int... Others, class Run>
inline auto with_constant(int value, Run&& run) {
    if constexpr (sizeof...(Others) > 0) {
        if (value != N) return with_constant<Others...>(value, run);
    }
    return run(std::integral_constant<int, N>());
}

// Before loops over registers: arrays are in registers only where each loop over them is unrolled whole.
#define UNROLL _Pragma("GCC unroll 64")

template <int V>
struct Lanes {
    typedef float Float __attribute__((vector_size(4 * V)));
    typedef int Int __attribute__((vector_size(4 * V)));
};
template <int V>
using Vec = typename Lanes<V>::Float;

// The first n of V floats; the others are zero and their memory is not touched.
template <int V>
inline Vec<V> load(const float* from, int n) {
    Vec<V> v;
    if (__builtin_expect(n == V, 1)) {
        std::memcpy(&v, from, sizeof v);
        return v;
    }
#ifdef QNAS_MASKED
    if constexpr (V == 16) return (Vec<V>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), from);
    if constexpr (V == 8) return (Vec<V>)_mm256_maskz_loadu_ps(__mmask8((1u << n) - 1), from);
#endif
    v = Vec<V>{};
    for (int i = 0; i < n; ++i) v[i] = from[i];
    return v;
}

template <int V>
inline void store(float* to, Vec<V> v, int n) {
    if (__builtin_expect(n == V, 1)) {
        std::memcpy(to, &v, sizeof v);
        return;
    }
#ifdef QNAS_MASKED
    if constexpr (V == 16) return _mm512_mask_storeu_ps(to, __mmask16((1u << n) - 1), (__m512)v);
    if constexpr (V == 8) return _mm256_mask_storeu_ps(to, __mmask8((1u << n) - 1), (__m256)v);
#endif
    for (int i = 0; i < n; ++i) to[i] = v[i];
}

// v where the lane is one of the first n, else zero.
template <int V>
inline Vec<V> keep(Vec<V> v, int n) {
    if (n == V) return v;
    typename Lanes<V>::Int lane;
    for (int i = 0; i < V; ++i) lane[i] = i;
    return lane < n ? v : Vec<V>{};
}

// All lanes the same. Less zero, which a compiler knows to be nothing: plus zero would turn -0 into 0.
template <int V>
inline Vec<V> broadcast(float value) {
    return value - Vec<V>{};
}

// v, loaded once: without it a compiler may load it anew for each of its uses, and the loads take longer
// than the arithmetic.
template <class F>
inline F in_register(F v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX__)
    asm("" : "+x"(v));
#endif
    return v;
}

// The sum over lanes, in halves: the same order on every machine of one width.
template <int V>
inline float sum(Vec<V> v) {
    if constexpr (V == 1) {
        return v[0];
    } else {
        Vec<V / 2> low, high;
        std::memcpy(&low, &v, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return sum<V / 2>(low + high);
    }
}

// Calls run(i, n) for each vector of a row of `count` floats, n of its floats being in the row: n is kLanes but
// for the last, so that a compiler makes the many and the last separate code.
template <class Run>
inline void for_vectors(int64_t count, Run&& run) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) run(i, kLanes);
    if (i < count) run(i, int(count - i));
}

struct Moments {
    float mean, scale;  // the latter 1 / standard deviation
};

inline Moments moments(const float* x, int64_t count, float epsilon) {
    constexpr int V = kLanes;
    Vec<V> total{}, squares{};
    for_vectors(count, [&](int64_t i, int n) { total += load<V>(x + i, n); });
    const float mean = sum<V>(total) / count;
    for_vectors(count, [&](int64_t i, int n) {
        const Vec<V> centred = keep<V>(load<V>(x + i, n) - mean, n);
        squares += centred * centred;
    });
    return {mean, 1.0f / std::sqrt(sum<V>(squares) / count + epsilon)};
}

}  // namespace qnas
