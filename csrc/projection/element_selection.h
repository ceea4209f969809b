// Which elements of V = W + U are the `keep` largest in absolute value, found at about the speed of reading W and U
// once.
//
// A small deterministic sample gives a bracket [low, high] of keys that almost certainly holds the keep-th largest. One
// vectorised pass counts what lies above it and stores the few per cent inside; among these it is found exactly. When
// the sample misled (sorted, tied or otherwise peculiar data), the range of keys is bisected, at worst once per bit of
// a key. Equal keys at the threshold are told apart by a cut in the flat index.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "projection/kernels.h"
#include "projection/projection.h"

namespace acf::projection {

inline constexpr std::int64_t kUnit = 16384;  // elements per task

// Throws NotFinite when w, u (may be null) or their sum has NaN or infinity.
template <class T>
void check_finite(const T* w, const T* u, std::int64_t n);

// Whether float can hold the squares of numbers of about this size, and of much larger and smaller ones.
inline bool squares_in_range(double size) { return size > 1e-12 && size < 1e12; }

// An update in plain C++ with residuals in double throughout, for elements near the ends of the range of float.
// kept(i, v) says whether element i, v = w[i] + u[i], is kept.
template <class T, class Kept>
void update_plain(const T* w, T* u, T* z, std::int64_t n, Residuals<T>* residuals, const Kept& kept) {
  for (std::int64_t i = 0; i < n; ++i) {
    const T v = w[i] + u[i], after = kept(i, v) ? v : T{0};
    const double primal = static_cast<double>(w[i]) - after, dual = static_cast<double>(after) - z[i];
    residuals->primal[i % kBlock] += primal * primal;
    residuals->dual[i % kBlock] += dual * dual;
    z[i] = after;
    u[i] = v - after;
  }
}

template <class T>
class ElementSelection {
 public:
  ElementSelection(const T* w, const T* u, std::int64_t n, std::int64_t keep, const Kernels<T>& kernels, int threads);

  std::int64_t tasks() const { return (n_ + kUnit - 1) / kUnit; }
  void measure(std::int64_t task);
  void choose();  // throws NotFinite
  void write(std::int64_t task, T* out, T* u, Residuals<T>* residuals) const;

 private:
  void bracket_by_sample();
  void reserve(std::int64_t capacity);
  void measure_again(Key<T> low, Key<T> high, std::int64_t capacity);
  void find_threshold();
  void find_cut(std::int64_t ties, std::int64_t ties_kept);
  std::int64_t unit_size(std::int64_t task) const;
  const T* u_at(std::int64_t offset) const { return u_ == nullptr ? nullptr : u_ + offset; }

  const T* w_;
  const T* u_;
  std::int64_t n_, keep_;
  const Kernels<T>& kernels_;
  int threads_;

  Key<T> low_ = 0, high_ = 0;  // the bracket of the last pass
  std::int64_t capacity_ = 0;  // room per unit in inside_
  std::unique_ptr<Key<T>[]> inside_;
  std::vector<Bracket<T>> found_;
  Bracket<T> total_;

  // Element i is kept when its key is greater than threshold_ - 1 (i < cut_) or threshold_ (i >= cut_).
  Key<T> threshold_ = 0;
  std::int64_t cut_ = 0;
};

}  // namespace acf::projection
