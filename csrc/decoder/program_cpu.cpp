// The pass: instructions one after another, each on torch's OpenMP pool where its work is worth it.
#include "decoder/program_cpu.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "common/check.h"
#include "common/half.h"

namespace m3::decoder {
namespace {

constexpr const char* kOp = "decoder_pass";
constexpr int64_t kSerialFloats = 1 << 15;  // floats of elementwise work under which a second thread costs more
constexpr int kLanes = 16;                  // partial sums of a row
constexpr float kInt8Most = 127.0f;
constexpr int64_t kMostWidth = 1 << 26;  // of a buffer

int64_t bytes_of(Type type) { return type == Type::kF32 ? 4 : 2; }
int64_t bytes_of(KvType type) { return type == KvType::kF32 ? 4 : type == KvType::kInt8 ? 1 : 2; }

template <class Body>
void for_rows(int64_t rows, int64_t floats, int threads, const Body& body) {
  if (threads == 1 || rows * floats < kSerialFloats) {
    for (int64_t i = 0; i < rows; i++) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < rows; i++) body(i);
}

void widen(const void* from, Type type, int64_t count, float* to) {
  const auto* half = static_cast<const uint16_t*>(from);
  if (type == Type::kF32)
    std::memcpy(to, from, count * sizeof(float));
  else if (type == Type::kBF16)
    for (int64_t i = 0; i < count; i++) to[i] = bf16_to_float(half[i]);
  else
    for (int64_t i = 0; i < count; i++) to[i] = f16_to_float(half[i]);
}

// Sum of squares in lanes that a compiler may put in vectors of any width; the order of additions is this one.
float sum_of_squares(const float* x, int64_t count) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; j++) lanes[j] += x[i + j] * x[i + j];
  for (int j = 0; i < count; i++, j++) lanes[j] += x[i] * x[i];
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; j++) lanes[j] += lanes[j + half];
  return lanes[0];
}

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* to) {
  const float factor = 1.0f / std::sqrt(sum_of_squares(x, count) / (float)count + eps);
  for (int64_t i = 0; i < count; i++) to[i] = x[i] * factor * weight[i];
}

// x (size,), of which the first 2 * half are rotated: pairs (i, i + half).
void rotate_head(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

void store_key(const float* x, KvType type, int64_t size, char* to, float* scale) {
  auto* half = reinterpret_cast<uint16_t*>(to);
  switch (type) {
    case KvType::kF32:
      std::memcpy(to, x, size * sizeof(float));
      return;
    case KvType::kBF16:
      for (int64_t i = 0; i < size; i++) half[i] = float_to_bf16(x[i]);
      return;
    case KvType::kF16:
      for (int64_t i = 0; i < size; i++) half[i] = float_to_f16(x[i]);
      return;
    case KvType::kInt8:
      float most = 0, sum = 0;  // a sum that is no number says that some element is none
      for (int64_t i = 0; i < size; i++) most = std::max(most, std::fabs(x[i])), sum += x[i];
      const float inverse = most > 0 ? kInt8Most / most : 0.0f;
      for (int64_t i = 0; i < size; i++) {
        const float value = x[i] * inverse;
        to[i] = (char)(std::isnan(value) ? 0 : std::lrintf(std::clamp(value, -kInt8Most, kInt8Most)));
      }
      *scale = std::isnan(sum) ? sum : most / kInt8Most;
  }
}

}  // namespace

// -- building ---------------------------------------------------------------------------------------------------------
Program::Program(std::vector<int64_t> widths, std::vector<bool> picked, int64_t rotated)
    : widths_(std::move(widths)), picked_(std::move(picked)), rotated_(rotated), buffers_(widths_.size()) {
  check(widths_.size() == picked_.size(), kOp, "picked", "one value a buffer", picked_.size());
  for (int64_t width : widths_) check(width >= 1 && width < kMostWidth, kOp, "widths", "1 .. 2**26 - 1", width);
  check(rotated >= 0 && rotated % 2 == 0, kOp, "rotated", "an even number", rotated);
}

void Program::check_operand(const char* argument, const Operand& x) const {
  const bool good = x.buffer >= 0 && x.buffer < (int)widths_.size() && x.column >= 0 && x.width >= 1 &&
                    x.width <= widths_[x.buffer] && x.column <= widths_[x.buffer] - x.width;
  check(good, kOp, argument, "columns of one of " + std::to_string(widths_.size()) + " buffers",
        "buffer " + std::to_string(x.buffer) + ", columns from " + std::to_string(x.column));
}

