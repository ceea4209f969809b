// Cuts a convolution into tiles and hands them to the kernels of the plan's unit.
#include <algorithm>
#include <cstring>
#include <iterator>

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

// One of all images.
struct Pixel {
  std::int64_t number, n, y, x;
};

// What a block reads, from a first position on, and what rows of columns read from a pixel's.
struct Narrow {
  const float* values;  // 4 bytes, whatever they are
  std::int64_t first;
  const std::int32_t* offsets;
};

class Runner {
 public:
  Runner(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out,
         const conv::Pitch& out_pitch, const conv::Epilogue& epilogue, const Quantization* residual)
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
        positions_{plan.in.row, 0, position_rows(plan) * kTile},
        pixels_(images * height_ * width_),
        tiles_(ceil_div(pixels_, kTile)),
        far_results_(images * plan.shape.filters * out_pitch.plane * std::int64_t{sizeof(float)} > kCachedBytes),
        call_(conv::activation_call(epilogue.activation, epilogue.slope)) {
    std::memcpy(&input_, bytes_ + sizeof(Header), sizeof(input_));
    call_.out = out;
    call_.out_plane = out_pitch.plane;
    call_.residual = epilogue.residual;
    call_.residual_plane = epilogue.residual_pitch.plane;
    if (residual != nullptr) {
      const auto zero = static_cast<float>(residual->zero);
      rounding_ = {1.0f / residual->scale, 0.0f - zero, 255.0f - zero, residual->scale};
      rounds_ = true;
    }
  }

  void run(float* scratch, int threads) const {
    const std::int64_t wanted = threads == 1 ? 1 : task_count(threads);
    if (wanted == 1) threads = 1;
    if (in_place_) return run_in_place(scratch, threads, wanted);
    // Threads that take pixels all read all weights, threads that take filters all gather all pixels.
    const std::int64_t filters = filter_tiles_;
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
    if (plan.reading == Reading::in_place) {
      return std::min<std::int64_t>(Slots::most(), plan.images * position_tiles(plan));
    }
    const std::int64_t tasks = pixel_tiles(plan, plan.images) * filter_tiles(plan) * plan.shape.groups;
    return std::min<std::int64_t>(Slots::most(), tasks);
  }
  // What lies in a slot: values of a block, then sums; then what the block reads, made narrow, and offsets of rows
  // there.
  static std::int64_t gathered_bytes(const Plan& plan) {
    return block_tiles(plan) * value_bytes(plan) + filter_tiles(plan) * kTogether * kStepBytes;
  }
  static std::int64_t offset_bytes(const Plan& plan) {
    return ceil_div(plan.rows * static_cast<std::int64_t>(sizeof(std::int32_t)), kRowBytes) * kRowBytes;
  }
  static std::int64_t slot_bytes(const Plan& plan) {
    if (plan.reading == Reading::in_place) return image_bytes(plan) + kTogether * kStepBytes;
    return gathered_bytes(plan) + (plan.reading == Reading::narrow ? narrow_bytes(plan) + offset_bytes(plan) : 0);
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
    const std::int64_t rows = position_rows(plan_),
                       last = std::min(rows, tiles.begin + tiles.size + ceil_div(reach(plan_), kTile)),
                       pitch = position_plane_ * kPositionBytes, groups = channel_groups(plan_),
                       whole = image_bytes_ / pitch;
    make_narrow(image, tiles.begin, last, values + tiles.begin * kRowBytes, pitch);
    if (whole > groups) std::memset(values + groups * pitch, 0, static_cast<std::size_t>((whole - groups) * pitch));
    all_.begin(static_cast<int>(plan_.rows));
    // Weights that stream pass by once, with all values; those in the cache are read again for every two tiles.
    const std::int64_t filters = filter_tiles_, pixels = filters == 1 ? kTogether : 2,
                       most = streams_ ? tiles.size : pixels;
    for (std::int64_t t = 0; t < tiles.size; t += most) {
      const std::int64_t end = std::min(t + most, tiles.size);
      for (std::int64_t f = 0; f < filters; f += 2) {
        for (std::int64_t u = t; u < end; u += pixels) {
          multiply_in_place(image, tiles.begin + u, std::min(pixels, end - u), f, values, streams_ && u == t);
        }
      }
    }
    all_.end();
  }

