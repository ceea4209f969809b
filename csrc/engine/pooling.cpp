// Pooling, means and norms.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/check.h"
#include "core/parallel.h"
#include "engine/operation.h"

namespace acf::engine {
namespace {

constexpr std::int64_t kTaskElements = 1 << 13;  // fewer are not worth another thread

// body(n, c) for every plane.
template <class Body>
void each_plane(std::int64_t images, std::int64_t channels, std::int64_t plane_elements, int threads,
                const Body& body) {
  const std::int64_t planes = images * channels,
                     tasks = std::clamp<std::int64_t>(planes * plane_elements / kTaskElements, 1, 4 * threads);
  parallel_for(std::min(tasks, planes), tasks == 1 ? 1 : threads, [&](std::int64_t task) {
    const std::int64_t used = std::min(tasks, planes);
    for (std::int64_t p = planes * task / used; p < planes * (task + 1) / used; ++p) body(p / channels, p % channels);
  });
}

// Windows along one axis: those of outputs [whole_begin, whole_end) lie in the input.
struct Axis {
  std::int64_t size, kernel, stride, dilation, before, outputs;
  std::int64_t whole_begin, whole_end;

  std::int64_t start(std::int64_t i) const { return i * stride - before; }
  // The taps [first, last) of window i that lie in the input.
  std::int64_t first(std::int64_t i) const { return std::max<std::int64_t>(0, steps(-start(i))); }
  std::int64_t last(std::int64_t i) const { return std::clamp<std::int64_t>(steps(size - start(i)), 0, kernel); }
  // Of the dilation, that cover so many elements. A division takes as long as a window.
  std::int64_t steps(std::int64_t elements) const {
    return dilation == 1 ? elements : (elements + dilation - 1) / dilation;
  }
};

Axis axis_of(std::int64_t size, std::int64_t kernel, std::int64_t stride, std::int64_t dilation, std::int64_t before,
             bool ceil) {
  const std::int64_t room = size + 2 * before - dilation * (kernel - 1) - 1;
  Axis axis = {size, kernel, stride, dilation, before, 0, 0, 0};
  if (room < 0 && !(ceil && room + stride - 1 >= 0)) return axis;
  axis.outputs = (room + (ceil ? stride - 1 : 0)) / stride + 1;
  if (ceil && (axis.outputs - 1) * stride >= size + before) --axis.outputs;
  axis.whole_begin = std::min(axis.outputs, (before + stride - 1) / stride);
  const std::int64_t last_start = size - 1 - dilation * (kernel - 1);
  axis.whole_end = last_start + before < 0 ? 0 : std::min(axis.outputs, (last_start + before) / stride + 1);
  axis.whole_end = std::max(axis.whole_begin, axis.whole_end);
  return axis;
}

class PoolTask : public Task {
 public:
  PoolTask(const Pooling& pooling, Axis rows, Axis columns, const Layout& input, const Layout& output, Isa isa)
      : pooling_(pooling),
        rows_(rows),
        columns_(columns),
        input_(input),
        output_(output),
        kernels_(conv::kernels(isa)) {}

  void run(float* const* operands, float*, int threads) const override {
    each_plane(input_.images, input_.shape[0], rows_.size * columns_.size, threads,
               [&](std::int64_t n, std::int64_t c) {
                 const float* from = operands[0] + n * input_.image + c * input_.strides[0];
                 float* to = operands[1] + n * output_.image + c * output_.strides[0];
                 for (std::int64_t y = 0; y < rows_.whole_begin; ++y) pool(from, to, y, y + 1);
                 pool(from, to, rows_.whole_begin, rows_.whole_end);
                 for (std::int64_t y = rows_.whole_end; y < rows_.outputs; ++y) pool(from, to, y, y + 1);
               });
  }

