// Plans, packs weights, and hands tiles to the kernels of the plan's unit.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "conv/packed.h"
#include "core/check.h"
#include "core/parallel.h"
#include "narrow/kernels.h"

namespace acf::narrow {
namespace {

using conv::ceil_div;
using conv::Parts;

// Of the second-level cache: weights up to this size stay there from block to block. Values of a block take a part of
// it: of more pixels side by side, more is read and written in order; and weights that do not stay are read once a
// block, so it is larger beside those.
constexpr std::int64_t kCachedBytes = 512 << 10;
constexpr std::int64_t kBlockBytes = 256 << 10, kLargeBlockBytes = 1 << 20;
// Of the first-level cache: values of a few tiles of pixels that stay there while all filters pass by.
constexpr std::int64_t kChunkSteps = 8;
constexpr std::int64_t kMaxTiles = 32;  // of pixels at a time
constexpr std::int64_t kMaxColumns = (std::int64_t{1} << 31) / (255 * 128);

constexpr std::uint32_t kVersion = 1;

struct Header {
  std::uint32_t magic = 0x4e464341;  // "ACFN"
  std::uint32_t version = kVersion;
  std::int64_t numbers[18] = {};
};

// Packed weights, one after the other, each at a multiple of kAlignment:
//   header
//   counts       int64 (groups,): of columns
//   offsets      int32 (groups, columns of all steps): from a pixel to what a column reads, in floats
//   bias         float (groups, filters of a group in whole tiles)
//   multipliers  float, likewise, and corrections int32: of int8
//   weights      (groups, tiles of filters, steps), as Order says
struct Packed {
  std::size_t counts, offsets, bias, multipliers, corrections, weights, size;
};

const NumberKernels& table(const Plan& plan) {
  const Kernels& all = kernels(plan.unit);
  return plan.number == Number::bfloat16 ? all.bfloat16 : all.int8;
}

std::int64_t step_columns(Number number) { return kTile * columns_per_row(number); }
std::int64_t group_filters(const Plan& plan) { return plan.shape.filters / plan.shape.groups; }
std::int64_t filter_tiles(const Plan& plan) { return ceil_div(group_filters(plan), kTile); }
std::int64_t offsets_per_group(const Plan& plan) { return plan.steps * step_columns(plan.number); }
// Of a tile of filters.
std::int64_t weight_bytes(const Plan& plan) {
  return plan.steps * kStepBytes * (kernels(plan.unit).order == Order::halves ? 2 : 1);
}
std::int64_t value_bytes(const Plan& plan) { return plan.steps * kStepBytes; }  // of a tile of pixels
std::int64_t pixel_tiles(const Plan& plan, std::int64_t images) {
  return ceil_div(images * plan.shape.out_height() * plan.shape.out_width(), kTile);
}

// Whether the weights of a group come from far away, every time.
bool streams(const Plan& plan) { return filter_tiles(plan) * weight_bytes(plan) > kCachedBytes; }

// Tiles of pixels that are gathered before they meet the filters.
std::int64_t block_tiles(const Plan& plan) {
  const std::int64_t bytes = streams(plan) ? kLargeBlockBytes : kBlockBytes;
  return std::min(std::clamp<std::int64_t>(bytes / value_bytes(plan), 2, kMaxTiles),
                  std::max<std::int64_t>(1, pixel_tiles(plan, plan.images)));
}

Header header_of(const Plan& plan) {
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
                                  static_cast<std::int64_t>(plan.unit)};
  std::copy(std::begin(numbers), std::end(numbers), header.numbers);
  return header;
}

Packed packed_layout(const Plan& plan) {
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
  at.offsets = place(groups * static_cast<std::size_t>(offsets_per_group(plan)) * sizeof(std::int32_t));
  at.bias = place(filters * sizeof(float));
  at.multipliers = place(integers ? filters * sizeof(float) : 0);
  at.corrections = place(integers ? filters * sizeof(std::int32_t) : 0);
  at.weights = place(filters / kTile * static_cast<std::size_t>(weight_bytes(plan)));
  at.size = end;
  return at;
}

std::uint16_t bfloat16_bits(float x) {
  const float rounded = reference::rounded_to_bfloat16(x);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return static_cast<std::uint16_t>((bits >> 16) | (std::isnan(x) ? 0x40u : 0u));
}

// Where a weight goes in a tile of filters.
void put(const Plan& plan, unsigned char* tile, std::int64_t filter, std::int64_t column, float value) {
  const std::int64_t n = columns_per_row(plan.number), row = column / n, place = column % n, bytes = 4 / n;
  const Order order = kernels(plan.unit).order;
  if (order == Order::halves) {
    const auto wide = static_cast<std::int16_t>(value);
    std::memcpy(tile + (row * kTile + filter) * 8 + (place % 2) * 4 + (place / 2) * 2, &wide, sizeof(wide));
    return;
  }
  unsigned char* to = order == Order::by_row
                          ? tile + (row * kTile + filter) * 4 + place * bytes
                          : tile + row / kTile * kStepBytes + filter * kRowBytes + row % kTile * 4 + place * bytes;
  if (plan.number == Number::bfloat16) {
    const std::uint16_t bits = bfloat16_bits(value);
    std::memcpy(to, &bits, sizeof(bits));
  } else {
    const auto integer = static_cast<signed char>(value);
    std::memcpy(to, &integer, sizeof(integer));
  }
}

// scales: null for bfloat16.
void pack_all(const Plan& plan, std::int64_t count, const std::int64_t* columns, const float* weights,
              const float* scales, const Quantization& input, const float* bias, void* packed) {
  const conv::Shape& s = plan.shape;
  const Packed at = packed_layout(plan);
  auto* bytes = static_cast<unsigned char*>(packed);
  std::memset(bytes, 0, at.size);
  const Header header = header_of(plan);
  std::memcpy(bytes, &header, sizeof(header));
  std::memcpy(bytes + sizeof(header), &input, sizeof(input));
  auto* counts = reinterpret_cast<std::int64_t*>(bytes + at.counts);
  auto* offsets = reinterpret_cast<std::int32_t*>(bytes + at.offsets);
  auto* biases = reinterpret_cast<float*>(bytes + at.bias);
  auto* multipliers = reinterpret_cast<float*>(bytes + at.multipliers);
  auto* corrections = reinterpret_cast<std::int32_t*>(bytes + at.corrections);
  unsigned char* tile = bytes + at.weights;
  const std::int64_t per_group = group_filters(plan), padded = filter_tiles(plan) * kTile;
  const std::int32_t zero = input.zero - kernels(plan.unit).shift;
  for (std::int64_t g = 0, k = 0; g < s.groups; ++g, tile += filter_tiles(plan) * weight_bytes(plan)) {
    const std::int64_t first = k;
    for (; k < count && columns[k] < (g + 1) * (s.columns() / s.groups); ++k) {
      const std::int64_t kw = columns[k] % s.kernel_w, kh = columns[k] / s.kernel_w % s.kernel_h,
                         c = columns[k] / s.kernel_w / s.kernel_h;
      offsets[g * offsets_per_group(plan) + k - first] = static_cast<std::int32_t>(
          c * plan.in.plane + (kh * s.dilation_h - s.padding.top) * plan.in.row + kw * s.dilation_w - s.padding.left);
    }
    counts[g] = k - first;
    for (std::int64_t f = 0; f < per_group; ++f, weights += k - first) {
      const std::int64_t filter = g * per_group + f;
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < k - first; ++i) {
        put(plan, tile + f / kTile * weight_bytes(plan), f % kTile, i, weights[i]);
        if (scales != nullptr) sum += static_cast<std::int32_t>(weights[i]);
      }
      biases[g * padded + f] = bias == nullptr ? 0 : bias[filter];
      if (scales == nullptr) continue;
      multipliers[g * padded + f] = input.scale * scales[filter];
      corrections[g * padded + f] = zero * sum;
    }
  }
}

