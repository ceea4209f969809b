// Which kernel, which tiles: an estimate of the cycles of every way, and the weights in the order of the chosen one.
#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "conv/cost.h"
#include "conv/packed.h"
#include "core/check.h"

namespace acf::conv {
namespace {

constexpr std::int64_t kLine = kAlignment / sizeof(float);
// Floats of a plane from which on a line more does not matter.
constexpr std::int64_t kAlignedPlane = 48;

std::int64_t out_size(std::int64_t in, std::int64_t pads, std::int64_t kernel, std::int64_t stride,
                      std::int64_t dilation) {
  const std::int64_t room = in + pads - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

void check(const Plan& plan) {
  const Shape& s = plan.shape;
  const Pitch& in = plan.in;
  const Padding& p = s.padding;
  conv::check(s);
  ACF_CHECK(plan.images >= 1 && plan.images <= kMaxSize, "images must be from 1 to ", kMaxSize, ", got ", plan.images);
  ACF_CHECK(plan.columns >= 0 && plan.columns <= s.columns(), "columns must be from 0 to ", s.columns(), ", got ",
            plan.columns);
  const std::int64_t row = s.width + std::max(p.left, p.right), rows = s.height + std::max(p.top, p.bottom);
  ACF_CHECK(in.row >= row && in.row <= kMaxSize, "the row pitch must be at least the width and its padding, ", row,
            ", got ", in.row);
  ACF_CHECK(in.plane <= kMaxSize && in.plane >= (rows == 1 ? row : rows * in.row),
            "the plane pitch must be at least the height and its padding, ", rows, ", times the row pitch ", in.row,
            ", got ", in.plane);
  ACF_CHECK(in.plane <= kMaxSize / s.channels, "an image may take at most ", kMaxSize, " elements, got ", s.channels,
            " channels of ", in.plane);
}

// Loads of pixels are rarely aligned, and one that crosses a cache line counts twice.
double loads_per_vector(Load load, int lanes) {
  const auto crossing = [](int floats) { return 1 + floats / 16.0; };
  return load == Load::stretch ? crossing(lanes) : load == Load::halves ? 2 * crossing(lanes / 2) : 2 * crossing(lanes);
}

double depthwise_cycles(const Plan& plan) {
  const Kernels& table = depthwise_kernels(plan.isa);
  const Shape& s = plan.shape;
  const auto size = static_cast<double>(s.kernel_h), stride = static_cast<double>(s.stride_h);
  const double stretches = static_cast<double>(ceil_div(s.out_width(), table.lanes) * plan.images * s.channels);
  const auto block = [&](double rows) {
    const double loads =
        (rows * stride - stride + size) * size * (stride < 2 ? 1 : 2) * loads_per_vector(Load::stretch, table.lanes);
    return 10 + std::max(rows * size * size, loads) / 2;
  };
  const std::int64_t blocks = s.out_height() / kDepthwiseRows, rest = s.out_height() % kDepthwiseRows;
  return 50.0 * static_cast<double>(plan.images * s.channels) +
         stretches * (static_cast<double>(blocks) * block(kDepthwiseRows) + static_cast<double>(rest) * block(1));
}

double pixels_cycles(const Plan& plan, const Kernels& table) {
  if (plan.window == Window::depthwise) return depthwise_cycles(plan);
  const Load load = load_of(plan);
  const std::int64_t windows = window_count(plan, table.lanes, plan.images);
  const double columns = static_cast<double>(plan.columns) / static_cast<double>(plan.shape.groups);
  const double shuffles = load == Load::stretch ? 0 : load == Load::halves ? 1.4 : 2.4;
  const Parts tiles(plan.shape.filters / plan.shape.groups, plan.filter_tiles);
  const std::int64_t pixel_tiles = ceil_div(windows, max_vectors(table, load, tiles.largest()));
  const double group = over_parts(plan.shape.filters / plan.shape.groups, plan.filter_tiles, [&](std::int64_t filters) {
    return over_parts(windows, pixel_tiles, [&](std::int64_t vectors) {
      const auto f = static_cast<double>(filters), v = static_cast<double>(vectors);
      const double step = step_cycles(plan.isa, f * v, 2 + f + v * loads_per_vector(load, table.lanes), shuffles * v);
      // Loads across cache lines cost a little even where there is room for them: measured.
      return 100 + columns * (step + 0.3 * v) + f * v * 4;
    });
  });
  return group * static_cast<double>(plan.shape.groups);
}

// The share of the kernel rows that an output row needs on the average; the others meet nothing but padding.
double kernel_row_share(const Shape& s) {
  const std::int64_t out_height = s.out_height();
  std::int64_t needed = 0;
  for (std::int64_t kh = 0; kh < s.kernel_h; ++kh) {
    // Output row y reads input row y * stride + from.
    const std::int64_t from = kh * s.dilation_h - s.padding.top, last = s.height - 1 - from;
    if (last < 0) break;
    const std::int64_t first = from < 0 ? ceil_div(-from, s.stride_h) : 0;
    needed += std::max<std::int64_t>(0, std::min(out_height, last / s.stride_h + 1) - first);
  }
  return static_cast<double>(needed) / static_cast<double>(out_height * s.kernel_h);
}

double filters_cycles(const Plan& plan, const Kernels& table, double row_share) {
  const std::int64_t pixels = plan.images * plan.shape.out_height() * plan.shape.out_width();
  const bool in_row = plan.shape.out_width() % plan.tile_pixels == 0;
  const double columns =
      static_cast<double>(plan.columns) / static_cast<double>(plan.shape.groups) * (in_row ? row_share : 1);
  const int parts = kBlock / table.lanes;
  const double cycles = over_parts(pixels, pixel_tiles(plan, plan.images), [&](std::int64_t m) {
    const std::int64_t blocks = blocks_per_group(plan);
    return over_parts(blocks, ceil_div(blocks, max_blocks(table, m)), [&](std::int64_t b) {
      const auto pixel = static_cast<double>(m), vectors = static_cast<double>(b * parts);
      // Sums that are put aside between the pieces of the weights, and whatever else measurements show.
      const double rest = table.lanes == kBlock ? 1.13 : 1.25;
      return 100 + rest * columns * step_cycles(plan.isa, pixel * vectors, 4 + pixel + vectors, 0) +
             (table.lanes == kBlock ? 80 : 160) * static_cast<double>(b);
    });
  });
  return cycles * static_cast<double>(plan.shape.groups);
}

// Codes pay for layers of this many weights, in bytes: those of smaller ones stay in the second-level caches of some
// threads, from where they arrive as fast as codes are decoded.
constexpr std::int64_t kCodesFrom = 2 << 20;

// A piece of the weights must fit into what they are decoded to.
bool takes_codes(const Shape& s) { return s.groups == 1 && s.kernel_h * s.kernel_w <= kPieceColumns; }

Plan start(const Shape& shape, const Pitch& in, std::int64_t images, std::int64_t columns, Isa isa) {
  Plan plan;
  plan.shape = shape;
  plan.in = in;
  plan.isa = isa;
  plan.images = images;
  plan.columns = columns;
  check(plan);
  return plan;
}

Plan best_pixels(Plan plan) {
  const Kernels& table = kernels(plan.isa);
  plan.method = Method::pixels_in_lanes;
  Plan best = plan;
  const std::int64_t filters = plan.shape.filters / plan.shape.groups;
  for (const Window window : {Window::flat, Window::rows, Window::halves, Window::depthwise}) {
    plan.window = window;
    if (!window_fits(plan)) continue;
    const std::int64_t fewest = ceil_div(filters, max_filters(table, load_of(plan)));
    for (plan.filter_tiles = fewest; plan.filter_tiles <= std::min(filters, 2 * fewest + 1); ++plan.filter_tiles) {
      plan.cycles = pixels_cycles(plan, table);
      consider(best, plan);
    }
  }
  return best;
}

Plan best_filters(Plan plan) {
  const Kernels& table = kernels(plan.isa);
  const double row_share = kernel_row_share(plan.shape);
  plan.method = Method::filters_in_lanes;
  Plan best = plan;
  for (plan.tile_pixels = 1; plan.tile_pixels <= kMaxPixels && max_blocks(table, plan.tile_pixels) > 0;
       ++plan.tile_pixels) {
    plan.cycles = filters_cycles(plan, table, row_share);
    consider(best, plan);
  }
  return best;
}

// The same with codes, if these save time: weights arrive while others are computed with, codes are decoded in between.
Plan with_codes(Plan plan, int code_bits) {
  const std::int64_t bytes = plan.columns * plan.shape.filters * static_cast<std::int64_t>(sizeof(float));
  if (code_bits == 0 || bytes < kCodesFrom || !takes_codes(plan.shape)) return plan;
  Plan coded = plan;
  coded.code_bits = code_bits;
  return plan.cycles + arrival_cycles(coded) < std::max(plan.cycles, arrival_cycles(plan)) ? coded : plan;
}

std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void check(const Shape& s) {
  for (const std::int64_t size : {s.channels, s.height, s.width, s.filters, s.groups, s.kernel_h, s.kernel_w,
                                  s.stride_h, s.stride_w, s.dilation_h, s.dilation_w}) {
    ACF_CHECK(size >= 1 && size <= kMaxSize, "sizes of a convolution must be from 1 to ", kMaxSize, ", got ", size);
  }
  const Padding& p = s.padding;
  for (const std::int64_t pad : {p.top, p.left, p.bottom, p.right}) {
    ACF_CHECK(pad >= 0 && pad <= kMaxSize, "padding must be from 0 to ", kMaxSize, ", got ", pad);
  }
  ACF_CHECK(s.channels % s.groups == 0 && s.filters % s.groups == 0, "groups must divide channels ", s.channels,
            " and filters ", s.filters, ", got ", s.groups);
  ACF_CHECK(s.kernel_h <= kMaxSize / s.kernel_w && s.channels <= kMaxSize / (s.kernel_h * s.kernel_w),
            "a convolution may have at most ", kMaxSize, " columns, got ", s.channels, " x ", s.kernel_h, " x ",
            s.kernel_w);
  ACF_CHECK(s.out_height() >= 1 && s.out_width() >= 1, "the kernel does not fit into the padded input of ",
            s.height + p.top + p.bottom, " x ", s.width + p.left + p.right);
}

// ---- sizes ----------------------------------------------------------------------------------------------------------

std::int64_t Shape::out_height() const {
  return out_size(height, padding.top + padding.bottom, kernel_h, stride_h, dilation_h);
}
std::int64_t Shape::out_width() const {
  return out_size(width, padding.left + padding.right, kernel_w, stride_w, dilation_w);
}

Layout layout(std::int64_t images, std::int64_t channels, std::int64_t height, std::int64_t width,
              const Padding& padding) {
  Layout layout;
  Pitch& pitch = layout.pitch;
  pitch.row = width + std::max(padding.left, padding.right);
  pitch.plane = (height + std::max(padding.top, padding.bottom)) * pitch.row;
  if (pitch.plane >= kAlignedPlane) pitch.plane = ceil_div(pitch.plane, kLine) * kLine;
  // Planes a multiple of 4 KiB apart would all fall into the same few sets of the cache.
  constexpr std::int64_t kWay = 4096 / sizeof(float);
  if (pitch.plane >= kWay / 2 && (pitch.plane + kLine) % (kWay / 2) <= 2 * kLine) pitch.plane += 3 * kLine;
  pitch.image = channels * pitch.plane;
  layout.before = ceil_div(padding.top * pitch.row + padding.left, kLine) * kLine;
  layout.size = layout.before + images * pitch.image + padding.bottom * pitch.row + padding.right + kSlack;
  return layout;
}

void clear_halo(float* data, const Layout& layout, std::int64_t images, std::int64_t channels, std::int64_t height,
                std::int64_t width) {
  const Pitch& pitch = layout.pitch;
  float* done = data - layout.before;
  const auto zero_up_to = [&done](float* end) {
    if (end > done) std::memset(done, 0, static_cast<std::size_t>(end - done) * sizeof(float));
  };
  for (std::int64_t plane = 0; plane < images * channels; ++plane) {
    for (std::int64_t y = 0; y < height; ++y) {
      float* row = data + plane / channels * pitch.image + plane % channels * pitch.plane + y * pitch.row;
      zero_up_to(row);
      done = row + width;
    }
  }
  zero_up_to(data - layout.before + layout.size);
}

// ---- plans ----------------------------------------------------------------------------------------------------------

bool window_fits(const Plan& plan) {
  const std::int64_t stride_w = plan.shape.stride_w;
  switch (plan.window) {
    case Window::flat: return plan.shape.stride_h == 1 && stride_w == 1 && plan.shape.out_width() <= plan.in.row;
    case Window::rows: return stride_w == 1;
    case Window::halves: return stride_w <= 2;
    case Window::depthwise: return depthwise_index(plan.shape) >= 0 && plan.columns == plan.shape.columns();
  }
  return false;
}

int depthwise_index(const Shape& s) {
  if (s.groups != s.channels || s.groups != s.filters || s.kernel_h != s.kernel_w || s.stride_h != s.stride_w ||
      s.stride_w > 2 || s.dilation_h != 1 || s.dilation_w != 1) {
    return -1;
  }
  int i = 0;
  for (const int size : kDepthwiseSizes) {
    if (size == s.kernel_h) return i;
    ++i;
  }
  return -1;
}

Load load_of(const Plan& plan) {
  if (plan.window != Window::halves) return Load::stretch;
  return plan.shape.stride_w == 1 ? Load::halves : Load::strided;
}

std::int64_t windows_per_image(const Plan& plan, std::int64_t lanes) {
  const std::int64_t height = plan.shape.out_height(), width = plan.shape.out_width();
  switch (plan.window) {
    case Window::flat: return ceil_div((height - 1) * plan.in.row + width, lanes);
    case Window::rows: return height * ceil_div(width, lanes);
    case Window::halves: return height * ceil_div(width, lanes / 2);  // half ones
    case Window::depthwise: return 1;
  }
  return 0;
}

std::int64_t window_count(const Plan& plan, std::int64_t lanes, std::int64_t images) {
  const std::int64_t windows = images * windows_per_image(plan, lanes);
  return plan.window == Window::halves ? ceil_div(windows, 2) : windows;
}

std::int64_t max_vectors(const Kernels& table, Load load, std::int64_t filters) {
  std::int64_t vectors = 0;
  while (vectors < kMaxVectors && table.pixels_in_lanes[static_cast<int>(load)][filters - 1][vectors] != nullptr) {
    ++vectors;
  }
  return vectors;
}

std::int64_t max_filters(const Kernels& table, Load load) {
  std::int64_t filters = kMaxFilters;
  while (max_vectors(table, load, filters) == 0) --filters;
  return filters;
}

std::int64_t max_blocks(const Kernels& table, std::int64_t pixels) {
  std::int64_t blocks = 0;
  while (blocks < kMaxBlocks && table.filters_in_lanes[0][pixels - 1][blocks] != nullptr) ++blocks;
  return blocks;
}

std::int64_t blocks_per_group(const Plan& plan) { return ceil_div(plan.shape.filters / plan.shape.groups, kBlock); }

std::int64_t pixel_tiles(const Plan& plan, std::int64_t images) {
  return ceil_div(images * plan.shape.out_height() * plan.shape.out_width(), plan.tile_pixels);
}

namespace {

bool fits(const Plan& plan, Method method) {
  switch (method) {
    case Method::filters_in_lanes: return true;
    case Method::pixels_in_lanes: return plan.shape.stride_w <= 2;
    case Method::winograd_tiles_in_lanes: return winograd_fits(plan);
    case Method::winograd_filters_in_lanes: return winograd_fits(plan) && winograd_is_few(plan);
  }
  return false;
}

Plan best_of(const Plan& empty, Method method, int code_bits) {
  if (method == Method::winograd_tiles_in_lanes) return best_winograd_tiles(empty);
  if (method == Method::winograd_filters_in_lanes) return best_winograd_filters(empty);
  Plan best = method == Method::pixels_in_lanes ? best_pixels(empty) : with_codes(best_filters(empty), code_bits);
  best.cycles += arrival_cycles(best);
  return best;
}

}  // namespace

std::vector<Method> methods(const Shape& shape, const Pitch& in, std::int64_t images, std::int64_t columns, Isa isa) {
  const Plan empty = start(shape, in, images, columns, isa);
  std::vector<Method> found;
  for (const Method method : {Method::filters_in_lanes, Method::pixels_in_lanes, Method::winograd_tiles_in_lanes,
                              Method::winograd_filters_in_lanes}) {
    if (fits(empty, method)) found.push_back(method);
  }
  return found;
}

Plan plan(const Shape& shape, const Pitch& in, std::int64_t images, std::int64_t columns, Isa isa, Method method,
          int code_bits) {
  const Plan empty = start(shape, in, images, columns, isa);
  ACF_CHECK(method != Method::pixels_in_lanes || fits(empty, method),
            "pixels_in_lanes needs a horizontal stride of 1 or 2, got ", shape.stride_w);
  ACF_CHECK(!is_winograd(method) || winograd_fits(empty),
            "winograd needs a 3x3 kernel of stride 1 without groups, and a column");
  ACF_CHECK(fits(empty, method), "winograd with filters in lanes needs fewer tiles of 4x4 outputs than lanes");
  return best_of(empty, method, code_bits);
}

Plan plan(const Shape& shape, const Pitch& in, std::int64_t images, std::int64_t columns, Isa isa, int code_bits) {
  const Plan empty = start(shape, in, images, columns, isa);
  Plan best = empty;
  for (const Method method : methods(shape, in, images, columns, isa))
    consider(best, best_of(empty, method, code_bits));
  return best;
}

double arrival_cycles(const Plan& plan) {
  if (is_winograd(plan.method)) return winograd_arrival_cycles(plan);
  const std::int64_t each = plan.shape.filters / plan.shape.groups;
  const auto weights = static_cast<double>(plan.columns * each);
  return plan.code_bits == 0 ? streaming_cycles(weights)
                             : streaming_cycles(weights * plan.code_bits / 32) + decode_cycles(plan);
}

double decode_cycles(const Plan& plan) {
  const std::int64_t blocks = plan.columns * blocks_per_group(plan), parts = kBlock / kernels(plan.isa).lanes,
                     rounds = ceil_div(pixel_tiles(plan, plan.images), kTilesTogether);
  const double each = plan.isa == Isa::generic ? 16 : 2;  // of a register: choosing from two values, and storing
  return static_cast<double>(blocks * rounds * parts) * each * ((1 << plan.code_bits) - 1);
}

// ---- packing --------------------------------------------------------------------------------------------------------

PackedLayout packed_layout(const Plan& plan) {
  const Shape& s = plan.shape;
  const bool blocks = plan.method == Method::filters_in_lanes;
  const std::int64_t group_filters = blocks ? blocks_per_group(plan) * kBlock : s.filters / s.groups;
  PackedLayout layout;
  // Of two neighbouring pieces of a group one has more than half of what fits.
  const std::int64_t pieces = s.groups + plan.columns / (kPieceColumns / 2);
  layout.groups = aligned(sizeof(PackedHeader));
  layout.rows = aligned(layout.groups + static_cast<std::size_t>(s.groups + 1) * 2 * sizeof(std::int32_t));
  layout.offsets = aligned(layout.rows + static_cast<std::size_t>(pieces * (s.kernel_h + 1)) * sizeof(std::int32_t));
  layout.bias = aligned(layout.offsets + static_cast<std::size_t>(plan.columns) * sizeof(std::int32_t));
  layout.weights = aligned(layout.bias + static_cast<std::size_t>(s.groups * group_filters) * sizeof(float));
  layout.size =
      plan.code_bits == 0
          ? aligned(layout.weights + static_cast<std::size_t>(plan.columns * group_filters) * sizeof(float))
          : aligned(layout.weights + static_cast<std::size_t>(blocks_per_group(plan)) *
                                         (static_cast<std::size_t>(value_floats(plan)) * sizeof(float) +
                                          static_cast<std::size_t>(plan.columns * plan.code_bits) * sizeof(Code)));
  return layout;
}

PackedHeader packed_header(const Plan& plan) {
  PackedHeader header;
  header.isa = static_cast<std::uint32_t>(plan.isa);
  header.method = static_cast<std::uint32_t>(plan.method);
  const Shape& s = plan.shape;
  const std::int64_t numbers[] = {plan.columns,     plan.filter_tiles, plan.in.row,   plan.in.plane, s.channels,
                                  s.height,         s.width,           s.filters,     s.groups,      s.kernel_h,
                                  s.kernel_w,       s.dilation_h,      s.dilation_w,  s.padding.top, s.padding.left,
                                  s.padding.bottom, s.padding.right,   plan.code_bits};
  static_assert(sizeof(numbers) == sizeof(header.numbers));
  std::memcpy(header.numbers, numbers, sizeof(numbers));
  return header;
}

// The end of the piece that begins at `first`: whole channels.
const std::int64_t* end_of_piece(const std::int64_t* first, const std::int64_t* last, std::int64_t taps) {
  const std::int64_t* end = first;
  while (end != last) {
    const std::int64_t* channel_end = std::lower_bound(end, last, (*end / taps + 1) * taps);
    if (end != first && channel_end - first > kPieceColumns) break;
    end = channel_end;
  }
  return end;
}

// Values are told apart by these: 0 and -0 are two, and a NaN is one.
std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The values of every filter, and the code of every weight.
class Codes {
 public:
  // weights: (filters, columns); values: (blocks, 1 << bits, kBlock).
  Codes(const Plan& plan, const float* weights, float* values) : plan_(plan), values_(values) {
    const std::int64_t filters = plan.shape.filters;
    counts_.resize(static_cast<std::size_t>(filters));
    for (std::int64_t f = 0; f < filters; ++f) {
      for (std::int64_t c = 0; c < plan.columns; ++c) {
        const float weight = weights[f * plan.columns + c];
        if (of(f, weight) >= 0) continue;
        int& count = counts_[static_cast<std::size_t>(f)];
        ACF_CHECK(count < 1 << plan.code_bits, "filter ", f, " has more values than codes of ", plan.code_bits,
                  " bits stand for");
        value(f, count++) = weight;
      }
    }
  }

  // -1 if there is none.
  int of(std::int64_t filter, float weight) const {
    for (int code = 0; code < counts_[static_cast<std::size_t>(filter)]; ++code) {
      if (bits_of(value(filter, code)) == bits_of(weight)) return code;
    }
    return -1;
  }

 private:
  float& value(std::int64_t filter, int code) const {
    return values_[filter / kBlock * value_floats(plan_) + code * kBlock + filter % kBlock];
  }

  const Plan& plan_;
  float* values_;
  std::vector<int> counts_;
};

int code_bits(std::int64_t filters, std::int64_t columns, const float* weights) {
  std::size_t most = 1;
  std::vector<std::uint32_t> values;
  for (std::int64_t f = 0; f < filters; ++f) {
    values.clear();
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::uint32_t weight = bits_of(weights[f * columns + c]);
      if (std::find(values.begin(), values.end(), weight) != values.end()) continue;
      if (values.size() == std::size_t{1} << kMaxCodeBits) return 0;
      values.push_back(weight);
    }
    most = std::max(most, values.size());
  }
  return most <= 2 ? 1 : 2;
}

std::size_t packed_size(const Plan& plan) {
  return is_winograd(plan.method) ? winograd_packed_size(plan) : packed_layout(plan).size;
}

void pack(const Plan& plan, const std::int64_t* columns, const float* weights, const float* bias, void* packed) {
  auto* bytes = static_cast<unsigned char*>(packed);
  std::memset(bytes, 0, packed_size(plan));
  const PackedHeader header = packed_header(plan);
  std::memcpy(bytes, &header, sizeof(header));
  if (is_winograd(plan.method)) return pack_winograd(plan, columns, weights, bias, packed);

  const Shape& s = plan.shape;
  const bool blocks = plan.method == Method::filters_in_lanes;
  const PackedLayout layout = packed_layout(plan);
  auto* groups = reinterpret_cast<std::int32_t*>(bytes + layout.groups);
  auto* rows = reinterpret_cast<std::int32_t*>(bytes + layout.rows);
  auto* offsets = reinterpret_cast<std::int32_t*>(bytes + layout.offsets);
  auto* packed_bias = reinterpret_cast<float*>(bytes + layout.bias);
  auto* packed_weights = reinterpret_cast<float*>(bytes + layout.weights);
  auto* packed_codes = reinterpret_cast<Code*>(packed_weights + blocks_per_group(plan) * value_floats(plan));
  std::optional<Codes> codes;
  if (plan.code_bits > 0) codes.emplace(plan, weights, packed_weights);

  const std::int64_t taps = s.kernel_h * s.kernel_w, group_columns = s.channels / s.groups * taps,
                     group_filters = s.filters / s.groups;
  // The filters of a tile lie side by side in a step of its panel.
  const std::int64_t tiles = blocks ? blocks_per_group(plan) : plan.filter_tiles;
  const std::int64_t padded_filters = blocks ? tiles * kBlock : group_filters;
  const std::int64_t *next = columns, *last = columns + plan.columns;
  std::vector<const std::int64_t*> order;  // of the columns of a piece
  std::int64_t pieces = 0;
  for (std::int64_t g = 0; g < s.groups; ++g) {
    const std::int64_t *first = next, *group_last = std::lower_bound(first, last, (g + 1) * group_columns);
    const std::int64_t begin = first - columns, count = group_last - first;
    groups[2 * g] = static_cast<std::int32_t>(begin);
    groups[2 * g + 1] = static_cast<std::int32_t>(pieces);
    std::int64_t k = 0;
    do {
      const std::int64_t* piece_last = end_of_piece(next, group_last, taps);
      std::int32_t* row = rows + pieces++ * (s.kernel_h + 1);
      order.clear();
      for (const std::int64_t* column = next; column != piece_last; ++column) order.push_back(column);
      std::stable_sort(order.begin(), order.end(),
                       [taps](const std::int64_t* a, const std::int64_t* b) { return *a % taps < *b % taps; });
      std::int64_t begun = 0;  // kernel rows
      for (const std::int64_t* column : order) {
        const std::int64_t tap = *column % taps, kh = tap / s.kernel_w, kw = tap % s.kernel_w;
        while (begun <= kh) row[begun++] = static_cast<std::int32_t>(k);
        offsets[begin + k] = static_cast<std::int32_t>(4 * (*column / taps * plan.in.plane +
                                                            (kh * s.dilation_h - s.padding.top) * plan.in.row +
                                                            kw * s.dilation_w - s.padding.left));
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
          const Part part = blocks ? Part{tile * kBlock, std::min<std::int64_t>(kBlock, group_filters - tile * kBlock)}
                                   : Parts(group_filters, tiles)[tile];
          if (codes) {
            Code* bits = packed_codes + (tile * plan.columns + k) * plan.code_bits;
            for (std::int64_t f = 0; f < part.size; ++f) {
              const std::int64_t filter = part.begin + f;
              const int code = codes->of(filter, weights[filter * count + (column - first)]);
              for (int i = 0; i < plan.code_bits; ++i) bits[i] |= static_cast<Code>((code >> i & 1) << f);
            }
            continue;
          }
          const std::int64_t width = blocks ? kBlock : part.size;
          float* step = packed_weights + begin * padded_filters + part.begin * count + k * width;
          for (std::int64_t f = 0; f < part.size; ++f) step[f] = weights[(part.begin + f) * count + (column - first)];
        }
        ++k;
      }
      while (begun <= s.kernel_h) row[begun++] = static_cast<std::int32_t>(k);
      next = piece_last;
    } while (next != group_last);
    if (bias != nullptr) {
      std::memcpy(packed_bias + g * padded_filters, bias + g * group_filters,
                  static_cast<std::size_t>(group_filters) * sizeof(float));
    }
    weights += group_filters * count;
  }
  groups[2 * s.groups] = static_cast<std::int32_t>(plan.columns);
  groups[2 * s.groups + 1] = static_cast<std::int32_t>(pieces);
}

}  // namespace acf::conv
