#include "narrow/depthwise.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "conv/packed.h"
#include "core/check.h"
#include "core/parallel.h"
#include "narrow/kernels.h"

namespace acf::narrow {
namespace {

using conv::ceil_div;
using conv::Parts;

constexpr std::int64_t kMostTaps = (std::int64_t{1} << 24) / (255 * 127);
constexpr std::int64_t kSliceFloats = (32 << 10) / sizeof(float);  // of rounded values: a part of the cache
constexpr std::int64_t kLine = conv::kAlignment / sizeof(float);

struct Header {
  std::uint32_t magic = 0x44464341;  // "ACFD"
  std::uint32_t version = 1;
  Quantization input;
};

// Channels, in slices.
Parts slices_of(const DepthwisePlan& plan) {
  return {plan.shape.channels, static_cast<std::int64_t>(plan.slices.size())};
}

Rounding rounding_to(const Quantization& numbers, float scale) {
  const auto zero = static_cast<float>(numbers.zero);
  return {1.0f / numbers.scale, 0.0f - zero, 255.0f - zero, scale};
}

// Of a slot: rounded channels.
std::int64_t slot_floats(const DepthwisePlan& plan) { return ceil_div(plan.between.size, kLine) * kLine; }

class DepthwiseRunner {
 public:
  DepthwiseRunner(const DepthwisePlan& plan, const void* packed, const float* in, float* out,
                  const conv::Pitch& out_pitch, const conv::Epilogue& epilogue, const Quantization* residual)
      : plan_(plan),
        packed_(static_cast<const unsigned char*>(packed)),
        in_(in),
        out_(out),
        out_pitch_(out_pitch),
        epilogue_(epilogue),
        rows_(kernels(plan.unit).rows),
        activation_(conv::activation_call(epilogue.activation, epilogue.slope)) {
    Header header;
    std::memcpy(&header, packed_, sizeof(header));
    ACF_CHECK(header.magic == Header{}.magic && header.version == Header{}.version,
              "packed weights must come from pack() of this version and of the same plan");
    input_ = rounding_to(header.input, 1.0f);
    if (residual != nullptr) residual_ = rounding_to(*residual, residual->scale);
    rounds_residual_ = residual != nullptr;
  }

  void run(std::int64_t images, float* scratch, int threads) const {
    const Parts slices = slices_of(plan_);
    const std::int64_t tasks = images * slices.count;
    Slots slots(static_cast<int>(std::min<std::int64_t>({tasks, threads, Slots::most()})));
    bool cleared[Slots::kMost] = {};
    parallel_for(tasks, slots.count(), [&](std::int64_t task) {
      slots.with([&](int slot) {
        float* memory = scratch + slot * slot_floats(plan_);
        const conv::Shape& s = plan_.shape;
        // Zero stands for zero. Nothing else writes the halo meanwhile.
        if (!cleared[slot]) {
          conv::clear_halo(memory + plan_.between.before, plan_.between, 1, slices.largest(), s.height, s.width);
          cleared[slot] = true;
        }
        run_slice(task / slices.count, task % slices.count, memory);
      });
    });
  }

 private:
  void run_slice(std::int64_t n, std::int64_t slice, float* memory) const {
    const conv::Shape& s = plan_.shape;
    const conv::Pitch& between = plan_.between.pitch;
    const conv::Part channels = slices_of(plan_)[slice];
    float* rounded = memory + plan_.between.before;
    for (std::int64_t c = 0; c < channels.size; ++c) {
      const float* from = in_ + n * plan_.in.image + (channels.begin + c) * plan_.in.plane;
      for (std::int64_t y = 0; y < s.height; ++y) {
        rows_.round(input_, from + y * plan_.in.row, rounded + c * between.plane + y * between.row, s.width);
      }
    }
    float* out = out_ + n * out_pitch_.image + channels.begin * out_pitch_.plane;
    conv::run(plan_.slices[static_cast<std::size_t>(slice)], packed_ + plan_.packed[static_cast<std::size_t>(slice)], 1,
              rounded, out, out_pitch_, {}, nullptr, 1);
    const float *multiplier = part(plan_.multipliers) + channels.begin, *bias = part(plan_.bias) + channels.begin;
    for (std::int64_t c = 0; c < channels.size; ++c) {
      const float* residual = epilogue_.residual == nullptr ? nullptr
                                                            : epilogue_.residual + n * epilogue_.residual_pitch.image +
                                                                  (channels.begin + c) * epilogue_.residual_pitch.plane;
      for (std::int64_t y = 0; y < s.out_height(); ++y) {
        rows_.finish({&activation_, out + c * out_pitch_.plane + y * out_pitch_.row, multiplier[c], bias[c],
                      residual == nullptr ? nullptr : residual + y * epilogue_.residual_pitch.row,
                      rounds_residual_ ? &residual_ : nullptr, s.out_width()});
      }
    }
  }

  const float* part(std::size_t at) const { return reinterpret_cast<const float*>(packed_ + at); }

