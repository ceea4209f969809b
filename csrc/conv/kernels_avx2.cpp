#include <immintrin.h>

#include "conv/kernels.h"

namespace acf::conv {
namespace {

#include "conv/registers_avx2-inl.h"

#include "conv/kernels-inl.h"

}  // namespace

const Kernels avx2_kernels = ACF_KERNEL_TABLE;

}  // namespace acf::conv
