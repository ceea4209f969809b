#include <cstdio>
#include <exception>
#include <vector>

#include "core/isa.h"
#include "tests/testing.h"

namespace acf::testing {
namespace {

// Tests register themselves before main, from several files in an order that is not defined.
std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

int failures = 0;

// "csrc/tests/test_core.cpp" -> "test_core"
std::string stem(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  const std::size_t begin = slash == std::string::npos ? 0 : slash + 1;
  return path.substr(begin, path.find_last_of('.') - begin);
}

void run(const Test& test) {
  try {
    test.body();
  } catch (const std::exception& error) {
    report_failure(test.file, 0, std::string("uncaught exception: ") + error.what());
  }
}

int run_all(const std::string& filter) {
  int ran = 0, failed = 0;
  for (const Test& test : tests()) {
    const std::string name = stem(test.file) + "." + test.name;
    if (name.compare(0, filter.size(), filter) != 0) continue;
    const int failures_before = failures;
    run(test);
    ++ran;
    if (failures != failures_before) {
      ++failed;
      std::printf("FAILED %s\n", name.c_str());
    }
  }
  std::printf("%d tests, %d failed, ISA %s\n", ran, failed, std::string(isa_name(active_isa())).c_str());
  // A filter that matches nothing is a mistake, not a success.
  return failed == 0 && ran > 0 ? 0 : 1;
}

}  // namespace

bool add(const Test& test) {
  tests().push_back(test);
  return true;
}

void report_failure(const char* file, int line, const std::string& what) {
  ++failures;
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

}  // namespace acf::testing

int main(int argc, char** argv) { return acf::testing::run_all(argc > 1 ? argv[1] : ""); }
