// Runs when a build for this machine alone is configured: prints the best build that the machine can run.
#include <cstdio>

#include "core/processor.h"

int main() {
  const char* const* names = fc::supported_isas();
  if (names[0] == nullptr) return 1;
  std::fputs(names[0], stdout);
  return 0;
}
