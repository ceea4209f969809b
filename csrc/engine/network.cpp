#include "engine/network.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <utility>

#include "core/check.h"

namespace acf::engine {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kSessions = 8;  // kept for as many numbers of samples
constexpr std::int64_t kLine = 64 / sizeof(float);

struct Free {
  void operator()(float* memory) const { ::operator delete (memory, std::align_val_t{64}); }
};
using Memory = std::unique_ptr<float, Free>;

Memory zeroed(std::int64_t size) {
  const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
  Memory memory(static_cast<float*>(::operator new (bytes, std::align_val_t{64})));
  std::memset(memory.get(), 0, bytes);
  return memory;
}

// A piece of the workspace that is needed from one step to another, both included.
struct Block {
  std::int64_t size;
  std::int64_t first, last;
  std::int64_t offset = 0;
  bool meets(const Block& other) const { return first <= other.last && other.first <= last; }
};

// Places every block, the largest first, as low as it can lie; returns the size of all.
std::int64_t place(std::vector<Block>& blocks) {
  std::vector<Block*> order;
  for (Block& block : blocks) order.push_back(&block);
  std::stable_sort(order.begin(), order.end(), [](const Block* a, const Block* b) { return a->size > b->size; });
  std::vector<const Block*> placed;  // by offset
  std::int64_t total = 0;
  for (Block* block : order) {
    std::int64_t at = 0;
    for (const Block* other : placed) {
      if (!other->meets(*block)) continue;
      if (other->offset >= at + block->size) break;
      at = std::max(at, other->offset + other->size);
    }
    block->offset = at;
    placed.insert(std::upper_bound(placed.begin(), placed.end(), block,
                                   [](const Block* a, const Block* b) { return a->offset < b->offset; }),
                  block);
    total = std::max(total, at + block->size);
  }
  return total;
}

}  // namespace

// A network prepared for a number of samples.
class Session {
 public:
  Session(const Network& network, std::int64_t count) : images(count), network_(network) {
    lay_out();
    for (std::size_t s = 0; s < network.steps_.size(); ++s) {
      const Network::Step& step = network.steps_[s];
      std::vector<const Layout*> inputs;
      for (const int value : step.inputs) inputs.push_back(&layout(value));
      const Layout& output = layout(step.output);
      const bool nothing = step.operation->keeps_order() && inputs[0]->in_order() && output.in_order();
      tasks_.push_back(nothing ? nullptr : step.operation->prepare(network.isa_, inputs, output));
    }
    arrange();
    find_dirty_halos();
    for (int value = 0; value < network.inputs_; ++value) {
      const Layout& to = layout(value);
      reads_.emplace_back(all_dims(to), std::array<Shape, 2>{all_strides(in_order(to.shape, images)), all_strides(to)});
    }
    for (const int value : network.outputs_) {
      const Layout& from = layout(value);
      writes_.emplace_back(all_dims(from),
                           std::array<Shape, 2>{all_strides(from), all_strides(in_order(from.shape, images))});
    }
  }

  void run(const float* const* inputs, float* const* outputs, int threads, double* seconds) {
    Workspace workspace = take();
    float* base = workspace.memory.get();
    std::vector<float*>& at = workspace.operands;
    for (std::size_t i = 0; i < reads_.size(); ++i) {
      const int value = static_cast<int>(i);
      if (dirty_[i]) clear(value, base);
      copy(reads_[i], inputs[i], address(value, base));
    }
    for (std::size_t s = 0; s < tasks_.size(); ++s) {
      if (seconds != nullptr) seconds[s] = 0;
      if (tasks_[s] == nullptr) continue;
      const auto begin = seconds == nullptr ? Clock::time_point() : Clock::now();
      const Network::Step& step = network_.steps_[s];
      if (dirty_[static_cast<std::size_t>(step.output)]) clear(step.output, base);
      for (std::size_t i = 0; i < step.inputs.size(); ++i) at[i] = address(step.inputs[i], base);
      at[step.inputs.size()] = address(step.output, base);
      tasks_[s]->run(at.data(), base + scratch_[s], threads);
      if (seconds != nullptr) seconds[s] = std::chrono::duration<double>(Clock::now() - begin).count();
    }
    for (std::size_t i = 0; i < writes_.size(); ++i) copy(writes_[i], address(network_.outputs_[i], base), outputs[i]);
    give(std::move(workspace));
  }

  const std::int64_t images;
  std::int64_t size = 0;  // of a workspace, in floats