  // Some rows of positions of an image, in all channels: those of a group of channels side by side.
  void make_narrow(std::int64_t image, std::int64_t begin, std::int64_t end, unsigned char* to,
                   std::int64_t pitch) const {
    const conv::Shape& s = plan_.shape;
    const std::int64_t n = columns_per_row(plan_.number), groups = channel_groups(plan_), rows = position_rows(plan_);
    Reads reads = {};
    reads.step = 1;
    reads.count = kTile;
    reads.stretches = 1;
    reads.stretch[0] = {0, 0, kTile};
    GatherCall gather = {};
    gather.reads = &reads;
    gather.columns = (end - begin) * n;
    gather.inverse = 1.0f / input_.scale;
    gather.zero = input_.zero;
    const float* first = in_ + image * plan_.in.image - s.padding.top * plan_.in.row - s.padding.left;
    for (std::int64_t g = 0; g < groups; ++g, to += pitch) {
      gather.in = first + g * n * plan_.in.plane;
      gather.offsets = part<std::int32_t>(at_.offsets) + ((g + 1 == groups ? rows : 0) + begin) * n;
      gather.to = to;
      table_.gather(gather);
    }
  }

  // Two tiles of pixels with two of filters, or up to four with one.
  void multiply_in_place(std::int64_t image, std::int64_t tile, std::int64_t count, std::int64_t f,
                         unsigned char* values, bool far) const {
    ProductCall product = {};
    product.weights = weights_of(0, f);
    product.weights_pitch = weight_bytes_;
    product.pixels = values + tile * kRowBytes;
    product.pixels_pitch = kRowBytes;
    product.places = part<std::int64_t>(at_.places);
    product.rows_pitch = position_plane_ * kPositionBytes;
    product.rows = plan_.steps * kTile;
    product.filter_tiles = static_cast<int>(std::min<std::int64_t>(2, filter_tiles_ - f));
    product.pixel_tiles = static_cast<int>(count);
    product.lanes = kTile;
    product.filters = static_cast<int>(std::min(kTogether * std::int64_t{kTile}, group_filters_ - f * kTile));
    product.streams = far;
    unsigned char* sums = values + image_bytes_;
    product.sums = sums;
    table_.product(product);
    Store stores[kTogether * kMaxStores];
    int spread_over = 0;
    for (std::int64_t p = 0; p < count; ++p) {
      Place place;
      if (put_positions(image, tile + p, place)) spread_over += spread(place, p, stores + spread_over);
    }
    for (int i = 0; i < product.filter_tiles; ++i) {
      finish(0, f + i, stores, spread_over, sums + i * count * kStepBytes);
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
    const std::int64_t most = block_tiles_, blocks = ceil_div(tiles.size, most);
    const Parts cut(tiles.size, blocks);
    if (all_.begin != nullptr) all_.begin(kTile);
    for (std::int64_t b = 0; b < blocks; ++b) {
      run_block(group, {tiles.begin + cut[b].begin, cut[b].size}, filters, values);
    }
    if (all_.end != nullptr) all_.end();
  }

  // Few tiles of pixels at a time, so that values go no further than the first-level cache, where weights come by for
  // each of them anyway; else all, whose results are written in long stretches.
  void run_block(std::int64_t group, const conv::Part& tiles, const conv::Part& filters, unsigned char* values) const {
    const std::int64_t most = chunked() || filters.size <= 2 ? kTogether : tiles.size, pitch = value_bytes_;
    const Narrow narrow = narrow_ ? make_narrow_for(tiles, values + gathered_bytes_) : Narrow{};
    Pixel next = pixel(tiles.begin * kTile);
    for (std::int64_t t = 0; t < tiles.size; t += most) {
      const std::int64_t count = std::min(most, tiles.size - t);
      Place places[kMaxTiles];
      const std::int64_t rows =
          narrow_ ? copy(next, count, places, narrow, values) : gather(group, next, count, tiles.size, places, values);
      // Whole steps are read, by units that do: what no column fills meets weights of zero, and must be finite.
      for (std::int64_t u = 0; all_.order == Order::by_step && u < count; ++u) {
        std::memset(values + u * pitch + rows * kRowBytes, 0, static_cast<std::size_t>(pitch - rows * kRowBytes));
      }
      multiply(group, filters, count, places, rows, values, values + block_tiles_ * pitch);
    }
  }

  // Both fill some tiles, and return how many rows of each hold columns.
  std::int64_t gather(std::int64_t group, Pixel& next, std::int64_t tiles, std::int64_t ahead, Place* places,
                      unsigned char* values) const {
    GatherCall call = {};
    call.offsets = part<std::int32_t>(at_.offsets) + group * offsets_per_group(plan_);
    call.columns = part<std::int64_t>(at_.counts)[group];
    call.inverse = 1.0f / input_.scale;
    call.zero = input_.zero;
    for (std::int64_t t = 0; t < tiles; ++t) {
      Reads reads;
      call.in = in_ + locate(next, plan_.in, reads, places[t]);
      call.reads = &reads;
      call.ahead = reads.stretches == 1 ? static_cast<std::int32_t>(ahead * kTile * reads.step) : 0;
      call.to = values + t * value_bytes_;
      table_.gather(call);
    }
    return ceil_div(call.columns, columns_per_row(plan_.number));
  }

  std::int64_t copy(Pixel& next, std::int64_t tiles, Place* places, const Narrow& narrow, unsigned char* values) const {
    CopyCall call = {};
    call.offsets = narrow.offsets;
    call.rows = plan_.rows;
    for (std::int64_t t = 0; t < tiles; ++t) {
      Reads reads;
      call.in = narrow.values + (locate(next, positions_, reads, places[t]) - narrow.first);
      call.reads = &reads;
      call.to = values + t * value_bytes_;
      all_.copy(call);
    }
    return plan_.rows;
  }

  // What some tiles of pixels read. Positions of all images are counted one after the other.
  Narrow make_narrow_for(const conv::Part& tiles, unsigned char* to) const {
    const conv::Shape& s = plan_.shape;
    const auto position = [&](const Pixel& p) {
      return p.n * positions_.image + p.y * s.stride_h * positions_.row + p.x * s.stride_w;
    };
    const std::int64_t last = std::min((tiles.begin + tiles.size) * kTile, pixels_) - 1, image = positions_.image,
                       first = position(pixel(tiles.begin * kTile)) / kTile * kTile,
                       end = ceil_div(position(pixel(last)) + reach(plan_) + 1, kTile) * kTile;
    for (std::int64_t n = first / image; n * image < end; ++n) {
      const std::int64_t from = std::max(first - n * image, std::int64_t{0}), until = std::min(end - n * image, image);
      make_narrow(n, from / kTile, until / kTile, to + (n * image + from - first) * kPositionBytes,
                  block_positions_ * kPositionBytes);
    }
    auto* offsets = reinterpret_cast<std::int32_t*>(to + narrow_bytes(plan_));
    const auto plane = static_cast<std::int32_t>(block_positions_);
    const Row* rows = part<Row>(at_.rows);
    for (std::int64_t r = 0; r < plan_.rows; ++r) offsets[r] = rows[r].group * plane + rows[r].position;
    return {reinterpret_cast<const float*>(to), first, offsets};
  }

  // Whether the columns are cut into chunks, so that values of a few tiles of pixels stay in the first-level cache
  // while all filters pass by; their sums are put aside. AMX is quicker with weights that stream in order.
  bool chunked() const {
    return all_.chunk > 0 && plan_.steps > all_.chunk && !(all_.order == Order::by_step && streams_);
  }

  // Some tiles of pixels with some of filters.
  void multiply(std::int64_t group, const conv::Part& filters, std::int64_t tiles, const Place* places,
                std::int64_t rows, const unsigned char* values, unsigned char* sums) const {
    const std::int64_t all = filter_tiles_, weight_pitch = weight_bytes_, pitch = value_bytes_,
                       end = filters.begin + filters.size;
    const bool chunks = chunked() && (all_.order == Order::by_step || tiles > 1), far = streams_;
    const std::int64_t most = chunks ? all_.chunk * kTile : std::max<std::int64_t>(rows, 1);
    // A tile of filters meets some of pixels, whose results lie side by side. Two meet two where that saves AMX loads:
    // not where weights come from far away and few tiles of pixels can meet them all at once.
    const bool square = all_.order == Order::by_step && !chunks && all > 1 && !(far && tiles <= kTogether);
    const std::int64_t pixels = std::min<std::int64_t>(square ? 2 : kTogether, tiles), some = kTogether / pixels;
    Store stores[kMaxTiles * kMaxStores];
    int first[kMaxTiles + 1] = {};
    for (std::int64_t t = 0, number = 0; t < tiles; ++t, number = number + 1 == pixels ? 0 : number + 1) {
      first[t + 1] = first[t] + spread(places[t], number, stores + first[t]);
    }
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
          product.lanes = lanes_of(places[t + product.pixel_tiles - 1]);
          product.filters = static_cast<int>(std::min(kTogether * std::int64_t{kTile}, group_filters_ - f * kTile));
          product.resumes = row > 0;
          product.streams = far && t == 0;
          product.sums = sums + (chunks ? (f - filters.begin) * tiles * kStepBytes : 0);
          if (far_results_ && row + most >= rows) {
            const bool last = t + pixels >= tiles;
            const std::int64_t next = last ? 0 : t + pixels, next_filters = last ? f + some : f;
            for (std::int64_t p = next; p < std::min(next + pixels, tiles); ++p) {
              prefetch_results(group, next_filters, std::min(next_filters + some, end), places[p]);
            }
          }
          table_.product(product);
          if (row + most < rows) continue;
          for (int i = 0; i < product.filter_tiles; ++i) {
            finish(group, f + i, stores + first[t], first[t + product.pixel_tiles] - first[t],
                   static_cast<unsigned char*>(product.sums) + i * product.pixel_tiles * kStepBytes);
          }
        }
      }
    }
  }

  static int lanes_of(const Place& place) { return place.segments[place.count - 1].to; }

  // What the results of some tiles of filters are added to and where they go, one product ahead.
  void prefetch_results(std::int64_t group, std::int64_t begin, std::int64_t end, const Place& place) const {
    const std::int64_t per_group = group_filters_;
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
    return bytes_ + at_.weights + (group * filter_tiles_ + filter_tile) * weight_bytes_;
  }

  // Of some tiles of pixels.
  void finish(std::int64_t group, std::int64_t filter_tile, const Store* stores, int count, unsigned char* sums) const {
    const std::int64_t within = filter_tile * kTile, per_group = group_filters_, filter = group * per_group + within,
                       numbered = group * filter_tiles_ * kTile + within;
    conv::Call call = call_;
    call.out += filter * call.out_plane;
    if (call.residual != nullptr) call.residual += filter * call.residual_plane;
    const bool integers = plan_.number == Number::int8;
    table_.finish({&call, stores, count, sums, static_cast<int>(std::min<std::int64_t>(kTile, per_group - within)),
                   integers ? part<std::int32_t>(at_.corrections) + numbered : nullptr,
                   integers ? part<float>(at_.multipliers) + numbered : nullptr, part<float>(at_.bias) + numbered,
                   rounds_ ? &rounding_ : nullptr});
  }

  // Where the pixels of tile `number` of those that are finished together go: a place, cut into registers. Returns how
  // many stores that takes.
  int spread(const Place& place, std::int64_t number, Store* stores) const {
    int count = 0;
    for (int i = 0; i < place.count; ++i) {
      const conv::Segment& s = place.segments[i];
      for (int begin = 0; begin < s.to; begin += all_.lanes) {
        const int from = std::max(s.from - begin, 0), to = std::min(s.to - begin, all_.lanes);
        if (from >= to) continue;
        // Lane i of the register is lane begin + i of the tile.
        const auto sums = static_cast<std::int32_t>(number * kTile * kTile + begin);
        stores[count++] = {s.out + begin, s.residual + begin, sums, from, to};
      }
    }
    return count;
  }

  Pixel pixel(std::int64_t number) const {
    return {number, number / (height_ * width_), number / width_ % height_, number % width_};
  }

  // The pixels of a tile from a first one on, which becomes that of the next tile; among images of a pitch. Returns
  // where the first one lies.
  std::int64_t locate(Pixel& next, const conv::Pitch& pitch, Reads& reads, Place& place) const {
    const conv::Shape& s = plan_.shape;
    const std::int64_t first = next.number, last = std::min(first + kTile, pixels_);
    std::int64_t &n = next.n, &y = next.y, &x = next.x;
    const auto read_at = [&] { return n * pitch.image + y * s.stride_h * pitch.row + x * s.stride_w; };
    const std::int64_t base = read_at();
    reads.step = s.stride_w;
    reads.count = static_cast<int>(last - first);
    reads.stretches = place.count = 0;
    for (std::int64_t pixel = first; pixel < last;) {
      const std::int64_t size = std::min(width_ - x, last - pixel), at = read_at() - base;
      const auto from = static_cast<int>(pixel - first), to = static_cast<int>(from + size);
      const std::int64_t lane_zero = at - from * s.stride_w;
      if (reads.stretches > 0 && reads.stretch[reads.stretches - 1].at == lane_zero) {
        reads.stretch[reads.stretches - 1].to = to;
      } else {
        reads.stretch[reads.stretches++] = {lane_zero, from, to};
      }
      const conv::Segment segment = {n * out_pitch_.image + y * out_pitch_.row + x - from,
                                     n * residual_pitch_.image + y * residual_pitch_.row + x - from, from, to};
      conv::Segment* before = place.count > 0 ? &place.segments[place.count - 1] : nullptr;
      if (before != nullptr && before->out == segment.out && before->residual == segment.residual) {
        before->to = to;
      } else {
        place.segments[place.count++] = segment;
      }
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
    if (reads.stretches > 1 || s.stride_w > 1 || reads.count < kTile) put_lanes(reads);
    next.number = last;
    return base;
  }

  static void put_lanes(Reads& reads) {
    std::fill(std::begin(reads.lanes), std::end(reads.lanes), 0);
    for (int i = 0; i < reads.stretches; ++i) {
      const Stretch& stretch = reads.stretch[i];
      for (int lane = stretch.from; lane < stretch.to; ++lane) {
        reads.lanes[lane] = static_cast<std::int32_t>(stretch.at + lane * reads.step);
      }
    }
  }

  // Of the plan: some are divisions, which take longer than a tile's stores.
  const Plan& plan_;
  const std::int64_t group_filters_ = group_filters(plan_), filter_tiles_ = filter_tiles(plan_),
                     weight_bytes_ = weight_bytes(plan_), value_bytes_ = value_bytes(plan_),
                     block_tiles_ = block_tiles(plan_), gathered_bytes_ = gathered_bytes(plan_);
  const bool narrow_ = plan_.reading == Reading::narrow, in_place_ = plan_.reading == Reading::in_place,
             streams_ = streams(plan_);
  const std::int64_t block_positions_ = narrow_ ? block_positions(plan_) : 0,
                     position_plane_ = in_place_ ? position_plane(plan_) : 0,
                     image_bytes_ = in_place_ ? image_bytes(plan_) : 0;
  const Kernels& all_;
  const NumberKernels& table_;
  Packed at_;
  const unsigned char* bytes_;
  Quantization input_;
  const float* in_;
  conv::Pitch out_pitch_, residual_pitch_;
  std::int64_t width_, height_, images_;
  conv::Pitch positions_;
  std::int64_t pixels_, tiles_;
  bool far_results_;  // will not be found in the second-level cache
  conv::Call call_;
  Rounding rounding_ = {};  // of residuals
  bool rounds_ = false;
};

}  // namespace

std::int64_t scratch_size(const Plan& plan) {
  return Runner::slot_count(plan) * Runner::slot_bytes(plan) / static_cast<std::int64_t>(sizeof(float));
}

void run(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out,
         const conv::Pitch& out_pitch, const conv::Epilogue& epilogue, const Quantization* residual, float* scratch,
         int threads) {
  const Header header = header_of(plan);
  ACF_CHECK(std::memcmp(packed, &header, sizeof(header)) == 0,
            "packed weights must come from pack() of this version and of the same plan");
  if (residual != nullptr) {
    ACF_CHECK(plan.number == Number::int8, "residuals are rounded beside 8-bit weights alone");
    check(*residual, "residual");
  }
  if (images == 0) return;
  Runner(plan, packed, images, in, out, out_pitch, epilogue, residual).run(scratch, threads);
}

}  // namespace acf::narrow
