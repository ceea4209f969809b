// Cuts a convolution into tiles and hands them to the kernels of the plan's ISA.
#include <algorithm>
#include <cstring>
#include <limits>

#include "conv/packed.h"
#include "core/check.h"
#include "core/parallel.h"

namespace acf::conv {
namespace {

// Panels of weights that are used again and again stay in the second-level cache.
constexpr std::int64_t kPanelBytes = 512 << 10;
// Fewer multiply-adds than this are not worth another thread.
constexpr std::int64_t kTaskMacs = 500'000;
constexpr std::int64_t kTasksPerThread = 4;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// What all tiles of a run share.
struct Run {
  const Plan& plan;
  const Kernels& table;
  std::int64_t images;
  const float* in;
  Pitch out_pitch, residual_pitch;
  std::int64_t height, width;        // of the output
  std::int64_t pixels, pixel_tiles;  // pixels or vectors of them, and into how many tiles they are cut
  std::int64_t filter_tiles;         // of all groups
  std::int64_t group_tiles;          // of one
  const std::int32_t* rows;
  const std::int32_t* offsets;
  const float* bias;
  const float* weights;
  Call call;  // with what is the same everywhere
};

// The output rows of a tile: kernel rows that meet nothing but padding in all of them are left out.
struct RowRange {
  std::int64_t first = std::numeric_limits<std::int64_t>::max(), last = 0;
  void add(std::int64_t y) {
    first = std::min(first, y);
    last = std::max(last, y);
  }
};

void add_segment(const Run& run, Tile& tile, int& count, RowRange& range, std::int64_t n, std::int64_t y,
                 std::int64_t x, int from, int to) {
  const Pitch &out = run.out_pitch, &residual = run.residual_pitch;
  tile.segments[count++] = {n * out.image + y * out.row + x - from, n * residual.image + y * residual.row + x - from,
                            from, to};
  range.add(y);
}

const float* input_at(const Run& run, std::int64_t n, std::int64_t y, std::int64_t x) {
  const Shape& s = run.plan.shape;
  return run.in + n * run.plan.in.image + y * s.stride_h * run.plan.in.row + x * s.stride_w;
}

// One vector of a flat window: output rows run on with the pitch of the input.
void add_flat(const Run& run, Tile& tile, int v, int& count, RowRange& range, std::int64_t n, std::int64_t begin) {
  const std::int64_t row = run.plan.in.row, lanes = run.table.lanes;
  tile.x[v] = run.in + n * run.plan.in.image + begin;
  std::int64_t y = begin / row, x = begin % row;
  for (std::int64_t lane = 0; lane < lanes && y < run.height; lane += row - x, x = 0, ++y) {
    const std::int64_t size = std::min(run.width - x, lanes - lane);
    if (size > 0) add_segment(run, tile, count, range, n, y, x, static_cast<int>(lane), static_cast<int>(lane + size));
  }
}

// A stretch of at most `size` pixels of a row, from lane `from` on.
const float* add_stretch(const Run& run, Tile& tile, int& count, RowRange& range, std::int64_t stretch, int from,
                         std::int64_t size) {
  const std::int64_t per_row = ceil_div(run.width, size), y = stretch / per_row % run.height,
                     n = stretch / per_row / run.height, x = stretch % per_row * size;
  add_segment(run, tile, count, range, n, y, x, from, from + static_cast<int>(std::min(size, run.width - x)));
  return input_at(run, n, y, x);
}

void add_window(const Run& run, Tile& tile, int v, int& count, RowRange& range, std::int64_t index) {
  const std::int64_t lanes = run.table.lanes;
  switch (run.plan.window) {
    case Window::flat: {
      const std::int64_t per_image = windows_per_image(run.plan, lanes);
      return add_flat(run, tile, v, count, range, index / per_image, index % per_image * lanes);
    }
    case Window::rows: tile.x[v] = add_stretch(run, tile, count, range, index, 0, lanes); return;
    case Window::halves: {
      tile.x[2 * v] = add_stretch(run, tile, count, range, 2 * index, 0, lanes / 2);
      const bool last = 2 * index + 1 == run.images * windows_per_image(run.plan, lanes);
      tile.x[2 * v + 1] =
          last ? tile.x[2 * v]
               : add_stretch(run, tile, count, range, 2 * index + 1, static_cast<int>(lanes / 2), lanes / 2);
      return;
    }
  }
}

// Vectors of the results of filters_in_lanes: neighbours of a row make one segment.
void add_pixels(const Run& run, Tile& tile, RowRange& range, const Part& part) {
  int count = 0;
  const int lanes = run.table.lanes;
  for (std::int64_t i = 0; i < part.size; ++i) {
    const std::int64_t pixel = part.begin + i, x = pixel % run.width, y = pixel / run.width % run.height,
                       n = pixel / run.width / run.height;
    tile.x[i] = input_at(run, n, y, x);
    const int lane = static_cast<int>(i % lanes);
    if (lane == 0) tile.first[i / lanes] = count;
    if (lane == 0 || x == 0) {
      add_segment(run, tile, count, range, n, y, x, lane, lane + 1);
    } else {
      ++tile.segments[count - 1].to;
    }
  }
  tile.first[ceil_div(part.size, lanes)] = count;
}

RowRange fill(const Run& run, Tile& tile, const Part& part) {
  RowRange range;
  if (run.plan.method == Method::filters_in_lanes) {
    add_pixels(run, tile, range, part);
    return range;
  }
  int count = 0;
  for (int v = 0; v < part.size; ++v) {
    tile.first[v] = count;
    add_window(run, tile, v, count, range, part.begin + v);
  }
  tile.first[part.size] = count;
  return range;
}

// The kernel rows that some output row of the range needs: [begin, end).
void kernel_rows(const Shape& s, const RowRange& range, std::int64_t& begin, std::int64_t& end) {
  begin = 0;
  end = s.kernel_h;
  while (begin < end && range.last * s.stride_h - s.padding.top + begin * s.dilation_h < 0) ++begin;
  while (begin < end && range.first * s.stride_h - s.padding.top + (end - 1) * s.dilation_h >= s.height) --end;
}

void run_tiles(const Run& run, const Part& pixel_tiles, const Part& filter_tiles) {
  const Shape& s = run.plan.shape;
  const bool blocks = run.plan.method == Method::filters_in_lanes;
  const std::int64_t group_filters = s.filters / s.groups;
  const std::int64_t group_parts = blocks ? blocks_per_group(run.plan) : group_filters;
  const std::int64_t padded_filters = blocks ? group_parts * kBlock : group_filters;
  const auto load = static_cast<int>(load_of(run.plan));
  Tile tile;
  Call call = run.call;
  call.tile = &tile;
  for (std::int64_t t = pixel_tiles.begin; t < pixel_tiles.begin + pixel_tiles.size; ++t) {
    const Part pixels = part_of(run.pixels, run.pixel_tiles, t);
    const RowRange range = fill(run, tile, pixels);
    std::int64_t kh_begin = 0, kh_end = 0;
    kernel_rows(s, range, kh_begin, kh_end);
    for (std::int64_t i = filter_tiles.begin; i < filter_tiles.begin + filter_tiles.size; ++i) {
      const std::int64_t group = i / run.group_tiles;
      const Part part = part_of(group_parts, run.group_tiles, i % run.group_tiles);  // filters or blocks
      const std::int32_t* rows = run.rows + group * (s.kernel_h + 1);
      const std::int64_t first = rows[0], columns = rows[s.kernel_h] - first, skipped = rows[kh_begin] - first;
      const std::int64_t unit = blocks ? kBlock : 1, begin = part.begin * unit;
      call.offsets = run.offsets + first + skipped;
      call.columns = rows[kh_end] - rows[kh_begin];
      call.weights = run.weights + first * padded_filters + begin * columns + skipped * (blocks ? kBlock : part.size);
      call.block = columns * kBlock;
      call.bias = run.bias + group * padded_filters + begin;
      call.filters = static_cast<int>(std::min(part.size * unit, group_filters - begin));
      const std::int64_t filter = group * group_filters + begin;
      call.out = run.call.out + filter * call.out_plane;
      if (call.residual != nullptr) call.residual = run.call.residual + filter * call.residual_plane;
      (blocks ? run.table.filters_in_lanes[pixels.size - 1][part.size - 1]
              : run.table.pixels_in_lanes[load][part.size - 1][pixels.size - 1])(call);
    }
  }
}

Call shared_call(const Epilogue& epilogue, float* out, const Pitch& out_pitch) {
  Call call = {};
  call.out = out;
  call.out_plane = out_pitch.plane;
  call.residual = epilogue.residual;
  call.residual_plane = epilogue.residual_pitch.plane;
  call.activation = epilogue.activation;
  call.slope = epilogue.slope;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  call.low = epilogue.activation == Activation::none ? -kInfinity : 0;
  call.high = epilogue.activation == Activation::relu6 ? 6 : kInfinity;
  call.clamps = epilogue.activation == Activation::none || epilogue.activation == Activation::relu ||
                epilogue.activation == Activation::relu6;
  return call;
}

// Into how many tiles pixels and filters are cut.
void cut(Run& run) {
  const Plan& plan = run.plan;
  if (plan.method == Method::filters_in_lanes) {
    run.pixels = run.images * run.height * run.width;
    run.pixel_tiles = pixel_tiles(plan, run.table, run.images);
    const std::int64_t most = max_blocks(run.table, ceil_div(run.pixels, run.pixel_tiles));
    run.group_tiles = ceil_div(blocks_per_group(plan), most);
  } else {
    run.pixels = window_count(plan, run.table.lanes, run.images);
    run.group_tiles = plan.filter_tiles;
    const std::int64_t filters = ceil_div(plan.shape.filters / plan.shape.groups, plan.filter_tiles);
    run.pixel_tiles = ceil_div(run.pixels, max_vectors(run.table, load_of(plan), filters));
  }
  run.filter_tiles = run.group_tiles * plan.shape.groups;
}

}  // namespace

void run(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out, const Pitch& out_pitch,
         const Epilogue& epilogue, int threads) {
  const PackedHeader header = packed_header(plan);
  ACF_CHECK(std::memcmp(packed, &header, sizeof(header)) == 0,
            "packed weights must come from pack() of this version and of the same plan");
  if (images == 0) return;
  const PackedLayout layout = packed_layout(plan);
  const auto* bytes = static_cast<const unsigned char*>(packed);
  Run run = {plan,
             kernels(plan.isa),
             images,
             in,
             out_pitch,
             epilogue.residual_pitch,
             plan.shape.out_height(),
             plan.shape.out_width(),
             0,
             0,
             0,
             0,
             reinterpret_cast<const std::int32_t*>(bytes + layout.rows),
             reinterpret_cast<const std::int32_t*>(bytes + layout.offsets),
             reinterpret_cast<const float*>(bytes + layout.bias),
             reinterpret_cast<const float*>(bytes + layout.weights),
             shared_call(epilogue, out, out_pitch)};
  cut(run);

  const std::int64_t macs = images * run.height * run.width * plan.shape.filters / plan.shape.groups *
                            std::max<std::int64_t>(plan.columns, 1);
  const std::int64_t tile_bytes = plan.columns * plan.shape.filters / plan.shape.groups *
                                  static_cast<std::int64_t>(sizeof(float)) / run.filter_tiles;
  const std::int64_t wanted =
      threads == 1 ? 1 : std::min(kTasksPerThread * threads, std::max<std::int64_t>(1, macs / kTaskMacs));
  // Filters are cut so that their panels stay in the cache, then pixels, then filters again, until there are enough
  // tasks.
  std::int64_t filter_parts =
      ceil_div(run.filter_tiles, std::max<std::int64_t>(1, kPanelBytes / std::max<std::int64_t>(1, tile_bytes)));
  const std::int64_t pixel_parts = std::min(run.pixel_tiles, ceil_div(wanted, filter_parts));
  filter_parts = std::min(run.filter_tiles, std::max(filter_parts, ceil_div(wanted, pixel_parts)));
  const int used = wanted == 1 ? 1 : threads;
  parallel_for(filter_parts * pixel_parts, used, [&](std::int64_t task) {
    run_tiles(run, part_of(run.pixel_tiles, pixel_parts, task % pixel_parts),
              part_of(run.filter_tiles, filter_parts, task / pixel_parts));
  });
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
