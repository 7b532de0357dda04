// The choice of an instruction set: one for the whole process, read from M3_ISA at the first call.
#include "common/isa.h"

#include <atomic>
#include <cstdlib>

#include "common/check.h"
#include "common/cpu_features.h"

namespace m3 {
namespace {

struct Entry {
  const char* name;
  Isa isa;
  bool (*runs)();
};

bool always() { return true; }

constexpr Entry kBuilt[] = {// best first
#if defined(__x86_64__)
                            {"avx512vnni", Isa::kAvx512Vnni, cpu_has_avx512vnni},
                            {"avx512", Isa::kAvx512, cpu_has_avx512},
                            {"avxvnni", Isa::kAvxVnni, cpu_has_avxvnni},
                            {"avx2", Isa::kAvx2, cpu_has_avx2},
#elif defined(__aarch64__) && defined(M3_NEON)
                            {"neon", Isa::kNeon, cpu_has_dotprod},
#endif
                            {"scalar", Isa::kScalar, always}};

const Entry* find(const std::string& name) {
  for (const Entry& entry : kBuilt)
    if (entry.name == name && entry.runs()) return &entry;
  std::string names;
  for (const std::string& other : isas()) names += (names.empty() ? "" : ", ") + other;
  refuse("set_isa", "name (or M3_ISA)", "one of " + names + " on this machine", "'" + name + "'");
}

std::atomic<const Entry*> chosen{nullptr};

const Entry& current() {
  const Entry* entry = chosen.load(std::memory_order_acquire);
  if (!entry) {
    const char* wanted = std::getenv("M3_ISA");
    entry = find(wanted && *wanted ? wanted : isas().front());
    chosen.store(entry, std::memory_order_release);
  }
  return *entry;
}

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kBuilt) names.push_back(entry.name);
  return names;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kBuilt)
    if (entry.runs()) names.push_back(entry.name);
  return names;
}

std::string get_isa() { return current().name; }

void set_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

Isa current_isa() { return current().isa; }

}  // namespace m3
