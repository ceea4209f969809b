#include "core/memory.h"

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace acf {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;  // of x86-64, and of AArch64 with small ones of 4 KiB

std::size_t whole(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

void FreeMemory::operator()(void* memory) const { ::operator delete (memory, std::align_val_t{alignment}); }

Memory allocate(std::size_t bytes) {
  const bool large = bytes >= kLargePage;
  const std::size_t alignment = large ? kLargePage : kCacheLine;
  Memory memory(::operator new (bytes, std::align_val_t{alignment}), FreeMemory{alignment});
#ifdef __linux__
  // Only advice: what the system makes of it changes nothing but the speed.
  if (large) static_cast<void>(madvise(memory.get(), bytes, MADV_HUGEPAGE));
#endif
  return memory;
}

void* Pool::take(std::size_t bytes) {
  bytes = whole(bytes, kCacheLine);
  if (bytes > left_) {
    const std::size_t size = whole(bytes, kLargePage);
    chunks_.push_back(allocate(size));
    next_ = static_cast<unsigned char*>(chunks_.back().get());
    left_ = size;
  }
  void* taken = next_;
  next_ += bytes;
  left_ -= bytes;
  return taken;
}

}  // namespace acf
