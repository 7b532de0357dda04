// One product of few rows on the emulated device, from a file to a file: so that the kernel can be compiled with
// mistakes planted in the index maps it includes. Run by test_int4_mutations.py.
//   check IN OUT M N K G     in: x fp16 (M, K), qweight, scales fp16 (one group of size G a run); out: y fp32 (M, N)
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "int4/gemm_decode.cu"

using namespace m3::int4;

template <class T>
static std::vector<T> read(FILE* file, int64_t count) {
  std::vector<T> values((size_t)count + 16);
  if (fread(values.data(), sizeof(T), (size_t)count, file) != (size_t)count) std::exit(3);
  return values;
}

int main(int count, char** arguments) {
  if (count != 7) return 2;
  Product p{};
  p.rows = p.x_rows = std::atoll(arguments[3]), p.n = std::atoll(arguments[4]), p.k = std::atoll(arguments[5]);
  p.group_size = std::atoll(arguments[6]), p.experts = 1;
  p.x_type = p.scale_type = DeviceType::kF16, p.epilogue = Epilogue::kFloat;
  FILE* in = fopen(arguments[1], "rb");
  if (!in) return 3;
  const auto x = read<uint16_t>(in, p.rows * p.k);
  const auto words = read<uint32_t>(in, p.n_tiles() * p.k_tiles() * kTileWords);
  const auto scales = read<uint16_t>(in, p.n_tiles() * p.groups() * kTileN);
  fclose(in);
  std::vector<uint4> aligned(words.size() / 4 + 1);
  std::memcpy(aligned.data(), words.data(), words.size() * 4);
  std::vector<float> y((size_t)(p.rows * p.n));
  p.x = x.data(), p.qweight = aligned.data(), p.scales = scales.data(), p.y = y.data();
  p.plan = plan_of(p.n, p.k, false, 4);
  std::vector<float4> workspace((size_t)decode_workspace(p) / 4 + 1);
  std::vector<int32_t> counters((size_t)decode_counters(p) + 1);
  p.workspace = (float*)workspace.data(), p.counters = counters.data();
  try {
    gemm_decode(p);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  FILE* out = fopen(arguments[2], "wb");
  fwrite(y.data(), 4, y.size(), out);
  fclose(out);
  return 0;
}
