// Products of values with each other: matrices, and attention.
#include <algorithm>
#include <array>

#include "core/check.h"
#include "core/parallel.h"
#include "engine/operation.h"
#include "engine/powers.h"

namespace acf::engine {
namespace {

constexpr std::int64_t kTaskMacs = 1 << 18;  // fewer are not worth another thread
constexpr std::int64_t kRows = 32;           // of a product that are computed at a time

// What rows are multiplied by: a matrix (depth, columns), cut into panels of some blocks of columns, each packed one
// row after the other, with zeros behind the last column. Any matrix will do for the kernel that Winograd's
// convolutions multiply few tiles with.
class Panels {
 public:
  Panels(std::int64_t depth, std::int64_t columns, Isa isa)
      : depth_(depth),
        columns_(columns),
        blocks_((columns + conv::kBlock - 1) / conv::kBlock),
        kernels_(conv::kernels(isa)) {
    std::int64_t widest = 1;
    double best = 0;
    for (std::int64_t blocks = 1; blocks <= std::min<std::int64_t>(blocks_, conv::kMaxBlocks); ++blocks) {
      const std::int64_t vectors_of_block = conv::kBlock / kernels_.lanes;
      const auto rows = static_cast<double>(most_rows(blocks)),
                 vectors = static_cast<double>(blocks * vectors_of_block);
      const double gain = rows * vectors / (rows + vectors);  // multiply-adds for every load
      if (gain > best) widest = blocks, best = gain;
    }
    count_ = (blocks_ + widest - 1) / widest;
  }

  std::int64_t pitch() const { return blocks_ * conv::kBlock; }  // of the product's rows
  std::int64_t size() const { return depth_ * pitch(); }

  // Element (d, c) lies at matrix + d * row + c * column.
  void pack(const float* matrix, std::int64_t row, std::int64_t column, float* packed) const {
    for (std::int64_t p = 0; p < count_; ++p) {
      const std::int64_t first = begin(p) * conv::kBlock, width = begin(p + 1) * conv::kBlock - first,
                         filled = std::min(width, columns_ - first);
      for (std::int64_t d = 0; d < depth_; ++d, packed += width) {
        const float* from = matrix + d * row + first * column;
        for (std::int64_t c = 0; c < filled; ++c) packed[c] = from[c * column];
        std::fill(packed + filled, packed + width, 0.0f);
      }
    }
  }

  // product (rows, pitch()) = rows, so far apart, times what was packed.
  void multiply(const float* from, std::int64_t apart, std::int64_t rows, const float* packed, float* product) const {
    for (std::int64_t p = 0; p < count_; ++p) {
      const std::int64_t blocks = begin(p + 1) - begin(p), most = most_rows(blocks), parts = (rows + most - 1) / most;
      for (std::int64_t i = 0; i < parts; ++i) {
        const std::int64_t first = rows * i / parts, size = rows * (i + 1) / parts - first;
        conv::WinogradFewProduct call;
        for (std::int64_t r = 0; r < size; ++r) call.tiles[r] = from + (first + r) * apart;
        call.v_channel = 1;
        call.channels = depth_;
        call.weights = packed + begin(p) * conv::kBlock * depth_;
        call.m = product + first * pitch() + begin(p) * conv::kBlock;
        call.m_tile = pitch();
        kernels_.winograd_few_product[size - 1][blocks - 1](call);
      }
    }
  }

 private:
  std::int64_t begin(std::int64_t panel) const { return blocks_ * panel / count_; }
  std::int64_t most_rows(std::int64_t blocks) const {
    std::int64_t rows = conv::kMaxPixels;
    while (rows > 0 && kernels_.winograd_few_product[rows - 1][blocks - 1] == nullptr) --rows;
    return rows;
  }

