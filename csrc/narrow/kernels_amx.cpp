// A tile is one of the processor's own tile registers: a step of columns is one instruction.
#include <immintrin.h>

#include "narrow/kernels.h"

namespace acf::narrow {
namespace {

using namespace conv;

#include "core/unrolled-inl.h"

#include "conv/registers_avx512-inl.h"

#include "conv/finish-inl.h"

#include "narrow/finish-inl.h"

#include "narrow/gather_avx512-inl.h"

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64);

// Sums are whole tiles, weights have 4 bytes a row of columns for every filter, values so many rows.
constexpr Configuration with_rows(int rows) {
  Configuration all;
  for (int i = 0; i < 8; ++i) {
    all.row_bytes[i] = static_cast<std::uint16_t>(i == 4 || i == 5 ? 4 * rows : kRowBytes);
    all.rows[i] = static_cast<std::uint8_t>(i >= 6 ? rows : kTile);
  }
  return all;
}

// Constants in memory: gcc takes the instruction to read 8 bytes, and leaves out writes to the others.
constexpr Configuration kConfigurations[kTile] = {with_rows(1),  with_rows(2),  with_rows(3),  with_rows(4),
                                                  with_rows(5),  with_rows(6),  with_rows(7),  with_rows(8),
                                                  with_rows(9),  with_rows(10), with_rows(11), with_rows(12),
                                                  with_rows(13), with_rows(14), with_rows(15), with_rows(16)};

void begin(int rows) { _tile_loadconfig(&kConfigurations[rows - 1]); }

void end() { _tile_release(); }

// How far ahead weights that stream are asked for, into the second-level cache: some hundred nanoseconds.
constexpr std::int64_t kAhead = 12 * kStepBytes;

ACF_INLINE void prefetch(const unsigned char* step) {
  unrolled<kTile>([&](auto row) { __builtin_prefetch(step + kAhead + row * kRowBytes, 0, 2); });
}

// The instructions take the numbers of tile registers as constants. 0 to 3 are sums, 4 and 5 weights, 6 and 7 values.
#define ACF_DOT(sums, weights, values)        \
  if constexpr (number == Number::bfloat16) { \
    _tile_dpbf16ps(sums, weights, values);    \
  } else {                                    \
    _tile_dpbsud(sums, weights, values);      \
  }

template <int kCount>
ACF_INLINE void begin_sums(const ProductCall& call) {
  if (!call.resumes) {
    _tile_zero(0);
    if constexpr (kCount > 1) _tile_zero(1);
    if constexpr (kCount > 2) _tile_zero(2);
    if constexpr (kCount > 3) _tile_zero(3);
    return;
  }
  const auto* sums = static_cast<const unsigned char*>(call.sums);
  _tile_loadd(0, sums, kRowBytes);
  if constexpr (kCount > 1) _tile_loadd(1, sums + kStepBytes, kRowBytes);
  if constexpr (kCount > 2) _tile_loadd(2, sums + 2 * kStepBytes, kRowBytes);
  if constexpr (kCount > 3) _tile_loadd(3, sums + 3 * kStepBytes, kRowBytes);
}

template <int kCount>
ACF_INLINE void end_sums(const ProductCall& call) {
  auto* sums = static_cast<unsigned char*>(call.sums);
  _tile_stored(0, sums, kRowBytes);
  if constexpr (kCount > 1) _tile_stored(1, sums + kStepBytes, kRowBytes);
  if constexpr (kCount > 2) _tile_stored(2, sums + 2 * kStepBytes, kRowBytes);
  if constexpr (kCount > 3) _tile_stored(3, sums + 3 * kStepBytes, kRowBytes);
}

// The values of a step, and how far apart its rows lie.
template <bool kPlaced>
struct Values {
  const unsigned char* pixels;
  const std::int64_t* places;
  std::int64_t pitch;

