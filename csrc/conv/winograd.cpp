// Winograd's F(4x4, 3x3): every 4x4 outputs of a plane come from 6x6 inputs through transforms (winograd-inl.h) and 36
// products of matrices, (filters, channels) times (channels, tiles). The results of these have tiles in lanes or, where
// there are fewer tiles than lanes, filters.
//
// Vectors of tiles are worked on in blocks whose transformed inputs and products stay in the cache. A thread takes a
// block and some of the filters, all the way from inputs to outputs. Only blocks too large to have one for each thread
// are shared: step by step, some channels, elements or filters for each.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "conv/cost.h"
#include "conv/packed.h"
#include "core/check.h"
#include "core/parallel.h"

namespace acf::conv {
namespace {

constexpr std::int64_t kTile = 4;
constexpr std::int64_t kMaxBlock = 16;           // vectors
constexpr std::int64_t kBlockBytes = 512 << 10;  // of the cache, for what is transformed together
constexpr std::int64_t kApartBytes =
    16 << 20;  // for the blocks of all threads; where that is too little, they share one
constexpr std::int64_t kLine = kAlignment / sizeof(float);
constexpr std::int64_t kMaxChannels = 1 << 16;

// How the output is cut into strips and these are gathered into vectors.
struct Tiling {
  Tiling(const Plan& plan, std::int64_t lanes, std::int64_t images)
      : strip_tiles(lanes / 4 / plan.pieces),
        strips_per_vector(4 * plan.pieces),
        per_row(ceil_div(ceil_div(plan.shape.out_width(), kTile), strip_tiles)),
        rows(ceil_div(plan.shape.out_height(), kTile)),
        strips(images * rows * per_row),
        vectors(ceil_div(strips, strips_per_vector)) {}

  std::int64_t strip_tiles, strips_per_vector;
  std::int64_t per_row, rows;  // strips in a row of tiles, rows of tiles
  std::int64_t strips, vectors;
};

bool few(const Plan& plan) { return plan.method == Method::winograd_filters_in_lanes; }

std::int64_t tile_count(const Plan& plan, std::int64_t images) {
  return images * ceil_div(plan.shape.out_height(), kTile) * ceil_div(plan.shape.out_width(), kTile);
}

// Padded to whole blocks where they are in lanes.
std::int64_t padded_filters(const Plan& plan) {
  return few(plan) ? ceil_div(plan.shape.filters, kBlock) * kBlock : plan.shape.filters;
}

// The filters, or the blocks of them, cut into the parts that a kernel takes.
Parts filter_parts(const Plan& plan) {
  return {few(plan) ? ceil_div(plan.shape.filters, kBlock) : plan.shape.filters, plan.filter_tiles};
}

// At most: those without columns are known when the weights are packed.
std::int64_t channels_of(const Plan& plan) { return std::min(plan.shape.channels, plan.columns); }

// Floats of one block: the transformed inputs, then the products. Elements lie a line further apart than a multiple of
// the vectors, or they would fall into the same few sets of the cache.
struct BlockLayout {
  BlockLayout(const Plan& plan, std::int64_t lanes)
      : pitch(plan.block_vectors * lanes),
        v_element(channels_of(plan) * pitch + kLine),
        m_element((few(plan) ? padded_filters(plan) * lanes : plan.shape.filters * pitch) + kLine),
        m(kTileElements * v_element),
        size((m + kTileElements * m_element + kLine - 1) / kLine * kLine) {}

