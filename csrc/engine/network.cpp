#include "engine/network.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "core/parallel.h"
#include "engine/arena.h"

namespace acf::engine {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kSessions = 8;  // kept for as many numbers of samples
constexpr std::int64_t kLine = 64 / sizeof(float);

Memory zeroed(std::int64_t size) {
  const auto bytes = static_cast<std::size_t>(size) * sizeof(float);
  Memory memory = allocate(bytes);
  std::memset(memory.get(), 0, bytes);
  return memory;
}

std::int64_t whole_lines(std::int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

}  // namespace

// A network prepared for a number of samples.
class Session {
 public:
  Session(Network& network, std::int64_t count) : images(count), network_(network) {
    const std::lock_guard<std::mutex> lock(network.shared_->preparing);
    const Machine machine = {network.isa_, network.shared_->weights};
    lay_out(machine);
    for (std::size_t s = 0; s < network.steps_.size(); ++s) {
      const Network::Step& step = network.steps_[s];
      std::vector<const Layout*> inputs;
      for (const int value : step.inputs) inputs.push_back(&layout(value));
      const Layout& output = layout(step.output);
      // One plane, padded above and below alone, is in order too, but begins elsewhere.
      const bool nothing = step.operation->keeps_order() && inputs[0]->in_order() && output.in_order() &&
                           inputs[0]->before == output.before;
      tasks_.push_back(nothing ? nullptr : step.operation->prepare(machine, inputs, output));
    }
    arrange();
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
    auto* base = static_cast<float*>(workspace.memory.get());
    std::vector<float*>& at = workspace.operands;
    for (std::size_t i = 0; i < reads_.size(); ++i) {
      const int value = static_cast<int>(i);
      if (dirty_[i]) clear(value, base);
      copy(reads_[i], inputs[i], address(value, base));
    }
    for (std::size_t s = 0; s < tasks_.size(); ++s) {
      if (tasks_[s] == nullptr) continue;
      const auto begin = seconds == nullptr ? Clock::time_point() : Clock::now();
      const Network::Step& step = network_.steps_[s];
      if (dirty_[static_cast<std::size_t>(step.output)]) clear(step.output, base);
      for (std::size_t i = 0; i < step.inputs.size(); ++i) at[i] = address(step.inputs[i], base);
      at[step.inputs.size()] = address(step.output, base);
      tasks_[s]->run(at.data(), base + scratch_[s], threads);
      if (seconds != nullptr) seconds[s] += std::chrono::duration<double>(Clock::now() - begin).count();
    }
    for (std::size_t i = 0; i < writes_.size(); ++i) copy(writes_[i], address(network_.outputs_[i], base), outputs[i]);
    give(std::move(workspace));
  }

  bool is_bytes(int value) const { return layout(value).bytes.has_value(); }
  std::vector<std::optional<Way>> ways() const {
    std::vector<std::optional<Way>> found;
    for (const auto& task : tasks_) found.push_back(task == nullptr ? std::nullopt : task->way());
    return found;
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
    if (l.bytes) {
      narrow::fill_halo(reinterpret_cast<unsigned char*>(address(value, base)), l.bytes->layout, images, l.shape[1],
                        l.shape[2], l.bytes->numbers);
      return;
    }
    conv::clear_halo(address(value, base), l.planes, images, l.shape[0], l.shape[1], l.shape[2]);
  }

  // Values that convolutions read or write are planes, with the widest halo that one of their readers needs.
  void lay_out(const Machine& machine) {
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
    const std::vector<const narrow::Quantization*> numbers = choose_bytes(machine);
    for (std::size_t value = 0; value < count; ++value) {
      const Shape& shape = network_.shapes_[value];
      if (numbers[value] != nullptr) {
        layouts_.push_back(as_bytes(shape, images, halos[value], *numbers[value]));
        continue;
      }
      const bool as = planes[value] && shape.size() == 3;
      layouts_.push_back(as ? as_planes(shape, images, halos[value]) : in_order(shape, images));
    }
  }

