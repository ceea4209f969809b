#include <algorithm>
#include <cmath>

#include "conv/naive.h"

namespace acf::conv::reference {

double activate(Activation activation, double slope, double x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return std::max(x, 0.0);
    case Activation::relu6: return std::min(std::max(x, 0.0), 6.0);
    case Activation::leaky: return x > 0 ? x : slope * x;
    case Activation::hardsigmoid: return std::min(std::max(x + 3, 0.0), 6.0) / 6;
    case Activation::hardswish: return x * std::min(std::max(x + 3, 0.0), 6.0) / 6;
    case Activation::sigmoid: return 1 / (1 + std::exp(-x));
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::tanh: return std::tanh(x);
    case Activation::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  }
  return x;
}

void run(const Shape& shape, const Pitch& in_pitch, std::int64_t count, const std::int64_t* columns,
         const float* weights, const float* bias, std::int64_t images, const float* in, const Epilogue& epilogue,
         double* out, double* sums) {
  each_output(shape, in_pitch, count, columns, images, [&](const Output& output, const auto& taps) {
    double sum = bias == nullptr ? 0 : static_cast<double>(bias[output.filter]), size = std::abs(sum);
    const auto add = [&](double term) {
      sum += term;
      size += std::abs(term);
    };
    taps([&](std::int64_t weight, std::int64_t from) {
      add(static_cast<double>(weights[weight]) * static_cast<double>(in[from]));
    });
    if (epilogue.residual != nullptr) {
      add(static_cast<double>(epilogue.residual[output.at(epilogue.residual_pitch)]));
    }
    *out++ = activate(epilogue.activation, static_cast<double>(epilogue.slope), sum);
    if (sums != nullptr) *sums++ = size;
  });
}

}  // namespace acf::conv::reference