  explicit Values(const ProductCall& call)
      : pixels(call.pixels), places(call.places), pitch(kPlaced ? call.rows_pitch : kRowBytes) {}
  ACF_INLINE const unsigned char* next() {
    if constexpr (kPlaced) return pixels + *places++;
    const unsigned char* step = pixels;
    pixels += kStepBytes;
    return step;
  }
};

// Two tiles of filters, two of pixels.
template <Number number, bool kPlaced, bool kStreams>
void square(const ProductCall& call) {
  const unsigned char* weights = call.weights;
  Values<kPlaced> values(call);
  begin_sums<4>(call);
  for (std::int64_t row = 0; row < call.rows; row += kTile, weights += kStepBytes) {
    if constexpr (kStreams) {
      prefetch(weights);
      prefetch(weights + call.weights_pitch);
    }
    const unsigned char* pixels = values.next();
    _tile_loadd(4, weights, kRowBytes);
    _tile_loadd(6, pixels, values.pitch);
    ACF_DOT(0, 4, 6)
    _tile_loadd(7, pixels + call.pixels_pitch, values.pitch);
    ACF_DOT(1, 4, 7)
    _tile_loadd(5, weights + call.weights_pitch, kRowBytes);
    ACF_DOT(2, 5, 6)
    ACF_DOT(3, 5, 7)
  }
  end_sums<4>(call);
}

// One tile of pixels and up to four of filters: these take turns in two registers, so that loads overlap with products.
template <Number number, int kCount, bool kPlaced, bool kStreams>
void some_filters(const ProductCall& call) {
  const unsigned char* weights = call.weights;
  const std::int64_t pitch = call.weights_pitch;
  Values<kPlaced> values(call);
  begin_sums<kCount>(call);
  for (std::int64_t row = 0; row < call.rows; row += kTile, weights += kStepBytes) {
    if constexpr (kStreams) unrolled<kCount>([&](auto i) { prefetch(weights + i * pitch); });
    _tile_loadd(6, values.next(), values.pitch);
    _tile_loadd(4, weights, kRowBytes);
    ACF_DOT(0, 4, 6)
    if constexpr (kCount > 1) {
      _tile_loadd(5, weights + pitch, kRowBytes);
      ACF_DOT(1, 5, 6)
    }
    if constexpr (kCount > 2) {
      _tile_loadd(4, weights + 2 * pitch, kRowBytes);
      ACF_DOT(2, 4, 6)
    }
    if constexpr (kCount > 3) {
      _tile_loadd(5, weights + 3 * pitch, kRowBytes);
      ACF_DOT(3, 5, 6)
    }
  }
  end_sums<kCount>(call);
}

// One tile of filters and up to four of pixels.
template <Number number, int kCount, bool kPlaced, bool kStreams>
void some_pixels(const ProductCall& call) {
  const unsigned char* weights = call.weights;
  const std::int64_t pitch = call.pixels_pitch;
  Values<kPlaced> values(call);
  begin_sums<kCount>(call);
  for (std::int64_t row = 0; row < call.rows; row += kTile, weights += kStepBytes) {
    if constexpr (kStreams) prefetch(weights);
    const unsigned char* pixels = values.next();
    _tile_loadd(4, weights, kRowBytes);
    _tile_loadd(6, pixels, values.pitch);
    ACF_DOT(0, 4, 6)
    if constexpr (kCount > 1) {
      _tile_loadd(7, pixels + pitch, values.pitch);
      ACF_DOT(1, 4, 7)
    }
    if constexpr (kCount > 2) {
      _tile_loadd(6, pixels + 2 * pitch, values.pitch);
      ACF_DOT(2, 4, 6)
    }
    if constexpr (kCount > 3) {
      _tile_loadd(7, pixels + 3 * pitch, values.pitch);
      ACF_DOT(3, 4, 7)
    }
  }
  end_sums<kCount>(call);
}

template <Number number, bool kPlaced, bool kStreams>
void product_of(const ProductCall& call) {
  if (call.filter_tiles == 2 && call.pixel_tiles == 2) return square<number, kPlaced, kStreams>(call);
  if (call.pixel_tiles == 1) {
    switch (call.filter_tiles) {
      case 1: return some_filters<number, 1, kPlaced, kStreams>(call);
      case 2: return some_filters<number, 2, kPlaced, kStreams>(call);
      case 3: return some_filters<number, 3, kPlaced, kStreams>(call);
      default: return some_filters<number, 4, kPlaced, kStreams>(call);
    }
  }
  switch (call.pixel_tiles) {
    case 2: return some_pixels<number, 2, kPlaced, kStreams>(call);
    case 3: return some_pixels<number, 3, kPlaced, kStreams>(call);
    default: return some_pixels<number, 4, kPlaced, kStreams>(call);
  }
}

template <Number number, bool kPlaced>
void product_of(const ProductCall& call) {
  return call.streams ? product_of<number, kPlaced, true>(call) : product_of<number, kPlaced, false>(call);
}

template <Number number>
void product_of(const ProductCall& call) {
  return call.places != nullptr ? product_of<number, true>(call) : product_of<number, false>(call);
}

}  // namespace

const Kernels amx_kernels = {N::kLanes,
                             Order::by_step,
                             8,
                             0,
                             {gather_bfloat16, product_of<Number::bfloat16>, finish_bfloat16},
                             {gather_int8, product_of<Number::int8>, finish_int8},
                             copy_rows,
                             {round_row, finish_row},
                             begin,
                             end};

}  // namespace acf::narrow
