// Convolution of float32 for what pruning leaves: any number of filters, any set of columns. The cost is that of the
// kept columns; there is no im2col, and padding is not computed but read.
//
// Activations. A tensor is a set of planes, one per channel of each image: element (n, c, y, x) lies at
// data + n * image + c * plane + y * row + x. Around every plane lies a halo of zeros, which is the padding of the
// layer that reads it: the layer that writes the tensor writes the interior, and clear_halo() has been called once
// before. Rows share their halo (the right padding of one row is the left padding of the next), and so do planes
// (bottom and top), so a halo costs little. layout() gives pitches that fulfil this:
//
//   row >= width + max(left, right)                          plane >= (height + max(top, bottom)) * row
//   top * row + left floats before data and everything up to kSlack floats after the last halo can be read
//
// What lies in the slack does not matter. Planes of some size, and their first element, begin at whole cache lines if
// the memory does. A tensor without planes (the features of a linear layer) is a tensor of
// height and width 1: plane = row = 1, image = channels.
//
// Columns. Column (c, kh, kw) has the number (c * kernel_h + kh) * kernel_w + kw, with c counted over all groups. The
// columns that are left are given as an ascending list; those of a group's channels are the columns of that group.
//
// Kernels. Two orientations, both on the same layout:
//
//   pixels_in_lanes    a register holds neighbouring pixels of a plane, weights are broadcast; no filter is wasted,
//                      whatever their number
//   filters_in_lanes   a register holds 16 (or a vector of) filters, pixels are broadcast; no pixel is wasted, whatever
//                      the plane or the stride; filters are padded to 16, results transposed before they are stored
//
// A linear layer is a convolution of 1x1 planes; a depthwise one has as many groups as channels.
//
// Every output is one chain of multiply-adds that begins with the bias, in an order that only the shape and the kept
// columns decide: the bits of the result depend neither on the orientation nor on the threads or the batch, and are the
// same for all ISAs that fuse multiply and add (all but generic).
//
// Codes. Where every filter has at most four different weights, as in a binary or a ternary network, filters_in_lanes
// can read codes of 1 or 2 bits instead of them, and makes weights of those piece by piece in the first-level cache:
// for layers whose weights take longer to arrive than to be computed with. The bits of the result are the same.
//
// Winograd. A complete 3x3 kernel of stride 1 may instead be computed by F(4x4, 3x3) (winograd.cpp): 36 instead of 144
// multiply-adds for a tile of 4x4 outputs, with tiles in the lanes of a register, or filters where tiles are few. Its
// results are those of the kernels above within rounding, with bits that depend on neither threads nor ISA in the same
// way; where it pays depends on the batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/isa.h"

namespace acf::conv {

enum class Activation { none, relu, relu6, leaky, hardsigmoid, hardswish, sigmoid, silu, tanh, gelu };

struct Padding {
  std::int64_t top = 0, left = 0, bottom = 0, right = 0;
};

struct Shape {
  std::int64_t channels = 1, height = 1, width = 1;  // of the input, all groups
  std::int64_t filters = 1, groups = 1;              // groups divides channels and filters
  std::int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
  Padding padding;

