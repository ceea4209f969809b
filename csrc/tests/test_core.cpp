#include <stdlib.h>  // setenv
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/check.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "tests/testing.h"

namespace acf {
namespace {

// Sets ACF_FORCE_ISA for one test; afterwards the environment and the choice are as before.
class ForcedIsa {
 public:
  explicit ForcedIsa(const std::string& name) {
    if (const char* value = std::getenv("ACF_FORCE_ISA")) before_ = value;
    setenv("ACF_FORCE_ISA", name.c_str(), 1);
  }
  ~ForcedIsa() {
    setenv("ACF_FORCE_ISA", before_.c_str(), 1);
    reload_isa();
  }
  ForcedIsa(const ForcedIsa&) = delete;
  ForcedIsa& operator=(const ForcedIsa&) = delete;

 private:
  std::string before_;
};

// Which tasks ran how often. Each counter belongs to one task, as in a kernel.
std::vector<int> task_counts(std::int64_t tasks, int threads) {
  std::vector<int> counts(static_cast<std::size_t>(tasks));
  parallel_for(tasks, threads, [&](std::int64_t task) { ++counts[static_cast<std::size_t>(task)]; });
  return counts;
}

bool all_ones(const std::vector<int>& counts) {
  return std::all_of(counts.begin(), counts.end(), [](int count) { return count == 1; });
}

// ---- checks

ACF_TEST(check_throws_one_sentence_with_the_values) {
  const int keep = 9, groups = 4;
  ACF_CHECK(true, "never built");
  EXPECT_THROWS(ACF_CHECK(keep <= groups, "keep must be at most ", groups, ", got ", keep), std::invalid_argument,
                "keep must be at most 4, got 9");
  EXPECT_THROWS(ACF_CHECK_TYPE(keep < 2, "rank ", keep), TypeError, "rank 9");
}

ACF_TEST(check_evaluates_the_parts_only_on_failure) {
  int evaluated = 0;
  ACF_CHECK(evaluated == 0, ++evaluated);
  EXPECT_EQ(evaluated, 0);
}

// ---- ISA

ACF_TEST(supported_isas_are_compiled_and_begin_with_generic) {
  const std::vector<Isa>& compiled = compiled_isas();
  EXPECT(supported_isas().front() == Isa::generic);
  for (Isa isa : supported_isas()) EXPECT(std::find(compiled.begin(), compiled.end(), isa) != compiled.end());
}

ACF_TEST(forced_isa_is_the_active_one) {
  for (Isa isa : supported_isas()) {
    const ForcedIsa forced{std::string(isa_name(isa))};
    EXPECT(reload_isa() == isa);
    EXPECT(active_isa() == isa);
  }
}

ACF_TEST(only_avx512_may_be_of_half_speed) {
  for (Isa isa : supported_isas()) {
    const int most = registers_per_cycle(isa);
    EXPECT(isa == Isa::avx512 ? most == 1 || most == 2 : most == 2);
  }
}

ACF_TEST(empty_force_means_the_fastest) {
  const ForcedIsa forced{""};
  EXPECT(reload_isa() == supported_isas().back());
}

ACF_TEST(wrong_force_throws_until_it_is_right) {
  {
    const ForcedIsa forced{"sse9"};
    EXPECT_THROWS(reload_isa(), std::invalid_argument, "ACF_FORCE_ISA must be one of generic");
    EXPECT_THROWS(active_isa(), std::invalid_argument, "got 'sse9'");
  }
  EXPECT(active_isa() == reload_isa());
}

ACF_TEST(isa_of_another_architecture_is_refused) {
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::neon}) {
    const std::vector<Isa>& supported = supported_isas();
    if (std::find(supported.begin(), supported.end(), isa) != supported.end()) continue;
    const ForcedIsa forced{std::string(isa_name(isa))};
    EXPECT_THROWS(reload_isa(), std::invalid_argument, "got '" + std::string(isa_name(isa)) + "'");
  }
}

// ---- parallel_for

// Fewer tasks than threads, more threads than processors, no tasks at all.
ACF_TEST(each_task_runs_once) {
  for (int threads : {1, 2, 3, 16}) {
    for (std::int64_t tasks : {0, 1, 2, 3, 7, 1000}) EXPECT(all_ones(task_counts(tasks, threads)));
  }
}

ACF_TEST(huge_thread_counts_are_harmless) { EXPECT(all_ones(task_counts(5, std::numeric_limits<int>::max()))); }

