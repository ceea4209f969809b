// What every unit provides, and how packed weights and gathered values lie in memory.
#pragma once

#include <cstdint>

#include "conv/kernels.h"
#include "narrow/narrow.h"

namespace acf::narrow {

inline constexpr int kTile = 16;      // filters, pixels, and rows of columns of a tile
inline constexpr int kRowBytes = 64;  // of a row of columns: for every pixel 4 bytes, side by side
inline constexpr int kStepBytes = kTile * kRowBytes;
inline constexpr int kTogether = 4;  // tiles of sums of one product: 1 x 4, 2 x 2 or 4 x 1, or less

inline constexpr int columns_per_row(Number number) { return number == Number::bfloat16 ? 2 : 4; }

// Where the pixels of a tile are read: lanes [from, to) of a stretch lie at + lane * step; lane i lies at lanes[i],
// which a whole tile in one stretch with a step of 1 does not tell. In floats.
struct Stretch {
  std::int64_t at;
  int from, to;
};
struct Reads {
  std::int64_t step;
  int count, stretches;  // count: of lanes
  Stretch stretch[kTile];
  std::int32_t lanes[kTile];
};

// Gathers a tile of pixels: row r has, for every pixel, the values of columns r * n to r * n + n - 1, n those of a row.
// Lanes beyond the count, and what is missing in the last row, become zeros or anything finite.
struct GatherCall {
  const float* in;
  const Reads* reads;
  const std::int32_t* offsets;  // of the columns, in floats
  std::int32_t ahead;           // so far on, a later tile will read: prefetched; 0 for none
  std::int64_t columns;
  float inverse;      // int8: 1 / scale
  std::int32_t zero;  // int8
  unsigned char* to;  // (rows, kRowBytes), 64-byte aligned
};

// Copies a tile of pixels: row r is, of every pixel, the 4 bytes at + offsets[r].
struct CopyCall {
  const float* in;  // 4 bytes, whatever they are
  const Reads* reads;
  const std::int32_t* offsets;
  std::int64_t rows;
  unsigned char* to;  // (rows, kRowBytes), 64-byte aligned
};

// sums[f][p] (kTile, kTile), of up to kTogether tiles: for the first filters all pixels, then for the next.
struct ProductCall {
  const unsigned char* weights;
  std::int64_t weights_pitch;  // from one tile of filters to the next, in bytes
  const unsigned char* pixels;
  std::int64_t pixels_pitch;
  // by_step alone: where the rows of every step lie, in bytes from `pixels`, and how far apart they are. Null: steps of
  // gathered rows, one after the other.
  const std::int64_t* places;
  std::int64_t rows_pitch;
  std::int64_t rows;  // that hold columns; whole steps can be read
  int filter_tiles, pixel_tiles;
  int lanes;     // of the last tile of pixels; sums of others may be anything
  int filters;   // of all tiles, likewise
  bool resumes;  // adds to the sums: for units that have chunks
  bool streams;  // the weights come from far away
  void* sums;
};

// Lanes [from, to) of a register of sums go to out + lane, after residual + lane was added. In floats, from element
// (0, p, 0, 0) of the tensors for the first filter p.
struct Store {
  std::int64_t out, residual;
  std::int32_t sums;  // where the register lies, in numbers
  std::int32_t from, to;
};
inline constexpr int kMaxStores = 2 * kTile;  // of a tile

// How values are rounded that stay floats: to the nearest integer to x * inverse from low to high, times the scale.
struct Rounding {
  float inverse, low, high, scale;
};

// Makes the sums of some tiles of pixels results, and stores them; of int8: float(sum - correction) * multiplier +
// bias.
struct FinishCall {
  const conv::Call* call;  // with the residual, output and activation
  const Store* stores;
  int count;  // at most kTogether * kMaxStores
  void* sums;
  int filters;
  const std::int32_t* corrections;
  const float* multipliers;
  const float* bias;
  const Rounding* rounding;  // int8: of the residual, or null
};

// Makes sums that are floats results: sum * multiplier + bias, and what follows.
struct RowFinishCall {
  const conv::Call* call;  // for the activation
  float* sums;
  float multiplier, bias;
  const float* residual;  // or null
  const Rounding* rounding;
  std::int64_t count;
};

// Of bytes.h. Sums (filter tiles, kMostPixels, kTile) of up to kMostPixels pixels and kTogether tiles of filters.
inline constexpr int kMostPixels = 24;
struct BroadcastCall {
  const unsigned char* in;
  const std::int32_t* pixels;  // where the first columns of each are read, in bytes
  int count;
  const std::int32_t* start;    // what the sums of every filter begin with
  const std::int32_t* offsets;  // of the rows of columns, in bytes
  std::int64_t rows;
  const unsigned char* weights;  // by row, of all tiles of filters
  int filter_tiles;
  bool streams;  // the weights come from far away
  std::int32_t* sums;
};

// Makes such sums results, in bytes, and stores them.
struct ByteFinishCall {
  const conv::Call* call;  // for the activation
  const std::int32_t* sums;
  int count, filter_tiles;
  const float* multipliers;
  const float* bias;
  float inverse;  // 1 / scale, of the results
  std::int32_t zero;
  unsigned char* out;
  const std::int32_t* pixels;  // where each goes
  std::int64_t channels;       // that may be written, from `out` on
  // Adds float(byte - residual_zero) * residual_scale, of as many channels; or null.
  const unsigned char* residual;
  const std::int32_t* residual_pixels;
  float residual_scale;
  std::int32_t residual_zero;
};

// As BroadcastCall, for a depthwise convolution: sums of every channel's own taps.
struct DepthwiseCall {
  const unsigned char* in;  // the first channel of the tiles
  std::int64_t channels;    // that may be read, from there on
  const std::int32_t* pixels;
  int count;
  const std::int32_t* start;
  const std::int32_t* offsets;  // of the taps, in bytes
  std::int64_t taps;
  const unsigned char* weights;  // by tap, kTogether tiles each
  int filter_tiles;
  std::int32_t* sums;
};

// Numbers of kTogether tiles of channels in another order: place 16 j + i is that of channel 4 i + j.
struct TurnedChannels {
  const std::int32_t* start;
  const float *multipliers, *bias;
};

// Rows of a depthwise convolution whose kernel is 3x3, without strides and dilation. The bytes of a row are taken one
// after the other, whatever pixel they are of: the channel of every byte comes round again after `phases` registers.
inline constexpr int kRowsAtOnce = 4;
inline constexpr int kRegisterBytes = 64;
struct DepthwiseRowsCall {
  const unsigned char* in;  // what the first byte's first tap reads
  std::int64_t in_row, pixel;
  std::int64_t bytes;  // of a row
  int rows;            // at most kRowsAtOnce
  std::int64_t phases;
  // By phase: of every kernel row (4, kTile) channels, 4 bytes of each, three of them taps; and (4, kTile) numbers.
  // Place (j, 4 i + k) is that of byte 16 i + 4 j + k of a register.
  const unsigned char* weights;
  const std::int32_t* start;
  const float *multipliers, *bias;
  unsigned char* out;
  std::int64_t out_row;
};

// Bytes of up to kTile pixels side by side in a plane, `pixel` bytes apart: all channels, in whole fours.
struct InterleaveCall {
  const float* in;
  std::int64_t plane, channels;
  int count;
  float inverse;
  std::int32_t zero;
  unsigned char* to;
  std::int64_t pixel;
};

struct ByteKernels {
  void (*broadcast)(const BroadcastCall&);
  void (*finish)(const ByteFinishCall&);
  void (*turn)(const std::int32_t* from, std::int32_t* to);  // a tile of (pixels, filters) to (filters, pixels)
  void (*interleave)(const InterleaveCall&);
  void (*depthwise)(const DepthwiseCall&);
  // Sums and results at once, without sums in memory; or null. Without residuals, and activations that clamp.
  void (*depthwise_bytes)(const DepthwiseCall&, const TurnedChannels&, const ByteFinishCall&);
  void (*depthwise_rows)(const DepthwiseRowsCall&, const ByteFinishCall&);  // which has the rest
};

using GatherKernel = void (*)(const GatherCall&);
using CopyKernel = void (*)(const CopyCall&);
using ProductKernel = void (*)(const ProductCall&);
using FinishKernel = void (*)(const FinishCall&);

// Rows of values that stay floats.
struct RowKernels {
  void (*round)(const Rounding&, const float* in, float* out, std::int64_t count);
  void (*finish)(const RowFinishCall&);
};

struct NumberKernels {
  GatherKernel gather;
  ProductKernel product;
  FinishKernel finish;
};

// How the weights of a tile of filters lie in memory.
//   by_row    per row of columns: 16 filters, 4 bytes of columns of each
//   by_step   per step of 16 rows: 16 filters, 64 bytes of columns of each
//   halves    per row of columns, of int8 as int16: 16 filters, columns 0 and 2, then 1 and 3
enum class Order { by_row, by_step, halves };

struct Kernels {
  int lanes;  // of the registers that finish
  Order order;
  int chunk;                     // products go on after so many steps, with those of other filters between; 0: never
  std::int32_t shift;            // gathered integers are q - shift
  NumberKernels bfloat16, int8;  // null: the unit lacks them
  CopyKernel copy;
  RowKernels rows;          // null: the unit lacks int8
  void (*begin)(int rows);  // around every stretch of products whose steps have so many rows, or null
  void (*end)();
  ByteKernels bytes = {};  // null: the unit lacks them
};

const Kernels& kernels(Unit unit);

extern const Kernels generic_kernels, avx2_kernels, vnni_kernels, avx512_bf16_kernels, amx_kernels, neon_kernels,
    dotprod_kernels, neon_bf16_kernels;

}  // namespace acf::narrow