  std::int64_t columns() const { return channels * kernel_h * kernel_w; }
  std::int64_t out_height() const;
  std::int64_t out_width() const;
};

// Throws std::invalid_argument for sizes that make no sense: none or too many of something, an empty output.
void check(const Shape& shape);

// How far apart rows, planes and images lie, in floats.
struct Pitch {
  std::int64_t row = 1, plane = 1, image = 1;
};

inline constexpr std::int64_t kSlack = 32;

// Pitches of a tensor whose readers pad it by at most `padding`, and the floats it takes: `before` its first element,
// `size` in all, slack included.
struct Layout {
  Pitch pitch;
  std::int64_t before = 0, size = 0;
};
Layout layout(std::int64_t images, std::int64_t channels, std::int64_t height, std::int64_t width,
              const Padding& padding);

// Zeroes everything of the layout that is not interior; `data` points at element (0, 0, 0, 0).
void clear_halo(float* data, const Layout& layout, std::int64_t images, std::int64_t channels, std::int64_t height,
                std::int64_t width);

enum class Method { pixels_in_lanes, filters_in_lanes, winograd_tiles_in_lanes, winograd_filters_in_lanes };
inline bool is_winograd(Method method) { return method >= Method::winograd_tiles_in_lanes; }

// What a register of pixels_in_lanes holds: a stretch of the plane with the halo between rows in it (flat; stride 1), a
// stretch of one row (rows; horizontal stride 1), or two half stretches of the same row or two (halves; horizontal
// stride 1 or 2). depthwise is a kernel of its own for complete 3x3 and 5x5 kernels with one channel and filter a
// group: whole planes at once, every stretch of a row read for all the output rows that need it.
enum class Window { flat, rows, halves, depthwise };

// How one convolution will be computed. Plain data; plan() fills it in.
struct Plan {
  Shape shape;
  Pitch in;
  Isa isa = Isa::generic;
  std::int64_t images = 1;   // that the tiles are chosen for; any number can be run
  std::int64_t columns = 0;  // kept ones
  Method method = Method::filters_in_lanes;
  Window window = Window::rows;   // pixels_in_lanes
  std::int64_t filter_tiles = 1;  // all but filters_in_lanes: the filters of a group are cut into so many equal parts
  std::int64_t tile_pixels = 1;   // filters_in_lanes: at most so many pixels in a tile
  int code_bits = 0;              // filters_in_lanes: of the codes that stand for weights; 0 for the weights themselves
  std::int64_t tile_vectors =
      1;  // winograd_tiles_in_lanes: at most so many vectors of tiles meet a part of the filters
  std::int64_t block_vectors = 1;  // winograd: vectors of tiles that are transformed together
  int pieces = 1;                  // winograd: strips of tiles that share a register
  double cycles = 0;               // estimated
};

// The plan that the cost model takes for the best, of the given method or of all. Throws std::invalid_argument for
// sizes that cannot be computed (an empty output, offsets beyond 31 bits, an ISA that this machine lacks, pitches
// without room for the halo). Plans that differ in `images` alone may have different tiles, and share packed weights if
// method, filter_tiles and code_bits agree. code_bits: of the codes that the weights have, which may be used then.
Plan plan(const Shape& shape, const Pitch& in, std::int64_t images, std::int64_t columns, Isa isa, int code_bits = 0);
Plan plan(const Shape& shape, const Pitch& in, std::int64_t images, std::int64_t columns, Isa isa, Method method,
          int code_bits = 0);

// The bits of codes for weights (filters, columns) of few different values in every filter; 0 if these are too many.
inline constexpr int kMaxCodeBits = 2;
int code_bits(std::int64_t filters, std::int64_t columns, const float* weights);

// The methods that can compute it.
std::vector<Method> methods(const Shape& shape, const Pitch& in, std::int64_t images, std::int64_t columns, Isa isa);

// Of the cycles of a plan: those in which its weights come from beyond the second-level cache.
double arrival_cycles(const Plan& plan);

// Weights and the place of every column, as the kernels read them. `packed` has packed_size() bytes and begins at a
// multiple of kAlignment. weights: for every filter the weights of the columns kept in its group, (filters, columns)
// when there is one group; bias: (filters,) or null for zeros. pack() throws std::invalid_argument when they have more
// values than the codes of the plan.
inline constexpr std::uint32_t kPackedVersion = 2;
inline constexpr std::size_t kAlignment = 64;
std::size_t packed_size(const Plan& plan);
void pack(const Plan& plan, const std::int64_t* columns, const float* weights, const float* bias, void* packed);

// What follows the sum: out = activation(sum + residual). slope is that of leaky. The residual may be the output.
struct Epilogue {
  Activation activation = Activation::none;
  float slope = 0.01f;
  const float* residual = nullptr;
  Pitch residual_pitch;
};

// Floats that run() needs for itself, aligned to kAlignment; they need not be kept between runs.
std::int64_t scratch_size(const Plan& plan);

// Throws std::invalid_argument when `packed` was not made by pack() of this version for this plan.
void run(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out, const Pitch& out_pitch,
         const Epilogue& epilogue, float* scratch, int threads);

// Multiply-adds of float32 that one processor does in a second, times two; measured for some milliseconds.
double peak_flops(Isa isa);

// The same, obviously right and slow: the oracle of the tests. sums, when not null, gets sum |weight * input| + |bias|
// + |residual|, in the order (n, filter, y, x), like out.
namespace reference {
double activate(Activation activation, double slope, double x);
void run(const Shape& shape, const Pitch& in_pitch, std::int64_t count, const std::int64_t* columns,
         const float* weights, const float* bias, std::int64_t images, const float* in, const Epilogue& epilogue,
         double* out, double* sums);
}  // namespace reference

}  // namespace acf::conv
