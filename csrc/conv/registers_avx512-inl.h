// N for AVX-512: see finish-inl.h and kernels-inl.h.

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
  static Reg difference(const std::int32_t* p, std::int32_t x) {
    const __m512i integers = _mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(x));
    return _mm512_maskz_cvtepi32_ps(0xffff, integers);
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
  static Reg smaller(Reg a, Reg b) { return min(a, b); }
  static Reg pow2(Reg t) {
    const __m512i exponent = _mm512_maskz_slli_epi32(0xffff, _mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
  }
  static Reg choose(unsigned bits, int, Reg zero, Reg one) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), zero, one);
  }
  static constexpr int kMaxPieces = 4;
  static Reg load_pieces(const float* const (&p)[2], const Mask (&m)[2]) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_maskz_loadu_ps(static_cast<__mmask8>(m[0]), p[0])),
                              _mm256_maskz_loadu_ps(static_cast<__mmask8>(m[1]), p[1]), 1);
  }
  static Reg load_pieces(const float* const (&p)[4], const Mask (&m)[4]) {
    __m128 quarter[4];
    for (int i = 0; i < 4; ++i) quarter[i] = _mm_maskz_loadu_ps(static_cast<__mmask8>(m[i]), p[i]);
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(quarter[0]), quarter[1], 1),
                 high = _mm256_insertf128_ps(_mm256_castps128_ps256(quarter[2]), quarter[3], 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  // The lowest piece is stored by a mask: in casts gcc 12 sees something uninitialised.
  static void store_pieces(float* const (&p)[2], const Mask (&m)[2], Reg r) {
    _mm512_mask_storeu_ps(p[0], m[0], r);
    _mm256_mask_storeu_ps(p[1], static_cast<__mmask8>(m[1]), _mm512_maskz_extractf32x8_ps(0xff, r, 1));
  }
  static void store_pieces(float* const (&p)[4], const Mask (&m)[4], Reg r) {
    _mm512_mask_storeu_ps(p[0], m[0], r);
    _mm_mask_storeu_ps(p[1], static_cast<__mmask8>(m[1]), _mm512_maskz_extractf32x4_ps(0xf, r, 1));
    _mm_mask_storeu_ps(p[2], static_cast<__mmask8>(m[2]), _mm512_maskz_extractf32x4_ps(0xf, r, 2));
    _mm_mask_storeu_ps(p[3], static_cast<__mmask8>(m[3]), _mm512_maskz_extractf32x4_ps(0xf, r, 3));
  }
  static void transpose_quads(Reg (&r)[4]) {
    const Reg ab_low = _mm512_maskz_unpacklo_ps(0xffff, r[0], r[1]),
              ab_high = _mm512_maskz_unpackhi_ps(0xffff, r[0], r[1]),
              cd_low = _mm512_maskz_unpacklo_ps(0xffff, r[2], r[3]),
              cd_high = _mm512_maskz_unpackhi_ps(0xffff, r[2], r[3]);
    r[0] = _mm512_maskz_shuffle_ps(0xffff, ab_low, cd_low, 0x44);
    r[1] = _mm512_maskz_shuffle_ps(0xffff, ab_low, cd_low, 0xee);
    r[2] = _mm512_maskz_shuffle_ps(0xffff, ab_high, cd_high, 0x44);
    r[3] = _mm512_maskz_shuffle_ps(0xffff, ab_high, cd_high, 0xee);
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
