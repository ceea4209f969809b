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

// The weight gradient is a sum of so many partial sums, whatever the threads; planes of fewer rows are cut into blocks
// of images, too.
constexpr std::int64_t kParts = 8;
// Weights of a pixel that take more than this part of the first-level cache are read once for all images.
constexpr std::int64_t kManyWeights = 4 << 10;
// Products of so many terms at a time: values of that many channels and taps stay in the second-level cache for all
// tiles.
constexpr std::int64_t kMostTerms = 512;

template <class T>
std::int64_t size(const std::vector<T>& values) {
  return static_cast<std::int64_t>(values.size());
}

// [0, count) in ranges of nearly the same size, at most `most`: body(begin, end).
template <class Body>
void each_range(std::int64_t count, std::int64_t most, const Body& body) {
  const std::int64_t ranges = (count + most - 1) / most;
  for (std::int64_t i = 0; i < ranges; ++i) body(count * i / ranges, count * (i + 1) / ranges);
}

// A tile of weights, (terms, rows), and where the sums of its rows go.
struct Tile {
  std::vector<float> weights, start;
  std::vector<std::int64_t> to;
  std::int64_t rows() const { return size(to); }
};

std::int64_t weights_of(const std::vector<Tile>& tiles) {
  std::int64_t count = 0;
  for (const Tile& tile : tiles) count += size(tile.weights);
  return count;
}

// How images are cut into blocks of kVectors[wide] vectors: wide ones where tiles are not wider than high then, so that
// they read few values for their products.
struct Blocks {
  int wide;
  std::int64_t block, count;

  // `images` are whole narrow blocks.
  Blocks(const Kernels& table, std::int64_t images)
      : wide(table.most[1] > kVectors[1] && images % (std::int64_t{kVectors[1]} * table.lanes) == 0 ? 1 : 0),
        block(std::int64_t{kVectors[wide]} * table.lanes),
        count(images / block) {}
};

// Every tile with every block in [first, last): what is read again and again, few weights or the values of a block,
// stays in the first-level cache.
template <class Body>
void each_tile(const std::vector<Tile>& tiles, bool many_weights, std::int64_t first, std::int64_t last,
               const Body& body) {
  if (many_weights) {
    for (const Tile& tile : tiles) {
      for (std::int64_t block = first; block < last; ++block) body(tile, block);
    }
  } else {
    for (std::int64_t block = first; block < last; ++block) {
      for (const Tile& tile : tiles) body(tile, block);
    }
  }
}

// body(row, first block, end) for all rows of a plane, by threads.
template <class Body>
void each_row(std::int64_t rows, const Blocks& blocks, int threads, const Body& body) {
  const std::int64_t parts = rows < kParts ? blocks.count : 1;
  parallel_for(rows * parts, threads, [&](std::int64_t task) {
    const std::int64_t part = task % parts;
    body(task / parts, blocks.count * part / parts, blocks.count * (part + 1) / parts);
  });
}

// The images of `shape` rounded up to whole narrow blocks.
std::int64_t whole_images(const Shape& shape, const Kernels& table) {
  const std::int64_t block = std::int64_t{kVectors[0]} * table.lanes;
  return (shape.images + block - 1) / block * block;
}

Layer with_images(const Layer& layer, std::int64_t images) {
  Layer result = layer;
  result.shape.images = images;
  check(result.shape);
  return result;
}

// Rows of `from` images as rows of `to` images, of which those that do not exist are zero.
std::vector<float> resized(const float* x, std::int64_t rows, std::int64_t from, std::int64_t to) {
  std::vector<float> result(static_cast<std::size_t>(rows * to));
  for (std::int64_t row = 0; row < rows; ++row) std::copy_n(x + row * from, from, result.data() + row * to);
  return result;
}

// The other way round.
void restore(const std::vector<float>& x, std::int64_t from, float* to, std::int64_t images) {
  for (std::int64_t row = 0; row < size(x) / from; ++row) {
    std::copy_n(x.data() + row * from, images, to + row * images);
  }
}

std::int64_t in_runs(const Shape& s) { return s.height * s.width * s.channels; }
std::int64_t out_runs(const Shape& s) { return s.out_height() * s.out_width() * s.filters; }

// Which of `taps` meet the input at a pixel of the output, whose first one is at `start` of `size`.
Terms valid_taps(std::int64_t start, std::int64_t taps, std::int64_t dilation, std::int64_t size) {
  const std::int64_t begin = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
  const std::int64_t end = start >= size ? 0 : std::min(taps, (size - 1 - start) / dilation + 1);
  return {static_cast<std::int32_t>(begin), static_cast<std::int32_t>(std::max(begin, end))};
}

