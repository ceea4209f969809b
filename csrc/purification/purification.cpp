#include "purification/purification.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/parallel.h"
#include "projection/element_selection.h"
#include "projection/kernels.h"

namespace acf::purification {
namespace {

using projection::Kernels;
using projection::NotFinite;
using projection::Options;
using projection::Shape;
using projection::Structure;

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// Rows are taken in parts that stay in the second-level cache: what the filters' sums fetch, the columns' sums find
// there. Within a part, column sums are kept in the first-level cache.
constexpr std::int64_t kPart = 32768;    // elements
constexpr std::int64_t kStripe = 1024;   // columns
constexpr std::int64_t kPiece = 262144;  // elements of a task: enough to pay for waking a thread, and for its own sums

// Rows [first, end) of a layer: whole blocks of a grouped convolution, or a part of one block. Cut by shapes alone.
struct Piece {
  std::int64_t layer, first, end;
  std::vector<double> column_squares;  // of its own when it is a part of a block
};

// Adds up the squares of the rows' elements, by row and by column. column_squares: of the first row's block.
template <class T>
void add_squares(const T* w, const Shape& shape, std::int64_t rows, const Kernels<T>& kernels, double* row_squares,
                 double* column_squares) {
  const std::int64_t columns = shape.columns, per_block = std::min(rows, shape.rows / shape.groups);
  const std::int64_t step = std::clamp<std::int64_t>(kPart / columns, 1, per_block);
  for (std::int64_t block = 0; block < rows; block += per_block) {
    double* squares = column_squares + block / per_block * columns;
    for (std::int64_t row = block; row < block + per_block; row += step) {
      const std::int64_t taken = std::min(step, block + per_block - row);
      kernels.row_squares(w + row * columns, nullptr, taken, columns, nullptr, 1.0, row_squares + row);
      for (std::int64_t column = 0; column < columns; column += kStripe) {
        kernels.column_squares(w + row * columns + column, nullptr, taken, columns, std::min(kStripe, columns - column),
                               nullptr, 1.0, squares + column);
      }
    }
  }
}

std::vector<Piece> pieces_of(const Shape& shape, std::int64_t layer) {
  std::vector<Piece> pieces;
  const std::int64_t block_rows = shape.rows / shape.groups, block = block_rows * shape.columns;
  if (block <= kPiece) {
    const std::int64_t rows = kPiece / block * block_rows;
    for (std::int64_t row = 0; row < shape.rows; row += rows) {
      pieces.push_back({layer, row, std::min(shape.rows, row + rows), {}});
    }
    return pieces;
  }
  const std::int64_t rows = std::max<std::int64_t>(1, kPiece / shape.columns);
  for (std::int64_t first = 0; first < shape.rows; first += block_rows) {
    for (std::int64_t row = first; row < first + block_rows; row += rows) {
      const std::int64_t end = std::min(first + block_rows, row + rows);
      pieces.push_back({layer, row, end, std::vector<double>(index(shape.columns))});
    }
  }
  return pieces;
}

// A sum of squares is finite exactly when all its elements are, but for doubles whose squares leave the range, which
// group_norms measures once more in a range of their own.
template <class T>
void squares_to_norms(const Layer<T>& layer, const Options& options) {
  const Shape& shape = layer.shape;
  const double energy = std::accumulate(layer.filter_norms, layer.filter_norms + shape.rows, 0.0);
  if (!std::isfinite(energy)) projection::check_finite<T>(layer.w, nullptr, shape.size());
  constexpr double kSmall = 1e-200;
  if (sizeof(T) == sizeof(double) && !(std::isfinite(energy) && energy >= kSmall)) {
    projection::group_norms(layer.w, shape, Structure::filter, options, layer.filter_norms);
    projection::group_norms(layer.w, shape, Structure::column, options, layer.column_norms);
    return;
  }
  for (std::int64_t i = 0; i < shape.rows; ++i) layer.filter_norms[i] = std::sqrt(layer.filter_norms[i]);
  for (std::int64_t k = 0; k < shape.groups * shape.columns; ++k) {
    layer.column_norms[k] = std::sqrt(layer.column_norms[k]);
  }
}

// A column whose norm underflows to 0 is as good as empty: only elements 150 orders of magnitude below the largest do.
template <class T>
void score_channels(const Layer<T>& layer) {
  const std::int64_t taps = layer.shape.taps;
  for (std::int64_t channel = 0; channel < layer.shape.groups * layer.shape.columns / taps; ++channel) {
    double energy = 0, alive = 0;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      const double norm = layer.column_norms[channel * taps + tap];
      energy += norm * norm;
      alive += norm != 0 ? 1 : 0;
    }
    layer.importance[channel] = energy / static_cast<double>(taps);
    layer.emptiness[channel] = alive / static_cast<double>(taps);
  }
}

}  // namespace