  const Shape& input_shape(const Network::Step& step) const { return network_.shape(step.inputs[0]); }

  // Which values are bytes, and of what numbers: those that are made as bytes, if all that read them want the same.
  std::vector<const narrow::Quantization*> choose_bytes(const Machine& machine) const {
    std::vector<const narrow::Quantization*> wanted(network_.shapes_.size(), nullptr), made = wanted;
    std::vector<bool> read(wanted.size(), false);
    for (const int value : network_.outputs_) read[static_cast<std::size_t>(value)] = true;
    for (std::size_t s = network_.steps_.size(); s-- > 0;) {
      const Network::Step& step = network_.steps_[s];
      for (std::size_t i = 0; i < step.inputs.size(); ++i) {
        const auto value = static_cast<std::size_t>(step.inputs[i]);
        const narrow::Quantization* numbers = step.operation->passes_bytes()
                                                  ? wanted[static_cast<std::size_t>(step.output)]
                                                  : step.operation->reads_bytes(machine, input_shape(step), i);
        if (!read[value]) {
          wanted[value] = numbers;
        } else if (wanted[value] != nullptr && (numbers == nullptr || numbers->scale != wanted[value]->scale ||
                                                numbers->zero != wanted[value]->zero)) {
          wanted[value] = nullptr;
        }
        read[value] = true;
      }
    }
    for (const Network::Step& step : network_.steps_) {
      const auto in = static_cast<std::size_t>(step.inputs[0]), out = static_cast<std::size_t>(step.output);
      const bool makes = step.operation->passes_bytes()
                             ? made[in] != nullptr
                             : step.operation->makes_bytes(machine, input_shape(step), step.inputs.size());
      if (makes) made[out] = wanted[out];
    }
    drop_slower(made, machine);
    while (drop_single(made)) {
    }
    return made;
  }

  // Takes bytes back by which some step is slower, and none is quicker.
  void drop_slower(std::vector<const narrow::Quantization*>& made, const Machine& machine) const {
    std::vector<bool> quicker(made.size(), false), slower = quicker;
    for (const Network::Step& step : network_.steps_) {
      const Operation::Gain gain = step.operation->gain_of_bytes(machine, input_shape(step));
      if (gain == Operation::Gain::none) continue;
      std::vector<bool>& found = gain == Operation::Gain::quicker ? quicker : slower;
      found[static_cast<std::size_t>(step.output)] = true;
      for (const int input : step.inputs) found[static_cast<std::size_t>(input)] = true;
    }
    for (std::size_t value = 0; value < made.size(); ++value) {
      if (slower[value] && !quicker[value]) made[value] = nullptr;
    }
    // What a step passes on is bytes on both sides or on none.
    for (bool changed = true; changed;) {
      changed = false;
      for (const Network::Step& step : network_.steps_) {
        const auto in = static_cast<std::size_t>(step.inputs[0]), out = static_cast<std::size_t>(step.output);
        if (!step.operation->passes_bytes() || (made[in] != nullptr) == (made[out] != nullptr)) continue;
        made[in] = made[out] = nullptr;
        changed = true;
      }
    }
  }

  // Takes bytes back that only make steps between planes read or write bytes on one side: between layers that are
  // float32, for one. Such steps are quicker on planes. Returns whether there were any.
  bool drop_single(std::vector<const narrow::Quantization*>& made) const {
    std::vector<bool> single(made.size(), true);
    for (const Network::Step& step : network_.steps_) {
      const auto in = static_cast<std::size_t>(step.inputs[0]), out = static_cast<std::size_t>(step.output);
      const bool both = made[in] != nullptr && made[out] != nullptr;
      if (both) single[in] = single[out] = false;
    }
    bool dropped = false;
    for (std::size_t value = 0; value < made.size(); ++value) {
      if (made[value] == nullptr || !single[value]) continue;
      made[value] = nullptr;
      dropped = true;
    }
    return dropped;
  }

