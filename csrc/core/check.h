// Checks of arguments. They are always compiled in and throw; preconditions that only our own code can break are
// asserts.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace acf {

// An argument of the wrong kind (dtype, rank); Python sees a TypeError. std::invalid_argument becomes a ValueError.
class TypeError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

namespace detail {

template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw Error(sentence.str());
}

}  // namespace detail
}  // namespace acf

// ACF_CHECK(keep <= groups, "keep must be at most ", groups, ", got ", keep);
#define ACF_CHECK(condition, ...) \
  ((condition) ? static_cast<void>(0) : ::acf::detail::fail<std::invalid_argument>(__VA_ARGS__))

// ACF_CHECK_TYPE(rank >= 2, "weight must have at least 2 dimensions, got ", rank);
#define ACF_CHECK_TYPE(condition, ...) \
  ((condition) ? static_cast<void>(0) : ::acf::detail::fail<::acf::TypeError>(__VA_ARGS__))
