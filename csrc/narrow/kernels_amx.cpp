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

// How far ahead weights that stream are asked for.
constexpr std::int64_t kAhead = 4 * kStepBytes;

ACF_INLINE void prefetch(const unsigned char* step) {
  unrolled<kTile>([&](auto row) { __builtin_prefetch(step + kAhead + row * kRowBytes); });
}

#define ACF_DOT(sums, weights, pixels)                                                                \
  if constexpr (number == Number::bfloat16) {                                                         \
    _tile_dpbf16ps(sums, weights, pixels);                                                            \
  } else {                                                                                            \
    _tile_dpbsud(sums, weights, pixels);                                                              \
  }

template <Number number, int kFilterTiles, int kPixelTiles, bool kStreams>
void product(const ProductCall& call) {
  const unsigned char *weights = call.weights, *pixels = call.pixels;
  _tile_zero(0);
  if constexpr (kPixelTiles > 1) _tile_zero(1);
  if constexpr (kFilterTiles > 1) _tile_zero(2);
  if constexpr (kFilterTiles * kPixelTiles > 3) _tile_zero(3);
  for (std::int64_t row = 0; row < call.rows; row += kTile, weights += kStepBytes, pixels += kStepBytes) {
    if constexpr (kStreams) {
      prefetch(weights);
      if constexpr (kFilterTiles > 1) prefetch(weights + call.weights_pitch);
    }
    _tile_loadd(4, weights, kRowBytes);
    _tile_loadd(6, pixels, kRowBytes);
    ACF_DOT(0, 4, 6)
    if constexpr (kPixelTiles > 1) {
      _tile_loadd(7, pixels + call.pixels_pitch, kRowBytes);
      ACF_DOT(1, 4, 7)
    }
    if constexpr (kFilterTiles > 1) {
      _tile_loadd(5, weights + call.weights_pitch, kRowBytes);
      ACF_DOT(2, 5, 6)
    }
    if constexpr (kFilterTiles * kPixelTiles > 3) {
      ACF_DOT(3, 5, 7)
    }
  }
  auto* sums = static_cast<unsigned char*>(call.sums);
  _tile_stored(0, sums, kRowBytes);
  if constexpr (kPixelTiles > 1) _tile_stored(1, sums + kStepBytes, kRowBytes);
  if constexpr (kFilterTiles > 1) _tile_stored(2, sums + kPixelTiles * kStepBytes, kRowBytes);
  if constexpr (kFilterTiles * kPixelTiles > 3) _tile_stored(3, sums + 3 * kStepBytes, kRowBytes);
}

template <Number number, bool kStreams>
void product_of(const ProductCall& call) {
  switch (2 * call.filter_tiles + call.pixel_tiles) {
    case 3: return product<number, 1, 1, kStreams>(call);
    case 4: return product<number, 1, 2, kStreams>(call);
    case 5: return product<number, 2, 1, kStreams>(call);
    default: return product<number, 2, 2, kStreams>(call);
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