int Program::add_cache(const KvCache& cache) {
  check(cache.pages >= 1 && cache.page_size >= 1 && cache.kv_heads >= 1 && cache.size >= rotated_, kOp, "cache",
        "positive sizes, heads of at least " + std::to_string(rotated_), cache.size);
  check(cache.type != KvType::kInt8 || (cache.k_scale && cache.v_scale), kOp, "cache", "scales for int8", "none");
  const std::lock_guard lock(mutex_);
  caches_.push_back(cache);
  return (int)caches_.size() - 1;
}

int64_t Program::head_size(int cache) const {
  check(cache >= 0 && cache < (int)caches_.size(), kOp, "cache", "one that was added", cache);
  return caches_[cache].size;
}

int Program::add_experts(const Experts& e) {
  check(e.experts >= 1 && e.top_k >= 1 && e.top_k <= e.experts && e.hidden >= 1 && e.inner >= 1, kOp, "experts",
        "positive sizes, top_k of at most " + std::to_string(e.experts), e.top_k);
  const std::lock_guard lock(mutex_);
  experts_.push_back(e);
  return (int)experts_.size() - 1;
}

void Program::add(const Instruction& in) {
  const std::lock_guard lock(mutex_);
  const auto apart = [&](const Operand& a, const Operand& b) {
    const bool good = a.buffer != b.buffer || a.column + a.width <= b.column || b.column + b.width <= a.column;
    check(good, kOp, "instruction", "a result apart from what is read", "columns of both");
  };
  const auto apart_or_same = [&](const Operand& a, const Operand& b) {
    if (a.buffer != b.buffer || a.column != b.column || a.width != b.width) apart(a, b);
  };
  const auto same_rows = [&](const Operand& a, const Operand& b) {
    check(picked_[a.buffer] == picked_[b.buffer], kOp, "instruction", "buffers of the same rows", "picked and all");
  };
  const auto widths = [&](int64_t to, int64_t from) {
    check(in.to.width == to && in.from.width == from, kOp, "instruction",
          "widths " + std::to_string(from) + " -> " + std::to_string(to),
          std::to_string(in.from.width) + " -> " + std::to_string(in.to.width));
  };
  if (in.op != Op::kStore && in.op != Op::kRotate) check_operand("to", in.to);
  if (in.op != Op::kEmbed && in.op != Op::kLoad) check_operand("from", in.from);
  switch (in.op) {
    case Op::kEmbed:
      check(in.table && in.rows >= 1 && !picked_[in.to.buffer], kOp, "embed", "a table, and a buffer of all rows",
            "other");
      break;
    case Op::kLoad:
      check(in.index >= 0 && in.index < 64 && !picked_[in.to.buffer], kOp, "load", "an input in 0..63", in.index);
      break;
    case Op::kStore:
      check(in.index >= 0 && in.index < 64, kOp, "store", "an output in 0..63", in.index);
      for (const Instruction& other : instructions_)
        check(other.op != Op::kStore || other.index != in.index, kOp, "store", "one instruction an output", in.index);
      break;
    case Op::kPick:
      widths(in.from.width, in.from.width);
      check(picked_[in.to.buffer] && !picked_[in.from.buffer], kOp, "pick", "from all rows to picked ones", "other");
      break;
    case Op::kCopy:
    case Op::kAdd:
      widths(in.from.width, in.from.width);
      same_rows(in.to, in.from);
      if (in.op == Op::kAdd)
        apart_or_same(in.to, in.from);
      else
        apart(in.to, in.from);
      break;
    case Op::kNorm:
      widths(in.from.width, in.from.width);
      same_rows(in.to, in.from);
      apart_or_same(in.to, in.from);
      check(in.table && in.eps > 0, kOp, "norm", "a weight and eps above 0", in.eps);
      break;
    case Op::kDense:
      widths(in.dense.n, in.dense.k);
      same_rows(in.to, in.from);
      apart(in.to, in.from);
      break;
    case Op::kInt4:
      widths(in.packed.n, in.packed.k);
      same_rows(in.to, in.from);
      apart(in.to, in.from);
      break;
    case Op::kSiluMul:
      widths(in.to.width, 2 * in.to.width);
      same_rows(in.to, in.from);
      apart(in.to, in.from);
      break;
    case Op::kRotate:
    case Op::kAttend: {
      check(in.index >= 0 && in.index < (int)caches_.size(), kOp, "cache", "one that was added", in.index);
      const KvCache& cache = caches_[in.index];
      check(in.heads >= 1 && in.heads < kMostWidth && in.heads % cache.kv_heads == 0, kOp, "heads",
            "a multiple of the kv heads", in.heads);
      check(!picked_[in.from.buffer], kOp, "attention", "buffers of all rows", "picked");
      if (in.op == Op::kRotate) {
        const int64_t width = (in.heads + 2 * cache.kv_heads) * cache.size;
        check(in.from.width == width, kOp, "rotate", std::to_string(width) + " columns", in.from.width);
        check(in.eps > 0 || (!in.q_norm && !in.k_norm), kOp, "rotate", "eps above 0 with norms", in.eps);
      } else {
        widths(in.heads * cache.size, in.heads * cache.size);
        same_rows(in.to, in.from);
        apart(in.to, in.from);
        check(stride(in.to) == in.to.width, kOp, "attention", "a whole buffer for the result", in.to.width);
        check(std::isfinite(in.scale), kOp, "scale", "a finite number", in.scale);
        if (in.gate.buffer >= 0) {
          check_operand("gate", in.gate);
          same_rows(in.to, in.gate);
          apart(in.to, in.gate);
          check(in.gate.width == in.heads || in.gate.width == in.to.width, kOp, "gate", "a column a head or element",
                in.gate.width);
        }
      }
      break;
    }
    case Op::kMoe: {
      check(in.index >= 0 && in.index < (int)experts_.size(), kOp, "experts", "some that were added", in.index);
      const Experts& e = experts_[in.index];
      widths(e.hidden, e.hidden);
      same_rows(in.to, in.from);
      check_operand("scores", in.gate);
      same_rows(in.to, in.gate);
      check(in.gate.width == e.experts, kOp, "scores", "a column an expert", in.gate.width);
      const bool whole =
          in.from.column == 0 && in.to.column == 0 && stride(in.from) == e.hidden && stride(in.to) == e.hidden;
      check(whole, kOp, "experts", "whole buffers", "columns");
      apart(in.to, in.from), apart(in.to, in.gate);
      break;
    }
    case Op::kCount:
      refuse(kOp, "instruction", "an operation", "none");
  }
  instructions_.push_back(in);
}