// The columns that are kept, by tap and then by channel: those that a pixel of the output finds inside of the input
// are then a range for every row of the kernel, and one for all in the middle of the plane.
struct Columns {
  std::vector<std::int32_t> numbers, offsets, ends;  // ends[t]: of the columns of tap t
  const Shape& shape;

  explicit Columns(const Layer& layer) : numbers(layer.columns), shape(layer.shape) {
    const Shape& s = shape;
    const std::int64_t reach = s.dilation_h * (s.kernel_h - 1) * s.width + s.dilation_w * (s.kernel_w - 1) + 1;
    ACF_CHECK(reach <= std::numeric_limits<std::int32_t>::max() / (s.channels * s.images),
              "a kernel must reach over less than 2^31 values, got ", reach, " pixels of ", s.channels, " channels of ",
              s.images, " images");
    const auto order = [&](std::int32_t column) { return std::pair(column % s.taps(), column / s.taps()); };
    std::sort(numbers.begin(), numbers.end(), [&](std::int32_t a, std::int32_t b) { return order(a) < order(b); });
    ends.resize(static_cast<std::size_t>(s.taps()));
    for (const std::int32_t column : numbers) {
      const auto [tap, channel] = order(column);
      const std::int64_t row = tap / s.kernel_w * s.dilation_h, right = tap % s.kernel_w * s.dilation_w;
      offsets.push_back(static_cast<std::int32_t>(((row * s.width + right) * s.channels + channel) * s.images));
      ++ends[static_cast<std::size_t>(tap)];
    }
    for (std::size_t tap = 1; tap < ends.size(); ++tap) ends[tap] += ends[tap - 1];
  }

  Terms all() const { return {0, static_cast<std::int32_t>(numbers.size())}; }
  std::int32_t begin(std::int64_t tap) const { return tap == 0 ? 0 : ends[static_cast<std::size_t>(tap) - 1]; }

  // Where the first tap of a pixel of the output is in the input, maybe outside.
  std::int64_t origin(std::int64_t y, std::int64_t x) const {
    const Shape& s = shape;
    return ((y * s.stride_h - s.padding_h) * s.width + x * s.stride_w - s.padding_w) * s.channels * s.images;
  }

