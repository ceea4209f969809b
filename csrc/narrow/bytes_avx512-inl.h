// Products on bytes with VNNI, after gather_avx512-inl.h and products_avx512-inl.h: registers of sums hold 16 filters
// of a pixel. Weights are read once for some pixels, a pixel once for some tiles of filters: fewer loads than products.

// Rows of columns [offset, end) of some pixels; kAhead: the weights are asked for before they are read.
template <int kCount, int kTiles, bool kAhead>
ACF_INLINE void broadcast_pixels(const BroadcastCall& call, int first, const std::int32_t* offset,
                                 const std::int32_t* end, const unsigned char* weights) {
  __m512i sum[kCount][kTiles];
  const unsigned char* at[kCount];
  const auto each = [](const auto& body) {
    unrolled<kCount>([&](auto p) { unrolled<kTiles>([&](auto f) { body(p, f); }); });
  };
  const auto stored = [&](auto p, auto f) { return call.sums + (f * kPixels + first + p) * kTile; };
  unrolled<kCount>([&](auto p) { at[p] = call.in + call.pixels[first + p]; });
  if (offset == call.offsets) {
    each([&](auto p, auto f) { sum[p][f] = _mm512_setzero_si512(); });
  } else {
    each([&](auto p, auto f) { sum[p][f] = _mm512_load_si512(stored(p, f)); });
  }
  for (; offset != end; ++offset, weights += kTiles * kRowBytes) {
    const std::int64_t row = *offset;
    __m512i w[kTiles];
    unrolled<kTiles>([&](auto f) {
      w[f] = _mm512_load_si512(weights + f * kRowBytes);
      if constexpr (kAhead) __builtin_prefetch(weights + f * kRowBytes + kAheadBytes);
    });
    unrolled<kCount>([&](auto p) {
      std::int32_t x;
      std::memcpy(&x, at[p] + row, sizeof(x));
      const __m512i same = _mm512_set1_epi32(x);
      unrolled<kTiles>([&](auto f) { sum[p][f] = _mm512_dpbusd_epi32(sum[p][f], same, w[f]); });
    });
  }
  each([&](auto p, auto f) { _mm512_store_si512(stored(p, f), sum[p][f]); });
}

// At most 24 sums at once; so many rows at a time that their weights stay in the first-level cache for all pixels.
template <int kMost, int kTiles>
void broadcast_tiles(const BroadcastCall& call) {
  constexpr std::int64_t kChunk = (16 << 10) / (kTiles * kRowBytes);
  const unsigned char* weights = call.weights;
  std::int64_t row = 0;
  do {
    const std::int64_t rows = std::min(kChunk, call.rows - row);
    const std::int32_t *offset = call.offsets + row, *end = offset + rows;
    int first = 0;
    if (call.streams && call.count >= kMost) {
      broadcast_pixels<kMost, kTiles, true>(call, 0, offset, end, weights);
      first = kMost;
    }
    while (first < call.count) {
      const int left = call.count - first;
      if (left >= kMost) {
        broadcast_pixels<kMost, kTiles, false>(call, first, offset, end, weights);
        first += kMost;
      } else if (left >= 4) {
        broadcast_pixels<4, kTiles, false>(call, first, offset, end, weights);
        first += 4;
      } else if (left >= 2) {
        broadcast_pixels<2, kTiles, false>(call, first, offset, end, weights);
        first += 2;
      } else {
        broadcast_pixels<1, kTiles, false>(call, first, offset, end, weights);
        first += 1;
      }
    }
    weights += rows * kTiles * kRowBytes;
    row += rows;
  } while (row < call.rows);
}

inline void broadcast_int8(const BroadcastCall& call) {
  switch (call.filter_tiles) {
    case 1: return broadcast_tiles<8, 1>(call);
    case 2: return broadcast_tiles<8, 2>(call);
    case 3: return broadcast_tiles<8, 3>(call);
    default: return broadcast_tiles<6, 4>(call);
  }
}