// -- a pass -----------------------------------------------------------------------------------------------------------
int64_t Program::rows_of(const Operand& operand, const Pass& pass) const {
  return picked_[operand.buffer] ? pass.num_picked : pass.rows;
}

int64_t Program::output_rows(int index, const Pass& pass) const {
  for (const Instruction& in : instructions_)
    if (in.op == Op::kStore && in.index == index) return rows_of(in.from, pass);
  return -1;
}

void Program::check_pass(const Pass& p) const {
  check(p.threads >= 1 && p.threads <= 4096, kOp, "threads", "1..4096", p.threads);
  int64_t vocabulary = std::numeric_limits<int64_t>::max(), slots = vocabulary;
  for (const Instruction& in : instructions_) {
    if (in.op == Op::kEmbed) vocabulary = std::min(vocabulary, in.rows);
    const bool load = in.op == Op::kLoad, store = in.op == Op::kStore;
    if (!load && !store) continue;
    const std::vector<Array>& arrays = load ? p.inputs : p.outputs;
    const int64_t width = load ? in.to.width : in.from.width;
    const bool good = in.index < (int)arrays.size() && arrays[in.index].width == width;
    check(good, kOp, load ? "inputs" : "outputs",
          "one of " + std::to_string(width) + " columns at " + std::to_string(in.index),
          in.index < (int)arrays.size() ? arrays[in.index].width : -1);
  }
  for (const KvCache& cache : caches_) slots = std::min(slots, cache.pages * cache.page_size);
  for (int64_t i = 0; i < p.rows; i++) {
    check(p.tokens[i] >= 0 && p.tokens[i] < vocabulary, kOp, "tokens", "0.." + std::to_string(vocabulary - 1),
          p.tokens[i]);
    check(p.positions[i] >= 0 && p.positions[i] < p.angles, kOp, "positions", "0.." + std::to_string(p.angles - 1),
          p.positions[i]);
    check(p.slots[i] >= 0 && p.slots[i] < slots, kOp, "slots", "0.." + std::to_string(slots - 1), p.slots[i]);
  }
  for (int64_t i = 0; i < p.num_picked; i++)
    check(p.picked[i] >= 0 && p.picked[i] < p.rows, kOp, "picked", "0.." + std::to_string(p.rows - 1), p.picked[i]);
  check(p.causal >= 0 && p.causal <= p.requests, kOp, "causal", "0.." + std::to_string(p.requests), p.causal);
  check(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.requests] == p.rows, kOp, "cu_seqlens",
        "0 first and " + std::to_string(p.rows) + " last", p.cu_seqlens[p.requests]);
  check(p.causal == p.requests || p.mask_words >= 1, kOp, "mask_bits", "bits for requests that are trees",
        p.mask_words);
  for (int64_t b = 0; b < p.requests; b++) {
    const int64_t queries = (int64_t)p.cu_seqlens[b + 1] - p.cu_seqlens[b], keys = p.cache_seqlens[b];
    const int64_t tree = b < p.causal ? queries : p.tree_lens[b];
    check(queries >= 0, kOp, "cu_seqlens", "ascending values", queries);
    check(tree >= 0 && tree <= p.mask_words * 32 + (b < p.causal ? queries : 0), kOp, "tree_lens",
          "at most " + std::to_string(p.mask_words * 32), tree);
    check(keys >= tree, kOp, "cache_seqlens", "at least " + std::to_string(tree), keys);
    for (const KvCache& cache : caches_)
      check((keys + cache.page_size - 1) / cache.page_size <= p.max_pages, kOp, "block_table",
            "pages for " + std::to_string(keys) + " keys", p.max_pages);
  }
}

