#include "core/parallel.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "core/check.h"

namespace acf {
namespace {

// Waking a parked thread costs the caller a system call and the thread some ten microseconds. A network's layers follow
// each other faster than that, so a thread that has run out of tasks looks out for the next call this long before it
// parks.
constexpr std::chrono::microseconds kSpin{100};
constexpr int kMaxThreads = 1024;
constexpr int kMaxShares = 64;  // more threads take from those of others

// True in every thread of the pool, and in a caller while its body runs.
thread_local bool inside_parallel_for = false;
thread_local int number_of_thread = 0;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns whether `ready` came true within the time.
template <class Ready>
bool spin_until(Ready ready, std::chrono::microseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// The threads, and the one job they may be working on.
//
// `state_` counts, in one word, the places for helpers still open in the current job and the helpers inside it. The
// caller writes the job while both are zero, opens places, works itself, closes the places and waits for the helpers
// inside: a helper that was too slow to wake up finds no place and costs nothing.
class Pool {
 public:
  // False when another caller has the pool.
  bool try_run(std::int64_t tasks, int threads, TaskRef body) {
    const std::unique_lock<std::mutex> only_caller(caller_, std::try_to_lock);
    if (!only_caller.owns_lock()) return false;
    const int helpers = std::min(grow(threads - 1), threads - 1);
    spin_.store(helpers < processors_,
                std::memory_order_relaxed);  // a spinning thread would keep a working one waiting

    body_ = &body;
    tasks_ = tasks;
    shares_ = std::min(threads, kMaxShares);
    error_ = nullptr;
    failed_.store(false, std::memory_order_relaxed);
    for (int i = 0; i < shares_; ++i) share_[i].next.store(share_begin(i), std::memory_order_relaxed);
    open(static_cast<std::uint32_t>(helpers));
    work(0);
    close();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return true;
  }

 private:
  static constexpr std::uint32_t kPlace = 1u << 16;  // state_ = kCallerWaits? + places * kPlace + helpers inside
  static constexpr std::uint32_t kCallerWaits = 1u << 31;
  static constexpr std::uint32_t kPlaces = kCallerWaits - kPlace;
  static constexpr std::uint32_t kInside = kPlace - 1;

  // Starts threads until there are `wanted`; returns how many there are. Fewer than wanted is slower, not wrong.
  int grow(int wanted) {
    if (started_ >= wanted) return started_;
    // Signals are for the threads of the program, not for ours.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < wanted; ++started_) {
        std::thread helper(&Pool::help, this, started_ + 1);
        helpers_.push_back(helper.native_handle());
        helper.detach();
      }
      kept_off_ = -1;
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started_;
  }

  void open(std::uint32_t places) {
    state_.store(places * kPlace);
    // Either this sees a thread that has parked, or that thread sees the places: both orders are sequentially
    // consistent.
    if (parked_.load() == 0) return;
    keep_off_the_callers_processor();
    { const std::lock_guard<std::mutex> lock(mutex_); }
    if (places >= parked_.load()) {
      wake_.notify_all();
    } else {
      for (std::uint32_t i = 0; i < places; ++i) wake_.notify_one();
    }
  }

  // A thread that is woken would often be put where the caller runs, and wait there until the system balances its
  // processors some milliseconds later, while the caller waits for it.
  void keep_off_the_callers_processor() {
#if defined(__linux__)
    const int processor = sched_getcpu();
    if (processor < 0 || processor == kept_off_) return;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
    CPU_CLR(static_cast<unsigned>(processor), &allowed);
    for (const std::thread::native_handle_type helper : helpers_) {
      pthread_setaffinity_np(helper, sizeof(allowed), &allowed);
    }
    kept_off_ = processor;
#endif
  }

  void close() {
    state_.fetch_and(~kPlaces);
    const auto nobody_inside = [this] { return (state_.load(std::memory_order_acquire) & kInside) == 0; };
    if (nobody_inside()) return;
    if (spin_.load(std::memory_order_relaxed) && spin_until(nobody_inside, kSpin)) return;
    state_.fetch_or(kCallerWaits);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, nobody_inside);
  }

  bool enter() {
    std::uint32_t state = state_.load(std::memory_order_relaxed);
    while ((state & kPlaces) != 0) {
      if (state_.compare_exchange_weak(state, state - kPlace + 1, std::memory_order_acquire,
                                       std::memory_order_relaxed)) {
        return true;
      }
    }
    return false;
  }

  void leave() {
    const std::uint32_t before = state_.fetch_sub(1);
    if ((before & kInside) == 1 && (before & kCallerWaits) != 0) {
      { const std::lock_guard<std::mutex> lock(mutex_); }
      done_.notify_one();
    }
  }

  std::int64_t share_begin(int share) const { return tasks_ * share / shares_; }

  // The tasks of a thread's own share, then what is left of those of the others.
  void work(int own) {
    inside_parallel_for = true;
    for (int i = 0; i < shares_; ++i) {
      const int share = (own + i) % shares_;
      const std::int64_t end = share_begin(share + 1);
      for (std::int64_t task; (task = share_[share].next.fetch_add(1, std::memory_order_relaxed)) < end;) {
        if (failed_.load(std::memory_order_relaxed)) break;
        try {
          (*body_)(task);
        } catch (...) {
          if (!failed_.exchange(true)) error_ = std::current_exception();
        }
      }
    }
    inside_parallel_for = false;
  }

  [[noreturn]] void help(int number) {
    number_of_thread = number;
    const auto work_is_open = [this] { return (state_.load() & kPlaces) != 0; };
    for (;;) {
      while (enter()) {
        work(number);
        leave();
      }
      if (spin_.load(std::memory_order_relaxed) && spin_until(work_is_open, kSpin)) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      parked_.fetch_add(1);
      wake_.wait(lock, work_is_open);
      parked_.fetch_sub(1);
    }
  }

  std::mutex caller_;
  int started_ = 0;
  std::vector<std::thread::native_handle_type> helpers_;
  int kept_off_ = -1;  // the processor
  const int processors_ = hardware_threads();
  std::atomic<bool> spin_{false};

  const TaskRef* body_ = nullptr;
  std::int64_t tasks_ = 0;
  int shares_ = 1;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  struct alignas(64) Share {
    std::atomic<std::int64_t> next{0};
  };
  Share share_[kMaxShares];

  alignas(64) std::atomic<std::uint32_t> state_{0};
  std::atomic<std::uint32_t> parked_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
};

// Never deleted: its threads may still be parked in it when the process ends, and the threads of a forked child's
// inherited pool do not exist, so the child forgets that pool and makes another.
std::atomic<Pool*> the_pool{nullptr};
const int forget_pool_after_fork = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });

Pool& pool() {
  Pool* existing = the_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
  auto fresh = std::make_unique<Pool>();
  if (the_pool.compare_exchange_strong(existing, fresh.get(), std::memory_order_acq_rel)) return *fresh.release();
  return *existing;
}

}  // namespace

void parallel_for(std::int64_t tasks, int threads, TaskRef body) {
  ACF_CHECK(threads >= 1, "threads must be at least 1, got ", threads);
  ACF_CHECK(tasks >= 0, "tasks must be at least 0, got ", tasks);
  threads = static_cast<int>(std::min<std::int64_t>({threads, tasks, kMaxThreads}));
  if (threads > 1 && !inside_parallel_for && pool().try_run(tasks, threads, body)) return;
  for (std::int64_t task = 0; task < tasks; ++task) body(task);
}

int thread_number() { return number_of_thread; }

int Slots::most() {
  static const int processors = std::min(kMost, hardware_threads());
  return processors;
}

int hardware_threads() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace acf
