// Gathering tiles of pixels without AVX-512: the pixels of the columns of a row side by side, then what makes them a
// row.

// pixels[kTile]: of a column; lanes beyond the count keep what they have.
inline void read_pixels(const Reads& reads, const float* from, float* pixels) {
  if (reads.stretches == 1 && reads.step == 1 && reads.count == kTile) {
    std::memcpy(pixels, from + reads.stretch[0].at, kTile * sizeof(float));
    return;
  }
  for (int i = 0; i < reads.count; ++i) pixels[i] = from[reads.lanes[i]];
}

// make(pixels, to) for every row of kColumns columns.
template <int kColumns, class Make>
ACF_INLINE void gather_rows(const GatherCall& call, const Make& make) {
  alignas(64) float pixels[kColumns][kTile] = {};
  const std::int32_t* offset = call.offsets;
  unsigned char* to = call.to;
  for (std::int64_t left = call.columns; left > 0; left -= kColumns, offset += kColumns, to += kRowBytes) {
    for (int c = 0; c < kColumns; ++c) {
      if (c < left) {
        read_pixels(*call.reads, call.in + offset[c], pixels[c]);
      } else {
        std::memset(pixels[c], 0, sizeof(pixels[c]));
      }
    }
    make(pixels, to);
  }
}

inline void copy_rows(const CopyCall& call) {
  const Reads& reads = *call.reads;
  const bool together = reads.stretches == 1 && reads.step == 1 && reads.count == kTile;
  unsigned char* to = call.to;
  for (std::int64_t row = 0; row < call.rows; ++row, to += kRowBytes) {
    const float* from = call.in + call.offsets[row];
    if (together) {
      std::memcpy(to, from + reads.stretch[0].at, kRowBytes);
      continue;
    }
    std::memset(to, 0, kRowBytes);
    for (int i = 0; i < reads.count; ++i) std::memcpy(to + 4 * i, from + reads.lanes[i], 4);
  }
}
