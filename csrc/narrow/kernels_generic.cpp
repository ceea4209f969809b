// Plain C++: what every machine runs.
#include <algorithm>
#include <cstring>

#include "narrow/kernels.h"

namespace acf::narrow {
namespace {

using namespace conv;

#include "core/unrolled-inl.h"

#include "conv/registers_generic-inl.h"

#include "conv/finish-inl.h"

#include "narrow/finish-inl.h"

struct W {
  static unsigned char quantized(float x, float inverse, std::int32_t zero) {
    constexpr float kMost = 65536.0f;
    float scaled = x * inverse;
    scaled = scaled < kMost ? scaled : kMost;  // NaN too
    scaled = scaled > -kMost ? scaled : -kMost;
    const int q = static_cast<int>((scaled + kMagic) - kMagic) + zero;
    return static_cast<unsigned char>(q < 0 ? 0 : q > 255 ? 255 : q);
  }
  static void quantize(const float (&pixels)[4][kTile], float inverse, std::int32_t zero, unsigned char* to) {
    for (int i = 0; i < kTile; ++i) {
      for (int c = 0; c < 4; ++c) to[4 * i + c] = quantized(pixels[c][i], inverse, zero);
    }
  }
};

#include "narrow/gather-inl.h"

void gather_int8(const GatherCall& call) {
  gather_rows<4>(call, [&call](const float(&pixels)[4][kTile], unsigned char* to) {
    W::quantize(pixels, call.inverse, call.zero, to);
  });
}

// Of two's complement.
inline std::int32_t signed_byte(unsigned char byte) { return byte < 128 ? byte : byte - 256; }

void product_int8(const ProductCall& call) {
  auto* sums = static_cast<std::int32_t*>(call.sums);
  for (int f = 0; f < call.filter_tiles; ++f) {
    for (int p = 0; p < call.pixel_tiles; ++p, sums += kTile * kTile) {
      const unsigned char *weights = call.weights + f * call.weights_pitch,
                          *pixels = call.pixels + p * call.pixels_pitch;
      std::memset(sums, 0, kTile * kTile * sizeof(*sums));
      for (std::int64_t row = 0; row < call.rows; ++row, weights += kRowBytes, pixels += kRowBytes) {
        for (int i = 0; i < kTile; ++i) {
          for (int c = 0; c < 4; ++c) {
            const auto w = signed_byte(weights[4 * i + c]);
            for (int j = 0; j < kTile; ++j) sums[i * kTile + j] += w * static_cast<std::int32_t>(pixels[4 * j + c]);
          }
        }
      }
    }
  }
}

void broadcast_int8(const BroadcastCall& call) {
  for (int f = 0; f < call.filter_tiles; ++f) {
    for (int p = 0; p < call.count; ++p) {
      const unsigned char *weights = call.weights + f * kRowBytes, *pixel = call.in + call.pixels[p];
      std::int32_t* sums = call.sums + (f * kMostPixels + p) * kTile;
      std::memset(sums, 0, kTile * sizeof(*sums));
      for (std::int64_t row = 0; row < call.rows; ++row, weights += call.filter_tiles * kRowBytes) {
        for (int i = 0; i < kTile; ++i) {
          for (int c = 0; c < 4; ++c) {
            sums[i] += signed_byte(weights[4 * i + c]) * static_cast<std::int32_t>(pixel[call.offsets[row] + c]);
          }
        }
      }
      // At the end: on the way both together may be more than an integer holds.
      for (int i = 0; i < kTile; ++i) sums[i] += call.start[f * kTile + i];
    }
  }
}

void finish_bytes(const ByteFinishCall& call) {
  for (int f = 0; f < call.filter_tiles; ++f) {
    const std::int64_t filters = std::min<std::int64_t>(kTile, call.channels - f * kTile);
    for (int p = 0; p < call.count; ++p) {
      float results[kTile];
      for (int i = 0; i < kTile; ++i) {
        const int filter = f * kTile + i;
        const auto sum = static_cast<float>(call.sums[(f * kMostPixels + p) * kTile + i]);
        results[i] = sum * call.multipliers[filter] + call.bias[filter];
        if (call.residual == nullptr || i >= filters) continue;
        const std::int32_t byte = call.residual[call.residual_pixels[p] + filter];
        results[i] += static_cast<float>(byte - call.residual_zero) * call.residual_scale;
      }
      for (int i = 0; i < kTile; i += N::kLanes) N::store(results + i, activate(*call.call, N::load(results + i)));
      unsigned char* out = call.out + call.pixels[p] + f * kTile;
      for (std::int64_t i = 0; i < filters; ++i) out[i] = W::quantized(results[i], call.inverse, call.zero);
    }
  }
}

#include "narrow/depthwise-inl.h"

void turn_tile(const std::int32_t* from, std::int32_t* to) {
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; ++j) to[j * kTile + i] = from[i * kTile + j];
  }
}

void interleave_int8(const InterleaveCall& call) {
  for (int p = 0; p < call.count; ++p) {
    for (std::int64_t c = 0; c < call.pixel; ++c) {
      const float x = call.in[std::min(c, call.channels - 1) * call.plane + p];
      call.to[p * call.pixel + c] = W::quantized(x, call.inverse, call.zero);
    }
  }
}

}  // namespace

const Kernels generic_kernels = {
    N::kLanes,
    Order::by_row,
    0,
    0,
    {},
    {gather_int8, product_int8, finish_int8},
    copy_rows,
    {round_row, finish_row},
    nullptr,
    nullptr,
    {broadcast_int8, finish_bytes, turn_tile, interleave_int8, depthwise_int8, nullptr, nullptr}};

}  // namespace acf::narrow
