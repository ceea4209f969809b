// The text that all ISAs share, included once per kernels_<isa>.cpp inside its anonymous namespace. That file defines
// F32 and F64, each with
//
//   Scalar, Key, kLanes              element type, its key, lanes per register
//   Reg, Int, Mask, Double           registers of scalars, keys, lane masks and doubles (kDoubles of them)
//   load, store, load_first(p, n), store_first(p, n, r)      whole registers; the first n lanes, 0 <= n, zero elsewhere
//   load_keys, load_keys_first, store_keys, set_key
//   zero, add, sub, mul, scale(r, s)      scale: r * s for double, r for float
//   key(r), bits(r), any(Int)        key of |r|; the plain bits; whether a bit is set
//   or_keys, max_keys, greater(a, b)
//   mask_of(keys), keep(m, r), drop(m, r), and_mask(a, b), not_mask(a)
//   count_lanes(counts, m)           counts + 1 where the mask is set
//   compress(out, keys, m) -> count  may write kLanes keys
//   load_doubles, store_doubles, add_doubles, add_squares(Double*, Reg)
//
// and includes no header with templates of the standard library: an inline function compiled here with wide
// instructions could be the copy that the linker keeps for everyone.

template <class N>
struct Vec {
  typename N::Reg r[kBlock / N::kLanes];
};
template <class N>
struct Ints {
  typename N::Int r[kBlock / N::kLanes];
};
template <class N>
struct Masks {
  typename N::Mask r[kBlock / N::kLanes];
};
template <class N>
struct Sums {
  typename N::Double r[kBlock / N::kDoubles];
};

#include "core/unrolled-inl.h"

template <class N>
constexpr int kRegs = kBlock / N::kLanes;

template <class N>
inline Vec<N> add(Vec<N> a, const Vec<N>& b) {
  unrolled<kRegs<N>>([&](auto i) { a.r[i] = N::add(a.r[i], b.r[i]); });
  return a;
}
template <class N>
inline Vec<N> sub(Vec<N> a, const Vec<N>& b) {
  unrolled<kRegs<N>>([&](auto i) { a.r[i] = N::sub(a.r[i], b.r[i]); });
  return a;
}
template <class N>
inline Vec<N> zero() {
  Vec<N> v;
  unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::zero(); });
  return v;
}
template <class N>
inline Vec<N> scaled(Vec<N> v, double factor) {
  unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::scale(v.r[i], factor); });
  return v;
}
template <class N>
inline Ints<N> key(const Vec<N>& v) {
  Ints<N> keys;
  unrolled<kRegs<N>>([&](auto i) { keys.r[i] = N::key(v.r[i]); });
  return keys;
}
template <class N>
inline Ints<N> set_key(typename N::Key value) {
  Ints<N> keys;
  unrolled<kRegs<N>>([&](auto i) { keys.r[i] = N::set_key(value); });
  return keys;
}
template <class N>
inline Ints<N> max_keys(Ints<N> a, const Ints<N>& b) {
  unrolled<kRegs<N>>([&](auto i) { a.r[i] = N::max_keys(a.r[i], b.r[i]); });
  return a;
}
template <class N>
inline Masks<N> greater(const Ints<N>& a, const Ints<N>& b) {
  Masks<N> m;
  unrolled<kRegs<N>>([&](auto i) { m.r[i] = N::greater(a.r[i], b.r[i]); });
  return m;
}
template <class N>
inline Masks<N> mask_of(const Ints<N>& keys) {
  Masks<N> m;
  unrolled<kRegs<N>>([&](auto i) { m.r[i] = N::mask_of(keys.r[i]); });
  return m;
}
template <class N>
inline Masks<N> and_not(Masks<N> a, const Masks<N>& b) {
  unrolled<kRegs<N>>([&](auto i) { a.r[i] = N::and_mask(a.r[i], N::not_mask(b.r[i])); });
  return a;
}
template <class N>
inline Vec<N> keep(const Masks<N>& m, Vec<N> v) {
  unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::keep(m.r[i], v.r[i]); });
  return v;
}
template <class N>
inline Vec<N> drop(const Masks<N>& m, Vec<N> v) {
  unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::drop(m.r[i], v.r[i]); });
  return v;
}
template <class N>
inline Masks<N> not_mask(Masks<N> a) {
  unrolled<kRegs<N>>([&](auto i) { a.r[i] = N::not_mask(a.r[i]); });
  return a;
}
// counts + 1 in the lanes of the mask.
template <class N>
inline Ints<N> count_lanes(Ints<N> counts, const Masks<N>& m) {
  unrolled<kRegs<N>>([&](auto i) { counts.r[i] = N::count_lanes(counts.r[i], m.r[i]); });
  return counts;
}
template <class N>
inline int compress(typename N::Key* out, const Ints<N>& keys, const Masks<N>& m) {
  int total = 0;
  unrolled<kRegs<N>>([&](auto i) { total += N::compress(out + total, keys.r[i], m.r[i]); });
  return total;
}
template <class N>
inline bool any_bit(const Vec<N>& v) {
  typename N::Int bits = N::bits(v.r[0]);
  unrolled<kRegs<N>>([&](auto i) { bits = N::or_keys(bits, N::bits(v.r[i])); });
  return N::any(bits);
}