 private:
  const Layout& layout(int value) const { return layouts_[static_cast<std::size_t>(value)]; }
  float* address(int value, float* base) const {
    return base + offsets_[static_cast<std::size_t>(value)] + layout(value).before;
  }
  void clear(int value, float* base) const {
    const Layout& l = layout(value);
    conv::clear_halo(address(value, base), l.planes, images, l.shape[0], l.shape[1], l.shape[2]);
  }

  // Values that convolutions read or write are planes, with the widest halo that one of their readers needs.
  void lay_out() {
    const std::size_t count = network_.shapes_.size();
    std::vector<bool> planes(count, false);
    std::vector<conv::Padding> halos(count);
    for (const Network::Step& step : network_.steps_) {
      if (!step.operation->on_planes()) continue;
      const auto in = static_cast<std::size_t>(step.inputs[0]);
      planes[in] = planes[static_cast<std::size_t>(step.output)] = true;
      const conv::Padding need = step.operation->halo();
      conv::Padding& halo = halos[in];
      halo = {std::max(halo.top, need.top), std::max(halo.left, need.left), std::max(halo.bottom, need.bottom),
              std::max(halo.right, need.right)};
    }
    for (std::size_t value = 0; value < count; ++value) {
      const Shape& shape = network_.shapes_[value];
      const bool as = planes[value] && shape.size() == 3;
      layouts_.push_back(as ? as_planes(shape, images, halos[value]) : in_order(shape, images));
    }
  }

  // Where every value lies. One that is another in a new shape lies where that does.
  void arrange() {
    const std::size_t count = network_.shapes_.size(), inputs = static_cast<std::size_t>(network_.inputs_);
    const auto steps = static_cast<std::int64_t>(tasks_.size());
    std::vector<std::size_t> root(count);
    std::vector<Block> blocks;
    for (std::size_t value = 0; value < count; ++value) {
      const std::int64_t made = value < inputs ? -1 : static_cast<std::int64_t>(value - inputs);
      const std::int64_t needed = (layouts_[value].size + kLine - 1) / kLine * kLine;
      root[value] = blocks.size();
      if (made >= 0 && tasks_[static_cast<std::size_t>(made)] == nullptr) {
        root[value] = root[static_cast<std::size_t>(network_.steps_[static_cast<std::size_t>(made)].inputs[0])];
        Block& block = blocks[root[value]];
        block.size = std::max(block.size, needed);
      } else {
        blocks.push_back({needed, made, made});
      }
    }
    for (std::size_t s = 0; s < tasks_.size(); ++s) {
      for (const int value : network_.steps_[s].inputs) {
        Block& block = blocks[root[static_cast<std::size_t>(value)]];
        block.last = std::max(block.last, static_cast<std::int64_t>(s));
      }
    }
    for (const int value : network_.outputs_) blocks[root[static_cast<std::size_t>(value)]].last = steps;
    const std::size_t values = blocks.size();
    for (std::size_t s = 0; s < tasks_.size(); ++s) {
      const std::int64_t wanted = tasks_[s] == nullptr ? 0 : tasks_[s]->scratch;
      blocks.push_back(
          {(wanted + kLine - 1) / kLine * kLine, static_cast<std::int64_t>(s), static_cast<std::int64_t>(s)});
    }
    size = std::max<std::int64_t>(1, place(blocks)) + conv::kSlack;
    for (std::size_t value = 0; value < count; ++value) {
      const bool alias = value >= inputs && tasks_[value - inputs] == nullptr;
      // (an alias begins at the first element of what it is)
      const std::size_t of = alias ? static_cast<std::size_t>(network_.steps_[value - inputs].inputs[0]) : value;
      offsets_.push_back(alias ? offsets_[of] + layouts_[of].before : blocks[root[value]].offset);
      pieces_.push_back({offsets_[value], layouts_[value].size});
    }
    for (std::size_t s = 0; s < tasks_.size(); ++s) {
      scratch_.push_back(blocks[values + s].offset);
      scratch_sizes_.push_back(blocks[values + s].size);
    }
    std::size_t most = 0;
    for (const Network::Step& step : network_.steps_) most = std::max(most, step.inputs.size());
    most_operands_ = most + 1;
  }

