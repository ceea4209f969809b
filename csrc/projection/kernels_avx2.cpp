#include <immintrin.h>

#include "projection/kernels.h"

namespace acf::projection {
namespace {

// order.lane[m] moves the 32-bit lanes of the set bits of m to the front. Lanes per key: 1 (8 keys) or 2 (4 keys).
template <int kKeys>
struct CompressOrder {
  alignas(32) std::int32_t lane[1 << kKeys][8];
  constexpr CompressOrder() : lane() {
    constexpr int kWidth = 8 / kKeys;
    for (int m = 0; m < (1 << kKeys); ++m) {
      int to = 0;
      for (int key = 0; key < kKeys; ++key) {
        if ((m >> key & 1) == 0) continue;
        for (int part = 0; part < kWidth; ++part) lane[m][to++] = key * kWidth + part;
      }
    }
  }
};
constexpr CompressOrder<8> kOrder32;
constexpr CompressOrder<4> kOrder64;

template <int kKeys>
inline __m256i compressed(const CompressOrder<kKeys>& order, __m256i k, int bits) {
  return _mm256_permutevar8x32_epi32(k, _mm256_load_si256(reinterpret_cast<const __m256i*>(order.lane[bits])));
}

inline __m256i load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_int(void* p, __m256i k) { _mm256_storeu_si256(static_cast<__m256i*>(p), k); }

struct F32 {
  using Scalar = float;
  using Key = std::int32_t;
  static constexpr int kLanes = 8, kDoubles = 4;
  using Reg = __m256;
  using Int = __m256i;
  using Mask = __m256i;
  using Double = __m256d;

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static Reg load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_first(float* p, int n, Reg r) { _mm256_maskstore_ps(p, first(n), r); }
  static Int load_keys(const Key* p) { return load_int(p); }
  static Int load_keys_first(const Key* p, int n) { return _mm256_maskload_epi32(p, first(n)); }
  static void store_keys(Key* p, Int k) { store_int(p, k); }
  static Int set_key(Key value) { return _mm256_set1_epi32(value); }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg scale(Reg a, double) { return a; }
  static Int bits(Reg r) { return _mm256_castps_si256(r); }
  static Int key(Reg r) { return _mm256_and_si256(bits(r), _mm256_set1_epi32(0x7fffffff)); }
  static Int or_keys(Int a, Int b) { return _mm256_or_si256(a, b); }
  static Int max_keys(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static bool any(Int k) { return _mm256_testz_si256(k, k) == 0; }
  static Mask greater(Int a, Int b) { return _mm256_cmpgt_epi32(a, b); }
  static Mask mask_of(Int k) { return k; }
  static Mask and_mask(Mask a, Mask b) { return _mm256_and_si256(a, b); }
  static Mask not_mask(Mask a) { return _mm256_xor_si256(a, _mm256_set1_epi32(-1)); }
  static Reg keep(Mask m, Reg r) { return _mm256_and_ps(_mm256_castsi256_ps(m), r); }
  static Reg drop(Mask m, Reg r) { return _mm256_andnot_ps(_mm256_castsi256_ps(m), r); }
  static int mask_bits(Mask m) { return _mm256_movemask_ps(_mm256_castsi256_ps(m)); }
  static Int count_lanes(Int counts, Mask m) { return _mm256_sub_epi32(counts, m); }
  static int compress(Key* out, Int k, Mask m) {
    const int kept = mask_bits(m);
    store_int(out, compressed(kOrder32, k, kept));
    return __builtin_popcount(static_cast<unsigned>(kept));
  }
  static Double load_doubles(const double* p) { return _mm256_loadu_pd(p); }
  static void store_doubles(double* p, Double d) { _mm256_storeu_pd(p, d); }
  static Double add_doubles(Double a, Double b) { return _mm256_add_pd(a, b); }
  static void add_squares(Double* sums, Reg r) {
    const Double low = _mm256_cvtps_pd(_mm256_castps256_ps128(r));
    const Double high = _mm256_cvtps_pd(_mm256_extractf128_ps(r, 1));
    sums[0] = _mm256_fmadd_pd(low, low, sums[0]);
    sums[1] = _mm256_fmadd_pd(high, high, sums[1]);
  }
};

struct F64 {
  using Scalar = double;
  using Key = std::int64_t;
  static constexpr int kLanes = 4, kDoubles = 4;
  using Reg = __m256d;
  using Int = __m256i;
  using Mask = __m256i;
  using Double = __m256d;

  static __m256i first(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Reg r) { _mm256_storeu_pd(p, r); }
  static Reg load_first(const double* p, int n) { return _mm256_maskload_pd(p, first(n)); }
  static void store_first(double* p, int n, Reg r) { _mm256_maskstore_pd(p, first(n), r); }
  static Int load_keys(const Key* p) { return load_int(p); }
  static Int load_keys_first(const Key* p, int n) {
    return _mm256_maskload_epi64(reinterpret_cast<const long long*>(p), first(n));
  }
  static void store_keys(Key* p, Int k) { store_int(p, k); }
  static Int set_key(Key value) { return _mm256_set1_epi64x(value); }
  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg scale(Reg a, double factor) { return _mm256_mul_pd(a, _mm256_set1_pd(factor)); }
  static Int bits(Reg r) { return _mm256_castpd_si256(r); }
  static Int key(Reg r) { return _mm256_and_si256(bits(r), _mm256_set1_epi64x(0x7fffffffffffffff)); }
  static Int or_keys(Int a, Int b) { return _mm256_or_si256(a, b); }
  static Int max_keys(Int a, Int b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b)); }
  static bool any(Int k) { return _mm256_testz_si256(k, k) == 0; }
  static Mask greater(Int a, Int b) { return _mm256_cmpgt_epi64(a, b); }
  static Mask mask_of(Int k) { return k; }
  static Mask and_mask(Mask a, Mask b) { return _mm256_and_si256(a, b); }
  static Mask not_mask(Mask a) { return _mm256_xor_si256(a, _mm256_set1_epi32(-1)); }
  static Reg keep(Mask m, Reg r) { return _mm256_and_pd(_mm256_castsi256_pd(m), r); }
  static Reg drop(Mask m, Reg r) { return _mm256_andnot_pd(_mm256_castsi256_pd(m), r); }
  static int mask_bits(Mask m) { return _mm256_movemask_pd(_mm256_castsi256_pd(m)); }
  static Int count_lanes(Int counts, Mask m) { return _mm256_sub_epi64(counts, m); }
  static int compress(Key* out, Int k, Mask m) {
    const int kept = mask_bits(m);
    store_int(out, compressed(kOrder64, k, kept));
    return __builtin_popcount(static_cast<unsigned>(kept));
  }
  static Double load_doubles(const double* p) { return _mm256_loadu_pd(p); }
  static void store_doubles(double* p, Double d) { _mm256_storeu_pd(p, d); }
  static Double add_doubles(Double a, Double b) { return _mm256_add_pd(a, b); }
  static void add_squares(Double* sums, Reg r) { *sums = _mm256_add_pd(*sums, _mm256_mul_pd(r, r)); }
};

#include "projection/kernels-inl.h"

}  // namespace

const Kernels<float> avx2_f32 = ACF_KERNEL_TABLE(F32);
const Kernels<double> avx2_f64 = ACF_KERNEL_TABLE(F64);

}  // namespace acf::projection
