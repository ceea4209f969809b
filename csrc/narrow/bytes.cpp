#include "narrow/bytes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "narrow/depthwise.h"
#include "narrow/packed.h"

namespace acf::narrow {
namespace {

constexpr std::int64_t kMostBytes = std::numeric_limits<std::int32_t>::max();  // offsets have 32 bits

// Packed weights, one after the other, each at a multiple of kAlignment.
struct BytePacked {
  std::size_t offsets;  // int32 (rows,): from a pixel's first byte to those of a row of columns, or of a tap
  // float, float, int32: (filters in whole tiles,). Sums begin with what takes zero from every value.
  std::size_t bias, multipliers, start;
  // int8, per part of the filters (rows, tiles, kTile, 4); depthwise: (taps, kTogether, kTile)
  std::size_t weights;
  // Depthwise, per part: bias, multipliers and start as TurnedChannels has them.
  std::size_t turned_bias, turned_multipliers, turned_start;
  // By phase: what DepthwiseRowsCall has.
  std::size_t row_weights, row_bias, row_multipliers, row_start;
  std::size_t size;
};

constexpr std::int64_t kPart = kTogether * kTile;  // filters of a whole part

bool is_depthwise(const BytePlan& plan) { return plan.shape.groups > 1; }
std::int64_t tiles_of(const BytePlan& plan) { return ceil_div(plan.shape.filters, kTile); }
std::int64_t tile_bytes(const BytePlan& plan) { return plan.rows * (is_depthwise(plan) ? kTile : kRowBytes); }
// Tiles of filters, in parts that meet pixels together.
Parts filter_parts(const BytePlan& plan) { return {tiles_of(plan), ceil_div(tiles_of(plan), kTogether)}; }

// Registers until the channels of a row come round again, where rows can be computed so; else 0.
std::int64_t phases(const BytePlan& plan) {
  const conv::Shape& s = plan.shape;
  if (kernels(plan.unit).bytes.depthwise_rows == nullptr || s.kernel_h != 3 || s.kernel_w != 3 || s.stride_h != 1 ||
      s.stride_w != 1 || s.dilation_h != 1 || s.dilation_w != 1) {
    return 0;
  }
  constexpr std::int64_t kMostPhases = 48;  // with weights of their own, which are to stay in the cache
  const std::int64_t count = plan.in.pitch.pixel / std::gcd(plan.in.pitch.pixel, std::int64_t{kRegisterBytes});
  return count <= kMostPhases ? count : 0;
}

BytePacked packed_layout(const BytePlan& plan) {
  const auto filters = static_cast<std::size_t>(tiles_of(plan) * kTile);
  std::size_t end = 0;
  const auto place = [&end](std::size_t bytes) {
    const std::size_t begin = end;
    end += (bytes + conv::kAlignment - 1) / conv::kAlignment * conv::kAlignment;
    return begin;
  };
  BytePacked at = {};
  place(sizeof(Header));
  at.offsets = place(static_cast<std::size_t>(plan.rows) * sizeof(std::int32_t));
  at.bias = place(filters * sizeof(float));
  at.multipliers = place(filters * sizeof(float));
  at.start = place(filters * sizeof(std::int32_t));
  const auto parts = static_cast<std::size_t>(filter_parts(plan).count * kPart);
  if (!is_depthwise(plan)) {
    at.weights = place(static_cast<std::size_t>(tiles_of(plan) * tile_bytes(plan)));
  } else {
    at.weights = place(parts * static_cast<std::size_t>(plan.rows));
    at.turned_bias = place(parts * sizeof(float));
    at.turned_multipliers = place(parts * sizeof(float));
    at.turned_start = place(parts * sizeof(std::int32_t));
    const auto bytes = static_cast<std::size_t>(phases(plan)) * kRegisterBytes;
    at.row_weights = place(bytes * 3 * sizeof(std::int32_t));
    at.row_bias = place(bytes * sizeof(float));
    at.row_multipliers = place(bytes * sizeof(float));
    at.row_start = place(bytes * sizeof(std::int32_t));
  }
  at.size = end;
  return at;
}

Header header_of(const BytePlan& plan) {
  Header header;
  header.magic = 0x42464341;  // "ACFB"
  const conv::Shape& s = plan.shape;
  const std::int64_t numbers[] = {s.channels,    s.filters,           s.kernel_h,
                                  s.kernel_w,    s.dilation_h,        s.dilation_w,
                                  s.padding.top, s.padding.left,      plan.in.pitch.row,
                                  plan.rows,     plan.in.pitch.pixel, static_cast<std::int64_t>(plan.unit),
                                  s.groups};
  std::copy(std::begin(numbers), std::end(numbers), header.numbers);
  return header;
}

// Which rows of columns hold any that are kept: (taps, fours of channels).
std::vector<bool> used_rows(const conv::Shape& s, std::int64_t count, const std::int64_t* columns) {
  const std::int64_t taps = s.kernel_h * s.kernel_w, fours = ceil_div(s.channels, 4);
  std::vector<bool> used(static_cast<std::size_t>(taps * fours), false);
  for (std::int64_t i = 0; i < count; ++i) {
    used[static_cast<std::size_t>(columns[i] % taps * fours + columns[i] / taps / 4)] = true;
  }
  return used;
}

// From a pixel's first byte to that of a tap.
std::int64_t tap_offset(const BytePlan& plan, std::int64_t tap) {
  const conv::Shape& s = plan.shape;
  return (tap / s.kernel_w * s.dilation_h - s.padding.top) * plan.in.pitch.row +
         (tap % s.kernel_w * s.dilation_w - s.padding.left) * plan.in.pitch.pixel;
}

void pack_depthwise(const BytePlan& plan, const float* weights, const float* scales, const Quantization& input,
                    const float* bias, unsigned char* bytes) {
  const BytePacked at = packed_layout(plan);
  const auto floats = [bytes](std::size_t from) { return reinterpret_cast<float*>(bytes + from); };
  const auto integers = [bytes](std::size_t from) { return reinterpret_cast<std::int32_t*>(bytes + from); };
  for (std::int64_t tap = 0; tap < plan.rows; ++tap) {
    integers(at.offsets)[tap] = static_cast<std::int32_t>(tap_offset(plan, tap));
  }
  const Parts parts = filter_parts(plan);
  for (std::int64_t p = 0, c = 0; p < parts.count; ++p) {
    const conv::Part tiles = parts[p];
    for (; c < std::min(plan.shape.channels, (tiles.begin + tiles.size) * kTile); ++c, weights += plan.rows) {
      const std::int64_t i = c - tiles.begin * kTile;
      std::int32_t sum = 0;
      for (std::int64_t tap = 0; tap < plan.rows; ++tap) {
        const auto weight = static_cast<signed char>(weights[tap]);
        bytes[at.weights + static_cast<std::size_t>((p * plan.rows + tap) * kPart + i)] =
            static_cast<unsigned char>(weight);
        sum += weight;
      }
      const std::int64_t turned = p * kPart + i % 4 * kTile + i / 4;  // in TurnedChannels
      floats(at.bias)[c] = floats(at.turned_bias)[turned] = bias == nullptr ? 0 : bias[c];
      floats(at.multipliers)[c] = floats(at.turned_multipliers)[turned] = input.scale * scales[c];
      integers(at.start)[c] = integers(at.turned_start)[turned] = -input.zero * sum;
    }
  }
  weights -= plan.shape.channels * plan.rows;
  for (std::int64_t i = 0; i < phases(plan) * kRegisterBytes; ++i) {
    const std::int64_t c = i % plan.in.pitch.pixel, phase = i / kRegisterBytes, byte = i % kRegisterBytes;
    if (c >= plan.shape.channels) continue;
    const std::int64_t number = byte % 16 / 4, place = number * kTile + byte / 16 * 4 + byte % 4,
                       to = phase * kRegisterBytes + place;
    for (std::int64_t tap = 0; tap < 9; ++tap) {
      const std::int64_t row = (phase * 3 + tap / 3) * kRegisterBytes + place;
      bytes[at.row_weights + static_cast<std::size_t>(row * 4 + tap % 3)] =
          static_cast<unsigned char>(static_cast<signed char>(weights[c * 9 + tap]));
    }
    floats(at.row_bias)[to] = floats(at.bias)[c];
    floats(at.row_multipliers)[to] = floats(at.multipliers)[c];
    integers(at.row_start)[to] = integers(at.start)[c];
  }
}

// body(n, y) for every row of some images.
template <class Body>
void each_row(std::int64_t images, std::int64_t height, std::int64_t row_bytes, int threads, const Body& body) {
  constexpr std::int64_t kTaskBytes = 1 << 14;  // less is not worth another thread
  const std::int64_t rows = images * height,
                     tasks = std::clamp<std::int64_t>(rows * row_bytes / kTaskBytes, 1,
                                                      std::min<std::int64_t>(4 * threads, rows));
  const Parts parts(rows, tasks);
  parallel_for(tasks, tasks == 1 ? 1 : threads, [&](std::int64_t task) {
    const conv::Part part = parts[task];
    for (std::int64_t row = part.begin; row < part.begin + part.size; ++row) body(row / height, row % height);
  });
}

class ByteRunner {
 public:
  ByteRunner(const BytePlan& plan, const void* packed, std::int64_t images, const unsigned char* in,
             const ByteResidual* residual, const ByteTarget& target, const conv::Epilogue& epilogue)
      : plan_(plan),
        all_(kernels(plan.unit)),
        at_(packed_layout(plan)),
        packed_(static_cast<const unsigned char*>(packed)),
        in_(in),
        residual_(residual),
        target_(target),
        residual_pitch_(epilogue.residual_pitch),
        width_(plan.shape.out_width()),
        height_(plan.shape.out_height()),
        pixels_(images * height_ * width_),
        filters_(filter_parts(plan)),
        streams_(tiles_of(plan) * tile_bytes(plan) > kCachedBytes),
        call_(conv::activation_call(epilogue.activation, epilogue.slope)) {
    call_.out = target.planes;
    call_.out_plane = target.pitch.plane;
    call_.residual = epilogue.residual;
    call_.residual_plane = epilogue.residual_pitch.plane;
  }

