// Convolutions and linear layers.
#include <algorithm>
#include <cmath>
#include <new>
#include <variant>

#include "core/check.h"
#include "core/parallel.h"
#include "engine/operation.h"
#include "narrow/depthwise.h"

namespace acf::engine {
namespace {

using Packed = const void*;

static_assert(static_cast<Way>(conv::Method::pixels_in_lanes) == Way::pixels_in_lanes &&
              static_cast<Way>(conv::Method::filters_in_lanes) == Way::filters_in_lanes &&
              static_cast<Way>(conv::Method::winograd_tiles_in_lanes) == Way::winograd_tiles_in_lanes &&
              static_cast<Way>(conv::Method::winograd_filters_in_lanes) == Way::winograd_filters_in_lanes);

// A convolution as it will be computed, with its weights.
class Planned {
 public:
  using Plan = std::variant<conv::Plan, narrow::Plan, narrow::DepthwisePlan>;

  Planned(Plan plan, Packed packed, const std::optional<narrow::Quantization>& residual = {})
      : plan_(std::move(plan)), packed_(packed), residual_(residual) {}

  std::int64_t scratch() const {
    return std::visit([](const auto& plan) { return scratch_size(plan); }, plan_);
  }
  Way way() const {
    const auto* wide = std::get_if<conv::Plan>(&plan_);
    return wide != nullptr ? static_cast<Way>(wide->method) : Way::narrow;
  }
  void run(std::int64_t images, const float* in, float* out, const conv::Pitch& out_pitch,
           const conv::Epilogue& epilogue, float* scratch, int threads) const {
    if (const auto* wide = std::get_if<conv::Plan>(&plan_)) {
      return conv::run(*wide, packed_, images, in, out, out_pitch, epilogue, scratch, threads);
    }
    const narrow::Quantization* residual = residual_ && epilogue.residual != nullptr ? &*residual_ : nullptr;
    const auto run_narrow = [&](const auto& plan) {
      narrow::run(plan, packed_, images, in, out, out_pitch, epilogue, residual, scratch, threads);
    };
    if (const auto* plan = std::get_if<narrow::Plan>(&plan_)) return run_narrow(*plan);
    run_narrow(std::get<narrow::DepthwisePlan>(plan_));
  }

 private:
  Plan plan_;
  Packed packed_;
  std::optional<narrow::Quantization> residual_;
};

// Weights packed for a plan, and for all plans that read the same: those for other numbers of samples, mostly.
class PackedWeights {
 public:
  explicit PackedWeights(Weights weights, Arithmetic arithmetic = {})
      : weights_(std::move(weights)), arithmetic_(std::move(arithmetic)) {
    const auto size = static_cast<std::int64_t>(weights_.values.size());
    if (weights_.filters > 0 && size == weights_.filters * count()) {
      code_bits_ = conv::code_bits(weights_.filters, count(), weights_.values.data());
    }
  }

  const Weights& weights() const { return weights_; }

  void check_arithmetic() const {
    ACF_CHECK(arithmetic_.precision == Precision::int8 || !arithmetic_.residual,
              "residuals are rounded beside 8-bit weights alone");
    if (arithmetic_.precision != Precision::int8) return;
    const auto count = static_cast<std::int64_t>(arithmetic_.scales.size());
    ACF_CHECK(count == weights_.filters, "there must be ", weights_.filters, " scales, got ", count);
    for (const float w : weights_.values) {
      ACF_CHECK(w >= -127 && w <= 127 && w == std::trunc(w), "8-bit weights are integers from -127 to 127, got ", w);
    }
  }

  // In the way that is preferred, if it can be, or else in the one that is estimated to be quickest.
  Planned plan(const conv::Shape& shape, const conv::Pitch& pitch, std::int64_t images, const Machine& machine,
               std::optional<Way> preferred) {
    const auto narrow_plan = [&](narrow::Number number) {
      return narrow::plan(shape, pitch, images, count(), weights_.columns.data(), number, unit(number, machine));
    };
    if (arithmetic_.precision == Precision::int8) {
      if (narrow::is_depthwise(shape, count())) return depthwise(shape, pitch, machine);
      return with_weights(narrow_plan(narrow::Number::int8), machine);
    }
    const conv::Plan wide = wide_plan(shape, pitch, images, machine, preferred);
    if (arithmetic_.precision == Precision::bfloat16 && !narrow::units(machine.isa, narrow::Number::bfloat16).empty()) {
      const narrow::Plan plan = narrow_plan(narrow::Number::bfloat16);
      if (preferred ? *preferred == Way::narrow : plan.cycles < wide.cycles) return with_weights(plan, machine);
    }
    return {wide, of(wide, machine.weights)};
  }

  const narrow::Quantization& input() const { return arithmetic_.input; }
  const narrow::Quantization* residual() const { return arithmetic_.residual ? &*arithmetic_.residual : nullptr; }

