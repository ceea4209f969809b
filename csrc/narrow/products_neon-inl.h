// A register holds 4 pixels: all 16 meet 4 filters at a time. sum = dot(sum, pixels, weights), of 4 columns.

template <class Dot>
ACF_INLINE void product_of_four(const ProductCall& call, const unsigned char* weights, const unsigned char* pixels,
                                unsigned char* sums, const Dot& dot) {
  int32x4_t sum[4][4];
  unrolled<4>([&](auto i) { unrolled<4>([&](auto q) { sum[i][q] = vdupq_n_s32(0); }); });
  for (std::int64_t row = 0; row < call.rows; ++row, weights += kRowBytes, pixels += kRowBytes) {
    int8x16_t x[4];
    unrolled<4>([&](auto q) { x[q] = vreinterpretq_s8_u8(vld1q_u8(pixels + 16 * q)); });
    unrolled<4>([&](auto i) {
      std::int32_t w;
      std::memcpy(&w, weights + 4 * i, sizeof(w));
      const int8x16_t weight = vreinterpretq_s8_s32(vdupq_n_s32(w));
      unrolled<4>([&](auto q) { sum[i][q] = dot(sum[i][q], x[q], weight); });
    });
  }
  unrolled<4>([&](auto i) {
    unrolled<4>([&](auto q) { vst1q_u8(sums + i * kRowBytes + 16 * q, vreinterpretq_u8_s32(sum[i][q])); });
  });
}

template <class Dot>
ACF_INLINE void product_by_rows(const ProductCall& call, const Dot& dot) {
  auto* sums = static_cast<unsigned char*>(call.sums);
  for (int f = 0; f < call.filter_tiles; ++f) {
    for (int p = 0; p < call.pixel_tiles; ++p, sums += kStepBytes) {
      for (int i = 0; i < kTile; i += 4) {
        product_of_four(call, call.weights + f * call.weights_pitch + 4 * i, call.pixels + p * call.pixels_pitch,
                        sums + i * kRowBytes, dot);
      }
    }
  }
}