  std::int64_t depth_, columns_, blocks_, count_ = 1;
  const conv::Kernels& kernels_;
};

// Computes matrix after matrix, with scratch of its own for each that is under way. Values: the inputs and the output.
template <std::size_t kValues>
class MatricesTask : public Task {
 public:
  void run(float* const* operands, float* memory, int threads) const override {
    const std::int64_t tasks = std::min(count_, std::clamp<std::int64_t>(count_ * macs_ / kTaskMacs, 1, 4 * threads));
    Slots slots(static_cast<int>(std::min<std::int64_t>({tasks, threads, Slots::most()})));
    parallel_for(tasks, slots.count(), [&](std::int64_t task) {
      slots.with([&](int slot) {
        for (std::int64_t m = count_ * task / tasks; m < count_ * (task + 1) / tasks; ++m) {
          fronts_.each(m / fronts_.count, m / fronts_.count + 1, [&](const auto& at) {
            std::array<float*, kValues> matrices;
            for (std::size_t i = 0; i < kValues; ++i) {
              matrices[i] = operands[i] + at[i] + m % fronts_.count * fronts_.step[i];
            }
            compute(matrices, memory + slot * pitch_);
          });
        }
      });
    });
  }

 protected:
  explicit MatricesTask(const std::array<const Layout*, kValues>& values)
      : fronts_(front(all_dims(*values[0])), fronts(values)), count_(fronts_.rows * fronts_.count) {
    for (std::size_t i = 0; i < kValues; ++i) row_[i] = values[i]->strides[values[i]->strides.size() - 2];
  }
  // floats: of scratch; macs: both for one matrix.
  void needs(std::int64_t floats, std::int64_t macs) {
    constexpr std::int64_t kLine = conv::kAlignment / sizeof(float);
    pitch_ = (floats + kLine - 1) / kLine * kLine;
    macs_ = macs;
    scratch = pitch_ * std::min<std::int64_t>(count_, Slots::most());
  }

  virtual void compute(const std::array<float*, kValues>& matrices, float* memory) const = 0;

  std::array<std::int64_t, kValues> row_;  // how far apart the rows of a matrix lie, whose elements are neighbours

 private:
  static Shape front(const Shape& all) { return Shape(all.begin(), all.end() - 2); }
  static std::array<Shape, kValues> fronts(const std::array<const Layout*, kValues>& values) {
    std::array<Shape, kValues> strides;
    for (std::size_t i = 0; i < kValues; ++i) strides[i] = front(all_strides(*values[i]));
    return strides;
  }

  Rows<kValues> fronts_;
  std::int64_t count_, pitch_ = 0, macs_ = 0;
};

std::int64_t rows_of(const Shape& shape) { return shape[shape.size() - 2]; }

Shape with_columns(Shape shape, std::int64_t columns) {
  shape.back() = columns;
  return shape;
}

void check_matrices(const std::vector<Shape>& inputs, std::size_t count) {
  ACF_CHECK(inputs.size() == count, "there must be ", count, " inputs, got ", inputs.size());
  for (const Shape& shape : inputs) {
    ACF_CHECK(shape.size() >= 2 && shape.size() == inputs[0].size() &&
                  std::equal(shape.begin(), shape.end() - 2, inputs[0].begin()),
              "the inputs must be as many matrices each");
  }
}

class MatmulTask : public MatricesTask<3> {
 public:
  MatmulTask(const Layout& left, const Layout& right, const Layout& output, Isa isa)
      : MatricesTask<3>({&left, &right, &output}),
        rows_(rows_of(left.shape)),
        columns_(right.shape.back()),
        panels_(left.shape.back(), columns_, isa) {
    needs(panels_.size() + kRows * panels_.pitch(), rows_ * left.shape.back() * columns_);
  }

 private:
  void compute(const std::array<float*, 3>& matrices, float* memory) const override {
    panels_.pack(matrices[1], row_[1], 1, memory);
    float* product = memory + panels_.size();
    for (std::int64_t first = 0; first < rows_; first += kRows) {
      const std::int64_t rows = std::min(kRows, rows_ - first);
      panels_.multiply(matrices[0] + first * row_[0], row_[0], rows, memory, product);
      for (std::int64_t r = 0; r < rows; ++r) {
        std::copy_n(product + r * panels_.pitch(), columns_, matrices[2] + (first + r) * row_[2]);
      }
    }
  }