  // Whether it is computed on bytes where it can be, and of which numbers: unless most of the columns in the rows that
  // are read were pruned.
  const narrow::Quantization* bytes(const conv::Shape& shape, const Machine& machine) const {
    if (arithmetic_.precision != Precision::int8 || !byte_unit(machine)) return nullptr;
    const std::int64_t columns = narrow::byte_columns(shape, count(), weights_.columns.data());
    return columns > 0 && 2 * columns <= 3 * (count() + 2) ? &arithmetic_.input : nullptr;
  }

  // AMX multiplies so much faster than the unit that computes on bytes there that depthwise layers alone gain by them.
  Operation::Gain gain_of_bytes(const conv::Shape& shape, const Machine& machine) const {
    if (bytes(shape, machine) == nullptr) return Operation::Gain::none;
    const bool quicker = narrow::is_depthwise(shape, count()) || narrow::has_bytes(unit(narrow::Number::int8, machine));
    return quicker ? Operation::Gain::quicker : Operation::Gain::slower;
  }

  std::pair<narrow::BytePlan, Packed> byte_plan(const conv::Shape& shape, const narrow::ByteLayout& in,
                                                const Machine& machine) {
    const std::int64_t* columns = weights_.columns.data();
    const narrow::BytePlan plan = narrow::byte_plan(shape, in, count(), columns, *byte_unit(machine));
    for (const auto& [other, packed] : on_bytes_) {
      if (narrow::same_packed(other, plan)) return {plan, packed};
    }
    void* packed = machine.weights.take(narrow::packed_size(plan));
    narrow::pack(plan, count(), columns, weights_.values.data(), arithmetic_.scales.data(), arithmetic_.input, bias(),
                 packed);
    on_bytes_.emplace_back(plan, packed);
    return {plan, packed};
  }

  Packed of(const conv::Plan& plan, Pool& memory) {
    for (const auto& [other, packed] : packed_) {
      if (other.method == plan.method && other.filter_tiles == plan.filter_tiles && other.in.row == plan.in.row &&
          other.in.plane == plan.in.plane && other.code_bits == plan.code_bits) {
        return packed;
      }
    }
    void* packed = memory.take(conv::packed_size(plan));
    conv::pack(plan, weights_.columns.data(), weights_.values.data(), bias(), packed);
    packed_.emplace_back(plan, packed);
    return packed;
  }

 private:
  std::int64_t count() const { return static_cast<std::int64_t>(weights_.columns.size()); }
  static narrow::Unit unit(narrow::Number number, const Machine& machine) {
    return narrow::units(machine.isa, number).back();
  }
  static std::optional<narrow::Unit> byte_unit(const Machine& machine) {
    const std::vector<narrow::Unit> units = narrow::units(machine.isa, narrow::Number::int8);
    if (narrow::has_bytes(units.back())) return units.back();
    if (units.back() == narrow::Unit::amx && narrow::has_bytes(units[units.size() - 2])) return units[units.size() - 2];
    return {};
  }
  const float* bias() const { return weights_.bias.empty() ? nullptr : weights_.bias.data(); }

  conv::Plan wide_plan(const conv::Shape& shape, const conv::Pitch& pitch, std::int64_t images, const Machine& machine,
                       std::optional<Way> preferred) const {
    if (preferred) {
      for (const conv::Method method : conv::methods(shape, pitch, images, count(), machine.isa)) {
        if (static_cast<Way>(method) == *preferred)
          return conv::plan(shape, pitch, images, count(), machine.isa, method, code_bits_);
      }
    }
    return conv::plan(shape, pitch, images, count(), machine.isa, code_bits_);
  }

  Planned depthwise(const conv::Shape& shape, const conv::Pitch& pitch, const Machine& machine) {
    const narrow::DepthwisePlan plan =
        narrow::depthwise_plan(shape, pitch, machine.isa, unit(narrow::Number::int8, machine));
    for (const auto& [other, packed] : depthwise_) {
      if (narrow::same_packed(other, plan)) return {plan, packed, arithmetic_.residual};
    }
    void* packed = machine.weights.take(narrow::packed_size(plan));
    narrow::pack(plan, weights_.values.data(), arithmetic_.scales.data(), arithmetic_.input, bias(), packed);
    depthwise_.emplace_back(plan, packed);
    return {plan, packed, arithmetic_.residual};
  }

  Planned with_weights(const narrow::Plan& plan, const Machine& machine) {
    for (const auto& [other, packed] : narrow_) {
      if (narrow::same_packed(other, plan)) {
        return {plan, packed, arithmetic_.residual};
      }
    }
    void* packed = machine.weights.take(narrow::packed_size(plan));
    const std::int64_t* columns = weights_.columns.data();
    const float* values = weights_.values.data();
    if (plan.number == narrow::Number::int8) {
      narrow::pack(plan, count(), columns, values, arithmetic_.scales.data(), arithmetic_.input, bias(), packed);
    } else {
      narrow::pack(plan, count(), columns, values, bias(), packed);
    }
    narrow_.emplace_back(plan, packed);
    return {plan, packed, arithmetic_.residual};
  }

