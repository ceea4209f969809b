// Convolution and linear layers whose products are of narrow numbers: bfloat16 with sums in float32, or 8-bit integers
// with sums in int32. Tensors, shapes, columns, halos and epilogues are those of conv.h, in float32: a value is made
// narrow while it is read.
//
//   sums (filters, pixels) = weights (filters, columns) * values (columns, pixels)
//
// in tiles of 16 filters and 16 pixels that take 64 bytes of columns of each at once: 32 of bfloat16, 64 of int8. The
// values of some tiles of pixels are gathered column by column, as the kept columns say, and meet all filters; so the
// cost is that of the kept columns, and nothing but zeros at the end of a tile is computed in vain. Where nearly all
// columns are left, what a block of pixels reads is made narrow once, and columns are copied from that; or a unit that
// loads tiles by rows reads them in place.
//
// bfloat16. Weights and values are rounded to the nearest (ties to even); products are exact; how they are added up
// depends on the unit.
//
// int8. With x a value, w an integer weight from -127 to 127:
//
//   q = nearest integer (ties to even) to min(x * (1 / scale), 65536), plus zero, cut to 0..255; 255 for NaN
//   y = float(sum over the columns of (q - zero) * w) * (scale * scales[filter]) + bias[filter]
//
// where everything in float32 is rounded on its own, never fused. So all units give the same bits. Padding is q = zero.
// A residual may be rounded as an input is, with numbers of its own: y + float(q - zero) * scale, then the activation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "conv/conv.h"
#include "core/isa.h"

namespace acf::narrow {

enum class Number { bfloat16, int8 };

// The instructions that multiply. avx512_bf16 and neon_bf16 have bfloat16 alone; generic, avx2, vnni (of AVX-512), neon
// and dotprod have int8 alone; amx has both.
enum class Unit { generic, avx2, vnni, avx512_bf16, amx, neon, dotprod, neon_bf16 };

std::string_view unit_name(Unit unit);

// Those that this processor and operating system can run and that go with the ISA, slowest first; none for bfloat16
// where nothing is gained over float32.
std::vector<Unit> units(Isa isa, Number number);

// How integers stand for the values that a layer reads: x = scale * (q - zero).
struct Quantization {
  float scale = 1;
  std::int32_t zero = 0;
};

// Throws std::invalid_argument for a scale that is not positive or a zero that is not from 0 to 255. what: in words.
void check(const Quantization& numbers, const char* what);

// Where products find their values.
enum class Reading {
  wide,      // columns are gathered from float32, made narrow on the way
  narrow,    // what a block of pixels reads is made narrow first, by channels; rows of columns are copied from there
  in_place,  // images are made narrow first; products read them there
};

// How one convolution will be computed. Plain data; plan() fills it in.
struct Plan {
  conv::Shape shape;
  conv::Pitch in;
  Number number = Number::bfloat16;
  Unit unit = Unit::generic;
  std::int64_t images = 1;  // that it was made for; any number can be run
  std::int64_t steps = 1;   // of 64 bytes of columns, in the group with the most
  Reading reading = Reading::wide;
  std::int64_t rows = 16;  // narrow: that hold columns; in_place: of a step
  double cycles = 0;       // estimated
};

// Throws std::invalid_argument for sizes that cannot be computed: as conv::plan, and for int8 more columns in a group
// than an int32 can add up; for a unit that this machine or the number lacks.
std::vector<Plan> plans(const conv::Shape& shape, const conv::Pitch& in, std::int64_t images, std::int64_t count,
                        const std::int64_t* columns, Number number, Unit unit);  // all ways, the quickest first
Plan plan(const conv::Shape& shape, const conv::Pitch& in, std::int64_t images, std::int64_t count,
          const std::int64_t* columns, Number number, Unit unit);

// Weights as the kernels read them, kAlignment-aligned. weights: as for conv::pack; for int8 integers from -127 to 127,
// with the scale of every filter. Throws std::invalid_argument for others.
std::size_t packed_size(const Plan& plan);
bool same_packed(const Plan& one, const Plan& other);  // of the same weights: what is packed for one is for the other
void pack(const Plan& plan, std::int64_t count, const std::int64_t* columns, const float* weights, const float* bias,
          void* packed);
void pack(const Plan& plan, std::int64_t count, const std::int64_t* columns, const float* weights, const float* scales,
          const Quantization& input, const float* bias, void* packed);

// As those of conv.h. residual: of int8, what the epilogue's is rounded to; null where it stays as it is.
std::int64_t scratch_size(const Plan& plan);
void run(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out,
         const conv::Pitch& out_pitch, const conv::Epilogue& epilogue, const Quantization* residual, float* scratch,
         int threads);

namespace reference {
float rounded_to_bfloat16(float x);
std::int32_t quantized(float x, const Quantization& input);

// int8, bit by bit but for activations other than none, relu and relu6. out: (n, filter, y, x).
void run(const conv::Shape& shape, const conv::Pitch& in_pitch, std::int64_t count, const std::int64_t* columns,
         const float* weights, const float* scales, const Quantization& input, const float* bias, std::int64_t images,
         const float* in, const conv::Epilogue& epilogue, const Quantization* residual, float* out);
}  // namespace reference

}  // namespace acf::narrow