 private:
  // Rows whose windows have the same taps in the input.
  void pool(const float* plane, float* out, std::int64_t begin, std::int64_t end) const {
    if (begin == end) return;
    const std::int64_t first = rows_.first(begin), taps = rows_.last(begin) - first, pitch = input_.strides[1],
                       in_step = rows_.stride * pitch, out_step = output_.strides[1];
    const float* from = plane + (rows_.start(begin) + first * rows_.dilation) * pitch;
    out += begin * out_step;
    // Of each row those in the input at once; a row of windows all above or below it has none.
    const std::int64_t whole = taps > 0 ? columns_.whole_begin : columns_.outputs,
                       after = taps > 0 ? columns_.whole_end : columns_.outputs;
    if (after > whole) {
      kernels_.pool({pooling_.largest, scale(begin, whole), from + columns_.start(whole), pitch * rows_.dilation, taps,
                     columns_.kernel, columns_.dilation, columns_.stride, out + whole, after - whole, end - begin,
                     in_step, out_step});
    }
    for (std::int64_t y = begin; y < end; ++y, from += in_step, out += out_step) {
      for (std::int64_t x = 0; x < whole; ++x) out[x] = edge(from, taps, y, x);
      for (std::int64_t x = after; x < columns_.outputs; ++x) out[x] = edge(from, taps, y, x);
    }
  }

  // A window that sticks out.
  float edge(const float* from, std::int64_t taps, std::int64_t y, std::int64_t x) const {
    float pooled = pooling_.largest ? -std::numeric_limits<float>::infinity() : 0.0f;
    const std::int64_t begin = columns_.first(x), end = columns_.last(x);
    for (std::int64_t kh = 0; kh < taps; ++kh) {
      for (std::int64_t kw = begin; kw < end; ++kw) {
        const float tap = from[kh * rows_.dilation * input_.strides[1] + columns_.start(x) + kw * columns_.dilation];
        if (!pooling_.largest) pooled += tap;
        if (pooling_.largest && !(pooled > tap || pooled != pooled)) pooled = tap;  // NaN stays
      }
    }
    return pooling_.largest ? pooled : pooled * scale(y, x);
  }

  // A mean counts what lies in the input or, if asked, in the padding; never what sticks out behind that.
  float scale(std::int64_t y, std::int64_t x) const {
    if (pooling_.largest) return 1.0f;
    return 1.0f / static_cast<float>(counted(rows_, y) * counted(columns_, x));
  }
  std::int64_t counted(const Axis& axis, std::int64_t i) const {
    const std::int64_t more = pooling_.count_padding ? axis.before : 0;
    return std::min(axis.start(i) + axis.kernel, axis.size + more) - std::max(axis.start(i), -more);
  }

  Pooling pooling_;
  Axis rows_, columns_;
  Layout input_, output_;
  const conv::Kernels& kernels_;
};

// The largest of bytes: they rise with what they stand for. A window that has nothing of the input is minus infinity.
class BytePoolTask : public Task {
 public:
  BytePoolTask(Axis rows, Axis columns, const Layout& input, const Layout& output)
      : rows_(rows),
        columns_(columns),
        images_(input.images),
        from_(input.bytes->layout.pitch),
        to_(output.bytes->layout.pitch) {}

  void run(float* const* operands, float*, int threads) const override {
    const auto* in = reinterpret_cast<const unsigned char*>(operands[0]);
    auto* out = reinterpret_cast<unsigned char*>(operands[1]);
    each_plane(images_, rows_.outputs, columns_.outputs * rows_.kernel * from_.pixel, threads,
               [&](std::int64_t n, std::int64_t y) {
                 const unsigned char* from = in + n * from_.image + rows_.start(y) * from_.row;
                 unsigned char* to = out + n * to_.image + y * to_.row;
                 for (std::int64_t x = 0; x < columns_.outputs; ++x, to += to_.pixel) {
                   pool(from + columns_.start(x) * from_.pixel, y, x, to);
                 }
               });
  }

 private:
  void pool(const unsigned char* from, std::int64_t y, std::int64_t x, unsigned char* to) const {
    std::int64_t done = 0;
    for (; done + 64 <= from_.pixel; done += 64) pool_channels<64>(from + done, y, x, to + done);
    for (; done + 16 <= from_.pixel; done += 16) pool_channels<16>(from + done, y, x, to + done);
    for (; done < from_.pixel; done += 4) pool_channels<4>(from + done, y, x, to + done);
  }

