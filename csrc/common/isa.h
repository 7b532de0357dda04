// The instruction set that the CPU kernels of every family use: M3_ISA, set_isa, or the best that runs here.
#pragma once
#include <string>
#include <vector>

namespace m3 {

enum class Isa : int { kAvx512Vnni, kAvx512, kAvxVnni, kAvx2, kNeon, kScalar };

std::vector<std::string> built_isas();  // that this build has, best first
std::vector<std::string> isas();        // that this build has and this CPU can run, best first
std::string get_isa();
void set_isa(const std::string& name);

Isa current_isa();

}  // namespace m3
