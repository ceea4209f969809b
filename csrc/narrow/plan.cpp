// Sizes, the choice between gathering and reading in place, and packing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "narrow/packed.h"

namespace acf::narrow {
namespace {

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

// Rows of columns of several channels side by side, numbered tap by tap.
class Rows {
 public:
  // Of those that hold any of the columns.
  Rows(const conv::Shape& shape, Number number, std::int64_t count, const std::int64_t* columns)
      : taps_(shape.kernel_h * shape.kernel_w),
        channels_(columns_per_row(number)),
        groups_(ceil_div(shape.channels, channels_)),
        row_(static_cast<std::size_t>(taps_ * groups_), -1) {
    for (std::int64_t i = 0; i < count; ++i) row_[place(columns[i])] = 0;
    for (auto& row : row_) {
      if (row == 0) row = count_++;
    }
  }

  std::int64_t count() const { return count_; }
  std::int64_t column(std::int64_t column) const {
    return row_[place(column)] * channels_ + column / taps_ % channels_;
  }
  // body(row, group of channels, tap)
  template <class Body>
  void each(const Body& body) const {
    for (std::int64_t tap = 0; tap < taps_; ++tap) {
      for (std::int64_t group = 0; group < groups_; ++group) {
        const std::int64_t row = row_[static_cast<std::size_t>(tap * groups_ + group)];
        if (row >= 0) body(row, group, tap);
      }
    }
  }

 private:
  std::size_t place(std::int64_t column) const {
    return static_cast<std::size_t>(column % taps_ * groups_ + column / taps_ / channels_);
  }