  // A known number of them stays in registers.
  template <std::size_t kCount>
  void pool_channels(const unsigned char* from, std::int64_t y, std::int64_t x, unsigned char* to) const {
    std::array<unsigned char, kCount> largest = {}, tap;
    for (std::int64_t kh = rows_.first(y); kh < rows_.last(y); ++kh) {
      for (std::int64_t kw = columns_.first(x); kw < columns_.last(x); ++kw) {
        std::memcpy(tap.data(), from + kh * rows_.dilation * from_.row + kw * columns_.dilation * from_.pixel, kCount);
        for (std::size_t c = 0; c < kCount; ++c) largest[c] = std::max(largest[c], tap[c]);
      }
    }
    std::memcpy(to, largest.data(), kCount);
  }

  Axis rows_, columns_;
  std::int64_t images_;
  narrow::BytePitch from_, to_;
};

class Pool : public Operation {
 public:
  explicit Pool(const Pooling& pooling) : pooling_(pooling) {}

  bool passes_bytes() const override { return pooling_.largest; }

  Shape infer(const std::vector<Shape>& inputs) const override {
    ACF_CHECK(inputs[0].size() == 3, "a pooling takes (channels, height, width)");
    ACF_CHECK(pooling_.largest || pooling_.window.dilation_h * pooling_.window.dilation_w == 1,
              "a mean of windows has no dilation");
    Shape made = {inputs[0][0], rows(inputs[0]).outputs, columns(inputs[0]).outputs};
    ACF_CHECK(made[1] > 0 && made[2] > 0, "the windows do not fit into the input");
    return made;
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const Shape& shape = inputs[0]->shape;
    if (inputs[0]->bytes) return std::make_unique<BytePoolTask>(rows(shape), columns(shape), *inputs[0], output);
    return std::make_unique<PoolTask>(pooling_, rows(shape), columns(shape), *inputs[0], output, machine.isa);
  }

 private:
  Axis rows(const Shape& shape) const {
    const Window& w = pooling_.window;
    return axis_of(shape[1], w.kernel_h, w.stride_h, w.dilation_h, w.padding.top, pooling_.ceil);
  }
  Axis columns(const Shape& shape) const {
    const Window& w = pooling_.window;
    return axis_of(shape[2], w.kernel_w, w.stride_w, w.dilation_w, w.padding.left, pooling_.ceil);
  }

  Pooling pooling_;
};

// ---- means ----------------------------------------------------------------------------------------------------------

// Window i of `outputs` runs from floor(i * size / outputs) to ceil((i + 1) * size / outputs).
class AdaptiveTask : public Task {
 public:
  AdaptiveTask(const Layout& input, const Layout& output, Isa isa)
      : input_(input), output_(output), kernels_(conv::kernels(isa)) {}

  void run(float* const* operands, float*, int threads) const override {
    const std::int64_t height = input_.shape[1], width = input_.shape[2], out_height = output_.shape[1],
                       out_width = output_.shape[2];
    each_plane(input_.images, input_.shape[0], height * width, threads, [&](std::int64_t n, std::int64_t c) {
      const float* from = operands[0] + n * input_.image + c * input_.strides[0];
      float* to = operands[1] + n * output_.image + c * output_.strides[0];
      for (std::int64_t y = 0; y < out_height; ++y) {
        const std::int64_t top = y * height / out_height, bottom = ((y + 1) * height + out_height - 1) / out_height;
        for (std::int64_t x = 0; x < out_width; ++x) {
          const std::int64_t left = x * width / out_width, right = ((x + 1) * width + out_width - 1) / out_width;
          float total = 0;
          for (std::int64_t row = top; row < bottom; ++row) {
            total += kernels_.sum(from + row * input_.strides[1] + left, right - left);
          }
          to[y * output_.strides[1] + x] = total / static_cast<float>((bottom - top) * (right - left));
        }
      }
    });
  }

 private:
  Layout input_, output_;
  const conv::Kernels& kernels_;
};

class Adaptive : public Operation {
 public:
  Adaptive(std::int64_t height, std::int64_t width) : height_(height), width_(width) {
    ACF_CHECK(height >= 1 && width >= 1, "the output of a pooling must not be empty");
  }
  Shape infer(const std::vector<Shape>& inputs) const override {
    ACF_CHECK(inputs[0].size() == 3, "a pooling takes (channels, height, width)");
    return {inputs[0][0], height_, width_};
  }
  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    return std::make_unique<AdaptiveTask>(*inputs[0], output, machine.isa);
  }