ACF_TEST(many_short_calls) {
  std::int64_t sum = 0;
  for (int call = 0; call < 5000; ++call) {
    const std::vector<int> counts = task_counts(call % 5, 1 + call % 3);
    sum += std::accumulate(counts.begin(), counts.end(), 0);
  }
  EXPECT_EQ(sum, 5000 / 5 * (0 + 1 + 2 + 3 + 4));
}

// Calls far enough apart for the helpers to park, so that each has to wake them.
ACF_TEST(calls_after_a_pause) {
  for (int call = 0; call < 50; ++call) {
    std::this_thread::sleep_for(std::chrono::microseconds(500));
    EXPECT(all_ones(task_counts(8, 2)));
  }
}

// Tasks that wait for each other can only end when they run at the same time.
ACF_TEST(tasks_run_at_the_same_time) {
  constexpr int kThreads = 4;
  std::atomic<int> arrived{0};
  parallel_for(kThreads, kThreads, [&](std::int64_t) {
    ++arrived;
    while (arrived.load() < kThreads) std::this_thread::yield();
  });
  EXPECT_EQ(arrived.load(), kThreads);
}

ACF_TEST(at_most_the_given_threads_work) {
  task_counts(16, 8);  // more helpers exist than the next call may use
  std::atomic<int> working{0}, most{0};
  parallel_for(64, 3, [&](std::int64_t) {
    const int now = ++working;
    for (int seen = most.load(); seen < now && !most.compare_exchange_weak(seen, now);) {
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    --working;
  });
  EXPECT(most.load() <= 3);
}

ACF_TEST(the_caller_waits_for_long_tasks) {
  std::atomic<int> done{0};
  parallel_for(2, 2, [&](std::int64_t task) {
    std::this_thread::sleep_for(std::chrono::milliseconds(task == 0 ? 1 : 20));
    ++done;
  });
  EXPECT_EQ(done.load(), 2);
}

ACF_TEST(the_first_exception_reaches_the_caller) {
  for (int threads : {1, 2, 5}) {
    for (int call = 0; call < 200; ++call) {
      EXPECT_THROWS(parallel_for(100, threads,
                                 [](std::int64_t task) {
                                   if (task % 7 == 3) throw std::runtime_error("task failed");
                                 }),
                    std::runtime_error, "task failed");
    }
    EXPECT(all_ones(task_counts(100, threads)));  // and leaves nothing behind
  }
}

ACF_TEST(an_exception_skips_the_tasks_not_begun) {
  std::atomic<int> ran{0};
  const auto body = [&](std::int64_t) {
    ++ran;
    throw std::runtime_error("at once");
  };
  EXPECT_THROWS(parallel_for(1000, 2, body), std::runtime_error, "at once");
  EXPECT(ran.load() <= 2);
}

ACF_TEST(nested_calls_run_inline) {
  std::vector<std::vector<int>> counts(6);
  std::atomic<int> elsewhere{0};
  parallel_for(6, 3, [&](std::int64_t outer) {
    const std::thread::id here = std::this_thread::get_id();
    std::vector<int>& inner = counts[static_cast<std::size_t>(outer)];
    inner.assign(10, 0);
    parallel_for(10, 3, [&](std::int64_t task) {
      ++inner[static_cast<std::size_t>(task)];
      if (std::this_thread::get_id() != here) ++elsewhere;
    });
  });
  for (const std::vector<int>& inner : counts) EXPECT(all_ones(inner));
  EXPECT_EQ(elsewhere.load(), 0);
}

ACF_TEST(several_callers_at_once) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int call = 0; call < 500; ++call) {
        if (!all_ones(task_counts(9, 3))) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

ACF_TEST(a_forked_child_has_threads_of_its_own) {
  task_counts(8, 3);
  const pid_t child = fork();
  if (child == 0) {
    // As above: these tasks end only if the child really has three threads.
    std::atomic<int> arrived{0};
    alarm(20);
    parallel_for(3, 3, [&](std::int64_t) {
      ++arrived;
      while (arrived.load() < 3) std::this_thread::yield();
    });
    _exit(arrived.load() == 3 && all_ones(task_counts(100, 3)) ? 0 : 1);
  }
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT(all_ones(task_counts(100, 3)));
}

ACF_TEST(impossible_counts_are_refused) {
  const auto body = [](std::int64_t) {};
  EXPECT_THROWS(parallel_for(1, 0, body), std::invalid_argument, "threads must be at least 1, got 0");
  EXPECT_THROWS(parallel_for(1, -2, body), std::invalid_argument, "got -2");
  EXPECT_THROWS(parallel_for(-1, 1, body), std::invalid_argument, "tasks must be at least 0, got -1");
}

ACF_TEST(hardware_threads_is_positive) { EXPECT(hardware_threads() >= 1); }

}  // namespace
}  // namespace acf
