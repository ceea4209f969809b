#include <immintrin.h>

#include "conv/kernels.h"

namespace acf::conv {
namespace {

#include "conv/transpose_x86-inl.h"

struct N {
  using Reg = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  static constexpr bool kMasked = true;
  // 32 registers: 24 sums, the pixels, a weight.
  static constexpr int max_vectors(Load load, int filters) {
    constexpr int kFit[kMaxFilters] = {8, 6, 5, 4, 4, 4, 3, 3, 2, 2, 2, 2};
    return load == Load::stretch ? kFit[filters - 1] : 2;
  }
  static constexpr int max_blocks(int pixels) {
    constexpr int kFit[kMaxPixels] = {8, 8, 6, 6, 4, 4, 3, 3};
    return kFit[pixels - 1];
  }

  static Mask mask(int from, int to) { return static_cast<Mask>((1u << to) - (1u << from)); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static Reg load_masked(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static void store_masked(float* p, Mask m, Reg r) { _mm512_mask_storeu_ps(p, m, r); }
  static Reg load_halves(const float* a, const float* b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
  }
  static Reg load_strided(const float* a, const float* b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(_mm512_loadu_ps(a), even, _mm512_loadu_ps(b));
  }
  static Reg set(float x) { return _mm512_set1_ps(x); }
  static Reg broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  // All lanes chosen: gcc 12 takes the unmasked forms for uses of something uninitialised.
  static Reg max(Reg a, Reg b) { return _mm512_maskz_max_ps(0xffff, a, b); }
  static Reg larger(Reg a, Reg b) { return _mm512_mask_mov_ps(max(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a); }
  static Reg min(Reg a, Reg b) { return _mm512_maskz_min_ps(0xffff, a, b); }
  static Reg pow2(Reg t) {
    const __m512i exponent = _mm512_maskz_slli_epi32(0xffff, _mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
  }
  static void transpose(const float* const* rows, int from, float* to) { transpose_block(rows, from, to); }
  static bool store_planes(const Call& call, const float* const* rows, int from, int filters) {
    const Tile& tile = *call.tile;
    if (!call.clamps || tile.first[1] - tile.first[0] != 1) return false;
    const Segment& s = tile.segments[tile.first[0]];
    const auto mask = static_cast<__mmask8>((1u << s.to) - (1u << s.from));
    const __m256 low = _mm256_set1_ps(call.low), high = _mm256_set1_ps(call.high);
    float* out = call.out + s.out;
    const float* residual = call.residual == nullptr ? nullptr : call.residual + s.residual;
    for (int half = 0; half < filters; half += 8) {
      __m256 sums[8];
      transpose_eight(rows, from + half, sums);
      for (int i = 0; i < 8 && half + i < filters; ++i) {
        __m256 sum = sums[i];
        if (call.residual != nullptr) {
          sum = _mm256_add_ps(sum, _mm256_maskz_loadu_ps(mask, residual));
          residual += call.residual_plane;
        }
        _mm256_mask_storeu_ps(out, mask, _mm256_min_ps(high, _mm256_max_ps(low, sum)));
        out += call.out_plane;
      }
    }
    return true;
  }
};

#include "conv/kernels-inl.h"

}  // namespace

const Kernels avx512_kernels = ACF_KERNEL_TABLE;

}  // namespace acf::conv