  void run(float* scratch, int threads) const {
    const std::int64_t wanted = threads == 1 ? 1 : task_count(threads);
    if (wanted == 1) threads = 1;
    if (is_depthwise(plan_) && phases(plan_) > 0 && target_.bytes != nullptr && residual_ == nullptr && call_.clamps) {
      return run_rows(wanted, threads);
    }
    // Threads that take pixels all read all weights, threads that take filters all pixels.
    const std::int64_t groups = ceil_div(pixels_, kMostPixels), filters = filters_.count;
    const bool by_pixels = groups >= 2 * filters || filters < 2 * threads;
    const Parts pixel_tasks(groups, by_pixels ? std::min(groups, wanted) : 1),
        filter_tasks(filters, by_pixels ? 1 : std::min(filters, wanted));
    Slots slots(std::min(threads, Slots::most()));
    parallel_for(filter_tasks.count * pixel_tasks.count, slots.count(), [&](std::int64_t task) {
      slots.with([&](int slot) {
        run_part(pixel_tasks[task % pixel_tasks.count], filter_tasks[task / pixel_tasks.count],
                 reinterpret_cast<unsigned char*>(scratch) + slot * slot_bytes());
      });
    });
  }

  static std::int64_t slot_bytes() {
    return kSumBytes + kTurnedBytes + kResidualBytes +
           3 * kMaxGroups * kMostPixels * std::int64_t{sizeof(std::int32_t)};
  }

