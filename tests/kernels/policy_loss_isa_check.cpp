// Stand-alone check of the tile kernels on an architecture that Python does not run on here (AArch64 under QEMU).
//
// usage: policy_loss_isa_check SEED    compares each instruction set with the formulas in double
// Prints one line per failed case; exit status 1 if there is one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/isa.h"
#include "policy_loss/tiles_cpu_driver.h"

using namespace m3;
using namespace m3::policy_loss;

namespace {

constexpr double kBound = 4e-6;  // error over the largest exact value: fp32 sums of 10^3 terms, logits of size 10
constexpr int64_t kRows = 5, kIds = 3, kFirst = 100;
constexpr float kScale = 0.5f, kSoftcap = 20.0f;

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

int failures = 0;

void compare(const std::string& isa, const char* what, int64_t columns, const Floats& got, const Doubles& wanted) {
  double error = 0.0, largest = 1e-30;
  for (size_t i = 0; i < got.size(); i++) {
    const double difference = std::fabs(got[i] - wanted[i]);
    error = difference <= error ? error : difference;  // nan stays
    largest = std::fmax(largest, std::fabs(wanted[i]));
  }
  if (error <= kBound * largest) return;
  std::printf("%s %s C=%ld: error %.2e of %.2e\n", isa.c_str(), what, (long)columns, error, largest);
  failures++;
}

void demand(const std::string& isa, const char* what, int64_t columns, const Floats& a, const Floats& b) {
  if (!a.empty() && !std::memcmp(a.data(), b.data(), a.size() * 4)) return;
  std::printf("%s %s C=%ld: depends on the threads\n", isa.c_str(), what, (long)columns);
  failures++;
}

struct Inputs {
  int64_t columns;
  Floats z, teacher, bias, inverse, base, slope, square, picked, complement, weight;
  std::vector<int64_t> ids;

  Inputs(int64_t c, unsigned seed) : columns(c) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](Floats& values, int64_t count, float size, float offset) {
      values.resize(count);
      for (float& value : values) value = normal(random) * size + offset;
    };
    fill(z, kRows * c, 8.0f, 0.0f), fill(teacher, kRows * c, 4.0f, 0.0f), fill(bias, c, 1.0f, 0.0f);
    fill(inverse, kRows, 0.1f, 1.0f), fill(base, kRows, 1.0f, 0.0f), fill(slope, kRows, 1.0f, 0.0f);
    fill(square, kRows, 1.0f, 0.0f), fill(picked, kRows * kIds, 1.0f, 0.0f);
    fill(complement, kRows * kIds, 1.0f, 0.0f), fill(weight, kRows, 1.0f, 0.0f);
    for (int64_t i = 0; i < kRows; i++)
      for (int64_t id : {kFirst, kFirst + c - 1, kFirst + c}) ids.push_back(id);  // the last is in the next tile
  }
};

// z' of the tile, and the outputs of statistics: maximum, total, picked, weighted, squared.
struct Sums {
  Floats z, maximum, total, picked, weighted, squared;
};

Sums run_statistics(const Inputs& in, int threads) {
  Sums s{in.z,         Floats(kRows, -HUGE_VALF), Floats(kRows), Floats(kRows * kIds, -HUGE_VALF), Floats(kRows),
         Floats(kRows)};
  const Statistics a{s.z.data(),       kRows,
                     in.columns,       in.columns,
                     kFirst,           {in.bias.data(), kScale, kSoftcap, in.inverse.data()},
                     in.ids.data(),    kIds,
                     s.maximum.data(), s.total.data(),
                     s.picked.data(),  s.weighted.data(),
                     s.squared.data()};
  statistics(a, threads);
  return s;
}

void check_statistics(const std::string& isa, const Inputs& in) {
  const Sums s = run_statistics(in, 1), again = run_statistics(in, 2);
  const int64_t c = in.columns;
  Doubles z(kRows * c), lse(kRows), entropy(kRows), sum_sq(kRows);
  Floats got_lse(kRows), got_entropy(kRows), got_sum_sq(kRows);
  for (int64_t i = 0; i < kRows; i++) {
    double total = 0.0, weighted = 0.0, squared = 0.0;
    for (int64_t j = 0; j < c; j++) {
      const double u = kScale * ((double)in.z[i * c + j] + in.bias[j]);
      z[i * c + j] = kSoftcap * std::tanh(u / kSoftcap) * in.inverse[i];
      total += std::exp(z[i * c + j]);
    }
    lse[i] = std::log(total);
    for (int64_t j = 0; j < c; j++) {
      const double log_p = z[i * c + j] - lse[i], p = std::exp(log_p);
      weighted += p * log_p, squared += p * p;
    }
    entropy[i] = -weighted, sum_sq[i] = squared;
    got_lse[i] = s.maximum[i] + std::log(s.total[i]);
    got_entropy[i] = std::log(s.total[i]) - s.weighted[i] / s.total[i];
    got_sum_sq[i] = s.squared[i] / (s.total[i] * s.total[i]);
    const bool good = s.picked[i * kIds] == s.z[i * c] && s.picked[i * kIds + 1] == s.z[i * c + c - 1];
    if (!good || s.picked[i * kIds + 2] != -HUGE_VALF) {
      std::printf("%s picked C=%ld row %ld\n", isa.c_str(), (long)c, (long)i);
      failures++;
    }
  }
  compare(isa, "z'", c, s.z, z);
  compare(isa, "lse", c, got_lse, lse);
  if (c > 1) compare(isa, "entropy", c, got_entropy, entropy);
  compare(isa, "sum_sq", c, got_sum_sq, sum_sq);
  demand(isa, "z'", c, s.z, again.z);
  demand(isa, "total", c, s.total, again.total);
}

