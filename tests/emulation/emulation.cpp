// What a test asks the emulation itself.
#include <stdint.h>

#include "emulation.h"

// Another order of threads and blocks from here on.
extern "C" void emulation_seed(int64_t seed) {
  emulation::machine().random = 0x9e3779b97f4a7c15u * (2 * uint64_t(seed) + 1);
}

// The memory that kernels may touch: `count` pairs of first and past-the-end address; none: any.
extern "C" void emulation_ranges(const int64_t* bounds, int64_t count) {
  auto& ranges = emulation::machine().ranges;
  ranges.clear();
  for (int64_t i = 0; i < count; ++i) ranges.emplace_back(bounds[2 * i], bounds[2 * i + 1]);
}
