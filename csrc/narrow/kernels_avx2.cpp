// Without an instruction for four products at once: those of 16 bits, two by two, whose sums are exact, unlike those of
// 8 bits (maddubs saturates).
#include <immintrin.h>

#include <cstring>

#include "narrow/kernels.h"

namespace acf::narrow {
namespace {

using namespace conv;

#include "core/unrolled-inl.h"

#include "conv/registers_avx2-inl.h"

#include "conv/finish-inl.h"

#include "narrow/finish-inl.h"

struct W {
  static __m256i integers(const float* x, __m256 inverse, __m256i zero) {
    const __m256 scaled = _mm256_min_ps(_mm256_mul_ps(_mm256_load_ps(x), inverse), _mm256_set1_ps(65536.0f));
    return _mm256_add_epi32(_mm256_cvtps_epi32(scaled), zero);
  }
  static void quantize(const float (&pixels)[4][kTile], float inverse, std::int32_t zero, unsigned char* to) {
    const __m256 by = _mm256_set1_ps(inverse);
    const __m256i plus = _mm256_set1_epi32(zero);
    const __m256i together =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int half = 0; half < kTile; half += 8) {
      const __m256i ab = _mm256_packs_epi32(integers(pixels[0] + half, by, plus), integers(pixels[1] + half, by, plus)),
                    cd = _mm256_packs_epi32(integers(pixels[2] + half, by, plus), integers(pixels[3] + half, by, plus));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * half),
                          _mm256_shuffle_epi8(_mm256_packus_epi16(ab, cd), together));
    }
  }
};

#include "narrow/gather-inl.h"

void gather_int8(const GatherCall& call) {
  gather_rows<4>(call, [&call](const float(&pixels)[4][kTile], unsigned char* to) {
    W::quantize(pixels, call.inverse, call.zero, to);
  });
}

// 4 filters, 16 pixels.
void product_of_four(const ProductCall& call, const unsigned char* weights, const unsigned char* pixels,
                     unsigned char* sums) {
  const __m256i low = _mm256_set1_epi16(0x00ff);
  __m256i sum[4][2];
  unrolled<4>([&](auto i) { sum[i][0] = sum[i][1] = _mm256_setzero_si256(); });
  for (std::int64_t row = 0; row < call.rows; ++row, weights += 2 * kRowBytes, pixels += kRowBytes) {
    __m256i even[2], odd[2];
    unrolled<2>([&](auto h) {
      const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(pixels + 32 * h));
      even[h] = _mm256_and_si256(x, low);
      odd[h] = _mm256_srli_epi16(x, 8);
    });
    unrolled<4>([&](auto i) {
      std::int32_t w[2];
      std::memcpy(w, weights + 8 * i, sizeof(w));
      const __m256i even_weight = _mm256_set1_epi32(w[0]), odd_weight = _mm256_set1_epi32(w[1]);
      unrolled<2>([&](auto h) {
        sum[i][h] = _mm256_add_epi32(sum[i][h], _mm256_add_epi32(_mm256_madd_epi16(even[h], even_weight),
                                                                 _mm256_madd_epi16(odd[h], odd_weight)));
      });
    });
  }
  unrolled<4>([&](auto i) {
    unrolled<2>(
        [&](auto h) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i * kRowBytes + 32 * h), sum[i][h]); });
  });
}

void product_int8(const ProductCall& call) {
  auto* sums = static_cast<unsigned char*>(call.sums);
  for (int f = 0; f < call.filter_tiles; ++f) {
    for (int p = 0; p < call.pixel_tiles; ++p, sums += kStepBytes) {
      for (int i = 0; i < kTile; i += 4) {
        product_of_four(call, call.weights + f * call.weights_pitch + 8 * i, call.pixels + p * call.pixels_pitch,
                        sums + i * kRowBytes);
      }
    }
  }
}

}  // namespace

const Kernels avx2_kernels = {
    N::kLanes, Order::halves,           0,       0,      {}, {gather_int8, product_int8, finish_int8},
    copy_rows, {round_row, finish_row}, nullptr, nullptr};

}  // namespace acf::narrow
