// Included inside an anonymous namespace; needs AVX.

// Columns [from, from + 8) of 8 rows, as rows.
ACF_INLINE void transpose_eight(const float* const* rows, int from, __m256 (&out)[8]) {
  __m256 r[8], pair[8], quad[8];
  for (int m = 0; m < 8; ++m) r[m] = _mm256_loadu_ps(rows[m] + from);
  for (int m = 0; m < 8; m += 2) {
    pair[m] = _mm256_unpacklo_ps(r[m], r[m + 1]);
    pair[m + 1] = _mm256_unpackhi_ps(r[m], r[m + 1]);
  }
  for (int m = 0; m < 8; m += 4) {
    quad[m] = _mm256_shuffle_ps(pair[m], pair[m + 2], 0x44);
    quad[m + 1] = _mm256_shuffle_ps(pair[m], pair[m + 2], 0xee);
    quad[m + 2] = _mm256_shuffle_ps(pair[m + 1], pair[m + 3], 0x44);
    quad[m + 3] = _mm256_shuffle_ps(pair[m + 1], pair[m + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

inline void transpose_block(const float* const* rows, int from, float* to) {
  for (int half = 0; half < kBlock; half += 8) {
    __m256 out[8];
    transpose_eight(rows, from + half, out);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + (half + i) * 8, out[i]);
  }
}