// To 0..255.
ACF_INLINE __m128i bytes_of(const Quantize& quantize, __m512 x) {
  const __m512i integers = _mm512_maskz_max_epi32(0xffff, quantize.integers(x), _mm512_setzero_si512());
  return _mm512_maskz_cvtusepi32_epi8(0xffff, integers);
}

template <bool kClamps, bool kAdds>
ACF_INLINE void finish_bytes_of(const ByteFinishCall& call) {
  const Reg low = N::set(call.call->low), high = N::set(call.call->high);
  GatherCall numbers = {};
  numbers.inverse = call.inverse;
  numbers.zero = call.zero;
  const Quantize quantize(numbers);
  const __m512i residual_zero = _mm512_set1_epi32(call.residual_zero);
  const Reg residual_scale = N::set(call.residual_scale);
  for (int f = 0; f < call.filter_tiles; ++f) {
    const __m512i correction = _mm512_loadu_si512(call.corrections + f * kTile);
    const Reg multiplier = N::load(call.multipliers + f * kTile), bias = N::load(call.bias + f * kTile);
    const std::int64_t left = call.channels - f * kTile;
    const auto mask = static_cast<__mmask16>(left >= kTile ? 0xffff : (1u << left) - 1);
    const std::int32_t* sums = call.sums + f * kPixels * kTile;
    for (int p = 0; p < call.count; ++p) {
      const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + p * kTile), correction);
      Reg y = N::add(N::mul(_mm512_maskz_cvtepi32_ps(0xffff, sum), multiplier), bias);
      if constexpr (kAdds) {
        const __m128i bytes = _mm_maskz_loadu_epi8(mask, call.residual + call.residual_pixels[p] + f * kTile);
        const __m512i added = _mm512_sub_epi32(_mm512_maskz_cvtepu8_epi32(0xffff, bytes), residual_zero);
        y = N::add(y, N::mul(_mm512_maskz_cvtepi32_ps(0xffff, added), residual_scale));
      }
      const Reg activated = kClamps ? N::min(high, N::max(low, y)) : activate(*call.call, y);
      _mm_mask_storeu_epi8(call.out + call.pixels[p] + f * kTile, mask, bytes_of(quantize, activated));
    }
  }
}

inline void finish_bytes(const ByteFinishCall& call) {
  if (call.residual != nullptr)
    return call.call->clamps ? finish_bytes_of<true, true>(call) : finish_bytes_of<false, true>(call);
  return call.call->clamps ? finish_bytes_of<true, false>(call) : finish_bytes_of<false, false>(call);
}

inline void turn_tile(const std::int32_t* from, std::int32_t* to) {
  transpose_tile(reinterpret_cast<const unsigned char*>(from), reinterpret_cast<unsigned char*>(to));
}

// 64 channels at a time: fours of them for 16 pixels, turned.
inline void interleave_int8(const InterleaveCall& call) {
  GatherCall numbers = {};
  numbers.inverse = call.inverse;
  numbers.zero = call.zero;
  const Quantize quantize(numbers);
  const auto pixels = static_cast<__mmask16>((1u << call.count) - 1);
  const auto row = [&](std::int64_t channel) {
    __m512 x[4];
    for (int i = 0; i < 4; ++i) {
      const std::int64_t c = std::min(channel + i, call.channels - 1);
      x[i] = _mm512_maskz_loadu_ps(pixels, call.in + c * call.plane);
    }
    return quantize.row(x);
  };
  if (call.pixel == 4) {
    _mm512_mask_storeu_epi32(call.to, pixels, row(0));
    return;
  }
  alignas(64) std::int32_t fours[kTile * kTile], turned[kTile * kTile];
  for (std::int64_t c = 0; c < call.channels; c += 4 * kTile) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTile, (call.channels - c + 3) / 4));
    for (int i = 0; i < count; ++i) _mm512_store_si512(fours + i * kTile, row(c + 4 * i));
    turn_tile(fours, turned);
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    for (int p = 0; p < call.count; ++p) {
      _mm512_mask_storeu_epi32(call.to + p * call.pixel + c, mask, _mm512_load_si512(turned + p * kTile));
    }
  }
}
