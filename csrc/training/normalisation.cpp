// Cuts the pixels of a normalisation into pieces that stay in a cache and hands them to the kernels of an ISA.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "training/kernels.h"
#include "training/training.h"

namespace acf::training {
namespace {

constexpr std::int64_t kPieceFloats = 16 << 10;

// Pixels in pieces of about kPieceFloats values, which do not depend on the threads.
struct Pieces {
  Pixels of;
  std::int64_t pixels, count;  // of a piece, but the last; of pieces

  explicit Pieces(const Pixels& whole)
      : of(whole),
        pixels(std::max<std::int64_t>(1, kPieceFloats / (whole.channels * whole.images))),
        count((whole.pixels + pixels - 1) / pixels) {}

  std::int64_t begin(std::int64_t piece) const { return piece * pixels * of.channels * of.images; }
  Pixels piece(std::int64_t number) const {
    return {std::min(pixels, of.pixels - number * pixels), of.channels, of.images};
  }
  // body(number, memory of two vectors for every channel) for every piece.
  template <class Body>
  void each(const Kernels& table, int threads, const Body& body) const {
    parallel_for(count, threads, [&](std::int64_t number) {
      thread_local std::vector<float> memory;
      memory.resize(std::max(memory.size(), static_cast<std::size_t>(2 * table.lanes * of.channels)));
      body(number, memory.data());
    });
  }
};

// A value for every channel of every piece.
struct Partial {
  std::int64_t channels;
  std::vector<float> values;

  explicit Partial(const Pieces& pieces)
      : channels(pieces.of.channels), values(static_cast<std::size_t>(pieces.count * channels)) {}
  float* of(std::int64_t piece) { return values.data() + piece * channels; }
  double at(std::int64_t piece, std::int64_t channel) const {
    return static_cast<double>(values[static_cast<std::size_t>(piece * channels + channel)]);
  }
  double total(std::int64_t channel) const {
    double sum = 0;
    for (std::size_t i = static_cast<std::size_t>(channel); i < values.size();
         i += static_cast<std::size_t>(channels)) {
      sum += static_cast<double>(values[i]);
    }
    return sum;
  }
};

std::vector<float> one_for_each(const Pixels& of) { return std::vector<float>(static_cast<std::size_t>(of.channels)); }

}  // namespace

void channel_sums(const Pixels& of, const float* x, float* sums, int threads, Isa isa) {
  const Kernels& table = kernels(isa);
  const Pieces pieces(of);
  Partial partial(pieces);
  pieces.each(table, threads, [&](std::int64_t i, float* memory) {
    table.sums(pieces.piece(i), x + pieces.begin(i), memory, partial.of(i));
  });
  for (std::int64_t c = 0; c < of.channels; ++c) sums[c] = static_cast<float>(partial.total(c));
}

void normalise(const Normalisation& n, const float* x, double eps, float* out, float* mean, float* variance,
               int threads, Isa isa) {
  const Kernels& table = kernels(isa);
  const Pieces pieces(n.of);
  // The mean of every piece, and the squares around it, while the piece is in a cache:
  //   sum of (x - mean)^2 = sum over pieces of (squares around its mean + count * (its mean - mean)^2)
  Partial means(pieces), squares(pieces);
  const auto values = [&](std::int64_t i) { return static_cast<double>(pieces.piece(i).pixels * n.of.images); };
  pieces.each(table, threads, [&](std::int64_t i, float* memory) {
    table.sums(pieces.piece(i), x + pieces.begin(i), memory, means.of(i));
    for (std::int64_t c = 0; c < n.of.channels; ++c) means.of(i)[c] /= static_cast<float>(values(i));
    table.squares(pieces.piece(i), x + pieces.begin(i), means.of(i), memory, squares.of(i));
  });

  std::vector<float> slope = one_for_each(n.of), start = one_for_each(n.of);
  const auto count = static_cast<double>(n.of.pixels * n.of.images);
  for (std::int64_t c = 0; c < n.of.channels; ++c) {
    double middle = 0, spread = squares.total(c);
    for (std::int64_t i = 0; i < pieces.count; ++i) middle += means.at(i, c) * (values(i) / count);
    for (std::int64_t i = 0; i < pieces.count; ++i) {
      spread += values(i) * (means.at(i, c) - middle) * (means.at(i, c) - middle);
    }
    mean[c] = static_cast<float>(middle);
    variance[c] = static_cast<float>(spread / count);
    const double weight = n.weight == nullptr ? 1.0 : static_cast<double>(n.weight[c]);
    const double bias = n.bias == nullptr ? 0.0 : static_cast<double>(n.bias[c]);
    const double times = weight / std::sqrt(spread / count + eps);
    slope[static_cast<std::size_t>(c)] = static_cast<float>(times);
    start[static_cast<std::size_t>(c)] = static_cast<float>(bias - middle * times);
  }
  pieces.each(table, threads, [&](std::int64_t i, float* /*memory*/) {
    const std::int64_t at = pieces.begin(i);
    table.scaled(pieces.piece(i), x + at, slope.data(), start.data(), out + at);
  });
}

void normalise_gradient(const Normalisation& n, const float* x, const float* out_gradient, const float* mean,
                        const float* variance, double eps, float* x_gradient, float* weight_gradient,
                        float* bias_gradient, int threads, Isa isa) {
  const Kernels& table = kernels(isa);
  const Pieces pieces(n.of);
  Partial plain(pieces), times(pieces);
  pieces.each(table, threads, [&](std::int64_t i, float* memory) {
    const std::int64_t at = pieces.begin(i);
    table.products(pieces.piece(i), x + at, out_gradient + at, mean, memory, plain.of(i), times.of(i));
  });

  // x_gradient = of_g * g + of_x * x + rest
  std::vector<float> of_g = one_for_each(n.of), of_x = one_for_each(n.of), rest = one_for_each(n.of);
  const auto count = static_cast<double>(n.of.pixels * n.of.images);
  for (std::int64_t c = 0; c < n.of.channels; ++c) {
    const auto at = static_cast<std::size_t>(c);
    const double scale = 1 / std::sqrt(static_cast<double>(variance[c]) + eps);
    const double sum = plain.total(c), product = times.total(c);
    bias_gradient[c] = static_cast<float>(sum);
    weight_gradient[c] = static_cast<float>(product * scale);
    const double g = (n.weight == nullptr ? 1.0 : static_cast<double>(n.weight[c])) * scale;
    const double of_middle = -g * scale * scale * product / count;
    of_g[at] = static_cast<float>(g);
    of_x[at] = static_cast<float>(of_middle);
    rest[at] = static_cast<float>(-g * sum / count - of_middle * static_cast<double>(mean[c]));
  }
  pieces.each(table, threads, [&](std::int64_t i, float* /*memory*/) {
    const std::int64_t at = pieces.begin(i);
    table.combined(pieces.piece(i), x + at, out_gradient + at, of_g.data(), of_x.data(), rest.data(), x_gradient + at);
  });
}

}  // namespace acf::training
