// The text that all ISAs share, included once per kernels_<isa>.cpp inside its anonymous namespace. That file defines
// F32 and F64, each with
//
//   Scalar, Key, kLanes              element type, its key, lanes per register
//   Reg, Int, Mask, Double           registers of scalars, keys, lane masks and doubles (kDoubles of them)
//   load, store, load_first(p, n), store_first(p, n, r)      whole registers; the first n lanes, 0 <= n, zero elsewhere
//   load_keys, load_keys_first, store_keys, set_key
//   zero, add, sub, scale(r, s)      scale: r * s for double, r for float
//   key(r), bits(r), any(Int)        key of |r|; the plain bits; whether a bit is set
//   or_keys, max_keys, greater(a, b)
//   mask_of(keys), keep(m, r), drop(m, r), and_mask(a, b), not_mask(a)
//   count(m), compress(out, keys, m) -> count    compress may write kLanes keys
//   load_doubles, store_doubles, add_squares(Double*, Reg)
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

// Applies an operation of N register by register.
#define ACF_EACH(index) _Pragma("GCC unroll 16") for (int index = 0; index < kBlock / N::kLanes; ++index)

template <class N>
inline Vec<N> add(Vec<N> a, const Vec<N>& b) {
  ACF_EACH(i) a.r[i] = N::add(a.r[i], b.r[i]);
  return a;
}
template <class N>
inline Vec<N> sub(Vec<N> a, const Vec<N>& b) {
  ACF_EACH(i) a.r[i] = N::sub(a.r[i], b.r[i]);
  return a;
}
template <class N>
inline Vec<N> zero() {
  Vec<N> v;
  ACF_EACH(i) v.r[i] = N::zero();
  return v;
}
template <class N>
inline Vec<N> scaled(Vec<N> v, double factor) {
  ACF_EACH(i) v.r[i] = N::scale(v.r[i], factor);
  return v;
}
template <class N>
inline Ints<N> key(const Vec<N>& v) {
  Ints<N> keys;
  ACF_EACH(i) keys.r[i] = N::key(v.r[i]);
  return keys;
}
template <class N>
inline Ints<N> set_key(typename N::Key value) {
  Ints<N> keys;
  ACF_EACH(i) keys.r[i] = N::set_key(value);
  return keys;
}
template <class N>
inline Ints<N> max_keys(Ints<N> a, const Ints<N>& b) {
  ACF_EACH(i) a.r[i] = N::max_keys(a.r[i], b.r[i]);
  return a;
}
template <class N>
inline Masks<N> greater(const Ints<N>& a, const Ints<N>& b) {
  Masks<N> m;
  ACF_EACH(i) m.r[i] = N::greater(a.r[i], b.r[i]);
  return m;
}
template <class N>
inline Masks<N> mask_of(const Ints<N>& keys) {
  Masks<N> m;
  ACF_EACH(i) m.r[i] = N::mask_of(keys.r[i]);
  return m;
}
template <class N>
inline Masks<N> and_not(Masks<N> a, const Masks<N>& b) {
  ACF_EACH(i) a.r[i] = N::and_mask(a.r[i], N::not_mask(b.r[i]));
  return a;
}
template <class N>
inline Vec<N> keep(const Masks<N>& m, Vec<N> v) {
  ACF_EACH(i) v.r[i] = N::keep(m.r[i], v.r[i]);
  return v;
}
template <class N>
inline Vec<N> drop(const Masks<N>& m, Vec<N> v) {
  ACF_EACH(i) v.r[i] = N::drop(m.r[i], v.r[i]);
  return v;
}
template <class N>
inline int count(const Masks<N>& m) {
  int total = 0;
  ACF_EACH(i) total += N::count(m.r[i]);
  return total;
}
template <class N>
inline int compress(typename N::Key* out, const Ints<N>& keys, const Masks<N>& m) {
  int total = 0;
  ACF_EACH(i) total += N::compress(out + total, keys.r[i], m.r[i]);
  return total;
}
template <class N>
inline bool any_bit(const Vec<N>& v) {
  typename N::Int bits = N::bits(v.r[0]);
  ACF_EACH(i) bits = N::or_keys(bits, N::bits(v.r[i]));
  return N::any(bits);
}

