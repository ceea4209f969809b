// Plain C++ on vectors that every compiler of ours has: what every machine runs.
#include <cstring>

#include "conv/kernels.h"

namespace acf::conv {
namespace {

#include "conv/registers_generic-inl.h"

#include "conv/kernels-inl.h"

}  // namespace

const Kernels generic_kernels = ACF_KERNEL_TABLE;

}  // namespace acf::conv
