// Values of 8 bits as they lie between two layers that compute with integers: made by the one that writes them, as
// narrow.h says what a layer does with those it reads, so results are the same bits.
//
// The channels of a pixel lie side by side, four of them in a row of columns: a tap and four channels. A product takes
// a row of columns of some pixels, 4 bytes of each, broadcast, with those of 16 filters. So it finds pixels wherever
// they are, whatever the stride, and the columns of any tap; rows that hold no column that is kept are left out.
// Around every image lies a halo of the number that stands for zero, shared as in conv.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv/conv.h"
#include "narrow/narrow.h"

namespace acf::narrow {

// In bytes; a pixel takes a multiple of 4 of them.
struct BytePitch {
  std::int64_t pixel = 4, row = 4, image = 4;
};

struct ByteLayout {
  BytePitch pitch;
  std::int64_t before = 0, size = 0;  // as those of conv::Layout, multiples of 4
};
ByteLayout byte_layout(std::int64_t images, std::int64_t channels, std::int64_t height, std::int64_t width,
                       const conv::Padding& padding);

// Makes everything of the layout that is not interior stand for zero; `data` points at the first pixel.
void fill_halo(unsigned char* data, const ByteLayout& layout, std::int64_t images, std::int64_t height,
               std::int64_t width, const Quantization& numbers);

// Planes of float32 as bytes, without the halo. The unit has byte_columns().
void make_bytes(Unit unit, const conv::Pitch& from_pitch, const float* from, const Quantization& numbers,
                std::int64_t images, std::int64_t channels, std::int64_t height, std::int64_t width,
                const BytePitch& to_pitch, unsigned char* to, int threads);

// How one convolution of one group, or a depthwise one, will be computed.
struct BytePlan {
  conv::Shape shape;
  ByteLayout in;
  Unit unit = Unit::generic;
  std::int64_t rows = 0;  // of columns, that hold any that are kept; depthwise: taps
};

// Whether the unit computes on bytes; and of how many columns the cost is, those that are kept and others of the same
// rows; 0 for convolutions that it does not compute.
bool has_bytes(Unit unit);
std::int64_t byte_columns(const conv::Shape& shape, std::int64_t count, const std::int64_t* columns);

// Throws std::invalid_argument as plan() of narrow.h does.
BytePlan byte_plan(const conv::Shape& shape, const ByteLayout& in, std::int64_t count, const std::int64_t* columns,
                   Unit unit);
std::size_t packed_size(const BytePlan& plan);
bool same_packed(const BytePlan& one, const BytePlan& other);
void pack(const BytePlan& plan, std::int64_t count, const std::int64_t* columns, const float* weights,
          const float* scales, const Quantization& input, const float* bias, void* packed);

// What is added before the activation: float(byte - zero) * scale.
struct ByteResidual {
  const unsigned char* bytes = nullptr;
  BytePitch pitch;
  Quantization numbers;
};

// Where results go: bytes, or planes of float32.
struct ByteTarget {
  unsigned char* bytes = nullptr;
  BytePitch byte_pitch;
  Quantization numbers;
  float* planes = nullptr;
  conv::Pitch pitch;
};

// residual: null for none, or for that of the epilogue, which results in planes alone may have.
std::int64_t scratch_size(const BytePlan& plan);
void run(const BytePlan& plan, const void* packed, std::int64_t images, const unsigned char* in,
         const ByteResidual* residual, const ByteTarget& target, const conv::Epilogue& epilogue, float* scratch,
         int threads);

}  // namespace acf::narrow