template <class N>
inline Sums<N> load_sums(const double* p) {
  Sums<N> s;
  _Pragma("GCC unroll 16") for (int i = 0; i < kBlock / N::kDoubles; ++i) s.r[i] = N::load_doubles(p + i * N::kDoubles);
  return s;
}
template <class N>
inline void store_sums(double* p, const Sums<N>& s) {
  _Pragma("GCC unroll 16") for (int i = 0; i < kBlock / N::kDoubles; ++i) N::store_doubles(p + i * N::kDoubles, s.r[i]);
}
template <class N>
inline void add_squares(Sums<N>& s, const Vec<N>& v) {
  ACF_EACH(i) N::add_squares(s.r + i * (N::kLanes / N::kDoubles), v.r[i]);
}

// How a block of kBlock elements is reached in memory: all of it, or its first n lanes with zeros for the others.
struct Whole {
  template <class N>
  Vec<N> load(const typename N::Scalar* p) const {
    Vec<N> v;
    ACF_EACH(i) v.r[i] = N::load(p + i * N::kLanes);
    return v;
  }
  template <class N>
  Ints<N> load_keys(const typename N::Key* p) const {
    Ints<N> v;
    ACF_EACH(i) v.r[i] = N::load_keys(p + i * N::kLanes);
    return v;
  }
  template <class N>
  void store(typename N::Scalar* p, const Vec<N>& v) const {
    ACF_EACH(i) N::store(p + i * N::kLanes, v.r[i]);
  }
  template <class N>
  void store_keys(typename N::Key* p, const Ints<N>& v) const {
    ACF_EACH(i) N::store_keys(p + i * N::kLanes, v.r[i]);
  }
};

struct First {
  int n;
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
    ACF_EACH(i) v.r[i] = N::load_first(at<N>(p, i), lanes<N>(i));
    return v;
  }
  template <class N>
  Ints<N> load_keys(const typename N::Key* p) const {
    Ints<N> v;
    ACF_EACH(i) v.r[i] = N::load_keys_first(at<N>(p, i), lanes<N>(i));
    return v;
  }
  template <class N>
  void store(typename N::Scalar* p, const Vec<N>& v) const {
    ACF_EACH(i) N::store_first(at<N>(p, i), lanes<N>(i), v.r[i]);
  }
  template <class N>
  void store_keys(typename N::Key* p, const Ints<N>& v) const {
    typename N::Key lane[kBlock];
    ACF_EACH(i) N::store_keys(lane + i * N::kLanes, v.r[i]);
    for (int i = 0; i < n; ++i) p[i] = lane[i];
  }
};

// body(first element, Whole or First) over the blocks of n elements.
template <class Body>
inline void for_blocks(std::int64_t n, const Body& body) {
  std::int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) body(i, Whole{});
  if (i < n) body(i, First{static_cast<int>(n - i)});
}

template <class N, class Access>
inline Vec<N> load_v(const Access& access, const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t i) {
  Vec<N> v = access.template load<N>(w + i);
  return u == nullptr ? v : add(v, access.template load<N>(u + i));
}

