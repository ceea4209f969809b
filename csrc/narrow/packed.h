// What plan.cpp and dispatch.cpp share: how a plan cuts its work, and how packed weights lie in memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "conv/packed.h"
#include "narrow/kernels.h"

namespace acf::narrow {

using conv::ceil_div;
using conv::Parts;

// Of the second-level cache: weights up to this size stay there from block to block. Values of a block take a part of
// it: of more pixels side by side, more is read and written in order; and weights that do not stay are read once a
// block, so it is larger beside those.
inline constexpr std::int64_t kCachedBytes = 512 << 10;
inline constexpr std::int64_t kBlockBytes = 256 << 10, kLargeBlockBytes = 1 << 20;
inline constexpr std::int64_t kMaxTiles = 32;  // of pixels at a time
inline constexpr std::int64_t kMaxColumns = (std::int64_t{1} << 31) / (255 * 128);

// What a row of columns reads: channels of a group, at a position from a pixel's first one.
struct Row {
  std::int32_t group, position;
};

inline constexpr std::uint32_t kVersion = 2;

struct Header {
  std::uint32_t magic = 0x4e464341;  // "ACFN"
  std::uint32_t version = kVersion;
  std::int64_t numbers[19] = {};
};

// Packed weights, one after the other, each at a multiple of kAlignment:
//   header
//   counts       int64 (groups,): of columns
//   offsets      int32 (groups, columns of all steps): from a pixel to what a column reads, in floats;
//                unless wide: (2, rows of 16 positions, channels of a row) of a group of channels, whole or the last
//                one
//   places       int64 (steps,), in place: from a position to what a step reads, in bytes
//   rows         Row (rows of all steps,), narrow: what a row reads
//   bias         float (groups, filters of a group in whole tiles)
//   multipliers  float, likewise, and corrections int32: of int8
//   weights      (groups, tiles of filters, steps), as Order says
struct Packed {
  std::size_t counts, offsets, places, rows, bias, multipliers, corrections, weights, size;
};

inline const NumberKernels& table(const Plan& plan) {
  const Kernels& all = kernels(plan.unit);
  return plan.number == Number::bfloat16 ? all.bfloat16 : all.int8;
}

inline std::int64_t step_columns(Number number) { return kTile * columns_per_row(number); }
inline std::int64_t group_filters(const Plan& plan) { return plan.shape.filters / plan.shape.groups; }
inline std::int64_t filter_tiles(const Plan& plan) { return ceil_div(group_filters(plan), kTile); }
inline std::int64_t offsets_per_group(const Plan& plan) { return plan.steps * step_columns(plan.number); }

// Unless wide: an image is a set of planes of positions, halo and all, as it lies in memory; a position has 4 bytes,
// those of a group of channels.
inline constexpr std::int64_t kPositionBytes = 4;
inline std::int64_t positions(const Plan& plan) {
  const conv::Padding& padding = plan.shape.padding;
  return (plan.shape.height + padding.top + padding.bottom - 1) * plan.in.row + padding.left + plan.shape.width +
         padding.right;
}
inline std::int64_t position_rows(const Plan& plan) { return ceil_div(positions(plan), kTile); }
// From plane to plane, in positions: an odd number of cache lines, so that those of several planes do not meet in the
// same sets of the cache; the last tile reads past the last position.
inline std::int64_t position_plane(const Plan& plan) { return ((position_rows(plan) + 1) | 1) * kTile; }
inline std::int64_t channel_groups(const Plan& plan) {
  return ceil_div(plan.shape.channels, std::int64_t{columns_per_row(plan.number)});
}
inline std::int64_t channel_blocks(const Plan& plan) { return ceil_div(channel_groups(plan), kTile); }
// From the first position that a pixel reads to the last.
inline std::int64_t reach(const Plan& plan) {
  const conv::Shape& s = plan.shape;
  return (s.kernel_h - 1) * s.dilation_h * plan.in.row + (s.kernel_w - 1) * s.dilation_w;
}
inline std::int64_t image_bytes(const Plan& plan) {
  return (channel_blocks(plan) > 1 ? channel_blocks(plan) * kTile : channel_groups(plan)) * position_plane(plan) *
         kPositionBytes;
}
// Of an image; pixels between rows and in the halo are computed in vain.
inline std::int64_t position_tiles(const Plan& plan) {
  return ceil_div((plan.shape.out_height() - 1) * plan.in.row + plan.shape.out_width(), kTile);
}

// Of a tile of filters.
inline std::int64_t weight_bytes(const Plan& plan) {
  return plan.steps * kStepBytes * (kernels(plan.unit).order == Order::halves ? 2 : 1);
}
inline std::int64_t value_bytes(const Plan& plan) { return plan.steps * kStepBytes; }  // of a tile of pixels
inline std::int64_t pixel_tiles(const Plan& plan, std::int64_t images) {
  return ceil_div(images * plan.shape.out_height() * plan.shape.out_width(), kTile);
}

// Whether the weights of a group come from far away, every time.
inline bool streams(const Plan& plan) { return filter_tiles(plan) * weight_bytes(plan) > kCachedBytes; }

// Tiles of pixels that are gathered before they meet the filters.
inline std::int64_t block_tiles(const Plan& plan) {
  const std::int64_t bytes = streams(plan) ? kLargeBlockBytes : kBlockBytes;
  return std::min(std::clamp<std::int64_t>(bytes / value_bytes(plan), 2, kMaxTiles),
                  std::max<std::int64_t>(1, pixel_tiles(plan, plan.images)));
}

// Narrow: positions that a block of pixels reads at most, of images one after the other; from plane to plane an odd
// number of cache lines.
inline std::int64_t block_positions(const Plan& plan) {
  const conv::Shape& s = plan.shape;
  const std::int64_t line = s.out_height() > 1 ? s.stride_h * plan.in.row : 0,  // from one of pixels to the next
      between = std::max<std::int64_t>(0, position_rows(plan) * kTile - s.out_height() * line),  // images, beyond that
      pixels = block_tiles(plan) * kTile, lines = ceil_div(pixels - 1, s.out_width()) + 1,
                     crossings = ceil_div(pixels, s.out_height() * s.out_width());
  return (ceil_div(lines * line + crossings * between + reach(plan) + 2 * kTile, kTile) | 1) * kTile;
}

inline std::int64_t narrow_bytes(const Plan& plan) {
  return channel_groups(plan) * block_positions(plan) * kPositionBytes;
}

inline Header header_of(const Plan& plan) {
  Header header;
  const conv::Shape& s = plan.shape;
  const std::int64_t numbers[] = {s.channels,
                                  s.filters,
                                  s.groups,
                                  s.kernel_h,
                                  s.kernel_w,
                                  s.stride_h,
                                  s.stride_w,
                                  s.dilation_h,
                                  s.dilation_w,
                                  s.padding.top,
                                  s.padding.left,
                                  plan.in.row,
                                  plan.in.plane,
                                  plan.steps,
                                  static_cast<std::int64_t>(plan.number),
                                  static_cast<std::int64_t>(plan.unit),
                                  static_cast<std::int64_t>(plan.reading),
                                  plan.rows,
                                  s.height};
  std::copy(std::begin(numbers), std::end(numbers), header.numbers);
  return header;
}

inline Packed packed_layout(const Plan& plan) {
  const auto groups = static_cast<std::size_t>(plan.shape.groups),
             filters = groups * static_cast<std::size_t>(filter_tiles(plan) * kTile);
  const bool integers = plan.number == Number::int8;
  std::size_t end = 0;
  const auto place = [&end](std::size_t bytes) {
    const std::size_t begin = end;
    end += (bytes + conv::kAlignment - 1) / conv::kAlignment * conv::kAlignment;
    return begin;
  };
  Packed at = {};
  place(sizeof(Header) + sizeof(Quantization));
  at.counts = place(groups * sizeof(std::int64_t));
  const std::int64_t offsets = plan.reading == Reading::wide ? plan.shape.groups * offsets_per_group(plan)
                                                             : 2 * position_rows(plan) * columns_per_row(plan.number);
  at.offsets = place(static_cast<std::size_t>(offsets) * sizeof(std::int32_t));
  at.places =
      place(plan.reading == Reading::in_place ? static_cast<std::size_t>(plan.steps) * sizeof(std::int64_t) : 0);
  at.rows = place(plan.reading == Reading::narrow ? static_cast<std::size_t>(plan.steps) * kTile * sizeof(Row) : 0);
  at.bias = place(filters * sizeof(float));
  at.multipliers = place(integers ? filters * sizeof(float) : 0);
  at.corrections = place(integers ? filters * sizeof(std::int32_t) : 0);
  at.weights = place(filters / kTile * static_cast<std::size_t>(weight_bytes(plan)));
  at.size = end;
  return at;
}

}  // namespace acf::narrow