template <class N>
inline Sums<N> load_sums(const double* p) {
  Sums<N> s;
  unrolled<kBlock / N::kDoubles>([&](auto i) { s.r[i] = N::load_doubles(p + i * N::kDoubles); });
  return s;
}
template <class N>
inline void store_sums(double* p, const Sums<N>& s) {
  unrolled<kBlock / N::kDoubles>([&](auto i) { N::store_doubles(p + i * N::kDoubles, s.r[i]); });
}
template <class N>
inline void add_squares(Sums<N>& s, const Vec<N>& v) {
  unrolled<kRegs<N>>([&](auto i) { N::add_squares(s.r + i * (N::kLanes / N::kDoubles), v.r[i]); });
}

// How a block of kBlock elements is reached in memory: all of it, or its first n lanes with zeros for the others.
struct Whole {
  // The mask without lanes past the end.
  template <class N>
  Masks<N> existing(const Masks<N>& m) const {
    return m;
  }
  template <class N>
  Vec<N> load(const typename N::Scalar* p) const {
    Vec<N> v;
    unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::load(p + i * N::kLanes); });
    return v;
  }
  template <class N>
  Ints<N> load_keys(const typename N::Key* p) const {
    Ints<N> v;
    unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::load_keys(p + i * N::kLanes); });
    return v;
  }
  template <class N>
  void store(typename N::Scalar* p, const Vec<N>& v) const {
    unrolled<kRegs<N>>([&](auto i) { N::store(p + i * N::kLanes, v.r[i]); });
  }
  template <class N>
  void store_keys(typename N::Key* p, const Ints<N>& v) const {
    unrolled<kRegs<N>>([&](auto i) { N::store_keys(p + i * N::kLanes, v.r[i]); });
  }
};

struct First {
  int n;
  template <class N>
  Masks<N> existing(Masks<N> m) const {
    typename N::Key lane[kBlock] = {};
    for (int i = 0; i < n; ++i) lane[i] = -1;
    const Masks<N> lanes_here = mask_of(Whole{}.load_keys<N>(lane));
    unrolled<kRegs<N>>([&](auto i) { m.r[i] = N::and_mask(m.r[i], lanes_here.r[i]); });
    return m;
  }
  template <class N>
  int lanes(int i) const {
    const int left = n - i * N::kLanes;
    return left < 0 ? 0 : left < N::kLanes ? left : N::kLanes;
  }
  // A pointer past the end is never formed.
  template <class N, class P>
  P* at(P* p, int i) const {
    return lanes<N>(i) > 0 ? p + i * N::kLanes : p;
  }
  template <class N>
  Vec<N> load(const typename N::Scalar* p) const {
    Vec<N> v;
    unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::load_first(at<N>(p, i), lanes<N>(i)); });
    return v;
  }
  template <class N>
  Ints<N> load_keys(const typename N::Key* p) const {
    Ints<N> v;
    unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::load_keys_first(at<N>(p, i), lanes<N>(i)); });
    return v;
  }
  template <class N>
  void store(typename N::Scalar* p, const Vec<N>& v) const {
    unrolled<kRegs<N>>([&](auto i) { N::store_first(at<N>(p, i), lanes<N>(i), v.r[i]); });
  }
  template <class N>
  void store_keys(typename N::Key* p, const Ints<N>& v) const {
    typename N::Key lane[kBlock];
    unrolled<kRegs<N>>([&](auto i) { N::store_keys(lane + i * N::kLanes, v.r[i]); });
    for (int i = 0; i < n; ++i) p[i] = lane[i];
  }
};

