// The C++ border's checks, worded as everywhere: "op: argument: want ...; got ...". pybind11 turns them into
// ValueError.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace m3 {

template <class Got>
[[noreturn]] inline void refuse(const char* op, const char* argument, const std::string& want, const Got& got) {
  std::ostringstream text;
  text << op << ": " << argument << ": want " << want << "; got " << got;
  throw std::invalid_argument(text.str());
}

template <class Got>
inline void check(bool good, const char* op, const char* argument, const std::string& want, const Got& got) {
  if (!good) refuse(op, argument, want, got);
}

}  // namespace m3
