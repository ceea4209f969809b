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

constexpr Configuration whole_tiles() {
  Configuration all;
  for (int i = 0; i < 8; ++i) {
    all.row_bytes[i] = kRowBytes;
    all.rows[i] = kTile;
  }
  return all;
}

// A constant in memory: gcc takes the instruction to read 8 bytes, and leaves out writes to the others.
constexpr Configuration kConfiguration = whole_tiles();

void begin() { _tile_loadconfig(&kConfiguration); }

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

// Two tiles of filters, two of pixels.
template <Number number, bool kStreams>
void square(const ProductCall& call) {
  const unsigned char *weights = call.weights, *pixels = call.pixels;
  begin_sums<4>(call);
  for (std::int64_t row = 0; row < call.rows; row += kTile, weights += kStepBytes, pixels += kStepBytes) {
    if constexpr (kStreams) {
      prefetch(weights);
      prefetch(weights + call.weights_pitch);
    }
    _tile_loadd(4, weights, kRowBytes);
    _tile_loadd(6, pixels, kRowBytes);
    ACF_DOT(0, 4, 6)
    _tile_loadd(7, pixels + call.pixels_pitch, kRowBytes);
    ACF_DOT(1, 4, 7)
    _tile_loadd(5, weights + call.weights_pitch, kRowBytes);
    ACF_DOT(2, 5, 6)
    ACF_DOT(3, 5, 7)
  }
  end_sums<4>(call);
}

// One tile of filters and up to four of pixels, or one of pixels and up to four of filters: the one is loaded once and
// the others take turns in two registers, so that loads overlap with products.
template <Number number, bool kFilters, int kCount, bool kStreams>
void line(const ProductCall& call) {
  const unsigned char *one = kFilters ? call.pixels : call.weights, *some = kFilters ? call.weights : call.pixels;
  const std::int64_t pitch = kFilters ? call.weights_pitch : call.pixels_pitch;
  begin_sums<kCount>(call);
  for (std::int64_t row = 0; row < call.rows; row += kTile, one += kStepBytes, some += kStepBytes) {
    if constexpr (kStreams) {
      const unsigned char* weights = kFilters ? some : one;
      unrolled<kFilters ? kCount : 1>([&](auto i) { prefetch(weights + i * call.weights_pitch); });
    }
    if constexpr (kFilters) {
      _tile_loadd(6, one, kRowBytes);
      _tile_loadd(4, some, kRowBytes);
      ACF_DOT(0, 4, 6)
      if constexpr (kCount > 1) {
        _tile_loadd(5, some + pitch, kRowBytes);
        ACF_DOT(1, 5, 6)
      }
      if constexpr (kCount > 2) {
        _tile_loadd(4, some + 2 * pitch, kRowBytes);
        ACF_DOT(2, 4, 6)
      }
      if constexpr (kCount > 3) {
        _tile_loadd(5, some + 3 * pitch, kRowBytes);
        ACF_DOT(3, 5, 6)
      }
    } else {
      _tile_loadd(4, one, kRowBytes);
      _tile_loadd(6, some, kRowBytes);
      ACF_DOT(0, 4, 6)
      if constexpr (kCount > 1) {
        _tile_loadd(7, some + pitch, kRowBytes);
        ACF_DOT(1, 4, 7)
      }
      if constexpr (kCount > 2) {
        _tile_loadd(6, some + 2 * pitch, kRowBytes);
        ACF_DOT(2, 4, 6)
      }
      if constexpr (kCount > 3) {
        _tile_loadd(7, some + 3 * pitch, kRowBytes);
        ACF_DOT(3, 4, 7)
      }
    }
  }
  end_sums<kCount>(call);
}

template <Number number, bool kStreams>
void product_of(const ProductCall& call) {
  if (call.filter_tiles == 2 && call.pixel_tiles == 2) return square<number, kStreams>(call);
  if (call.pixel_tiles == 1) {
    switch (call.filter_tiles) {
      case 1: return line<number, true, 1, kStreams>(call);
      case 2: return line<number, true, 2, kStreams>(call);
      case 3: return line<number, true, 3, kStreams>(call);
      default: return line<number, true, 4, kStreams>(call);
    }
  }
  switch (call.pixel_tiles) {
    case 2: return line<number, false, 2, kStreams>(call);
    case 3: return line<number, false, 3, kStreams>(call);
    default: return line<number, false, 4, kStreams>(call);
  }
}

template <Number number>
void product_of(const ProductCall& call) {
  return call.streams ? product_of<number, true>(call) : product_of<number, false>(call);
}

}  // namespace

const Kernels amx_kernels = {N::kLanes,
                             Order::by_step,
                             0,
                             {gather_bfloat16, product_of<Number::bfloat16>, finish_bfloat16},
                             {gather_int8, product_of<Number::int8>, finish_int8},
                             begin,
                             end};

}  // namespace acf::narrow
