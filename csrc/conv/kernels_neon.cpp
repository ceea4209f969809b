#include <arm_neon.h>

#include "conv/kernels.h"

namespace acf::conv {
namespace {

#include "conv/registers_neon-inl.h"

#include "conv/kernels-inl.h"

}  // namespace

const Kernels neon_kernels = ACF_KERNEL_TABLE;

}  // namespace acf::conv