  const DepthwisePlan& plan_;
  const unsigned char* packed_;
  const float* in_;
  float* out_;
  conv::Pitch out_pitch_;
  conv::Epilogue epilogue_;
  RowKernels rows_;
  conv::Call activation_;
  Rounding input_, residual_ = {};
  bool rounds_residual_ = false;
};

}  // namespace

bool is_depthwise(const conv::Shape& shape, std::int64_t count) {
  return shape.groups > 1 && shape.groups == shape.channels && shape.groups == shape.filters &&
         count == shape.columns() && shape.kernel_h * shape.kernel_w <= kMostTaps;
}

DepthwisePlan depthwise_plan(const conv::Shape& shape, const conv::Pitch& in, Isa isa, Unit unit) {
  conv::plan(shape, in, 1, shape.columns(), Isa::generic, conv::Method::filters_in_lanes);  // for its checks
  ACF_CHECK(is_depthwise(shape, shape.columns()), "the convolution is not depthwise");
  ACF_CHECK(kernels(unit).rows.round != nullptr, "the unit '", unit_name(unit), "' does not round values");
  DepthwisePlan plan;
  plan.shape = shape;
  plan.in = in;
  plan.unit = unit;
  const std::int64_t plane = conv::layout(1, 1, shape.height, shape.width, shape.padding).pitch.plane,
                     most = std::max<std::int64_t>(1, kSliceFloats / plane);
  const Parts slices(shape.channels, ceil_div(shape.channels, most));
  plan.between = conv::layout(1, slices.largest(), shape.height, shape.width, shape.padding);
  std::size_t end = 0;
  const auto place = [&end](std::size_t bytes) {
    const std::size_t begin = end;
    end += (bytes + conv::kAlignment - 1) / conv::kAlignment * conv::kAlignment;
    return begin;
  };
  place(sizeof(Header));
  const std::size_t floats = static_cast<std::size_t>(shape.channels) * sizeof(float);
  plan.multipliers = place(floats);
  plan.bias = place(floats);
  for (std::int64_t i = 0; i < slices.count; ++i) {
    conv::Shape slice = shape;
    slice.channels = slice.filters = slice.groups = slices[i].size;
    // Never Winograd, whose sums are not exact.
    const conv::Method method = shape.stride_w <= 2 ? conv::Method::pixels_in_lanes : conv::Method::filters_in_lanes;
    plan.slices.push_back(conv::plan(slice, plan.between.pitch, 1, slice.columns(), isa, method));
    plan.packed.push_back(place(conv::packed_size(plan.slices.back())));
  }
  plan.size = end;
  return plan;
}

std::size_t packed_size(const DepthwisePlan& plan) { return plan.size; }

// Of the same weights: where a slice finds its columns depends on the size of the planes, not on `in`.
bool same_packed(const DepthwisePlan& one, const DepthwisePlan& other) {
  return one.size == other.size && one.packed == other.packed && one.unit == other.unit &&
         one.shape.height == other.shape.height && one.shape.width == other.shape.width;
}

void pack(const DepthwisePlan& plan, const float* weights, const float* scales, const Quantization& input,
          const float* bias, void* packed) {
  check(input, "input");
  auto* bytes = static_cast<unsigned char*>(packed);
  std::memset(bytes, 0, plan.size);
  Header header;
  header.input = input;
  std::memcpy(bytes, &header, sizeof(header));
  const conv::Shape& s = plan.shape;
  auto* multipliers = reinterpret_cast<float*>(bytes + plan.multipliers);
  for (std::int64_t c = 0; c < s.channels; ++c) multipliers[c] = input.scale * scales[c];
  if (bias != nullptr) std::memcpy(bytes + plan.bias, bias, static_cast<std::size_t>(s.channels) * sizeof(float));
  const std::int64_t taps = s.kernel_h * s.kernel_w;
  std::vector<std::int64_t> columns(static_cast<std::size_t>(slices_of(plan).largest() * taps));
  std::iota(columns.begin(), columns.end(), 0);
  for (std::size_t i = 0; i < plan.slices.size(); ++i) {
    const conv::Part channels = slices_of(plan)[static_cast<std::int64_t>(i)];
    conv::pack(plan.slices[i], columns.data(), weights + channels.begin * taps, nullptr, bytes + plan.packed[i]);
  }
}

std::int64_t scratch_size(const DepthwisePlan& plan) { return Slots::most() * slot_floats(plan); }

void run(const DepthwisePlan& plan, const void* packed, std::int64_t images, const float* in, float* out,
         const conv::Pitch& out_pitch, const conv::Epilogue& epilogue, const Quantization* residual, float* scratch,
         int threads) {
  if (residual != nullptr) check(*residual, "residual");
  if (images == 0) return;
  DepthwiseRunner(plan, packed, in, out, out_pitch, epilogue, residual).run(images, scratch, threads);
}

}  // namespace acf::narrow
