// Operators that only move elements.
#include <algorithm>
#include <numeric>

#include "core/check.h"
#include "engine/operation.h"

namespace acf::engine {
namespace {

// Pieces that are copied, from the first element of an input to that of the output; what no piece reaches is filled.
class CopyTask : public Task {
 public:
  struct Piece {
    std::size_t input;
    std::int64_t from, to;
    Rows<2> rows;
  };

  CopyTask(std::vector<Piece> pieces, std::size_t inputs) : pieces_(std::move(pieces)), inputs_(inputs) {}

  void fill(float value, const Layout& output) {
    value_ = value;
    filled_.emplace_back(all_dims(output), std::array<Shape, 1>{all_strides(output)});
  }

  void run(float* const* operands, float*, int) const override {
    float* out = operands[inputs_];
    for (const Rows<1>& rows : filled_) {
      rows.each(0, rows.rows, [&](const auto& at) {
        for (std::int64_t i = 0; i < rows.count; ++i) out[at[0] + i * rows.step[0]] = value_;
      });
    }
    for (const Piece& piece : pieces_) copy(piece.rows, operands[piece.input] + piece.from, out + piece.to);
  }

 private:
  std::vector<Piece> pieces_;
  std::size_t inputs_;
  float value_ = 0;
  std::vector<Rows<1>> filled_;
};

using Pieces = std::vector<CopyTask::Piece>;

std::size_t checked_axis(std::int64_t axis, const Shape& shape) {
  ACF_CHECK(axis >= 0 && axis < static_cast<std::int64_t>(shape.size()), "there is no axis ", axis);
  return static_cast<std::size_t>(axis);
}

class Concat : public Operation {
 public:
  explicit Concat(std::int64_t axis) : axis_(axis) {}

  Shape infer(const std::vector<Shape>& inputs) const override {
    const std::size_t axis = checked_axis(axis_, inputs[0]);
    Shape made = inputs[0];
    made[axis] = 0;
    for (Shape shape : inputs) {
      ACF_CHECK(shape.size() == made.size(), "the inputs of a concatenation differ in rank");
      made[axis] += shape[axis];
      shape[axis] = inputs[0][axis];
      ACF_CHECK(shape == inputs[0], "the inputs of a concatenation differ besides its axis");
    }
    return made;
  }

  std::unique_ptr<Task> prepare(const Machine&, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const auto axis = static_cast<std::size_t>(axis_);
    Pieces pieces;
    std::int64_t to = 0;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      pieces.push_back({i, 0, to, Rows<2>(all_dims(*inputs[i]), {all_strides(*inputs[i]), all_strides(output)})});
      to += inputs[i]->shape[axis] * output.strides[axis];
    }
    return std::make_unique<CopyTask>(std::move(pieces), inputs.size());
  }

 private:
  std::int64_t axis_;
};

class ReshapeTask : public Task {
 public:
  ReshapeTask(const Layout& input, const Layout& output)
      : from_(all_dims(input), {all_strides(input)}), to_(all_dims(output), {all_strides(output)}) {}
  void run(float* const* operands, float*, int) const override { copy_in_order(from_, operands[0], to_, operands[1]); }

 private:
  Rows<1> from_, to_;
};

class Reshape : public Operation {
 public:
  explicit Reshape(Shape shape) : shape_(std::move(shape)) {}

  bool keeps_order() const override { return true; }
  Shape infer(const std::vector<Shape>& inputs) const override {
    ACF_CHECK(elements(inputs[0]) == elements(shape_), "a new shape must have as many elements");
    return shape_;
  }
  std::unique_ptr<Task> prepare(const Machine&, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    return std::make_unique<ReshapeTask>(*inputs[0], output);
  }

 private:
  Shape shape_;
};

class Transpose : public Operation {
 public:
  explicit Transpose(std::vector<std::int64_t> order) : order_(std::move(order)) {
    std::vector<std::int64_t> sorted = order_, all(order_.size());
    std::sort(sorted.begin(), sorted.end());
    std::iota(all.begin(), all.end(), 0);
    ACF_CHECK(sorted == all, "the order of a transposition must hold every axis once");
  }

  Shape infer(const std::vector<Shape>& inputs) const override {
    ACF_CHECK(inputs[0].size() == order_.size(), "a transposition of ", order_.size(), " axes, not ", inputs[0].size());
    return ordered(inputs[0]);
  }
  std::unique_ptr<Task> prepare(const Machine&, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    Shape from = {inputs[0]->image};
    for (const std::int64_t stride : ordered(inputs[0]->strides)) from.push_back(stride);
    return std::make_unique<CopyTask>(Pieces{{0, 0, 0, Rows<2>(all_dims(output), {from, all_strides(output)})}}, 1);
  }

 private:
  Shape ordered(const Shape& sizes) const {
    Shape result;
    for (const std::int64_t axis : order_) result.push_back(sizes[static_cast<std::size_t>(axis)]);
    return result;
  }

