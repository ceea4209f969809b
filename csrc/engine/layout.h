// How a value of a network lies in memory, and walks over values that lie differently.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "conv/conv.h"
#include "narrow/bytes.h"

namespace acf::engine {

using Shape = std::vector<std::int64_t>;  // of one sample

inline constexpr std::size_t kMaxDims = 9;  // of a value, samples included

std::int64_t elements(const Shape& shape);

// A value of 8 bits.
struct ByteValue {
  narrow::ByteLayout layout;
  narrow::Quantization numbers;
};

// Samples `image` floats apart, each with its own stride for every dimension. Values that convolutions read or write
// are planes with a halo (conv.h), or bytes where all that read them want the same ones; all others lie in order
// without gaps.
struct Layout {
  Shape shape, strides;
  std::int64_t images = 0, image = 0;
  std::int64_t before = 0, size = 0;  // floats in front of the first element; all of them, with what may be read behind
  conv::Layout planes;                // of values with a halo
  bool has_halo = false;
  std::optional<ByteValue> bytes;  // then strides and image tell nothing

  bool in_order() const;      // samples and their elements follow each other without gaps
  conv::Pitch pitch() const;  // of (channels, height, width) or (features,)
};

Layout in_order(const Shape& shape, std::int64_t images);
Layout as_planes(const Shape& shape, std::int64_t images, const conv::Padding& halo);
Layout as_bytes(const Shape& shape, std::int64_t images, const conv::Padding& halo,
                const narrow::Quantization& numbers);

// The rows of kCount values that are walked together: the dimensions, samples first, as few as their strides allow. Row
// r has `count` elements, step[i] floats apart in value i.
template <std::size_t kCount>
class Rows {
 public:
  using Offsets = std::array<std::int64_t, kCount>;

  Rows(const Shape& dims, const std::array<Shape, kCount>& strides) {
    for (std::size_t d = dims.size(); d-- > 0;) {
      if (dims[d] == 1) continue;
      if (!dims_.empty() && follows(strides, d)) {
        dims_.back() *= dims[d];
        continue;
      }
      dims_.push_back(dims[d]);
      Offsets stride{};
      for (std::size_t i = 0; i < kCount; ++i) stride[i] = strides[i][d];
      strides_.push_back(stride);
    }
    if (!dims_.empty()) {
      count = dims_[0];
      step = strides_[0];
    }
    for (std::size_t d = 1; d < dims_.size(); ++d) rows *= dims_[d];
  }

  // Where a row begins; moves from one to the next.
  class Place {
   public:
    Place(const Rows& rows, std::int64_t row) : rows_(rows) {
      for (std::size_t d = 1; d < rows_.dims_.size(); ++d) {
        at_[d] = row % rows_.dims_[d];
        row /= rows_.dims_[d];
        for (std::size_t i = 0; i < kCount; ++i) offsets_[i] += at_[d] * rows_.strides_[d][i];
      }
    }

    const Offsets& offsets() const { return offsets_; }
    void next() {
      for (std::size_t d = 1; d < rows_.dims_.size(); ++d) {
        ++at_[d];
        for (std::size_t i = 0; i < kCount; ++i) offsets_[i] += rows_.strides_[d][i];
        if (at_[d] < rows_.dims_[d]) break;
        for (std::size_t i = 0; i < kCount; ++i) offsets_[i] -= at_[d] * rows_.strides_[d][i];
        at_[d] = 0;
      }
    }

   private:
    const Rows& rows_;
    std::array<std::int64_t, kMaxDims> at_{};
    Offsets offsets_{};
  };

  // body(offsets) for rows [begin, end).
  template <class Body>
  void each(std::int64_t begin, std::int64_t end, const Body& body) const {
    Place place(*this, begin);
    for (std::int64_t row = begin; row < end; ++row, place.next()) body(place.offsets());
  }

  std::int64_t rows = 1, count = 1;
  Offsets step{};

 private:
  // Whether dimension d continues, for every value, the one gathered last.
  bool follows(const std::array<Shape, kCount>& strides, std::size_t d) const {
    for (std::size_t i = 0; i < kCount; ++i) {
      if (strides[i][d] != strides_.back()[i] * dims_.back()) return false;
    }
    return true;
  }

  Shape dims_;  // innermost first
  std::vector<Offsets> strides_;
};

// Strides of all dimensions, samples first.
Shape all_strides(const Layout& layout);
Shape all_dims(const Layout& layout);

// Element by element, for rows of two values of the same dimensions.
void copy(const Rows<2>& rows, const float* source, float* target);

// Two values of as many elements in other dimensions, in order.
void copy_in_order(const Rows<1>& from, const float* source, const Rows<1>& to, float* target);

}  // namespace acf::engine