  std::int64_t pitch, v_element, m_element, m, size;
};

// How many threads have memory for a block of their own.
int slot_count(const BlockLayout& layout) {
  const std::int64_t fit = kApartBytes / (layout.size * static_cast<std::int64_t>(sizeof(float)));
  return static_cast<int>(std::clamp<std::int64_t>(fit, 1, Slots::most()));
}

struct WinogradLayout {
  explicit WinogradLayout(const Plan& plan) {
    const auto bytes = [](std::int64_t numbers) {
      return (static_cast<std::size_t>(numbers) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
    };
    channels = (sizeof(PackedHeader) + kAlignment - 1) / kAlignment * kAlignment;
    bias = channels + bytes(1 + channels_of(plan));
    weights = bias + bytes(padded_filters(plan));
    size = weights + bytes(kTileElements * channels_of(plan) * padded_filters(plan));
  }
  // channels: int32, their number and where each begins, in floats; bias: (filters,); weights: per element and part of
  // the filters (channels, filters of the part).
  std::size_t channels, bias, weights, size;
};

// G, see winograd-inl.h, with a = 1/sqrt(2) and b = sqrt(2).
constexpr double kA = 0.70710678118654752440, kB = 1.41421356237309504880;
constexpr std::array<std::array<double, 3>, 6> kG = {{{1, 0, 0},
                                                      {-1 / 1.5, -kA / 1.5, -0.5 / 1.5},
                                                      {-1 / 1.5, kA / 1.5, -0.5 / 1.5},
                                                      {1 / 6.0, kB / 6, 2 / 6.0},
                                                      {1 / 6.0, -kB / 6, 2 / 6.0},
                                                      {0, 0, 1}}};

// G g G^T, one element of it.
double transformed(const double (&g)[9], std::int64_t element) {
  const auto& column = kG[static_cast<std::size_t>(element / 6)];
  const auto& row = kG[static_cast<std::size_t>(element % 6)];
  double sum = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t j = 0; j < 3; ++j) sum += column[i] * g[3 * i + j] * row[j];
  }
  return sum;
}

// Cycles, measured: a vector of tiles of one channel into 36 elements, and 36 of one filter into outputs.
constexpr double kInputCycles = 190, kOutputCycles = 150, kFewOutputCycles = 250;

// Of `vectors` vectors of tiles: their inputs transformed once, their products and outputs.
double input_cycles(const Plan& plan, std::int64_t vectors) {
  return static_cast<double>(vectors * channels_of(plan)) * kInputCycles;
}

double output_cycles(const Plan& plan, const Kernels& table, std::int64_t vectors) {
  const auto channels = static_cast<double>(channels_of(plan));
  double product = 0;
  if (few(plan)) {
    const std::int64_t tiles = tile_count(plan, plan.images), blocks = ceil_div(plan.shape.filters, kBlock);
    const int vectors_per_block = kBlock / table.lanes;
    product = over_parts(blocks, plan.filter_tiles, [&](std::int64_t blocks_of_part) {
      return over_parts(tiles, ceil_div(tiles, plan.tile_pixels), [&](std::int64_t m) {
        const auto t = static_cast<double>(m), b = static_cast<double>(blocks_of_part);
        const double vectors_of_part = b * vectors_per_block;
        return 70 + channels * step_cycles(plan.isa, t * vectors_of_part, t + vectors_of_part + b, 0) +
               t * vectors_of_part * 2;
      });
    });
    return kTileElements * product + static_cast<double>(tiles * blocks * vectors_per_block) * kFewOutputCycles;
  }
  product = over_parts(plan.shape.filters, plan.filter_tiles, [&](std::int64_t filters_of_part) {
    return over_parts(vectors, ceil_div(vectors, plan.tile_vectors), [&](std::int64_t vectors_of_tile) {
      const auto f = static_cast<double>(filters_of_part), v = static_cast<double>(vectors_of_tile);
      return 70 + channels * step_cycles(plan.isa, f * v, 2 + f + v, 0) + f * v * 3;
    });
  });
  return kTileElements * product + static_cast<double>(vectors * plan.shape.filters) * kOutputCycles;
}

double winograd_cycles(const Plan& plan, const Kernels& table) {
  const std::int64_t vectors = Tiling(plan, table.lanes, plan.images).vectors;
  return input_cycles(plan, vectors) + output_cycles(plan, table, vectors) + winograd_arrival_cycles(plan);
}

// One run: what all blocks share.
class Run {
 public:
  Run(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out, const Pitch& out_pitch,
      const Epilogue& epilogue)
      : plan_(plan),
        images_(images),
        table_(kernels(plan.isa)),
        tiling_(plan, table_.lanes, images),
        blocks_(tiling_.vectors, ceil_div(tiling_.vectors, plan.block_vectors)),
        parts_(filter_parts(plan)),
        layout_(plan, table_.lanes),
        in_(in),
        out_(out),
        out_pitch_(out_pitch),
        epilogue_(epilogue),
        activation_(activation_call(epilogue.activation, epilogue.slope)) {
    const WinogradLayout layout(plan);
    const auto* bytes = static_cast<const unsigned char*>(packed);
    channels_ = reinterpret_cast<const std::int32_t*>(bytes + layout.channels);
    bias_ = reinterpret_cast<const float*>(bytes + layout.bias);
    weights_ = reinterpret_cast<const float*>(bytes + layout.weights);
  }

