// Gathered integers are q - 128, which products of signed numbers take.

struct W {
  static int16x8_t integers(const float* a, const float* b, float32x4_t inverse, int32x4_t zero) {
    const float32x4_t most = vdupq_n_f32(65536.0f);
    const auto scaled = [&](const float* p) {
      const float32x4_t x = vmulq_f32(vld1q_f32(p), inverse);
      // NaN is not less.
      return vaddq_s32(vcvtnq_s32_f32(vbslq_f32(vcltq_f32(x, most), x, most)), zero);
    };
    return vcombine_s16(vqmovn_s32(scaled(a)), vqmovn_s32(scaled(b)));
  }
  static void quantize(const float (&pixels)[4][kTile], float inverse, std::int32_t zero, unsigned char* to) {
    const float32x4_t by = vdupq_n_f32(inverse);
    const int32x4_t plus = vdupq_n_s32(zero);
    for (int half = 0; half < kTile; half += 8) {
      uint8x8x4_t columns;
      for (int c = 0; c < 4; ++c) {
        const uint8x8_t q = vqmovun_s16(integers(pixels[c] + half, pixels[c] + half + 4, by, plus));
        columns.val[c] = veor_u8(q, vdup_n_u8(0x80));
      }
      vst4_u8(to + 4 * half, columns);
    }
  }
};
