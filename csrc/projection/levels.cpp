#include <algorithm>
#include <cmath>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "core/parallel.h"
#include "projection/element_selection.h"
#include "projection/projection.h"

namespace acf::projection {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::vector<double> midpoints(const double* levels, std::int64_t count) {
  std::vector<double> middle;
  for (std::int64_t j = 0; j + 1 < count; ++j) middle.push_back(levels[j] / 2 + levels[j + 1] / 2);
  return middle;
}

// The weights of one sign, by size, with the sums of the larger ones: the state of a sweep needs nothing else.
struct Side {
  std::vector<double> sizes;           // |w|, descending
  std::vector<double> sums;            // sums[i] = sizes[0] + ... + sizes[i - 1]
  std::vector<double> bounds, levels;  // decision boundaries > 0 and the levels between them, both times the sign;
                                       // levels[0] is that of a vanishing weight

  void finish() {
    std::sort(sizes.begin(), sizes.end(), std::greater<>());
    sums.assign(sizes.size() + 1, 0);
    for (std::size_t i = 0; i < sizes.size(); ++i) sums[i + 1] = sums[i] + sizes[i];
  }
};

// <w, q> and <q, q> of an assignment q: the best scale for it is wq / qq, which lowers the squared error by wq^2 / qq.
struct Fit {
  double wq = 0, qq = 0;
  double gain() const { return wq > 0 && qq > 0 ? wq * wq / qq : 0; }
  double scale() const { return wq > 0 && qq > 0 ? wq / qq : 0; }
};

class ScaleSearch {
 public:
  template <class T>
  ScaleSearch(const T* w, std::int64_t n, const double* levels, std::int64_t count) {
    const std::vector<double> middle = midpoints(levels, count);
    for (std::int64_t i = 0; i < n; ++i) {
      const double value = w[i];
      if (value > 0) sides_[0].sizes.push_back(value);
      if (value < 0) sides_[1].sizes.push_back(-value);
      if (value == 0) zeros_ += 1;
    }
    // A weight just above a boundary at 0 takes the upper level; one at it, or below, the lower.
    const auto at_or_above = std::upper_bound(middle.begin(), middle.end(), 0.0) - middle.begin();
    const auto above = std::lower_bound(middle.begin(), middle.end(), 0.0) - middle.begin();
    zero_level_ = levels[above];
    sides_[0].levels.assign(levels + at_or_above, levels + count);
    sides_[0].bounds.assign(middle.begin() + at_or_above, middle.end());
    for (std::int64_t j = above; j >= 0; --j) sides_[1].levels.push_back(-levels[j]);
    for (std::int64_t j = above - 1; j >= 0; --j) sides_[1].bounds.push_back(-middle[index(j)]);
    for (Side& side : sides_) side.finish();
  }

  std::int64_t breakpoints() const {
    std::int64_t total = 0;
    for (const Side& side : sides_) total += static_cast<std::int64_t>(side.sizes.size() * side.bounds.size());
    return total;
  }

  // The assignment of the weights to levels at a scale, in O(levels * log n).
  Fit at(double scale) const {
    Fit fit{0, zeros_ * zero_level_ * zero_level_};
    for (const Side& side : sides_) {
      std::size_t beyond = side.sizes.size();  // weights above the boundary below levels[j]
      for (std::size_t j = 0; j < side.levels.size(); ++j) {
        const std::size_t next = j < side.bounds.size() ? count_above(side, side.bounds[j] * scale) : 0;
        fit.wq += side.levels[j] * (side.sums[beyond] - side.sums[next]);
        fit.qq += side.levels[j] * side.levels[j] * static_cast<double>(beyond - next);
        beyond = next;
      }
    }
    return fit;
  }

  // Every assignment that any scale gives, from a huge one down: each weight crosses each boundary once, at |w| /
  // bound. Each boundary meets the weights in descending order, so a heap with one entry per boundary sorts all
  // crossings.
  double sweep() const {
    struct Crossing {
      double scale;
      std::size_t side, bound, weight;
      bool operator<(const Crossing& other) const { return scale < other.scale; }
    };
    std::priority_queue<Crossing> next;
    for (std::size_t s = 0; s < 2; ++s) {
      for (std::size_t j = 0; j < sides_[s].bounds.size() && !sides_[s].sizes.empty(); ++j) {
        next.push({sides_[s].sizes[0] / sides_[s].bounds[j], s, j, 0});
      }
    }
    Fit fit{0, zeros_ * zero_level_ * zero_level_};
    for (const Side& side : sides_) {
      fit.wq += side.levels[0] * side.sums.back();
      fit.qq += side.levels[0] * side.levels[0] * static_cast<double>(side.sizes.size());
    }
    Fit best = fit;
    while (!next.empty()) {
      const Crossing now = next.top();
      next.pop();
      const Side& side = sides_[now.side];
      const double from = side.levels[now.bound], to = side.levels[now.bound + 1];
      fit.wq += side.sizes[now.weight] * (to - from);
      fit.qq += to * to - from * from;
      if (fit.gain() > best.gain()) best = fit;
      const std::size_t weight = now.weight + 1;
      if (weight < side.sizes.size()) {
        next.push({side.sizes[weight] / side.bounds[now.bound], now.side, now.bound, weight});
      }
    }
    return best.scale();
  }

