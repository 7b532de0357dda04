// What the emulated module says of itself, and how tests choose the device that it plays.
#include "common/cuda_info.h"

#include "emulator.h"

namespace m3 {

CudaInfo cuda_info() {
  CudaInfo info;
  info.emulated = true;
  const int capability = emulator::settings.capability;
  info.devices.push_back({"emulated", capability / 10, capability % 10});
  return info;
}

int capability() { return emulator::settings.capability; }

}  // namespace m3

extern "C" __attribute__((visibility("default"))) void m3_emulator_set(int capability, int multiprocessors,
                                                                       uint64_t seed) {
  m3::emulator::settings.capability = capability;
  m3::emulator::settings.shared_bytes = capability == 80 ? 163 << 10 : capability == 120 ? 99 << 10 : 227 << 10;
  m3::emulator::settings.multiprocessors = multiprocessors;
  m3::emulator::settings.seed = seed;
}