// ---- one run --------------------------------------------------------------------------------------------------------

// Where the pixels of a tile go.
struct Place {
  int count;
  conv::Segment segments[kTile];
};

class Runner {
 public:
  Runner(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out,
         const conv::Pitch& out_pitch, const conv::Epilogue& epilogue)
      : plan_(plan),
        all_(kernels(plan.unit)),
        table_(table(plan)),
        at_(packed_layout(plan)),
        bytes_(static_cast<const unsigned char*>(packed)),
        in_(in),
        out_pitch_(out_pitch),
        residual_pitch_(epilogue.residual_pitch),
        width_(plan.shape.out_width()),
        height_(plan.shape.out_height()),
        pixels_(images * height_ * width_),
        tiles_(ceil_div(pixels_, kTile)),
        call_(conv::activation_call(epilogue.activation, epilogue.slope)) {
    std::memcpy(&input_, bytes_ + sizeof(Header), sizeof(input_));
    call_.out = out;
    call_.out_plane = out_pitch.plane;
    call_.residual = epilogue.residual;
    call_.residual_plane = epilogue.residual_pitch.plane;
  }

  void run(float* scratch, int threads) const {
    const std::int64_t wanted = threads == 1 ? 1 : task_count(threads);
    if (wanted == 1) threads = 1;
    // Threads that take pixels all read all weights, threads that take filters all gather all pixels.
    const std::int64_t filters = filter_tiles(plan_);
    const bool by_pixels = tiles_ >= 2 * filters || filters < 2 * threads;
    const Parts pixel_parts(tiles_, by_pixels ? std::min(tiles_, wanted) : 1),
        filter_parts(filters, by_pixels ? 1 : std::min(filters, wanted));
    const std::int64_t groups = plan_.shape.groups;
    Slots slots(static_cast<int>(std::min<std::int64_t>(threads, slot_count(plan_))));
    parallel_for(filter_parts.count * pixel_parts.count * groups, slots.count(), [&](std::int64_t task) {
      slots.with([&](int slot) {
        const std::int64_t group = task % groups, rest = task / groups;
        run_part(group, pixel_parts[rest % pixel_parts.count], filter_parts[rest / pixel_parts.count],
                 reinterpret_cast<unsigned char*>(scratch) + slot * slot_bytes(plan_));
      });
    });
  }

