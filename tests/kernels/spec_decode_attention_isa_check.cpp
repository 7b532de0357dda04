// Stand-alone check of tree attention on an architecture that Python does not run on here (AArch64 under QEMU).
//
// usage: spec_decode_attention_isa_check SEED    compares each instruction set with the formula in double, and each
//                                                query of a chunk with the same query decoded alone, bit for bit
// Prints one line per failed case; exit status 1 if there is one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/isa.h"
#include "spec_decode/attention_cpu_driver.h"

using namespace m3;
using namespace m3::spec_decode;

namespace {

constexpr double kBound = 2e-6;  // error over the largest exact value
constexpr int64_t kGroup = 3, kKvHeads = 2, kHeads = kGroup * kKvHeads, kPageSize = 7;

struct Inputs {
  int64_t keys, queries, size, pages;
  bool int8;
  std::vector<float> q, k, v, gate, k_scale, v_scale;
  std::vector<int8_t> k_int8, v_int8;
  std::vector<int32_t> table;

  Inputs(int64_t keys, int64_t queries, int64_t size, unsigned seed, bool int8)
      : keys(keys), queries(queries), size(size), pages((keys + kPageSize - 1) / kPageSize), int8(int8) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& values, int64_t count) {
      values.resize(count);
      for (float& value : values) value = normal(random);
    };
    fill(q, queries * kHeads * size), fill(gate, queries * kHeads * size);
    fill(k, pages * kPageSize * kKvHeads * size), fill(v, pages * kPageSize * kKvHeads * size);
    for (int64_t p = 0; p < pages; p++) table.push_back((int32_t)(pages - 1 - p));
    quantize(k, k_int8, k_scale), quantize(v, v_int8, v_scale);
  }

  // Rows of a cache as integers and scales; where the case is of int8 the floats become what those stand for.
  void quantize(std::vector<float>& values, std::vector<int8_t>& integers, std::vector<float>& scales) const {
    integers.resize(values.size()), scales.resize(values.size() / size);
    for (size_t i = 0; i < values.size(); i++) {
      scales[i / size] = 0.01f + 0.001f * float(i / size % 29);
      integers[i] = (int8_t)std::lrint(std::fmax(-128.0f, std::fmin(127.0f, values[i] / scales[i / size])));
      if (int8) values[i] = (float)integers[i] * scales[i / size];
    }
  }

  int64_t at(int64_t slot, int64_t head) const {
    return ((table[slot / kPageSize] * kPageSize + slot % kPageSize) * kKvHeads + head) * size;
  }

  // Queries first .. first + count - 1, as if no later ones were there.
  std::vector<float> run(int64_t first, int64_t count, int threads) const {
    std::vector<float> out(count * kHeads * size);
    const int32_t length = int32_t(keys - queries + first + count), cu[2] = {0, (int32_t)count};
    const int64_t row = kHeads * size, head = size * (int8 ? 1 : 4), slot = kKvHeads * head;
    Attention a{};
    a.requests = 1, a.heads = kHeads, a.kv_heads = kKvHeads, a.size = size;
    a.q = (const char*)(q.data() + first * row), a.q_row_stride = row * 4, a.q_head_stride = size * 4;
    a.keys = {int8 ? (const char*)k_int8.data() : (const char*)k.data(), slot * kPageSize, slot, head};
    a.values = {int8 ? (const char*)v_int8.data() : (const char*)v.data(), slot * kPageSize, slot, head};
    if (int8) {
      a.cache_type = Type::kInt8;
      a.k_scale = {k_scale.data(), kPageSize * kKvHeads, kKvHeads, 1};
      a.v_scale = {v_scale.data(), kPageSize * kKvHeads, kKvHeads, 1};
    }
    a.num_pages = pages, a.page_size = kPageSize, a.block_table = table.data(), a.max_pages = pages;
    a.cache_seqlens = &length, a.cu_seqlens_q = cu;
    a.gate = (const char*)(gate.data() + first * row), a.gate_row_stride = row;
    a.softmax_scale = 0.3f, a.out = (char*)out.data();
    tree_attention(a, threads);
    return out;
  }

  double exact(int64_t t, int64_t head, int64_t d) const {
    double total = 0.0, sum = 0.0;
    for (int64_t j = 0; j <= keys - queries + t; j++) {
      double score = 0.0;
      for (int64_t i = 0; i < size; i++)
        score += (double)q[(t * kHeads + head) * size + i] * k[at(j, head / kGroup) + i];
      const double weight = std::exp(0.3 * score);
      total += weight, sum += weight * v[at(j, head / kGroup) + d];
    }
    return sum / total / (1.0 + std::exp(-(double)gate[(t * kHeads + head) * size + d]));
  }
};

int failures = 0;

void check(const std::string& isa, const Inputs& in) {
  const std::vector<float> rows = in.run(0, in.queries, 2);
  double error = 0.0, largest = 0.0;
  for (int64_t t = 0; t < in.queries; t += 5)
    for (int64_t head = 0; head < kHeads; head++)
      for (int64_t d = 0; d < in.size; d += 7) {
        const double wanted = in.exact(t, head, d);
        const double difference = std::fabs(rows[(t * kHeads + head) * in.size + d] - wanted);
        error = difference <= error ? error : difference;  // nan stays
        largest = std::fmax(largest, std::fabs(wanted));
      }
  if (!(error <= kBound * largest)) {
    std::printf("%s keys %ld size %ld int8 %d: error %.2e of %.2e\n", isa.c_str(), (long)in.keys, (long)in.size,
                in.int8, error, largest);
    failures++;
  }
  for (int64_t t : {int64_t{0}, in.queries / 2, in.queries - 1}) {
    const std::vector<float> alone = in.run(t, 1, 1);
    if (!std::memcmp(alone.data(), rows.data() + t * kHeads * in.size, alone.size() * 4)) continue;
    std::printf("%s keys %ld size %ld int8 %d: row %ld depends on others\n", isa.c_str(), (long)in.keys, (long)in.size,
                in.int8, (long)t);
    failures++;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto seed = (unsigned)std::strtoul(argc > 1 ? argv[1] : "0", nullptr, 10);
  for (const std::string& isa : isas()) {
    set_isa(isa);
    for (const bool int8 : {false, true}) {
      check(isa, Inputs(1, 1, 1, seed, int8));
      check(isa, Inputs(70, 9, 37, seed, int8));
      check(isa, Inputs(600, 17, 64, seed, int8));
      check(isa, Inputs(130, 4, 128, seed, int8));
    }
  }
  return failures > 0;
}
