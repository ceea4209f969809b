// Which units this machine has.
#include <algorithm>
#include <cstdint>

#include "narrow/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace acf::narrow {
namespace {

struct Found {
  bool vnni = false, bf16 = false, amx = false, dotprod = false;  // bf16: of AVX-512 or NEON
};

#if defined(__x86_64__)

// The tile registers are large: Linux saves them only for processes that have asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Found detect() {
  Found found;
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  const auto& isas = supported_isas();
  if (std::find(isas.begin(), isas.end(), Isa::avx512) == isas.end()) return found;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
  constexpr std::uint32_t kVnni = 1u << 11, kAmx = (1u << 22) | (1u << 24) | (1u << 25);  // bf16, tiles, int8
  found.vnni = (ecx & kVnni) != 0;
  const bool amx = (edx & kAmx) == kAmx;
  if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) found.bf16 = (eax & (1u << 5)) != 0;
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr std::uint32_t kTileState = 0x60000;
  found.amx = amx && found.bf16 && (low & kTileState) == kTileState && may_use_tiles();
  return found;
}

#elif defined(__aarch64__)

Found detect() {
  Found found;
#if defined(__linux__)
  found.dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  found.bf16 = (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#else
  found.dotprod = true;  // every Mac with an ARM processor
#endif
  return found;
}

#else

Found detect() { return {}; }

#endif

}  // namespace

std::string_view unit_name(Unit unit) {
  switch (unit) {
    case Unit::generic: return "generic";
    case Unit::avx2: return "avx2";
    case Unit::vnni: return "avx512_vnni";
    case Unit::avx512_bf16: return "avx512_bf16";
    case Unit::amx: return "amx";
    case Unit::neon: return "neon";
    case Unit::dotprod: return "neon_dotprod";
    case Unit::neon_bf16: return "neon_bf16";
  }
  return "unknown";
}

std::vector<Unit> units(Isa isa, Number number) {
  static const Found found = detect();
  std::vector<Unit> all;
  const auto add = [&all](bool has, Unit unit) {
    if (has) all.push_back(unit);
  };
  if (number == Number::int8) {
    add(true, Unit::generic);
    add(isa == Isa::avx2 || isa == Isa::avx512, Unit::avx2);
    add(isa == Isa::avx512 && found.vnni, Unit::vnni);
    add(isa == Isa::neon, Unit::neon);
    add(isa == Isa::neon && found.dotprod, Unit::dotprod);
  } else {
    add(isa == Isa::avx512 && found.bf16, Unit::avx512_bf16);
    add(isa == Isa::neon && found.bf16, Unit::neon_bf16);
  }
  add(isa == Isa::avx512 && found.amx, Unit::amx);
  return all;
}

const Kernels& kernels(Unit unit) {
  switch (unit) {
#if defined(__x86_64__)
    case Unit::avx2: return avx2_kernels;
    case Unit::vnni: return vnni_kernels;
    case Unit::avx512_bf16: return avx512_bf16_kernels;
    case Unit::amx: return amx_kernels;
#elif defined(__aarch64__)
    case Unit::neon: return neon_kernels;
    case Unit::dotprod: return dotprod_kernels;
    case Unit::neon_bf16: return neon_bf16_kernels;
#endif
    default: return generic_kernels;
  }
}

}  // namespace acf::narrow