  bool is_alias(std::size_t value) const {
    const auto inputs = static_cast<std::size_t>(network_.inputs_);
    return value >= inputs && tasks_[value - inputs] == nullptr;
  }
  std::size_t step_of(std::size_t value) const { return value - static_cast<std::size_t>(network_.inputs_); }
  std::size_t source(std::size_t value) const {
    return static_cast<std::size_t>(network_.steps_[step_of(value)].inputs[0]);
  }

  // Where every value and every task's scratch lies. A value that is another in a new shape lies where that does.
  void arrange() {
    const std::size_t count = layouts_.size();
    const auto inputs = static_cast<std::int64_t>(network_.inputs_), steps = static_cast<std::int64_t>(tasks_.size());
    std::vector<std::size_t> block_of;
    std::vector<Block> blocks;
    for (std::size_t value = 0; value < count; ++value) {
      const std::int64_t needed = whole_lines(layouts_[value].size);
      if (is_alias(value)) {
        block_of.push_back(block_of[source(value)]);
        blocks[block_of[value]].size = std::max(blocks[block_of[value]].size, needed);
      } else {
        const std::int64_t made = std::max<std::int64_t>(-1, static_cast<std::int64_t>(value) - inputs);
        block_of.push_back(blocks.size());
        blocks.push_back({needed, made, made});
      }
    }
    std::size_t most = 0;
    for (std::size_t s = 0; s < tasks_.size(); ++s) {
      const std::vector<int>& read = network_.steps_[s].inputs;
      most = std::max(most, read.size());
      for (const int value : read) {
        std::int64_t& last = blocks[block_of[static_cast<std::size_t>(value)]].last;
        last = std::max(last, static_cast<std::int64_t>(s));
      }
    }
    most_operands_ = most + 1;
    for (const int value : network_.outputs_) blocks[block_of[static_cast<std::size_t>(value)]].last = steps;
    const std::size_t values = blocks.size();
    for (std::size_t s = 0; s < tasks_.size(); ++s) {
      const auto at = static_cast<std::int64_t>(s);
      blocks.push_back({tasks_[s] == nullptr ? 0 : whole_lines(tasks_[s]->scratch), at, at});
    }
    size = place(blocks) + conv::kSlack;
    for (const std::size_t block : block_of) offsets_.push_back(blocks[block].offset);
    for (std::size_t s = 0; s < tasks_.size(); ++s) scratch_.push_back(blocks[values + s].offset);

    std::vector<Write> writes;
    std::vector<std::size_t> write_of(count);
    for (std::size_t value = 0; value < count; ++value) {
      if (is_alias(value)) continue;
      if (value >= static_cast<std::size_t>(inputs)) {
        const Block& scratch = blocks[values + step_of(value)];
        if (scratch.size > 0) writes.push_back({scratch.offset, scratch.offset + scratch.size, -1});
      }
      write_of[value] = writes.size();
      writes.push_back({offsets_[value], offsets_[value] + layouts_[value].size, halo_number(value)});
    }
    const std::vector<bool> dirty = dirty_halos(writes);
    for (std::size_t value = 0; value < count; ++value) {
      // A halo of bytes is seldom zeros.
      const bool fills = layouts_[value].bytes && layouts_[value].has_halo;
      dirty_.push_back(fills || (!is_alias(value) && dirty[write_of[value]]));
    }
  }

