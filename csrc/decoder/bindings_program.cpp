// Python border of the decoder family: programs. Addresses and sizes of tensors that Python keeps alive.
#include <pybind11/stl.h>

#include <memory>

#include "common/border.h"
#include "decoder/program_cpu.h"
#include "int4/border_cpu.h"

namespace py = pybind11;

namespace m3::decoder {
void bind_program(pybind11::module_& module);
}

namespace m3::decoder {
namespace {

constexpr const char* kOp = "decoder_pass";
constexpr int64_t kMost = int64_t{1} << 31;

using OperandTuple = std::tuple<int, int64_t, int64_t>;                           // buffer, column, width
using DenseTuple = std::tuple<SpanTuple, int, int64_t, int64_t, SpanTuple, int>;  // weight, type, N, K, bias, type
using CacheTuple = std::tuple<SpanTuple, SpanTuple, SpanTuple, SpanTuple, int, int64_t, int64_t, int64_t, int64_t>;
using ArrayTuple = std::tuple<SpanTuple, int64_t, int64_t>;  // (rows, width) contiguous

Operand operand_of(const OperandTuple& tuple) {
  const auto& [buffer, column, width] = tuple;
  check(column >= 0 && column < kMost && width >= 0 && width < kMost, kOp, "columns", "numbers in 0 .. 2**31 - 1",
        std::to_string(width) + " from " + std::to_string(column));
  return {buffer, column, width};
}

Type type_of(const char* argument, int type) {
  check(type >= 0 && type <= 2, kOp, argument, "dtype 0 (float32), 1 (bfloat16) or 2 (float16)", type);
  return Type(type);
}

void check_size(const char* argument, int64_t size) {
  check(size >= 1 && size < kMost, kOp, argument, "sizes in 1 .. 2**31 - 1", size);
}

Instruction plain(Op op, const OperandTuple& to, const OperandTuple& from) {
  Instruction in;
  in.op = op, in.to = operand_of(to), in.from = operand_of(from);
  return in;
}

const OperandTuple kNone{-1, 0, 0};

void embed(Program& p, const OperandTuple& to, SpanTuple table, int type, int64_t rows) {
  Instruction in = plain(Op::kEmbed, to, kNone);
  check_size("embed", rows);
  check_span(kOp, "embed", table, elements(kOp, "embed", {rows, in.to.width}), false);
  in.table = at<void>(table), in.type = type_of("embed", type), in.rows = rows;
  p.add(in);
}

void norm(Program& p, const OperandTuple& to, const OperandTuple& from, SpanTuple weight, float eps) {
  Instruction in = plain(Op::kNorm, to, from);
  check_span(kOp, "norm", weight, in.from.width, false);
  in.table = at<void>(weight), in.eps = eps;
  p.add(in);
}

void dense(Program& p, const OperandTuple& to, const OperandTuple& from, const DenseTuple& weight) {
  const auto& [data, type, n, k, bias, bias_type] = weight;
  Instruction in = plain(Op::kDense, to, from);
  check_size("weight", n), check_size("weight", k);
  check_span(kOp, "weight", data, elements(kOp, "weight", {n, k}), false);
  check_span(kOp, "bias", bias, n, true);
  in.dense = {at<void>(data), type_of("weight", type), n, k, at<void>(bias), type_of("bias", bias_type)};
  p.add(in);
}

void packed(Program& p, const OperandTuple& to, const OperandTuple& from, const int4::WeightTuple& weight,
            SpanTuple bias, int mode) {
  Instruction in = plain(Op::kInt4, to, from);
  in.packed = int4::weights_of(kOp, weight);
  check(in.packed.experts == 1, kOp, "weight", "one weight, no experts", in.packed.experts);
  check_span(kOp, "bias", bias, in.packed.n, true);
  in.bias = at<float>(bias), in.mode = int4::mode_of(kOp, mode);
  p.add(in);
}

void rotate(Program& p, const OperandTuple& from, int cache, int64_t heads, SpanTuple q_norm, SpanTuple k_norm,
            float eps) {
  Instruction in = plain(Op::kRotate, kNone, from);
  const int64_t size = p.head_size(cache);
  check_span(kOp, "q_norm", q_norm, size, true);
  check_span(kOp, "k_norm", k_norm, size, true);
  in.index = cache, in.heads = heads, in.q_norm = at<float>(q_norm), in.k_norm = at<float>(k_norm), in.eps = eps;
  p.add(in);
}

void attend(Program& p, const OperandTuple& to, const OperandTuple& from, const OperandTuple& gate, int cache,
            int64_t heads, float scale) {
  Instruction in = plain(Op::kAttend, to, from);
  in.gate = operand_of(gate), in.index = cache, in.heads = heads, in.scale = scale;
  p.add(in);
}

void moe(Program& p, const OperandTuple& to, const OperandTuple& from, const OperandTuple& scores, int experts,
         int mode) {
  Instruction in = plain(Op::kMoe, to, from);
  in.gate = operand_of(scores), in.index = experts, in.mode = int4::mode_of(kOp, mode);
  p.add(in);
}

int add_cache(Program& p, const CacheTuple& tuple) {
  const auto& [keys, values, k_scale, v_scale, type, pages, page_size, kv_heads, size] = tuple;
  check(type >= 0 && type <= 3, kOp, "cache", "dtype 0 (fp32), 1 (bf16), 2 (fp16) or 3 (int8)", type);
  for (int64_t each : {pages, page_size, kv_heads, size}) check_size("cache", each);
  const int64_t rows = elements(kOp, "cache", {pages, page_size, kv_heads}), all = elements(kOp, "cache", {rows, size});
  check_span(kOp, "keys", keys, all, false);
  check_span(kOp, "values", values, all, false);
  check_span(kOp, "k_scale", k_scale, rows, type != 3);
  check_span(kOp, "v_scale", v_scale, rows, type != 3);
  return p.add_cache({at<char>(keys), at<char>(values), at<float>(k_scale), at<float>(v_scale), KvType(type), pages,
                      page_size, kv_heads, size});
}

int add_packed_experts(Program& p, const int4::WeightTuple& w13, const int4::WeightTuple& w2, int64_t top_k,
                       bool rescale) {
  Experts e{};
  e.packed = true, e.w13 = int4::weights_of(kOp, w13), e.w2 = int4::weights_of(kOp, w2);
  e.experts = e.w13.experts, e.hidden = e.w13.k, e.inner = e.w2.k, e.top_k = top_k, e.rescale = rescale;
  const bool fit = e.w2.experts == e.experts && e.w2.n == e.hidden && e.w13.n == 2 * e.inner;
  check(fit, kOp, "w2", "the transpose of w13's shape", e.w2.n);
  return p.add_experts(e);
}

int add_dense_experts(Program& p, SpanTuple w13, SpanTuple w2, int type, int64_t experts, int64_t hidden, int64_t inner,
                      int64_t top_k, bool rescale) {
  for (int64_t each : {experts, hidden, inner}) check_size("experts", each);
  check_span(kOp, "w13", w13, elements(kOp, "w13", {experts, 2, inner, hidden}), false);
  check_span(kOp, "w2", w2, elements(kOp, "w2", {experts, inner, hidden}), false);
  Experts e{};
  e.packed = false, e.dense13 = at<char>(w13), e.dense2 = at<char>(w2), e.type = type_of("experts", type);
  e.experts = experts, e.hidden = hidden, e.inner = inner, e.top_k = top_k, e.rescale = rescale;
  return p.add_experts(e);
}

std::vector<Array> arrays_of(const char* argument, const std::vector<ArrayTuple>& tuples) {
  std::vector<Array> arrays;
  for (const auto& [span, rows, width] : tuples) {
    check(rows >= 0 && width >= 0 && rows < kMost && width < kMost, kOp, argument, "sizes below 2**31", width);
    check_span(kOp, argument, span, rows * width, false);
    arrays.push_back({at<float>(span), width, width});
  }
  return arrays;
}

// rows: (tokens, positions, slots); sequences: (cu_seqlens, cache_seqlens, tree_lens, block_table, max_pages, causal)
void run(Program& p, const std::tuple<SpanTuple, SpanTuple, SpanTuple>& rows,
         const std::tuple<SpanTuple, SpanTuple, SpanTuple, SpanTuple, int64_t, int64_t>& sequences,
         const std::tuple<SpanTuple, int64_t>& mask, SpanTuple picked,
         const std::tuple<SpanTuple, SpanTuple, int64_t>& angles, const std::vector<ArrayTuple>& inputs,
         const std::vector<ArrayTuple>& outputs, int threads) {
  const auto& [tokens, positions, slots] = rows;
  const auto& [cu, seqlens, tree, table, max_pages, causal] = sequences;
  const auto& [cos, sin, half] = angles;
  Pass pass{};
  pass.rows = std::get<1>(tokens), pass.requests = std::get<1>(seqlens), pass.causal = causal;
  pass.num_picked = std::get<1>(picked);
  for (const auto& [name, count] : {std::pair{"tokens", pass.rows}, std::pair{"cache_seqlens", pass.requests},
                                    std::pair{"picked", pass.num_picked}, std::pair{"cos", std::get<1>(cos)}})
    check(count >= 0 && count < kMost, kOp, name, "sizes in 0 .. 2**31 - 1", count);
  for (const auto& [name, span] :
       {std::pair{"tokens", tokens}, std::pair{"positions", positions}, std::pair{"slots", slots}})
    check_span(kOp, name, span, pass.rows, false);
  check_span(kOp, "cache_seqlens", seqlens, pass.requests, false);
  check_span(kOp, "picked", picked, pass.num_picked, false);
  check_span(kOp, "cu_seqlens", cu, pass.requests + 1, false);
  check(max_pages >= 0 && max_pages < kMost, kOp, "block_table", "sizes below 2**31", max_pages);
  check_span(kOp, "block_table", table, pass.requests * max_pages, false);
  check(causal >= 0 && causal <= pass.requests, kOp, "causal", "0.." + std::to_string(pass.requests), causal);
  check_span(kOp, "tree_lens", tree, causal < pass.requests ? pass.requests : 0, false);
  pass.tokens = at<int64_t>(tokens), pass.positions = at<int64_t>(positions), pass.slots = at<int64_t>(slots);
  pass.cu_seqlens = at<int32_t>(cu), pass.cache_seqlens = at<int32_t>(seqlens), pass.tree_lens = at<int32_t>(tree);
  pass.block_table = at<int32_t>(table), pass.max_pages = max_pages;
  const auto& [bits, words] = mask;
  check(words >= 0 && words <= 32, kOp, "mask_bits", "at most 32 words a row", words);
  check(pass.cu_seqlens[causal] >= 0 && pass.cu_seqlens[causal] <= pass.rows, kOp, "cu_seqlens",
        "0.." + std::to_string(pass.rows), pass.cu_seqlens[causal]);
  check_span(kOp, "mask_bits", bits, (pass.rows - pass.cu_seqlens[causal]) * words, false);
  pass.mask_bits = at<int32_t>(bits), pass.mask_words = words;
  pass.picked = at<int64_t>(picked);
  check(half >= 1 && half < kMost, kOp, "cos", "a width of at least 1", half);
  check_span(kOp, "cos", cos, std::get<1>(cos), false);
  check_span(kOp, "sin", sin, std::get<1>(cos), false);
  check(half * 2 == p.rotated(), kOp, "cos", std::to_string(p.rotated() / 2) + " columns", half);
  pass.cos = at<float>(cos), pass.sin = at<float>(sin), pass.angles = std::get<1>(cos) / half;
  pass.inputs = arrays_of("inputs", inputs), pass.outputs = arrays_of("outputs", outputs);
  for (size_t i = 0; i < inputs.size(); i++)
    check(std::get<1>(inputs[i]) == pass.rows, kOp, "inputs", std::to_string(pass.rows) + " rows",
          std::get<1>(inputs[i]));
  for (size_t i = 0; i < outputs.size(); i++) {
    const int64_t want = p.output_rows((int)i, pass);
    check(want < 0 || std::get<1>(outputs[i]) == want, kOp, "outputs", std::to_string(want) + " rows",
          std::get<1>(outputs[i]));
  }
  pass.threads = threads;
  py::gil_scoped_release release;
  p.run(pass);
}

std::vector<std::pair<std::string, double>> profile(Program& p, bool on) {
  static const char* const kNames[] = {"embed", "load", "store",    "pick",   "copy",   "add", "norm",
                                       "dense", "int4", "silu_mul", "rotate", "attend", "moe"};
  const auto seconds = p.profile(on);
  std::vector<std::pair<std::string, double>> found;
  for (size_t i = 0; i < seconds.size(); i++) found.emplace_back(kNames[i], seconds[i]);
  return found;
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Program>(m, "DecoderProgram", "Instructions over buffers of rows: see m3kernels.decoder.program.")
      .def(py::init<std::vector<int64_t>, std::vector<bool>, int64_t>())
      .def("embed", &embed)
      .def("norm", &norm)
      .def("dense", &dense)
      .def("int4", &packed)
      .def("rotate", &rotate)
      .def("attend", &attend)
      .def("moe", &moe)
      .def("add_cache", &add_cache)
      .def("add_packed_experts", &add_packed_experts)
      .def("add_dense_experts", &add_dense_experts)
      .def("pick",
           [](Program& p, const OperandTuple& to, const OperandTuple& from) { p.add(plain(Op::kPick, to, from)); })
      .def("copy",
           [](Program& p, const OperandTuple& to, const OperandTuple& from) { p.add(plain(Op::kCopy, to, from)); })
      .def("add",
           [](Program& p, const OperandTuple& to, const OperandTuple& from) { p.add(plain(Op::kAdd, to, from)); })
      .def("silu_mul",
           [](Program& p, const OperandTuple& to, const OperandTuple& from) { p.add(plain(Op::kSiluMul, to, from)); })
      .def("load",
           [](Program& p, const OperandTuple& to, int index) {
             Instruction in = plain(Op::kLoad, to, kNone);
             in.index = index;
             p.add(in);
           })
      .def("store",
           [](Program& p, int index, const OperandTuple& from) {
             Instruction in = plain(Op::kStore, kNone, from);
             in.index = index;
             p.add(in);
           })
      .def("run", &run)
      .def("profile", &profile)
      .def("experts_touched", &Program::experts_touched);
}

}  // namespace m3::decoder
