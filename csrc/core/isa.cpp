#include "core/isa.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "core/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace acf {
namespace {

#if defined(__x86_64__)

std::uint64_t enabled_register_state() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// By hand, because an instruction is usable only when the operating system saves its registers too, and because
// __builtin_cpu_supports differs between compilers.
std::vector<Isa> detect() {
  std::vector<Isa> found = {Isa::generic};
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
  constexpr std::uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr std::uint32_t kLeaf1 = kFma | kOsxsave | kAvx | kF16c;
  if ((ecx & kLeaf1) != kLeaf1) return found;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;

  constexpr std::uint64_t kYmmState = 0x6, kZmmState = 0xe6;
  constexpr std::uint32_t kAvx2 = 1u << 5;
  constexpr std::uint32_t kAvx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  const std::uint64_t state = enabled_register_state();
  if ((ebx & kAvx2) == 0 || (state & kYmmState) != kYmmState) return found;
  found.push_back(Isa::avx2);
  if ((ebx & kAvx512) == kAvx512 && (state & kZmmState) == kZmmState) found.push_back(Isa::avx512);
  return found;
}

bool has_narrow_avx512() {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr std::uint32_t kGenuineIntel = 0x756e6547, kAuthenticAmd = 0x68747541;  // the first four letters
  const std::uint32_t vendor = ebx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const std::uint32_t family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff), model = (eax >> 4 & 0xf) | (eax >> 12 & 0xf0);
  if (vendor == kAuthenticAmd) return family == 0x19;
  // Cannon Lake, Ice Lake, Tiger Lake, Rocket Lake; their servers have other numbers.
  constexpr std::array<std::uint32_t, 6> kClients = {0x66, 0x7d, 0x7e, 0x8c, 0x8d, 0xa7};
  return vendor == kGenuineIntel && family == 6 && std::find(kClients.begin(), kClients.end(), model) != kClients.end();
}

#elif defined(__aarch64__)

std::vector<Isa> detect() {
#if defined(__linux__)
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMD) == 0) return {Isa::generic};
#endif
  return {Isa::generic, Isa::neon};
}

#else

std::vector<Isa> detect() { return {Isa::generic}; }

#endif

#if !defined(__x86_64__)
bool has_narrow_avx512() { return false; }
#endif

constexpr int kUndecided = -1;
std::atomic<int> decided{kUndecided};

std::string joined_names(const std::vector<Isa>& isas) {
  std::string names;
  for (Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

Isa choose() {
  const std::vector<Isa>& supported = supported_isas();
  const char* forced = std::getenv("ACF_FORCE_ISA");
  if (forced == nullptr || *forced == '\0') return supported.back();
  const auto match =
      std::find_if(supported.begin(), supported.end(), [forced](Isa isa) { return isa_name(isa) == forced; });
  ACF_CHECK(match != supported.end(), "ACF_FORCE_ISA must be one of ", joined_names(supported),
            " on this machine (compiled in: ", joined_names(compiled_isas()), "), got '", forced, "'");
  return *match;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::neon: return "neon";
  }
  return "unknown";
}

const std::vector<Isa>& compiled_isas() {
#if defined(__x86_64__)
  static const std::vector<Isa> isas = {Isa::generic, Isa::avx2, Isa::avx512};
#elif defined(__aarch64__)
  static const std::vector<Isa> isas = {Isa::generic, Isa::neon};
#else
  static const std::vector<Isa> isas = {Isa::generic};
#endif
  return isas;
}

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa active_isa() {
  const int isa = decided.load(std::memory_order_relaxed);
  return isa == kUndecided ? reload_isa() : static_cast<Isa>(isa);
}

Isa reload_isa() {
  decided.store(kUndecided, std::memory_order_relaxed);
  const Isa isa = choose();
  decided.store(static_cast<int>(isa), std::memory_order_relaxed);
  return isa;
}

int registers_per_cycle(Isa isa) {
  static const bool narrow = has_narrow_avx512();
  return isa == Isa::avx512 && narrow ? 1 : 2;
}

}  // namespace acf