 private:
  static constexpr std::int64_t kMaxGroups = 64;  // of kMostPixels: of a block
  static constexpr std::int64_t kPixelTiles = (kMostPixels + kTile - 1) / kTile;
  // The last tile is turned with what lies behind it.
  static constexpr std::int64_t kSumBytes = (kTogether * kMostPixels + kTile) * kRowBytes,
                                kTurnedBytes = kPixelTiles * kStepBytes,
                                kResidualBytes = kTile * kMostPixels * std::int64_t{sizeof(float)};

  // The memory of a slot.
  struct Slot {
    explicit Slot(unsigned char* memory)
        : sums(reinterpret_cast<std::int32_t*>(memory)),
          turned(reinterpret_cast<std::int32_t*>(memory + kSumBytes)),
          residual(reinterpret_cast<float*>(memory + kSumBytes + kTurnedBytes)),
          read(reinterpret_cast<std::int32_t*>(memory + kSumBytes + kTurnedBytes + kResidualBytes)),
          written(read + kMaxGroups * kMostPixels),
          added(written + kMaxGroups * kMostPixels) {}
    std::int32_t *sums, *turned;
    float* residual;                       // (kTile, kMostPixels), of results in planes
    std::int32_t *read, *written, *added;  // where the pixels of a block lie, in bytes
  };

