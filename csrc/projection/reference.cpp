#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "projection/projection.h"

namespace acf::projection::reference {
namespace {

// The group of an element.
std::int64_t group_of(const Shape& shape, Structure structure, std::int64_t index) {
  const std::int64_t row = index / shape.columns, column = index % shape.columns;
  const std::int64_t block = row / (shape.rows / shape.groups);
  switch (structure) {
    case Structure::filter: return row;
    case Structure::channel: return (block * shape.columns + column) / shape.taps;
    case Structure::column: return block * shape.columns + column;
    default: return index;
  }
}

}  // namespace

template <class T>
void group_squares(const T* w, const T* u, const Shape& shape, Structure structure, double* squares) {
  std::fill_n(squares, group_count(shape, structure), 0.0);
  for (std::int64_t i = 0; i < shape.size(); ++i) {
    const double v = u == nullptr ? w[i] : static_cast<T>(w[i] + u[i]);
    squares[group_of(shape, structure, i)] += v * v;
  }
}

template <class T>
void project(const T* w, T* out, const Shape& shape, Structure structure, std::int64_t keep) {
  const auto groups = static_cast<std::size_t>(group_count(shape, structure));
  std::vector<double> squares(groups);
  group_squares<T>(w, nullptr, shape, structure, squares.data());
  std::vector<std::size_t> order(groups);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return squares[a] > squares[b]; });
  std::vector<bool> kept(groups, false);
  for (std::size_t i = 0; i < static_cast<std::size_t>(keep); ++i) kept[order[i]] = true;
  for (std::int64_t i = 0; i < shape.size(); ++i) {
    out[i] = kept[static_cast<std::size_t>(group_of(shape, structure, i))] ? w[i] : T{0};
  }
}

template <class T>
void admm_update(Layer<T>& layer) {
  const auto n = static_cast<std::size_t>(layer.shape.size());
  std::vector<T> v(n), z(n);
  for (std::size_t i = 0; i < n; ++i) v[i] = layer.w[i] + layer.u[i];
  project(v.data(), z.data(), layer.shape, layer.structure, layer.keep);
  layer.primal = layer.dual = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double primal = static_cast<T>(layer.w[i] - z[i]), dual = static_cast<T>(z[i] - layer.z[i]);
    layer.primal += primal * primal;
    layer.dual += dual * dual;
    layer.z[i] = z[i];
    layer.u[i] = v[i] - z[i];
  }
}

#define ACF_INSTANTIATE(T)                                                              \
  template void group_squares<T>(const T*, const T*, const Shape&, Structure, double*); \
  template void project<T>(const T*, T*, const Shape&, Structure, std::int64_t);        \
  template void admm_update<T>(Layer<T>&);
ACF_INSTANTIATE(float)
ACF_INSTANTIATE(double)

}  // namespace acf::projection::reference
