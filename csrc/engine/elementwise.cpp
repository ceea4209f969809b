// Operators that compute every element from the elements in its place, softmax and layer normalisation.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/parallel.h"
#include "engine/operation.h"
#include "engine/powers.h"

namespace acf::engine {
namespace {

constexpr std::int64_t kTaskElements = 1 << 13;  // fewer are not worth another thread

class CombineTask : public Task {
 public:
  // rows: of the two operands and the output.
  CombineTask(conv::Combine combine, Rows<3> rows, const conv::Call& call, const float* constant, Isa isa)
      : combine_(combine),
        rows_(std::move(rows)),
        call_(call),
        constant_(constant),
        kernel_(conv::kernels(isa).combine) {}

  void run(float* const* operands, float*, int threads) const override {
    const bool two = combine_ != conv::Combine::first && constant_ == nullptr;
    const float *a = operands[0], *b = two ? operands[1] : constant_;
    float* out = operands[two ? 2 : 1];
    const std::int64_t tasks =
        std::min(rows_.rows, std::clamp<std::int64_t>(rows_.rows * rows_.count / kTaskElements, 1, 4 * threads));
    parallel_for(tasks, tasks == 1 ? 1 : threads, [&](std::int64_t task) {
      rows_.each(rows_.rows * task / tasks, rows_.rows * (task + 1) / tasks,
                 [&](const auto& at) { row(a + at[0], b == nullptr ? nullptr : b + at[1], out + at[2]); });
    });
  }

 private:
  void row(const float* a, const float* b, float* out) const {
    const auto& step = rows_.step;
    if (step[0] <= 1 && step[1] <= 1 && (step[2] == 1 || rows_.count == 1)) {
      kernel_({&call_, combine_, a, b, step[0] == 0, step[1] == 0, out, rows_.count});
      return;
    }
    for (std::int64_t i = 0; i < rows_.count; ++i) {
      kernel_({&call_, combine_, a + i * step[0], b == nullptr ? nullptr : b + i * step[1], false, false,
               out + i * step[2], 1});
    }
  }

  conv::Combine combine_;
  Rows<3> rows_;
  conv::Call call_;
  const float* constant_;
  conv::RowKernel kernel_;
};

// Strides, samples first, with 0 along the dimensions in which `layout` has one element and `shape` more.
Shape broadcast(const Layout& layout, const Shape& shape) {
  Shape strides = {layout.image};
  for (std::size_t d = 0; d < shape.size(); ++d) {
    strides.push_back(layout.shape[d] == 1 ? 0 : layout.strides[d]);
  }
  return strides;
}

class Elementwise : public Operation {
 public:
  Elementwise(conv::Combine combine, Shape constant_shape, std::vector<float> constant, const conv::Call& call)
      : combine_(combine), constant_shape_(std::move(constant_shape)), constant_(std::move(constant)), call_(call) {
    ACF_CHECK(constant_.empty() || elements(constant_shape_) == static_cast<std::int64_t>(constant_.size()),
              "the constant does not have its shape");
  }

  Shape infer(const std::vector<Shape>& inputs) const override {
    const bool two = combine_ != conv::Combine::first && constant_.empty();
    ACF_CHECK(inputs.size() == (two ? 2 : 1), "an operator takes ", two ? 2 : 1, " inputs, got ", inputs.size());
    if (combine_ == conv::Combine::first) return inputs[0];
    Shape other = two ? inputs[1] : constant_shape_, made = inputs[0];
    ACF_CHECK(other.size() <= made.size(), "shapes cannot be broadcast");
    other.insert(other.begin(), made.size() - other.size(), 1);
    for (std::size_t d = 0; d < made.size(); ++d) {
      ACF_CHECK(made[d] == other[d] || made[d] == 1 || other[d] == 1, "shapes cannot be broadcast");
      made[d] = std::max(made[d], other[d]);
    }
    return made;
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const Shape a = broadcast(*inputs[0], output.shape);
    Shape b(a.size(), 0);
    if (inputs.size() == 2) {
      b = broadcast(*inputs[1], output.shape);
    } else if (!constant_.empty()) {
      std::int64_t stride = 1;
      for (std::size_t d = constant_shape_.size(); d-- > 0;) {
        b[d + a.size() - constant_shape_.size()] = constant_shape_[d] == 1 ? 0 : stride;
        stride *= constant_shape_[d];
      }
    }
    return std::make_unique<CombineTask>(combine_, Rows<3>(all_dims(output), {a, b, all_strides(output)}), call_,
                                         constant_.empty() ? nullptr : constant_.data(), machine.isa);
  }

