// Cuts a convolution into tiles and hands them to the kernels of the plan's ISA.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

#include "conv/cost.h"
#include "conv/packed.h"
#include "core/check.h"
#include "core/parallel.h"

namespace acf::conv {
namespace {

// Panels of weights that are used again and again stay in the second-level cache.
constexpr std::int64_t kPanelBytes = 512 << 10;
// Weights stream from the third-level cache or from memory at the worst, some hundred nanoseconds away, and what the
// processor prefetches by itself ends at every page.
constexpr std::int64_t kWeightsAhead = 512;
// What a piece of weights may take of the first-level cache.
constexpr std::int64_t kChunkBytes = 16 << 10;
constexpr std::int64_t kMaxDecoded = kMaxBlocks * kPieceColumns * kBlock;  // floats: a piece, or more that fit
static_assert(kMaxDecoded * sizeof(float) >= kChunkBytes);

// What all tiles of a run share.
struct Run {
  const Plan& plan;
  const Kernels& table;
  std::int64_t images;
  const float* in;
  Pitch out_pitch, residual_pitch;
  std::int64_t height, width;  // of the output
  Parts pixels;                // all pixels, or vectors of them, cut into tiles
  Parts group;                 // the filters of a group, or blocks of them, cut into tiles
  std::int64_t filter_tiles;   // of all groups
  const std::int32_t* groups;
  const std::int32_t* rows;
  const std::int32_t* offsets;
  const float* bias;
  const float* weights;  // or what codes stand for
  const Code* codes;
  Call call;  // with what is the same everywhere
};

// Walks over the output, from stretch to stretch of a row.
struct Cursor {
  std::int64_t n, y, x;
};

// A tile with the range of its output rows and of the kernel rows that meet more than padding in some of them.
struct RowTile : Tile {
  std::int64_t first_row, last_row, kernel_begin, kernel_end;
  int pointers, segment_count;
  int begun;        // the first segment of the vector under way
  bool neighbours;  // in memory: the pixels of filters_in_lanes
};

// Where part `begin` of the pixels, or of their vectors, begins.
Cursor cursor_at(const Run& run, std::int64_t begin) {
  if (run.plan.method == Method::filters_in_lanes) {
    return {begin / run.width / run.height, begin / run.width % run.height, begin % run.width};
  }
  const std::int64_t lanes = run.table.lanes;
  if (run.plan.window == Window::flat) {
    const std::int64_t per_image = windows_per_image(run.plan, lanes), at = begin % per_image * lanes;
    return {begin / per_image, at / run.plan.in.row, at % run.plan.in.row};
  }
  const bool halves = run.plan.window == Window::halves;
  const std::int64_t stretch = halves ? 2 * begin : begin, size = halves ? lanes / 2 : lanes,
                     per_row = ceil_div(run.width, size);
  return {stretch / per_row / run.height, stretch / per_row % run.height, stretch % per_row * size};
}

void step(const Run& run, Cursor& at, std::int64_t size) {
  at.x += size;
  if (at.x < run.width) return;
  at.x = 0;
  if (++at.y < run.height) return;
  at.y = 0;
  ++at.n;
}

void begin_vector(RowTile& tile, std::int64_t number) { tile.first[number] = tile.begun = tile.segment_count; }

// Rows without a halo between them are one segment of the vector.
void add_segment(const Run& run, RowTile& tile, const Cursor& at, std::int64_t from, std::int64_t size) {
  const Pitch &out = run.out_pitch, &residual = run.residual_pitch;
  const Segment segment = {at.n * out.image + at.y * out.row + at.x - from,
                           at.n * residual.image + at.y * residual.row + at.x - from, static_cast<int>(from),
                           static_cast<int>(from + size)};
  Segment* before = tile.segment_count > tile.begun ? tile.segments + tile.segment_count - 1 : nullptr;
  if (before != nullptr && before->to == segment.from && before->out == segment.out &&
      (run.call.residual == nullptr || before->residual == segment.residual)) {
    before->to = segment.to;
  } else {
    tile.segments[tile.segment_count++] = segment;
  }
  tile.first_row = std::min(tile.first_row, at.y);
  tile.last_row = std::max(tile.last_row, at.y);
}

void add_pointer(const Run& run, RowTile& tile, const Cursor& at) {
  const Shape& s = run.plan.shape;
  tile.x[tile.pointers++] = run.in + at.n * run.plan.in.image + at.y * s.stride_h * run.plan.in.row + at.x * s.stride_w;
}

// One vector of a flat window: output rows run on with the pitch of the input.
void add_flat(const Run& run, RowTile& tile, Cursor& at) {
  const std::int64_t row = run.plan.in.row, lanes = run.table.lanes;
  add_pointer(run, tile, at);
  std::int64_t lane = 0;
  while (true) {
    const std::int64_t size = std::min(run.width - at.x, lanes - lane);
    if (size > 0) add_segment(run, tile, at, lane, size);
    const std::int64_t rest = std::min(row - at.x, lanes - lane);
    lane += rest;
    at.x += rest;
    if (at.x == row) {
      at.x = 0;
      ++at.y;
    }
    // What lies after the last pixel of an image belongs to its last vector.
    if (at.y == run.height || (at.y == run.height - 1 && at.x >= run.width)) {
      at = {at.n + 1, 0, 0};
      return;
    }
    if (lane == lanes) return;
  }
}

// The next stretch of at most `size` pixels of a row, from lane `from` on.
void add_stretch(const Run& run, RowTile& tile, Cursor& at, std::int64_t from, std::int64_t size) {
  add_pointer(run, tile, at);
  add_segment(run, tile, at, from, std::min(size, run.width - at.x));
  step(run, at, size);
}

void add_window(const Run& run, RowTile& tile, Cursor& at) {
  const std::int64_t lanes = run.table.lanes;
  switch (run.plan.window) {
    case Window::flat: add_flat(run, tile, at); return;
    case Window::rows: add_stretch(run, tile, at, 0, lanes); return;
    case Window::depthwise: return;
    case Window::halves: {
      add_stretch(run, tile, at, 0, lanes / 2);
      if (at.n < run.images) {
        add_stretch(run, tile, at, lanes / 2, lanes / 2);
      } else {
        tile.x[tile.pointers] = tile.x[tile.pointers - 1];
        ++tile.pointers;
      }
      return;
    }
  }
}

// A pixel of filters_in_lanes; neighbours of a row make one segment of their vector of results.
void add_pixel(const Run& run, RowTile& tile, Cursor& at) {
  const int lane = tile.pointers % run.table.lanes;
  if (lane == 0) begin_vector(tile, tile.pointers / run.table.lanes);
  add_pointer(run, tile, at);
  tile.neighbours &= tile.x[tile.pointers - 1] - tile.x[0] == tile.pointers - 1;
  if (lane == 0 || at.x == 0) {
    add_segment(run, tile, at, lane, 1);
  } else {
    ++tile.segments[tile.segment_count - 1].to;
  }
  step(run, at, 1);
}

// The next `size` pixels or vectors of pixels.
void fill(const Run& run, RowTile& tile, Cursor& at, std::int64_t size) {
  tile.pointers = tile.segment_count = 0;
  tile.neighbours = true;
  tile.first_row = run.height;
  tile.last_row = 0;
  if (run.plan.method == Method::filters_in_lanes) {
    for (std::int64_t i = 0; i < size; ++i) add_pixel(run, tile, at);
    tile.first[ceil_div(size, run.table.lanes)] = tile.segment_count;
  } else {
    for (std::int64_t v = 0; v < size; ++v) {
      begin_vector(tile, v);
      add_window(run, tile, at);
    }
    tile.first[size] = tile.segment_count;
    if (run.plan.window == Window::halves && size == 1) {
      tile.first[2] = tile.segment_count;
      tile.x[2] = tile.x[3] = tile.x[0];
    }
  }
  const Shape& s = run.plan.shape;
  const auto input_row = [&s](std::int64_t y, std::int64_t kh) {
    return y * s.stride_h - s.padding.top + kh * s.dilation_h;
  };
  std::int64_t &begin = tile.kernel_begin = 0, &end = tile.kernel_end = s.kernel_h;
  while (begin < end && input_row(tile.last_row, begin) < 0) ++begin;
  while (begin < end && input_row(tile.first_row, end - 1) >= s.height) --end;
}

// Calls the kernels for one tile of filters and one of pixels after the other.
class Caller {
 public:
  explicit Caller(const Run& run) : run_(run), blocks_(run.plan.method == Method::filters_in_lanes), call_(run.call) {
    const Shape& s = run.plan.shape;
    group_filters_ = s.filters / s.groups;
    parts_ = blocks_ ? blocks_per_group(run.plan) : group_filters_;
    unit_ = blocks_ ? kBlock : 1;
  }

