// Cuts the convolutions of training into tiles and hands them to the kernels of an ISA.
#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "core/check.h"
#include "core/parallel.h"
#include "training/kernels.h"
#include "training/training.h"

namespace acf::training {
namespace {

// What a thread works on at a time, images of a block side by side, should stay in its second-level cache ...
constexpr std::int64_t kBandFloats = 96 << 10;
// ... but sums of products over fewer pixels than these would not be worth the sums over lanes that follow.
constexpr std::int64_t kBandPixels = 32;
// The weight gradient is a sum of so many partial sums, whatever the threads.
constexpr std::int64_t kParts = 8;

std::int64_t size(const std::vector<std::int32_t>& numbers) { return static_cast<std::int64_t>(numbers.size()); }

// [0, count) in ranges of nearly the same size, at most `most`.
std::vector<std::pair<std::int64_t, std::int64_t>> even_ranges(std::int64_t count, std::int64_t most) {
  const std::int64_t ranges = (count + most - 1) / most;
  std::vector<std::pair<std::int64_t, std::int64_t>> result;
  for (std::int64_t i = 0; i < ranges; ++i) result.emplace_back(count * i / ranges, count * (i + 1) / ranges);
  return result;
}

// A tile of weights, (terms, rows).
struct Tile {
  std::vector<float> weights, start;
  std::vector<std::int64_t> to;
  std::int64_t rows() const { return static_cast<std::int64_t>(to.size()); }
};

// Channels that are read, as numbers, and the place of every channel among them (-1: not read).
struct Read {
  std::vector<std::int32_t> channels, place;

  Read(const Shape& s, const std::vector<std::int32_t>& columns) : place(static_cast<std::size_t>(s.channels), -1) {
    for (const std::int32_t column : columns) {
      const auto channel = static_cast<std::size_t>(column / s.taps());
      if (place[channel] >= 0) continue;
      place[channel] = static_cast<std::int32_t>(channels.size());
      channels.push_back(static_cast<std::int32_t>(channel));
    }
  }
};

// Some of a tensor (channels, height, width, images) as (rows, columns, chosen channels, images of a block): channels
// of a pixel side by side. In the tensor itself they lie a plane apart, often a power of two, and would meet in few
// sets of a cache. Outside the tensor are zeros.
struct Source {
  const float* data;
  std::int64_t height, width, images;
  const std::vector<std::int32_t>& chosen;
};

void pack(const Kernels& table, int wide, const Source& source, std::int64_t top, std::int64_t bottom,
          std::int64_t left, std::int64_t right, std::int64_t image, float* to) {
  const std::int64_t block = std::int64_t{kVectors[wide]} * table.lanes, pixel = size(source.chosen) * block;
  const std::int64_t first = std::max<std::int64_t>(left, 0), last = std::min(right, source.width);
  Move call = {};
  call.from_step = source.images;
  call.to_step = pixel;
  call.images = static_cast<int>(std::min(block, source.images - image));
  for (std::int64_t row = top; row < bottom; ++row, to += (right - left) * pixel) {
    if (row < 0 || row >= source.height || first >= last) {
      std::fill_n(to, (right - left) * pixel, 0.0F);
      continue;
    }
    std::fill_n(to, (first - left) * pixel, 0.0F);
    std::fill_n(to + (last - left) * pixel, (right - last) * pixel, 0.0F);
    call.to = to + (first - left) * pixel;
    call.pixels = last - first;
    for (const std::int32_t channel : source.chosen) {
      call.from = source.data + ((channel * source.height + row) * source.width + first) * source.images + image;
      table.pack[wide](call);
      call.to += block;
    }
  }
}

// Memory of a thread, kept from call to call; not initialised.
float* scratch(std::int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<std::int64_t>(memory.size()) < floats) memory.resize(static_cast<std::size_t>(floats));
  return memory.data();
}

// The input under a band of output rows, packed, and where in it the kept columns begin.
struct Window {
  std::int64_t width, pixel;  // columns of a row, floats of a pixel
  std::vector<std::int32_t> offsets;

