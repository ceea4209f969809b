// What plan.cpp and dispatch.cpp share: how a plan cuts its work, and how packed weights lie in memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "conv/conv.h"
#include "conv/kernels.h"

namespace acf::conv {

// Offsets are 32-bit numbers of bytes, and halos lie around what they count.
inline constexpr std::int64_t kMaxSize = std::int64_t{1} << 28;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// `count` things cut into `parts` parts as equal as can be, the larger ones first.
struct Part {
  std::int64_t begin, size;
};
struct Parts {
  Parts(std::int64_t count_, std::int64_t parts) : count(parts), size(count_ / parts), larger(count_ % parts) {}
  Part operator[](std::int64_t i) const { return {i * size + (i < larger ? i : larger), size + (i < larger ? 1 : 0)}; }
  std::int64_t largest() const { return size + (larger > 0 ? 1 : 0); }
  std::int64_t count, size, larger;
};

bool window_fits(const Plan& plan);
Load load_of(const Plan& plan);
const Kernels& depthwise_kernels(Isa isa);
int depthwise_index(const Shape& shape);                               // in kDepthwiseSizes, or -1
std::int64_t windows_per_image(const Plan& plan, std::int64_t lanes);  // of halves: half ones
std::int64_t window_count(const Plan& plan, std::int64_t lanes, std::int64_t images);
std::int64_t max_vectors(const Kernels& table, Load load, std::int64_t filters);
std::int64_t max_filters(const Kernels& table, Load load);
std::int64_t max_blocks(const Kernels& table, std::int64_t pixels);
std::int64_t blocks_per_group(const Plan& plan);
// Tiles of filters_in_lanes: of exactly tile_pixels when that divides the width, else of about equal sizes.
std::int64_t pixel_tiles(const Plan& plan, std::int64_t images);

// Packed weights, one after the other, each at a multiple of kAlignment. Columns are sorted by (group, piece, kh, kw,
// c), where a piece is a run of channels with at most kPieceColumns columns (or one channel): small enough for its
// pixels to stay in the first-level cache from tap to tap.
//   header
//   groups   int32 (groups + 1, 2): the first column and the first piece of every group
//   rows     int32 (pieces, kernel_h + 1): where the columns of every kernel row begin, counted within the group
//   offsets  int32 (columns,): from a pixel at (y * stride_h, x * stride_w) to what the column reads, in bytes
//   bias     float (groups, filters of a group, padded to kBlock for filters_in_lanes)
//   weights  float, per group and tile of filters (columns of the group, filters of the tile); of codes instead:
//            float (blocks, 1 << code_bits, kBlock), what these stand for, and uint16 (blocks, columns, code_bits)
inline constexpr std::int64_t kPieceColumns = 48;
struct PackedHeader {
  std::uint32_t magic = 0x43464341;  // "ACFC"
  std::uint32_t version = kPackedVersion;
  std::uint32_t isa = 0, method = 0;
  std::int64_t numbers[18] = {};
};
struct PackedLayout {
  std::size_t groups, rows, offsets, bias, weights, size;
};
PackedHeader packed_header(const Plan& plan);
PackedLayout packed_layout(const Plan& plan);
using Code = std::uint16_t;  // a bit of the codes of a block of filters
inline std::int64_t value_floats(const Plan& plan) { return kBlock << plan.code_bits; }  // of a block's codes

// winograd.cpp: the same for the methods of Winograd, whose packed weights begin with the same header.
bool winograd_fits(const Plan& plan);
bool winograd_is_few(const Plan& plan);  // fewer tiles than lanes
Plan best_winograd_tiles(Plan plan);
Plan best_winograd_filters(Plan plan);  // of few tiles
double winograd_arrival_cycles(const Plan& plan);
std::size_t winograd_packed_size(const Plan& plan);
void pack_winograd(const Plan& plan, const std::int64_t* columns, const float* weights, const float* bias,
                   void* packed);  // all but the header
std::int64_t winograd_scratch(const Plan& plan);
void run_winograd(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out,
                  const Pitch& out_pitch, const Epilogue& epilogue, float* scratch, int threads);

}  // namespace acf::conv