  static std::int64_t slot_count(const Plan& plan) {
    const std::int64_t tasks = pixel_tiles(plan, plan.images) * filter_tiles(plan) * plan.shape.groups;
    return std::min<std::int64_t>(Slots::most(), tasks);
  }
  static std::int64_t slot_bytes(const Plan& plan) {
    return block_tiles(plan) * value_bytes(plan) + filter_tiles(plan) * kTogether * kStepBytes;
  }

 private:
  std::int64_t task_count(int threads) const {
    const double cycles =
        plan_.cycles * static_cast<double>(pixels_) / static_cast<double>(plan_.images * height_ * width_);
    constexpr double kTaskCycles = 8'000;
    constexpr std::int64_t kTasksPerThread = 4;
    const auto most = static_cast<double>(kTasksPerThread * threads);
    return static_cast<std::int64_t>(std::min(most, std::max(1.0, cycles / kTaskCycles)));
  }

  template <class T>
  const T* part(std::size_t at) const {
    return reinterpret_cast<const T*>(bytes_ + at);
  }

  // Some tiles of pixels and of filters, block by block.
  void run_part(std::int64_t group, const conv::Part& tiles, const conv::Part& filters, unsigned char* values) const {
    const std::int64_t most = block_tiles(plan_), blocks = ceil_div(tiles.size, most);
    const Parts cut(tiles.size, blocks);
    if (all_.begin != nullptr) all_.begin();
    for (std::int64_t b = 0; b < blocks; ++b) {
      run_block(group, {tiles.begin + cut[b].begin, cut[b].size}, filters, values);
    }
    if (all_.end != nullptr) all_.end();
  }

