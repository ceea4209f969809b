// A test runner in one page, so that the native tests build anywhere a compiler is.
//
//   ACF_TEST(core_counts_tasks) {
//     EXPECT(hardware_threads() >= 1);
//     EXPECT_EQ(2 + 2, 4);                                   // prints both values when they differ
//     EXPECT_THROWS(parallel_for(1, 0, body), std::invalid_argument, "threads must be at least 1, got 0");
//   }
//
// A test goes on after a failed expectation. acf_native_tests FILTER runs the tests whose "file.name" begins with
// FILTER.
#pragma once

#include <sstream>
#include <string>

namespace acf::testing {

struct Test {
  const char* file;
  const char* name;
  void (*body)();
};

bool add(const Test& test);
void report_failure(const char* file, int line, const std::string& what);

template <class A, class B>
void expect_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream what;
  what.precision(17);
  what << text << ": " << a << " != " << b;
  report_failure(file, line, what.str());
}

template <class Error, class Body>
void expect_throws(Body body, const std::string& message_part, const char* text, const char* file, int line) {
  try {
    body();
  } catch (const Error& error) {
    if (std::string(error.what()).find(message_part) == std::string::npos) {
      report_failure(file, line, std::string(text) + ": the message is '" + error.what() + "'");
    }
    return;
  }
  report_failure(file, line, std::string(text) + ": nothing was thrown");
}

}  // namespace acf::testing

#define ACF_TEST(name)                                                         \
  static void test_##name();                                                   \
  [[maybe_unused]] static const bool added_##name =                            \
      ::acf::testing::add(::acf::testing::Test{__FILE__, #name, test_##name}); \
  static void test_##name()

#define EXPECT(condition) \
  ((condition) ? static_cast<void>(0) : ::acf::testing::report_failure(__FILE__, __LINE__, #condition))
#define EXPECT_EQ(a, b) ::acf::testing::expect_equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define EXPECT_THROWS(statement, error, message_part) \
  ::acf::testing::expect_throws<error>([&] { statement; }, message_part, #statement, __FILE__, __LINE__)