  std::int64_t task_count(int threads) const {
    const auto products = static_cast<double>(pixels_ * tiles_of(plan_) * plan_.rows);
    constexpr double kTaskProducts = 16'000;
    constexpr std::int64_t kTasksPerThread = 4;
    const auto most = static_cast<double>(kTasksPerThread * threads);
    return static_cast<std::int64_t>(std::min(most, std::max(1.0, products / kTaskProducts)));
  }

  template <class T>
  const T* part(std::size_t at) const {
    return reinterpret_cast<const T*>(packed_ + at);
  }

  // What a block reads and writes stays in the second-level cache while some tiles of filters after the others meet
  // it; weights that do not stay there are read once a block.
  std::int64_t block_groups() const {
    const conv::Shape& s = plan_.shape;
    const std::int64_t bytes = streams_ ? kLargeBlockBytes : kBlockBytes,
                       read =
                           plan_.in.pitch.pixel * std::min(s.stride_h, s.kernel_h) * std::min(s.stride_w, s.kernel_w),
                       written = s.filters * (target_.bytes == nullptr ? std::int64_t{sizeof(float)} : 1);
    return std::clamp<std::int64_t>(bytes / (kMostPixels * (read + written)), 2, kMaxGroups);
  }

  void run_part(const conv::Part& groups, const conv::Part& filters, unsigned char* memory) const {
    const Parts blocks(groups.size, ceil_div(groups.size, block_groups()));
    for (std::int64_t b = 0; b < blocks.count; ++b) {
      const std::int64_t first = (groups.begin + blocks[b].begin) * kMostPixels;
      run_block(first, std::min(pixels_ - first, blocks[b].size * kMostPixels), filters, memory);
    }
  }

  void run_block(std::int64_t first, std::int64_t count, const conv::Part& filters, unsigned char* memory) const {
    const Slot slot(memory);
    const std::int64_t stride_h = plan_.shape.stride_h, stride_w = plan_.shape.stride_w;
    const BytePitch& in = plan_.in.pitch;
    locate(first, count, {in.pixel * stride_w, in.row * stride_h, in.image}, slot.read);
    if (target_.bytes != nullptr) locate(first, count, target_.byte_pitch, slot.written);
    if (residual_ != nullptr) locate(first, count, residual_->pitch, slot.added);
    for (std::int64_t i = filters.begin; i < filters.begin + filters.size; ++i) {
      const conv::Part tiles = filters_[i];
      for (std::int64_t from = 0; from < count; from += kMostPixels) {
        const auto pixels = static_cast<int>(std::min<std::int64_t>(kMostPixels, count - from));
        if (is_depthwise(plan_)) {
          run_depthwise(i, slot, from, pixels, first);
          continue;
        }
        BroadcastCall call = {};
        call.in = in_;
        call.pixels = slot.read + from;
        call.count = pixels;
        call.start = part<std::int32_t>(at_.start) + tiles.begin * kTile;
        call.offsets = part<std::int32_t>(at_.offsets);
        call.rows = plan_.rows;
        call.weights = packed_ + at_.weights + tiles.begin * tile_bytes(plan_);
        call.filter_tiles = static_cast<int>(tiles.size);
        call.streams = streams_ && from == 0;
        call.sums = slot.sums;
        all_.bytes.broadcast(call);
        if (target_.bytes != nullptr) {
          all_.bytes.finish(byte_finish(tiles, slot, from, pixels));
        } else {
          finish_planes(tiles, slot, from, pixels, first);
        }
      }
    }
  }