  // The first value with the same halo around the same planes, or -1 for none.
  int halo_number(std::size_t value) const {
    const Layout& mine = layouts_[value];
    if (!mine.has_halo || mine.bytes) return -1;
    const auto same = std::find_if(layouts_.begin(), layouts_.end(), [&mine](const Layout& other) {
      return other.has_halo && !other.bytes && other.shape == mine.shape && other.strides == mine.strides &&
             other.before == mine.before && other.size == mine.size;
    });
    return static_cast<int>(same - layouts_.begin());
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
  std::vector<std::int64_t> offsets_, scratch_;
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

Network::Stage Network::stage(std::size_t begin, std::size_t end) const {
  ACF_CHECK(begin < end && end <= steps_.size(), "a stage has steps of 0 to ", steps_.size(), ", got ", begin, " to ",
            end);
  const int first = inputs_ + static_cast<int>(begin), last = inputs_ + static_cast<int>(end);
  std::vector<bool> read(shapes_.size(), false), needed(shapes_.size(), false);
  for (std::size_t s = begin; s < steps_.size(); ++s) {
    for (const int value : steps_[s].inputs) (s < end ? read : needed)[static_cast<std::size_t>(value)] = true;
  }
  for (const int value : outputs_) {
    ACF_CHECK(value >= inputs_, "a network that returns an input has no stages");
    needed[static_cast<std::size_t>(value)] = true;
  }
  Stage made = {std::make_unique<Network>(isa_), {}, {}};
  Network& network = *made.network;
  network.shared_ = shared_;
  std::vector<int> numbers(shapes_.size(), -1);
  for (int value = 0; value < first; ++value) {
    if (!read[static_cast<std::size_t>(value)]) continue;
    numbers[static_cast<std::size_t>(value)] = network.add_input(shape(value));
    made.inputs.push_back(value);
  }
  for (std::size_t s = begin; s < end; ++s) {
    Step step = {steps_[s].operation, {}, static_cast<int>(network.shapes_.size())};
    for (const int value : steps_[s].inputs) step.inputs.push_back(numbers[static_cast<std::size_t>(value)]);
    numbers[static_cast<std::size_t>(steps_[s].output)] = step.output;
    network.shapes_.push_back(shape(steps_[s].output));
    network.steps_.push_back(std::move(step));
  }
  for (int value = first; value < last; ++value) {
    if (!needed[static_cast<std::size_t>(value)]) continue;
    network.outputs_.push_back(numbers[static_cast<std::size_t>(value)]);
    made.outputs.push_back(value);
  }
  return made;
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

void Network::run(std::int64_t images, std::int64_t part, const float* const* inputs, float* const* outputs,
                  int threads, double* seconds) {
  ACF_CHECK(images >= 1 && part >= 1, "the number of samples must be at least 1, got ", images, " in parts of ", part);
  if (seconds != nullptr) std::fill_n(seconds, steps_.size(), 0.0);
  if (images <= part) return session(images)->run(inputs, outputs, threads, seconds);

  const std::int64_t parts = (images + part - 1) / part, size = (images + parts - 1) / parts,
                     count = (images + size - 1) / size;
  const auto run_part = [&](std::int64_t p, int threads_of_part) {
    std::vector<const float*> from(inputs, inputs + inputs_);
    std::vector<float*> to(outputs, outputs + outputs_.size());
    for (std::size_t i = 0; i < from.size(); ++i) from[i] += p * size * elements(shape(static_cast<int>(i)));
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += p * size * elements(shape(outputs_[i]));
    session(std::min(size, images - p * size))->run(from.data(), to.data(), threads_of_part, seconds);
  };
  // Threads that have parts of their own neither wait for each other nor read what another has written.
  const std::int64_t apart = seconds == nullptr ? count / threads * threads : 0;
  parallel_for(apart, threads, [&](std::int64_t p) { run_part(p, 1); });
  for (std::int64_t p = apart; p < count; ++p) run_part(p, threads);
}

void Network::prefer(std::size_t step, std::int64_t images, std::optional<Way> way) {
  ACF_CHECK(step < steps_.size(), "steps are numbered from 0 to ", steps_.size(), ", got ", step);
  ACF_CHECK(images >= 0, "the number of samples must be at least 0, got ", images);
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::lock_guard<std::mutex> preparing(shared_->preparing);
  steps_[step].operation->prefer(images, way);
  sessions_.clear();
}

std::vector<std::optional<Way>> Network::ways(std::int64_t images) { return session(images)->ways(); }

bool Network::is_bytes(int value) {
  ACF_CHECK(value >= 0 && static_cast<std::size_t>(value) < shapes_.size(), "there is no value ", value);
  return session(1)->is_bytes(value);
}

std::int64_t Network::workspace_bytes(std::int64_t images) {
  return session(images)->size * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace acf::engine