  std::int64_t rows_, columns_;
  Panels panels_;
};

class Matmul : public Operation {
 public:
  Shape infer(const std::vector<Shape>& inputs) const override {
    check_matrices(inputs, 2);
    ACF_CHECK(inputs[0].back() == rows_of(inputs[1]), "a matrix of ", inputs[0].back(),
              " columns cannot be multiplied by one of ", rows_of(inputs[1]), " rows");
    return with_columns(inputs[0], inputs[1].back());
  }
  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    return std::make_unique<MatmulTask>(*inputs[0], *inputs[1], output, machine.isa);
  }
};

// ---- attention ------------------------------------------------------------------------------------------------------

class AttentionTask : public MatricesTask<4> {
 public:
  AttentionTask(const Layout& queries, const Layout& keys, const Layout& values, const Layout& output, float scale,
                Isa isa)
      : MatricesTask<4>({&queries, &keys, &values, &output}),
        scale_(scale),
        rows_(rows_of(queries.shape)),
        keys_(rows_of(keys.shape)),
        columns_(values.shape.back()),
        scores_(keys.shape.back(), keys_, isa),
        mixed_(keys_, columns_, isa),
        kernels_(conv::kernels(isa)) {
    needs(scores_.size() + mixed_.size() + kRows * (scores_.pitch() + mixed_.pitch()),
          rows_ * keys_ * (keys.shape.back() + columns_));
  }

 private:
  // Some queries at a time, so that their scores stay in the cache.
  void compute(const std::array<float*, 4>& matrices, float* memory) const override {
    float *keys = memory, *values = keys + scores_.size(), *scores = values + mixed_.size(),
          *mixed = scores + kRows * scores_.pitch();
    scores_.pack(matrices[1], 1, row_[1], keys);
    mixed_.pack(matrices[2], row_[2], 1, values);
    for (std::int64_t first = 0; first < rows_; first += kRows) {
      const std::int64_t rows = std::min(kRows, rows_ - first);
      scores_.multiply(matrices[0] + first * row_[0], row_[0], rows, keys, scores);
      float shares[kRows];
      for (std::int64_t r = 0; r < rows; ++r) {
        to_powers(scores + r * scores_.pitch(), keys_, scale_);
        shares[r] = 1.0f / kernels_.sum(scores + r * scores_.pitch(), keys_);
      }
      mixed_.multiply(scores, scores_.pitch(), rows, values, mixed);
      for (std::int64_t r = 0; r < rows; ++r) {
        const float* from = mixed + r * mixed_.pitch();
        float* to = matrices[3] + (first + r) * row_[3];
        for (std::int64_t c = 0; c < columns_; ++c) to[c] = from[c] * shares[r];
      }
    }
  }

  float scale_;
  std::int64_t rows_, keys_, columns_;
  Panels scores_, mixed_;
  const conv::Kernels& kernels_;
};

class Attention : public Operation {
 public:
  explicit Attention(float scale) : scale_(scale) {}

  Shape infer(const std::vector<Shape>& inputs) const override {
    check_matrices(inputs, 3);
    ACF_CHECK(inputs[0].back() == inputs[1].back(), "queries of ", inputs[0].back(), " features do not match keys of ",
              inputs[1].back());
    ACF_CHECK(rows_of(inputs[1]) == rows_of(inputs[2]), "there are ", rows_of(inputs[1]), " keys for ",
              rows_of(inputs[2]), " values");
    return with_columns(inputs[0], inputs[2].back());
  }
  std::unique_ptr<Task> prepare(const Machine& machine, const std::vector<const Layout*>& inputs,
                                const Layout& output) override {
    return std::make_unique<AttentionTask>(*inputs[0], *inputs[1], *inputs[2], output, scale_, machine.isa);
  }

 private:
  float scale_;
};

}  // namespace

std::unique_ptr<Operation> matmul() { return std::make_unique<Matmul>(); }
std::unique_ptr<Operation> attention(float scale) { return std::make_unique<Attention>(scale); }

}  // namespace acf::engine