  void run(float* scratch, int threads) const {
    if (task_count(plan_, images_, threads) == 1) threads = 1;
    if (threads > 1 && threads <= slot_count(layout_)) {
      run_apart(scratch, threads);
    } else {
      for (std::int64_t b = 0; b < blocks_.count; ++b) run_together(blocks_[b], scratch, threads);
    }
  }

 private:
  static constexpr std::int64_t kMaxStrips = kMaxBlock * 4 * 4;
  struct Block {
    Part vectors;
    bool whole_in[kMaxBlock], whole_out[kMaxBlock];
    Strip strips[kMaxStrips];
    std::int64_t tiles;  // of the only vector of few: as strips of their own, and the lanes they are in
    Strip tile[kMaxLanes];
    std::int64_t lane[kMaxLanes];
  };

  std::int64_t channels() const { return channels_[0]; }

  // Blocks, smaller ones if need be so that there is one for every thread; or parts of the filters, for each of which
  // the inputs are transformed again: what takes less time.
  void run_apart(float* scratch, int threads) const {
    const Parts fine(tiling_.vectors, std::min(tiling_.vectors, ceil_div(blocks_.count, threads) * threads));
    const std::int64_t most = std::min<std::int64_t>(threads, parts_.count);
    const bool by_filters = apart_cycles(blocks_, most, threads) < apart_cycles(fine, 1, threads);
    const Parts blocks = by_filters ? blocks_ : fine, shares(parts_.count, by_filters ? most : 1);
    Slots slots(threads);
    parallel_for(shares.count * blocks.count, threads, [&](std::int64_t task) {
      slots.with([&](int slot) {
        run_alone(blocks[task % blocks.count], shares[task / blocks.count], scratch + slot * layout_.size);
      });
    });
  }

  // Threads that take filters all read all inputs, and the outputs are read by all in turn: from caches of others.
  double apart_cycles(const Parts& blocks, std::int64_t filter_shares, int threads) const {
    const std::int64_t vectors = blocks.largest();
    const double own =
        (output_cycles(plan_, table_, vectors) + winograd_arrival_cycles(plan_)) / static_cast<double>(filter_shares);
    const double crossing =
        filter_shares > 1 ? 2 * sharing_cycles(value_count(plan_) * static_cast<double>(images_)) : 0;
    return static_cast<double>(ceil_div(blocks.count * filter_shares, threads)) * (input_cycles(plan_, vectors) + own) +
           crossing;
  }

  void run_alone(const Part& vectors, const Part& share, float* scratch) const {
    Block block;
    lay_out(vectors, block);
    transform_input(block, {0, channels()}, scratch);
    for (std::int64_t e = 0; e < kTileElements; ++e) multiply(block, e, share, scratch);
    transform_output(block, filters_of(share), scratch);
  }

  // All threads the same block.
  void run_together(const Part& vectors, float* scratch, int threads) const {
    Block block;
    lay_out(vectors, block);
    const auto each_part = [threads](std::int64_t count, const auto& body) {
      const Parts parts(count, threads == 1 ? 1 : std::min<std::int64_t>(count, kTasksPerThread * threads));
      parallel_for(parts.count, threads, [&](std::int64_t i) { body(parts[i]); });
    };
    each_part(channels(), [&](const Part& channels) { transform_input(block, channels, scratch); });
    each_part(kTileElements, [&](const Part& elements) {
      for (std::int64_t e = elements.begin; e < elements.begin + elements.size; ++e) {
        multiply(block, e, {0, parts_.count}, scratch);
      }
    });
    each_part(parts_.count, [&](const Part& share) { transform_output(block, filters_of(share), scratch); });
  }

  // Of some of the parts.
  Part filters_of(const Part& parts) const {
    const std::int64_t unit = few(plan_) ? kBlock : 1, begin = parts_[parts.begin].begin * unit;
    const Part last = parts_[parts.begin + parts.size - 1];
    return {begin, std::min((last.begin + last.size) * unit, plan_.shape.filters) - begin};
  }

