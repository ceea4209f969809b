// N for AVX2 and FMA: see finish-inl.h and kernels-inl.h.

#include "conv/transpose_x86-inl.h"

struct N {
  using Reg = __m256;
  struct Mask {
    int from, to;
  };
  static constexpr int kLanes = 8;
  static constexpr bool kMasked = false;  // a masked store takes some twenty cycles on AMD
  // 16 registers: up to 12 sums, the pixels, a weight.
  static constexpr int max_vectors(Load load, int filters) {
    constexpr int kFit[kMaxFilters] = {6, 4, 3, 3, 2, 2};
    const int fit = kFit[filters - 1];
    return load == Load::stretch || fit < 2 ? fit : 2;
  }
  static constexpr int max_blocks(int pixels) { return pixels == 1 ? 4 : pixels == 2 ? 2 : pixels <= 6 ? 1 : 0; }

  static Mask mask(int from, int to) { return {from, to}; }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static Reg load_masked(const float* p, Mask m) {
    if (m.to - m.from == kLanes) return load(p);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(m.from), lane);
    return _mm256_maskload_ps(p, _mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(m.to), lane)));
  }
  static void store_masked(float* p, Mask m, Reg r) {
    const int count = m.to - m.from;
    if (count == kLanes) return store(p, r);
    // The lanes from `from` on in front, then four, two, one of them.
    constexpr std::int32_t kFrom[2 * kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
    const Reg moved = _mm256_permutevar8x32_ps(r, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFrom + m.from)));
    __m128 part = _mm256_castps256_ps128(moved);
    p += m.from;
    if ((count & 4) != 0) {
      _mm_storeu_ps(p, part);
      part = _mm256_extractf128_ps(moved, 1);
      p += 4;
    }
    if ((count & 2) != 0) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
      part = _mm_movehl_ps(part, part);
      p += 2;
    }
    if ((count & 1) != 0) _mm_store_ss(p, part);
  }
  static Reg load_halves(const float* a, const float* b) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
  }
  static Reg load_strided(const float* a, const float* b) {
    const Reg even = _mm256_shuffle_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), 0x88);  // a0 a2 b0 b2 | a4 a6 b4 b6
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
  }
  static Reg difference(const std::int32_t* p, std::int32_t x) {
    const __m256i integers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(integers, _mm256_set1_epi32(x)));
  }
  static Reg set(float x) { return _mm256_set1_ps(x); }
  static Reg broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg larger(Reg a, Reg b) { return _mm256_blendv_ps(max(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg smaller(Reg a, Reg b) { return min(a, b); }
  static Reg pow2(Reg t) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
  }
  static Reg choose(unsigned bits, int from, Reg zero, Reg one) {
    const __m256i to_sign =
        _mm256_sub_epi32(_mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24), _mm256_set1_epi32(from));
    const __m256i signs = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), to_sign);
    return _mm256_blendv_ps(zero, one, _mm256_castsi256_ps(signs));
  }
  static constexpr int kMaxPieces = 2;
  static Reg load_pieces(const float* const (&p)[2], const Mask (&m)[2]) {
    const __m128 low = _mm256_castps256_ps128(load_masked(p[0], m[0])),
                 high = _mm256_castps256_ps128(load_masked(p[1], m[1]));
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
  }
  static void store_pieces(float* const (&p)[2], const Mask (&m)[2], Reg r) {
    store_masked(p[0], m[0], r);
    store_masked(p[1], m[1], _mm256_permute2f128_ps(r, r, 1));
  }
  static void transpose_quads(Reg (&r)[4]) {
    const Reg ab_low = _mm256_unpacklo_ps(r[0], r[1]), ab_high = _mm256_unpackhi_ps(r[0], r[1]),
              cd_low = _mm256_unpacklo_ps(r[2], r[3]), cd_high = _mm256_unpackhi_ps(r[2], r[3]);
    r[0] = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
    r[1] = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
    r[2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
    r[3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
  }
  static void transpose(const float* const* rows, int from, float* to) { transpose_block(rows, from, to); }
  static bool store_planes(const Call&, const float* const*, int, int) { return false; }
};
