// A pass through the layers of a decoder as a list of instructions over buffers of fp32 rows, run in one call.
//
// A buffer holds `width` floats for each of the pass's rows, or for the rows that were picked. Weights, caches and
// tables are addresses: whoever builds a program keeps their tensors alive, and may change what is in them between
// passes. Every instruction computes a row from that row alone (attention: from the keys it attends to), in an order of
// operations that is fixed, so a row's results are bitwise the same whatever rows share the pass, and for every thread
// count.
#pragma once
#include <array>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "decoder/linear_cpu_driver.h"
#include "int4/gemm_cpu_driver.h"
#include "spec_decode/attention_cpu_driver.h"

namespace m3::decoder {

enum class Op : int {
  kEmbed,    // to = table[token]
  kLoad,     // to = input
  kStore,    // output = from
  kPick,     // to (picked) = from
  kCopy,     // to = from
  kAdd,      // to += from
  kNorm,     // to = rms_norm(from)
  kDense,    // to = W from
  kInt4,     // to = W from
  kSiluMul,  // to = silu(first half of from) * second half
  kRotate,   // rotates queries and keys of from in place, keys and values go to the cache
  kAttend,   // to = attention(from)
  kMoe,      // to = experts(from), routed by scores
  kCount
};

// Columns column .. column + width - 1 of a buffer.
struct Operand {
  int buffer = -1;
  int64_t column = 0, width = 0;
};

enum class KvType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kInt8 = 3 };

// Paged keys and values of one layer, (pages, page_size, kv_heads, size), contiguous; int8 with scales (pages,
// page_size, kv_heads).
struct KvCache {
  char *keys, *values;
  float *k_scale, *v_scale;
  KvType type;
  int64_t pages, page_size, kv_heads, size;
};

struct Experts {
  bool packed;
  int4::Weights w13, w2;         // packed
  const char *dense13, *dense2;  // (E, 2 I, D) and (E, D, I)
  Type type;
  int64_t experts, top_k, hidden, inner;
  bool rescale;  // the chosen weights to sum 1
};

struct Instruction {
  Op op;
  Operand to, from, gate;       // kMoe: gate is the router's scores
  const void* table = nullptr;  // kEmbed; kNorm: fp32 weight
  Type type = Type::kF32;       // of table
  int64_t rows = 0;             // of table
  float eps = 0;
  int index = 0;  // kLoad, kStore: which; kRotate, kAttend: which cache; kMoe: which experts
  Dense dense{};
  int4::Weights packed{};
  const float* bias = nullptr;  // kInt4
  int4::Mode mode = int4::Mode::kInt16;
  int64_t heads = 0;
  const float *q_norm = nullptr, *k_norm = nullptr;  // kRotate: (size,) or null
  float scale = 0;                                   // kAttend
};

struct Array {
  float* data;
  int64_t stride;  // elements
  int64_t width;
};

// The rows of one pass, sorted by request; requests 0 .. causal - 1 attend causally, the others by their mask bits.
struct Pass {
  int64_t rows, requests, causal;
  const int64_t *tokens, *positions, *slots;              // (rows,); a slot is page * page_size + offset
  const int32_t *cu_seqlens, *cache_seqlens, *tree_lens;  // (requests + 1,), (requests,), (requests,)
  const int32_t* block_table;                             // (requests, max_pages)
  int64_t max_pages;
  const int32_t* mask_bits;  // (rows of the other requests, mask_words)
  int64_t mask_words;
  const int64_t* picked;  // (num_picked,) rows
  int64_t num_picked;
  const float *cos, *sin;  // (angles, rotated / 2)
  int64_t angles;
  std::vector<Array> inputs, outputs;
  int threads;
};

class Program {
 public:
  Program(std::vector<int64_t> widths, std::vector<bool> picked, int64_t rotated);

  int add_cache(const KvCache& cache);
  int add_experts(const Experts& experts);
  void add(const Instruction& instruction);

  int64_t rotated() const { return rotated_; }
  int64_t head_size(int cache) const;
  // Rows that a pass writes to output `index`; -1 if no instruction stores it.
  int64_t output_rows(int index, const Pass& pass) const;

  // Runs all instructions. Throws std::invalid_argument for a pass that does not fit the program.
  void run(const Pass& pass);

  // Seconds in each Op since the last call, if `on` was asked for; then sets `on`.
  std::array<double, int(Op::kCount)> profile(bool on);
  // (distinct experts of the last pass, summed over its layers; layers)
  std::array<int64_t, 2> experts_touched();

 private:
  void check_pass(const Pass& pass) const;
  void execute(const Instruction& in, const Pass& pass);
  void rotate(const Instruction& in, const Pass& pass);
  void attend(const Instruction& in, const Pass& pass);
  void moe(const Instruction& in, const Pass& pass, int64_t rows);
  int64_t rows_of(const Operand& operand, const Pass& pass) const;
  float* at(const Operand& operand) { return buffers_[operand.buffer].data() + operand.column; }
  int64_t stride(const Operand& operand) const { return widths_[operand.buffer]; }
  void check_operand(const char* argument, const Operand& operand) const;

  std::vector<int64_t> widths_;
  std::vector<bool> picked_;
  int64_t rotated_;  // width of a head that is rotated
  std::vector<std::vector<float>> buffers_;
  std::vector<KvCache> caches_;
  std::vector<Experts> experts_;
  std::vector<Instruction> instructions_;
  std::array<double, int(Op::kCount)> seconds_{};
  bool profile_ = false;
  std::array<int64_t, 2> touched_{};
  std::mutex mutex_;
};

}  // namespace m3::decoder
