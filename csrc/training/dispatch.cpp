// Chooses the kernels of an ISA.
#include "training/kernels.h"

namespace acf::training {

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512: return avx512_kernels;
    case Isa::avx2: return avx2_kernels;
#elif defined(__aarch64__)
    case Isa::neon: return neon_kernels;
#endif
    default: return generic_kernels;
  }
}

}  // namespace acf::training