 private:
  std::int64_t height_, width_;
};

class MeanTask : public Task {
 public:
  // outer: what is kept, (input, output); inner: what the mean is taken over. Or the root of the sum of squares.
  MeanTask(Rows<2> outer, Rows<1> inner, bool root, Isa isa)
      : outer_(std::move(outer)), inner_(std::move(inner)), root_(root), kernels_(conv::kernels(isa)) {}

  void run(float* const* operands, float*, int) const override {
    const auto count = static_cast<double>(inner_.rows * inner_.count);
    outer_.each(0, outer_.rows, [&](const auto& at) {
      for (std::int64_t i = 0; i < outer_.count; ++i) {
        const float* from = operands[0] + at[0] + i * outer_.step[0];
        double total = 0;
        inner_.each(0, inner_.rows, [&](const auto& offset) {
          const float* row = from + offset[0];
          if (root_) {
            for (std::int64_t j = 0; j < inner_.count; ++j) total += square(row[j * inner_.step[0]]);
          } else if (inner_.step[0] == 1) {
            total += static_cast<double>(kernels_.sum(row, inner_.count));
          } else {
            for (std::int64_t j = 0; j < inner_.count; ++j) total += static_cast<double>(row[j * inner_.step[0]]);
          }
        });
        operands[1][at[1] + i * outer_.step[1]] = static_cast<float>(root_ ? std::sqrt(total) : total / count);
      }
    });
  }

 private:
  static double square(float x) { return static_cast<double>(x) * static_cast<double>(x); }

  Rows<2> outer_;
  Rows<1> inner_;
  bool root_;
  const conv::Kernels& kernels_;
};

class Mean : public Operation {
 public:
  Mean(std::vector<std::int64_t> axes, bool keep, bool root) : axes_(std::move(axes)), keep_(keep), root_(root) {
    std::sort(axes_.begin(), axes_.end());
    ACF_CHECK(!axes_.empty() && axes_[0] >= 0 && std::adjacent_find(axes_.begin(), axes_.end()) == axes_.end(),
              "the axes of a mean or norm must be different, at least one");
  }

  Shape infer(const std::vector<Shape>& inputs) const override {
    ACF_CHECK(axes_.back() < static_cast<std::int64_t>(inputs[0].size()), "there is no axis ", axes_.back());
    Shape made;
    for (std::size_t d = 0; d < inputs[0].size(); ++d) {
      if (!reduces(d)) {
        made.push_back(inputs[0][d]);
      } else if (keep_) {
        made.push_back(1);
      }
    }
    return made;
  }

  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    const Layout& input = *inputs[0];
    Shape kept = {input.images}, reduced, kept_in = {input.image}, kept_out = {output.image}, reduced_in;
    std::size_t made = 0;
    for (std::size_t d = 0; d < input.shape.size(); ++d) {
      if (reduces(d)) {
        reduced.push_back(input.shape[d]);
        reduced_in.push_back(input.strides[d]);
        made += keep_ ? 1 : 0;
      } else {
        kept.push_back(input.shape[d]);
        kept_in.push_back(input.strides[d]);
        kept_out.push_back(output.strides[made++]);
      }
    }
    return std::make_unique<MeanTask>(Rows<2>(kept, {kept_in, kept_out}), Rows<1>(reduced, {reduced_in}), root_,
                                      machine.isa);
  }

 private:
  bool reduces(std::size_t d) const {
    return std::binary_search(axes_.begin(), axes_.end(), static_cast<std::int64_t>(d));
  }

  std::vector<std::int64_t> axes_;
  bool keep_, root_;
};

}  // namespace

std::unique_ptr<Operation> pool(const Pooling& pooling) { return std::make_unique<Pool>(pooling); }
std::unique_ptr<Operation> adaptive_average(std::int64_t height, std::int64_t width) {
  return std::make_unique<Adaptive>(height, width);
}
std::unique_ptr<Operation> mean(std::vector<std::int64_t> axes, bool keep) {
  return std::make_unique<Mean>(std::move(axes), keep, false);
}
std::unique_ptr<Operation> norm(std::vector<std::int64_t> axes, bool keep) {
  return std::make_unique<Mean>(std::move(axes), keep, true);
}

}  // namespace acf::engine