  // The terms of that pixel among `some`, in at most as many ranges as the kernel has rows.
  void ranges(std::int64_t y, std::int64_t x, Terms some, std::vector<Terms>& to) const {
    const Shape& s = shape;
    const Terms down = valid_taps(y * s.stride_h - s.padding_h, s.kernel_h, s.dilation_h, s.height),
                right = valid_taps(x * s.stride_w - s.padding_w, s.kernel_w, s.dilation_w, s.width);
    to.clear();
    if (right.begin == right.end) return;
    for (std::int64_t row = down.begin; row < down.end; ++row) {
      const Terms terms = {std::max(some.begin, begin(row * s.kernel_w + right.begin)),
                           std::min(some.end, begin(row * s.kernel_w + right.end))};
      if (terms.begin >= terms.end) continue;
      if (!to.empty() && to.back().end == terms.begin) {
        to.back().end = terms.end;
      } else {
        to.push_back(terms);
      }
    }
  }
};

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
  if (const std::int64_t whole = whole_images(s, table); whole != s.images) {
    const std::vector<float> larger = resized(x, in_runs(s), s.images, whole);
    std::vector<float> result(static_cast<std::size_t>(out_runs(s) * whole));
    forward(with_images(layer, whole), larger.data(), weight, bias, result.data(), threads, isa);
    return restore(result, whole, out, s.images);
  }

  const Columns columns(layer);
  const Blocks blocks(table, s.images);
  std::vector<Tile> tiles;
  each_range(size(layer.filters), table.most[blocks.wide], [&](std::int64_t first, std::int64_t last) {
    Tile& tile = tiles.emplace_back();
    const auto chosen = [&](std::int64_t i) { return std::int64_t{layer.filters[static_cast<std::size_t>(i)]}; };
    for (std::int64_t i = first; i < last; ++i) {
      tile.to.push_back(chosen(i) * s.images);
      tile.start.push_back(bias == nullptr ? 0.0F : bias[chosen(i)]);
    }
    for (const std::int32_t column : columns.numbers) {
      for (std::int64_t i = first; i < last; ++i) tile.weights.push_back(weight[chosen(i) * s.columns() + column]);
    }
  });
  std::vector<std::int32_t> gone;  // filters
  for (std::int32_t filter = 0; filter < s.filters; ++filter) {
    if (!std::binary_search(layer.filters.begin(), layer.filters.end(), filter)) gone.push_back(filter);
  }

  std::vector<Terms> passes;
  each_range(std::max<std::int64_t>(1, size(columns.numbers)), kMostTerms, [&](std::int64_t begin, std::int64_t end) {
    passes.push_back({static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end)});
  });

  const std::int64_t width = s.out_width();
  const bool many_weights = weights_of(tiles) > kManyWeights;
  each_row(s.out_height(), blocks, threads, [&](std::int64_t y, std::int64_t first, std::int64_t last) {
    std::vector<Terms> ranges;
    for (std::int64_t column = 0; column < width; ++column) {
      float* const pixel = out + (y * width + column) * s.filters * s.images;
      for (const std::int32_t filter : gone) {
        std::fill(pixel + filter * s.images + first * blocks.block, pixel + filter * s.images + last * blocks.block,
                  bias == nullptr ? 0.0F : bias[filter]);
      }
      for (std::size_t i = 0; i < passes.size(); ++i) {
        columns.ranges(y, column, passes[i], ranges);
        if (i > 0 && ranges.empty()) continue;
        each_tile(tiles, many_weights, first, last, [&](const Tile& tile, std::int64_t block) {
          const std::int64_t image = block * blocks.block;
          table.product[blocks.wide][tile.rows() - 1](
              {x, columns.origin(y, column) + image, columns.offsets.data(), ranges.data(), size(ranges),
               tile.weights.data(), i == 0 ? tile.start.data() : nullptr, pixel + image, tile.to.data(), i > 0});
        });
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
  if (const std::int64_t whole = whole_images(s, table); whole != s.images) {
    const std::vector<float> larger = resized(out_gradient, out_runs(s), s.images, whole);
    std::vector<float> result(static_cast<std::size_t>(in_runs(s) * whole));
    input_gradient(with_images(layer, whole), larger.data(), weight, result.data(), threads, isa);
    return restore(result, whole, x_gradient, s.images);
  }

  const Columns columns(layer);
  const Blocks blocks(table, s.images);
  struct Tap {
    std::int64_t row, column;
    std::vector<Tile> tiles;
    bool many_weights;
  };
  std::vector<Tap> taps;
  for (std::int64_t number = 0; number < s.taps(); ++number) {
    const std::int64_t begin = columns.begin(number), end = columns.begin(number + 1);
    if (begin == end) continue;
    Tap& tap = taps.emplace_back();
    tap.row = number / s.kernel_w * s.dilation_h;
    tap.column = number % s.kernel_w * s.dilation_w;
    each_range(end - begin, table.most[blocks.wide], [&](std::int64_t first, std::int64_t last) {
      const std::int32_t* const from = columns.numbers.data() + begin + first;
      const std::int32_t* const to = columns.numbers.data() + begin + last;
      Tile& tile = tap.tiles.emplace_back();
      for (const std::int32_t* column = from; column != to; ++column) tile.to.push_back(*column / s.taps() * s.images);
      for (const std::int64_t filter : layer.filters) {
        for (const std::int32_t* column = from; column != to; ++column) {
          tile.weights.push_back(weight[filter * s.columns() + *column]);
        }
      }
    });
    tap.many_weights = weights_of(tap.tiles) > kManyWeights;
  }
  std::vector<std::int32_t> offsets;  // of the filters in a pixel
  for (const std::int32_t filter : layer.filters) offsets.push_back(static_cast<std::int32_t>(filter * s.images));
  const Terms all = {0, static_cast<std::int32_t>(offsets.size())};

  const std::int64_t height = s.out_height(), width = s.out_width();
  each_row(s.height, blocks, threads, [&](std::int64_t y, std::int64_t first, std::int64_t last) {
    for (std::int64_t column = 0; column < s.width; ++column) {
      float* const pixel = x_gradient + (y * s.width + column) * s.channels * s.images;
      for (std::int64_t channel = 0; channel < s.channels; ++channel) {
        std::fill(pixel + channel * s.images + first * blocks.block, pixel + channel * s.images + last * blocks.block,
                  0.0F);
      }
      for (const Tap& tap : taps) {
        const std::int64_t down = y + s.padding_h - tap.row, right = column + s.padding_w - tap.column;
        if (down < 0 || right < 0 || down % s.stride_h != 0 || right % s.stride_w != 0) continue;
        if (down / s.stride_h >= height || right / s.stride_w >= width) continue;
        const std::int64_t from = (down / s.stride_h * width + right / s.stride_w) * s.filters * s.images;
        each_tile(tap.tiles, tap.many_weights, first, last, [&](const Tile& tile, std::int64_t block) {
          const std::int64_t image = block * blocks.block;
          table.product[blocks.wide][tile.rows() - 1]({out_gradient, from + image, offsets.data(), &all, 1,
                                                       tile.weights.data(), nullptr, pixel + image, tile.to.data(),
                                                       true});
        });
      }
    }
  });
}

// Registers hold filters here: gradients of a pixel are turned, so that the filters of an image lie side by side, and
// meet every value of the input under the kernel. So sums are few and need no adding up of lanes.
void weight_gradient(const Layer& layer, const float* x, const float* out_gradient, float* weight_gradient, int threads,
                     Isa isa) {
  const Shape& s = layer.shape;
  const Kernels& table = kernels(isa);
  if (const std::int64_t whole = whole_images(s, table); whole != s.images) {
    const std::vector<float> larger = resized(x, in_runs(s), s.images, whole),
                             gradient = resized(out_gradient, out_runs(s), s.images, whole);
    return training::weight_gradient(with_images(layer, whole), larger.data(), gradient.data(), weight_gradient,
                                     threads, isa);
  }
  std::fill_n(weight_gradient, s.filters * s.columns(), 0.0F);
  if (layer.filters.empty() || layer.columns.empty()) return;

  const Columns columns(layer);
  std::vector<std::int32_t> offsets;  // of the filters in a pixel
  for (const std::int32_t filter : layer.filters) offsets.push_back(static_cast<std::int32_t>(filter * s.images));
  struct Group {
    std::int64_t first;  // filter
    int filters, vectors, width;
  };
  std::vector<Group> groups;
  for (std::int64_t first = 0; first < size(offsets); first += 2 * table.lanes) {
    const int filters = static_cast<int>(std::min<std::int64_t>(2 * table.lanes, size(offsets) - first));
    const int vectors = filters > table.lanes ? 2 : 1;
    groups.push_back({first, filters, vectors, vectors * table.lanes});
  }

  // Sums of a part: of every group, (columns, width).
  const std::int64_t width = s.out_width(), pixels = s.out_height() * width, parts = std::min(kParts, pixels);
  const std::int64_t sums = size(columns.numbers) * (groups.back().first + groups.back().width);
  std::vector<float> partial(static_cast<std::size_t>(parts * sums));
  parallel_for(parts, threads, [&](std::int64_t part) {
    std::vector<float> turned(static_cast<std::size_t>(2 * table.lanes * s.images));
    std::vector<Terms> ranges;
    for (std::int64_t pixel = pixels * part / parts; pixel < pixels * (part + 1) / parts; ++pixel) {
      const std::int64_t y = pixel / width, column = pixel % width;
      columns.ranges(y, column, columns.all(), ranges);
      if (ranges.empty()) continue;
      for (const Group& group : groups) {
        table.turn({out_gradient + pixel * s.filters * s.images, offsets.data() + group.first, group.filters,
                    group.width, s.images, turned.data()});
        float* const to = partial.data() + part * sums + group.first * size(columns.numbers);
        for (const Terms& range : ranges) {
          each_range(range.end - range.begin, table.most_outer[group.vectors - 1],
                     [&](std::int64_t first, std::int64_t last) {
                       first += range.begin;
                       last += range.begin;
                       table.outer[group.vectors - 1][last - first - 1]({x, columns.origin(y, column),
                                                                         columns.offsets.data() + first, turned.data(),
                                                                         s.images, to + first * group.width});
                     });
        }
      }
    }
  });

  for (const Group& group : groups) {
    for (std::size_t i = 0; i < columns.numbers.size(); ++i) {
      const float* const from =
          partial.data() + group.first * size(columns.numbers) + static_cast<std::int64_t>(i) * group.width;
      for (int f = 0; f < group.filters; ++f) {
        float sum = 0;
        for (std::int64_t part = 0; part < parts; ++part) sum += from[part * sums + f];
        const std::int64_t filter = layer.filters[static_cast<std::size_t>(group.first + f)];
        weight_gradient[filter * s.columns() + columns.numbers[i]] = sum;
      }
    }
  }
}

}  // namespace acf::training