  Weights weights_;
  Arithmetic arithmetic_;
  int code_bits_ = 0;  // that stand for the weights, if these have so few values
  std::vector<std::pair<conv::Plan, Packed>> packed_;
  std::vector<std::pair<narrow::Plan, Packed>> narrow_;
  std::vector<std::pair<narrow::DepthwisePlan, Packed>> depthwise_;
  std::vector<std::pair<narrow::BytePlan, Packed>> on_bytes_;
};

void check_weights(const Weights& weights, std::int64_t filters_per_group) {
  const auto count = static_cast<std::int64_t>(weights.columns.size());
  ACF_CHECK(static_cast<std::int64_t>(weights.values.size()) == filters_per_group * count, "there must be ",
            filters_per_group * count, " weights, got ", weights.values.size());
  ACF_CHECK(weights.bias.empty() || static_cast<std::int64_t>(weights.bias.size()) == weights.filters, "there must be ",
            weights.filters, " biases, got ", weights.bias.size());
}

void check_columns(const std::vector<std::int64_t>& columns, std::int64_t count) {
  std::int64_t before = -1;
  for (const std::int64_t column : columns) {
    ACF_CHECK(column > before && column < count, "columns must be ascending numbers below ", count, ", got ", column,
              " after ", before);
    before = column;
  }
}

void check_sparse(const SparseWeights& weights, std::int64_t columns) {
  const auto values = static_cast<std::int64_t>(weights.values.size());
  ACF_CHECK(static_cast<std::int64_t>(weights.offsets.size()) == weights.filters + 1 && weights.offsets[0] == 0 &&
                weights.offsets.back() == values && weights.indices.size() == weights.values.size() &&
                std::is_sorted(weights.offsets.begin(), weights.offsets.end()),
            "offsets must rise from 0 to the number of values");
  ACF_CHECK(weights.bias.empty() || static_cast<std::int64_t>(weights.bias.size()) == weights.filters, "there must be ",
            weights.filters, " biases, got ", weights.bias.size());
  for (std::int64_t f = 0; f < weights.filters; ++f) {
    const auto first = weights.indices.begin() + weights.offsets[static_cast<std::size_t>(f)],
               last = weights.indices.begin() + weights.offsets[static_cast<std::size_t>(f) + 1];
    check_columns(std::vector<std::int64_t>(first, last), columns);
  }
}

conv::Shape shape_of(const Window& window, const Shape& input, std::int64_t filters, std::int64_t groups) {
  ACF_CHECK(input.size() == 3, "a convolution takes (channels, height, width)");
  conv::Shape shape;
  shape.channels = input[0];
  shape.height = input[1];
  shape.width = input[2];
  shape.filters = filters;
  shape.groups = groups;
  shape.kernel_h = window.kernel_h;
  shape.kernel_w = window.kernel_w;
  shape.stride_h = window.stride_h;
  shape.stride_w = window.stride_w;
  shape.dilation_h = window.dilation_h;
  shape.dilation_w = window.dilation_w;
  shape.padding = window.padding;
  return shape;
}

conv::Epilogue epilogue_of(const Activated& activated) {
  conv::Epilogue epilogue;
  epilogue.activation = activated.activation;
  epilogue.slope = activated.slope;
  return epilogue;
}

// ---- convolution ----------------------------------------------------------------------------------------------------

class ConvolutionTask : public Task {
 public:
  ConvolutionTask(const Planned& planned, std::int64_t images, conv::Pitch out, conv::Epilogue epilogue, bool residual)
      : planned_(planned), images_(images), out_(out), epilogue_(epilogue), residual_(residual) {
    scratch = planned_.scratch();
  }

  void run(float* const* operands, float* memory, int threads) const override {
    conv::Epilogue epilogue = epilogue_;
    if (residual_) epilogue.residual = operands[1];
    planned_.run(images_, operands[0], operands[residual_ ? 2 : 1], out_, epilogue, memory, threads);
  }
  std::optional<Way> way() const override { return planned_.way(); }

 private:
  Planned planned_;
  std::int64_t images_;
  conv::Pitch out_;
  conv::Epilogue epilogue_;
  bool residual_;
};

// An operand of a convolution on bytes: those of its value, or made of the planes that it is.
class ByteSource {
 public:
  ByteSource(const Layout& value, const conv::Padding& padding, const narrow::Quantization& numbers)
      : images_(value.images), shape_(value.shape), numbers_(numbers), makes_(!value.bytes) {
    if (makes_) {
      planes_ = value.pitch();
      layout_ = narrow::byte_layout(images_, shape_[0], shape_[1], shape_[2], padding);
      scratch_ = (layout_.size / kLineBytes + 1) * kLine;
    } else {
      layout_ = value.bytes->layout;
    }
  }

