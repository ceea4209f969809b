// Names that Python gives to what is an enumeration here.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "conv/conv.h"
#include "core/check.h"

namespace acf::bindings {

template <class Value, std::size_t count>
Value named(const std::pair<const char*, Value> (&values)[count], const std::string& name, const char* what) {
  std::string known;
  for (const auto& [key, value] : values) {
    if (name == key) return value;
    known += (known.empty() ? "'" : ", '") + std::string(key) + "'";
  }
  ACF_CHECK(false, what, " must be one of ", known, ", got '", name, "'");
  return {};
}

inline conv::Activation activation_named(const std::string& name) {
  using conv::Activation;
  constexpr std::pair<const char*, Activation> kActivations[] = {
      {"none", Activation::none},
      {"relu", Activation::relu},
      {"relu6", Activation::relu6},
      {"leaky", Activation::leaky},
      {"hardsigmoid", Activation::hardsigmoid},
      {"hardswish", Activation::hardswish},
      {"sigmoid", Activation::sigmoid},
      {"silu", Activation::silu},
      {"tanh", Activation::tanh},
      {"gelu", Activation::gelu},
  };
  return named(kActivations, name, "activation");
}

}  // namespace acf::bindings
