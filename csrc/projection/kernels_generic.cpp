// Plain C++: what every machine runs, and what a compiler may vectorise as it likes.
#include "projection/kernels.h"

#include <cstring>

namespace acf::projection {
namespace {

template <class T>
struct Native {
  using Scalar = T;
  using Key = projection::Key<T>;
  static constexpr int kLanes = kBlock, kDoubles = kBlock;
  struct Reg {
    T v[kBlock];
  };
  struct Int {
    Key v[kBlock];
  };
  struct Mask {
    Key v[kBlock];  // 0 or -1
  };
  struct Double {
    double v[kBlock];
  };

  static Reg load(const T* p) { return load_first(p, kBlock); }
  static void store(T* p, const Reg& r) { store_first(p, kBlock, r); }
  static Reg load_first(const T* p, int n) {
    Reg r = {};
    for (int i = 0; i < n; ++i) r.v[i] = p[i];
    return r;
  }
  static void store_first(T* p, int n, const Reg& r) {
    for (int i = 0; i < n; ++i) p[i] = r.v[i];
  }
  static Int load_keys(const Key* p) { return load_keys_first(p, kBlock); }
  static Int load_keys_first(const Key* p, int n) {
    Int k = {};
    for (int i = 0; i < n; ++i) k.v[i] = p[i];
    return k;
  }
  static void store_keys(Key* p, const Int& k) {
    for (int i = 0; i < kBlock; ++i) p[i] = k.v[i];
  }
  static Int set_key(Key value) {
    Int k;
    for (int i = 0; i < kBlock; ++i) k.v[i] = value;
    return k;
  }
  static Reg zero() { return Reg{}; }
  static Reg add(const Reg& a, const Reg& b) {
    Reg r;
    for (int i = 0; i < kBlock; ++i) r.v[i] = a.v[i] + b.v[i];
    return r;
  }
  static Reg sub(const Reg& a, const Reg& b) {
    Reg r;
    for (int i = 0; i < kBlock; ++i) r.v[i] = a.v[i] - b.v[i];
    return r;
  }
  static Reg mul(const Reg& a, const Reg& b) {
    Reg r;
    for (int i = 0; i < kBlock; ++i) r.v[i] = a.v[i] * b.v[i];
    return r;
  }
  static Reg scale(const Reg& a, double factor) {
    if (sizeof(T) == sizeof(float)) return a;
    Reg r;
    for (int i = 0; i < kBlock; ++i) r.v[i] = static_cast<T>(a.v[i] * factor);
    return r;
  }
  static Int bits(const Reg& r) {
    Int k;
    std::memcpy(k.v, r.v, sizeof(k.v));
    return k;
  }
  static Int key(const Reg& r) {
    constexpr Key kMagnitude =
        sizeof(T) == sizeof(float) ? static_cast<Key>(0x7fffffff) : static_cast<Key>(0x7fffffffffffffff);
    Int k = bits(r);
    for (int i = 0; i < kBlock; ++i) k.v[i] &= kMagnitude;
    return k;
  }
  static Int or_keys(const Int& a, const Int& b) {
    Int k;
    for (int i = 0; i < kBlock; ++i) k.v[i] = a.v[i] | b.v[i];
    return k;
  }
  static Int max_keys(const Int& a, const Int& b) {
    Int k;
    for (int i = 0; i < kBlock; ++i) k.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return k;
  }
  static bool any(const Int& k) {
    Key seen = 0;
    for (int i = 0; i < kBlock; ++i) seen |= k.v[i];
    return seen != 0;
  }
  static Mask greater(const Int& a, const Int& b) {
    Mask m;
    for (int i = 0; i < kBlock; ++i) m.v[i] = a.v[i] > b.v[i] ? -1 : 0;
    return m;
  }
  static Mask mask_of(const Int& k) {
    Mask m;
    for (int i = 0; i < kBlock; ++i) m.v[i] = k.v[i];
    return m;
  }
  static Mask and_mask(const Mask& a, const Mask& b) {
    Mask m;
    for (int i = 0; i < kBlock; ++i) m.v[i] = a.v[i] & b.v[i];
    return m;
  }
  static Mask not_mask(const Mask& a) {
    Mask m;
    for (int i = 0; i < kBlock; ++i) m.v[i] = ~a.v[i];
    return m;
  }
  static Reg keep(const Mask& m, const Reg& r) {
    Int k = bits(r);
    for (int i = 0; i < kBlock; ++i) k.v[i] &= m.v[i];
    Reg kept;
    std::memcpy(kept.v, k.v, sizeof(kept.v));
    return kept;
  }
  static Reg drop(const Mask& m, const Reg& r) { return keep(not_mask(m), r); }
  static Int count_lanes(const Int& counts, const Mask& m) {
    Int k;
    for (int i = 0; i < kBlock; ++i) k.v[i] = counts.v[i] - m.v[i];
    return k;
  }
  static int compress(Key* out, const Int& k, const Mask& m) {
    int total = 0;
    for (int i = 0; i < kBlock; ++i) {
      out[total] = k.v[i];
      total -= static_cast<int>(m.v[i]);
    }
    return total;
  }
  static Double load_doubles(const double* p) {
    Double d;
    for (int i = 0; i < kBlock; ++i) d.v[i] = p[i];
    return d;
  }
  static void store_doubles(double* p, const Double& d) {
    for (int i = 0; i < kBlock; ++i) p[i] = d.v[i];
  }
  static Double add_doubles(const Double& a, const Double& b) {
    Double d;
    for (int i = 0; i < kBlock; ++i) d.v[i] = a.v[i] + b.v[i];
    return d;
  }
  static void add_squares(Double* sums, const Reg& r) {
    for (int i = 0; i < kBlock; ++i) sums->v[i] += static_cast<double>(r.v[i]) * static_cast<double>(r.v[i]);
  }
};

using F32 = Native<float>;
using F64 = Native<double>;

#include "projection/kernels-inl.h"

}  // namespace

const Kernels<float> generic_f32 = ACF_KERNEL_TABLE(F32);
const Kernels<double> generic_f64 = ACF_KERNEL_TABLE(F64);

}  // namespace acf::projection