  const narrow::ByteLayout& layout() const { return layout_; }
  const narrow::Quantization& numbers() const { return numbers_; }
  std::int64_t scratch() const { return scratch_; }  // floats

  // Its first pixel.
  const unsigned char* bytes(const float* operand, float* memory, narrow::Unit unit, int threads) const {
    if (!makes_) return reinterpret_cast<const unsigned char*>(operand);
    unsigned char* made = reinterpret_cast<unsigned char*>(memory) + layout_.before;
    narrow::fill_halo(made, layout_, images_, shape_[1], shape_[2], numbers_);
    narrow::make_bytes(unit, planes_, operand, numbers_, images_, shape_[0], shape_[1], shape_[2], layout_.pitch, made,
                       threads);
    return made;
  }

 private:
  static constexpr std::int64_t kLineBytes = conv::kAlignment, kLine = conv::kAlignment / sizeof(float);

  std::int64_t images_;
  Shape shape_;
  narrow::Quantization numbers_;
  bool makes_;
  conv::Pitch planes_;
  narrow::ByteLayout layout_;
  std::int64_t scratch_ = 0;
};

class ByteConvolutionTask : public Task {
 public:
  // residual: if it is added as bytes.
  ByteConvolutionTask(narrow::BytePlan plan, Packed packed, ByteSource input, std::optional<ByteSource> residual,
                      bool adds, const Layout& output, const conv::Epilogue& epilogue)
      : plan_(plan),
        packed_(packed),
        input_(std::move(input)),
        residual_(std::move(residual)),
        adds_(adds),
        images_(output.images),
        to_bytes_(output.bytes.has_value()),
        epilogue_(epilogue) {
    if (to_bytes_) {
      target_.byte_pitch = output.bytes->layout.pitch;
      target_.numbers = output.bytes->numbers;
    } else {
      target_.pitch = output.pitch();
    }
    scratch = input_.scratch() + (residual_ ? residual_->scratch() : 0) + narrow::scratch_size(plan_);
  }

  void run(float* const* operands, float* memory, int threads) const override {
    const unsigned char* in = input_.bytes(operands[0], memory, plan_.unit, threads);
    memory += input_.scratch();
    narrow::ByteResidual added;
    conv::Epilogue epilogue = epilogue_;
    if (residual_) {
      added = {residual_->bytes(operands[1], memory, plan_.unit, threads), residual_->layout().pitch,
               residual_->numbers()};
      memory += residual_->scratch();
    } else if (adds_) {
      epilogue.residual = operands[1];
    }
    narrow::ByteTarget target = target_;
    float* out = operands[adds_ ? 2 : 1];
    if (to_bytes_) {
      target.bytes = reinterpret_cast<unsigned char*>(out);
    } else {
      target.planes = out;
    }
    narrow::run(plan_, packed_, images_, in, residual_ ? &added : nullptr, target, epilogue, memory, threads);
  }

 private:
  narrow::BytePlan plan_;
  Packed packed_;
  ByteSource input_;
  std::optional<ByteSource> residual_;
  bool adds_;
  std::int64_t images_;
  bool to_bytes_;
  narrow::ByteTarget target_;
  conv::Epilogue epilogue_;
};

class Convolution : public Operation {
 public:
  Convolution(const Window& window, std::int64_t groups, Weights weights, const Activated& activated,
              Arithmetic arithmetic)
      : window_(window), groups_(groups), weights_(std::move(weights), std::move(arithmetic)), activated_(activated) {}

  bool on_planes() const override { return true; }
  conv::Padding halo() const override { return window_.padding; }
  const narrow::Quantization* reads_bytes(const Machine& machine, const Shape& input,
                                          std::size_t operand) const override {
    const narrow::Quantization* numbers = on_bytes(machine, input);
    return numbers != nullptr && operand == 1 ? weights_.residual() : numbers;
  }
  bool makes_bytes(const Machine& machine, const Shape& input, std::size_t operands) const override {
    return on_bytes(machine, input) != nullptr && (operands == 1 || weights_.residual() != nullptr);
  }
  Gain gain_of_bytes(const Machine& machine, const Shape& input) const override {
    return weights_.gain_of_bytes(shape_of(window_, input, weights_.weights().filters, groups_), machine);
  }

