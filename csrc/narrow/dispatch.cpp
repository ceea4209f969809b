// Cuts a convolution into tiles and hands them to the kernels of the plan's unit.
#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "core/parallel.h"
#include "narrow/packed.h"

namespace acf::narrow {
namespace {

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
        images_(images),
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
    if (plan_.in_place) return run_in_place(scratch, threads, wanted);
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
    if (plan.in_place) return std::min<std::int64_t>(Slots::most(), plan.images * position_tiles(plan));
    const std::int64_t tasks = pixel_tiles(plan, plan.images) * filter_tiles(plan) * plan.shape.groups;
    return std::min<std::int64_t>(Slots::most(), tasks);
  }
  static std::int64_t slot_bytes(const Plan& plan) {
    if (plan.in_place) return image_bytes(plan) + kTogether * kStepBytes;
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

  // Threads take images, or bands of them.
  void run_in_place(float* scratch, int threads, std::int64_t wanted) const {
    const std::int64_t tiles = position_tiles(plan_);
    const Parts bands(tiles, std::clamp<std::int64_t>(ceil_div(wanted, images_), 1, ceil_div(tiles, kTogether)));
    Slots slots(static_cast<int>(std::min<std::int64_t>(threads, slot_count(plan_))));
    parallel_for(images_ * bands.count, slots.count(), [&](std::int64_t task) {
      slots.with([&](int slot) {
        run_band(task / bands.count, bands[task % bands.count],
                 reinterpret_cast<unsigned char*>(scratch) + slot * slot_bytes(plan_));
      });
    });
  }

  void run_band(std::int64_t image, const conv::Part& tiles, unsigned char* values) const {
    make_narrow(image, tiles, values);
    all_.begin(static_cast<int>(plan_.rows));
    // Weights that stream pass by once, with all values; those in the cache are read again for every two tiles.
    const std::int64_t filters = filter_tiles(plan_), pixels = filters == 1 ? kTogether : 2,
                       most = streams(plan_) ? tiles.size : pixels;
    for (std::int64_t t = 0; t < tiles.size; t += most) {
      const std::int64_t end = std::min(t + most, tiles.size);
      for (std::int64_t f = 0; f < filters; f += 2) {
        for (std::int64_t u = t; u < end; u += pixels) {
          multiply_in_place(image, tiles.begin + u, std::min(pixels, end - u), f, values, streams(plan_) && u == t);
        }
      }
    }
    all_.end();
  }

  // The positions of an image that some tiles read, in all channels.
  void make_narrow(std::int64_t image, const conv::Part& tiles, unsigned char* values) const {
    const conv::Shape& s = plan_.shape;
    const std::int64_t n = columns_per_row(plan_.number), groups = channel_groups(plan_),
                       pitch = position_plane(plan_) * 4, rows = position_rows(plan_),
                       reach = (s.kernel_h - 1) * s.dilation_h * plan_.in.row + (s.kernel_w - 1) * s.dilation_w,
                       end = std::min(rows, tiles.begin + tiles.size + ceil_div(reach, kTile));
    Reads reads = {};
    reads.step = 1;
    reads.count = kTile;
    reads.stretches = 1;
    reads.stretch[0] = {0, 0, kTile};
    GatherCall gather = {};
    gather.reads = &reads;
    gather.columns = (end - tiles.begin) * n;
    gather.inverse = 1.0f / input_.scale;
    gather.zero = input_.zero;
    const float* first = in_ + image * plan_.in.image - s.padding.top * plan_.in.row - s.padding.left;
    for (std::int64_t g = 0; g < groups; ++g) {
      gather.in = first + g * n * plan_.in.plane;
      gather.offsets = part<std::int32_t>(at_.offsets) + ((g + 1 == groups ? rows : 0) + tiles.begin) * n;
      gather.to = values + g * pitch + tiles.begin * kRowBytes;
      table_.gather(gather);
    }
    const std::int64_t whole = image_bytes(plan_) / pitch;
    if (whole > groups) std::memset(values + groups * pitch, 0, static_cast<std::size_t>((whole - groups) * pitch));
  }

  // Two tiles of pixels with two of filters, or up to four with one.
  void multiply_in_place(std::int64_t image, std::int64_t tile, std::int64_t count, std::int64_t f,
                         unsigned char* values, bool far) const {
    ProductCall product = {};
    product.weights = weights_of(0, f);
    product.weights_pitch = weight_bytes(plan_);
    product.pixels = values + tile * kRowBytes;
    product.pixels_pitch = kRowBytes;
    product.places = part<std::int64_t>(at_.places);
    product.rows_pitch = position_plane(plan_) * 4;
    product.rows = plan_.steps * kTile;
    product.filter_tiles = static_cast<int>(std::min<std::int64_t>(2, filter_tiles(plan_) - f));
    product.pixel_tiles = static_cast<int>(count);
    product.streams = far;
    unsigned char* sums = values + image_bytes(plan_);
    product.sums = sums;
    table_.product(product);
    for (int i = 0; i < product.filter_tiles; ++i) {
      for (std::int64_t p = 0; p < count; ++p, sums += kStepBytes) {
        Place place;
        if (put_positions(image, tile + p, place)) finish(0, f + i, filter_tiles(plan_) * kTile, place, sums);
      }
    }
  }

  // The pixels of a tile of positions, if it has any.
  bool put_positions(std::int64_t image, std::int64_t tile, Place& place) const {
    place.count = 0;
    std::int64_t y = tile * kTile / plan_.in.row, x = tile * kTile % plan_.in.row;
    for (std::int64_t lane = 0; lane < kTile && y < height_; ++y, x = 0) {
      const std::int64_t size = std::min(width_ - x, kTile - lane);
      if (size > 0) {
        place.segments[place.count++] = {image * out_pitch_.image + y * out_pitch_.row + x - lane,
                                         image * residual_pitch_.image + y * residual_pitch_.row + x - lane,
                                         static_cast<int>(lane), static_cast<int>(lane + size)};
      }
      lane += plan_.in.row - x;
    }
    return place.count > 0;
  }

  // Some tiles of pixels and of filters, block by block.
  void run_part(std::int64_t group, const conv::Part& tiles, const conv::Part& filters, unsigned char* values) const {
    const std::int64_t most = block_tiles(plan_), blocks = ceil_div(tiles.size, most);
    const Parts cut(tiles.size, blocks);
    if (all_.begin != nullptr) all_.begin(kTile);
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
    // Few tiles of pixels meet those of filters all at once, so that weights are read once, and a single one of filters
    // meets as many; else two meet two.
    const bool line = chunks || (far && tiles <= kTogether) || all == 1;
    const std::int64_t pixels = std::min<std::int64_t>(line ? kTogether : 2, tiles), some = kTogether / pixels;
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
  std::int64_t width_, height_, images_, pixels_, tiles_;
  conv::Call call_;
};

}  // namespace

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
