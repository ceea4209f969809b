// The text that all ISAs share, included once per kernels_<isa>.cpp inside its anonymous namespace, after
// registers_<isa>-inl.h, which defines N with
//
//   Reg, kLanes                      register of floats, floats in it (a divisor of kBlock)
//   Mask, mask(from, to)             lanes [from, to)
//   kMasked                          whether masked loads and stores cost about the same as whole ones
//   max_vectors(filters), max_blocks(pixels)      what fits into the registers
//   load, store, load_masked(p, m), store_masked(p, m, r)    masked: nothing else is touched, zero elsewhere
//   load_halves(a, b)                kLanes / 2 floats each
//   load_strided(a, b)               kLanes floats each, of which the even ones are taken
//   difference(p, x)                 p[i] - x, of integers, as floats
//   set(x), broadcast(p), fma(a, b, c), add, sub, mul, div
//   max(a, b), min(a, b)             b when either is NaN
//   larger(a, b)                     NaN when either is NaN
//   smaller(a, b)                    b when a is NaN, on all ISAs
//   pow2(t)                          2^n for t = kMagic + n, |n| < 127
//   choose(bits, from, zero, one)    in lane i: one where bit from + i is set, else zero
//   kMaxPieces                       into how many strips Winograd may cut a register (1, 2 or 4), and above 1
//   load_pieces(p, m), store_pieces(p, m, r)      for arrays of so many pointers and masks: equal parts of a register
//   transpose_quads(r)               4 registers as rows of 4x4 matrices, one for every four lanes
//   transpose(rows, from, to)        to[i * kMaxPixels + m] = rows[m][from + i] for i < kBlock, m < kMaxPixels
//   store_planes(call, rows, from, filters)      all of that, residual, activation and store when it has a quick way,
//   or
//                                                false
//
// and includes no header with templates of the standard library: an inline function compiled here with wide
// instructions could be the copy that the linker keeps for everyone.

#include "conv/finish-inl.h"
#include "core/unrolled-inl.h"

// The same for one pixel whose filters lie side by side in the output.
inline void finish_features(const Call& call, const Segment& segment, int lane, const float* sums) {
  for (int f = 0; f < call.filters; f += N::kLanes) {
    const auto mask = N::mask(0, call.filters - f < N::kLanes ? call.filters - f : N::kLanes);
    Reg sum = N::load(sums + f);
    if (call.residual != nullptr) {
      sum = N::add(sum, N::load_masked(call.residual + segment.residual + lane + f, mask));
    }
    N::store_masked(call.out + segment.out + lane + f, mask, activate(call, sum));
  }
}

// body(offset, weights) for every column of the call, whose weights, or codes, lie `width` apart.
template <class Weight, class Body>
ACF_INLINE void each_column(const Call& call, const Weight* weights, int width, const Body& body) {
  const std::int32_t* row = call.rows;
  for (std::int64_t piece = 0; piece < call.pieces; ++piece, row += call.row_pitch) {
    const Weight* w = weights + (row[0] - call.first) * width;
    const std::int32_t *offset = call.offsets + row[0], *end = call.offsets + row[call.row_count];
#pragma GCC unroll 2
    for (; offset != end; ++offset, w += width) body(*offset, w);
  }
}

// ---- pixels in lanes ------------------------------------------------------------------------------------------------

template <Load load>
ACF_INLINE Reg load_pixels(const float* const* x, int v, std::int64_t offset) {
  if constexpr (load == Load::stretch) return N::load(at(x[v], offset));
  if constexpr (load == Load::halves) return N::load_halves(at(x[2 * v], offset), at(x[2 * v + 1], offset));
  if constexpr (load == Load::strided) return N::load_strided(at(x[2 * v], offset), at(x[2 * v + 1], offset));
}

