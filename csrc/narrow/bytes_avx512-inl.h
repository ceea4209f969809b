// Products on bytes with VNNI, after gather_avx512-inl.h and products_avx512-inl.h: registers of sums hold 16 filters
// of a pixel. Weights are read once for some pixels, a pixel once for some tiles of filters: fewer loads than products.

// So many rows at a time that the weights of all tiles stay in the first-level cache for all pixels.
template <int kTiles>
inline constexpr std::int64_t kChunk = (16 << 10) / (kTiles * kRowBytes);

// Rows [row, row + rows) of columns for some pixels. kAhead: lines of weights that are asked for with every row.
template <int kCount, int kTiles, int kAhead>
__attribute__((noinline)) void broadcast_pixels(const BroadcastCall& call, int first, std::int64_t row,
                                                std::int64_t rows, const unsigned char* ahead) {
  __m512i sum[kCount][kTiles];
  const unsigned char* at[kCount];
  const auto each = [](const auto& body) {
    unrolled<kCount>([&](auto p) { unrolled<kTiles>([&](auto f) { body(p, f); }); });
  };
  const auto stored = [&](auto p, auto f) { return call.sums + (f * kMostPixels + first + p) * kTile; };
  unrolled<kCount>([&](auto p) { at[p] = call.in + call.pixels[first + p]; });
  if (row == 0) {
    each([&](auto p, auto f) { sum[p][f] = _mm512_load_si512(call.start + f * kTile); });
  } else {
    each([&](auto p, auto f) { sum[p][f] = _mm512_load_si512(stored(p, f)); });
  }
  const unsigned char* weights = call.weights + row * kTiles * kRowBytes;
  for (const std::int32_t *offset = call.offsets + row, *end = offset + rows; offset != end; ++offset) {
    const std::int64_t from = *offset;
    __m512i w[kTiles];
    unrolled<kTiles>([&](auto f) { w[f] = _mm512_load_si512(weights + f * kRowBytes); });
    weights += kTiles * kRowBytes;
    unrolled<kAhead>([&](auto i) { __builtin_prefetch(ahead + i * kRowBytes, 0, 2); });
    ahead += kAhead * kRowBytes;
    unrolled<kCount>([&](auto p) {
      std::int32_t x;
      std::memcpy(&x, at[p] + from, sizeof(x));
      const __m512i same = _mm512_set1_epi32(x);
      unrolled<kTiles>([&](auto f) { sum[p][f] = _mm512_dpbusd_epi32(sum[p][f], same, w[f]); });
    });
  }
  each([&](auto p, auto f) { _mm512_store_si512(stored(p, f), sum[p][f]); });
}

// All pixels with a chunk of rows, at most kMost at once.
template <int kMost, int kTiles, int kAhead>
ACF_INLINE void broadcast_chunk(const BroadcastCall& call, std::int64_t row, std::int64_t rows) {
  const unsigned char* ahead = call.weights + (row + rows) * kTiles * kRowBytes;
  for (int first = 0; first < call.count; ahead += kAhead * rows * kRowBytes) {
    const int left = call.count - first;
    if (left >= kMost) {
      broadcast_pixels<kMost, kTiles, kAhead>(call, first, row, rows, ahead);
      first += kMost;
    } else if (left >= 4) {
      broadcast_pixels<4, kTiles, kAhead>(call, first, row, rows, ahead);
      first += 4;
    } else if (left >= 2) {
      broadcast_pixels<2, kTiles, kAhead>(call, first, row, rows, ahead);
      first += 2;
    } else {
      broadcast_pixels<1, kTiles, kAhead>(call, first, row, rows, ahead);
      first += 1;
    }
  }
}

