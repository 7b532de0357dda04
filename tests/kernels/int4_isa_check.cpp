// Stand-alone check of the CPU kernels on an architecture that Python does not run on here (AArch64 under QEMU).
//
// usage: int4_isa_check isas        prints the instruction sets that the build and the CPU can run
//        int4_isa_check SEED        compares each with a product in double, computed from the layout alone
// Prints one line per failed case; exit status 1 if there is one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/isa.h"
#include "int4/gemm_cpu_driver.h"

using namespace m3;
using namespace m3::int4;

namespace {

struct Case {
  int64_t m, n, k, group_size;
  bool zeros, act_order;
  Type scale_type;
};

// Bits of a scale in a 16-bit type. The scales of this check, 1/64 to 127/64, are normal there and need no rounding.
uint16_t half_bits(float value, Type type) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (type == Type::kBF16) return bits >> 16;
  return (uint16_t)(((bits >> 23) - 112) << 10 | (bits >> 13 & 0x3FF));
}

// Error that rounding x may add (RMS over RMS), and fp32 accumulation: TOLERANCE and ACTIVATION_ERROR of reference.py.
constexpr int kPublicModes = 3;
constexpr double kBound[kPublicModes] = {2e-6, 5e-5, 8e-3};
const char* const kModeNames[kPublicModes] = {"exact", "int16", "int8"};

struct Problem {
  std::vector<float> x;
  std::vector<uint8_t> tiles, zeros;
  std::vector<char> scales;
  std::vector<int32_t> perm;
  std::vector<double> y;  // (m, n)
  Weights weights;
};

Problem make(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const int64_t n_tiles = (c.n + kTileN - 1) / kTileN, k_tiles = (c.k + kTileK - 1) / kTileK;
  const int64_t groups = group_of_tile(k_tiles - 1, c.group_size, 0) + 1;
  Problem p;
  p.x.resize(c.m * c.k);
  for (float& value : p.x) value = normal(random);
  p.perm.resize(c.k);
  for (int64_t k = 0; k < c.k; k++) p.perm[k] = (int32_t)k;
  if (c.act_order) std::shuffle(p.perm.begin(), p.perm.end(), random);
  p.tiles.assign(n_tiles * k_tiles * kTileBytes, 0);
  p.zeros.assign(n_tiles * groups * kTileN, 8);
  const int64_t scale_bytes = c.scale_type == Type::kF32 ? 4 : 2;
  p.scales.assign(n_tiles * groups * kTileN * scale_bytes, 0);

  std::vector<double> dense(c.n * c.k), scale(c.n * groups);
  std::vector<int> zero(c.n * groups, 8);
  for (int64_t n = 0; n < c.n; n++)
    for (int64_t g = 0; g < groups; g++) {
      const float value = (float)(random() % 127 + 1) / 64.0f;
      const int64_t cell = (n / kTileN * groups + g) * kTileN + position_of_row((int)(n % kTileN));
      scale[n * groups + g] = value;
      const uint16_t bits = half_bits(value, c.scale_type);
      std::memcpy(p.scales.data() + cell * scale_bytes, c.scale_type == Type::kF32 ? (const void*)&value : &bits,
                  scale_bytes);
      if (c.zeros) zero[n * groups + g] = p.zeros[cell] = (uint8_t)(random() % 17);
    }
  for (int64_t n = 0; n < c.n; n++)
    for (int64_t tile = 0; tile < k_tiles; tile++)
      for (int t = 0; t < 4; t++)
        for (int b = 0; b < 4; b++) {
          const int64_t k = tile * kTileK + byte_column(t, b), row = n % kTileN;
          const int64_t byte =
              (n / kTileN * k_tiles + tile) * kTileBytes + chunk_offset((int)(row & 7), t) + 4 * (row / 16) + b;
          const int nibble = (int)(random() % 16), g = (int)group_of_tile(tile, c.group_size, 0);
          p.tiles[byte] |= (uint8_t)(nibble << (row & 8 ? 4 : 0));
          if (k < c.k) dense[n * c.k + p.perm[k]] = (nibble - zero[n * groups + g]) * scale[n * groups + g];
        }
  p.y.assign(c.m * c.n, 0.0);
  for (int64_t m = 0; m < c.m; m++)
    for (int64_t n = 0; n < c.n; n++)
      for (int64_t k = 0; k < c.k; k++) p.y[m * c.n + n] += (double)p.x[m * c.k + k] * dense[n * c.k + k];
  p.weights = {p.tiles.data(),
               p.scales.data(),
               c.zeros ? p.zeros.data() : nullptr,
               c.act_order ? p.perm.data() : nullptr,
               c.scale_type,
               1,
               c.n,
               c.k,
               c.group_size,
               0};
  return p;
}