  // Alternates assignment and scale: the error falls until nothing moves, or so little that it is no longer worth it.
  double descend(double scale) const {
    constexpr int kSteps = 100;
    double gain = -1;
    for (int step = 0; step < kSteps && scale > 0; ++step) {
      const Fit fit = at(scale);
      if (!(fit.gain() > gain)) return scale;
      gain = fit.gain();
      scale = fit.scale();
    }
    return scale;
  }

  // Lower is better; without the constant |w|^2.
  double error(double scale) const {
    const Fit fit = at(scale);
    return scale * (scale * fit.qq - 2 * fit.wq);
  }

  // The best of a grid and of what the best few of it descend to. The grid: the papers' 0.9 to 1.1 of the scale that
  // maps the largest weight to the largest level, and a geometric one below it.
  double search_grid() const {
    double largest = 0, top = 0;
    for (const Side& side : sides_) {
      if (!side.sizes.empty()) largest = std::max(largest, side.sizes[0]);
      for (double level : side.levels) top = std::max(top, std::abs(level));
    }
    if (largest == 0 || top == 0) return 0;
    std::vector<std::pair<double, double>> grid = {{0.0, 0.0}};  // (error, scale)
    const auto consider = [&](double scale) { grid.emplace_back(error(scale), scale); };
    for (int step = -100; step <= 100; ++step) consider(largest / top * (1 + 0.001 * step));
    for (int step = 0; step < 256; ++step) consider(1.1 * largest / top * std::exp2(-step / 16.0));
    std::sort(grid.begin(), grid.end());
    constexpr std::size_t kDescents = 8;
    for (std::size_t i = 0; i < kDescents; ++i) consider(descend(grid[i].second));
    return std::min_element(grid.begin(), grid.end())->second;
  }

 private:
  static std::size_t count_above(const Side& side, double bound) {
    return static_cast<std::size_t>(
        std::upper_bound(side.sizes.begin(), side.sizes.end(), bound, std::greater_equal<>()) - side.sizes.begin());
  }

  Side sides_[2];
  double zeros_ = 0, zero_level_ = 0;
};

}  // namespace

template <class T>
double best_scale(const T* w, std::int64_t n, const double* levels, std::int64_t count, bool* exact) {
  check_finite<T>(w, nullptr, n);
  const ScaleSearch search(w, n, levels, count);
  const bool sweep = search.breakpoints() <= kExactSweep;
  if (exact != nullptr) *exact = sweep;
  return sweep ? search.descend(search.sweep()) : search.search_grid();
}

template <class T, class Code>
void project_levels(const T* w, std::int64_t n, const double* levels, std::int64_t count, double scale,
                    const Options& options, T* values, Code* codes) {
  check_finite<T>(w, nullptr, n);
  std::vector<double> bounds = midpoints(levels, count);
  const auto zero_code = static_cast<Code>(std::lower_bound(bounds.begin(), bounds.end(), 0.0) - bounds.begin());
  for (double& bound : bounds) bound *= scale;
  std::vector<T> scaled;
  for (std::int64_t j = 0; j < count; ++j) scaled.push_back(static_cast<T>(scale * levels[j]));
  parallel_for((n + kUnit - 1) / kUnit, options.threads, [&](std::int64_t task) {
    const std::int64_t end = std::min(n, (task + 1) * kUnit);
    for (std::int64_t i = task * kUnit; i < end; ++i) {
      const double value = w[i];
      const Code code = scale == 0
                            ? zero_code
                            : static_cast<Code>(std::lower_bound(bounds.begin(), bounds.end(), value) - bounds.begin());
      codes[i] = code;
      values[i] = scaled[static_cast<std::size_t>(code)];
    }
  });
}

#define ACF_INSTANTIATE(T)                                                                                   \
  template double best_scale<T>(const T*, std::int64_t, const double*, std::int64_t, bool*);                 \
  template void project_levels<T, std::int8_t>(const T*, std::int64_t, const double*, std::int64_t, double,  \
                                               const Options&, T*, std::int8_t*);                            \
  template void project_levels<T, std::int16_t>(const T*, std::int64_t, const double*, std::int64_t, double, \
                                                const Options&, T*, std::int16_t*);
ACF_INSTANTIATE(float)
ACF_INSTANTIATE(double)

}  // namespace acf::projection