template <int kMost, int kTiles>
void broadcast_tiles(const BroadcastCall& call) {
  std::int64_t row = 0;
  do {
    const std::int64_t rows = std::min(kChunk<kTiles>, call.rows - row);
    // Weights that stream are asked for while the chunk before is multiplied: evenly, as memory gives them.
    if (kTiles < kTogether || !call.streams) {
      broadcast_chunk<kMost, kTiles, 0>(call, row, rows);
    } else if (call.count <= kMost) {
      broadcast_chunk<kMost, kTiles, kTiles == kTogether ? kTogether : 0>(call, row, rows);
    } else {
      broadcast_chunk<kMost, kTiles, kTiles == kTogether ? kTogether / 2 : 0>(call, row, rows);
    }
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

ACF_INLINE Reg result(__m512i sum, Reg multiplier, Reg bias) {
  return N::add(N::mul(_mm512_maskz_cvtepi32_ps(0xffff, sum), multiplier), bias);
}

// Makes results bytes. Weights and residuals are finite, so sums are no NaN, and activations that clamp may do so
// after the scale, which keeps the order. kLow: unless packing cuts there anyway.
template <bool kLow>
struct Bytes {
  explicit Bytes(const ByteFinishCall& call)
      : inverse(N::set(call.inverse)),
        low(N::set(call.call->low * call.inverse)),
        // What is beyond 16 bits is beyond 8 after zero is added.
        high(N::min(N::set(65536.0f), N::set(call.call->high * call.inverse))),
        zero(_mm512_set1_epi16(static_cast<short>(call.zero))) {}

  ACF_INLINE __m512i integers(Reg y) const {
    Reg scaled = N::mul(y, inverse);
    if constexpr (kLow) scaled = N::max(low, scaled);
    return _mm512_maskz_cvtps_epi32(0xffff, N::min(scaled, high));  // NaN of smooth activations is the largest
  }
  // In every 16 bytes, 4 of each part.
  ACF_INLINE __m512i packed(const __m512i (&parts)[4]) const {
    const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(parts[0], parts[1]), zero),
                  cd = _mm512_adds_epi16(_mm512_packs_epi32(parts[2], parts[3]), zero);
    return _mm512_packus_epi16(ab, cd);
  }

  Reg inverse, low, high;
  __m512i zero;
};

// body(std::bool_constant): whether the lower end of the activation needs a look.
template <class Body>
ACF_INLINE void with_low(const ByteFinishCall& call, const Body& body) {
  const float low = call.call->low;
  if (low < -std::numeric_limits<float>::max() || (low == 0 && call.zero == 0)) return body(std::false_type{});
  body(std::true_type{});
}

// kSmooth: activations that do not clamp.
template <int kTiles, bool kSmooth, bool kLow, bool kAdds>
void finish_pixels(const ByteFinishCall& call) {
  Reg multiplier[kTiles], bias[kTiles];
  unrolled<kTiles>([&](auto f) {
    multiplier[f] = N::load(call.multipliers + f * kTile);
    bias[f] = N::load(call.bias + f * kTile);
  });
  const Bytes<kLow> numbers(call);
  const Reg scale = N::set(call.residual_scale);
  const __m512i residual_zero = _mm512_set1_epi32(call.residual_zero),
                order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const std::int64_t bytes = std::min<std::int64_t>(call.channels, kTiles * kTile);
  const __mmask64 mask = ~std::uint64_t{0} >> (64 - bytes);
  for (int p = 0; p < call.count; ++p) {
    __m512i integers[kTogether] = {};
    unrolled<kTiles>([&](auto f) {
      Reg y = result(_mm512_load_si512(call.sums + (f * kMostPixels + p) * kTile), multiplier[f], bias[f]);
      if constexpr (kAdds) {
        const unsigned char* residual = call.residual + call.residual_pixels[p] + f * kTile;
        const auto part = static_cast<__mmask16>(mask >> (f * kTile));
        const __m512i byte = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_maskz_loadu_epi8(part, residual));
        y = N::add(y, N::mul(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_sub_epi32(byte, residual_zero)), scale));
      }
      if constexpr (kSmooth) y = activate(*call.call, y);
      integers[f] = numbers.integers(y);
    });
    _mm512_mask_storeu_epi8(call.out + call.pixels[p], mask,
                            _mm512_maskz_permutexvar_epi32(0xffff, order, numbers.packed(integers)));
  }
}

template <bool kSmooth, bool kLow, bool kAdds>
void finish_bytes_of(const ByteFinishCall& call) {
  switch (call.filter_tiles) {
    case 1: return finish_pixels<1, kSmooth, kLow, kAdds>(call);
    case 2: return finish_pixels<2, kSmooth, kLow, kAdds>(call);
    case 3: return finish_pixels<3, kSmooth, kLow, kAdds>(call);
    default: return finish_pixels<4, kSmooth, kLow, kAdds>(call);
  }
}

template <bool kAdds>
ACF_INLINE void finish_bytes_added(const ByteFinishCall& call) {
  if (!call.call->clamps) return finish_bytes_of<true, false, kAdds>(call);
  with_low(call, [&](auto low) { finish_bytes_of<false, low, kAdds>(call); });
}

inline void finish_bytes(const ByteFinishCall& call) {
  return call.residual != nullptr ? finish_bytes_added<true>(call) : finish_bytes_added<false>(call);
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