void Program::run(const Pass& pass) {
  const std::lock_guard lock(mutex_);
  check_pass(pass);
  touched_ = {};
  if (!pass.rows) return;
  for (size_t i = 0; i < buffers_.size(); i++) {
    const auto floats = (size_t)((picked_[i] ? pass.num_picked : pass.rows) * widths_[i]);
    if (buffers_[i].size() < floats) buffers_[i].resize(floats);
  }
  for (const Instruction& in : instructions_) {
    if (!profile_) {
      execute(in, pass);
      continue;
    }
    const auto start = std::chrono::steady_clock::now();
    execute(in, pass);
    seconds_[int(in.op)] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}

std::array<int64_t, 2> Program::experts_touched() {
  const std::lock_guard lock(mutex_);
  return touched_;
}

std::array<double, int(Op::kCount)> Program::profile(bool on) {
  const std::lock_guard lock(mutex_);
  const auto found = seconds_;
  seconds_ = {};
  profile_ = on;
  return found;
}

void Program::execute(const Instruction& in, const Pass& pass) {
  const int64_t rows = rows_of(in.op == Op::kStore || in.op == Op::kRotate ? in.from : in.to, pass);
  if (!rows) return;
  float* to = in.to.buffer >= 0 ? at(in.to) : nullptr;
  const float* from = in.from.buffer >= 0 ? at(in.from) : nullptr;
  const int64_t to_stride = in.to.buffer >= 0 ? stride(in.to) : 0;
  const int64_t from_stride = in.from.buffer >= 0 ? stride(in.from) : 0;
  const int64_t width = in.op == Op::kStore ? in.from.width : in.to.width;
  switch (in.op) {
    case Op::kEmbed:
      for_rows(rows, width, pass.threads, [&](int64_t i) {
        widen(static_cast<const char*>(in.table) + pass.tokens[i] * width * bytes_of(in.type), in.type, width,
              to + i * to_stride);
      });
      break;
    case Op::kLoad: {
      const Array& input = pass.inputs[in.index];
      for (int64_t i = 0; i < rows; i++) std::memcpy(to + i * to_stride, input.data + i * input.stride, width * 4);
      break;
    }
    case Op::kStore: {
      const Array& output = pass.outputs[in.index];
      for (int64_t i = 0; i < rows; i++)
        std::memcpy(output.data + i * output.stride, from + i * from_stride, width * 4);
      break;
    }
    case Op::kPick:
      for (int64_t i = 0; i < rows; i++)
        std::memcpy(to + i * to_stride, from + pass.picked[i] * from_stride, width * 4);
      break;
    case Op::kCopy:
      for (int64_t i = 0; i < rows; i++) std::memcpy(to + i * to_stride, from + i * from_stride, width * 4);
      break;
    case Op::kAdd:
      for_rows(rows, width, pass.threads, [&](int64_t i) {
        float* a = to + i * to_stride;
        const float* b = from + i * from_stride;
        for (int64_t j = 0; j < width; j++) a[j] += b[j];
      });
      break;
    case Op::kNorm:
      for_rows(rows, width, pass.threads, [&](int64_t i) {
        rms_norm(from + i * from_stride, static_cast<const float*>(in.table), width, in.eps, to + i * to_stride);
      });
      break;
    case Op::kDense:
      linear(in.dense, from, from_stride, to, to_stride, rows, pass.threads);
      break;
    case Op::kInt4: {
      const int64_t offsets[2] = {0, rows};
      int4::gemm(kOp, in.packed,
                 {from, int4::Type::kF32, from_stride, to, int4::Type::kF32, to_stride, offsets, nullptr, in.bias},
                 in.mode, pass.threads);
      break;
    }
    case Op::kSiluMul:
      for_rows(rows, 8 * width, pass.threads, [&](int64_t i) {
        float* out = to + i * to_stride;
        std::memcpy(out, from + i * from_stride, width * 4);
        int4::silu_mul(out, from + i * from_stride + width, width);
      });
      break;
    case Op::kRotate:
      rotate(in, pass);
      break;
    case Op::kAttend:
      attend(in, pass);
      break;
    case Op::kMoe:
      moe(in, pass, rows);
      break;
    case Op::kCount:
      break;
  }
}

void Program::rotate(const Instruction& in, const Pass& pass) {
  const KvCache& cache = caches_[in.index];
  const int64_t half = rotated_ / 2, row_bytes = cache.size * bytes_of(cache.type);
  float* rows = at(in.from);
  for_rows(pass.rows, 2 * in.from.width, pass.threads, [&](int64_t i) {
    float* x = rows + i * stride(in.from);
    const float *cos = pass.cos + pass.positions[i] * half, *sin = pass.sin + pass.positions[i] * half;
    for (int64_t h = 0; h < in.heads + cache.kv_heads; h++) {
      const float* weight = h < in.heads ? in.q_norm : in.k_norm;
      if (weight) rms_norm(x + h * cache.size, weight, cache.size, in.eps, x + h * cache.size);
      rotate_head(x + h * cache.size, cos, sin, half);
    }
    const float *keys = x + in.heads * cache.size, *values = keys + cache.kv_heads * cache.size;
    for (int64_t g = 0; g < cache.kv_heads; g++) {
      const int64_t at = pass.slots[i] * cache.kv_heads + g;
      const bool scaled = cache.type == KvType::kInt8;
      store_key(keys + g * cache.size, cache.type, cache.size, cache.keys + at * row_bytes,
                scaled ? cache.k_scale + at : nullptr);
      store_key(values + g * cache.size, cache.type, cache.size, cache.values + at * row_bytes,
                scaled ? cache.v_scale + at : nullptr);
    }
  });
}

void Program::attend(const Instruction& in, const Pass& pass) {
  const KvCache& cache = caches_[in.index];
  const int64_t bytes = bytes_of(cache.type), slot = cache.kv_heads * cache.size * bytes;
  float* out = at(in.to);
  // two calls: under the causal mask runs of queries share every chunk of keys, trees need their bits looked at
  for (const bool causal : {true, false}) {
    const int64_t first = causal ? 0 : pass.causal, last = causal ? pass.causal : pass.requests;
    const int64_t row = pass.cu_seqlens[first], count = pass.cu_seqlens[last] - row;
    if (!count) continue;
    std::vector<int32_t> cu(last - first + 1);
    for (int64_t b = first; b <= last; b++) cu[b - first] = pass.cu_seqlens[b] - (int32_t)row;
    spec_decode::Attention a{};
    a.requests = last - first, a.heads = in.heads, a.kv_heads = cache.kv_heads, a.size = cache.size;
    a.q = reinterpret_cast<const char*>(at(in.from) + row * stride(in.from));
    a.q_row_stride = stride(in.from) * 4, a.q_head_stride = cache.size * 4;
    a.type = spec_decode::Type::kFloat32;
    a.keys = {cache.keys, cache.page_size * slot, slot, cache.size * bytes};
    a.values = {cache.values, cache.page_size * slot, slot, cache.size * bytes};
    a.cache_type = (spec_decode::Type)cache.type;
    a.num_pages = cache.pages, a.page_size = cache.page_size;
    a.block_table = pass.block_table + first * pass.max_pages, a.max_pages = pass.max_pages;
    a.cache_seqlens = pass.cache_seqlens + first;
    a.cu_seqlens_q = cu.data();
    if (!causal) {
      a.mask_bits = pass.mask_bits, a.mask_words = pass.mask_words;
      a.tree_lens = pass.tree_lens + first;
    }
    if (cache.type == KvType::kInt8) {
      a.k_scale = {cache.k_scale, cache.page_size * cache.kv_heads, cache.kv_heads, 1};
      a.v_scale = {cache.v_scale, cache.page_size * cache.kv_heads, cache.kv_heads, 1};
    }
    if (in.gate.buffer >= 0) {
      a.gate = reinterpret_cast<const char*>(at(in.gate) + row * stride(in.gate));
      a.gate_row_stride = stride(in.gate);
      a.gate_one = in.gate.width == in.heads;
      a.gate_type = spec_decode::Type::kFloat32;
    }
    a.softmax_scale = in.scale;
    a.out = reinterpret_cast<char*>(out + row * in.to.width);
    spec_decode::tree_attention(a, pass.threads);
  }
}

// -- experts ----------------------------------------------------------------------------------------------------------
void Program::moe(const Instruction& in, const Pass& pass, int64_t rows) {
  const Experts& e = experts_[in.index];
  const float* scores = at(in.gate);
  std::vector<int64_t> ids(rows * e.top_k);
  std::vector<float> weights(rows * e.top_k);
  std::vector<char> used(e.experts, 0);
  std::vector<int64_t> order(e.experts);
  for (int64_t i = 0; i < rows; i++) {
    const float* row = scores + i * stride(in.gate);
    std::iota(order.begin(), order.end(), int64_t{0});
    const auto better = [row](int64_t a, int64_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; };
    // a nan has no rank: its row goes to the first experts, with weights that are nan
    if (std::none_of(row, row + e.experts, [](float score) { return std::isnan(score); }))
      std::partial_sort(order.begin(), order.begin() + e.top_k, order.end(), better);
    float total = 0, chosen = 0;
    for (int64_t j = 0; j < e.experts; j++) total += std::exp(row[j] - row[order[0]]);
    for (int64_t j = 0; j < e.top_k; j++) {
      ids[i * e.top_k + j] = order[j];
      used[order[j]] = 1;
      chosen += weights[i * e.top_k + j] = std::exp(row[order[j]] - row[order[0]]) / total;
    }
    if (e.rescale)
      for (int64_t j = 0; j < e.top_k; j++) weights[i * e.top_k + j] /= chosen;
  }
  touched_[0] += std::accumulate(used.begin(), used.end(), int64_t{0});
  touched_[1] += 1;
  float *to = at(in.to), *from = at(in.from);
  if (e.packed) {
    int4::moe(e.w13, e.w2, from, int4::Type::kF32, rows, e.top_k, ids.data(), weights.data(), to, in.mode,
              pass.threads);
    return;
  }
  std::fill_n(to, rows * e.hidden, 0.0f);
  std::vector<float> x, up, down(rows * e.top_k * e.hidden);
  std::vector<int64_t> pairs;
  const int64_t bytes = bytes_of(e.type);
  for (int64_t expert = 0; expert < e.experts; expert++) {
    if (!used[expert]) continue;
    pairs.clear();
    for (int64_t i = 0; i < rows * e.top_k; i++)
      if (ids[i] == expert) pairs.push_back(i);
    const auto count = (int64_t)pairs.size();
    x.resize(count * e.hidden), up.resize(count * 2 * e.inner);
    for (int64_t i = 0; i < count; i++)
      std::memcpy(x.data() + i * e.hidden, from + pairs[i] / e.top_k * e.hidden, e.hidden * 4);
    const Dense w13{
        e.dense13 + expert * 2 * e.inner * e.hidden * bytes, e.type, 2 * e.inner, e.hidden, nullptr, e.type};
    const Dense w2{e.dense2 + expert * e.hidden * e.inner * bytes, e.type, e.hidden, e.inner, nullptr, e.type};
    linear(w13, x.data(), e.hidden, up.data(), 2 * e.inner, count, pass.threads);
    for (int64_t i = 0; i < count; i++)
      int4::silu_mul(up.data() + i * 2 * e.inner, up.data() + i * 2 * e.inner + e.inner, e.inner);
    linear(w2, up.data(), 2 * e.inner, x.data(), e.hidden, count, pass.threads);
    for (int64_t i = 0; i < count; i++)
      std::memcpy(down.data() + pairs[i] * e.hidden, x.data() + i * e.hidden, e.hidden * 4);
  }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < e.top_k; j++)
      for (int64_t d = 0; d < e.hidden; d++)
        to[i * e.hidden + d] += weights[i * e.top_k + j] * down[(i * e.top_k + j) * e.hidden + d];
}

}  // namespace m3::decoder