  Window(const Layer& layer, const Read& read, std::int64_t block)
      : width((layer.shape.out_width() - 1) * layer.shape.stride_w + reach_w(layer.shape) + 1),
        pixel(size(read.channels) * block) {
    const Shape& s = layer.shape;
    ACF_CHECK(floats(s, 1) <= std::numeric_limits<std::int32_t>::max(), "rows of ", s.width, " pixels with ",
              read.channels.size(), " channels are too large for a kernel of ", s.kernel_h, " rows");
    for (const std::int32_t column : layer.columns) {
      const std::int64_t channel = column / s.taps(), tap = column % s.taps();
      const std::int64_t at = tap / s.kernel_w * s.dilation_h * width + tap % s.kernel_w * s.dilation_w;
      offsets.push_back(static_cast<std::int32_t>(at * pixel + read.place[static_cast<std::size_t>(channel)] * block));
    }
  }

  static std::int64_t reach_h(const Shape& s) { return s.dilation_h * (s.kernel_h - 1); }
  static std::int64_t reach_w(const Shape& s) { return s.dilation_w * (s.kernel_w - 1); }
  std::int64_t rows(const Shape& s, std::int64_t out_rows) const {
    return (out_rows - 1) * s.stride_h + reach_h(s) + 1;
  }
  std::int64_t floats(const Shape& s, std::int64_t out_rows) const { return rows(s, out_rows) * width * pixel; }

  void read(const Kernels& table, int wide, const Shape& s, const Source& source, std::int64_t top, std::int64_t bottom,
            std::int64_t image, float* to) const {
    const std::int64_t first = top * s.stride_h - s.padding_h;
    pack(table, wide, source, first, first + rows(s, bottom - top), -s.padding_w, width - s.padding_w, image, to);
  }
};

// The most rows of a band, of `rows`, for which floats(rows) is no more than kBandFloats, and at least `least`.
template <class Floats>
std::int64_t band_rows(std::int64_t rows, std::int64_t least, const Floats& floats) {
  std::int64_t band = std::min(rows, least);
  while (band < rows && floats(band + 1) <= kBandFloats) ++band;
  return band;
}

}  // namespace

void check(const Shape& s) {
  for (const auto& [name, value] : {std::pair{"images", s.images},
                                    {"channels", s.channels},
                                    {"height", s.height},
                                    {"width", s.width},
                                    {"filters", s.filters},
                                    {"kernel height", s.kernel_h},
                                    {"kernel width", s.kernel_w},
                                    {"stride", s.stride_h},
                                    {"stride", s.stride_w},
                                    {"dilation", s.dilation_h},
                                    {"dilation", s.dilation_w}}) {
    ACF_CHECK(value >= 1 && value <= std::numeric_limits<std::int32_t>::max(), name,
              " must be from 1 to 2147483647, got ", value);
  }
  for (const std::int64_t padding : {s.padding_h, s.padding_w}) {
    ACF_CHECK(padding >= 0 && padding <= std::numeric_limits<std::int32_t>::max(),
              "padding must be from 0 to 2147483647, got ", padding);
  }
  ACF_CHECK(s.height + 2 * s.padding_h > s.dilation_h * (s.kernel_h - 1) &&
                s.width + 2 * s.padding_w > s.dilation_w * (s.kernel_w - 1),
            "the kernel must fit into the padded input, got ", s.height, "x", s.width, " pixels, padding ", s.padding_h,
            ", ", s.padding_w, ", a kernel of ", s.kernel_h, "x", s.kernel_w, " and dilation ", s.dilation_h, ", ",
            s.dilation_w);
  const auto small = [](std::initializer_list<std::int64_t> sizes) {
    std::int64_t product = 1;
    for (const std::int64_t one : sizes) {
      if (one > std::numeric_limits<std::int32_t>::max() / product) return false;
      product *= one;
    }
    return true;
  };
  ACF_CHECK(small({s.images, s.channels, s.height, s.width}) &&
                small({s.images, s.filters, s.out_height(), s.out_width()}) &&
                small({s.filters, s.channels, s.kernel_h, s.kernel_w}),
            "tensors must have less than 2^31 values");
}