  // Some pixels with a part of the channels.
  void run_depthwise(std::int64_t number, const Slot& slot, std::int64_t from, int count, std::int64_t first) const {
    const conv::Part tiles = filters_[number];
    const std::int64_t channel = tiles.begin * kTile;
    DepthwiseCall call = {};
    call.in = in_ + channel;
    call.channels = plan_.in.pitch.pixel - channel;
    call.pixels = slot.read + from;
    call.count = count;
    call.start = part<std::int32_t>(at_.start) + channel;
    call.offsets = part<std::int32_t>(at_.offsets);
    call.taps = plan_.rows;
    call.weights = packed_ + at_.weights + number * kPart * plan_.rows;
    call.filter_tiles = static_cast<int>(tiles.size);
    call.sums = slot.sums;
    if (target_.bytes == nullptr) {
      all_.bytes.depthwise(call);
      return finish_planes(tiles, slot, from, count, first);
    }
    const ByteFinishCall finish = byte_finish(tiles, slot, from, count);
    if (all_.bytes.depthwise_bytes != nullptr && finish.residual == nullptr && call_.clamps) {
      const TurnedChannels turned = {part<std::int32_t>(at_.turned_start) + number * kPart,
                                     part<float>(at_.turned_multipliers) + number * kPart,
                                     part<float>(at_.turned_bias) + number * kPart};
      return all_.bytes.depthwise_bytes(call, turned, finish);
    }
    all_.bytes.depthwise(call);
    all_.bytes.finish(finish);
  }

  void run_rows(std::int64_t wanted, int threads) const {
    const std::int64_t images = pixels_ / (height_ * width_), blocks = ceil_div(height_, kRowsAtOnce);
    const Parts tasks(images * blocks, std::min(images * blocks, wanted));
    const conv::Shape& s = plan_.shape;
    const BytePitch &in = plan_.in.pitch, &out = target_.byte_pitch;
    DepthwiseRowsCall rows = {};
    rows.in_row = in.row;
    rows.pixel = in.pixel;
    rows.bytes = width_ * in.pixel;
    rows.phases = phases(plan_);
    rows.weights = packed_ + at_.row_weights;
    rows.start = part<std::int32_t>(at_.row_start);
    rows.multipliers = part<float>(at_.row_multipliers);
    rows.bias = part<float>(at_.row_bias);
    rows.out_row = out.row;
    ByteFinishCall finish = {};
    finish.call = &call_;
    finish.inverse = 1.0f / target_.numbers.scale;
    finish.zero = target_.numbers.zero;
    parallel_for(tasks.count, threads, [&](std::int64_t task) {
      DepthwiseRowsCall call = rows;
      for (std::int64_t i = tasks[task].begin; i < tasks[task].begin + tasks[task].size; ++i) {
        const std::int64_t n = i / blocks, y = i % blocks * kRowsAtOnce;
        call.rows = static_cast<int>(std::min<std::int64_t>(kRowsAtOnce, height_ - y));
        call.in = in_ + n * in.image + (y - s.padding.top) * in.row - s.padding.left * in.pixel;
        call.out = target_.bytes + n * out.image + y * out.row;
        all_.bytes.depthwise_rows(call, finish);
      }
    });
  }

  // Where pixels lie, in bytes.
  void locate(std::int64_t first, std::int64_t count, const BytePitch& pitch, std::int32_t* places) const {
    std::int64_t n = first / (height_ * width_), y = first / width_ % height_, x = first % width_;
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t row = n * pitch.image + y * pitch.row;
      for (; i < count && x < width_; ++i, ++x) places[i] = static_cast<std::int32_t>(row + x * pitch.pixel);
      x = 0;
      if (++y == height_) {
        y = 0;
        ++n;
      }
    }
  }