  void choose_filters(std::int64_t index) {
    const std::int64_t tiles = run_.group.count, groups = run_.plan.shape.groups;
    const std::int64_t group = groups == 1 ? 0 : tiles == 1 ? index : index / tiles;
    const std::int32_t* ends = run_.groups + 2 * group;
    part_ = run_.group[index - group * tiles];
    columns_ = ends[2] - ends[0];
    pieces_ = ends[3] - ends[1];
    rows_ = run_.rows + ends[1] * (run_.plan.shape.kernel_h + 1);
    const std::int64_t begin = part_.begin * unit_, filter = group * group_filters_ + begin;
    call_.offsets = run_.offsets + ends[0];
    call_.weights = run_.weights + ends[0] * parts_ * unit_ + begin * columns_;
    call_.first = 0;
    call_.block = columns_ * kBlock;
    call_.bias = run_.bias + group * parts_ * unit_ + begin;
    call_.filters = static_cast<int>(std::min(part_.size * unit_, group_filters_ - begin));
    call_.out = run_.call.out + filter * call_.out_plane;
    if (call_.residual != nullptr) call_.residual = run_.call.residual + filter * call_.residual_plane;
  }

  std::int64_t pieces() const { return pieces_; }

  // The pieces from `piece` on that make up a chunk.
  std::int64_t chunk_end(std::int64_t piece) const {
    const std::int64_t most = kChunkBytes / (part_.size * kBlock * static_cast<std::int64_t>(sizeof(float)));
    const std::int32_t begin = row(piece)[0];
    std::int64_t end = piece + 1;
    while (end < pieces_ && row(end)[run_.plan.shape.kernel_h] - begin <= most) ++end;
    return end;
  }