Layer::Layer(const Shape& of, std::vector<std::int32_t> kept_filters, std::vector<std::int32_t> kept_columns)
    : shape(of), filters(std::move(kept_filters)), columns(std::move(kept_columns)) {
  check(shape);
  for (const auto& [name, numbers, end] :
       {std::tuple{"filters", &filters, shape.filters}, std::tuple{"columns", &columns, shape.columns()}}) {
    for (std::size_t i = 0; i < numbers->size(); ++i) {
      ACF_CHECK((*numbers)[i] >= (i == 0 ? 0 : (*numbers)[i - 1] + 1) && (*numbers)[i] < end, "kept ", name,
                " must rise and be from 0 to ", end - 1, ", got ", (*numbers)[i], " at place ", i);
    }
  }
}

void forward(const Layer& layer, const float* x, const float* weight, const float* bias, float* out, int threads,
             Isa isa) {
  const Shape& s = layer.shape;
  const Kernels& table = kernels(isa);
  const std::int64_t height = s.out_height(), width = s.out_width(), plane = height * width * s.images;

  std::vector<std::uint8_t> kept(static_cast<std::size_t>(s.filters));
  for (const std::int32_t filter : layer.filters) kept[static_cast<std::size_t>(filter)] = 1;
  for (std::int64_t filter = 0; filter < s.filters; ++filter) {
    if (kept[static_cast<std::size_t>(filter)] == 0) {
      std::fill_n(out + filter * plane, plane, bias == nullptr ? 0.0F : bias[filter]);
    }
  }

  const int wide = size(layer.filters) <= table.most[1] && s.images > kVectors[0] * table.lanes ? 1 : 0;
  const std::int64_t block = std::int64_t{kVectors[wide]} * table.lanes;
  std::vector<Tile> tiles;
  for (const auto& [first, last] : even_ranges(size(layer.filters), table.most[wide])) {
    Tile& tile = tiles.emplace_back();
    const auto chosen = [&](std::int64_t i) { return std::int64_t{layer.filters[static_cast<std::size_t>(i)]}; };
    for (std::int64_t i = first; i < last; ++i) {
      tile.to.push_back(chosen(i) * plane);
      tile.start.push_back(bias == nullptr ? 0.0F : bias[chosen(i)]);
    }
    for (const std::int32_t column : layer.columns) {
      for (std::int64_t i = first; i < last; ++i) tile.weights.push_back(weight[chosen(i) * s.columns() + column]);
    }
  }

  const Read read(s, layer.columns);
  const Source source = {x, s.height, s.width, s.images, read.channels};
  const Window window(layer, read, block);
  const std::int64_t rows = band_rows(height, 1, [&](std::int64_t n) { return window.floats(s, n); });
  const std::int64_t bands = (height + rows - 1) / rows, blocks = (s.images + block - 1) / block;

  parallel_for(bands * blocks, threads, [&](std::int64_t task) {
    const std::int64_t top = task / blocks * rows, bottom = std::min(top + rows, height), image = task % blocks * block;
    float* const packed = scratch(window.floats(s, rows));
    window.read(table, wide, s, source, top, bottom, image, packed);
    Product call = {};
    call.offsets = window.offsets.data();
    call.terms = size(window.offsets);
    call.images = static_cast<int>(std::min(block, s.images - image));
    for (std::int64_t y = top; y < bottom; ++y) {
      for (std::int64_t column = 0; column < width; ++column) {
        call.x = packed + ((y - top) * s.stride_h * window.width + column * s.stride_w) * window.pixel;
        call.out = out + (y * width + column) * s.images + image;
        for (const Tile& tile : tiles) {
          call.weights = tile.weights.data();
          call.start = tile.start.data();
          call.to = tile.to.data();
          table.product[wide][tile.rows() - 1](call);
        }
      }
    }
  });
}