  // from: of the pixels of the block.
  ByteFinishCall byte_finish(const conv::Part& tiles, const Slot& slot, std::int64_t from, int count) const {
    const std::int64_t filter = tiles.begin * kTile;
    ByteFinishCall call = {};
    call.call = &call_;
    call.sums = slot.sums;
    call.count = count;
    call.filter_tiles = static_cast<int>(tiles.size);
    call.multipliers = part<float>(at_.multipliers) + filter;
    call.bias = part<float>(at_.bias) + filter;
    call.inverse = 1.0f / target_.numbers.scale;
    call.zero = target_.numbers.zero;
    call.out = target_.bytes + filter;
    call.pixels = slot.written + from;
    call.channels = target_.byte_pitch.pixel - filter;
    if (residual_ != nullptr) {
      call.residual = residual_->bytes + filter;
      call.residual_pixels = slot.added + from;
      call.residual_scale = residual_->numbers.scale;
      call.residual_zero = residual_->numbers.zero;
    }
    return call;
  }

  // As planes, by tiles of (filters, pixels).
  void finish_planes(const conv::Part& tiles, const Slot& slot, std::int64_t from, int count,
                     std::int64_t first) const {
    Store stores[kPixelTiles * kMaxStores];
    int stored = 0;
    for (int i = 0; i < count; i += kTile) {
      stored += spread(first + from + i, std::min(kTile, count - i), i, stores + stored);
    }
    static constexpr std::int32_t kNone[kTile] = {};  // the sums are right as they are
    for (std::int64_t f = 0; f < tiles.size; ++f) {
      for (int i = 0; i < count; i += kTile) {
        all_.bytes.turn(slot.sums + (f * kMostPixels + i) * kTile, slot.turned + i * kTile);
      }
      const std::int64_t filter = (tiles.begin + f) * kTile;
      conv::Call call = call_;
      call.out += filter * call.out_plane;
      const auto filters = static_cast<int>(std::min<std::int64_t>(kTile, plan_.shape.filters - filter));
      if (call.residual != nullptr) call.residual += filter * call.residual_plane;
      if (residual_ != nullptr) {
        widen_residual(filter, filters, slot.added + from, count, slot.residual);
        call.residual = slot.residual;
        call.residual_plane = kMostPixels;
      }
      all_.int8.finish({&call, stores, stored, slot.turned, filters, kNone, part<float>(at_.multipliers) + filter,
                        part<float>(at_.bias) + filter, nullptr});
    }
  }

  void widen_residual(std::int64_t filter, int filters, const std::int32_t* pixels, int count, float* to) const {
    const Quantization numbers = residual_->numbers;
    for (int p = 0; p < count; ++p) {
      const unsigned char* bytes = residual_->bytes + pixels[p] + filter;
      for (int i = 0; i < filters; ++i)
        to[i * kMostPixels + p] = static_cast<float>(bytes[i] - numbers.zero) * numbers.scale;
    }
  }

  // Where a tile of pixels goes, cut into registers; `at`: where it begins among those of the call. Returns how many
  // stores that takes.
  int spread(std::int64_t first, int count, int at, Store* stores) const {
    int stored = 0;
    std::int64_t n = first / (height_ * width_), y = first / width_ % height_, x = first % width_;
    for (int lane = 0; lane < count;) {
      const int to = static_cast<int>(std::min<std::int64_t>(count, lane + width_ - x));
      const std::int64_t out = n * target_.pitch.image + y * target_.pitch.row + x - lane,
                         planes = n * residual_pitch_.image + y * residual_pitch_.row + x - lane,
                         residual = residual_ == nullptr ? planes : at;
      for (int begin = lane / all_.lanes * all_.lanes; begin < to; begin += all_.lanes) {
        stores[stored++] = {out + begin, residual + begin, at * kTile + begin, std::max(lane - begin, 0),
                            std::min(to - begin, all_.lanes)};
      }
      lane = to;
      x = 0;
      if (++y == height_) {
        y = 0;
        ++n;
      }
    }
    return stored;
  }

