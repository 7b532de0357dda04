// What the Python borders of the family's CPU and CUDA kernels share: tiles as addresses and sizes, checked before use.
#pragma once
#include <algorithm>
#include <optional>

#include "common/border.h"

namespace m3::policy_loss {

using MatrixTuple =
    std::tuple<uintptr_t, int64_t, int64_t, int64_t>;          // address, rows, columns, elements from row to row
using IdsTuple = std::tuple<SpanTuple, int64_t, int64_t>;      // ids (n, K), K, index of the tile's first column
using TransformTuple = std::tuple<double, double, SpanTuple>;  // logit_scale, softcap, inverse_temperature

// A matrix at the border: `bytes` an element.
struct Tile {
  uintptr_t address;
  int64_t rows, columns, stride, bytes;

  uintptr_t end() const {  // behind the last element
    return rows && columns ? address + bytes * (uintptr_t)((rows - 1) * stride + columns) : address;
  }
};

inline std::string shape(int64_t rows, int64_t columns) {
  return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

inline Tile tile_of(const char* op, const char* argument, const MatrixTuple& tuple, int64_t bytes) {
  const auto& [address, rows, columns, stride] = tuple;
  constexpr int64_t most = int64_t{1} << 40;  // so that no product of sizes leaves int64
  check(rows >= 0 && columns >= 0 && rows < most && columns < most, op, argument, "sizes in 0 .. 2**40 - 1",
        shape(rows, columns));
  check(rows <= 1 || (stride >= columns && stride <= most / rows), op, argument,
        "rows that lie one after another, under 2**40 elements", stride);
  check(address || !rows || !columns, op, argument, "memory", "none");
  return {address, rows, columns, rows > 1 ? stride : std::max<int64_t>(1, columns), bytes};
}

inline void check_shape(const char* op, const char* argument, const Tile& m, int64_t rows, int64_t columns) {
  check(m.rows == rows && m.columns == columns, op, argument, shape(rows, columns), shape(m.rows, m.columns));
}

// `out` may be what is read, element for element: a row is read before it is written. Any other overlap would be read
// after it is written, unless the two are column ranges of one matrix.
inline void check_apart(const char* op, const char* read, const Tile& in, const Tile& out, bool same_rows) {
  if (in.address >= out.end() || out.address >= in.end()) return;
  const bool alike = in.bytes == out.bytes;
  if (alike && same_rows && in.address == out.address && in.stride == out.stride) return;
  const int64_t stride = in.rows > 1 ? in.stride : out.stride;
  const int64_t distance = ((int64_t)(out.address - in.address) / in.bytes % stride + stride) % stride;
  const bool beside = alike && (in.rows <= 1 || out.rows <= 1 || in.stride == out.stride) && distance >= in.columns &&
                      distance + out.columns <= stride;
  check(beside, op, "out", std::string("memory apart from ") + read + (same_rows ? ", or the same" : ""), "an overlap");
}

inline void check_ids(const char* op, const IdsTuple& tuple, int64_t rows) {
  const auto& [ids, num_ids, first] = tuple;
  constexpr int64_t most = int64_t{1} << 20;
  check(num_ids >= 0 && num_ids < most, op, "ids", "under 2**20 a row", num_ids);
  check(first >= 0, op, "first", "at least 0", first);
  check_span(op, "ids", ids, rows * num_ids, false);
}

}  // namespace m3::policy_loss