  std::int64_t taps_, channels_, groups_, count_ = 0;
  std::vector<std::int64_t> row_;
};

// In place, all columns are there: taps, then channels, in whole steps.
std::int64_t column_in_place(const Plan& plan, std::int64_t column) {
  const std::int64_t taps = plan.shape.kernel_h * plan.shape.kernel_w, tap = column % taps, c = column / taps,
                     n = columns_per_row(plan.number), group = c / n, step = tap * channel_blocks(plan) + group / kTile;
  return (step * kTile + group % kTile) * n + c % n;
}

// What makes images narrow: two tables of offsets of columns, for all groups of channels and for the last one.
void put_positions(const Plan& plan, std::int32_t* offsets) {
  const std::int64_t n = columns_per_row(plan.number), last = (plan.shape.channels - 1) % n, rows = position_rows(plan);
  for (std::int64_t i = 0; i < 2 * rows * n; ++i) {
    const std::int64_t channel = i % n, row = i / n % rows;
    // What a last group lacks is read from its first channel, and meets weights of zero.
    const bool lacks = i >= rows * n && channel > last;
    offsets[i] = static_cast<std::int32_t>((lacks ? 0 : channel) * plan.in.plane + row * kTile);
  }
}

// From a pixel's first position to that of a tap.
std::int64_t tap_position(const Plan& plan, std::int64_t tap) {
  const conv::Shape& s = plan.shape;
  return tap / s.kernel_w * s.dilation_h * plan.in.row + tap % s.kernel_w * s.dilation_w;
}

void put_rows(const Plan& plan, const Rows& all, Row* rows) {
  all.each([&](std::int64_t row, std::int64_t group, std::int64_t tap) {
    rows[row] = {static_cast<std::int32_t>(group), static_cast<std::int32_t>(tap_position(plan, tap))};
  });
}

void put_places(const Plan& plan, std::int64_t* places) {
  for (std::int64_t step = 0; step < plan.steps; ++step) {
    const std::int64_t tap = step / channel_blocks(plan), block = step % channel_blocks(plan);
    places[step] = kPositionBytes * (block * kTile * position_plane(plan) + tap_position(plan, tap));
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
  const Rows rows(s, plan.number, plan.reading == Reading::narrow ? count : 0, columns);
  if (plan.reading != Reading::wide) put_positions(plan, offsets);
  if (plan.reading == Reading::narrow) put_rows(plan, rows, reinterpret_cast<Row*>(bytes + at.rows));
  if (plan.reading == Reading::in_place) put_places(plan, reinterpret_cast<std::int64_t*>(bytes + at.places));
  const auto place_of = [&](std::int64_t first, std::int64_t i) {
    switch (plan.reading) {
      case Reading::narrow: return rows.column(columns[i]);
      case Reading::in_place: return column_in_place(plan, i);
      default: return i - first;
    }
  };
  for (std::int64_t g = 0, k = 0; g < s.groups; ++g, tile += filter_tiles(plan) * weight_bytes(plan)) {
    const std::int64_t first = k;
    for (; k < count && columns[k] < (g + 1) * (s.columns() / s.groups); ++k) {
      if (plan.reading != Reading::wide) continue;
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
        put(plan, tile + f / kTile * weight_bytes(plan), f % kTile, place_of(first, first + i), weights[i]);
        if (scales != nullptr) sum += static_cast<std::int32_t>(weights[i]);
      }
      biases[g * padded + f] = bias == nullptr ? 0 : bias[filter];
      if (scales == nullptr) continue;
      multipliers[g * padded + f] = input.scale * scales[filter];
      corrections[g * padded + f] = zero * sum;
    }
  }
}

// Measured on one machine, roughly: for choosing between bfloat16 and float32, and the number of tasks.
double estimated_cycles(const Plan& plan) {
  const conv::Shape& s = plan.shape;
  const auto tiles = static_cast<double>(pixel_tiles(plan, plan.images)), steps = static_cast<double>(plan.steps),
             filters = static_cast<double>(filter_tiles(plan)), groups = static_cast<double>(s.groups);
  const bool apart = s.stride_w > 2 || s.out_width() < 4;
  const double read = apart ? 4 : s.stride_w > 1 ? 2 : 1.2;
  const double gather = kTile * (plan.number == Number::bfloat16 ? 4.0 : 12.0) * read;
  const double product = plan.unit == Unit::amx       ? 18
                         : plan.unit == Unit::avx2    ? 64.0 * kTile
                         : plan.unit == Unit::generic ? 500.0 * kTile
                                                      : 9.0 * kTile;
  const double made_narrow =
      static_cast<double>(channel_groups(plan) * position_rows(plan)) * (plan.number == Number::bfloat16 ? 5.0 : 8.0);
  if (plan.reading == Reading::in_place) {
    const auto image_tiles = static_cast<double>(position_tiles(plan)), images = static_cast<double>(plan.images);
    const double all = image_tiles * filters * (60 + steps * 24 + 8.0 * kTile);
    return images * (made_narrow + all) + filters * static_cast<double>(weight_bytes(plan)) / 5;
  }
  const double finish = 5.0 * static_cast<double>(std::min<std::int64_t>(kTile, group_filters(plan)));
  constexpr double kBytesPerCycle = 5;  // of weights that come from memory
  const bool wide = plan.reading == Reading::wide;
  return groups *
             (tiles * (150 + steps * (wide ? gather : 2.0 * kTile * read) + filters * (40 + steps * product + finish)) +
              filters * static_cast<double>(weight_bytes(plan)) / kBytesPerCycle) +
         (wide ? 0 : static_cast<double>(plan.images) * made_narrow);
}

bool can_be_in_place(const Plan& plan, std::int64_t count) {
  const conv::Shape& s = plan.shape;
  constexpr std::int64_t kMostBytes = 768 << 10;  // of the second-level cache
  return kernels(plan.unit).order == Order::by_step && s.groups == 1 && count == s.columns() && s.stride_h == 1 &&
         s.stride_w == 1 && s.kernel_h * s.kernel_w > 1 && s.out_width() <= plan.in.row &&
         image_bytes(plan) <= kMostBytes;
}

// A unit that loads tiles by rows reads in place wherever it can.
bool can_be_narrow(const Plan& plan, std::int64_t count) {
  const conv::Shape& s = plan.shape;
  if (kernels(plan.unit).order == Order::by_step && (s.kernel_h * s.kernel_w == 1 || can_be_in_place(plan, count))) {
    return false;
  }
  // What was pruned meets weights of zero in such rows, and may be infinite in bfloat16.
  if (plan.number == Number::bfloat16 && count != s.columns()) return false;
  constexpr std::int64_t kMostBytes = 4 << 20;  // of a block: far more than the second-level cache gains nothing
  return s.groups == 1 && s.out_width() <= plan.in.row &&
         channel_groups(plan) <= kMostBytes / kPositionBytes / block_positions(plan);
}

}  // namespace

std::vector<Plan> plans(const conv::Shape& shape, const conv::Pitch& in, std::int64_t images, std::int64_t count,
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
  std::vector<Plan> ways = {made};
  if (can_be_narrow(made, count)) {
    made.reading = Reading::narrow;
    made.rows = Rows(shape, number, count, columns).count();
    made.steps = std::max<std::int64_t>(1, ceil_div(made.rows, kTile));
    ways.push_back(made);
  }
  if (can_be_in_place(made, count)) {
    made.reading = Reading::in_place;
    made.rows = std::min<std::int64_t>(kTile, channel_groups(made));
    made.steps = shape.kernel_h * shape.kernel_w * channel_blocks(made);
    ways.push_back(made);
  }
  for (Plan& way : ways) way.cycles = estimated_cycles(way);
  std::stable_sort(ways.begin(), ways.end(), [](const Plan& a, const Plan& b) { return a.cycles < b.cycles; });
  return ways;
}

Plan plan(const conv::Shape& shape, const conv::Pitch& in, std::int64_t images, std::int64_t count,
          const std::int64_t* columns, Number number, Unit unit) {
  return plans(shape, in, images, count, columns, number, unit).front();
}

std::size_t packed_size(const Plan& plan) { return packed_layout(plan).size; }

bool same_packed(const Plan& one, const Plan& other) {
  const Header first = header_of(one), second = header_of(other);
  return std::memcmp(&first, &second, sizeof(first)) == 0;
}

void pack(const Plan& plan, std::int64_t count, const std::int64_t* columns, const float* weights, const float* bias,
          void* packed) {
  ACF_CHECK(plan.number == Number::bfloat16, "8-bit weights need scales");
  pack_all(plan, count, columns, weights, nullptr, {}, bias, packed);
}

void check(const Quantization& numbers, const char* what) {
  ACF_CHECK(std::isnormal(numbers.scale) && numbers.scale > 0, "the scale of the ", what, " must be positive, got ",
            numbers.scale);
  ACF_CHECK(numbers.zero >= 0 && numbers.zero <= 255, "the zero of the ", what, " must be from 0 to 255, got ",
            numbers.zero);
}

void pack(const Plan& plan, std::int64_t count, const std::int64_t* columns, const float* weights, const float* scales,
          const Quantization& input, const float* bias, void* packed) {
  ACF_CHECK(plan.number == Number::int8, "bfloat16 weights have no scales");
  check(input, "input");
  pack_all(plan, count, columns, weights, scales, input, bias, packed);
}

}  // namespace acf::narrow