template <class T>
void scores(const Layer<T>* layers, std::int64_t count, const Options& options) {
  const Kernels<T>& kernels = projection::kernels<T>(options.isa);
  std::vector<Piece> pieces;
  for (std::int64_t i = 0; i < count; ++i) {
    const Shape& shape = layers[i].shape;
    std::fill_n(layers[i].column_norms, shape.groups * shape.columns, 0.0);
    for (Piece& piece : pieces_of(shape, i)) pieces.push_back(std::move(piece));
  }
  parallel_for(static_cast<std::int64_t>(pieces.size()), options.threads, [&](std::int64_t task) {
    Piece& piece = pieces[index(task)];
    const Layer<T>& layer = layers[piece.layer];
    const std::int64_t block = piece.first / (layer.shape.rows / layer.shape.groups);
    double* columns =
        piece.column_squares.empty() ? layer.column_norms + block * layer.shape.columns : piece.column_squares.data();
    add_squares(layer.w + piece.first * layer.shape.columns, layer.shape, piece.end - piece.first, kernels,
                layer.filter_norms + piece.first, columns);
  });
  for (const Piece& piece : pieces) {
    const Layer<T>& layer = layers[piece.layer];
    const std::int64_t block = piece.first / (layer.shape.rows / layer.shape.groups);
    double* columns = layer.column_norms + block * layer.shape.columns;
    for (std::size_t k = 0; k < piece.column_squares.size(); ++k) columns[k] += piece.column_squares[k];
  }
  for (std::int64_t i = 0; i < count; ++i) {
    try {
      squares_to_norms(layers[i], options);
    } catch (NotFinite& error) {
      error.layer = i;
      throw;
    }
    score_channels(layers[i]);
  }
}

void keep(const Judged* layers, std::int64_t count, std::int64_t groups) {
  std::vector<double> joint(index(groups), 0.0);
  for (const Judged* layer = layers; layer != layers + count; ++layer) {
    const Shape& shape = layer->shape;
    const std::int64_t taps = shape.taps;
    for (std::int64_t channel = 0; channel < shape.groups * shape.columns / taps; ++channel) {
      std::int64_t left = 0;
      for (std::int64_t k = channel * taps; k < (channel + 1) * taps; ++k) {
        const double norm = layer->column_norms[k];
        layer->columns[k] = norm > 0 && norm >= layer->limits.column ? 1 : 0;
        left += layer->columns[k];
      }
      const bool unimportant = layer->importance[channel] < layer->limits.importance;
      if (unimportant && static_cast<double>(left) < layer->limits.emptiness * static_cast<double>(taps)) {
        std::fill_n(layer->columns + channel * taps, taps, std::uint8_t{0});
      }
    }
    for (std::int64_t i = 0; i < shape.rows; ++i) {
      if (layer->tied[i] >= 0) joint[index(layer->tied[i])] += layer->filter_norms[i] * layer->filter_norms[i];
    }
  }
  std::vector<std::uint8_t> stays(index(groups), 0);
  for (int pass = 0; pass < 2; ++pass) {  // first what one of its layers wants to keep, then for all of them
    for (const Judged* layer = layers; layer != layers + count; ++layer) {
      for (std::int64_t i = 0; i < layer->shape.rows; ++i) {
        const std::int64_t group = layer->tied[i];
        if (pass == 1) {
          layer->filters[i] = group < 0 ? 1 : stays[index(group)];
        } else if (group >= 0) {
          const double norm = std::sqrt(joint[index(group)]);
          if (norm > 0 && norm >= layer->limits.filter) stays[index(group)] = 1;
        }
      }
    }
  }
}

template void scores<float>(const Layer<float>*, std::int64_t, const Options&);
template void scores<double>(const Layer<double>*, std::int64_t, const Options&);

}  // namespace acf::purification