 private:
  conv::Combine combine_;
  Shape constant_shape_;
  std::vector<float> constant_;
  conv::Call call_;
};

class SoftmaxTask : public Task {
 public:
  SoftmaxTask(Rows<2> others, std::int64_t count, std::int64_t from, std::int64_t to, bool logarithm, Isa isa)
      : others_(std::move(others)),
        count_(count),
        from_(from),
        to_(to),
        logarithm_(logarithm),
        kernels_(conv::kernels(isa)) {}

  void run(float* const* operands, float*, int threads) const override {
    const std::int64_t lines = others_.rows * others_.count,
                       tasks =
                           std::min(lines, std::clamp<std::int64_t>(lines * count_ / kTaskElements, 1, 4 * threads));
    parallel_for(tasks, tasks == 1 ? 1 : threads, [&](std::int64_t task) {
      for (std::int64_t i = lines * task / tasks; i < lines * (task + 1) / tasks; ++i) {
        others_.each(i / others_.count, i / others_.count + 1, [&](const auto& at) {
          const std::int64_t within = i % others_.count;
          line(operands[0] + at[0] + within * others_.step[0], operands[1] + at[1] + within * others_.step[1]);
        });
      }
    });
  }

 private:
  void line(const float* x, float* y) const {
    if (!logarithm_ && from_ == 1 && to_ == 1) {
      std::copy_n(x, count_, y);
      to_powers(y, count_, 1.0f);
      const float share = 1.0f / kernels_.sum(y, count_);
      for (std::int64_t i = 0; i < count_; ++i) y[i] *= share;
      return;
    }
    float most = x[0];
    for (std::int64_t i = 1; i < count_; ++i) most = std::max(most, x[i * from_]);
    double total = 0;
    for (std::int64_t i = 0; i < count_; ++i) {
      const float power = std::exp(x[i * from_] - most);
      total += static_cast<double>(power);
      if (!logarithm_) y[i * to_] = power;
    }
    const auto log_total = static_cast<float>(std::log(total)), scale = static_cast<float>(1 / total);
    for (std::int64_t i = 0; i < count_; ++i) {
      y[i * to_] = logarithm_ ? x[i * from_] - most - log_total : y[i * to_] * scale;
    }
  }

  Rows<2> others_;
  std::int64_t count_, from_, to_;
  bool logarithm_;
  const conv::Kernels& kernels_;
};

class Softmax : public Operation {
 public:
  Softmax(std::int64_t axis, bool logarithm) : axis_(axis), logarithm_(logarithm) {}

  Shape infer(const std::vector<Shape>& inputs) const override {
    ACF_CHECK(axis_ >= 0 && axis_ < static_cast<std::int64_t>(inputs[0].size()), "there is no axis ", axis_);
    return inputs[0];
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const auto axis = static_cast<std::size_t>(axis_);
    Shape dims = all_dims(output);
    dims[axis + 1] = 1;
    return std::make_unique<SoftmaxTask>(Rows<2>(dims, {all_strides(*inputs[0]), all_strides(output)}),
                                         output.shape[axis], inputs[0]->strides[axis], output.strides[axis], logarithm_,
                                         machine.isa);
  }

 private:
  std::int64_t axis_;
  bool logarithm_;
};

class LayerNormTask : public Task {
 public:
  // outer: where every normalised part begins; inner: its elements; (input, output).
  LayerNormTask(Rows<2> outer, Rows<2> inner, double epsilon, const std::vector<float>& scale,
                const std::vector<float>& shift)
      : outer_(std::move(outer)), inner_(std::move(inner)), epsilon_(epsilon), scale_(scale), shift_(shift) {}

  void run(float* const* operands, float*, int threads) const override {
    const std::int64_t size = inner_.rows * inner_.count,
                       tasks = std::min(
                           outer_.rows,
                           std::clamp<std::int64_t>(outer_.rows * outer_.count * size / kTaskElements, 1, 4 * threads));
    parallel_for(tasks, tasks == 1 ? 1 : threads, [&](std::int64_t task) {
      outer_.each(outer_.rows * task / tasks, outer_.rows * (task + 1) / tasks, [&](const auto& at) {
        for (std::int64_t i = 0; i < outer_.count; ++i) {
          part(operands[0] + at[0] + i * outer_.step[0], operands[1] + at[1] + i * outer_.step[1]);
        }
      });
    });
  }

