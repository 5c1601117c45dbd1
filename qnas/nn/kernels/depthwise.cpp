// The gradients of a depthwise convolution of stride 1 or 2, padded by half its kernel, on plain maps.
//
// torch's own weight gradient is slow on a CPU for kernels of more than three taps across (lean_quadratic.py).
// Here, a task is one group of channels (the lanes of a vector) of a slice of images. Bands of rows of x and of the
// result's gradient are copied into dense padded rows, which stay in cache for both gradients (depthwise.h).
//
// Memory: maps are dense (B, H, W, C); weights are dense (C, 1, k, k), with k 3, 5, 7 or 9.

#include <algorithm>
#include <cstdint>

#include "depthwise.h"

namespace qnas {
namespace {

constexpr double kThreadWork = 1 << 18;  // multiply-adds below which a second thread costs more

// A group of channels of one image of plain maps.
template <int V>
struct PlainMaps {
    const Depthwise& p;
    Group group;
    const float *x, *grad;  // the image's first float of the group
    float* dx;

    template <class Put>
    void read_x(int row, const Put& put) const {
        read(x + int64_t(row) * p.width * p.channels, p.width, put);
    }
    template <class Put>
    void read_grad(int row, const Put& put) const {
        read(grad + int64_t(row) * p.out_width() * p.channels, p.out_width(), put);
    }
    template <class Put>
    void read(const float* from, int columns, const Put& put) const {
        const int64_t step = p.channels;
        const int count = group.count;
        for (int c = 0; c < columns; ++c) put(c, load<V>(from + c * step, count));
    }
    float* target(int row) const { return dx + int64_t(row) * p.width * p.channels; }
    int64_t step() const { return p.channels; }
    int lanes() const { return group.count; }
    void finish(int) const {}
};

void run_backward(const Depthwise& p, int most_threads, const float* x, const float* weight, const float* grad,
                  float* dx, float* dw) {
    const int groups = groups_of(p.channels);
    const Slices slices{p.batch};
    const int threads = std::max(1, std::min(most_threads, int(2 * p.work() / kThreadWork)));
    const size_t per_group = size_t(p.area()) * kLanes;
    const Buffer flipped = zeros(groups * per_group);
    const auto lanes_of = [](const Group& group) { return group.narrow ? 8 : kLanes; };
    for (int index = 0; index < groups; ++index) {
        const Group group = group_of(p.channels, index);
        pack_taps(p, weight, group, lanes_of(group), [&](int tap) { return p.flipped(tap); },
                  flipped.get() + index * per_group);
    }
    const Buffer sums = zeros(dw == nullptr ? 0 : slices.count() * groups * per_group);
    const int64_t image_x = int64_t(p.height) * p.width * p.channels;
    const int64_t image_grad = int64_t(p.out_height()) * p.out_width() * p.channels;
#pragma omp parallel num_threads(threads)
    {
        const Scratch scratch = Scratch::backward(p);
#pragma omp for schedule(dynamic)
        for (int task = 0; task < slices.count() * groups; ++task) {
            const int slice = task / groups, index = task % groups;
            const Group group = group_of(p.channels, index);
            with_lanes(group, [&](auto lanes) {
                constexpr int V = decltype(lanes)::value;
                const auto* weights = reinterpret_cast<const Vec<V>*>(flipped.get() + index * per_group);
                auto* own = dw == nullptr ? nullptr : reinterpret_cast<Vec<V>*>(sums.get() + task * per_group);
                for (int64_t image = slices.begin(slice); image < slices.end(slice); ++image) {
                    PlainMaps<V> maps{p, group, x + image * image_x + group.first,
                                      grad + image * image_grad + group.first,
                                      dx == nullptr ? nullptr : dx + image * image_x + group.first};
                    Task<V, PlainMaps<V>>{p, scratch, maps, weights}.backward(dx != nullptr, own);
                }
            });
        }
    }
    for (int index = 0; index < groups && dw != nullptr; ++index) {
        const Group group = group_of(p.channels, index);
        merge_taps(p, group, lanes_of(group), sums.get() + index * per_group, groups * per_group, dw);
    }
}

}  // namespace
}  // namespace qnas

extern "C" {

// `sizes`: batch, channels, height and width of x, kernel, stride, threads. `in`: x, the weights, the result's
// gradient. `out`: the gradients of x and of the weights; a null one is not computed.
void qnas_depthwise_backward(const int64_t* sizes, float, const float* const* in, float* const* out) {
    const int radius = int(sizes[4]) / 2;
    const qnas::Depthwise p{int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]),
                            int(sizes[4]), int(sizes[5]), radius,        radius};
    qnas::run_backward(p, int(sizes[6]), in[0], in[1], in[2], out[0], out[1]);
}

}  // extern "C"