  void lay_out(const Part& vectors, Block& block) const {
    const Shape& s = plan_.shape;
    const std::int64_t width = tiling_.strip_tiles * kTile;
    block.vectors = vectors;
    for (std::int64_t v = 0; v < vectors.size; ++v) {
      block.whole_in[v] = block.whole_out[v] = true;
      for (std::int64_t i = 0; i < tiling_.strips_per_vector; ++i) {
        const std::int64_t strip = (vectors.begin + v) * tiling_.strips_per_vector + i;
        Strip& to = block.strips[v * tiling_.strips_per_vector + i];
        if (strip >= tiling_.strips) {
          to = {in_, 0, 0, 0, 0, 0, 0};
        } else {
          const std::int64_t row = strip / tiling_.per_row, n = row / tiling_.rows, y = row % tiling_.rows * kTile,
                             x = strip % tiling_.per_row * width;
          const std::int64_t rows = std::min(kTile, s.out_height() - y), columns = std::min(width, s.out_width() - x);
          to.in = in_ + n * plan_.in.image + (y - s.padding.top) * plan_.in.row + x - s.padding.left;
          to.out = n * out_pitch_.image + y * out_pitch_.row + x;
          to.residual = n * epilogue_.residual_pitch.image + y * epilogue_.residual_pitch.row + x;
          to.in_rows = static_cast<int>(rows) + 2;
          to.in_columns = static_cast<int>(columns) + 2;
          to.out_rows = static_cast<int>(rows);
          to.out_columns = static_cast<int>(columns);
        }
        const bool whole = to.out_rows == kTile && to.out_columns == width;
        block.whole_in[v] &= whole;
        block.whole_out[v] &= whole;
      }
    }
    if (few(plan_)) find_tiles(block);
  }

  // Tile k of piece p of register i is in lane 4 * (p * tiles of a strip + k) + i.
  void find_tiles(Block& block) const {
    block.tiles = 0;
    for (std::int64_t s = 0; s < tiling_.strips_per_vector; ++s) {
      const Strip& strip = block.strips[s];
      const std::int64_t i = s / plan_.pieces, p = s % plan_.pieces;
      for (std::int64_t k = 0; k * kTile < strip.out_columns; ++k) {
        Strip& tile = block.tile[block.tiles];
        tile = strip;
        tile.out += k * kTile;
        tile.residual += k * kTile;
        tile.out_columns = static_cast<int>(std::min(kTile, strip.out_columns - k * kTile));
        block.lane[block.tiles++] = 4 * (p * tiling_.strip_tiles + k) + i;
      }
    }
  }

  void transform_input(const Block& block, const Part& channels, float* scratch) const {
    for (std::int64_t v = 0; v < block.vectors.size; ++v) {
      WinogradInput call;
      call.strips = block.strips + v * tiling_.strips_per_vector;
      call.pieces = plan_.pieces;
      call.whole = block.whole_in[v];
      call.in_row = plan_.in.row;
      call.channels = channels_ + 1 + channels.begin;
      call.count = channels.size;
      call.v = scratch + channels.begin * layout_.pitch + v * table_.lanes;
      call.v_channel = layout_.pitch;
      call.v_element = layout_.v_element;
      table_.winograd_input(call);
    }
  }

  void multiply(const Block& block, std::int64_t element, const Part& share, float* scratch) const {
    if (few(plan_)) return multiply_few(block, element, share, scratch);
    const float* v = scratch + element * layout_.v_element;
    float* m = scratch + layout_.m + element * layout_.m_element;
    const float* weights = weights_ + element * channels() * plan_.shape.filters;
    const Parts vectors(block.vectors.size, ceil_div(block.vectors.size, plan_.tile_vectors));
    for (std::int64_t i = share.begin; i < share.begin + share.size; ++i) {
      const Part filters = parts_[i];
      for (std::int64_t j = 0; j < vectors.count; ++j) {
        const std::int64_t at = vectors[j].begin * table_.lanes;
        table_.winograd_product[filters.size - 1][vectors[j].size - 1](
            {v + at, layout_.pitch, channels(), weights + filters.begin * channels(),
             m + filters.begin * layout_.pitch + at, layout_.pitch});
      }
    }
  }

