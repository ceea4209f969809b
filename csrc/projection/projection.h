// Nearest points with few non-zero groups, the norms that decide which, and the ADMM update built on them.
//
// A weight is a contiguous array of `rows` filters, each of `columns` elements = channels x taps (taps = kernel height
// x width). With grouped convolution the i-th block of rows / groups filters has columns of its own, so there are
// groups * columns columns and groups * columns / taps channels in all, numbered block by block.
//
// Everything here is instantiated for float and double, gives the same bits for every ISA and number of threads, and
// expects sizes and pointers that were checked: rows, columns, groups, taps >= 1, groups divides rows, taps divides
// columns, and 0 <= keep <= group_count().
#pragma once

#include <cstdint>
#include <stdexcept>

#include "core/isa.h"

namespace acf::projection {

enum class Structure { filter, channel, column, element, filter_and_column };

struct Shape {
  std::int64_t rows = 1, columns = 1, groups = 1, taps = 1;
  std::int64_t size() const { return rows * columns; }
};

struct Options {
  Isa isa = active_isa();
  int threads = 1;
};

// How many groups a structure has; filter_and_column has no single count.
std::int64_t group_count(const Shape& shape, Structure structure);

// Where NaN or infinity was found, thrown before anything is written.
class NotFinite : public std::invalid_argument {
 public:
  enum class Array { weight, dual, sum };  // W, U, or only W + U (it overflows)
  NotFinite(Array array_, std::int64_t count_, std::int64_t first_);
  Array array;
  std::int64_t count, first;
  std::int64_t layer = 0;
};

// norms[g] = L2 norm of group g, for every group.
template <class T>
void group_norms(const T* w, const Shape& shape, Structure structure, const Options& options, double* norms);

// out = the point nearest to w with at most `keep` non-zero groups: exactly `keep` are copied, ties to the lowest
// index. filter_and_column: at most `keep` filters and `keep_columns` columns, by alternating until the kept energy
// stops growing, from both orders. out may be w.
template <class T>
void project(const T* w, T* out, const Shape& shape, Structure structure, std::int64_t keep, std::int64_t keep_columns,
             const Options& options);

// One layer of an ADMM update: V = W + U, Z <- P(V), U <- V - Z, which is U + W - Z. `primal` and `dual` become
// ||W - Z_new||_F^2 and ||Z_new - Z_old||_F^2.
template <class T>
struct Layer {
  const T* w = nullptr;
  T* z = nullptr;
  T* u = nullptr;
  Shape shape;
  Structure structure = Structure::filter;
  std::int64_t keep = 0, keep_columns = 0;
  double primal = 0, dual = 0;
};

// Updates all layers, spread over the threads. All of W and U is checked before anything is written.
template <class T>
void admm_update(Layer<T>* layers, std::int64_t count, const Options& options);

// Quantization to scale * levels, where `levels` are `count` ascending distinct finite numbers. codes[i] is the index
// of the level nearest to w[i] / scale, the lower one in the middle between two, and values[i] = scale *
// levels[codes[i]]; with scale == 0 every value is 0 and every code that of the level nearest to 0. Throws NotFinite.
template <class T, class Code>
void project_levels(const T* w, std::int64_t n, const double* levels, std::int64_t count, double scale,
                    const Options& options, T* values, Code* codes);

// The scale >= 0 that minimises the squared error of project_levels. exact (may be null): whether the minimum is
// proven; it is unless n times the number of decision boundaries on one side exceeds kExactSweep.
inline constexpr std::int64_t kExactSweep = std::int64_t{1} << 25;
template <class T>
double best_scale(const T* w, std::int64_t n, const double* levels, std::int64_t count, bool* exact);

// The same, obviously right and slow: the oracle of the tests.
namespace reference {
template <class T>
void group_squares(const T* w, const T* u, const Shape& shape, Structure structure, double* squares);
template <class T>
void project(const T* w, T* out, const Shape& shape, Structure structure, std::int64_t keep);
template <class T>
void admm_update(Layer<T>& layer);
}  // namespace reference

}  // namespace acf::projection
