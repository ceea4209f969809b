// What every ISA provides. Registers hold images.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "training/training.h"

namespace acf::training {

// Products work on blocks of so many vectors of images: the fewer, the more rows fit into the registers.
inline constexpr int kVectors[2] = {2, 4};

struct Terms {
  std::int32_t begin, end;
};

// sums[t] = start[t] + sum over the terms i of all ranges of weights[i * rows + t] * x[origin + offsets[i]], for the
// images of a block, stored at out + to[t], or, where `adds`, added to what is there.
struct Product {
  const float* x;
  std::int64_t origin;
  const std::int32_t* offsets;
  const Terms* ranges;
  std::int64_t count;  // of ranges
  const float* weights;
  const float* start;  // null: zeros
  float* out;
  const std::int64_t* to;
  bool adds;
};

// sums[t * width + f] += sum over images i of x[origin + offsets[t] + i] * gradients[i * width + f], where `width` is
// one or two vectors of filters, and images are a multiple of kVectors[0] vectors.
struct Outer {
  const float* x;
  std::int64_t origin;
  const std::int32_t* offsets;
  const float* gradients;
  std::int64_t images;
  float* sums;
};

// to[i * width + f] = from[offsets[f] + i] for so many filters, the rest of the width zero; images as above.
struct Turn {
  const float* from;
  const std::int32_t* offsets;
  int filters, width;
  std::int64_t images;
  float* to;
};

// One pixel of the output of a pooling: the largest of `count` pixels, and its number.
struct Maximum {
  const float* const* taps;
  const std::uint8_t* numbers;
  int count;
  float* out;
  std::uint8_t* at;
  std::int64_t values;
};

// One pixel of the input: the sum of the gradients of the windows in which it is the largest.
struct Scattered {
  const float* const* gradients;
  const std::uint8_t* const* at;
  const std::uint8_t* numbers;
  int count;
  float* to;
  std::int64_t values;
};

using ProductKernel = void (*)(const Product&);
using OuterKernel = void (*)(const Outer&);

inline constexpr int kMaxRows = 14, kMaxOuterRows = 24;

struct Kernels {
  int lanes;                            // of a vector
  int most[2];                          // rows of a product with blocks of kVectors[0], kVectors[1]
  ProductKernel product[2][kMaxRows];   // [.][rows - 1]
  int most_outer[2];                    // rows of an outer product with one, two vectors of filters
  OuterKernel outer[2][kMaxOuterRows];  // [vectors - 1][rows - 1]
  void (*turn)(const Turn&);
  // Sums over a channel: of x; of (x - middle)^2; of g and of g * (x - middle). `memory` has room for two vectors of
  // every channel.
  void (*sums)(const Pixels&, const float* x, float* memory, float* sums);
  void (*squares)(const Pixels&, const float* x, const float* middle, float* memory, float* sums);
  void (*products)(const Pixels&, const float* x, const float* g, const float* middle, float* memory, float* plain,
                   float* times);
  // With numbers of every channel: out = a * x + b;  out = a * g + b * x + c.
  void (*scaled)(const Pixels&, const float* x, const float* a, const float* b, float* out);
  void (*combined)(const Pixels&, const float* x, const float* g, const float* a, const float* b, const float* c,
                   float* out);
  void (*maximum)(const Maximum&);
  void (*scattered)(const Scattered&);
};

const Kernels& kernels(Isa isa);

extern const Kernels generic_kernels, avx2_kernels, avx512_kernels, neon_kernels;

}  // namespace acf::training