double slope_of(double z, double inverse) {
  const double w = z / (inverse * kSoftcap);
  return kScale * inverse * (1.0 - w * w);
}

// Log sum exp of each row: rounded, what rounding took, exact.
struct Lse {
  Floats rounded, low;
  Doubles exact;
};

Lse lse_of(const Floats& z, int64_t c) {
  Lse lse{Floats(kRows), Floats(kRows), Doubles(kRows)};
  for (int64_t i = 0; i < kRows; i++) {
    double total = 0.0;
    for (int64_t j = 0; j < c; j++) total += std::exp((double)z[i * c + j]);
    lse.exact[i] = std::log(total);
    lse.rounded[i] = (float)lse.exact[i];
    lse.low[i] = (float)(lse.exact[i] - lse.rounded[i]);
  }
  return lse;
}

void check_gradient(const std::string& isa, const Inputs& in) {
  const int64_t c = in.columns;
  const Floats z = run_statistics(in, 1).z;
  const Lse lse = lse_of(z, c);
  const auto run = [&](int threads) {
    Floats out(kRows * c);
    const Gradient a{z.data(),
                     kRows,
                     c,
                     c,
                     kFirst,
                     nullptr,
                     {nullptr, kScale, kSoftcap, in.inverse.data()},
                     in.ids.data(),
                     kIds,
                     lse.rounded.data(),
                     lse.low.data(),
                     in.base.data(),
                     in.slope.data(),
                     in.square.data(),
                     in.picked.data(),
                     in.complement.data(),
                     out.data(),
                     c};
    gradient(a, threads);
    return out;
  };
  Doubles wanted(kRows * c);
  for (int64_t i = 0; i < kRows; i++)
    for (int64_t j = 0; j < c; j++) {
      const double q = z[i * c + j] - lse.exact[i], p = std::exp(q);
      double base = in.base[i], more = 0.0;
      for (int64_t k = i * kIds; k < (i + 1) * kIds; k++)
        if (in.ids[k] == kFirst + j) base += in.picked[k], more += in.complement[k];
      const double g = p * (base + in.slope[i] * q + in.square[i] * p) + more;
      wanted[i * c + j] = g * slope_of(z[i * c + j], in.inverse[i]);
    }
  compare(isa, "gradient", c, run(1), wanted);
  demand(isa, "gradient", c, run(1), run(2));
}

void check_divergence(const std::string& isa, const Inputs& in, Kind kind, float beta) {
  const int64_t c = in.columns;
  const Floats student = run_statistics(in, 1).z;
  const Lse student_lse = lse_of(student, c), teacher_lse = lse_of(in.teacher, c);
  Floats value(kRows), center(kRows), out(kRows * c);
  Divergence a{};
  a.student = student.data(), a.teacher = in.teacher.data();
  a.num_rows = kRows, a.columns = a.student_stride = a.teacher_stride = a.out_stride = c;
  a.student_lse = student_lse.rounded.data(), a.student_low = student_lse.low.data();
  a.teacher_lse = teacher_lse.rounded.data(), a.teacher_low = teacher_lse.low.data();
  a.kind = kind, a.beta = beta, a.rest = 1.0f - beta;
  a.value = value.data(), a.center = center.data(), a.weight = in.weight.data();
  a.transform = {nullptr, kScale, kSoftcap, in.inverse.data()};
  a.out = out.data();
  divergence(a, 2);
  divergence_gradient(a, 2);
  Doubles values(kRows), gradients(kRows * c);
  for (int64_t i = 0; i < kRows; i++) {
    double from_t = 0.0, from_p = 0.0;
    const auto each = [&](auto visit) {
      for (int64_t j = 0; j < c; j++) {
        const double log_p = student[i * c + j] - student_lse.exact[i];
        const double log_t = in.teacher[i * c + j] - teacher_lse.exact[i];
        double log_m = kind == Kind::kForward ? log_p : log_t;
        if (kind == Kind::kJs) log_m = std::log(a.beta * std::exp(log_t) + a.rest * std::exp(log_p));
        visit(j, log_p, log_t, log_m);
      }
    };
    each([&](int64_t, double log_p, double log_t, double log_m) {
      from_t += std::exp(log_t) * (log_t - log_m), from_p += std::exp(log_p) * (log_p - log_m);
    });
    if (kind == Kind::kJs) from_t *= a.beta, from_p *= a.rest;
    values[i] = kind == Kind::kForward ? from_t : kind == Kind::kReverse ? from_p : from_t + from_p;
    each([&](int64_t j, double log_p, double log_t, double log_m) {
      const double p = std::exp(log_p), rest = kind == Kind::kJs ? a.rest : 1.0;
      const double g = kind == Kind::kForward ? p - std::exp(log_t) : p * (rest * (log_p - log_m) - from_p);
      gradients[i * c + j] = g * in.weight[i] * slope_of(student[i * c + j], in.inverse[i]);
    });
  }
  if (c > 1) compare(isa, "divergence", c, value, values);
  if (c > 1) compare(isa, "divergence_gradient", c, out, gradients);
}

}  // namespace

int main(int argc, char** argv) {
  const auto seed = (unsigned)std::strtoul(argc > 1 ? argv[1] : "0", nullptr, 10);
  for (const std::string& isa : isas()) {
    set_isa(isa);
    for (int64_t columns : {1, 3, 4, 18, 263, 1029}) {
      const Inputs in(columns, seed);
      check_statistics(isa, in);
      check_gradient(isa, in);
      check_divergence(isa, in, Kind::kForward, 0.5f);
      check_divergence(isa, in, Kind::kReverse, 0.5f);
      check_divergence(isa, in, Kind::kJs, 0.2f);
    }
  }
  return failures > 0;
}
