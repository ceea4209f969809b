// Products with AVX-512: a register of sums for every filter of a tile, whose weights are broadcast.

// sums += dot(sums, pixels, weights), of 4 bytes of columns.
template <class Sum, class Dot, class Store>
ACF_INLINE void product_by_rows(const ProductCall& call, Sum zero, const Dot& dot, const Store& store) {
  auto* sums = static_cast<unsigned char*>(call.sums);
  for (int f = 0; f < call.filter_tiles; ++f) {
    for (int p = 0; p < call.pixel_tiles; ++p, sums += kStepBytes) {
      const unsigned char *weights = call.weights + f * call.weights_pitch,
                          *pixels = call.pixels + p * call.pixels_pitch;
      Sum sum[kTile];
      unrolled<kTile>([&](auto i) { sum[i] = zero; });
      for (std::int64_t row = 0; row < call.rows; ++row, weights += kRowBytes, pixels += kRowBytes) {
        const __m512i x = _mm512_load_si512(pixels);
        unrolled<kTile>([&](auto i) {
          std::int32_t w;
          std::memcpy(&w, weights + 4 * i, sizeof(w));
          sum[i] = dot(sum[i], x, _mm512_set1_epi32(w));
        });
      }
      unrolled<kTile>([&](auto i) { store(sums + i * kRowBytes, sum[i]); });
    }
  }
}