  Shape infer(const std::vector<Shape>& inputs) const override {
    const Weights& weights = weights_.weights();
    const conv::Shape shape = shape_of(window_, inputs[0], weights.filters, groups_);
    conv::check(shape);
    check_weights(weights, weights.filters / groups_);
    check_columns(weights.columns, shape.columns());
    weights_.check_arithmetic();
    Shape made = {weights.filters, shape.out_height(), shape.out_width()};
    ACF_CHECK(inputs.size() == 1 || (inputs.size() == 2 && inputs[1] == made), "the residual is of another shape");
    return made;
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const conv::Shape shape = shape_of(window_, inputs[0]->shape, weights_.weights().filters, groups_);
    conv::Epilogue epilogue = epilogue_of(activated_);
    if (inputs.size() == 2 && !inputs[1]->bytes) epilogue.residual_pitch = inputs[1]->pitch();
    // Between planes it is computed by columns: what is saved is reading and writing them.
    const bool bytes = std::any_of(inputs.begin(), inputs.end(), [](const Layout* input) { return input->bytes; });
    if (bytes || output.bytes) {
      const ByteSource source(*inputs[0], shape.padding, weights_.input());
      std::optional<ByteSource> residual;
      if (inputs.size() == 2 && weights_.residual() != nullptr)
        residual.emplace(*inputs[1], conv::Padding{}, *weights_.residual());
      const auto [plan, packed] = weights_.byte_plan(shape, source.layout(), machine);
      return std::make_unique<ByteConvolutionTask>(plan, packed, source, residual, inputs.size() == 2, output,
                                                   epilogue);
    }
    return std::make_unique<ConvolutionTask>(
        weights_.plan(shape, inputs[0]->pitch(), output.images, machine, preferred(output.images)), output.images,
        output.pitch(), epilogue, inputs.size() == 2);
  }

 private:
  const narrow::Quantization* on_bytes(const Machine& machine, const Shape& input) const {
    return weights_.bytes(shape_of(window_, input, weights_.weights().filters, groups_), machine);
  }

  Window window_;
  std::int64_t groups_;
  PackedWeights weights_;
  Activated activated_;
};

// ---- 1x1, then depthwise -------------------------------------------------------------------------------------------

class ExpansionTask : public Task {
 public:
  // Some channels of what lies between both.
  struct Slice {
    conv::Plan expand, depthwise;  // of one image
    Packed expand_weights, depthwise_weights;
    std::int64_t first, channels;
  };

  ExpansionTask(std::vector<Slice> slices, const Layout& input, const Layout& output, const conv::Layout& between,
                const Activated& expanded, const Activated& activated)
      : slices_(std::move(slices)),
        images_(output.images),
        in_(input.pitch()),
        out_(output.pitch()),
        between_(between),
        pitch_((between.size + kLine - 1) / kLine * kLine),
        height_(input.shape[1]),
        width_(input.shape[2]),
        expanded_(epilogue_of(expanded)),
        activated_(epilogue_of(activated)) {
    scratch = pitch_ * std::min<std::int64_t>(tasks(), Slots::most());
  }

  void run(float* const* operands, float* memory, int threads) const override {
    Slots slots(static_cast<int>(std::min<std::int64_t>({tasks(), threads, Slots::most()})));
    bool cleared[Slots::kMost] = {};  // of a slot: its halo, which nothing else writes meanwhile
    parallel_for(tasks(), slots.count(), [&](std::int64_t task) {
      slots.with([&](int slot) {
        const Slice& slice = slices_[static_cast<std::size_t>(task) % slices_.size()];
        const std::int64_t n = task / static_cast<std::int64_t>(slices_.size());
        float* between = memory + slot * pitch_ + between_.before;
        if (!cleared[slot]) conv::clear_halo(between, between_, 1, slices_[0].channels, height_, width_);
        cleared[slot] = true;
        conv::run(slice.expand, slice.expand_weights, 1, operands[0] + n * in_.image, between, between_.pitch,
                  expanded_, nullptr, 1);
        conv::run(slice.depthwise, slice.depthwise_weights, 1, between,
                  operands[1] + n * out_.image + slice.first * out_.plane, out_, activated_, nullptr, 1);
      });
    });
  }

 private:
  static constexpr std::int64_t kLine = conv::kAlignment / sizeof(float);

  std::int64_t tasks() const { return images_ * static_cast<std::int64_t>(slices_.size()); }

  std::vector<Slice> slices_;  // the first has the most channels
  std::int64_t images_;
  conv::Pitch in_, out_;
  conv::Layout between_;
  std::int64_t pitch_, height_, width_;
  conv::Epilogue expanded_, activated_;
};

class Expansion : public Operation {
 public:
  Expansion(Weights expand, const Activated& expanded, const Window& window, Weights depthwise,
            const Activated& activated)
      : expand_(std::move(expand)),
        depthwise_(std::move(depthwise)),
        expanded_(expanded),
        window_(window),
        activated_(activated) {}

  bool on_planes() const override { return true; }

