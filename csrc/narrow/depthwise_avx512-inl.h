// Depthwise convolutions on bytes with VNNI, after bytes_avx512-inl.h.

// ---- pixels, 64 channels of each -----------------------------------------------------------------------------------

// A product adds up four bytes, here of neighbouring channels: with the weights of three of them set to zero it is that
// of the fourth. So a tap of 64 channels takes four products, and nothing is moved about.
template <int kPixels, bool kLow>
ACF_INLINE void depthwise_pixels(const DepthwiseCall& call, const TurnedChannels& turned, const ByteFinishCall& finish,
                                 const Bytes<kLow>& bytes, int first, __mmask64 mask) {
  __m512i sum[kPixels][4];
  const unsigned char* at[kPixels];
  unrolled<4>([&](auto j) {
    const __m512i start = _mm512_loadu_si512(turned.start + j * kTile);
    unrolled<kPixels>([&](auto p) { sum[p][j] = start; });
  });
  unrolled<kPixels>([&](auto p) { at[p] = call.in + call.pixels[first + p]; });
  const unsigned char* weights = call.weights;
  for (std::int64_t tap = 0; tap < call.taps; ++tap, weights += kTogether * kTile) {
    const __m512i w = _mm512_load_si512(weights);
    __m512i x[kPixels];
    unrolled<kPixels>([&](auto p) { x[p] = _mm512_maskz_loadu_epi8(mask, at[p] + call.offsets[tap]); });
    unrolled<4>([&](auto j) {
      const __m512i own = _mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffu << (8 * j))));
      unrolled<kPixels>([&](auto p) { sum[p][j] = _mm512_dpbusd_epi32(sum[p][j], x[p], own); });
    });
  }
  const __m512i order =
      _mm512_maskz_broadcast_i32x4(0xffff, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  Reg multiplier[4], bias[4];
  unrolled<4>([&](auto j) {
    multiplier[j] = N::load(turned.multipliers + j * kTile);
    bias[j] = N::load(turned.bias + j * kTile);
  });
  unrolled<kPixels>([&](auto p) {
    __m512i integers[4];
    unrolled<4>([&](auto j) { integers[j] = bytes.integers(result(sum[p][j], multiplier[j], bias[j])); });
    _mm512_mask_storeu_epi8(finish.out + finish.pixels[first + p], mask,
                            _mm512_shuffle_epi8(bytes.packed(integers), order));
  });
}

inline void depthwise_bytes(const DepthwiseCall& call, const TurnedChannels& turned, const ByteFinishCall& finish) {
  const std::int64_t count = std::min<std::int64_t>(call.channels, call.filter_tiles * kTile);
  const __mmask64 mask = ~std::uint64_t{0} >> (kRegisterBytes - count);
  with_low(finish, [&](auto low) {
    const Bytes<low> bytes(finish);
    int p = 0;
    for (; p + 4 <= call.count; p += 4) depthwise_pixels<4>(call, turned, finish, bytes, p, mask);
    for (; p < call.count; ++p) depthwise_pixels<1>(call, turned, finish, bytes, p, mask);
  });
}

// ---- rows, 64 bytes of each ----------------------------------------------------------------------------------------

// The three taps of a kernel row are brought side by side once for the three output rows that read them.
template <int kRows, bool kLow>
ACF_INLINE void depthwise_register(const DepthwiseRowsCall& call, const Bytes<kLow>& bytes, std::int64_t phase,
                                   std::int64_t at, __mmask64 mask) {
  __m512i sum[kRows][4], w[3][4];
  unrolled<4>([&](auto j) {
    const __m512i start = _mm512_load_si512(call.start + phase * kTogether * kTile + j * kTile);
    unrolled<kRows>([&](auto r) { sum[r][j] = start; });
    unrolled<3>(
        [&](auto kh) { w[kh][j] = _mm512_load_si512(call.weights + ((phase * 3 + kh) * 4 + j) * kRegisterBytes); });
  });
  const unsigned char* in = call.in + at;
  const __m512i none = _mm512_setzero_si512();
  constexpr __mmask64 kAll = ~std::uint64_t{0};
  unrolled<kRows + 2>([&](auto i) {
    const __m512i a = _mm512_maskz_loadu_epi8(mask, in), b = _mm512_maskz_loadu_epi8(mask, in + call.pixel),
                  c = _mm512_maskz_loadu_epi8(mask, in + 2 * call.pixel);
    in += call.in_row;
    const __m512i ab_low = _mm512_maskz_unpacklo_epi8(kAll, a, b), ab_high = _mm512_maskz_unpackhi_epi8(kAll, a, b),
                  c_low = _mm512_maskz_unpacklo_epi8(kAll, c, none), c_high = _mm512_maskz_unpackhi_epi8(kAll, c, none);
    constexpr auto kWords = static_cast<__mmask32>(kAll);
    const __m512i x[4] = {
        _mm512_maskz_unpacklo_epi16(kWords, ab_low, c_low), _mm512_maskz_unpackhi_epi16(kWords, ab_low, c_low),
        _mm512_maskz_unpacklo_epi16(kWords, ab_high, c_high), _mm512_maskz_unpackhi_epi16(kWords, ab_high, c_high)};
    unrolled<3>([&](auto kh) {
      constexpr int r = i - kh;
      if constexpr (r >= 0 && r < kRows) {
        unrolled<4>([&](auto j) { sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], x[j], w[kh][j]); });
      }
    });
  });
  unsigned char* out = call.out + at;
  const float *multipliers = call.multipliers + phase * kTogether * kTile,
              *bias = call.bias + phase * kTogether * kTile;
  unrolled<kRows>([&](auto r) {
    __m512i integers[4];
    unrolled<4>([&](auto j) {
      integers[j] = bytes.integers(result(sum[r][j], N::load(multipliers + j * kTile), N::load(bias + j * kTile)));
    });
    _mm512_mask_storeu_epi8(out, mask, bytes.packed(integers));
    out += call.out_row;
  });
}

template <int kRows, bool kLow>
void depthwise_some_rows(const DepthwiseRowsCall& call, const Bytes<kLow>& bytes) {
  std::int64_t phase = 0;
  for (std::int64_t at = 0; at < call.bytes; at += kRegisterBytes) {
    const std::int64_t left = call.bytes - at;
    const __mmask64 mask = ~std::uint64_t{0} >> (left < kRegisterBytes ? kRegisterBytes - left : 0);
    depthwise_register<kRows>(call, bytes, phase, at, mask);
    if (++phase == call.phases) phase = 0;
  }
}

inline void depthwise_rows(const DepthwiseRowsCall& call, const ByteFinishCall& finish) {
  with_low(finish, [&](auto low) {
    const Bytes<low> bytes(finish);
    switch (call.rows) {
      case 1: return depthwise_some_rows<1>(call, bytes);
      case 2: return depthwise_some_rows<2>(call, bytes);
      case 3: return depthwise_some_rows<3>(call, bytes);
      default: return depthwise_some_rows<kRowsAtOnce>(call, bytes);
    }
  });
}
