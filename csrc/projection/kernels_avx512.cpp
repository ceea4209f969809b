#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own "undefined" operands inside immintrin.h (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "projection/kernels.h"

namespace acf::projection {
namespace {

struct F32 {
  using Scalar = float;
  using Key = std::int32_t;
  static constexpr int kLanes = 16, kDoubles = 8;
  using Reg = __m512;
  using Int = __m512i;
  using Mask = __mmask16;
  using Double = __m512d;

  static Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static Reg load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_first(float* p, int n, Reg r) { _mm512_mask_storeu_ps(p, first(n), r); }
  static Int load_keys(const Key* p) { return _mm512_loadu_si512(p); }
  static Int load_keys_first(const Key* p, int n) { return _mm512_maskz_loadu_epi32(first(n), p); }
  static void store_keys(Key* p, Int k) { _mm512_storeu_si512(p, k); }
  static Int set_key(Key value) { return _mm512_set1_epi32(value); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg scale(Reg a, double) { return a; }
  static Int bits(Reg r) { return _mm512_castps_si512(r); }
  static Int key(Reg r) { return _mm512_and_si512(bits(r), _mm512_set1_epi32(0x7fffffff)); }
  static Int or_keys(Int a, Int b) { return _mm512_or_si512(a, b); }
  static Int max_keys(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static bool any(Int k) { return _mm512_test_epi32_mask(k, k) != 0; }
  static Mask greater(Int a, Int b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static Mask mask_of(Int k) { return _mm512_movepi32_mask(k); }
  static Mask and_mask(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static Mask not_mask(Mask a) { return static_cast<Mask>(~a); }
  static Reg keep(Mask m, Reg r) { return _mm512_maskz_mov_ps(m, r); }
  static Reg drop(Mask m, Reg r) { return _mm512_maskz_mov_ps(not_mask(m), r); }
  static Int count_lanes(Int counts, Mask m) { return _mm512_mask_sub_epi32(counts, m, counts, _mm512_set1_epi32(-1)); }
  // Compressing into a register and storing all of it is much cheaper than compressing into memory.
  static int compress(Key* out, Int k, Mask m) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, k));
    return __builtin_popcount(m);
  }
  static Double load_doubles(const double* p) { return _mm512_loadu_pd(p); }
  static void store_doubles(double* p, Double d) { _mm512_storeu_pd(p, d); }
  static Double add_doubles(Double a, Double b) { return _mm512_add_pd(a, b); }
  static void add_squares(Double* sums, Reg r) {
    const Double low = _mm512_cvtps_pd(_mm512_castps512_ps256(r));
    const Double high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(r, 1));
    sums[0] = _mm512_fmadd_pd(low, low, sums[0]);
    sums[1] = _mm512_fmadd_pd(high, high, sums[1]);
  }
};

struct F64 {
  using Scalar = double;
  using Key = std::int64_t;
  static constexpr int kLanes = 8, kDoubles = 8;
  using Reg = __m512d;
  using Int = __m512i;
  using Mask = __mmask8;
  using Double = __m512d;

  static Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Reg r) { _mm512_storeu_pd(p, r); }
  static Reg load_first(const double* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static void store_first(double* p, int n, Reg r) { _mm512_mask_storeu_pd(p, first(n), r); }
  static Int load_keys(const Key* p) { return _mm512_loadu_si512(p); }
  static Int load_keys_first(const Key* p, int n) { return _mm512_maskz_loadu_epi64(first(n), p); }
  static void store_keys(Key* p, Int k) { _mm512_storeu_si512(p, k); }
  static Int set_key(Key value) { return _mm512_set1_epi64(value); }
  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg scale(Reg a, double factor) { return _mm512_mul_pd(a, _mm512_set1_pd(factor)); }
  static Int bits(Reg r) { return _mm512_castpd_si512(r); }
  static Int key(Reg r) { return _mm512_and_si512(bits(r), _mm512_set1_epi64(0x7fffffffffffffff)); }
  static Int or_keys(Int a, Int b) { return _mm512_or_si512(a, b); }
  static Int max_keys(Int a, Int b) { return _mm512_max_epi64(a, b); }
  static bool any(Int k) { return _mm512_test_epi64_mask(k, k) != 0; }
  static Mask greater(Int a, Int b) { return _mm512_cmpgt_epi64_mask(a, b); }
  static Mask mask_of(Int k) { return _mm512_movepi64_mask(k); }
  static Mask and_mask(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static Mask not_mask(Mask a) { return static_cast<Mask>(~a); }
  static Reg keep(Mask m, Reg r) { return _mm512_maskz_mov_pd(m, r); }
  static Reg drop(Mask m, Reg r) { return _mm512_maskz_mov_pd(not_mask(m), r); }
  static Int count_lanes(Int counts, Mask m) { return _mm512_mask_sub_epi64(counts, m, counts, _mm512_set1_epi64(-1)); }
  static int compress(Key* out, Int k, Mask m) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(m, k));
    return __builtin_popcount(m);
  }
  static Double load_doubles(const double* p) { return _mm512_loadu_pd(p); }
  static void store_doubles(double* p, Double d) { _mm512_storeu_pd(p, d); }
  static Double add_doubles(Double a, Double b) { return _mm512_add_pd(a, b); }
  static void add_squares(Double* sums, Reg r) { *sums = _mm512_add_pd(*sums, _mm512_mul_pd(r, r)); }
};

#include "projection/kernels-inl.h"

}  // namespace

const Kernels<float> avx512_f32 = ACF_KERNEL_TABLE(F32);
const Kernels<double> avx512_f64 = ACF_KERNEL_TABLE(F64);

}  // namespace acf::projection
