// Which instruction set the kernels use: detected once, forced by the environment variable ACF_FORCE_ISA.
#pragma once

#include <string_view>
#include <vector>

namespace acf {

// avx2 stands for AVX2 + FMA + F16C, avx512 for AVX-512 F + BW + DQ + VL on top of avx2.
enum class Isa { generic, avx2, avx512, neon };

std::string_view isa_name(Isa isa);

// The ISAs this library holds kernels for, and those of them that this processor and operating system can run; slowest
// first.
const std::vector<Isa>& compiled_isas();
const std::vector<Isa>& supported_isas();

// The ISA to use now: the fastest supported one, or the one ACF_FORCE_ISA names. The variable is read at the first call
// and by reload_isa(). Throws std::invalid_argument when it names an ISA that is unknown or cannot run here.
Isa active_isa();

// Reads ACF_FORCE_ISA again and returns what it gives; on an error the previous choice is dropped, so every later
// active_isa() throws until the variable is right.
Isa reload_isa();

// How many registers of its vectors this processor multiplies and adds, or loads, in a cycle: two as a rule. AVX-512 of
// AMD's Zen 4 goes through units of half its width, and Intel's client processors have one unit of the whole.
int registers_per_cycle(Isa isa);

}  // namespace acf
