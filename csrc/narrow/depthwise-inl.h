// Sums of a depthwise convolution on bytes, for units without a quicker way.

inline void depthwise_int8(const DepthwiseCall& call) {
  for (int p = 0; p < call.count; ++p) {
    for (int f = 0; f < call.filter_tiles; ++f) {
      const unsigned char* pixel = call.in + call.pixels[p] + f * kTile;
      const unsigned char* weights = call.weights + f * kTile;
      const std::int64_t left = call.channels - f * kTile, channels = left < kTile ? left : kTile;
      std::int32_t sum[kTile];
      std::memcpy(sum, call.start + f * kTile, sizeof(sum));
      for (std::int64_t tap = 0; tap < call.taps; ++tap, weights += kTogether * kTile) {
        unsigned char x[kTile] = {};
        if (channels == kTile) {
          std::memcpy(x, pixel + call.offsets[tap], kTile);
        } else {
          std::memcpy(x, pixel + call.offsets[tap], static_cast<std::size_t>(channels));
        }
        for (int i = 0; i < kTile; ++i)
          sum[i] += static_cast<signed char>(weights[i]) * static_cast<std::int32_t>(x[i]);
      }
      std::memcpy(call.sums + (f * kMostPixels + p) * kTile, sum, sizeof(sum));
    }
  }
}
