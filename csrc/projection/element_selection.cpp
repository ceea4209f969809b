#include "projection/element_selection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/parallel.h"

namespace acf::projection {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

template <class T>
Key<T> key_of(T value) {
  const T magnitude = std::abs(value);
  Key<T> key = 0;
  std::memcpy(&key, &magnitude, sizeof(key));
  return key;
}

template <class T>
T value_of(Key<T> key) {
  T value = 0;
  std::memcpy(&value, &key, sizeof(value));
  return value;
}

template <class T>
Key<T> largest_finite_key() {
  return key_of(std::numeric_limits<T>::max());
}

// Up to this many elements every key is stored; a sample would not pay.
constexpr std::int64_t kWithoutSample = 4096;

}  // namespace

template <class T>
ElementSelection<T>::ElementSelection(const T* w, const T* u, std::int64_t n, std::int64_t keep,
                                      const Kernels<T>& kernels, int threads)
    : w_(w), u_(u), n_(n), keep_(keep), kernels_(kernels), threads_(threads), found_(index(tasks())) {
  if (keep == 0 || keep == n) {
    low_ = high_ = largest_finite_key<T>() + 1;  // nothing to find, the pass only looks for NaN and infinity
    reserve(0);
  } else if (n <= kWithoutSample) {
    high_ = largest_finite_key<T>();
    reserve(n);
  } else {
    bracket_by_sample();
    reserve(kUnit / 4);
  }
}

template <class T>
std::int64_t ElementSelection<T>::unit_size(std::int64_t task) const {
  return std::min(kUnit, n_ - task * kUnit);
}

template <class T>
void ElementSelection<T>::reserve(std::int64_t capacity) {
  // A block is stored whole even if it is hardly filled. Compressing needs room for one block or does not begin.
  capacity_ = capacity == 0 ? 0 : std::min(kUnit, capacity) + kBlock;
  inside_.reset(new Key<T>[index(tasks() * (capacity_ + kBlock))]);
}

template <class T>
void ElementSelection<T>::measure(std::int64_t task) {
  const std::int64_t offset = task * kUnit;
  found_[index(task)] = kernels_.bracket(w_ + offset, u_at(offset), unit_size(task), low_, high_,
                                         inside_.get() + task * (capacity_ + kBlock), capacity_);
}

// Blocks of neighbours, one from each of equal parts, at places that a hash picks so that no regular pattern of the
// weights can hide from them. Neighbours are alike, so the spread of a rank is estimated from block to block.
template <class T>
void ElementSelection<T>::bracket_by_sample() {
  // The time for a sample of m grows with m, that for the elements inside the bracket with n / sqrt(m).
  const double balanced = std::pow(static_cast<double>(n_), 2.0 / 3);
  const std::int64_t blocks = std::clamp<std::int64_t>(std::llround(balanced / 20), 32, 4096);
  const std::int64_t part = n_ / blocks, size = blocks * kBlock;
  std::vector<Key<T>> sample(index(size)), scratch(index(size + kBlock));
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::uint64_t hash = ((static_cast<std::uint64_t>(block) + 1) * 0x9e3779b97f4a7c15u) >> 32;
    const auto shift = static_cast<std::int64_t>((hash * static_cast<std::uint64_t>(part - kBlock + 1)) >> 32);
    const std::int64_t offset = block * part + shift;
    kernels_.keys(w_ + offset, u_at(offset), kBlock, sample.data() + block * kBlock);
  }
  const auto ranked = [&](std::int64_t rank) {
    std::copy(sample.begin(), sample.end(), scratch.begin());
    return kernels_.select(scratch.data(), size, rank).key;
  };

  const double share = static_cast<double>(keep_) / static_cast<double>(n_);
  const auto rank = std::clamp<std::int64_t>(std::llround(share * static_cast<double>(size)), 1, size);
  const Key<T> middle = ranked(rank);
  std::int64_t ties = 0;
  double spread = 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    int above = 0;
    for (int i = 0; i < kBlock; ++i) {
      const Key<T> key = sample[index(block * kBlock + i)];
      above += key >= middle ? 1 : 0;
      ties += key == middle ? 1 : 0;
    }
    const double off = above - share * kBlock;
    spread += off * off;
  }
  const std::int64_t heavy = size / 16;
  if (ties > heavy) {
    low_ = high_ = middle;
    return;
  }
  const auto margin = static_cast<std::int64_t>(std::ceil(3 * std::sqrt(spread))) + 2;
  low_ = rank + margin > size ? 0 : ranked(rank + margin);
  high_ = rank - margin < 1 ? largest_finite_key<T>() : ranked(rank - margin);
  // A value that fills much of the sample at an end of the bracket stays outside: the middle is another one.
  const auto is_heavy = [&](Key<T> key) { return std::count(sample.begin(), sample.end(), key) > heavy; };
  if (low_ < middle && is_heavy(low_)) ++low_;
  if (high_ > middle && is_heavy(high_)) --high_;
}

