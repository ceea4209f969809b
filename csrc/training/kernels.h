// What every ISA provides. Registers hold images; a tile is `filters` x `vectors of images` of one pixel.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace acf::training {

// Rows of the largest tile of any ISA.
inline constexpr int kMaxRows = 14;

// A block holds so many vectors of images: two, or four for layers of few filters, whose tiles would not fill the
// registers otherwise.
inline constexpr int kVectors[2] = {2, 4};

// sums[t] = start[t] + sum over i < terms of weights[i * rows + t] * x[offsets[i]], for the images of a block; the
// first `images` are stored at out + to[t], or, where `adds`, all added to what is there.
struct Product {
  const float* x;
  const std::int32_t* offsets;
  std::int64_t terms;
  const float* weights;
  const float* start;  // null: zeros
  float* out;
  const std::int64_t* to;
  bool adds;
  int images;
};

// sums[i * pitch + j] += sum of a[from_a[i] + p] * b[from_b[j] + q] over the images of narrow blocks, with p and q
// those of `rows` rows of `runs` blocks.
struct Dots {
  const float *a, *b;
  const std::int32_t *from_a, *from_b;
  std::int64_t rows, a_row, b_row, runs, a_run, b_run;
  float* sums;
  std::int64_t pitch;
};

// `pixels` pixels of one channel, `images` of them that exist: from a tensor into blocks, the rest of which becomes
// zero, or back. Steps are those from pixel to pixel.
struct Move {
  const float* from;
  float* to;
  std::int64_t from_step, to_step, pixels;
  int images;
};

// One pixel of the output of a pooling: the largest of `taps` pixels, and its number.
struct Maximum {
  const float* const* taps;
  const std::uint8_t* numbers;
  int count;
  float* out;
  std::uint8_t* at;
  std::int64_t images;
};

// One pixel of the input: the sum of the gradients of the windows in which it is the largest.
struct Scattered {
  const float* const* gradients;
  const std::uint8_t* const* at;
  const std::uint8_t* numbers;
  int count;
  float* to;
  std::int64_t images;
};

using MoveKernel = void (*)(const Move&);
using ProductKernel = void (*)(const Product&);
using DotsKernel = void (*)(const Dots&);

inline constexpr int kMaxDotsA = 4, kMaxDotsB = 6;

struct Kernels {
  int lanes;                           // of a vector
  int most[2];                         // rows of a product with blocks of kVectors[0], kVectors[1]
  ProductKernel product[2][kMaxRows];  // [.][rows - 1]
  MoveKernel pack[2], unpack[2];
  int most_a, most_b;                        // of Dots
  DotsKernel dots[kMaxDotsA][kMaxDotsB];     // [a - 1][b - 1]
  float (*sum)(const float*, std::int64_t);  // of so many floats
  // Sums over `count` values: of (x - middle)^2; of g and of g * (x - middle).
  float (*squares)(const float* x, std::int64_t count, float middle);
  void (*products)(const float* x, const float* g, std::int64_t count, float middle, float (&sums)[2]);
  // out = a * x + b;  out = a * g + b * x + c.
  void (*scaled)(const float* x, std::int64_t count, float a, float b, float* out);
  void (*combined)(const float* x, const float* g, std::int64_t count, float a, float b, float c, float* out);
  void (*maximum)(const Maximum&);
  void (*scattered)(const Scattered&);
};

const Kernels& kernels(Isa isa);

extern const Kernels generic_kernels, avx2_kernels, avx512_kernels, neon_kernels;

}  // namespace acf::training