  Shape infer(const std::vector<Shape>& inputs) const override {
    const conv::Shape shape = shape_of({}, inputs[0], expand_.filters, 1),
                      planes = shape_of(window_, {expand_.filters, inputs[0][1], inputs[0][2]}, expand_.filters,
                                        expand_.filters);
    conv::check(shape);
    conv::check(planes);
    check_weights(expand_, expand_.filters);
    check_columns(expand_.columns, shape.columns());
    ACF_CHECK(depthwise_.filters == expand_.filters &&
                  static_cast<std::int64_t>(depthwise_.columns.size()) == planes.columns(),
              "an expansion takes a complete depthwise convolution of all its filters");
    check_weights(depthwise_, 1);
    check_columns(depthwise_.columns, planes.columns());
    return {expand_.filters, planes.out_height(), planes.out_width()};
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const Shape& in = inputs[0]->shape;
    const std::int64_t plane = conv::layout(1, 1, in[1], in[2], window_.padding).pitch.plane;
    const std::int64_t most = std::max<std::int64_t>(4, kSliceFloats / plane / 4 * 4);
    const std::int64_t count = (expand_.filters + most - 1) / most, size = (expand_.filters + count - 1) / count;
    const conv::Layout between = conv::layout(1, size, in[1], in[2], window_.padding);
    std::vector<ExpansionTask::Slice> slices;
    for (std::int64_t first = 0; first < expand_.filters; first += size) {
      const std::int64_t channels = std::min(size, expand_.filters - first);
      if (slices.size() == packed_.size()) {
        packed_.emplace_back(PackedWeights(some(expand_, first, channels)),
                             PackedWeights(some(depthwise_, first, channels)));
      }
      auto& [expand_weights, depthwise_weights] = packed_[slices.size()];
      const auto planned = [&](const conv::Shape& shape, const conv::Pitch& pitch, const PackedWeights& weights) {
        return conv::plan(shape, pitch, 1, static_cast<std::int64_t>(weights.weights().columns.size()), machine.isa);
      };
      const conv::Plan expand = planned(shape_of({}, in, channels, 1), inputs[0]->pitch(), expand_weights),
                       depthwise = planned(shape_of(window_, {channels, in[1], in[2]}, channels, channels),
                                           between.pitch, depthwise_weights);
      slices.push_back({expand, depthwise, expand_weights.of(expand, machine.weights),
                        depthwise_weights.of(depthwise, machine.weights), first, channels});
    }
    return std::make_unique<ExpansionTask>(std::move(slices), *inputs[0], output, between, expanded_, activated_);
  }

 private:
  // Of what lies between both: a part of the second-level cache.
  static constexpr std::int64_t kSliceFloats = (640 << 10) / sizeof(float);

  // Those of some filters. A filter of a depthwise convolution has columns of its own, and all of them.
  static Weights some(const Weights& all, std::int64_t first, std::int64_t count) {
    const auto width = static_cast<std::int64_t>(all.values.size()) / all.filters;
    Weights part;
    part.filters = count;
    part.columns = all.columns;
    if (static_cast<std::int64_t>(all.columns.size()) > width)
      part.columns.resize(static_cast<std::size_t>(count * width));
    part.values.assign(all.values.begin() + first * width, all.values.begin() + (first + count) * width);
    if (!all.bias.empty()) part.bias.assign(all.bias.begin() + first, all.bias.begin() + first + count);
    return part;
  }

  Weights expand_, depthwise_;
  Activated expanded_;
  Window window_;
  Activated activated_;
  std::vector<std::pair<PackedWeights, PackedWeights>> packed_;  // of every slice, for both
};

// ---- every filter with columns of its own ---------------------------------------------------------------------------

class SparseConvolutionTask : public Task {
 public:
  struct Filter {
    conv::Plan plan;
    Packed packed;
    std::int64_t in;  // where the channels of its group begin
  };

  SparseConvolutionTask(std::vector<Filter> filters, std::int64_t images, conv::Pitch out, conv::Epilogue epilogue)
      : filters_(std::move(filters)), images_(images), out_(out), epilogue_(epilogue) {}

  void run(float* const* operands, float*, int threads) const override {
    parallel_for(static_cast<std::int64_t>(filters_.size()), threads, [&](std::int64_t f) {
      const Filter& filter = filters_[static_cast<std::size_t>(f)];
      conv::run(filter.plan, filter.packed, images_, operands[0] + filter.in, operands[1] + f * out_.plane, out_,
                epilogue_, nullptr, 1);
    });
  }

