// Vectors over channels: a vector holds V channels at one position.

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
constexpr int kMaxTile = 16;   // output columns with sums in registers at the same time
constexpr int kFields = 3;     // gradient fields that a weight gradient reads at the same time
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kMaxTile = 8;    // half as many registers
constexpr int kFields = 1;
#else
constexpr int kLanes = 4;
constexpr int kMaxTile = 8;
constexpr int kFields = 1;
#endif

// Returns run(N) with N, a constant, the one of these numbers that equals `value`.
template <int N, int... Others, class Run>
inline auto with_constant(int value, Run&& run) {
    if constexpr (sizeof...(Others) > 0) {
        if (value != N) return with_constant<Others...>(value, run);
    }
    return run(std::integral_constant<int, N>());
}

// For loops over arrays in registers: an array stays in registers only if every loop over it is fully unrolled.
#define UNROLL _Pragma("GCC unroll 64")

template <int V>
struct Lanes {
    typedef float Float __attribute__((vector_size(4 * V)));
    typedef int Int __attribute__((vector_size(4 * V)));
};
template <int V>
using Vec = typename Lanes<V>::Float;

// The first n of V floats. The other lanes are zero, and their memory is not read.
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

// v in the first n lanes, zero in the others.
template <int V>
inline Vec<V> keep(Vec<V> v, int n) {
    if (n == V) return v;
    typename Lanes<V>::Int lane;
    for (int i = 0; i < V; ++i) lane[i] = i;
    return lane < n ? v : Vec<V>{};
}

// The same value in all lanes. A compiler omits the subtraction of zero, but not an addition, which turns -0 into 0.
template <int V>
inline Vec<V> broadcast(float value) {
    return value - Vec<V>{};
}

// v, kept in a register. Otherwise a compiler may load it again for each use, and the loads take longer than the
// arithmetic.
template <class F>
inline F in_register(F v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX__)
    asm("" : "+x"(v));
#endif
    return v;
}

// The sum over lanes, by halves. The order is the same on all machines with the same vector width.
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

// Calls run(i, n) for each vector of a row of `count` floats, of which n are in the row. n is kLanes except in the
// last vector, so that a compiler generates separate code for the last one.
template <class Run>
inline void for_vectors(int64_t count, Run&& run) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) run(i, kLanes);
    if (i < count) run(i, int(count - i));
}

struct Moments {
    float mean, scale;  // scale is 1 / standard deviation
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
