// Channels in groups of the lanes of a vector.

#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace qnas {

struct Group {
    int first;    // first channel
    int count;    // channels, at most kLanes
    bool narrow;  // uses vectors of half the lanes
};

inline int groups_of(int channels) { return (channels + kLanes - 1) / kLanes; }

inline Group group_of(int channels, int index) {
    const int first = index * kLanes, count = std::min(kLanes, channels - first);
    return {first, count, kLanes == 16 && count <= 8};
}

// Calls run(V), a constant, with the lanes of a group's vectors.
template <class Do>
void with_lanes(const Group& group, Do&& run) {
    if constexpr (kLanes == 16) {
        if (group.narrow) return run(std::integral_constant<int, 8>());
    }
    run(std::integral_constant<int, kLanes>());
}

}  // namespace qnas