  // All columns that the tile needs.
  void whole(const RowTile& tile, std::int64_t pixels, const float* ahead) {
    call_.sums = nullptr;
    call_.resumes = call_.stops = false;
    call_.later[0] = kWeightsAhead;
    call_.later[1] = (part_.size - 1) * call_.block + kWeightsAhead;
    add_up(tile, ahead, 0, pieces_, kernel_for(tile, pixels));
  }

  // All columns that the one pixel of the tile needs, of their codes.
  void codes(const RowTile& tile) {
    const int bits = run_.plan.code_bits;
    call_.weights = run_.weights + part_.begin * value_floats(run_.plan);
    call_.codes = run_.codes + part_.begin * columns_ * bits;
    call_.first = 0;
    call_.block = columns_ * bits;
    add_up(tile, tile.x[0], 0, pieces_, run_.table.filters_of_codes[bits - 1][part_.size - 1]);
  }

  // The weights of pieces [begin, end), of their codes.
  void decode(std::int64_t begin, std::int64_t end, float* weights) {
    const int bits = run_.plan.code_bits;
    const DecodeKernel kernel = run_.table.decode[bits - 1];
    call_.weights = weights;
    call_.first = row(begin)[0];
    const std::int64_t columns = (end < pieces_ ? row(end)[0] : columns_) - call_.first;
    call_.block = columns * kBlock;
    for (std::int64_t b = part_.begin; b < part_.begin + part_.size; ++b, weights += call_.block) {
      kernel({run_.codes + (b * columns_ + call_.first) * bits, run_.weights + b * value_floats(run_.plan), columns,
              weights});
    }
  }

  // The columns of pieces [begin, end) that the tile needs. Calls 0, 1, ... for the same pieces prefetch the weights of
  // the next ones, a block or two each, so that these arrive at an even pace.
  void chunk(const RowTile& tile, std::int64_t pixels, std::int64_t call, float* sums, std::int64_t begin,
             std::int64_t end) {
    call_.sums = sums;
    call_.resumes = begin > 0;
    call_.stops = end < pieces_;
    const std::int64_t next = (call_.stops ? row(end)[0] : part_.size * columns_) - row(begin)[0];
    const std::int64_t each = tile.neighbours ? 2 : 1;
    for (std::int64_t i = 0; i < each; ++i) {
      const std::int64_t block = each * call + i;
      call_.later[i] = block < part_.size && run_.plan.code_bits == 0 ? next * kBlock + block * call_.block : 0;
    }
    add_up(tile, tile.x[0], begin, end, kernel_for(tile, pixels));
  }