// body(first element, Whole or First) over the blocks of n elements.
template <class Body>
ACF_INLINE void for_blocks(std::int64_t n, const Body& body) {
  std::int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) body(i, Whole{});
  if (i < n) body(i, First{static_cast<int>(n - i)});
}

template <class N, class Access>
inline Vec<N> load_v(const Access& access, const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t i) {
  Vec<N> v = access.template load<N>(w + i);
  return u == nullptr ? v : add(v, access.template load<N>(u + i));
}

// The lanes added as a tree: i and i + 8, then i and i + 4, i and i + 2, i and i + 1.
template <class N>
inline double sum_of(Sums<N> sums) {
  constexpr int kSumRegs = kBlock / N::kDoubles;
  for (int half = kSumRegs / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums.r[i] = N::add_doubles(sums.r[i], sums.r[i + half]);
  }
  double lanes[N::kDoubles];
  N::store_doubles(lanes, sums.r[0]);
  for (int half = N::kDoubles / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class N>
Sums<N> no_sums() {
  const double lanes[kBlock] = {};
  return load_sums<N>(lanes);
}

// squares[r] = sum of |load(access, r, i)|^2 for r = 0, 1: two rows at a time, because the additions to one sum wait
// for each other.
template <class N, class Load>
ACF_INLINE void two_rows(std::int64_t columns, double* squares, const Load& load) {
  Sums<N> first = no_sums<N>(), second = no_sums<N>();
  for_blocks(columns, [&](std::int64_t i, auto access) {
    add_squares(first, load(access, 0, i));
    add_squares(second, load(access, 1, i));
  });
  squares[0] = sum_of(first);
  squares[1] = sum_of(second);
}

template <class N, class Load>
ACF_INLINE void all_rows(std::int64_t rows, std::int64_t columns, double* squares, const Load& load) {
  std::int64_t row = 0;
  for (; row + 2 <= rows; row += 2) {
    two_rows<N>(columns, squares + row,
                [&](auto access, int second, std::int64_t i) { return load(access, (row + second) * columns + i, i); });
  }
  if (row == rows) return;
  Sums<N> sums = no_sums<N>();
  for_blocks(columns, [&](std::int64_t i, auto access) { add_squares(sums, load(access, row * columns + i, i)); });
  squares[row] = sum_of(sums);
}

template <class N>
bool any_nonzero(const typename N::Scalar* p, std::int64_t n) {
  constexpr std::int64_t kStep = 8 * kBlock;
  for (std::int64_t start = 0; start < n; start += kStep) {
    typename N::Int seen = N::set_key(0);
    for_blocks(n - start < kStep ? n - start : kStep, [&](std::int64_t i, auto access) {
      const Vec<N> v = access.template load<N>(p + start + i);
      unrolled<kRegs<N>>([&](auto j) { seen = N::or_keys(seen, N::bits(v.r[j])); });
    });
    if (N::any(seen)) return true;
  }
  return false;
}

template <class N>
void row_squares(const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t rows, std::int64_t columns,
                 const typename N::Key* column_mask, double scale, double* squares) {
  if (column_mask != nullptr) {
    all_rows<N>(rows, columns, squares, [&](auto access, std::int64_t i, std::int64_t column) {
      const Masks<N> mask = mask_of(access.template load_keys<N>(column_mask + column));
      return keep(mask, scaled(load_v<N>(access, w, u, i), scale));
    });
  } else if (u == nullptr) {
    all_rows<N>(rows, columns, squares, [&](auto access, std::int64_t i, std::int64_t) {
      return scaled(access.template load<N>(w + i), scale);
    });
  } else {
    all_rows<N>(rows, columns, squares, [&](auto access, std::int64_t i, std::int64_t) {
      return scaled(add(access.template load<N>(w + i), access.template load<N>(u + i)), scale);
    });
  }
}

template <class N>
void column_squares(const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t rows, std::int64_t stride,
                    std::int64_t columns, const std::int64_t* row_list, double scale, double* squares) {
  constexpr int kRowsAtOnce = 8;  // for so many, the sums of a block of columns stay in registers
  for (std::int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int here = static_cast<int>(rows - first < kRowsAtOnce ? rows - first : kRowsAtOnce);
    std::int64_t offset[kRowsAtOnce];
    for (int r = 0; r < here; ++r) offset[r] = (row_list == nullptr ? first + r : row_list[first + r]) * stride;
    for_blocks(columns, [&](std::int64_t k, auto access) {
      // The sums of a partial block are padded, so that loading and storing them stays simple.
      double padded[kBlock] = {};
      const int lanes = columns - k < kBlock ? static_cast<int>(columns - k) : kBlock;
      const bool whole = lanes == kBlock;
      if (!whole) {
        for (int i = 0; i < lanes; ++i) padded[i] = squares[k + i];
      }
      double* place = whole ? squares + k : padded;
      Sums<N> sums = load_sums<N>(place);
      if (here == kRowsAtOnce) {
        _Pragma("GCC unroll 8") for (int r = 0; r < kRowsAtOnce; ++r)
            add_squares(sums, scaled(load_v<N>(access, w, u, offset[r] + k), scale));
      } else {
        for (int r = 0; r < here; ++r) add_squares(sums, scaled(load_v<N>(access, w, u, offset[r] + k), scale));
      }
      store_sums(place, sums);
      if (!whole) {
        for (int i = 0; i < lanes; ++i) squares[k + i] = padded[i];
      }
    });
  }
}

template <class N>
void keys(const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t n, typename N::Key* out) {
  for_blocks(
      n, [&](std::int64_t i, auto access) { access.template store_keys<N>(out + i, key(load_v<N>(access, w, u, i))); });
}

template <class N>
typename N::Key largest_lane(const Ints<N>& keys_of_lanes) {
  typename N::Key lane[kBlock];
  Whole{}.template store_keys<N>(lane, keys_of_lanes);
  typename N::Key largest = lane[0];
  for (int i = 1; i < kBlock; ++i) largest = lane[i] > largest ? lane[i] : largest;
  return largest;
}

// Counts per lane, in keys: no lane reaches 2^31 within a task.
template <class N>
std::int64_t sum_of_lanes(const Ints<N>& counts) {
  typename N::Key lane[kBlock];
  Whole{}.template store_keys<N>(lane, counts);
  std::int64_t total = 0;
  for (typename N::Key value : lane) total += value;
  return total;
}

template <class N>
Bracket<typename N::Scalar> bracket(const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t n,
                                    typename N::Key low, typename N::Key high, typename N::Key* inside,
                                    std::int64_t capacity) {
  Bracket<typename N::Scalar> found;
  const Ints<N> below = set_key<N>(low - 1), top = set_key<N>(high);
  Ints<N> largest = set_key<N>(0), above = set_key<N>(0), within = set_key<N>(0);
  typename N::Key* end = inside;
  constexpr std::int64_t kStep = 16 * kBlock;  // how often it is checked that there is room
  for (std::int64_t start = 0; start < n; start += kStep) {
    const std::int64_t step = n - start < kStep ? n - start : kStep;
    const bool room = end - inside + kStep <= capacity;
    for_blocks(step, [&](std::int64_t i, auto access) {
      const Ints<N> k = key(load_v<N>(access, w + start, u == nullptr ? u : u + start, i));
      const Masks<N> over = greater(k, top);
      const Masks<N> in = access.template existing<N>(and_not(greater(k, below), over));
      largest = max_keys(largest, k);
      above = count_lanes(above, over);
      if (room) {
        end += compress(end, k, in);
      } else {
        within = count_lanes(within, in);
      }
    });
  }
  found.above = sum_of_lanes(above);
  found.stored = end - inside;
  found.inside = found.stored + sum_of_lanes(within);
  found.largest = largest_lane(largest);
  return found;
}

// Bisects the range of values and moves the surviving side to the front, so that the work halves from step to step. In
// the end all keys left are equal.
template <class N>
Selected<typename N::Scalar> select(typename N::Key* values, std::int64_t n, std::int64_t rank) {
  using Value = typename N::Key;
  Value low = values[0], high = values[0];
  for (std::int64_t i = 1; i < n; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  while (low < high && n > kBlock) {
    const Value middle = low + (high - low) / 2;
    const Ints<N> pivot = set_key<N>(middle);
    Ints<N> counts = set_key<N>(0);
    for_blocks(n, [&](std::int64_t i, auto access) {  // the zeros past the end are not above
      counts = count_lanes(counts, greater(access.template load_keys<N>(values + i), pivot));
    });
    const std::int64_t above = sum_of_lanes(counts);
    const bool upper = above >= rank;
    if (!upper) rank -= above;
    // Writing stays at or behind reading: at most as many keys were written as read, and a block is read first.
    Value* end = values;
    for_blocks(n, [&](std::int64_t i, auto access) {
      const Ints<N> k = access.template load_keys<N>(values + i);
      Masks<N> side = greater(k, pivot);
      if (!upper) side = access.template existing<N>(not_mask(side));
      end += compress(end, k, side);
    });
    n = end - values;
    (upper ? low : high) = upper ? middle + 1 : middle;
  }
  if (low < high) {
    for (std::int64_t i = 1; i < n; ++i) {  // descending
      const Value value = values[i];
      std::int64_t to = i;
      for (; to > 0 && values[to - 1] < value; --to) values[to] = values[to - 1];
      values[to] = value;
    }
    low = values[rank - 1];
    std::int64_t first = rank - 1, last = rank;
    while (first > 0 && values[first - 1] == low) --first;
    while (last < n && values[last] == low) ++last;
    return {low, last - first, rank - first};
  }
  return {low, n, rank};
}

template <class N>
void project_masked(const typename N::Scalar* w, typename N::Scalar* out, std::int64_t n, const typename N::Key* mask) {
  for_blocks(n, [&](std::int64_t i, auto access) {
    const Masks<N> kept = mask_of(access.template load_keys<N>(mask + i));
    access.template store<N>(out + i, keep(kept, access.template load<N>(w + i)));
  });
}

template <class N>
void project_above(const typename N::Scalar* w, typename N::Scalar* out, std::int64_t n, typename N::Key above) {
  const Ints<N> threshold = set_key<N>(above);
  for_blocks(n, [&](std::int64_t i, auto access) {
    const Vec<N> v = access.template load<N>(w + i);
    access.template store<N>(out + i, keep(greater(key(v), threshold), v));
  });
}

template <class N>
inline Vec<N> add_square(const Vec<N>& sum, Vec<N> v) {
  unrolled<kRegs<N>>([&](auto i) { v.r[i] = N::add(sum.r[i], N::mul(v.r[i], v.r[i])); });
  return v;
}

template <class N>
inline void add_lanes(double* lanes, const Vec<N>& sums) {
  typename N::Scalar lane[kBlock];
  Whole{}.template store<N>(lane, sums);
  for (int i = 0; i < kBlock; ++i) lanes[i] += static_cast<double>(lane[i]);
}

// body(i, access, primal, dual) over all blocks; body adds its squares to primal and dual.
template <class N, class Body>
ACF_INLINE void with_residuals(std::int64_t n, Residuals<typename N::Scalar>* residuals, const Body& body) {
  Vec<N> primal = Whole{}.template load<N>(residuals->primal_run), dual = Whole{}.template load<N>(residuals->dual_run);
  std::int64_t run = residuals->run;
  for (std::int64_t start = 0; start < n;) {
    const std::int64_t step = n - start < kResidualRun - run ? n - start : kResidualRun - run;
    for_blocks(step, [&](std::int64_t i, auto access) { body(start + i, access, primal, dual); });
    start += step;
    run += (step + kBlock - 1) / kBlock * kBlock;
    if (run == kResidualRun) {
      add_lanes(residuals->primal, primal);
      add_lanes(residuals->dual, dual);
      primal = dual = zero<N>();
      run = 0;
    }
  }
  Whole{}.template store<N>(residuals->primal_run, primal);
  Whole{}.template store<N>(residuals->dual_run, dual);
  residuals->run = run;
}

template <class N>
void update_kept(const typename N::Scalar* w, typename N::Scalar* u, typename N::Scalar* z, std::int64_t n,
                 Residuals<typename N::Scalar>* residuals) {
  with_residuals<N>(n, residuals, [&](std::int64_t i, auto access, Vec<N>& primal, Vec<N>& dual) {
    const Vec<N> weight = access.template load<N>(w + i);
    const Vec<N> v = add(weight, access.template load<N>(u + i));
    primal = add_square(primal, sub(weight, v));
    dual = add_square(dual, sub(v, access.template load<N>(z + i)));
    access.template store<N>(z + i, v);
    access.template store<N>(u + i, zero<N>());
  });
}

template <class N>
void update_kept_u_zero(const typename N::Scalar* w, typename N::Scalar* z, std::int64_t n,
                        Residuals<typename N::Scalar>* residuals) {
  with_residuals<N>(n, residuals, [&](std::int64_t i, auto access, Vec<N>&, Vec<N>& dual) {
    const Vec<N> v = add(access.template load<N>(w + i), zero<N>());  // -0 + 0 is 0, as everywhere else
    dual = add_square(dual, sub(v, access.template load<N>(z + i)));
    access.template store<N>(z + i, v);
  });
}

template <class N>
void update_dropped(const typename N::Scalar* w, typename N::Scalar* u, typename N::Scalar* z, std::int64_t n,
                    Residuals<typename N::Scalar>* residuals) {
  with_residuals<N>(n, residuals, [&](std::int64_t i, auto access, Vec<N>& primal, Vec<N>& dual) {
    const Vec<N> weight = access.template load<N>(w + i);
    const Vec<N> before = access.template load<N>(z + i);
    primal = add_square(primal, weight);
    access.template store<N>(u + i, add(weight, access.template load<N>(u + i)));
    // Most often Z is zero here already: a line that is not written need not go back to memory.
    if (any_bit(before)) {
      dual = add_square(dual, before);
      access.template store<N>(z + i, zero<N>());
    }
  });
}

template <class N, class Access>
inline void update_block(const Access& access, typename N::Scalar* u, typename N::Scalar* z, const Vec<N>& weight,
                         const Vec<N>& v, const Masks<N>& kept, Vec<N>& primal, Vec<N>& dual) {
  const Vec<N> after = keep(kept, v);
  primal = add_square(primal, sub(weight, after));
  dual = add_square(dual, sub(after, access.template load<N>(z)));
  access.template store<N>(z, after);
  access.template store<N>(u, drop(kept, v));
}

template <class N>
void update_masked(const typename N::Scalar* w, typename N::Scalar* u, typename N::Scalar* z, std::int64_t n,
                   const typename N::Key* mask, Residuals<typename N::Scalar>* residuals) {
  with_residuals<N>(n, residuals, [&](std::int64_t i, auto access, Vec<N>& primal, Vec<N>& dual) {
    const Vec<N> weight = access.template load<N>(w + i);
    const Vec<N> v = add(weight, access.template load<N>(u + i));
    const Masks<N> kept = mask_of(access.template load_keys<N>(mask + i));
    update_block(access, u + i, z + i, weight, v, kept, primal, dual);
  });
}

template <class N>
void update_above(const typename N::Scalar* w, typename N::Scalar* u, typename N::Scalar* z, std::int64_t n,
                  typename N::Key above, Residuals<typename N::Scalar>* residuals) {
  const Ints<N> threshold = set_key<N>(above);
  with_residuals<N>(n, residuals, [&](std::int64_t i, auto access, Vec<N>& primal, Vec<N>& dual) {
    const Vec<N> weight = access.template load<N>(w + i);
    const Vec<N> v = add(weight, access.template load<N>(u + i));
    update_block(access, u + i, z + i, weight, v, greater(key(v), threshold), primal, dual);
  });
}

#define ACF_KERNEL_TABLE(N)                                                                                           \
  {                                                                                                                   \
    row_squares<N>, any_nonzero<N>, column_squares<N>, keys<N>, bracket<N>, select<N>, project_masked<N>,             \
        project_above<N>, update_kept<N>, update_kept_u_zero<N>, update_dropped<N>, update_masked<N>, update_above<N> \
  }
