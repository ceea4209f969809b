// Hands the pixels of a pooling to the kernels of an ISA.
#include <limits>
#include <utility>

#include "core/check.h"
#include "core/parallel.h"
#include "training/kernels.h"
#include "training/training.h"

namespace acf::training {

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
  const std::int64_t height = p.out_height(), width = p.out_width(), values = p.channels * p.images;
  parallel_for(height, threads, [&](std::int64_t row) {
    const std::int64_t top = row * p.stride_h - p.padding_h;
    const float* taps[256];
    std::uint8_t numbers[256];
    for (std::int64_t column = 0; column < width; ++column) {
      const std::int64_t left = column * p.stride_w - p.padding_w, pixel = (row * width + column) * values;
      int count = 0;
      for (std::int64_t tap = 0; tap < p.kernel_h * p.kernel_w; ++tap) {
        const std::int64_t y = top + tap / p.kernel_w, in_x = left + tap % p.kernel_w;
        if (y < 0 || y >= p.height || in_x < 0 || in_x >= p.width) continue;
        taps[count] = x + (y * p.width + in_x) * values;
        numbers[count++] = static_cast<std::uint8_t>(tap);
      }
      table.maximum({taps, numbers, count, out + pixel, at + pixel, values});
    }
  });
}

void maxima_gradient(const Pooling& p, const float* out_gradient, const std::uint8_t* at, float* x_gradient,
                     int threads, Isa isa) {
  check(p);
  const Kernels& table = kernels(isa);
  const std::int64_t height = p.out_height(), width = p.out_width(), values = p.channels * p.images;
  parallel_for(p.height, threads, [&](std::int64_t row) {
    const std::int64_t y = row + p.padding_h;
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
        const std::int64_t pixel = (down / p.stride_h * width + right / p.stride_w) * values;
        gradients[count] = out_gradient + pixel;
        largest[count] = at + pixel;
        numbers[count++] = static_cast<std::uint8_t>(tap);
      }
      table.scattered({gradients, largest, numbers, count, x_gradient + (row * p.width + column) * values, values});
    }
  });
}

}  // namespace acf::training
