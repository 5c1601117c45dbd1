// Memory for one call, freed when it ends.

#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

namespace qnas {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Uninitialised floats, aligned to 64 bytes so that no vector lies in two cache lines.
inline Buffer allocate(size_t floats) {
    void* p = std::aligned_alloc(64, (floats * sizeof(float) + 127) / 64 * 64);
    if (p == nullptr) std::abort();  // out of memory
    return Buffer(static_cast<float*>(p));
}

inline Buffer zeros(size_t floats) {
    Buffer buffer = allocate(floats);
    std::memset(buffer.get(), 0, floats * sizeof(float));
    return buffer;
}

}  // namespace qnas
