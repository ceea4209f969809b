#include <immintrin.h>

#include "conv/kernels.h"

namespace acf::conv {
namespace {

#include "conv/registers_avx512-inl.h"

#include "conv/kernels-inl.h"

}  // namespace

const Kernels avx512_kernels = ACF_KERNEL_TABLE;

}  // namespace acf::conv
