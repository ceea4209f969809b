// The table of functions that every ISA provides. Each works on plain memory of one thread; what is split over threads,
// and in which pieces, is decided above (projection.cpp).
//
// All ISAs give the same bits. Sums of squares are taken in double, in an order that no ISA may change: row sums go
// round-robin into kBlock lanes that are added as a fixed tree at the end; column sums go down the rows. A float's
// square is exact in double, so a fused multiply-add rounds the same as the two operations; for double the two are kept
// apart.
#pragma once

#include <cstdint>

#include "core/inline.h"
#include "core/isa.h"

namespace acf::projection {

// Lanes of the virtual vector in which all kernels are written.
inline constexpr int kBlock = 16;

// Absolute values are compared by their bits: as integers of the same size they have the same order, -0 equals 0, and
// the flush-to-zero mode of the processor changes nothing.
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = std::int32_t;
};
template <>
struct KeyOf<double> {
  using type = std::int64_t;
};
template <class T>
using Key = typename KeyOf<T>::type;

// Running sums of the squares of W - Z_new (primal) and Z_new - Z_old (dual), one per lane. Squares are added in the
// type of the elements for up to kResidualRun elements and then in double: for float that halves the work of an update,
// at a relative error of at most 2^-18 and in practice 2^-22. Callers keep floats away from the ends of their range.
inline constexpr std::int64_t kResidualRun = 64 * kBlock;
template <class T>
struct Residuals {
  T primal_run[kBlock] = {}, dual_run[kBlock] = {};
  std::int64_t run = 0;  // elements in the sums of the run
  double primal[kBlock] = {}, dual[kBlock] = {};
};

// What one pass over elements found about the keys of V: how many exceed `high`, how many lie in [low, high], how many
// of these were stored, and the largest key of all (above the key of infinity for NaN).
template <class T>
struct Bracket {
  std::int64_t above = 0;
  std::int64_t inside = 0;
  std::int64_t stored = 0;
  Key<T> largest = 0;
};

// The key of some rank, how many keys equal it, and its rank among them (1 to ties).
template <class T>
struct Selected {
  Key<T> key;
  std::int64_t ties, rank;
};

// V = W + U, or V = W where u is null. Masks of columns are one key per column, -1 kept and 0 dropped; null: all kept.
template <class T>
struct Kernels {
  // squares[i] = sum over the kept columns k of (scale * V[i, k])^2 for `rows` contiguous rows of `columns`. scale is
  // ignored for float.
  void (*row_squares)(const T* w, const T* u, std::int64_t rows, std::int64_t columns, const Key<T>* column_mask,
                      double scale, double* squares);

  // Whether any bit is set; looks no further than it must.
  bool (*any_nonzero)(const T* p, std::int64_t n);

  // squares[k] += (scale * V[i, k])^2 for `columns` columns of rows that lie `stride` apart, in row order. row_list
  // (may be null): the `rows` rows to take, ascending.
  void (*column_squares)(const T* w, const T* u, std::int64_t rows, std::int64_t stride, std::int64_t columns,
                         const std::int64_t* row_list, double scale, double* squares);

  // keys[i] = key of |V[i]|.
  void (*keys)(const T* w, const T* u, std::int64_t n, Key<T>* keys);

  // One pass for the selection of elements. Keys in [low, high] are stored in order as long as they fit; `inside` has
  // room for capacity + kBlock.
  Bracket<T> (*bracket)(const T* w, const T* u, std::int64_t n, Key<T> low, Key<T> high, Key<T>* inside,
                        std::int64_t capacity);

  // The rank-th largest (1 is the largest) of n non-negative keys. Destroys them; `keys` has room for n + kBlock.
  Selected<T> (*select)(Key<T>* keys, std::int64_t n, std::int64_t rank);

  // out = V where kept, 0 elsewhere (w may be out): by column mask, and where key > above.
  void (*project_masked)(const T* w, T* out, std::int64_t n, const Key<T>* mask);
  void (*project_above)(const T* w, T* out, std::int64_t n, Key<T> above);

  // Z = V where kept and 0 elsewhere, U = V - Z: all kept, all kept with U zero already, all dropped, by mask, where
  // key > above.
  void (*update_kept)(const T* w, T* u, T* z, std::int64_t n, Residuals<T>* residuals);
  void (*update_kept_u_zero)(const T* w, T* z, std::int64_t n, Residuals<T>* residuals);
  void (*update_dropped)(const T* w, T* u, T* z, std::int64_t n, Residuals<T>* residuals);
  void (*update_masked)(const T* w, T* u, T* z, std::int64_t n, const Key<T>* mask, Residuals<T>* residuals);
  void (*update_above)(const T* w, T* u, T* z, std::int64_t n, Key<T> above, Residuals<T>* residuals);
};

// The table of an ISA; throws std::invalid_argument when this machine cannot run it.
template <class T>
const Kernels<T>& kernels(Isa isa);

// The sum of the lanes of finished runs and of the last one, as a tree.
template <class T>
double sum_lanes(const double (&lanes)[kBlock], const T (&run)[kBlock]);

// One pair per translation unit.
#define ACF_DECLARE_KERNELS(isa)         \
  extern const Kernels<float> isa##_f32; \
  extern const Kernels<double> isa##_f64;
ACF_DECLARE_KERNELS(generic)
ACF_DECLARE_KERNELS(avx2)
ACF_DECLARE_KERNELS(avx512)
ACF_DECLARE_KERNELS(neon)
#undef ACF_DECLARE_KERNELS

}  // namespace acf::projection