// Every tap of a pixel of the input finds one pixel of the output, whose gradients, one per filter, meet the columns of
// the tap, and is added to the channels of those.
void input_gradient(const Layer& layer, const float* out_gradient, const float* weight, float* x_gradient, int threads,
                    Isa isa) {
  const Shape& s = layer.shape;
  const Kernels& table = kernels(isa);
  const std::int64_t height = s.out_height(), width = s.out_width(), in_plane = s.height * s.width * s.images;
  const Read read(s, layer.columns);

  struct Tap {
    std::int64_t row, column;
    std::vector<std::int32_t> columns;
    std::vector<Tile> tiles;
  };
  std::vector<Tap> taps(static_cast<std::size_t>(s.taps()));
  for (const std::int32_t column : layer.columns)
    taps[static_cast<std::size_t>(column % s.taps())].columns.push_back(column);
  std::int64_t largest = 0;
  for (const Tap& tap : taps) largest = std::max(largest, size(tap.columns));
  const int wide = largest <= table.most[1] && s.images > kVectors[0] * table.lanes ? 1 : 0;
  const std::int64_t block = std::int64_t{kVectors[wide]} * table.lanes;
  for (std::size_t number = 0; number < taps.size(); ++number) {
    Tap& tap = taps[number];
    tap.row = static_cast<std::int64_t>(number) / s.kernel_w * s.dilation_h;
    tap.column = static_cast<std::int64_t>(number) % s.kernel_w * s.dilation_w;
    for (const auto& [first, last] : even_ranges(size(tap.columns), table.most[wide])) {
      Tile& tile = tap.tiles.emplace_back();
      for (std::int64_t i = first; i < last; ++i) {
        const auto channel = static_cast<std::size_t>(tap.columns[static_cast<std::size_t>(i)] / s.taps());
        tile.to.push_back(read.place[channel] * block);
      }
      for (const std::int64_t filter : layer.filters) {
        const float* const from = weight + filter * s.columns();
        for (std::int64_t i = first; i < last; ++i) {
          tile.weights.push_back(from[tap.columns[static_cast<std::size_t>(i)]]);
        }
      }
    }
  }
  std::vector<std::int32_t> offsets;  // of the filters in a packed pixel
  for (std::int64_t i = 0; i < size(layer.filters); ++i) offsets.push_back(static_cast<std::int32_t>(i * block));

  const Source source = {out_gradient, height, width, s.images, layer.filters};
  const std::int64_t pixel = size(layer.filters) * block, sums = size(read.channels) * block;
  // The output rows that rows [top, bottom) of the input meet, at most.
  const auto first_row = [&](std::int64_t top) {
    return std::max<std::int64_t>(0, top + s.padding_h - Window::reach_h(s)) / s.stride_h;
  };
  const auto last_row = [&](std::int64_t bottom) {
    return std::min(height, (bottom - 1 + s.padding_h) / s.stride_h + 1);
  };
  const auto floats = [&](std::int64_t rows) {
    return sums * s.width + ((rows + Window::reach_h(s)) / s.stride_h + 2) * width * pixel;
  };
  const std::int64_t rows = band_rows(s.height, 1, floats);
  const std::int64_t bands = (s.height + rows - 1) / rows, blocks = (s.images + block - 1) / block;

  parallel_for(bands * blocks, threads, [&](std::int64_t task) {
    const std::int64_t top = task / blocks * rows, bottom = std::min(top + rows, s.height),
                       image = task % blocks * block;
    const std::int64_t images = std::min(block, s.images - image);
    const std::int64_t first = first_row(top), last = std::max(first, last_row(bottom));
    float* const sum = scratch(floats(rows));
    float* const packed = sum + sums * s.width;
    pack(table, wide, source, first, last, 0, width, image, packed);
    Product call = {};
    call.offsets = offsets.data();
    call.terms = size(offsets);
    call.adds = true;
    for (std::int64_t y = top; y < bottom; ++y) {
      for (std::int64_t column = 0; column < s.width; ++column) {
        call.out = sum + column * sums;
        std::fill_n(call.out, sums, 0.0F);
        for (const Tap& tap : taps) {
          const std::int64_t down = y + s.padding_h - tap.row, right = column + s.padding_w - tap.column;
          if (down < 0 || right < 0 || down % s.stride_h != 0 || right % s.stride_w != 0) continue;
          if (down / s.stride_h >= height || right / s.stride_w >= width) continue;
          call.x = packed + ((down / s.stride_h - first) * width + right / s.stride_w) * pixel;
          for (const Tile& tile : tap.tiles) {
            call.weights = tile.weights.data();
            call.to = tile.to.data();
            table.product[wide][tile.rows() - 1](call);
          }
        }
      }
      for (std::int64_t channel = 0; channel < s.channels; ++channel) {
        float* const to = x_gradient + channel * in_plane + y * s.width * s.images + image;
        const std::int32_t place = read.place[static_cast<std::size_t>(channel)];
        if (place < 0) {
          for (std::int64_t column = 0; column < s.width; ++column) std::fill_n(to + column * s.images, images, 0.0F);
        } else {
          table.unpack[wide]({sum + place * block, to, sums, s.images, s.width, static_cast<int>(images)});
        }
      }
    }
  });
}