inline double sum_tree(const double (&lanes)[kBlock]) {
  double s[kBlock];
  for (int i = 0; i < kBlock; ++i) s[i] = lanes[i];
  for (int half = kBlock / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
}

template <class N>
void row_squares(const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t rows, std::int64_t columns,
                 const typename N::Key* column_mask, double scale, double* squares, std::uint8_t* u_nonzero) {
  double lanes[kBlock];
  for (std::int64_t row = 0; row < rows; ++row, w += columns, u = u == nullptr ? u : u + columns) {
    for (double& lane : lanes) lane = 0;
    Sums<N> sums = load_sums<N>(lanes);
    if (u_nonzero != nullptr) {
      typename N::Int seen = N::set_key(0);
      for_blocks(columns, [&](std::int64_t i, auto access) {
        const Vec<N> dual = access.template load<N>(u + i);
        ACF_EACH(j) seen = N::or_keys(seen, N::bits(dual.r[j]));
        add_squares(sums, scaled(add(access.template load<N>(w + i), dual), scale));
      });
      u_nonzero[row] = N::any(seen) ? 1 : 0;
    } else if (column_mask != nullptr) {
      for_blocks(columns, [&](std::int64_t i, auto access) {
        const Masks<N> mask = mask_of(access.template load_keys<N>(column_mask + i));
        add_squares(sums, keep(mask, scaled(load_v<N>(access, w, u, i), scale)));
      });
    } else {
      for_blocks(columns,
                 [&](std::int64_t i, auto access) { add_squares(sums, scaled(load_v<N>(access, w, u, i), scale)); });
    }
    store_sums(lanes, sums);
    squares[row] = sum_tree(lanes);
  }
}

// The sums of a block of columns stay in registers for this many rows.
constexpr int kRowsAtOnce = 8;

template <class N>
void column_squares(const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t rows, std::int64_t stride,
                    std::int64_t columns, const std::int64_t* row_list, double scale, double* squares) {
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

template <class N>
Bracket<typename N::Scalar> bracket(const typename N::Scalar* w, const typename N::Scalar* u, std::int64_t n,
                                    typename N::Key low, typename N::Key high, typename N::Key* inside,
                                    std::int64_t capacity) {
  Bracket<typename N::Scalar> found;
  const Ints<N> below = set_key<N>(low - 1), top = set_key<N>(high);
  Ints<N> largest = set_key<N>(0);
  for_blocks(n, [&](std::int64_t i, auto access) {
    const Ints<N> k = key(load_v<N>(access, w, u, i));
    const Masks<N> above = greater(k, top);
    Masks<N> in = and_not(greater(k, below), above);
    largest = max_keys(largest, k);
    found.above += count(above);
    if (n - i < kBlock) {  // the lanes past the end hold zeros, which low == 0 would count
      typename N::Key ones[kBlock] = {};
      for (std::int64_t lane = 0; lane < n - i; ++lane) ones[lane] = -1;
      const Masks<N> past = mask_of(Whole{}.template load_keys<N>(ones));
      ACF_EACH(j) in.r[j] = N::and_mask(in.r[j], past.r[j]);
    }
    if (found.stored <= capacity - kBlock) {
      const int more = compress(inside + found.stored, k, in);
      found.stored += more;
      found.inside += more;
    } else {
      found.inside += count(in);
    }
  });
  found.largest = largest_lane(largest);
  return found;
}

// Bisects the range of values and moves the surviving side to the front, so that the work halves from step to step.
template <class N>
typename N::Key select(typename N::Key* values, std::int64_t n, std::int64_t rank) {
  using Value = typename N::Key;
  Value low = values[0], high = values[0];
  for (std::int64_t i = 1; i < n; ++i) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  while (low < high) {
    const Value middle = low + (high - low) / 2;
    const Ints<N> pivot = set_key<N>(middle);
    const std::int64_t whole = n / kBlock * kBlock;
    std::int64_t above = 0;
    for (std::int64_t i = 0; i < whole; i += kBlock) {
      above += count(greater(Whole{}.template load_keys<N>(values + i), pivot));
    }
    for (std::int64_t i = whole; i < n; ++i) above += values[i] > middle ? 1 : 0;
    const bool upper = above >= rank;
    if (!upper) rank -= above;
    // Writing stays at or behind reading: at most as many keys were written as read, and a block is read first. The
    // tail is saved because a block that compress writes may cover it.
    Value tail[kBlock];
    for (std::int64_t i = whole; i < n; ++i) tail[i - whole] = values[i];
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < whole; i += kBlock) {
      const Ints<N> k = Whole{}.template load_keys<N>(values + i);
      Masks<N> side = greater(k, pivot);
      if (!upper) ACF_EACH(j) side.r[j] = N::not_mask(side.r[j]);
      kept += compress(values + kept, k, side);
    }
    for (std::int64_t i = whole; i < n; ++i) {
      if ((tail[i - whole] > middle) == upper) values[kept++] = tail[i - whole];
    }
    n = kept;
    (upper ? low : high) = upper ? middle + 1 : middle;
  }
  return low;
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
struct ResidualSums {
  explicit ResidualSums(Residuals* lanes_)
      : lanes(lanes_), primal(load_sums<N>(lanes_->primal)), dual(load_sums<N>(lanes_->dual)) {}
  void finish() {
    store_sums(lanes->primal, primal);
    store_sums(lanes->dual, dual);
  }
  Residuals* lanes;
  Sums<N> primal, dual;
};

template <class N>
void update_kept(const typename N::Scalar* w, typename N::Scalar* u, typename N::Scalar* z, std::int64_t n,
                 Residuals* residuals) {
  ResidualSums<N> sums(residuals);
  for_blocks(n, [&](std::int64_t i, auto access) {
    const Vec<N> weight = access.template load<N>(w + i);
    const Vec<N> v = add(weight, access.template load<N>(u + i));
    add_squares(sums.primal, sub(weight, v));
    add_squares(sums.dual, sub(v, access.template load<N>(z + i)));
    access.template store<N>(z + i, v);
    access.template store<N>(u + i, zero<N>());
  });
  sums.finish();
}

template <class N>
void update_kept_u_zero(const typename N::Scalar* w, typename N::Scalar* z, std::int64_t n, Residuals* residuals) {
  ResidualSums<N> sums(residuals);
  for_blocks(n, [&](std::int64_t i, auto access) {
    const Vec<N> v = add(access.template load<N>(w + i), zero<N>());  // -0 + 0 is 0, as everywhere else
    add_squares(sums.dual, sub(v, access.template load<N>(z + i)));
    access.template store<N>(z + i, v);
  });
  sums.finish();
}

template <class N>
void update_dropped(const typename N::Scalar* w, typename N::Scalar* u, typename N::Scalar* z, std::int64_t n,
                    Residuals* residuals) {
  ResidualSums<N> sums(residuals);
  for_blocks(n, [&](std::int64_t i, auto access) {
    const Vec<N> weight = access.template load<N>(w + i);
    const Vec<N> before = access.template load<N>(z + i);
    add_squares(sums.primal, weight);
    access.template store<N>(u + i, add(weight, access.template load<N>(u + i)));
    // Most often Z is zero here already: a line that is not written need not go back to memory.
    if (any_bit(before)) {
      add_squares(sums.dual, before);
      access.template store<N>(z + i, zero<N>());
    }
  });
  sums.finish();
}

template <class N, class Access>
inline void update_block(const Access& access, typename N::Scalar* u, typename N::Scalar* z, const Vec<N>& weight,
                         const Vec<N>& v, const Masks<N>& kept, ResidualSums<N>& sums) {
  const Vec<N> after = keep(kept, v);
  add_squares(sums.primal, sub(weight, after));
  add_squares(sums.dual, sub(after, access.template load<N>(z)));
  access.template store<N>(z, after);
  access.template store<N>(u, drop(kept, v));
}

template <class N>
void update_masked(const typename N::Scalar* w, typename N::Scalar* u, typename N::Scalar* z, std::int64_t n,
                   const typename N::Key* mask, Residuals* residuals) {
  ResidualSums<N> sums(residuals);
  for_blocks(n, [&](std::int64_t i, auto access) {
    const Vec<N> weight = access.template load<N>(w + i);
    const Vec<N> v = add(weight, access.template load<N>(u + i));
    update_block(access, u + i, z + i, weight, v, mask_of(access.template load_keys<N>(mask + i)), sums);
  });
  sums.finish();
}

template <class N>
void update_above(const typename N::Scalar* w, typename N::Scalar* u, typename N::Scalar* z, std::int64_t n,
                  typename N::Key above, Residuals* residuals) {
  ResidualSums<N> sums(residuals);
  const Ints<N> threshold = set_key<N>(above);
  for_blocks(n, [&](std::int64_t i, auto access) {
    const Vec<N> weight = access.template load<N>(w + i);
    const Vec<N> v = add(weight, access.template load<N>(u + i));
    update_block(access, u + i, z + i, weight, v, greater(key(v), threshold), sums);
  });
  sums.finish();
}

#define ACF_KERNEL_TABLE(N)                                                                                 \
  {                                                                                                         \
    row_squares<N>, column_squares<N>, keys<N>, bracket<N>, select<N>, project_masked<N>, project_above<N>, \
        update_kept<N>, update_kept_u_zero<N>, update_dropped<N>, update_masked<N>, update_above<N>         \
  }