template <Load load, int kFilters, int kVectors>
void pixels_in_lanes(const Call& call) {
  Reg sum[kFilters][kVectors];
  unrolled<kFilters>([&](auto f) {
    const Reg bias = N::broadcast(call.bias + f);
    unrolled<kVectors>([&](auto v) { sum[f][v] = bias; });
  });
  constexpr int kPointers = load == Load::stretch ? kVectors : 2 * kVectors;
  const float* x[kPointers];
  unrolled<kPointers>([&](auto i) { x[i] = call.tile->x[i]; });
  // What a tile writes lies in more planes than the processor foresees.
  unrolled<kVectors>([&](auto v) {
    if (call.tile->first[v] == call.tile->first[v + 1]) return;
    const Segment& segment = call.tile->segments[call.tile->first[v]];
    const float* out = call.out + segment.out + segment.from;
    unrolled<kFilters>([&](auto f) { __builtin_prefetch(out + f * call.out_plane, 1); });
  });
  const float* ahead = call.ahead;
  each_column(call, call.weights, kFilters, [&](std::int64_t offset, const float* w) {
    __builtin_prefetch(at(ahead, offset));
    Reg pixels[kVectors];
    unrolled<kVectors>([&](auto v) { pixels[v] = load_pixels<load>(x, v, offset); });
    unrolled<kFilters>([&](auto f) {
      const Reg weight = N::broadcast(w + f);
      unrolled<kVectors>([&](auto v) { sum[f][v] = N::fma(weight, pixels[v], sum[f][v]); });
    });
  });
  unrolled<kVectors>([&](auto v) {
    const Segment* first = call.tile->segments + call.tile->first[v];
    const Segment* last = call.tile->segments + call.tile->first[v + 1];
    if (call.clamps && (N::kMasked || (last - first == 1 && first->to - first->from == N::kLanes))) {
      for (const Segment* s = first; call.residual != nullptr && s != last; ++s) {
        const auto mask = N::mask(s->from, s->to);
        const float* residual = call.residual + s->residual;
        unrolled<kFilters>([&](auto f) {
          sum[f][v] = N::add(sum[f][v], N::kMasked ? N::load_masked(residual, mask) : N::load(residual));
          residual += call.residual_plane;
        });
      }
      unrolled<kFilters>([&](auto f) { sum[f][v] = clamp(sum[f][v], call.low, call.high); });
      for (const Segment* s = first; s != last; ++s) {
        const auto mask = N::mask(s->from, s->to);
        float* out = call.out + s->out;
        unrolled<kFilters>([&](auto f) {
          if (N::kMasked) {
            N::store_masked(out, mask, sum[f][v]);
          } else {
            N::store(out, sum[f][v]);
          }
          out += call.out_plane;
        });
      }
    } else {
      alignas(64) float sums[kFilters * N::kLanes];
      unrolled<kFilters>([&](auto f) { N::store(sums + f * N::kLanes, sum[f][v]); });
      finish(call, v, kFilters, sums, N::kLanes);
    }
  });
}

// ---- filters in lanes -----------------------------------------------------------------------------------------------

// sums: (kPixels, width), one row per pixel.
template <int kPixels>
void finish_pixels(const Call& call, const float* sums, int width) {
  const Tile& tile = *call.tile;
  constexpr int kVectors = (kPixels + N::kLanes - 1) / N::kLanes;
  if (call.out_plane == 1 && (call.residual == nullptr || call.residual_plane == 1)) {
    for (int v = 0; v < kVectors; ++v) {
      for (int i = tile.first[v]; i < tile.first[v + 1]; ++i) {
        const Segment& s = tile.segments[i];
        for (int lane = s.from; lane < s.to; ++lane)
          finish_features(call, s, lane, sums + (v * N::kLanes + lane) * width);
      }
    }
    return;
  }
  const float* rows[kMaxPixels];
  for (int m = 0; m < kMaxPixels; ++m) rows[m] = sums + (m < kPixels ? m : 0) * width;
  Call block = call;
  for (int from = 0; from < call.filters; from += kBlock) {
    const int filters = call.filters - from < kBlock ? call.filters - from : kBlock;
    if (!N::store_planes(block, rows, from, filters)) {
      alignas(64) float planes[kBlock * kMaxPixels + kMaxLanes];
      N::transpose(rows, from, planes);
      // Vectors longer than kMaxPixels read on past the last filter.
      for (int i = 0; i < kMaxLanes; ++i) planes[kBlock * kMaxPixels + i] = 0;
      for (int v = 0; v < kVectors; ++v) finish(block, v, filters, planes + v * N::kLanes, kMaxPixels);
    }
    block.out += kBlock * call.out_plane;
    if (block.residual != nullptr) block.residual += kBlock * call.residual_plane;
  }
}

