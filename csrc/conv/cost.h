// What the estimates of cycles share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv/packed.h"

namespace acf::conv {

// Multiply-adds and loads (of pixels, weights, an offset, and prefetches) overlap, two of each a cycle; a chain of
// multiply-adds takes four cycles a link.
inline double step_cycles(double sums, double loads, double shuffles) {
  return std::max({(sums + shuffles) / 2, loads / 2, sums < 8 ? 4.0 : 0.0});
}

// Weights of a network come from far away: caches hold those of some layers. This is what memory gives a core.
inline double streaming_cycles(double weights) {
  constexpr double kBytesPerCycle = 5;
  return weights * sizeof(float) / kBytesPerCycle;
}

// The sum of cost(size) over the parts that `count` things are cut into.
template <class Cost>
double over_parts(std::int64_t count, std::int64_t parts, Cost cost) {
  const Parts cut(count, parts);
  return (cut.larger > 0 ? static_cast<double>(cut.larger) * cost(cut.size + 1) : 0) +
         (cut.size > 0 ? static_cast<double>(parts - cut.larger) * cost(cut.size) : 0);
}

inline void consider(Plan& best, const Plan& other) {
  if (best.cycles == 0 || other.cycles < best.cycles) best = other;
}

}  // namespace acf::conv
