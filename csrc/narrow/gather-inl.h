// Gathering tiles of pixels of integers without AVX-512: the pixels of a column side by side, then W::quantize.

// pixels[kTile]: of a column; lanes beyond the count keep what they have.
inline void read_pixels(const Reads& reads, const float* from, float* pixels) {
  if (reads.stretches == 1 && reads.step == 1 && reads.count == kTile) {
    std::memcpy(pixels, from + reads.stretch[0].at, kTile * sizeof(float));
    return;
  }
  for (int i = 0; i < reads.count; ++i) pixels[i] = from[reads.lanes[i]];
}

void gather_int8(const GatherCall& call) {
  alignas(64) float pixels[4][kTile] = {};
  const std::int32_t* offset = call.offsets;
  unsigned char* to = call.to;
  for (std::int64_t left = call.columns; left > 0; left -= 4, offset += 4, to += kRowBytes) {
    for (int c = 0; c < 4; ++c) {
      if (c < left) {
        read_pixels(*call.reads, call.in + offset[c], pixels[c]);
      } else {
        std::memset(pixels[c], 0, sizeof(pixels[c]));
      }
    }
    W::quantize(pixels, call.inverse, call.zero, to);
  }
}
