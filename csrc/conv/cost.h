// What the estimates of cycles share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv/packed.h"

namespace acf::conv {

// Multiply-adds and loads (of pixels, weights, an offset, and prefetches) overlap, so many of each a cycle; a chain of
// multiply-adds takes four cycles a link.
inline double step_cycles(Isa isa, double sums, double loads, double shuffles) {
  constexpr double kLink = 4;
  return std::max({sums + shuffles, loads, kLink * registers_per_cycle(isa)}) / registers_per_cycle(isa);
}

// Weights of a network come from far away: caches hold those of some layers. This is what memory gives a core.
inline double streaming_cycles(double weights) {
  constexpr double kBytesPerCycle = 5;
  return weights * sizeof(float) / kBytesPerCycle;
}

// Weights are made of codes, in the first-level cache, once for so many tiles of pixels.
inline constexpr std::int64_t kTilesTogether = 8;
double decode_cycles(const Plan& plan);

// What another thread has written comes from its cache: slower than a core's own, by far.
inline double sharing_cycles(double floats) {
  constexpr double kBytesPerCycle = 4;
  return floats * sizeof(float) / kBytesPerCycle;
}

// Inputs and outputs of an image.
inline double value_count(const Plan& plan) {
  const Shape& s = plan.shape;
  return static_cast<double>(s.channels * s.height * s.width + s.filters * s.out_height() * s.out_width());
}

// Into how many tasks a run is cut: fewer cycles than this are not worth another thread.
inline constexpr double kTaskCycles = 8'000;
inline constexpr std::int64_t kTasksPerThread = 4;
inline std::int64_t task_count(const Plan& plan, std::int64_t images, int threads) {
  if (threads == 1) return 1;
  const double cycles = plan.cycles * static_cast<double>(images) / static_cast<double>(plan.images);
  const auto most = static_cast<double>(kTasksPerThread * threads);
  return static_cast<std::int64_t>(std::min(most, std::max(1.0, cycles / kTaskCycles)));
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