  void run_block(std::int64_t group, const conv::Part& tiles, const conv::Part& filters, unsigned char* values) const {
    const std::int64_t columns = part<std::int64_t>(at_.counts)[group],
                       rows = ceil_div(columns, columns_per_row(plan_.number)), pitch = value_bytes(plan_);
    Place places[kMaxTiles];
    GatherCall gather = {};
    gather.offsets = part<std::int32_t>(at_.offsets) + group * offsets_per_group(plan_);
    gather.columns = columns;
    gather.inverse = 1.0f / input_.scale;
    gather.zero = input_.zero;
    for (std::int64_t t = 0; t < tiles.size; ++t) {
      Reads reads;
      gather.in = locate(tiles.begin + t, reads, places[t]);
      gather.reads = &reads;
      gather.ahead = reads.stretches == 1 ? static_cast<std::int32_t>(tiles.size * kTile * reads.step) : 0;
      gather.to = values + t * pitch;
      table_.gather(gather);
      // Whole steps are read: what no column fills meets weights of zero, and must be finite.
      std::memset(gather.to + rows * kRowBytes, 0, static_cast<std::size_t>(pitch - rows * kRowBytes));
    }

    for (std::int64_t t = 0; t < tiles.size;) {
      const std::int64_t count = chunked() ? std::min<std::int64_t>(kTogether, tiles.size - t) : tiles.size;
      multiply(group, filters, count, places + t, rows, values + t * pitch, values + block_tiles(plan_) * pitch);
      t += count;
    }
  }

  // Whether the columns are cut into chunks, for which sums are put aside. Weights that stream are better read in
  // order.
  bool chunked() const { return all_.order == Order::by_step && plan_.steps > kChunkSteps && !streams(plan_); }

  // Some tiles of pixels with some of filters.
  void multiply(std::int64_t group, const conv::Part& filters, std::int64_t tiles, const Place* places,
                std::int64_t rows, const unsigned char* values, unsigned char* sums) const {
    const std::int64_t all = filter_tiles(plan_), weight_pitch = weight_bytes(plan_), pitch = value_bytes(plan_),
                       end = filters.begin + filters.size;
    const bool chunks = chunked(), far = streams(plan_);
    const std::int64_t most = chunks ? kChunkSteps * kTile : std::max<std::int64_t>(rows, 1);
    // Few tiles of pixels meet those of filters all at once, so that weights are read once; else two meet two.
    const bool few = chunks || (far && tiles <= kTogether);
    const std::int64_t pixels = few ? tiles : std::min<std::int64_t>(2, tiles), some = kTogether / pixels;
    for (std::int64_t row = 0; row == 0 || row < rows; row += most) {
      for (std::int64_t f = filters.begin; f < end; f += some) {
        for (std::int64_t t = 0; t < tiles; t += pixels) {
          ProductCall product = {};
          product.weights = weights_of(group, f) + row / kTile * kStepBytes;
          product.weights_pitch = weight_pitch;
          product.pixels = values + t * pitch + row * kRowBytes;
          product.pixels_pitch = pitch;
          product.rows = std::min(most, rows - row);
          product.filter_tiles = static_cast<int>(std::min(some, end - f));
          product.pixel_tiles = static_cast<int>(std::min(pixels, tiles - t));
          product.resumes = row > 0;
          product.streams = far && t == 0;
          product.sums = sums + (chunks ? (f - filters.begin) * tiles * kStepBytes : 0);
          if (row + most >= rows) {
            const bool last = t + pixels >= tiles;
            const std::int64_t next = last ? 0 : t + pixels, next_filters = last ? f + some : f;
            for (std::int64_t p = next; p < std::min(next + pixels, tiles); ++p) {
              prefetch_results(group, next_filters, std::min(next_filters + some, end), places[p]);
            }
          }
          table_.product(product);
          if (row + most < rows) continue;
          auto* tile = static_cast<unsigned char*>(product.sums);
          for (int i = 0; i < product.filter_tiles; ++i) {
            for (int p = 0; p < product.pixel_tiles; ++p, tile += kStepBytes) {
              finish(group, f + i, all * kTile, places[t + p], tile);
            }
          }
        }
      }
    }
  }

  // What the results of some tiles of filters are added to and where they go, one product ahead.
  void prefetch_results(std::int64_t group, std::int64_t begin, std::int64_t end, const Place& place) const {
    const std::int64_t per_group = group_filters(plan_);
    const conv::Segment& s = place.segments[0];
    for (std::int64_t f = begin * kTile; f < std::min(per_group, end * kTile); ++f) {
      const std::int64_t filter = group * per_group + f;
      if (call_.residual != nullptr) {
        __builtin_prefetch(call_.residual + filter * call_.residual_plane + s.residual + s.from);
      }
      __builtin_prefetch(call_.out + filter * call_.out_plane + s.out + s.from, 1);
    }
  }