inline constexpr int kFewPixels = 4;  // of which the pointers fit into registers anyway

// kRow: the pixels are neighbours in memory. One pointer for them instead of one for each leaves registers for those of
// the prefetches.
template <bool kRow, int kPixels, int kBlocks>
void filters_in_lanes(const Call& call) {
  constexpr int kParts = kBlock / N::kLanes, kVectors = kBlocks * kParts;
  constexpr int kWidth = kVectors * N::kLanes;
  Reg sum[kPixels][kVectors];
  // Either one bias for all pixels or sums of each.
  const float* begin = call.resumes ? call.sums : call.bias;
  const std::int64_t pitch = call.resumes ? kWidth : 0;
  unrolled<kPixels>(
      [&](auto m) { unrolled<kVectors>([&](auto j) { sum[m][j] = N::load(begin + m * pitch + j * N::kLanes); }); });
  constexpr int kPointers = kPixels - kRow * (kPixels - 1);
  constexpr bool kAhead = kPointers < kFewPixels;
  const float *x[kPointers], *ahead = call.ahead;
  unrolled<kPointers>([&](auto m) { x[m] = call.tile->x[m]; });
  const std::int64_t block = call.block, later = call.later[0], latest = call.later[1];
  each_column(call, call.weights, kBlock, [&](std::int64_t offset, const float* w) {
    __builtin_prefetch(w + later);
    if (kAhead && kBlocks > 1) __builtin_prefetch(w + latest);
    if (kAhead) __builtin_prefetch(at(ahead, offset));
    Reg weights[kVectors];
    unrolled<kVectors>([&](auto j) { weights[j] = N::load(w + (j / kParts) * block + (j % kParts) * N::kLanes); });
    unrolled<kPixels>([&](auto m) {
      const Reg pixel = N::broadcast(at(x[kRow ? 0 : m], offset) + (kRow ? m : 0));
      unrolled<kVectors>([&](auto j) { sum[m][j] = N::fma(weights[j], pixel, sum[m][j]); });
    });
  });
  alignas(64) float own[kPixels * kWidth];
  float* sums = call.sums != nullptr ? call.sums : own;
  unrolled<kPixels>(
      [&](auto m) { unrolled<kVectors>([&](auto j) { N::store(sums + m * kWidth + j * N::kLanes, sum[m][j]); }); });
  if (!call.stops) finish_pixels<kPixels>(call, sums, kWidth);
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// What the bits of a code stand for in the filters of a register.
template <int kBits>
ACF_INLINE Reg decoded(const std::uint16_t* code, int from, const Reg* values) {
  const Reg weight = N::choose(code[0], from, values[0], values[1]);
  if constexpr (kBits == 1) return weight;
  return N::choose(code[1], from, weight, N::choose(code[0], from, values[2], values[3]));
}

template <int kBits>
void decode(const DecodeCall& call) {
  constexpr int kParts = kBlock / N::kLanes, kValues = 1 << kBits;
  Reg values[kParts][kValues];
  unrolled<kParts>([&](auto j) {
    unrolled<kValues>([&](auto v) { values[j][v] = N::load(call.values + v * kBlock + j * N::kLanes); });
  });
  const std::uint16_t* codes = call.codes;
  float* to = call.weights;
  for (std::int64_t c = 0; c < call.columns; ++c, codes += kBits, to += kBlock) {
    unrolled<kParts>([&](auto j) { N::store(to + j * N::kLanes, decoded<kBits>(codes, j * N::kLanes, values[j])); });
  }
}

// filters_in_lanes for one pixel, which meets no weight again: they need not be stored.
template <int kBits, int kBlocks>
void filters_of_codes(const Call& call) {
  constexpr int kParts = kBlock / N::kLanes, kVectors = kBlocks * kParts, kValues = 1 << kBits;
  Reg sum[kVectors], values[kVectors][kValues];
  unrolled<kVectors>([&](auto j) {
    sum[j] = N::load(call.bias + j * N::kLanes);
    const float* from = call.weights + j / kParts * kValues * kBlock + j % kParts * N::kLanes;
    unrolled<kValues>([&](auto v) { values[j][v] = N::load(from + v * kBlock); });
  });
  const float* x = call.tile->x[0];
  const std::int64_t block = call.block;
  each_column(call, call.codes, kBits, [&](std::int64_t offset, const std::uint16_t* codes) {
    const Reg pixel = N::broadcast(at(x, offset));
    unrolled<kVectors>([&](auto j) {
      const Reg weight = decoded<kBits>(codes + j / kParts * block, j % kParts * N::kLanes, values[j]);
      sum[j] = N::fma(weight, pixel, sum[j]);
    });
  });
  alignas(64) float sums[kVectors * N::kLanes];
  unrolled<kVectors>([&](auto j) { N::store(sums + j * N::kLanes, sum[j]); });
  finish_pixels<1>(call, sums, kVectors * N::kLanes);
}

// ---- depthwise ------------------------------------------------------------------------------------------------------

// kRows output rows of kLanes pixels, of which the last ones may not exist. Input rows come one after the other, so the
// taps of every output are added in their order.
template <int kSize, int kStride, int kRows>
ACF_INLINE void depthwise_block(const PlaneCall& plane, const Reg (&weights)[kSize * kSize], std::int64_t y,
                                std::int64_t x) {
  Reg sum[kRows];
  const Reg bias = N::broadcast(plane.bias);
  unrolled<kRows>([&](auto r) { sum[r] = bias; });
  const float* in = plane.in + y * kStride * plane.in_row + x * kStride;
  unrolled<(kRows - 1) * kStride + kSize>([&](auto i) {
    unrolled<kSize>([&](auto kw) {
      const Reg pixels = kStride == 1 ? N::load(in + kw) : N::load_strided(in + kw, in + kw + N::kLanes);
      unrolled<kRows>([&](auto r) {
        constexpr int kh = i - r * kStride;
        if constexpr (kh >= 0 && kh < kSize) sum[r] = N::fma(weights[kh * kSize + kw], pixels, sum[r]);
      });
    });
    in += plane.in_row;
  });
  const int lanes = plane.width - x < N::kLanes ? static_cast<int>(plane.width - x) : N::kLanes;
  const auto mask = N::mask(0, lanes);
  float* out = plane.out + y * plane.out_row + x;
  const float* residual = plane.residual == nullptr ? nullptr : plane.residual + y * plane.residual_row + x;
  unrolled<kRows>([&](auto r) {
    if (residual != nullptr) {
      sum[r] = N::add(sum[r], N::load_masked(residual, mask));
      residual += plane.residual_row;
    }
    N::store_masked(out, mask, activate(*plane.call, sum[r]));
    out += plane.out_row;
  });
}

template <int kSize, int kStride>
void depthwise(const PlaneCall& plane) {
  Reg weights[kSize * kSize];
  unrolled<kSize * kSize>([&](auto i) { weights[i] = N::broadcast(plane.weights + i); });
  std::int64_t y = 0;
  for (; y + kDepthwiseRows <= plane.height; y += kDepthwiseRows) {
    for (std::int64_t x = 0; x < plane.width; x += N::kLanes) {
      depthwise_block<kSize, kStride, kDepthwiseRows>(plane, weights, y, x);
    }
  }
  for (; y < plane.height; ++y) {
    for (std::int64_t x = 0; x < plane.width; x += N::kLanes) {
      depthwise_block<kSize, kStride, 1>(plane, weights, y, x);
    }
  }
}

#include "conv/winograd-inl.h"

// ---- rows -----------------------------------------------------------------------------------------------------------

template <Combine kCombine>
ACF_INLINE Reg combined(Reg a, Reg b) {
  if constexpr (kCombine == Combine::add) return N::add(a, b);
  if constexpr (kCombine == Combine::subtract) return N::sub(a, b);
  if constexpr (kCombine == Combine::multiply) return N::mul(a, b);
  if constexpr (kCombine == Combine::divide) return N::div(a, b);
  return a;
}

template <Combine kCombine>
void combine_row(const RowCall& row) {
  constexpr bool kSecond = kCombine != Combine::first;
  const Reg a_once = row.a_once ? N::broadcast(row.a) : N::set(0.0f),
            b_once = kSecond && row.b_once ? N::broadcast(row.b) : N::set(0.0f);
  std::int64_t i = 0;
  for (; i + N::kLanes <= row.count; i += N::kLanes) {
    const Reg a = row.a_once ? a_once : N::load(row.a + i), b = !kSecond || row.b_once ? b_once : N::load(row.b + i);
    N::store(row.out + i, activate(*row.call, combined<kCombine>(a, b)));
  }
  if (i == row.count) return;
  const auto rest = N::mask(0, static_cast<int>(row.count - i));
  const Reg a = row.a_once ? a_once : N::load_masked(row.a + i, rest),
            b = !kSecond || row.b_once ? b_once : N::load_masked(row.b + i, rest);
  N::store_masked(row.out + i, rest, activate(*row.call, combined<kCombine>(a, b)));
}

inline void combine(const RowCall& row) {
  switch (row.combine) {
    case Combine::first: return combine_row<Combine::first>(row);
    case Combine::add: return combine_row<Combine::add>(row);
    case Combine::subtract: return combine_row<Combine::subtract>(row);
    case Combine::multiply: return combine_row<Combine::multiply>(row);
    case Combine::divide: return combine_row<Combine::divide>(row);
  }
}

// Some vectors of a row. kKernel: of windows as high and wide as that, whose lines are pooled apart, as one waits for
// none of the others; or 0.
template <bool kLargest, int kStride, int kKernel>
ACF_INLINE void pool_row(const PoolCall& call, const float* in, float* out, Reg scale) {
  const auto pool = [](Reg a, Reg b) { return kLargest ? N::larger(a, b) : N::add(a, b); };
  for (std::int64_t i = 0; i < call.count; i += N::kLanes) {
    const float* window = in + i * kStride;
    const auto tap = [&](std::int64_t kh, std::int64_t kw) {
      const float* at = window + kh * call.in_row + kw * call.dilation_w;
      return kStride == 1 ? N::load(at) : N::load_strided(at, at + N::kLanes);
    };
    Reg pooled = tap(0, 0);
    if constexpr (kKernel > 0) {
      Reg line[kKernel];
      unrolled<kKernel>([&](auto kh) {
        line[kh] = tap(kh, 0);
        unrolled<kKernel - 1>([&](auto kw) { line[kh] = pool(line[kh], tap(kh, kw + 1)); });
      });
      pooled = line[0];
      unrolled<kKernel - 1>([&](auto kh) { pooled = pool(pooled, line[kh + 1]); });
    } else {
      for (std::int64_t kh = 0; kh < call.kernel_h; ++kh) {
        for (std::int64_t kw = kh == 0 ? 1 : 0; kw < call.kernel_w; ++kw) pooled = pool(pooled, tap(kh, kw));
      }
    }
    if (!kLargest) pooled = N::mul(pooled, scale);
    if (i + N::kLanes <= call.count) {
      N::store(out + i, pooled);
    } else {
      N::store_masked(out + i, N::mask(0, static_cast<int>(call.count - i)), pooled);
    }
  }
}

template <bool kLargest, int kStride, int kKernel>
void pool_rows(const PoolCall& call) {
  const Reg scale = N::set(call.scale);
  for (std::int64_t y = 0; y < call.rows; ++y) {
    pool_row<kLargest, kStride, kKernel>(call, call.in + y * call.in_step, call.out + y * call.out_step, scale);
  }
}

template <bool kLargest, int kStride>
void pool_windows(const PoolCall& call) {
  const bool square = call.kernel_h == call.kernel_w;
  if (square && call.kernel_w == 2) return pool_rows<kLargest, kStride, 2>(call);
  if (square && call.kernel_w == 3) return pool_rows<kLargest, kStride, 3>(call);
  return pool_rows<kLargest, kStride, 0>(call);
}

inline float pooled_window(const PoolCall& row, const float* window) {
  float pooled = *window;
  for (std::int64_t kh = 0; kh < row.kernel_h; ++kh) {
    for (std::int64_t kw = kh == 0 ? 1 : 0; kw < row.kernel_w; ++kw) {
      const float x = window[kh * row.in_row + kw * row.dilation_w];
      if (!row.largest) pooled += x;
      if (row.largest && !(pooled > x || pooled != pooled)) pooled = x;  // NaN stays
    }
  }
  return row.largest ? pooled : pooled * row.scale;
}

inline void pool(const PoolCall& call) {
  if (call.stride_w == 1) return call.largest ? pool_windows<true, 1>(call) : pool_windows<false, 1>(call);
  if (call.stride_w == 2) return call.largest ? pool_windows<true, 2>(call) : pool_windows<false, 2>(call);
  for (std::int64_t y = 0; y < call.rows; ++y) {
    for (std::int64_t i = 0; i < call.count; ++i) {
      call.out[y * call.out_step + i] = pooled_window(call, call.in + y * call.in_step + i * call.stride_w);
    }
  }
}

inline float sum(const float* p, std::int64_t count) {
  Reg sums[4] = {N::set(0.0f), N::set(0.0f), N::set(0.0f), N::set(0.0f)};
  std::int64_t i = 0;
  for (; i + 4 * N::kLanes <= count; i += 4 * N::kLanes) {
    unrolled<4>([&](auto j) { sums[j] = N::add(sums[j], N::load(p + i + j * N::kLanes)); });
  }
  for (; i + N::kLanes <= count; i += N::kLanes) sums[0] = N::add(sums[0], N::load(p + i));
  if (i < count) sums[1] = N::add(sums[1], N::load_masked(p + i, N::mask(0, static_cast<int>(count - i))));
  alignas(64) float lanes[N::kLanes];
  N::store(lanes, N::add(N::add(sums[0], sums[1]), N::add(sums[2], sums[3])));
  float total = 0;
  for (const float lane : lanes) total += lane;
  return total;
}

inline float peak(const float* two, std::int64_t rounds) {
  const Reg factor = N::broadcast(two), more = N::broadcast(two + 1);
  Reg chain[kPeakChains];
  chain[0] = more;  // chains that were the same would be computed once
  unrolled<kPeakChains - 1>([&](auto i) { chain[i + 1] = N::add(chain[i], more); });
  for (std::int64_t round = 0; round < rounds; ++round) {
    unrolled<kPeakChains>([&](auto i) { chain[i] = N::fma(chain[i], factor, more); });
  }
  unrolled<kPeakChains - 1>([&](auto i) { chain[i + 1] = N::add(chain[i + 1], chain[i]); });
  alignas(64) float lanes[N::kLanes];
  N::store(lanes, chain[kPeakChains - 1]);
  return lanes[0];
}

// ---- the table ------------------------------------------------------------------------------------------------------

template <Load load, int kFilters, int kVectors>
constexpr Kernel pixels_kernel() {
  constexpr int kMost = N::max_vectors(load, kFilters);
  if constexpr (load != Load::stretch && kVectors == 1 && kMost > 1) {
    return pixels_kernel<load, kFilters, 2>();
  } else if constexpr (kVectors <= kMost) {
    return pixels_in_lanes<load, kFilters, kVectors>;
  } else {
    return nullptr;
  }
}
template <bool kRow, int kPixels, int kBlocks>
constexpr Kernel filters_kernel() {
  if constexpr (kBlocks <= N::max_blocks(kPixels)) {
    return filters_in_lanes<(kRow && kPixels >= kFewPixels), kPixels, kBlocks>;
  } else {
    return nullptr;
  }
}

template <int kBits, int kBlocks>
constexpr Kernel codes_kernel() {
  if constexpr (kBlocks <= N::max_blocks(1)) {
    return filters_of_codes<kBits, kBlocks>;
  } else {
    return nullptr;
  }
}

template <int kFilters, int kVectors>
constexpr WinogradProductKernel product_kernel() {
  if constexpr (kVectors <= N::max_vectors(Load::stretch, kFilters)) {
    return winograd_product<kFilters, kVectors>;
  } else {
    return nullptr;
  }
}

template <int kTiles, int kBlocks>
constexpr WinogradFewProductKernel few_product_kernel() {
  if constexpr (kBlocks <= N::max_blocks(kTiles)) {
    return winograd_few_product<kTiles, kBlocks>;
  } else {
    return nullptr;
  }
}

#define ACF_FEW_PRODUCT(t)                                                                                             \
  {                                                                                                                    \
    few_product_kernel<t, 1>(), few_product_kernel<t, 2>(), few_product_kernel<t, 3>(), few_product_kernel<t, 4>(),    \
        few_product_kernel<t, 5>(), few_product_kernel<t, 6>(), few_product_kernel<t, 7>(), few_product_kernel<t, 8>() \
  }
#define ACF_FEW_PRODUCTS                                                                                \
  {                                                                                                     \
    ACF_FEW_PRODUCT(1), ACF_FEW_PRODUCT(2), ACF_FEW_PRODUCT(3), ACF_FEW_PRODUCT(4), ACF_FEW_PRODUCT(5), \
        ACF_FEW_PRODUCT(6), ACF_FEW_PRODUCT(7), ACF_FEW_PRODUCT(8)                                      \
  }
#define ACF_PRODUCT(f)                                                                                 \
  {                                                                                                    \
    product_kernel<f, 1>(), product_kernel<f, 2>(), product_kernel<f, 3>(), product_kernel<f, 4>(),    \
        product_kernel<f, 5>(), product_kernel<f, 6>(), product_kernel<f, 7>(), product_kernel<f, 8>() \
  }
#define ACF_PRODUCTS                                                                                                \
  {                                                                                                                 \
    ACF_PRODUCT(1), ACF_PRODUCT(2), ACF_PRODUCT(3), ACF_PRODUCT(4), ACF_PRODUCT(5), ACF_PRODUCT(6), ACF_PRODUCT(7), \
        ACF_PRODUCT(8), ACF_PRODUCT(9), ACF_PRODUCT(10), ACF_PRODUCT(11), ACF_PRODUCT(12)                           \
  }
#define ACF_VECTORS(load, f)                                                                   \
  {                                                                                            \
    pixels_kernel<load, f, 1>(), pixels_kernel<load, f, 2>(), pixels_kernel<load, f, 3>(),     \
        pixels_kernel<load, f, 4>(), pixels_kernel<load, f, 5>(), pixels_kernel<load, f, 6>(), \
        pixels_kernel<load, f, 7>(), pixels_kernel<load, f, 8>()                               \
  }
#define ACF_FILTERS(load)                                                                                              \
  {                                                                                                                    \
    ACF_VECTORS(load, 1), ACF_VECTORS(load, 2), ACF_VECTORS(load, 3), ACF_VECTORS(load, 4), ACF_VECTORS(load, 5),      \
        ACF_VECTORS(load, 6), ACF_VECTORS(load, 7), ACF_VECTORS(load, 8), ACF_VECTORS(load, 9), ACF_VECTORS(load, 10), \
        ACF_VECTORS(load, 11), ACF_VECTORS(load, 12)                                                                   \
  }
#define ACF_BLOCKS(row, m)                                                                     \
  {                                                                                            \
    filters_kernel<row, m, 1>(), filters_kernel<row, m, 2>(), filters_kernel<row, m, 3>(),     \
        filters_kernel<row, m, 4>(), filters_kernel<row, m, 5>(), filters_kernel<row, m, 6>(), \
        filters_kernel<row, m, 7>(), filters_kernel<row, m, 8>()                               \
  }
#define ACF_PIXELS(row)                                                                                 \
  {                                                                                                     \
    ACF_BLOCKS(row, 1), ACF_BLOCKS(row, 2), ACF_BLOCKS(row, 3), ACF_BLOCKS(row, 4), ACF_BLOCKS(row, 5), \
        ACF_BLOCKS(row, 6), ACF_BLOCKS(row, 7), ACF_BLOCKS(row, 8)                                      \
  }
#define ACF_CODES(bits)                                                                                    \
  {                                                                                                        \
    codes_kernel<bits, 1>(), codes_kernel<bits, 2>(), codes_kernel<bits, 3>(), codes_kernel<bits, 4>(),    \
        codes_kernel<bits, 5>(), codes_kernel<bits, 6>(), codes_kernel<bits, 7>(), codes_kernel<bits, 8>() \
  }
#define ACF_KERNEL_TABLE                                                                                        \
  {                                                                                                             \
    N::kLanes, {ACF_FILTERS(Load::stretch), ACF_FILTERS(Load::halves), ACF_FILTERS(Load::strided)},             \
        {ACF_PIXELS(false), ACF_PIXELS(true)}, {decode<1>, decode<2>}, {ACF_CODES(1), ACF_CODES(2)},            \
        {{depthwise<3, 1>, depthwise<3, 2>}, {depthwise<5, 1>, depthwise<5, 2>}}, winograd_input, ACF_PRODUCTS, \
        winograd_output, ACF_FEW_PRODUCTS, winograd_few_output, combine, pool, sum, peak                        \
  }
