#include <immintrin.h>
#include "core/inline.h"
#include "training/kernels.h"

namespace acf::training {
namespace {

struct N {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg load_some(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_some(float* p, Reg r, int n) { _mm256_maskstore_ps(p, first(n), r); }
  static Reg set(float x) { return _mm256_set1_ps(x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static float total(Reg r) {
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  // Rows become columns.
  static void transpose(Reg (&r)[kLanes]) {
    Reg quads[kLanes];  // [4 * i + k]: of rows 4 * i to 4 * i + 3, columns k and 4 + k
    for (int i = 0; i < kLanes; i += 4) {
      const Reg a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]),
                c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
      quads[i] = _mm256_shuffle_ps(a, c, 0x44);
      quads[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      quads[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      quads[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int k = 0; k < 4; ++k) {
      r[k] = _mm256_permute2f128_ps(quads[k], quads[4 + k], 0x20);
      r[4 + k] = _mm256_permute2f128_ps(quads[k], quads[4 + k], 0x31);
    }
  }
};

// 16 registers.
constexpr int kSums = 12;

#include "training/kernels-inl.h"

}  // namespace

const Kernels avx2_kernels = table_of(IndicesOf<kMaxRows>::type{}, IndicesOf<kMaxOuterRows>::type{});

}  // namespace acf::training
