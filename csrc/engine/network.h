// A network of operations, run without Python.
//
// What depends on the number of samples (the layout of every value, the plans of the convolutions, which memory is
// whose) is worked out when that number comes for the first time and kept. Runs take a workspace from a pool, so
// several threads can run the same network at once; after the first run of each nothing is allocated.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/isa.h"
#include "core/memory.h"
#include "engine/operation.h"

namespace acf::engine {

class Session;

class Network {
 public:
  explicit Network(Isa isa);
  ~Network();
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  // Each returns the number of the value, counted from 0. Throw std::invalid_argument for shapes that do not fit.
  int add_input(const Shape& shape);
  int add(std::unique_ptr<Operation> operation, const std::vector<int>& inputs);
  void finish(const std::vector<int>& outputs);

  // Steps [begin, end) as a network of their own, which shares the operations and their packed weights. Its inputs are
  // the values from before that they read, its outputs those that are needed after: `inputs` and `outputs` are their
  // numbers here. So a batch can be computed in small parts where values are large, and in large ones where weights
  // are. Throws std::invalid_argument for no steps, and for an output of this network that is an input.
  struct Stage {
    std::unique_ptr<Network> network;
    std::vector<int> inputs, outputs;
  };
  Stage stage(std::size_t begin, std::size_t end) const;

  const Shape& shape(int value) const { return shapes_[static_cast<std::size_t>(value)]; }
  const std::vector<int>& outputs() const { return outputs_; }
  int inputs() const { return inputs_; }

  // inputs and outputs: arrays of `images` samples, in order, of which at most `part` are computed at once: as many as
  // lead to parts of one size, but for the last. Parts are given to threads whole while there is one for each; these
  // share the others. seconds, when not null: of every step, with all threads at each.
  void run(std::int64_t images, std::int64_t part, const float* const* inputs, float* const* outputs, int threads,
           double* seconds = nullptr);
  std::size_t steps() const { return steps_.size(); }

  // Of the values of so many samples at once, halos included.
  std::int64_t workspace_bytes(std::int64_t images);

  // In what way a step of layers is to be computed for so many samples at once, or 0 for any other number, where it
  // can; of networks and stages that are prepared from now on. And in what ways the steps are.
  void prefer(std::size_t step, std::int64_t images, std::optional<Way> way);
  std::vector<std::optional<Way>> ways(std::int64_t images);

  // Whether a value has 8 bits between the steps, not 32.
  bool is_bytes(int value);

 private:
  friend class Session;
  struct Step {
    std::shared_ptr<Operation> operation;
    std::vector<int> inputs;
    int output;
  };
  // What a network has in common with its stages: operations prepare themselves one at a time.
  struct Shared {
    std::mutex preparing;
    Pool weights;
  };

  std::shared_ptr<Session> session(std::int64_t images);

  Isa isa_;
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  int inputs_ = 0;
  std::vector<Shape> shapes_;
  std::vector<Step> steps_;
  std::vector<int> outputs_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Session>> sessions_;  // the one used last in front
};

}  // namespace acf::engine
