// Products with AVX-512: registers of sums for 8 filters and up to 3 tiles of pixels, whose values are read once for
// all filters, and the weights of a filter, broadcast, once for all tiles. More of a register's sums than cycles that
// a product takes are under way, and loads are far fewer than products.

// Half a tile of filters.
inline constexpr int kHalf = kTile / 2;
// How far ahead weights that stream are asked for.
inline constexpr int kAheadBytes = 24 * kRowBytes;

// Ops: what a register of sums is, and how 4 bytes of columns of pixels and of weights are added to it.
template <int kPixels, class Ops>
ACF_INLINE void product_of_half(const ProductCall& call, const unsigned char* weights, const unsigned char* pixels,
                                unsigned char* sums) {
  typename Ops::Sum sum[kHalf][kPixels];
  const auto each = [](const auto& body) {
    unrolled<kHalf>([&](auto i) { unrolled<kPixels>([&](auto p) { body(i, p); }); });
  };
  each([&](auto i, auto p) {
    sum[i][p] = call.resumes ? Ops::load(sums + p * kStepBytes + i * kRowBytes) : Ops::zero();
  });
  for (std::int64_t row = 0; row < call.rows; ++row, weights += kRowBytes, pixels += kRowBytes) {
    __m512i x[kPixels];
    unrolled<kPixels>([&](auto p) { x[p] = _mm512_load_si512(pixels + p * call.pixels_pitch); });
    unrolled<kHalf>([&](auto i) {
      std::int32_t w;
      std::memcpy(&w, weights + 4 * i, sizeof(w));
      const __m512i same = _mm512_set1_epi32(w);
      unrolled<kPixels>([&](auto p) { sum[i][p] = Ops::dot(sum[i][p], x[p], same); });
    });
  }
  each([&](auto i, auto p) { Ops::store(sums + p * kStepBytes + i * kRowBytes, sum[i][p]); });
}

template <int kPixels, class Ops>
ACF_INLINE void product_of_tiles(const ProductCall& call, int filters, const unsigned char* weights,
                                 const unsigned char* pixels, unsigned char* sums) {
  for (int half = 0; half * kHalf < filters; ++half) {
    product_of_half<kPixels, Ops>(call, weights + 4 * kHalf * half, pixels, sums + kHalf * kRowBytes * half);
  }
}

// A single tile of pixels: the filters of a tile are the lanes, and pixels are broadcast, only those that are there.
template <int kPixels, int kFilters, class Ops>
ACF_INLINE void product_of_pixels(const ProductCall& call, const unsigned char* weights, const unsigned char* pixels,
                                  unsigned char (*sums)[kStepBytes]) {
  typename Ops::Sum sum[kPixels][kFilters];
  const auto each = [](const auto& body) {
    unrolled<kPixels>([&](auto i) { unrolled<kFilters>([&](auto f) { body(i, f); }); });
  };
  each([&](auto i, auto f) { sum[i][f] = Ops::zero(); });
  for (std::int64_t row = 0; row < call.rows; ++row, weights += kRowBytes, pixels += kRowBytes) {
    __m512i w[kFilters];
    unrolled<kFilters>([&](auto f) {
      w[f] = _mm512_load_si512(weights + f * call.weights_pitch);
      if (call.streams) __builtin_prefetch(weights + f * call.weights_pitch + kAheadBytes);
    });
    unrolled<kPixels>([&](auto i) {
      std::int32_t x;
      std::memcpy(&x, pixels + 4 * i, sizeof(x));
      const __m512i same = _mm512_set1_epi32(x);
      unrolled<kFilters>([&](auto f) { sum[i][f] = Ops::dot(sum[i][f], same, w[f]); });
    });
  }
  each([&](auto i, auto f) { Ops::store(sums[f] + i * kRowBytes, sum[i][f]); });
}

// (pixel, filter) to (filter, pixel).
ACF_INLINE void transpose_tile(const unsigned char* from, unsigned char* to) {
  for (int half = 0; half < kTile; half += 8) {
    const float* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = reinterpret_cast<const float*>(from + (half + i) * kRowBytes);
    for (int filter = 0; filter < kTile; filter += 8) {
      __m256 turned[8];
      transpose_eight(rows, filter, turned);
      for (int i = 0; i < 8; ++i) {
        _mm256_storeu_ps(reinterpret_cast<float*>(to + (filter + i) * kRowBytes) + half, turned[i]);
      }
    }
  }
}

template <int kFilters, class Ops>
void product_of_a_tile(const ProductCall& call, const unsigned char* weights, unsigned char* sums) {
  alignas(64) unsigned char turned[kFilters][kStepBytes] = {};
  const unsigned char* pixels = call.pixels;
  for (int from = 0; from < call.lanes;) {
    unsigned char(*to)[kStepBytes] = reinterpret_cast<unsigned char(*)[kStepBytes]>(turned[0] + from * kRowBytes);
    const int left = call.lanes - from, some = left > 4 ? 8 : left > 1 ? 4 : 1;
    switch (some) {
      case 1: product_of_pixels<1, kFilters, Ops>(call, weights, pixels + 4 * from, to); break;
      case 4: product_of_pixels<4, kFilters, Ops>(call, weights, pixels + 4 * from, to); break;
      default: product_of_pixels<8, kFilters, Ops>(call, weights, pixels + 4 * from, to); break;
    }
    from += some;
  }
  for (int f = 0; f < kFilters; ++f) transpose_tile(turned[f], sums + f * kStepBytes);
}

template <class Ops>
void product_by_rows(const ProductCall& call) {
  auto* sums = static_cast<unsigned char*>(call.sums);
  if (call.pixel_tiles == 1 && !call.resumes) {
    int f = 0;
    for (; f + 2 <= call.filter_tiles; f += 2) {
      product_of_a_tile<2, Ops>(call, call.weights + f * call.weights_pitch, sums + f * kStepBytes);
    }
    if (f < call.filter_tiles) {
      product_of_a_tile<1, Ops>(call, call.weights + f * call.weights_pitch, sums + f * kStepBytes);
    }
    return;
  }
  for (int f = 0; f < call.filter_tiles; ++f) {
    const unsigned char *weights = call.weights + f * call.weights_pitch, *pixels = call.pixels;
    const int filters = std::min(kTile, call.filters - f * kTile);
    for (int left = call.pixel_tiles; left > 0;) {
      const int some = left == 4 ? 2 : left;
      switch (some) {
        case 1: product_of_tiles<1, Ops>(call, filters, weights, pixels, sums); break;
        case 2: product_of_tiles<2, Ops>(call, filters, weights, pixels, sums); break;
        default: product_of_tiles<3, Ops>(call, filters, weights, pixels, sums); break;
      }
      left -= some;
      pixels += some * call.pixels_pitch;
      sums += some * kStepBytes;
    }
  }
}