 private:
  void part(const float* x, float* y) const {
    const auto size = static_cast<double>(inner_.rows * inner_.count);
    double total = 0, squares = 0;
    each(x, [&](double value) { total += value; });
    const double mean = total / size;
    each(x, [&](double value) { squares += (value - mean) * (value - mean); });
    const auto middle = static_cast<float>(mean), factor = static_cast<float>(1 / std::sqrt(squares / size + epsilon_));
    std::size_t index = 0;
    inner_.each(0, inner_.rows, [&](const auto& at) {
      for (std::int64_t i = 0; i < inner_.count; ++i, ++index) {
        float value = (x[at[0] + i * inner_.step[0]] - middle) * factor;
        if (!scale_.empty()) value *= scale_[index];
        if (!shift_.empty()) value += shift_[index];
        y[at[1] + i * inner_.step[1]] = value;
      }
    });
  }

  template <class Body>
  void each(const float* x, const Body& body) const {
    inner_.each(0, inner_.rows, [&](const auto& at) {
      for (std::int64_t i = 0; i < inner_.count; ++i) body(static_cast<double>(x[at[0] + i * inner_.step[0]]));
    });
  }

  Rows<2> outer_, inner_;
  double epsilon_;
  const std::vector<float>&scale_, &shift_;
};

class LayerNorm : public Operation {
 public:
  LayerNorm(std::int64_t dims, float epsilon, std::vector<float> scale, std::vector<float> shift)
      : dims_(dims), epsilon_(epsilon), scale_(std::move(scale)), shift_(std::move(shift)) {}

  Shape infer(const std::vector<Shape>& inputs) const override {
    const auto rank = static_cast<std::int64_t>(inputs[0].size());
    ACF_CHECK(dims_ >= 1 && dims_ <= rank, "there are no ", dims_, " dimensions to normalise over");
    const std::int64_t size = elements(Shape(inputs[0].end() - dims_, inputs[0].end()));
    for (const auto* values : {&scale_, &shift_}) {
      ACF_CHECK(values->empty() || static_cast<std::int64_t>(values->size()) == size,
                "scale and shift must have one number for each of ", size, " elements");
    }
    return inputs[0];
  }

  std::unique_ptr<Task> prepare(const Machine&, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const Shape dims = all_dims(output), from = all_strides(*inputs[0]), to = all_strides(output);
    const auto cut = [&](const Shape& whole, bool last) {
      return last ? Shape(whole.end() - dims_, whole.end()) : Shape(whole.begin(), whole.end() - dims_);
    };
    return std::make_unique<LayerNormTask>(Rows<2>(cut(dims, false), {cut(from, false), cut(to, false)}),
                                           Rows<2>(cut(dims, true), {cut(from, true), cut(to, true)}),
                                           static_cast<double>(epsilon_), scale_, shift_);
  }

 private:
  std::int64_t dims_;
  float epsilon_;
  std::vector<float> scale_, shift_;
};

}  // namespace

std::unique_ptr<Operation> combine(conv::Combine combine, Shape constant_shape, std::vector<float> constant,
                                   const Activated& activated) {
  return std::make_unique<Elementwise>(combine, std::move(constant_shape), std::move(constant),
                                       conv::activation_call(activated.activation, activated.slope));
}
std::unique_ptr<Operation> activate(const Activated& activated) {
  return combine(conv::Combine::first, {}, {}, activated);
}
std::unique_ptr<Operation> clip(float low, float high) {
  conv::Call call = conv::activation_call(conv::Activation::none, 0);
  call.low = low;
  call.high = high;
  return std::make_unique<Elementwise>(conv::Combine::first, Shape(), std::vector<float>(), call);
}
std::unique_ptr<Operation> layer_norm(std::int64_t dims, float epsilon, std::vector<float> scale,
                                      std::vector<float> shift) {
  return std::make_unique<LayerNorm>(dims, epsilon, std::move(scale), std::move(shift));
}
std::unique_ptr<Operation> softmax(std::int64_t axis, bool logarithm) {
  return std::make_unique<Softmax>(axis, logarithm);
}

}  // namespace acf::engine
