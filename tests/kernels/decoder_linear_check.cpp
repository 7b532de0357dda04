// linear of every instruction set that this CPU runs, against sums in double: values, rows that do not see each other,
// threads that change no bit. Exit status 1 on a failure.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/half.h"
#include "common/isa.h"
#include "decoder/linear_cpu_driver.h"

using namespace m3;
using namespace m3::decoder;

namespace {

constexpr int64_t kRows = 41, kFirst = 4;  // rows of a batch; the first of the smaller ones
constexpr double kTolerance = 1e-6;        // of the whole, RMS: sums of fp32 in a fixed order

int failures = 0;

void fail(const std::string& isa, const Dense& w, const char* what, double got) {
  failures++;
  std::printf("%s N=%ld K=%ld type %d: %s: %g\n", isa.c_str(), (long)w.n, (long)w.k, int(w.type), what, got);
}

struct Weight {
  std::vector<float> floats, bias;  // as the kernel should read them
  std::vector<uint16_t> halves;
  Dense dense;

  Weight(Type type, int64_t n, int64_t k, std::mt19937& generator) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; i++) bias.push_back(normal(generator));
    for (int64_t i = 0; i < n * k; i++) {
      const float value = normal(generator);
      const uint16_t half = type == Type::kBF16 ? float_to_bf16(value) : float_to_f16(value);
      halves.push_back(half);
      floats.push_back(type == Type::kF32 ? value : type == Type::kBF16 ? bf16_to_float(half) : f16_to_float(half));
    }
    const void* data = type == Type::kF32 ? (const void*)floats.data() : (const void*)halves.data();
    dense = {data, type, n, k, bias.data(), Type::kF32};
  }
};

void check(const std::string& isa, Type type, int64_t n, int64_t k, std::mt19937& generator) {
  const Weight weight(type, n, k, generator);
  const int64_t x_stride = k + 3, y_stride = n + 5;  // rows at odd distances
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * x_stride), y(kRows * y_stride);
  for (float& value : x) value = normal(generator);
  linear(weight.dense, x.data(), x_stride, y.data(), y_stride, kRows, 2);

  double error = 0, total = 0;
  for (int64_t i = 0; i < kRows; i++)
    for (int64_t j = 0; j < n; j++) {
      double exact = weight.bias[j];
      for (int64_t c = 0; c < k; c++) exact += (double)x[i * x_stride + c] * weight.floats[j * k + c];
      error += std::pow(exact - y[i * y_stride + j], 2), total += exact * exact;
    }
  const double relative = std::sqrt(error / total);
  if (!(relative <= kTolerance)) fail(isa, weight.dense, "error", relative);

  for (const int64_t rows : {1, 2, 3, 5, 8, 13, 25})
    for (const int threads : {1, 3}) {
      std::vector<float> again(rows * y_stride);
      linear(weight.dense, x.data() + kFirst * x_stride, x_stride, again.data(), y_stride, rows, threads);
      for (int64_t i = 0; i < rows; i++)
        if (std::memcmp(again.data() + i * y_stride, y.data() + (kFirst + i) * y_stride, n * sizeof(float)))
          fail(isa, weight.dense, "other bits in a batch of", (double)rows);
    }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "isas")) {
    for (const std::string& isa : isas()) std::printf("%s\n", isa.c_str());
    return 0;
  }
  std::mt19937 generator((unsigned)std::strtoul(argc > 1 ? argv[1] : "0", nullptr, 10));
  for (const std::string& isa : isas()) {
    set_isa(isa);
    for (const Type type : {Type::kF32, Type::kBF16, Type::kF16})
      for (const int64_t n : {1, 4, 5, 67, 131})
        for (const int64_t k : {1, 16, 33, 576, 1030}) check(isa, type, n, k, generator);
  }
  return failures > 0;
}
