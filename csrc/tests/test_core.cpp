#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "tests/testing.h"

namespace acf {
namespace {

// Each task once, whatever the number of threads: fewer tasks than threads, more threads than cores, none at all.
ACF_TEST(parallel_for_runs_each_task_once) {
  for (int threads : {1, 2, 3, 16}) {
    for (std::int64_t tasks : {0, 1, 2, 3, 7, 1000}) {
      std::vector<std::atomic<int>> counts(static_cast<std::size_t>(tasks));
      parallel_for(tasks, threads, [&](std::int64_t task) { ++counts[static_cast<std::size_t>(task)]; });
      for (const std::atomic<int>& count : counts) EXPECT_EQ(count.load(), 1);
    }
  }
}

}  // namespace
}  // namespace acf
