#include <immintrin.h>
#include "core/inline.h"
#include "training/kernels.h"

namespace acf::training {
namespace {

struct N {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static __mmask16 first(int n) { return static_cast<__mmask16>((1U << n) - 1U); }
  static Reg load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_some(float* p, Reg r, int n) { _mm512_mask_storeu_ps(p, first(n), r); }
  static Reg set(float x) { return _mm512_set1_ps(x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static float total(Reg r) {
    const __m256 half =
        _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, r, 0), _mm512_maskz_extractf32x8_ps(0xff, r, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
};

// 32 registers.
constexpr int kSums = 28, kDotsA = 4, kDotsB = 6;

#include "training/kernels-inl.h"

}  // namespace

const Kernels avx512_kernels = table_of(IndicesOf<kMaxRows>::type{}, IndicesOf<kMaxDotsB>::type{});

}  // namespace acf::training
