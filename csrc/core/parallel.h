// One way to use several threads, for all kernels. No OpenMP: torch brings its own runtime, and two in one process
// fight.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace acf {

// A callable void(std::int64_t) that is referred to, not owned: it must outlive the call it is passed to.
class TaskRef {
 public:
  template <class Body, class = std::enable_if_t<!std::is_same_v<std::decay_t<Body>, TaskRef>>>
  TaskRef(const Body& body)  // NOLINT(google-explicit-constructor): lambdas are passed in place
      : body_(std::addressof(body)),
        call_([](const void* object, std::int64_t task) { (*static_cast<const Body*>(object))(task); }) {}

  void operator()(std::int64_t task) const { call_(body_, task); }

 private:
  const void* body_;
  void (*call_)(const void*, std::int64_t);
};

// Calls body(task) once for each task in [0, tasks) on at most `threads` threads, of which the caller is one, and
// returns when all are done. Every thread begins with a stretch of neighbouring tasks of its own, the same one from
// call to call, so that it finds what it has written in its cache; a thread that is done takes tasks of the others. So
// which thread runs a task, and in what order, is open: a body writes only what belongs to its task, and then results
// do not depend on the number of threads.
//
// The first exception of a body is rethrown to the caller, and tasks not yet begun are skipped. A call from inside a
// body, or while another caller has the threads, runs its tasks one after the other. Throws std::invalid_argument for
// threads < 1 or tasks < 0. The other threads stay for the next call; after a fork the child starts its own.
void parallel_for(std::int64_t tasks, int threads, TaskRef body);

// 0 for the caller of parallel_for, other numbers for the other threads, the same from call to call.
int thread_number();

// Numbers below `count` for tasks under way, so that each has memory of its own: no two hold the same one. For at most
// `count` threads; each prefers the number that it had before, so that this memory stays in its cache.
class Slots {
 public:
  static constexpr int kMost = 64;

  explicit Slots(int count) : count_(count < kMost ? count : kMost) {}
  int count() const { return count_; }

  // How many to have memory for: the same for the life of the process, unlike the processors a thread may run on.
  static int most();

  template <class Body>
  void with(const Body& body) {  // body(number)
    int slot = thread_number() % count_;
    while (taken_[slot].exchange(true, std::memory_order_acquire)) slot = (slot + 1) % count_;
    body(slot);
    taken_[slot].store(false, std::memory_order_release);
  }

 private:
  int count_;
  std::atomic<bool> taken_[kMost] = {};
};

// The processors this process may run on, at least 1.
int hardware_threads();

}  // namespace acf