 private:
  std::vector<Filter> filters_;
  std::int64_t images_;
  conv::Pitch out_;
  conv::Epilogue epilogue_;
};

class SparseConvolution : public Operation {
 public:
  SparseConvolution(const Window& window, std::int64_t groups, SparseWeights weights, const Activated& activated)
      : window_(window), groups_(groups), activated_(activated) {
    ACF_CHECK(groups >= 1 && weights.filters % groups == 0, "groups must divide the filters");
    check_sparse(weights, std::int64_t{1} << 31);
    for (std::int64_t f = 0; f < weights.filters; ++f) {
      const auto begin = weights.offsets[static_cast<std::size_t>(f)],
                 end = weights.offsets[static_cast<std::size_t>(f) + 1];
      Weights own;
      own.filters = 1;
      own.columns.assign(weights.indices.begin() + begin, weights.indices.begin() + end);
      own.values.assign(weights.values.begin() + begin, weights.values.begin() + end);
      if (!weights.bias.empty()) own.bias.push_back(weights.bias[static_cast<std::size_t>(f)]);
      filters_.emplace_back(std::move(own));
    }
  }

  bool on_planes() const override { return true; }
  conv::Padding halo() const override { return window_.padding; }

  Shape infer(const std::vector<Shape>& inputs) const override {
    const conv::Shape shape = own_shape(inputs[0]);
    conv::check(shape);
    for (const PackedWeights& filter : filters_) check_columns(filter.weights().columns, shape.columns());
    return {static_cast<std::int64_t>(filters_.size()), shape.out_height(), shape.out_width()};
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const conv::Shape shape = own_shape(inputs[0]->shape);
    const auto per_group = static_cast<std::int64_t>(filters_.size()) / groups_;
    std::vector<SparseConvolutionTask::Filter> filters;
    for (std::size_t f = 0; f < filters_.size(); ++f) {
      const auto count = static_cast<std::int64_t>(filters_[f].weights().columns.size());
      const auto method = shape.stride_w <= 2 ? conv::Method::pixels_in_lanes : conv::Method::filters_in_lanes;
      const conv::Plan plan = conv::plan(shape, inputs[0]->pitch(), output.images, count, machine.isa, method);
      const std::int64_t group = static_cast<std::int64_t>(f) / per_group;
      filters.push_back({plan, filters_[f].of(plan, machine.weights), group * shape.channels * inputs[0]->strides[0]});
    }
    return std::make_unique<SparseConvolutionTask>(std::move(filters), output.images, output.pitch(),
                                                   epilogue_of(activated_));
  }

 private:
  // One filter on the channels of its group.
  conv::Shape own_shape(const Shape& input) const {
    ACF_CHECK(input.size() == 3 && input[0] % groups_ == 0, "groups must divide the channels");
    return shape_of(window_, {input[0] / groups_, input[1], input[2]}, 1, 1);
  }

  Window window_;
  std::int64_t groups_;
  std::vector<PackedWeights> filters_;
  Activated activated_;
};

// ---- linear layers --------------------------------------------------------------------------------------------------

// Runs on rows of features without gaps; inputs and outputs that lie otherwise are copied.
class RowsTask : public Task {
 public:
  RowsTask(const Layout& input, const Layout& output)
      : images_(input.images * elements(input.shape) / input.shape.back()),
        features_(input.shape.back()),
        filters_(output.shape.back()),
        gathers_(!input.in_order()),
        scatters_(!output.in_order()),
        input_(all_dims(input), {all_strides(input), all_strides(in_order(input.shape, input.images))}),
        output_(all_dims(output), {all_strides(in_order(output.shape, output.images)), all_strides(output)}) {
    gathered_ = gathers_ ? whole_lines(images_ * features_ + conv::kSlack) : 0;
    scattered_ = scatters_ ? whole_lines(images_ * filters_) : 0;
    scratch = gathered_ + scattered_;
  }

  void run(float* const* operands, float* memory, int threads) const override {
    float *x = operands[0], *y = operands[1];
    if (gathers_) {
      x = memory;
      copy(input_, operands[0], x);
    }
    if (scatters_) y = memory + gathered_;
    multiply(x, y, memory + gathered_ + scattered_, threads);
    if (scatters_) copy(output_, y, operands[1]);
  }

 protected:
  // memory: what is added to `scratch`.
  virtual void multiply(const float* x, float* y, float* memory, int threads) const = 0;

  std::int64_t images_, features_, filters_;

 private:
  static std::int64_t whole_lines(std::int64_t floats) {
    constexpr auto kLine = static_cast<std::int64_t>(conv::kAlignment / sizeof(float));
    return (floats + kLine - 1) / kLine * kLine;
  }

  bool gathers_, scatters_;
  std::int64_t gathered_ = 0, scattered_ = 0;
  Rows<2> input_, output_;
};

class LinearTask : public RowsTask {
 public:
  LinearTask(const Layout& input, const Layout& output, const Planned& planned, conv::Epilogue epilogue)
      : RowsTask(input, output), planned_(planned), epilogue_(epilogue) {
    scratch += planned_.scratch();
  }
  std::optional<Way> way() const override { return planned_.way(); }