template <class T>
void ElementSelection<T>::measure_again(Key<T> low, Key<T> high, std::int64_t capacity) {
  low_ = low;
  high_ = high;
  if (capacity > capacity_) reserve(capacity);
  parallel_for(tasks(), threads_, [this](std::int64_t task) { measure(task); });
}

template <class T>
void ElementSelection<T>::choose() {
  const auto add_up = [this] {
    total_ = {};
    for (const Bracket<T>& unit : found_) {
      total_.above += unit.above;
      total_.inside += unit.inside;
      total_.stored += unit.stored;
      total_.largest = std::max(total_.largest, unit.largest);
    }
  };
  add_up();
  if (total_.largest > largest_finite_key<T>()) check_finite(w_, u_, n_);
  if (keep_ == 0 || keep_ == n_) {
    cut_ = keep_;
    threshold_ = keep_ == 0 ? total_.largest : 0;
    return;
  }
  // The keep-th largest key is in [least, most].
  Key<T> least = 0, most = total_.largest;
  for (;;) {
    if (total_.above >= keep_) {
      least = high_ + 1;
    } else if (total_.above + total_.inside < keep_) {
      most = low_ - 1;
    } else if (low_ == high_ || total_.stored == total_.inside) {
      find_threshold();
      return;
    } else if (total_.inside <= n_ / 4 && capacity_ < kUnit) {
      measure_again(low_, high_, kUnit);  // they crowd in a few units: with room for all
      add_up();
      continue;
    } else {
      least = low_;
      most = high_;
    }
    measure_again(least + (most - least + 1) / 2, most, 0);
    add_up();
  }
}

template <class T>
void ElementSelection<T>::find_threshold() {
  const std::int64_t rank = keep_ - total_.above;
  if (low_ == high_) {
    threshold_ = low_;
    find_cut(total_.inside, rank);
    return;
  }
  std::unique_ptr<Key<T>[]> candidates(new Key<T>[index(total_.stored + kBlock)]);
  Key<T>* end = candidates.get();
  for (std::int64_t task = 0; task < tasks(); ++task) {
    end = std::copy_n(inside_.get() + task * (capacity_ + kBlock), found_[index(task)].stored, end);
  }
  const Selected<T> selected = kernels_.select(candidates.get(), total_.stored, rank);
  threshold_ = selected.key;
  find_cut(selected.ties, selected.rank);
}

// The cut lies behind the ties_kept-th of the elements at the threshold.
template <class T>
void ElementSelection<T>::find_cut(std::int64_t ties, std::int64_t ties_kept) {
  cut_ = n_;
  if (ties_kept == ties) return;
  for (std::int64_t task = 0; ties_kept > 0; ++task) {
    const Bracket<T> unit =
        kernels_.bracket(w_ + task * kUnit, u_at(task * kUnit), unit_size(task), threshold_, threshold_, nullptr, 0);
    if (unit.inside < ties_kept) {
      ties_kept -= unit.inside;
      continue;
    }
    std::vector<Key<T>> keys(index(unit_size(task)));
    kernels_.keys(w_ + task * kUnit, u_at(task * kUnit), unit_size(task), keys.data());
    for (cut_ = task * kUnit; ties_kept > 0; ++cut_)
      ties_kept -= keys[index(cut_ - task * kUnit)] == threshold_ ? 1 : 0;
  }
}

template <class T>
void ElementSelection<T>::write(std::int64_t task, T* out, T* u, Residuals<T>* residuals) const {
  const std::int64_t first = task * kUnit, end = first + unit_size(task), cut = std::clamp(cut_, first, end);
  const auto part = [&](std::int64_t begin, std::int64_t stop, Key<T> above) {
    if (begin == stop) return;
    if (u == nullptr) {
      kernels_.project_above(w_ + begin, out + begin, stop - begin, above);
    } else if (sizeof(T) == sizeof(float) && !squares_in_range(value_of<T>(total_.largest))) {
      update_plain(w_ + begin, u + begin, out + begin, stop - begin, residuals,
                   [above](std::int64_t, T v) { return key_of(v) > above; });
    } else {
      kernels_.update_above(w_ + begin, u + begin, out + begin, stop - begin, above, residuals);
    }
  };
  part(first, cut, threshold_ - 1);
  part(cut, end, threshold_);
}

template class ElementSelection<float>;
template class ElementSelection<double>;

}  // namespace acf::projection
