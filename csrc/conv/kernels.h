// What every ISA provides: one kernel per shape of the register tile. A tile is `filters` x `vectors of pixels`
// (pixels_in_lanes) or `pixels` x `blocks of kBlock filters` (filters_in_lanes).
#pragma once

#include <cstdint>

#include "conv/conv.h"
#include "core/inline.h"

namespace acf::conv {

inline constexpr int kBlock = 16;       // filters are packed in blocks of so many for filters_in_lanes
inline constexpr int kMaxFilters = 12;  // of a tile of pixels_in_lanes
inline constexpr int kMaxVectors = 8;
inline constexpr int kMaxPixels = 8;  // of a tile of filters_in_lanes
inline constexpr int kMaxBlocks = 8;
inline constexpr int kMaxLanes = 16;
inline constexpr int kMaxSums = 24 * kMaxLanes;  // of a tile

// Where lanes [from, to) of a vector of pixels go: lane i to out + i, after residual + i was added. In floats, from
// element (0, p, 0, 0) of the tensors.
struct Segment {
  std::int64_t out, residual;
  int from, to;
};

// Which pixels a tile computes. x: the first input of every vector of pixels (flat, rows), of every half vector
// (halves), of every pixel (filters_in_lanes); the segments of vector v are segments[first[v]] to [first[v + 1] - 1].
struct Tile {
  const float* x[2 * kMaxVectors];
  int first[kMaxVectors + 1];
  Segment segments[kMaxVectors * kMaxLanes];
};

// One tile for some filters. Offsets are in bytes.
struct Call {
  const Tile* tile;
  const std::int32_t* offsets;  // of the columns of the group, relative to tile->x
  // Which columns to add up: for every piece p those from rows[p * row_pitch] to rows[p * row_pitch + row_count] - 1.
  const std::int32_t* rows;
  std::int64_t pieces, row_pitch, row_count;
  const float* weights;  // pixels_in_lanes: (columns, filters); filters_in_lanes: (columns, kBlock) per block
  std::int64_t first;    // the number of the column that they begin with
  std::int64_t block;    // filters_in_lanes: how far apart the blocks lie
  const std::uint16_t*
      codes;              // filters_of_codes: (columns, bits) per block, and so on; `weights` are what they stand for
  const float* ahead;     // pixels that a later tile reads: prefetched at the same offsets
  std::int64_t later[2];  // filters_in_lanes: weights so far on from those of a column are prefetched too
  const float* bias;      // one per filter, whole blocks for filters_in_lanes
  int filters;            // that exist in this tile
  // filters_in_lanes may take the columns in several calls: what was summed lies in `sums` (pixels, filters of the
  // blocks); the first call begins with the bias (resumes is false) and the last one stores the result (stops is
  // false).
  float* sums;  // null for one call
  bool resumes, stops;
  float* out;  // at (0, p, 0, 0) for the first filter p of the tile
  std::int64_t out_plane;
  const float* residual;  // likewise, or null
  std::int64_t residual_plane;
  Activation activation;
  float slope, low, high;  // none, relu and relu6 only clamp to [low, high]
  bool clamps;
};

// A call of which only the activation is told.
Call activation_call(Activation activation, float slope);

// One plane of a depthwise convolution, from and to its element (0, 0); `in` is what the first tap reads there.
struct PlaneCall {
  const Call* call;  // for the activation
  const float* in;
  const float* weights;  // (kernel, kernel)
  const float* bias;
  const float* residual;  // or null
  float* out;
  std::int64_t in_row, residual_row, out_row, height, width;
};

// A row of an elementwise operator: out[i] = activation(a[i] op b[i]); `first` leaves out b. A number that stands for
// the whole row is read once. The output may be an operand.
enum class Combine { first, add, subtract, multiply, divide };
struct RowCall {
  const Call* call;  // for the activation
  Combine combine;
  const float *a, *b;
  bool a_once, b_once;
  float* out;
  std::int64_t count;
};

// Rows of a pooling whose windows lie in the input: the largest of the taps, or `scale` times their sum. Reads up to
// kSlack floats further than the last window.
struct PoolCall {
  bool largest;
  float scale;
  const float* in;  // the first tap of the first window
  std::int64_t in_row, kernel_h, kernel_w, dilation_w, stride_w;
  float* out;
  std::int64_t count;                    // of a row
  std::int64_t rows, in_step, out_step;  // how many, and from one to the next
};

// Winograd's F(4x4, 3x3) on vectors of tiles, one tile in a lane. A row of a strip, of tiles side by side, fills a
// register or one of 2 or 4 equal pieces of it; 4 registers, transposed, are the 4 columns of a vector of tiles. So
// strip i of the `pieces * 4` of a vector is piece i % pieces of register i / pieces.
struct Strip {
  const float* in;             // the first input of its first tile, in channel 0
  std::int64_t out, residual;  // where its first output goes, in floats
  int in_rows, in_columns;     // the inputs that lie in the padded plane: up to 6, and 2 more than its tiles are wide
  int out_rows, out_columns;   // the outputs that exist; none: there is no such strip
};
// v[e * v_element + c * v_channel + lane] = element e of the transformed tile of channel c.
struct WinogradInput {
  const Strip* strips;
  int pieces;
  bool whole;  // all inputs exist
  std::int64_t in_row;
  const std::int32_t* channels;  // where each begins, in floats
  std::int64_t count;            // of them
  float* v;
  std::int64_t v_channel, v_element;
};
// m[f * m_filter + lane] = sum over c of weights[c * filters + f] * v[c * v_channel + lane], for an element of some
// vectors of tiles.
struct WinogradProduct {
  const float* v;
  std::int64_t v_channel, channels;
  const float* weights;
  float* m;
  std::int64_t m_filter;
};
// The same for some tiles, with `blocks` blocks of filters in lanes: m[t * m_tile + f] = sum over c of
// weights[c * blocks * kBlock + f] * tiles[t][c * v_channel].
struct WinogradFewProduct {
  const float* tiles[kMaxPixels];
  std::int64_t v_channel, channels;
  const float* weights;
  float* m;
  std::int64_t m_tile;
};
struct WinogradOutput {
  const Call* call;  // for the activation
  const Strip* strips;
  int pieces;
  bool whole;  // all outputs exist
  const float* m;
  std::int64_t m_filter, m_element;
  const float* bias;
  std::int64_t filters;
  float* out;
  std::int64_t out_plane, out_row;
  const float* residual;  // or null
  std::int64_t residual_plane, residual_row;
  std::int64_t tiles, m_tile;  // filters in lanes: strips of one tile, whose products lie so far apart
};
inline constexpr int kTileElements = 36;

// Weights of a block of filters, (columns, kBlock), from codes: bit f of codes[c * bits + i] is bit i of the code of
// filter f for column c, which stands for values[code * kBlock + f].
struct DecodeCall {
  const std::uint16_t* codes;
  const float* values;
  std::int64_t columns;
  float* weights;
};

using Kernel = void (*)(const Call&);
using DecodeKernel = void (*)(const DecodeCall&);
using PlaneKernel = void (*)(const PlaneCall&);
using RowKernel = void (*)(const RowCall&);
using PoolKernel = void (*)(const PoolCall&);
using WinogradInputKernel = void (*)(const WinogradInput&);
using WinogradProductKernel = void (*)(const WinogradProduct&);
using WinogradFewProductKernel = void (*)(const WinogradFewProduct&);
using WinogradOutputKernel = void (*)(const WinogradOutput&);
using SumKernel = float (*)(const float* p, std::int64_t count);
using PeakKernel = float (*)(const float* two, std::int64_t rounds);

enum class Load { stretch, halves, strided };

struct Kernels {
  int lanes;
  // Null where the tile would not fit into the registers; more of one side never allows more of the other. One vector
  // of two halves may be computed as two vectors, of which the second has no segments.
  Kernel pixels_in_lanes[3][kMaxFilters][kMaxVectors];  // [Load][filters - 1][vectors - 1]
  Kernel filters_in_lanes[2][kMaxPixels][kMaxBlocks];   // [pixels are neighbours in memory][pixels - 1][blocks - 1]
  DecodeKernel decode[kMaxCodeBits];                    // [bits - 1]
  Kernel filters_of_codes[kMaxCodeBits][kMaxBlocks];    // [bits - 1][blocks - 1]: filters_in_lanes for one pixel
  PlaneKernel depthwise[2][2];                          // [index in kDepthwiseSizes][stride - 1]
  WinogradInputKernel winograd_input;
  WinogradProductKernel winograd_product[kMaxFilters][kMaxVectors];  // [filters - 1][vectors - 1], as pixels_in_lanes
  WinogradOutputKernel winograd_output;
  WinogradFewProductKernel winograd_few_product[kMaxPixels]
                                               [kMaxBlocks];  // [tiles - 1][blocks - 1], as filters_in_lanes
  WinogradOutputKernel winograd_few_output;
  RowKernel combine;
  PoolKernel pool;
  SumKernel sum;
  PeakKernel peak;  // `rounds` times kPeakChains multiply-adds of whole registers that do not wait for each other
};

inline constexpr int kDepthwiseSizes[] = {3, 5};
inline constexpr int kPeakChains = 12;
inline constexpr int kDepthwiseRows = 4;  // of the output at a time

// The table of an ISA; throws std::invalid_argument when this machine cannot run it.
const Kernels& kernels(Isa isa);

extern const Kernels generic_kernels, avx2_kernels, avx512_kernels, neon_kernels;

}  // namespace acf::conv
