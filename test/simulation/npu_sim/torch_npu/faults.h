// Faults that tests plant in the devices by variables of the environment. README.md lists them.
#pragma once

#include <ATen/ATen.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>

namespace npu_sim {

constexpr double WRONG_BY = 1.05;

// Whether a variable is OPERATOR@DEVICE, such as aten::mm@1, of this operator and this device.
inline bool names(const char* variable, const std::string& name, int device) {
  const char* value = std::getenv(variable);
  return value && value == name + "@" + std::to_string(device);
}

inline bool is_wrong(const std::string& name, int device) {
  return names("NPU_SIM_WRONG", name, device);
}

// Makes a result wrong: a twentieth too large, a whole number by one.
inline void spoil(const at::Tensor& result) {
  if (result.is_floating_point()) result.mul_(WRONG_BY);
  else if (result.scalar_type() != at::kBool) result.add_(1);
}

inline void delay(const std::string& name, int device) {
  if (names("NPU_SIM_SLOW", name, device)) std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

inline bool is_rank(const char* variable, int rank) {
  const char* value = std::getenv(variable);
  return value && value == std::to_string(rank);
}

[[noreturn]] inline void hang() {
  while (true) std::this_thread::sleep_for(std::chrono::seconds(1));
}

}  // namespace npu_sim
