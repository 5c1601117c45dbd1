// Batch normalisation with the statistics of the batch, and an activation, on maps in groups of channels.
//
// Sums over rows are computed in parts that do not depend on the number of threads, and are added in order, so
// results are bitwise the same for any number of threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "buffers.h"
#include "groups.h"
#include "lanes.h"

namespace qnas {

// A map of `rows` places as (groups, rows, kLanes). Lanes beyond the last channel are zero.
struct Grouped {
    float* start;
    int64_t rows;

    float* at(int64_t group, int64_t row) const { return start + (group * rows + row) * kLanes; }
};

inline int64_t padded(int64_t channels) { return int64_t(groups_of(int(channels))) * kLanes; }

enum class Kind : int { clamp = 0, hswish = 1 };

// ReLU6, ReLU (without a top) or Hardswish. NaN stays NaN, and slopes at the corners are those of torch.
struct Activation {
    using Floats = Vec<kLanes>;
    Kind kind;
    float top;

    template <Kind K>
    Floats value(Floats z) const {
        if constexpr (K == Kind::clamp) return clamp(z, top);
        return z * clamp(z + 3.0f, 6.0f) * (1.0f / 6.0f);
    }
    // grad times the slope at z
    template <Kind K>
    Floats back(Floats z, Floats grad) const {
        if constexpr (K == Kind::clamp) {
            const Floats below = z <= Floats{} ? Floats{} : grad;
            return z >= top ? Floats{} : below;
        }
        const Floats inner = z >= 3.0f ? grad : grad * (z * (1.0f / 3.0f) + 0.5f);
        return z <= -3.0f ? Floats{} : inner;
    }

  private:
    static Floats clamp(Floats z, float top) {
        z = z < Floats{} ? Floats{} : z;
        return z > top ? top + Floats{} : z;
    }
};

// Calls run(K), a constant, with the kind of an activation: once per row, so that loops over columns have no branch.
template <class Run>
inline void with_kind(Kind kind, Run&& run) {
    if (kind == Kind::clamp) return run(std::integral_constant<Kind, Kind::clamp>());
    run(std::integral_constant<Kind, Kind::hswish>());
}

// The vectors of a norm for one group: z = scale h + shift, and for the gradients the mean over all places of z's
// gradient and of its product with the normalised h.
struct Coefficients {
    Vec<kLanes> scale, shift, mean, rstd, mean_grad, mean_product;

    Vec<kLanes> normalised(Vec<kLanes> h) const { return (h - mean) * rstd; }
    // the gradient of h from that of z
    Vec<kLanes> back(Vec<kLanes> h, Vec<kLanes> grad) const {
        return scale * (grad - mean_grad - normalised(h) * mean_product);
    }
};

class Norm {
  public:
    Norm(int64_t channels, const float* weight, const float* bias, const float* mean, const float* variance,
         float epsilon)
        : size_(padded(channels)), numbers_(zeros(6 * size_)) {
        for (int64_t c = 0; c < channels; ++c) {
            const float rstd = 1.0f / std::sqrt(variance[c] + epsilon), scale = weight[c] * rstd;
            const float values[4] = {scale, bias[c] - mean[c] * scale, mean[c], rstd};
            for (int i = 0; i < 4; ++i) numbers_[i * size_ + c] = values[i];
        }
    }
    // Takes the sums over `count` places that the gradient needs.
    void set_sums(const float* grads, const float* products, int64_t channels, int64_t count) {
        for (int64_t c = 0; c < channels; ++c) {
            numbers_[4 * size_ + c] = grads[c] / float(count);
            numbers_[5 * size_ + c] = products[c] / float(count);
        }
    }
    Coefficients at(int64_t group) const {
        Vec<kLanes> v[6];
        for (int i = 0; i < 6; ++i) v[i] = load<kLanes>(numbers_.get() + i * size_ + group * kLanes, kLanes);
        return {v[0], v[1], v[2], v[3], v[4], v[5]};
    }

  private:
    int64_t size_;
    Buffer numbers_;
};

// The sum and the sum of squares of rows, shifted by the first of them, which keeps the digits of the variance.
struct RowMoments {
    using Floats = Vec<kLanes>;
    Floats first{}, sum{}, squares{};
    int64_t count = 0;

    void add(const float* rows, int64_t number) {
        if (number == 0) return;
        if (count == 0) first = load<kLanes>(rows, kLanes);
        Floats s[4] = {}, q[4] = {};
        int64_t r = 0;
        const auto take = [&](int64_t row, int i) {
            const Floats d = load<kLanes>(rows + row * kLanes, kLanes) - first;
            s[i] += d;
            q[i] += d * d;
        };
        for (; r + 4 <= number; r += 4) UNROLL for (int i = 0; i < 4; ++i) take(r + i, i);
        for (; r < number; ++r) take(r, 0);
        sum += (s[0] + s[1]) + (s[2] + s[3]);
        squares += (q[0] + q[1]) + (q[2] + q[3]);
        count += number;
    }
    // Writes the mean and the sum of squares around it.
    void store_to(float* mean, float* around) const {
        const Floats shift = sum / float(count), rest = squares - sum * shift;
        store<kLanes>(mean, first + shift, kLanes);
        store<kLanes>(around, rest < Floats{} ? Floats{} : rest, kLanes);
    }
};

// Two numbers a channel for each part of the rows: (parts, 2, padded channels).
class Parts {
  public:
    Parts(int64_t parts, int64_t channels)
        : parts_(parts), channels_(channels), size_(padded(channels)), numbers_(zeros(2 * parts * size_)) {}

    float* first(int64_t part, int64_t group) const { return numbers_.get() + 2 * part * size_ + group * kLanes; }
    float* second(int64_t part, int64_t group) const { return first(part, group) + size_; }

    // Merges means and sums of squares of parts of count(part) rows into the mean and the (biased) variance.
    template <class Count>
    void merge_moments(const Count& count, float* mean, float* variance) const {
        double all = 0.0;
        for (int64_t part = 0; part < parts_; ++part) all += double(count(part));
        for (int64_t group = 0; group * kLanes < channels_; ++group) {
            double means[kLanes] = {}, around[kLanes] = {};
            for (int64_t part = 0; part < parts_; ++part)
                for (int i = 0; i < kLanes; ++i) means[i] += double(count(part)) * first(part, group)[i];
            for (int64_t part = 0; part < parts_; ++part)
                for (int i = 0; i < kLanes; ++i) {
                    const double apart = first(part, group)[i] - means[i] / all;
                    around[i] += second(part, group)[i] + double(count(part)) * apart * apart;
                }
            for (int64_t i = 0; i < std::min<int64_t>(kLanes, channels_ - group * kLanes); ++i) {
                mean[group * kLanes + i] = float(means[i] / all);
                variance[group * kLanes + i] = float(around[i] / all);
            }
        }
    }
    // Adds the parts up.
    void merge_sums(float* firsts, float* seconds) const {
        for (int64_t c = 0; c < channels_; ++c) {
            double sums[2] = {};
            for (int64_t part = 0; part < parts_; ++part)
                for (int i = 0; i < 2; ++i) sums[i] += numbers_[(2 * part + i) * size_ + c];
            firsts[c] = float(sums[0]);
            seconds[c] = float(sums[1]);
        }
    }

  private:
    int64_t parts_, channels_, size_;
    Buffer numbers_;
};

}  // namespace qnas