  const unsigned char* weights_of(std::int64_t group, std::int64_t filter_tile) const {
    return bytes_ + at_.weights + (group * filter_tiles(plan_) + filter_tile) * weight_bytes(plan_);
  }

  void finish(std::int64_t group, std::int64_t filter_tile, std::int64_t padded, const Place& place,
              unsigned char* sums) const {
    const std::int64_t within = filter_tile * kTile, per_group = group_filters(plan_),
                       filter = group * per_group + within, numbered = group * padded + within;
    conv::Tile tile;
    spread(place, tile);
    conv::Call call = call_;
    call.tile = &tile;
    call.out += filter * call.out_plane;
    if (call.residual != nullptr) call.residual += filter * call.residual_plane;
    const bool integers = plan_.number == Number::int8;
    table_.finish({&call, sums, static_cast<int>(std::min<std::int64_t>(kTile, per_group - within)),
                   integers ? part<std::int32_t>(at_.corrections) + numbered : nullptr,
                   integers ? part<float>(at_.multipliers) + numbered : nullptr, part<float>(at_.bias) + numbered});
  }

  // The segments, cut into those of registers.
  void spread(const Place& place, conv::Tile& tile) const {
    const int lanes = all_.lanes;
    int count = 0, segment = 0;
    for (int v = 0; v * lanes < kTile; ++v) {
      tile.first[v] = count;
      const int begin = v * lanes, end = begin + lanes;
      while (segment < place.count) {
        const conv::Segment& s = place.segments[segment];
        if (s.from >= end) break;
        // Lane i of the register is lane begin + i of the tile.
        tile.segments[count++] = {s.out + begin, s.residual + begin, std::max(s.from, begin) - begin,
                                  std::min(s.to, end) - begin};
        if (s.to > end) break;
        ++segment;
      }
    }
    tile.first[kTile / lanes] = count;
  }

  // The pixels of a tile; returns the first one's place in the input.
  const float* locate(std::int64_t tile, Reads& reads, Place& place) const {
    const conv::Shape& s = plan_.shape;
    const std::int64_t first = tile * kTile, last = std::min(first + kTile, pixels_);
    std::int64_t n = first / (height_ * width_), y = first / width_ % height_, x = first % width_;
    const auto read_at = [&] { return n * plan_.in.image + y * s.stride_h * plan_.in.row + x * s.stride_w; };
    const std::int64_t base = read_at();
    reads.step = s.stride_w;
    reads.count = static_cast<int>(last - first);
    reads.stretches = place.count = 0;
    for (std::int64_t pixel = first; pixel < last;) {
      const std::int64_t size = std::min(width_ - x, last - pixel), at = read_at() - base;
      const auto from = static_cast<int>(pixel - first), to = static_cast<int>(from + size);
      for (int i = from; i < to; ++i) reads.lanes[i] = static_cast<std::int32_t>(at + (i - from) * s.stride_w);
      const std::int64_t lane_zero = at - from * s.stride_w;
      if (reads.stretches > 0 && reads.stretch[reads.stretches - 1].at == lane_zero) {
        reads.stretch[reads.stretches - 1].to = to;
      } else {
        reads.stretch[reads.stretches++] = {lane_zero, from, to};
      }
      place.segments[place.count++] = {n * out_pitch_.image + y * out_pitch_.row + x - from,
                                       n * residual_pitch_.image + y * residual_pitch_.row + x - from, from, to};
      pixel += size;
      x += size;
      if (x == width_) {
        x = 0;
        if (++y == height_) {
          y = 0;
          ++n;
        }
      }
    }
    for (int i = reads.count; i < kTile; ++i) reads.lanes[i] = 0;
    return in_ + base;
  }

  const Plan& plan_;
  const Kernels& all_;
  const NumberKernels& table_;
  Packed at_;
  const unsigned char* bytes_;
  Quantization input_;
  const float* in_;
  conv::Pitch out_pitch_, residual_pitch_;
  std::int64_t width_, height_, pixels_, tiles_;
  conv::Call call_;
};

