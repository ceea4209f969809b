// Chooses the kernels of an ISA, and hands rows of pooling and normalisation to them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/check.h"
#include "core/parallel.h"
#include "training/kernels.h"
#include "training/training.h"

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

void row_sums(const float* rows, std::int64_t count, std::int64_t number, float* sums, int threads, Isa isa) {
  const Kernels& table = kernels(isa);
  parallel_for(number, threads, [&](std::int64_t row) { sums[row] = table.sum(rows + row * count, count); });
}

void normalise(const Normalisation& n, const float* x, double eps, float* out, float* mean, float* variance,
               int threads, Isa isa) {
  const Kernels& table = kernels(isa);
  parallel_for(n.channels, threads, [&](std::int64_t c) {
    const float* const row = x + c * n.count;
    const auto count = static_cast<double>(n.count);
    mean[c] = static_cast<float>(static_cast<double>(table.sum(row, n.count)) / count);
    variance[c] = static_cast<float>(static_cast<double>(table.squares(row, n.count, mean[c])) / count);
    const double weight = n.weight == nullptr ? 1.0 : static_cast<double>(n.weight[c]);
    const double bias = n.bias == nullptr ? 0.0 : static_cast<double>(n.bias[c]);
    const double slope = weight / std::sqrt(static_cast<double>(variance[c]) + eps);
    table.scaled(row, n.count, static_cast<float>(slope),
                 static_cast<float>(bias - static_cast<double>(mean[c]) * slope), out + c * n.count);
  });
}

void normalise_gradient(const Normalisation& n, const float* x, const float* out_gradient, const float* mean,
                        const float* variance, double eps, float* x_gradient, float* weight_gradient,
                        float* bias_gradient, int threads, Isa isa) {
  const Kernels& table = kernels(isa);
  parallel_for(n.channels, threads, [&](std::int64_t c) {
    const float *const row = x + c * n.count, *const g = out_gradient + c * n.count;
    const auto count = static_cast<double>(n.count);
    const double scale = 1 / std::sqrt(static_cast<double>(variance[c]) + eps), middle = static_cast<double>(mean[c]);
    float sums[2];
    table.products(row, g, n.count, mean[c], sums);
    bias_gradient[c] = sums[0];
    weight_gradient[c] = static_cast<float>(static_cast<double>(sums[1]) * scale);
    // x_gradient = of_g * g + of_x * x + rest
    const double of_g = (n.weight == nullptr ? 1.0 : static_cast<double>(n.weight[c])) * scale;
    const double of_x = -of_g * scale * scale * static_cast<double>(sums[1]) / count;
    const double rest = -of_g * static_cast<double>(sums[0]) / count - of_x * middle;
    table.combined(row, g, n.count, static_cast<float>(of_g), static_cast<float>(of_x), static_cast<float>(rest),
                   x_gradient + c * n.count);
  });
}

void check(const Pooling& p) {
  for (const auto& [name, value] : {std::pair{"images", p.images},
                                    {"channels", p.channels},
                                    {"height", p.height},
                                    {"width", p.width},
                                    {"kernel height", p.kernel_h},
                                    {"kernel width", p.kernel_w},
                                    {"stride", p.stride_h},
                                    {"stride", p.stride_w}}) {
    ACF_CHECK(value >= 1 && value <= std::numeric_limits<std::int32_t>::max(), name,
              " must be from 1 to 2147483647, got ", value);
  }
  ACF_CHECK(p.kernel_h * p.kernel_w <= 256, "a window must have at most 256 taps, got ", p.kernel_h, "x", p.kernel_w);
  ACF_CHECK(p.padding_h >= 0 && 2 * p.padding_h <= p.kernel_h && p.padding_w >= 0 && 2 * p.padding_w <= p.kernel_w,
            "padding must be from 0 to half the window, got ", p.padding_h, ", ", p.padding_w);
  ACF_CHECK(p.height + 2 * p.padding_h >= p.kernel_h && p.width + 2 * p.padding_w >= p.kernel_w,
            "the window must fit into the padded input, got ", p.height, "x", p.width, " pixels, padding ", p.padding_h,
            ", ", p.padding_w, " and a window of ", p.kernel_h, "x", p.kernel_w);
}

void maxima(const Pooling& p, const float* x, float* out, std::uint8_t* at, int threads, Isa isa) {
  check(p);
  const Kernels& table = kernels(isa);
  const std::int64_t height = p.out_height(), width = p.out_width();
  parallel_for(p.channels * height, threads, [&](std::int64_t row) {
    const std::int64_t channel = row / height, top = row % height * p.stride_h - p.padding_h;
    const float* taps[256];
    std::uint8_t numbers[256];
    for (std::int64_t column = 0; column < width; ++column) {
      const std::int64_t left = column * p.stride_w - p.padding_w, pixel = (row * width + column) * p.images;
      int count = 0;
      for (std::int64_t tap = 0; tap < p.kernel_h * p.kernel_w; ++tap) {
        const std::int64_t y = top + tap / p.kernel_w, in_x = left + tap % p.kernel_w;
        if (y < 0 || y >= p.height || in_x < 0 || in_x >= p.width) continue;
        taps[count] = x + ((channel * p.height + y) * p.width + in_x) * p.images;
        numbers[count++] = static_cast<std::uint8_t>(tap);
      }
      table.maximum({taps, numbers, count, out + pixel, at + pixel, p.images});
    }
  });
}

void maxima_gradient(const Pooling& p, const float* out_gradient, const std::uint8_t* at, float* x_gradient,
                     int threads, Isa isa) {
  check(p);
  const Kernels& table = kernels(isa);
  const std::int64_t height = p.out_height(), width = p.out_width();
  parallel_for(p.channels * p.height, threads, [&](std::int64_t row) {
    const std::int64_t channel = row / p.height, y = row % p.height + p.padding_h;
    const float* gradients[256];
    const std::uint8_t* largest[256];
    std::uint8_t numbers[256];
    for (std::int64_t column = 0; column < p.width; ++column) {
      const std::int64_t in_x = column + p.padding_w;
      int count = 0;
      for (std::int64_t tap = 0; tap < p.kernel_h * p.kernel_w; ++tap) {
        const std::int64_t down = y - tap / p.kernel_w, right = in_x - tap % p.kernel_w;
        if (down < 0 || right < 0 || down % p.stride_h != 0 || right % p.stride_w != 0) continue;
        if (down / p.stride_h >= height || right / p.stride_w >= width) continue;
        const std::int64_t pixel = (channel * height + down / p.stride_h) * width + right / p.stride_w;
        gradients[count] = out_gradient + pixel * p.images;
        largest[count] = at + pixel * p.images;
        numbers[count++] = static_cast<std::uint8_t>(tap);
      }
      table.scattered({gradients, largest, numbers, count, x_gradient + (row * p.width + column) * p.images, p.images});
    }
  });
}

}  // namespace acf::training
