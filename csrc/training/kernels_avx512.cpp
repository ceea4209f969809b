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
  // Rows become columns. Masks that hide nothing: gcc 12 warns of the intrinsics without.
  static void transpose(Reg (&r)[kLanes]) {
    const auto pairs = [](Reg a, Reg b, bool high) {
      return _mm512_castps_pd(high ? _mm512_maskz_unpackhi_ps(0xffff, a, b) : _mm512_maskz_unpacklo_ps(0xffff, a, b));
    };
    const auto quad = [](__m512d a, __m512d b, bool high) {
      return _mm512_castpd_ps(high ? _mm512_maskz_unpackhi_pd(0xff, a, b) : _mm512_maskz_unpacklo_pd(0xff, a, b));
    };
    Reg quads[kLanes];  // [4 * i + k]: of rows 4 * i to 4 * i + 3, columns k, 4 + k, 8 + k and 12 + k
    for (int i = 0; i < kLanes; i += 4) {
      const __m512d a = pairs(r[i], r[i + 1], false), b = pairs(r[i], r[i + 1], true),
                    c = pairs(r[i + 2], r[i + 3], false), d = pairs(r[i + 2], r[i + 3], true);
      quads[i] = quad(a, c, false);
      quads[i + 1] = quad(a, c, true);
      quads[i + 2] = quad(b, d, false);
      quads[i + 3] = quad(b, d, true);
    }
    for (int k = 0; k < 4; ++k) {
      const Reg low = _mm512_maskz_shuffle_f32x4(0xffff, quads[k], quads[4 + k], 0x44),
                high = _mm512_maskz_shuffle_f32x4(0xffff, quads[k], quads[4 + k], 0xee),
                low_2 = _mm512_maskz_shuffle_f32x4(0xffff, quads[8 + k], quads[12 + k], 0x44),
                high_2 = _mm512_maskz_shuffle_f32x4(0xffff, quads[8 + k], quads[12 + k], 0xee);
      r[k] = _mm512_maskz_shuffle_f32x4(0xffff, low, low_2, 0x88);
      r[4 + k] = _mm512_maskz_shuffle_f32x4(0xffff, low, low_2, 0xdd);
      r[8 + k] = _mm512_maskz_shuffle_f32x4(0xffff, high, high_2, 0x88);
      r[12 + k] = _mm512_maskz_shuffle_f32x4(0xffff, high, high_2, 0xdd);
    }
  }
};

// 32 registers.
constexpr int kSums = 28;

#include "training/kernels-inl.h"

}  // namespace

const Kernels avx512_kernels = table_of(IndicesOf<kMaxRows>::type{}, IndicesOf<kMaxOuterRows>::type{});

}  // namespace acf::training