std::vector<float> multiply(const Problem& p, int64_t first, int64_t rows, Mode mode, int threads) {
  const Weights& w = p.weights;
  std::vector<float> y(rows * w.n, std::nanf(""));
  const int64_t offsets[2] = {0, rows};
  gemm("check", w, {p.x.data() + first * w.k, Type::kF32, w.k, y.data(), Type::kF32, w.n, offsets, nullptr, nullptr},
       mode, threads);
  return y;
}

bool close(const std::vector<float>& y, const std::vector<double>& wanted, double bound, double& error) {
  double square = 0.0, total = 0.0;
  for (size_t i = 0; i < y.size(); i++)
    square += (y[i] - wanted[i]) * (y[i] - wanted[i]), total += wanted[i] * wanted[i];
  error = std::sqrt(square / total);
  return error <= bound;  // false for a NaN
}

int check_products(unsigned seed) {
  int failures = 0;
  for (const Case& c :
       {Case{1, 64, 16, -1, false, false, Type::kF32}, Case{1, 1, 1, 32, true, false, Type::kF16},
        Case{5, 70, 100, 32, true, false, Type::kF16}, Case{23, 129, 272, 128, false, false, Type::kBF16},
        Case{4, 65, 144, -1, true, true, Type::kF32}, Case{13, 64, 200, 64, true, true, Type::kBF16}})
    for (int mode = 0; mode < kPublicModes; mode++)
      for (const std::string& isa : isas()) {
        const Problem p = make(c, seed);
        set_isa(isa);
        const std::vector<float> y = multiply(p, 0, c.m, Mode(mode), 1);
        double error;
        const auto complain = [&](const char* what) {
          std::printf("%s %s: M=%ld N=%ld K=%ld group %ld: %s (error %.2e)\n", isa.c_str(), kModeNames[mode], (long)c.m,
                      (long)c.n, (long)c.k, (long)c.group_size, what, error);
          failures++;
        };
        if (!close(y, p.y, kBound[mode], error)) complain("not the product");
        if (std::memcmp(multiply(p, 0, c.m, Mode(mode), 2).data(), y.data(), y.size() * 4))
          complain("depends on the threads");
        for (int64_t row : {int64_t{0}, c.m / 2, c.m - 1})
          if (std::memcmp(multiply(p, row, 1, Mode(mode), 1).data(), y.data() + row * c.n, c.n * 4))
            complain("row depends on its neighbours");
      }
  return failures;
}

int check_silu(unsigned seed) {
  int failures = 0;
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-100.0f, 100.0f);
  for (const Kernels* kernels : {
           &kScalarKernels,
#if defined(__aarch64__)
           &kNeonKernels,
#endif
       })
    for (int64_t count : {0, 1, 3, 4, 1003}) {
      std::vector<float> gate(count), up(count), out;
      for (float& value : gate) value = uniform(random);
      for (float& value : up) value = uniform(random);
      out = gate;
      kernels->silu_mul(out.data(), up.data(), count);
      for (int64_t i = 0; i < count; i++) {
        const double wanted = gate[i] / (1.0 + std::exp(-(double)gate[i])) * up[i];
        if (std::fabs(out[i] - wanted) <= 1e-6 * std::fabs(wanted) + 1e-34)
          continue;  // exp(-gate) leaves fp32 below -88
        std::printf("%s silu_mul: gate %g up %g: want %g; got %g\n", kernels->name, gate[i], up[i], wanted, out[i]);
        failures++;
      }
    }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "0";
  if (what == "isas") {
    for (const std::string& isa : isas()) std::printf("%s\n", isa.c_str());
    return 0;
  }
  const auto seed = (unsigned)std::strtoul(what.c_str(), nullptr, 10);
  return check_products(seed) + check_silu(seed) > 0;
}