  const BytePlan& plan_;
  const Kernels& all_;
  BytePacked at_;
  const unsigned char* packed_;
  const unsigned char* in_;
  const ByteResidual* residual_;
  ByteTarget target_;
  conv::Pitch residual_pitch_;
  std::int64_t width_, height_, pixels_;
  Parts filters_;
  bool streams_;  // weights do not stay in the second-level cache
  conv::Call call_;
};

}  // namespace

ByteLayout byte_layout(std::int64_t images, std::int64_t channels, std::int64_t height, std::int64_t width,
                       const conv::Padding& padding) {
  ByteLayout layout;
  BytePitch& pitch = layout.pitch;
  pitch.pixel = ceil_div(channels, 4) * 4;
  pitch.row = (width + std::max(padding.left, padding.right)) * pitch.pixel;
  pitch.image = (height + std::max(padding.top, padding.bottom)) * pitch.row;
  constexpr std::int64_t kLine = conv::kAlignment;
  layout.before = ceil_div(padding.top * pitch.row + padding.left * pitch.pixel, kLine) * kLine;
  layout.size = layout.before + images * pitch.image + padding.bottom * pitch.row + padding.right * pitch.pixel;
  return layout;
}

void fill_halo(unsigned char* data, const ByteLayout& layout, std::int64_t images, std::int64_t height,
               std::int64_t width, const Quantization& numbers) {
  unsigned char* done = data - layout.before;
  const auto fill_up_to = [&](unsigned char* end) {
    if (end > done) std::memset(done, numbers.zero, static_cast<std::size_t>(end - done));
  };
  for (std::int64_t n = 0; n < images; ++n) {
    for (std::int64_t y = 0; y < height; ++y) {
      unsigned char* row = data + n * layout.pitch.image + y * layout.pitch.row;
      fill_up_to(row);
      done = row + width * layout.pitch.pixel;
    }
  }
  fill_up_to(data - layout.before + layout.size);
}

void make_bytes(Unit unit, const conv::Pitch& from_pitch, const float* from, const Quantization& numbers,
                std::int64_t images, std::int64_t channels, std::int64_t height, std::int64_t width,
                const BytePitch& to_pitch, unsigned char* to, int threads) {
  const Kernels& all = kernels(unit);
  each_row(images, height, width * to_pitch.pixel, threads, [&](std::int64_t n, std::int64_t y) {
    InterleaveCall call = {};
    call.plane = from_pitch.plane;
    call.channels = channels;
    call.inverse = 1.0f / numbers.scale;
    call.zero = numbers.zero;
    call.pixel = to_pitch.pixel;
    for (std::int64_t x = 0; x < width; x += kTile) {
      call.in = from + n * from_pitch.image + y * from_pitch.row + x;
      call.count = static_cast<int>(std::min<std::int64_t>(kTile, width - x));
      call.to = to + n * to_pitch.image + y * to_pitch.row + x * to_pitch.pixel;
      all.bytes.interleave(call);
    }
  });
}

bool has_bytes(Unit unit) { return kernels(unit).bytes.broadcast != nullptr; }

std::int64_t byte_columns(const conv::Shape& shape, std::int64_t count, const std::int64_t* columns) {
  if (is_depthwise(shape, count)) return count;
  if (shape.groups > 1) return 0;
  const std::vector<bool> used = used_rows(shape, count, columns);
  return 4 * std::count(used.begin(), used.end(), true);
}

BytePlan byte_plan(const conv::Shape& shape, const ByteLayout& in, std::int64_t count, const std::int64_t* columns,
                   Unit unit) {
  conv::check(shape);
  ACF_CHECK(has_bytes(unit), "the unit '", unit_name(unit), "' does not compute on bytes");
  ACF_CHECK(shape.groups == 1 || is_depthwise(shape, count), "a convolution on bytes has one group, or is depthwise");
  ACF_CHECK(in.size <= kMostBytes, "values of at most ", kMostBytes, " bytes can be read, got ", in.size);
  ACF_CHECK(count <= kMaxColumns, "8-bit products of at most ", kMaxColumns, " columns can be added up, got ", count);
  BytePlan plan;
  plan.shape = shape;
  plan.in = in;
  plan.unit = unit;
  plan.rows = is_depthwise(plan) ? shape.kernel_h * shape.kernel_w : byte_columns(shape, count, columns) / 4;
  return plan;
}

