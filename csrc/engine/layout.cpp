#include "engine/layout.h"

#include <algorithm>

namespace acf::engine {
std::int64_t elements(const Shape& shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

bool Layout::in_order() const {
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

Runs::Runs(const Layout& layout) {
  const Rows<1> rows(all_dims(layout), {all_strides(layout)});
  const bool together = rows.step[0] == 1;
  length = together ? rows.count : 1;
  rows.each(0, rows.rows, [&](const auto& at) {
    for (std::int64_t i = 0; i < (together ? 1 : rows.count); ++i) starts.push_back(at[0] + i * rows.step[0]);
  });
}

void copy_in_order(const Runs& from, const float* source, const Runs& to, float* target) {
  std::int64_t read = 0, written = 0;  // of the runs under way
  std::size_t i = 0, j = 0;
  while (i < from.starts.size() && j < to.starts.size()) {
    const std::int64_t length = std::min(from.length - read, to.length - written);
    std::copy_n(source + from.starts[i] + read, length, target + to.starts[j] + written);
    read += length;
    written += length;
    if (read == from.length) {
      read = 0;
      ++i;
    }
    if (written == to.length) {
      written = 0;
      ++j;
    }
  }
}

}  // namespace acf::engine
