// 8-bit depthwise convolutions between planes of float32, for units that do not compute on bytes, and where values are
// no bytes. Integers below 2^24 are exact in float32, and so are the sums of a depthwise layer: values are rounded to
// integers that stay floats, which the kernels of conv.h multiply and add up. So the results have the bits that
// narrow.h asks for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "conv/conv.h"
#include "narrow/narrow.h"

namespace acf::narrow {

// One channel and one filter a group, with all columns, whose sums stay below 2^24.
bool is_depthwise(const conv::Shape& shape, std::int64_t count);

// How one will be computed: some channels of an image at a time, whose values stay in the cache.
struct DepthwisePlan {
  conv::Shape shape;
  conv::Pitch in;
  Unit unit = Unit::generic;
  conv::Layout between;             // of as many rounded channels as a slice has at most
  std::vector<conv::Plan> slices;   // of one image
  std::vector<std::size_t> packed;  // where the weights of every slice begin
  std::size_t multipliers = 0, bias = 0, size = 0;
};

// Throws std::invalid_argument as plan() of narrow.h does, and for shapes that are not depthwise.
DepthwisePlan depthwise_plan(const conv::Shape& shape, const conv::Pitch& in, Isa isa, Unit unit);
std::size_t packed_size(const DepthwisePlan& plan);
bool same_packed(const DepthwisePlan& one, const DepthwisePlan& other);
void pack(const DepthwisePlan& plan, const float* weights, const float* scales, const Quantization& input,
          const float* bias, void* packed);

// As those of narrow.h.
std::int64_t scratch_size(const DepthwisePlan& plan);
void run(const DepthwisePlan& plan, const void* packed, std::int64_t images, const float* in, float* out,
         const conv::Pitch& out_pitch, const conv::Epilogue& epilogue, const Quantization* residual, float* scratch,
         int threads);

}  // namespace acf::narrow