  void multiply_few(const Block& block, std::int64_t element, const Part& share, float* scratch) const {
    const float* v = scratch + element * layout_.v_element;
    const std::int64_t filters = padded_filters(plan_);
    float* m = scratch + layout_.m + element * layout_.m_element;
    const float* weights = weights_ + element * channels() * filters;
    const Parts tiles(block.tiles, ceil_div(block.tiles, plan_.tile_pixels));
    for (std::int64_t i = share.begin; i < share.begin + share.size; ++i) {
      const Part blocks = parts_[i];
      for (std::int64_t j = 0; j < tiles.count; ++j) {
        WinogradFewProduct call;
        for (std::int64_t t = 0; t < tiles[j].size; ++t) call.tiles[t] = v + block.lane[tiles[j].begin + t];
        call.v_channel = layout_.pitch;
        call.channels = channels();
        call.weights = weights + blocks.begin * kBlock * channels();
        call.m = m + tiles[j].begin * filters + blocks.begin * kBlock;
        call.m_tile = filters;
        table_.winograd_few_product[tiles[j].size - 1][blocks.size - 1](call);
      }
    }
  }

  void transform_output(const Block& block, const Part& filters, float* scratch) const {
    if (few(plan_)) return transform_output_few(block, filters, scratch);
    WinogradOutput call = output_call(filters);
    call.m = scratch + layout_.m + filters.begin * layout_.pitch;
    call.m_filter = layout_.pitch;
    for (std::int64_t v = 0; v < block.vectors.size; ++v, call.m += table_.lanes) {
      call.strips = block.strips + v * tiling_.strips_per_vector;
      call.whole = block.whole_out[v];
      table_.winograd_output(call);
    }
  }

  void transform_output_few(const Block& block, const Part& filters, float* scratch) const {
    WinogradOutput call = output_call(filters);
    call.m = scratch + layout_.m + filters.begin;
    call.strips = block.tile;
    call.tiles = block.tiles;
    call.m_tile = padded_filters(plan_);
    table_.winograd_few_output(call);
  }

  WinogradOutput output_call(const Part& filters) const {
    WinogradOutput call = {};
    call.call = &activation_;
    call.pieces = plan_.pieces;
    call.m_element = layout_.m_element;
    call.bias = bias_ + filters.begin;
    call.filters = filters.size;
    call.out = out_ + filters.begin * out_pitch_.plane;
    call.out_plane = out_pitch_.plane;
    call.out_row = out_pitch_.row;
    call.residual = epilogue_.residual;
    if (call.residual != nullptr) call.residual += filters.begin * epilogue_.residual_pitch.plane;
    call.residual_plane = epilogue_.residual_pitch.plane;
    call.residual_row = epilogue_.residual_pitch.row;
    return call;
  }

  const Plan& plan_;
  std::int64_t images_;
  const Kernels& table_;
  Tiling tiling_;
  Parts blocks_, parts_;  // of the vectors, of the filters
  BlockLayout layout_;
  const float* in_;
  float* out_;
  Pitch out_pitch_;
  Epilogue epilogue_;
  Call activation_;
  const std::int32_t* channels_;
  const float* bias_;
  const float* weights_;
};

}  // namespace

bool winograd_fits(const Plan& plan) {
  const Shape& s = plan.shape;
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
         s.dilation_w == 1 && s.groups == 1 && plan.columns > 0 && s.channels <= kMaxChannels &&
         s.filters <= kMaxChannels;
}

bool winograd_is_few(const Plan& plan) { return tile_count(plan, plan.images) < kernels(plan.isa).lanes; }

Plan best_winograd_filters(Plan plan) {
  const Kernels& table = kernels(plan.isa);
  plan.method = Method::winograd_filters_in_lanes;
  for (plan.pieces = 1; Tiling(plan, table.lanes, plan.images).vectors > 1; plan.pieces *= 2) {
  }
  Plan best = plan;
  const std::int64_t blocks = ceil_div(plan.shape.filters, kBlock);
  for (plan.tile_pixels = 1; plan.tile_pixels <= kMaxPixels && max_blocks(table, plan.tile_pixels) > 0;
       ++plan.tile_pixels) {
    plan.filter_tiles = ceil_div(blocks, max_blocks(table, plan.tile_pixels));
    plan.cycles = winograd_cycles(plan, table);
    consider(best, plan);
  }
  return best;
}