void weight_gradient(const Layer& layer, const float* x, const float* out_gradient, float* weight_gradient, int threads,
                     Isa isa) {
  const Shape& s = layer.shape;
  const Kernels& table = kernels(isa);
  const std::int64_t height = s.out_height(), width = s.out_width();
  const std::int64_t filters = size(layer.filters), columns = size(layer.columns);
  std::fill_n(weight_gradient, s.filters * s.columns(), 0.0F);
  if (filters == 0 || columns == 0) return;

  const std::int64_t block = std::int64_t{kVectors[0]} * table.lanes;
  const Read read(s, layer.columns);
  const Source in = {x, s.height, s.width, s.images, read.channels},
               gradient = {out_gradient, height, width, s.images, layer.filters};
  const Window window(layer, read, block);
  std::vector<std::int32_t> from_filter;
  for (std::int64_t i = 0; i < filters; ++i) from_filter.push_back(static_cast<std::int32_t>(i * block));
  const auto filter_tiles = even_ranges(filters, table.most_a), column_tiles = even_ranges(columns, table.most_b);

  const auto floats = [&](std::int64_t n) { return window.floats(s, n) + n * width * filters * block; };
  const std::int64_t rows = band_rows(height, (kBandPixels + width - 1) / width, floats);
  const std::int64_t bands = (height + rows - 1) / rows, blocks = (s.images + block - 1) / block,
                     pieces = bands * blocks;
  const std::int64_t parts = std::min(kParts, pieces);
  std::vector<float> partial(static_cast<std::size_t>(parts * filters * columns));

  parallel_for(parts, threads, [&](std::int64_t part) {
    float* const packed = scratch(floats(rows));
    float* const gradients = packed + window.floats(s, rows);
    Dots call = {};
    call.a = gradients;
    call.b = packed;
    call.runs = width;
    call.a_run = filters * block;
    call.a_row = width * call.a_run;
    call.b_run = s.stride_w * window.pixel;
    call.b_row = s.stride_h * window.width * window.pixel;
    call.pitch = columns;
    for (std::int64_t piece = pieces * part / parts; piece < pieces * (part + 1) / parts; ++piece) {
      const std::int64_t top = piece / blocks * rows, bottom = std::min(top + rows, height),
                         image = piece % blocks * block;
      window.read(table, 0, s, in, top, bottom, image, packed);
      pack(table, 0, gradient, top, bottom, 0, width, image, gradients);
      call.rows = bottom - top;
      for (const auto& [begin, end] : column_tiles) {
        for (const auto& [first, last] : filter_tiles) {
          call.from_a = from_filter.data() + first;
          call.from_b = window.offsets.data() + begin;
          call.sums = partial.data() + (part * filters + first) * columns + begin;
          table.dots[last - first - 1][end - begin - 1](call);
        }
      }
    }
  });

  for (std::int64_t i = 0; i < filters; ++i) {
    float* const to = weight_gradient + layer.filters[static_cast<std::size_t>(i)] * s.columns();
    for (std::int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (std::int64_t part = 0; part < parts; ++part) {
        sum += partial[static_cast<std::size_t>((part * filters + i) * columns + j)];
      }
      to[layer.columns[static_cast<std::size_t>(j)]] = sum;
    }
  }
}

}  // namespace acf::training