 private:
  void multiply(const float* x, float* y, float* memory, int threads) const override {
    planned_.run(images_, x, y, {1, 1, filters_}, epilogue_, memory, threads);
  }

  Planned planned_;
  conv::Epilogue epilogue_;
};

Shape infer_linear(const std::vector<Shape>& inputs, std::int64_t features, std::int64_t filters) {
  ACF_CHECK(!inputs[0].empty() && inputs[0].back() == features, "a linear layer takes ", features, " features");
  Shape made = inputs[0];
  made.back() = filters;
  return made;
}

class Linear : public Operation {
 public:
  Linear(Weights weights, std::int64_t features, const Activated& activated, Arithmetic arithmetic)
      : weights_(std::move(weights), std::move(arithmetic)), features_(features), activated_(activated) {
    check_weights(weights_.weights(), weights_.weights().filters);
    check_columns(weights_.weights().columns, features);
    weights_.check_arithmetic();
  }

  Shape infer(const std::vector<Shape>& inputs) const override {
    return infer_linear(inputs, features_, weights_.weights().filters);
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    conv::Shape shape;
    shape.channels = features_;
    shape.filters = weights_.weights().filters;
    const std::int64_t images = output.images * elements(output.shape) / shape.filters;
    return std::make_unique<LinearTask>(
        *inputs[0], output, weights_.plan(shape, {1, 1, features_}, images, machine, preferred(output.images)),
        epilogue_of(activated_));
  }

 private:
  PackedWeights weights_;
  std::int64_t features_;
  Activated activated_;
};

class SparseLinearTask : public RowsTask {
 public:
  SparseLinearTask(const Layout& input, const Layout& output, const SparseWeights& weights, const Activated& activated,
                   Isa isa)
      : RowsTask(input, output),
        weights_(weights),
        call_(conv::activation_call(activated.activation, activated.slope)),
        combine_(conv::kernels(isa).combine) {}

 private:
  void multiply(const float* x, float* y, float*, int threads) const override {
    parallel_for(images_, images_ == 1 ? 1 : threads, [&](std::int64_t n) {
      const float* features = x + n * features_;
      float* sums = y + n * filters_;
      for (std::int64_t f = 0; f < filters_; ++f) {
        const auto begin = static_cast<std::size_t>(weights_.offsets[static_cast<std::size_t>(f)]),
                   end = static_cast<std::size_t>(weights_.offsets[static_cast<std::size_t>(f) + 1]);
        float sum = weights_.bias.empty() ? 0.0f : weights_.bias[static_cast<std::size_t>(f)];
        for (std::size_t i = begin; i < end; ++i) sum += weights_.values[i] * features[weights_.indices[i]];
        sums[f] = sum;
      }
      combine_({&call_, conv::Combine::first, sums, nullptr, false, false, sums, filters_});
    });
  }

  const SparseWeights& weights_;
  conv::Call call_;
  conv::RowKernel combine_;
};

class SparseLinear : public Operation {
 public:
  SparseLinear(SparseWeights weights, std::int64_t features, const Activated& activated)
      : weights_(std::move(weights)), features_(features), activated_(activated) {
    check_sparse(weights_, features);
  }

  Shape infer(const std::vector<Shape>& inputs) const override {
    return infer_linear(inputs, features_, weights_.filters);
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    return std::make_unique<SparseLinearTask>(*inputs[0], output, weights_, activated_, machine.isa);
  }

 private:
  SparseWeights weights_;
  std::int64_t features_;
  Activated activated_;
};

}  // namespace

std::unique_ptr<Operation> convolution(const Window& window, std::int64_t groups, Weights weights,
                                       const Activated& activated, Arithmetic arithmetic) {
  return std::make_unique<Convolution>(window, groups, std::move(weights), activated, std::move(arithmetic));
}
std::unique_ptr<Operation> sparse_convolution(const Window& window, std::int64_t groups, SparseWeights weights,
                                              const Activated& activated) {
  return std::make_unique<SparseConvolution>(window, groups, std::move(weights), activated);
}
std::unique_ptr<Operation> expansion(Weights expand, const Activated& expanded, const Window& window, Weights depthwise,
                                     const Activated& activated) {
  return std::make_unique<Expansion>(std::move(expand), expanded, window, std::move(depthwise), activated);
}
std::unique_ptr<Operation> linear(Weights weights, std::int64_t features, const Activated& activated,
                                  Arithmetic arithmetic) {
  return std::make_unique<Linear>(std::move(weights), features, activated, std::move(arithmetic));
}
std::unique_ptr<Operation> sparse_linear(SparseWeights weights, std::int64_t features, const Activated& activated) {
  return std::make_unique<SparseLinear>(std::move(weights), features, activated);
}

}  // namespace acf::engine