std::size_t packed_size(const BytePlan& plan) { return packed_layout(plan).size; }

bool same_packed(const BytePlan& one, const BytePlan& other) {
  const Header first = header_of(one), second = header_of(other);
  return std::memcmp(&first, &second, sizeof(first)) == 0;
}

void pack(const BytePlan& plan, std::int64_t count, const std::int64_t* columns, const float* weights,
          const float* scales, const Quantization& input, const float* bias, void* packed) {
  check(input, "input");
  const conv::Shape& s = plan.shape;
  const BytePacked at = packed_layout(plan);
  auto* bytes = static_cast<unsigned char*>(packed);
  std::memset(bytes, 0, at.size);
  const Header header = header_of(plan);
  std::memcpy(bytes, &header, sizeof(header));
  auto* offsets = reinterpret_cast<std::int32_t*>(bytes + at.offsets);
  auto* biases = reinterpret_cast<float*>(bytes + at.bias);
  auto* multipliers = reinterpret_cast<float*>(bytes + at.multipliers);
  auto* start = reinterpret_cast<std::int32_t*>(bytes + at.start);

  if (is_depthwise(plan)) return pack_depthwise(plan, weights, scales, input, bias, bytes);
  const std::int64_t taps = s.kernel_h * s.kernel_w, fours = ceil_div(s.channels, 4);
  const std::vector<bool> used = used_rows(s, count, columns);
  std::vector<std::int64_t> number(used.size());
  std::int64_t rows = 0;
  for (std::size_t i = 0; i < used.size(); ++i) {
    if (!used[i]) continue;
    const auto tap = static_cast<std::int64_t>(i) / fours, four = static_cast<std::int64_t>(i) % fours;
    offsets[rows] = static_cast<std::int32_t>(tap_offset(plan, tap) + 4 * four);
    number[i] = rows++;
  }
  const Parts parts = filter_parts(plan);
  std::vector<std::int64_t> places(static_cast<std::size_t>(count));  // of columns, from a filter's first weight
  for (std::int64_t p = 0, f = 0; p < parts.count; ++p) {
    const conv::Part tiles = parts[p];
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t channel = columns[i] / taps,
                         row = number[static_cast<std::size_t>(columns[i] % taps * fours + channel / 4)];
      places[static_cast<std::size_t>(i)] = row * tiles.size * kRowBytes + channel % 4;
    }
    for (; f < std::min(s.filters, (tiles.begin + tiles.size) * kTile); ++f, weights += count) {
      unsigned char* first = bytes + at.weights + tiles.begin * tile_bytes(plan) + (f - tiles.begin * kTile) * 4;
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        const auto weight = static_cast<signed char>(weights[i]);
        first[places[static_cast<std::size_t>(i)]] = static_cast<unsigned char>(weight);
        sum += weight;
      }
      biases[f] = bias == nullptr ? 0 : bias[f];
      multipliers[f] = input.scale * scales[f];
      start[f] = -input.zero * sum;
    }
  }
}

std::int64_t scratch_size(const BytePlan& /*plan*/) {
  return Slots::most() * ByteRunner::slot_bytes() / static_cast<std::int64_t>(sizeof(float));
}

void run(const BytePlan& plan, const void* packed, std::int64_t images, const unsigned char* in,
         const ByteResidual* residual, const ByteTarget& target, const conv::Epilogue& epilogue, float* scratch,
         int threads) {
  const Header header = header_of(plan);
  ACF_CHECK(std::memcmp(packed, &header, sizeof(header)) == 0,
            "packed weights must come from pack() of this version and of the same plan");
  if (images == 0) return;
  ACF_CHECK(epilogue.residual == nullptr || (residual == nullptr && target.planes != nullptr),
            "a residual of float32 goes with results of float32");
  ByteRunner(plan, packed, images, in, residual, target, epilogue).run(scratch, threads);
}

}  // namespace acf::narrow
