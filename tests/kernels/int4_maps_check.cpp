// Prints the index maps that CPU and CUDA kernels share, compiled for the host. Read by test_int4_maps.py.
//   maps            n k byte shift position     of every element of a tile, by layout.h
//   plan N K G P    part_tiles split_parts splits of plan.h, grouped G (0 or 1), P multiprocessors
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "int4/plan.h"

using namespace m3::int4;

int main(int count, char** arguments) {
  if (count == 2 && !std::strcmp(arguments[1], "maps")) {
    for (int g = 0; g < 8; ++g)
      for (int t = 0; t < 4; ++t)
        for (int word = 0; word < 4; ++word)
          for (int byte = 0; byte < 4; ++byte)
            for (int high = 0; high < 2; ++high) {
              const int n = 16 * word + g + 8 * high, k = byte_column(t, byte);
              std::printf("%d %d %d %d %d\n", n, k, chunk_offset(g, t) + 4 * word + byte, 4 * high, position_of_row(n));
              if (row_of_position(position_of_row(n)) != n) return 3;
            }
    return 0;
  }
  if (count == 6 && !std::strcmp(arguments[1], "plan")) {
    const Plan plan =
        plan_of(std::atoll(arguments[2]), std::atoll(arguments[3]), std::atoi(arguments[4]), std::atoi(arguments[5]));
    std::printf("%d %d %d\n", plan.part_tiles, plan.split_parts, plan.splits);
    return 0;
  }
  return 2;
}