 private:
  const std::int32_t* row(std::int64_t piece) const { return rows_ + piece * (run_.plan.shape.kernel_h + 1); }

  Kernel kernel_for(const RowTile& tile, std::int64_t pixels) const {
    return blocks_ ? run_.table.filters_in_lanes[tile.neighbours][pixels - 1][part_.size - 1]
                   : run_.table.pixels_in_lanes[static_cast<int>(load_of(run_.plan))][part_.size - 1][pixels - 1];
  }

  void add_up(const RowTile& tile, const float* ahead, std::int64_t begin, std::int64_t end, Kernel kernel) {
    const std::int64_t kernel_h = run_.plan.shape.kernel_h;
    call_.tile = &tile;
    call_.ahead = ahead;
    call_.rows = row(begin) + tile.kernel_begin;
    call_.row_count = tile.kernel_end - tile.kernel_begin;
    call_.row_pitch = kernel_h + 1;
    call_.pieces = end - begin;
    if (call_.row_count == kernel_h) {  // pieces lie side by side: one run
      call_.row_count = (end - begin) * (kernel_h + 1) - 1;
      call_.pieces = 1;
    }
    kernel(call_);
  }

  const Run& run_;
  const bool blocks_;
  Call call_;
  std::int64_t group_filters_, parts_, unit_;  // parts: filters or blocks of them in a group, of `unit` filters
  Part part_ = {};
  std::int64_t columns_ = 0, pieces_ = 0;  // of the group
  const std::int32_t* rows_ = nullptr;
};

// Tile of pixels by tile of pixels, with all filters: weights come from the second-level cache, pixels from the first.
void run_tiles(const Run& run, const Part& pixel_tiles, const Part& filter_tiles) {
  RowTile tiles[2];
  Caller caller(run);
  Cursor at = cursor_at(run, run.pixels[pixel_tiles.begin].begin);
  const std::int64_t end = pixel_tiles.begin + pixel_tiles.size;
  fill(run, tiles[pixel_tiles.begin % 2], at, run.pixels[pixel_tiles.begin].size);
  for (std::int64_t t = pixel_tiles.begin; t < end; ++t) {
    const RowTile& tile = tiles[t % 2];
    RowTile& next = tiles[(t + 1) % 2];
    if (t + 1 < end) fill(run, next, at, run.pixels[t + 1].size);
    const RowTile& later = t + 1 < end ? next : tile;
    int ahead = 0;
    for (std::int64_t i = filter_tiles.begin; i < filter_tiles.begin + filter_tiles.size; ++i) {
      caller.choose_filters(i);
      caller.whole(tile, run.pixels[t].size, later.x[ahead]);
      ahead = ahead + 1 < later.pointers ? ahead + 1 : 0;
    }
  }
}

// Tile of filters by tile of filters: a piece of their weights that fits into the first-level cache meets some tiles of
// pixels before the next piece, so that weights from farther away arrive while others are computed with.
void run_chunks(const Run& run, const Part& pixel_tiles, const Part& filter_tiles) {
  RowTile tiles[kTilesTogether];
  alignas(64) float sums[kTilesTogether][kMaxSums];
  alignas(64) float decoded[kMaxDecoded];
  Caller caller(run);
  for (std::int64_t i = filter_tiles.begin; i < filter_tiles.begin + filter_tiles.size; ++i) {
    caller.choose_filters(i);
    Cursor at = cursor_at(run, run.pixels[pixel_tiles.begin].begin);
    for (std::int64_t done = 0; done < pixel_tiles.size; done += kTilesTogether) {
      const std::int64_t together = std::min<std::int64_t>(kTilesTogether, pixel_tiles.size - done),
                         first = pixel_tiles.begin + done;
      for (std::int64_t t = 0; t < together; ++t) fill(run, tiles[t], at, run.pixels[first + t].size);
      if (run.plan.code_bits > 0 && together == 1 && run.pixels[first].size == 1) {
        caller.codes(tiles[0]);
        continue;
      }
      for (std::int64_t piece = 0, end = 0; piece < caller.pieces(); piece = end) {
        end = caller.chunk_end(piece);
        if (run.plan.code_bits > 0) caller.decode(piece, end, decoded);
        for (std::int64_t t = 0; t < together; ++t) {
          caller.chunk(tiles[t], run.pixels[first + t].size, t, sums[t], piece, end);
        }
      }
    }
  }
}

// Planes of a depthwise convolution.
void run_planes(const Run& run, const Part& planes) {
  const Shape& s = run.plan.shape;
  const PlaneKernel kernel = depthwise_kernels(run.plan.isa).depthwise[depthwise_index(s)][s.stride_h - 1];
  const Pitch &in = run.plan.in, &out = run.out_pitch, &residual = run.residual_pitch;
  for (std::int64_t i = planes.begin; i < planes.begin + planes.size; ++i) {
    const std::int64_t n = i / s.channels, c = i % s.channels;
    kernel({&run.call, run.in + n * in.image + c * in.plane - s.padding.top * in.row - s.padding.left,
            run.weights + c * s.kernel_h * s.kernel_w, run.bias + c,
            run.call.residual == nullptr ? nullptr : run.call.residual + n * residual.image + c * residual.plane,
            run.call.out + n * out.image + c * out.plane, in.row, residual.row, out.row, run.height, run.width});
  }
}

// Threads that take the same rows of layer after layer find most of what they read in their own cache, but each of them
// needs all weights. Threads that take filters share the weights, and read what the others have written.
bool values_prevail(const Plan& plan) { return arrival_cycles(plan) < sharing_cycles(value_count(plan)); }

void run_depthwise(const Run& run, std::int64_t wanted, int threads) {
  const std::int64_t planes = run.images * run.plan.shape.channels;
  const Parts cut(planes, std::min(planes, wanted));
  parallel_for(cut.count, threads, [&](std::int64_t task) { run_planes(run, cut[task]); });
}

Call shared_call(const Epilogue& epilogue, float* out, const Pitch& out_pitch) {
  Call call = activation_call(epilogue.activation, epilogue.slope);
  call.out = out;
  call.out_plane = out_pitch.plane;
  call.residual = epilogue.residual;
  call.residual_plane = epilogue.residual_pitch.plane;
  return call;
}

Parts cut_pixels(const Plan& plan, const Kernels& table, std::int64_t images) {
  const Shape& s = plan.shape;
  if (plan.method == Method::filters_in_lanes) {
    return {images * s.out_height() * s.out_width(), pixel_tiles(plan, images)};
  }
  const std::int64_t windows = window_count(plan, table.lanes, images);
  const std::int64_t filters = Parts(s.filters / s.groups, plan.filter_tiles).largest();
  return {windows, ceil_div(windows, max_vectors(table, load_of(plan), filters))};
}

Parts cut_filters(const Plan& plan, const Kernels& table, const Parts& pixels) {
  if (plan.method == Method::pixels_in_lanes) return {plan.shape.filters / plan.shape.groups, plan.filter_tiles};
  const std::int64_t blocks = blocks_per_group(plan);
  return {blocks, ceil_div(blocks, max_blocks(table, pixels.largest()))};
}

}  // namespace

std::int64_t scratch_size(const Plan& plan) { return is_winograd(plan.method) ? winograd_scratch(plan) : 0; }

void run(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out, const Pitch& out_pitch,
         const Epilogue& epilogue, float* scratch, int threads) {
  const PackedHeader header = packed_header(plan);
  ACF_CHECK(std::memcmp(packed, &header, sizeof(header)) == 0,
            "packed weights must come from pack() of this version and of the same plan");
  if (images == 0) return;
  if (is_winograd(plan.method)) {
    return run_winograd(plan, packed, images, in, out, out_pitch, epilogue, scratch, threads);
  }
  const PackedLayout layout = packed_layout(plan);
  const auto* bytes = static_cast<const unsigned char*>(packed);
  const Kernels& table = kernels(plan.isa);
  const Parts pixel_tiles = cut_pixels(plan, table, images), group = cut_filters(plan, table, pixel_tiles);
  const Run run = {plan,
                   table,
                   images,
                   in,
                   out_pitch,
                   epilogue.residual_pitch,
                   plan.shape.out_height(),
                   plan.shape.out_width(),
                   pixel_tiles,
                   group,
                   group.count * plan.shape.groups,
                   reinterpret_cast<const std::int32_t*>(bytes + layout.groups),
                   reinterpret_cast<const std::int32_t*>(bytes + layout.rows),
                   reinterpret_cast<const std::int32_t*>(bytes + layout.offsets),
                   reinterpret_cast<const float*>(bytes + layout.bias),
                   reinterpret_cast<const float*>(bytes + layout.weights),
                   reinterpret_cast<const Code*>(reinterpret_cast<const float*>(bytes + layout.weights) +
                                                 blocks_per_group(plan) * value_floats(plan)),
                   shared_call(epilogue, out, out_pitch)};

  const std::int64_t wanted = task_count(plan, images, threads);
  if (wanted == 1) threads = 1;
  if (plan.window == Window::depthwise && plan.method == Method::pixels_in_lanes) {
    return run_depthwise(run, wanted, threads);
  }

  // Every thread begins with some images or, where these are few, with some filters. Its share is cut into panels of
  // weights that stay in the cache, and its pixels until there are enough tasks.
  const std::int64_t weight_bits = plan.code_bits > 0 ? plan.code_bits : 8 * static_cast<std::int64_t>(sizeof(float)),
                     tile_bytes =
                         plan.columns * plan.shape.filters / plan.shape.groups * weight_bits / 8 / run.filter_tiles;
  const bool by_pixels = images >= threads || run.filter_tiles < threads || values_prevail(plan);
  const std::int64_t pixel_shares = by_pixels ? std::min<std::int64_t>(threads, pixel_tiles.count) : 1,
                     filter_shares = by_pixels ? 1 : threads, shares = pixel_shares * filter_shares;
  const std::int64_t panel_tiles = std::max<std::int64_t>(1, kPanelBytes / std::max<std::int64_t>(1, tile_bytes)),
                     panels = ceil_div(ceil_div(run.filter_tiles, filter_shares), panel_tiles),
                     stretches = std::min(pixel_tiles.count / pixel_shares, ceil_div(wanted, shares * panels));
  const Parts pixel_cut(pixel_tiles.count, pixel_shares * stretches),
      filter_cut(run.filter_tiles, filter_shares * panels);
  const bool chunks = plan.method == Method::filters_in_lanes && run.filter_tiles * tile_bytes > kPanelBytes;
  parallel_for(pixel_cut.count * filter_cut.count, threads, [&](std::int64_t task) {
    const std::int64_t share = task / (panels * stretches), at = task % (panels * stretches);
    const Part pixels = pixel_cut[share / filter_shares * stretches + at % stretches],
               filters = filter_cut[share % filter_shares * panels + at / stretches];
    if (plan.code_bits > 0 || (chunks && pixels.size > 1)) {
      run_chunks(run, pixels, filters);
    } else {
      run_tiles(run, pixels, filters);
    }
  });
}

double peak_flops(Isa isa) {
  const Kernels& table = kernels(isa);
  constexpr std::int64_t kRounds = 20'000;
  const float two[2] = {0.5f, 1.0f};
  volatile float kept = 0;
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    kept = kept + table.peak(two, kRounds);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, 2.0 * kRounds * kPeakChains * table.lanes / seconds.count());
  }
  return best;
}

Call activation_call(Activation activation, float slope) {
  Call call = {};
  call.activation = activation;
  call.slope = slope;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  call.low = activation == Activation::none ? -kInfinity : 0;
  call.high = activation == Activation::relu6 ? 6 : kInfinity;
  call.clamps = activation == Activation::none || activation == Activation::relu || activation == Activation::relu6;
  return call;
}

// Where units of AVX-512 have half the width, two instructions of AVX2 take no longer, and rows seldom end with a
// register.
const Kernels& depthwise_kernels(Isa isa) {
  return kernels(isa == Isa::avx512 && registers_per_cycle(isa) == 1 ? Isa::avx2 : isa);
}

const Kernels& kernels(Isa isa) {
  const auto& supported = supported_isas();
  ACF_CHECK(std::find(supported.begin(), supported.end(), isa) != supported.end(), "this machine cannot run the ISA '",
            isa_name(isa), "'");
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512: return avx512_kernels;
    case Isa::avx2: return avx2_kernels;
#elif defined(__aarch64__)
    case Isa::neon: return neon_kernels;
#endif
    default: return generic_kernels;
  }
}

}  // namespace acf::conv