  // A workspace begins as zeros. A halo has to be cleared again before a value is written unless what lay in its place
  // last was of the same layout. Two runs are gone through, as the second finds what the first left.
  void find_dirty_halos() {
    struct Holder {
      std::int64_t begin, end;
      std::size_t value;
    };
    std::vector<Holder> holders;
    dirty_.assign(layouts_.size(), false);
    const auto write = [&](std::int64_t begin, std::int64_t length, std::size_t value, bool halo) {
      const Layout* mine = halo ? &layouts_[value] : nullptr;
      bool clean = false;
      std::vector<Holder> left;
      bool met = false;
      for (const Holder& holder : holders) {
        if (holder.end <= begin || begin + length <= holder.begin) {
          left.push_back(holder);
          continue;
        }
        met = true;  // what is left of it is anybody's
        if (holder.begin < begin) left.push_back({holder.begin, begin, layouts_.size()});
        if (begin + length < holder.end) left.push_back({begin + length, holder.end, layouts_.size()});
        const bool same = mine != nullptr && holder.value < layouts_.size() && holder.begin == begin &&
                          holder.end == begin + length && layouts_[holder.value].has_halo &&
                          layouts_[holder.value].shape == mine->shape &&
                          layouts_[holder.value].strides == mine->strides &&
                          layouts_[holder.value].before == mine->before;
        clean = clean || same;
      }
      if (halo && met && !clean) dirty_[value] = true;
      holders = std::move(left);
      holders.push_back({begin, begin + length, halo ? value : layouts_.size()});
    };
    const auto inputs = static_cast<std::size_t>(network_.inputs_);
    for (int pass = 0; pass < 2; ++pass) {
      for (std::size_t value = 0; value < layouts_.size(); ++value) {
        if (value >= inputs && tasks_[value - inputs] == nullptr) continue;
        if (value >= inputs && scratch_sizes_[value - inputs] > 0) {
          write(scratch_[value - inputs], scratch_sizes_[value - inputs], 0, false);
        }
        write(pieces_[value].first, pieces_[value].second, value, layouts_[value].has_halo);
      }
    }
  }

  struct Workspace {
    Memory memory;
    std::vector<float*> operands;  // of the step under way
  };

  Workspace take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_.empty()) {
        Workspace workspace = std::move(idle_.back());
        idle_.pop_back();
        return workspace;
      }
    }
    Workspace workspace;
    workspace.memory = zeroed(size);
    workspace.operands.resize(most_operands_);
    return workspace;
  }
  void give(Workspace workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(workspace));
  }

  const Network& network_;
  std::vector<Layout> layouts_;
  std::vector<std::unique_ptr<Task>> tasks_;
  std::vector<std::int64_t> offsets_, scratch_, scratch_sizes_;
  std::vector<std::pair<std::int64_t, std::int64_t>> pieces_;
  std::vector<bool> dirty_;
  std::vector<Rows<2>> reads_, writes_;
  std::size_t most_operands_ = 1;
  std::mutex mutex_;
  std::vector<Workspace> idle_;
};

Network::Network(Isa isa) : isa_(isa) {}
Network::~Network() = default;

int Network::add_input(const Shape& shape) {
  ACF_CHECK(steps_.empty(), "inputs come before the steps");
  ACF_CHECK(shape.size() < kMaxDims && elements(shape) > 0, "an input of ", shape.size(),
            " dimensions is not supported");
  shapes_.push_back(shape);
  return inputs_++;
}

int Network::add(std::unique_ptr<Operation> operation, const std::vector<int>& inputs) {
  std::vector<Shape> given;
  for (const int value : inputs) {
    ACF_CHECK(value >= 0 && static_cast<std::size_t>(value) < shapes_.size(), "there is no value ", value, " yet");
    given.push_back(shape(value));
  }
  ACF_CHECK(!given.empty(), "a step needs an input");
  Shape made = operation->infer(given);
  ACF_CHECK(made.size() < kMaxDims && elements(made) > 0, "a step makes nothing, or too many dimensions");
  shapes_.push_back(std::move(made));
  steps_.push_back({std::move(operation), inputs, static_cast<int>(shapes_.size()) - 1});
  return steps_.back().output;
}

void Network::finish(const std::vector<int>& outputs) {
  for (const int value : outputs) {
    ACF_CHECK(value >= 0 && static_cast<std::size_t>(value) < shapes_.size(), "there is no value ", value);
  }
  outputs_ = outputs;
}

std::shared_ptr<Session> Network::session(std::int64_t images) {
  ACF_CHECK(images >= 1, "the number of samples must be at least 1, got ", images);
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(sessions_.begin(), sessions_.end(),
                                  [images](const std::shared_ptr<Session>& s) { return s->images == images; });
  if (found != sessions_.end()) {
    std::rotate(sessions_.begin(), found, found + 1);
    return sessions_.front();
  }
  auto made = std::make_shared<Session>(*this, images);
  sessions_.insert(sessions_.begin(), made);
  if (sessions_.size() > kSessions) sessions_.pop_back();
  return made;
}

void Network::run(std::int64_t images, const float* const* inputs, float* const* outputs, int threads,
                  double* seconds) {
  session(images)->run(inputs, outputs, threads, seconds);
}

std::int64_t Network::workspace_bytes(std::int64_t images) {
  return session(images)->size * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace acf::engine
