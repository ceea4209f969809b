#include "engine/layout.h"

#include <algorithm>

namespace acf::engine {
std::int64_t elements(const Shape& shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

bool Layout::in_order() const {
  if (bytes) return false;
  std::int64_t expected = 1;
  for (std::size_t d = shape.size(); d-- > 0;) {
    if (shape[d] != 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return images == 1 || image == expected;
}

conv::Pitch Layout::pitch() const {
  if (shape.size() == 3) return {strides[1], strides[0], image};
  return {1, 1, image};
}

Layout in_order(const Shape& shape, std::int64_t images) {
  Layout layout;
  layout.shape = shape;
  layout.strides.resize(shape.size());
  layout.images = images;
  layout.image = 1;
  for (std::size_t d = shape.size(); d-- > 0;) {
    layout.strides[d] = layout.image;
    layout.image *= shape[d];
  }
  layout.size = images * layout.image + conv::kSlack;
  return layout;
}

Layout as_planes(const Shape& shape, std::int64_t images, const conv::Padding& halo) {
  Layout layout;
  layout.shape = shape;
  layout.images = images;
  layout.planes = conv::layout(images, shape[0], shape[1], shape[2], halo);
  layout.strides = {layout.planes.pitch.plane, layout.planes.pitch.row, 1};
  layout.image = layout.planes.pitch.image;
  layout.before = layout.planes.before;
  layout.size = layout.planes.size;
  layout.has_halo = halo.top + halo.left + halo.bottom + halo.right > 0;
  return layout;
}

Layout as_bytes(const Shape& shape, std::int64_t images, const conv::Padding& halo,
                const narrow::Quantization& numbers) {
  constexpr auto kFloat = static_cast<std::int64_t>(sizeof(float));
  Layout layout;
  layout.shape = shape;
  layout.images = images;
  layout.bytes = {narrow::byte_layout(images, shape[0], shape[1], shape[2], halo), numbers};
  layout.before = layout.bytes->layout.before / kFloat;
  layout.size = (layout.bytes->layout.size + kFloat - 1) / kFloat;
  layout.has_halo = halo.top + halo.left + halo.bottom + halo.right > 0;
  return layout;
}

Shape all_strides(const Layout& layout) {
  Shape strides = {layout.image};
  strides.insert(strides.end(), layout.strides.begin(), layout.strides.end());
  return strides;
}

Shape all_dims(const Layout& layout) {
  Shape dims = {layout.images};
  dims.insert(dims.end(), layout.shape.begin(), layout.shape.end());
  return dims;
}

void copy(const Rows<2>& rows, const float* source, float* target) {
  rows.each(0, rows.rows, [&](const auto& at) {
    const float* x = source + at[0];
    float* y = target + at[1];
    if (rows.step[0] == 1 && rows.step[1] == 1) {
      std::copy_n(x, rows.count, y);
    } else {
      for (std::int64_t i = 0; i < rows.count; ++i) y[i * rows.step[1]] = x[i * rows.step[0]];
    }
  });
}

namespace {

// Through the runs of neighbouring floats of a value. There may be as many as elements: none is written down.
class Walk {
 public:
  explicit Walk(const Rows<1>& rows)
      : place_(rows, 0), step_(rows.step[0]), length_(step_ == 1 ? rows.count : 1), runs_(rows.count / length_) {
    begin_run();
  }

  std::int64_t at() const { return at_; }
  std::int64_t left() const { return left_; }  // of the run under way
  void skip(std::int64_t count) {
    at_ += count;
    left_ -= count;
    if (left_ > 0) return;
    if (++run_ == runs_) {
      run_ = 0;
      place_.next();
    }
    begin_run();
  }

 private:
  void begin_run() {
    at_ = place_.offsets()[0] + run_ * step_;
    left_ = length_;
  }

  Rows<1>::Place place_;
  std::int64_t step_, length_, runs_;  // runs: of a row
  std::int64_t run_ = 0, at_ = 0, left_ = 0;
};

}  // namespace

void copy_in_order(const Rows<1>& from, const float* source, const Rows<1>& to, float* target) {
  Walk read(from), written(to);
  for (std::int64_t left = from.rows * from.count; left > 0;) {
    const std::int64_t length = std::min(read.left(), written.left());
    std::copy_n(source + read.at(), length, target + written.at());
    read.skip(length);
    written.skip(length);
    left -= length;
  }
}

}  // namespace acf::engine