Plan best_winograd_tiles(Plan plan) {
  const Kernels& table = kernels(plan.isa);
  plan.method = Method::winograd_tiles_in_lanes;
  const std::int64_t vector_bytes = kTileElements * (channels_of(plan) + plan.shape.filters) * table.lanes * 4;
  const std::int64_t most_vectors = std::clamp<std::int64_t>(kBlockBytes / vector_bytes, 4, kMaxBlock);
  Plan best = plan;
  for (const int pieces : {1, 2, 4}) {
    if (table.lanes < 4 * pieces) continue;
    plan.pieces = pieces;
    const std::int64_t vectors = Tiling(plan, table.lanes, plan.images).vectors;
    plan.block_vectors = ceil_div(vectors, ceil_div(vectors, most_vectors));
    for (plan.tile_vectors = 1; plan.tile_vectors <= plan.block_vectors; ++plan.tile_vectors) {
      std::int64_t most = kMaxFilters;
      while (most > 0 && max_vectors(table, Load::stretch, most) < plan.tile_vectors) --most;
      if (most == 0) break;
      plan.filter_tiles = ceil_div(plan.shape.filters, most);
      plan.cycles = winograd_cycles(plan, table);
      consider(best, plan);
    }
  }
  return best;
}

double winograd_arrival_cycles(const Plan& plan) {
  return streaming_cycles(static_cast<double>(kTileElements * channels_of(plan) * padded_filters(plan)));
}

std::size_t winograd_packed_size(const Plan& plan) { return WinogradLayout(plan).size; }

void pack_winograd(const Plan& plan, const std::int64_t* columns, const float* weights, const float* bias,
                   void* packed) {
  const WinogradLayout layout(plan);
  auto* bytes = static_cast<unsigned char*>(packed);
  auto* channels = reinterpret_cast<std::int32_t*>(bytes + layout.channels);
  auto* transformed_weights = reinterpret_cast<float*>(bytes + layout.weights);
  const std::int64_t filters = plan.shape.filters;

  std::vector<std::int64_t> kept;  // channels
  for (std::int64_t k = 0; k < plan.columns; ++k) {
    if (kept.empty() || kept.back() != columns[k] / 9) kept.push_back(columns[k] / 9);
  }
  const auto count = static_cast<std::int64_t>(kept.size());
  channels[0] = static_cast<std::int32_t>(count);
  for (std::int64_t c = 0; c < count; ++c) {
    channels[1 + c] = static_cast<std::int32_t>(kept[static_cast<std::size_t>(c)] * plan.in.plane);
  }
  if (bias != nullptr) std::memcpy(bytes + layout.bias, bias, static_cast<std::size_t>(filters) * sizeof(float));

  const Parts parts = filter_parts(plan);
  const std::int64_t unit = few(plan) ? kBlock : 1, padded = padded_filters(plan);
  for (std::int64_t i = 0; i < parts.count; ++i) {
    const std::int64_t begin = parts[i].begin * unit, width = parts[i].size * unit;
    const Part part = {begin, std::min(width, filters - begin)};
    for (std::int64_t f = 0; f < part.size; ++f) {
      std::int64_t k = 0;
      for (std::int64_t c = 0; c < count; ++c) {
        double g[9] = {};
        for (; k < plan.columns && columns[k] / 9 == kept[static_cast<std::size_t>(c)]; ++k) {
          g[columns[k] % 9] = static_cast<double>(weights[(part.begin + f) * plan.columns + k]);
        }
        for (std::int64_t e = 0; e < kTileElements; ++e) {
          transformed_weights[e * count * padded + begin * count + c * width + f] =
              static_cast<float>(transformed(g, e));
        }
      }
    }
  }
}

std::int64_t winograd_scratch(const Plan& plan) {
  const BlockLayout layout(plan, kernels(plan.isa).lanes);
  return layout.size * slot_count(layout);
}

void run_winograd(const Plan& plan, const void* packed, std::int64_t images, const float* in, float* out,
                  const Pitch& out_pitch, const Epilogue& epilogue, float* scratch, int threads) {
  Run(plan, packed, images, in, out, out_pitch, epilogue).run(scratch, threads);
}

}  // namespace acf::conv