  std::vector<std::int64_t> order_;
};

class Pad : public Operation {
 public:
  Pad(Shape before, Shape after, float value) : before_(std::move(before)), after_(std::move(after)), value_(value) {}

  Shape infer(const std::vector<Shape>& inputs) const override {
    ACF_CHECK(before_.size() == inputs[0].size() && after_.size() == inputs[0].size(),
              "a padding needs two numbers for every axis");
    Shape made = inputs[0];
    for (std::size_t d = 0; d < made.size(); ++d) {
      ACF_CHECK(before_[d] >= 0 && after_[d] >= 0, "a padding must not be negative");
      made[d] += before_[d] + after_[d];
    }
    return made;
  }
  std::unique_ptr<Task> prepare(const Machine&, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    std::int64_t to = 0;
    for (std::size_t d = 0; d < before_.size(); ++d) to += before_[d] * output.strides[d];
    auto task = std::make_unique<CopyTask>(
        Pieces{{0, 0, to, Rows<2>(all_dims(*inputs[0]), {all_strides(*inputs[0]), all_strides(output)})}}, 1);
    task->fill(value_, output);
    return task;
  }

 private:
  Shape before_, after_;
  float value_;
};

class Slice : public Operation {
 public:
  Slice(std::int64_t axis, std::int64_t start, std::int64_t stop, std::int64_t step)
      : axis_(axis), start_(start), stop_(stop), step_(step) {
    ACF_CHECK(0 <= start && start < stop && step >= 1, "a slice must take something");
  }

  Shape infer(const std::vector<Shape>& inputs) const override {
    Shape made = inputs[0];
    std::int64_t& size = made[checked_axis(axis_, made)];
    ACF_CHECK(stop_ <= size, "a slice must stay within its axis");
    size = (stop_ - start_ + step_ - 1) / step_;
    return made;
  }
  std::unique_ptr<Task> prepare(const Machine&, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const auto axis = static_cast<std::size_t>(axis_);
    Shape from = all_strides(*inputs[0]);
    from[axis + 1] *= step_;
    const std::int64_t first = start_ * inputs[0]->strides[axis];
    return std::make_unique<CopyTask>(Pieces{{0, first, 0, Rows<2>(all_dims(output), {from, all_strides(output)})}}, 1);
  }

 private:
  std::int64_t axis_, start_, stop_, step_;
};

// rows: of what one index takes.
class TakeTask : public Task {
 public:
  TakeTask(Rows<2> rows, const std::vector<std::int64_t>& indices, std::int64_t from, std::int64_t to)
      : rows_(std::move(rows)), indices_(indices), from_(from), to_(to) {}

  void run(float* const* operands, float*, int) const override {
    float* out = operands[1];
    for (const std::int64_t index : indices_) {
      copy(rows_, operands[0] + index * from_, out);
      out += to_;
    }
  }

 private:
  Rows<2> rows_;
  const std::vector<std::int64_t>& indices_;
  std::int64_t from_, to_;
};

class Take : public Operation {
 public:
  Take(std::int64_t axis, std::vector<std::int64_t> indices) : axis_(axis), indices_(std::move(indices)) {}

  Shape infer(const std::vector<Shape>& inputs) const override {
    Shape made = inputs[0];
    std::int64_t& size = made[checked_axis(axis_, made)];
    for (const std::int64_t index : indices_) ACF_CHECK(index >= 0 && index < size, "there is no index ", index);
    size = static_cast<std::int64_t>(indices_.size());
    return made;
  }
  std::unique_ptr<Task> prepare(const Machine&, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const auto axis = static_cast<std::size_t>(axis_);
    Shape dims = all_dims(output);
    dims[axis + 1] = 1;
    return std::make_unique<TakeTask>(Rows<2>(dims, {all_strides(*inputs[0]), all_strides(output)}), indices_,
                                      inputs[0]->strides[axis], output.strides[axis]);
  }

 private:
  std::int64_t axis_;
  std::vector<std::int64_t> indices_;
};

}  // namespace

std::unique_ptr<Operation> concat(std::int64_t axis) { return std::make_unique<Concat>(axis); }
std::unique_ptr<Operation> reshape(Shape shape) { return std::make_unique<Reshape>(std::move(shape)); }
std::unique_ptr<Operation> transpose(std::vector<std::int64_t> order) {
  return std::make_unique<Transpose>(std::move(order));
}
std::unique_ptr<Operation> pad(Shape before, Shape after, float value) {
  return std::make_unique<Pad>(std::move(before), std::move(after), value);
}
std::unique_ptr<Operation> slice(std::int64_t axis, std::int64_t start, std::int64_t stop, std::int64_t step) {
  return std::make_unique<Slice>(axis, start, stop, step);
}
std::unique_ptr<Operation> take(std::int64_t axis, std::vector<std::int64_t> indices) {
  return std::make_unique<Take>(axis, std::move(indices));
}

}  // namespace acf::engine