// Measured on one machine, roughly: for choosing between bfloat16 and float32, and the number of tasks.
double estimated_cycles(const Plan& plan) {
  const conv::Shape& s = plan.shape;
  const auto tiles = static_cast<double>(pixel_tiles(plan, plan.images)), steps = static_cast<double>(plan.steps),
             filters = static_cast<double>(filter_tiles(plan)), groups = static_cast<double>(s.groups);
  const bool apart = s.stride_w > 2 || s.out_width() < 4;
  const double gather = kTile * (plan.number == Number::bfloat16 ? 4.0 : 8.0) * (apart ? 4 : s.stride_w > 1 ? 2 : 1.2);
  const double product = plan.unit == Unit::amx       ? 18
                         : plan.unit == Unit::avx2    ? 64.0 * kTile
                         : plan.unit == Unit::generic ? 500.0 * kTile
                                                      : 16.0 * kTile;
  const double finish = 5.0 * static_cast<double>(std::min<std::int64_t>(kTile, group_filters(plan)));
  constexpr double kBytesPerCycle = 5;  // of weights that come from memory
  return groups * (tiles * (150 + steps * gather + filters * (40 + steps * product + finish)) +
                   filters * static_cast<double>(weight_bytes(plan)) / kBytesPerCycle);
}

}  // namespace

Plan plan(const conv::Shape& shape, const conv::Pitch& in, std::int64_t images, std::int64_t count,
          const std::int64_t* columns, Number number, Unit unit) {
  conv::plan(shape, in, images, count, Isa::generic, conv::Method::filters_in_lanes);  // for its checks
  Plan made;
  made.shape = shape;
  made.in = in;
  made.number = number;
  made.unit = unit;
  made.images = images;
  ACF_CHECK(table(made).product != nullptr, "the unit '", unit_name(unit), "' does not multiply such numbers");
  const std::int64_t group_columns = shape.columns() / shape.groups;
  std::int64_t most = 1;
  for (std::int64_t g = 0; g < shape.groups; ++g) {
    const auto* end = columns + count;
    most = std::max<std::int64_t>(most, std::lower_bound(columns, end, (g + 1) * group_columns) -
                                            std::lower_bound(columns, end, g * group_columns));
  }
  ACF_CHECK(number == Number::bfloat16 || most <= kMaxColumns, "8-bit products of at most ", kMaxColumns,
            " columns can be added up, got ", most);
  made.steps = ceil_div(most, step_columns(number));
  made.cycles = estimated_cycles(made);
  return made;
}

std::size_t packed_size(const Plan& plan) { return packed_layout(plan).size; }

void pack(const Plan& plan, std::int64_t count, const std::int64_t* columns, const float* weights, const float* bias,
          void* packed) {
  ACF_CHECK(plan.number == Number::bfloat16, "8-bit weights need scales");
  pack_all(plan, count, columns, weights, nullptr, {}, bias, packed);
}

void pack(const Plan& plan, std::int64_t count, const std::int64_t* columns, const float* weights, const float* scales,
          const Quantization& input, const float* bias, void* packed) {
  ACF_CHECK(plan.number == Number::int8, "bfloat16 weights have no scales");
  ACF_CHECK(std::isnormal(input.scale) && input.scale > 0, "the scale of the input must be positive, got ",
            input.scale);
  ACF_CHECK(input.zero >= 0 && input.zero <= 255, "the zero of the input must be from 0 to 255, got ", input.zero);
  pack_all(plan, count, columns, weights, scales, input, bias, packed);
}

std::int64_t scratch_size(const Plan& plan) {
  return Runner::slot_count(plan) * Runner::slot_bytes(plan) / static_cast<std::int64_t>(sizeof(float));
}

void run(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out,
         const conv::Pitch& out_pitch, const conv::Epilogue& epilogue, float* scratch, int threads) {
  const Header header = header_of(plan);
  ACF_CHECK(std::memcmp(packed, &header, sizeof(header)) == 0,
            "packed weights must come from pack() of this version and of the same plan");
  if (images == 0) return;
  Runner(plan, packed, images, in, out, out_pitch, epilogue).run(scratch, threads);
}

}  // namespace acf::narrow
