// What Python sees of the simulation.
#include <torch/csrc/utils/pybind.h>

#include "hccl.h"

PYBIND11_MODULE(_C, m) {
  using namespace npu_sim;
  m.def("device_count", [] { return static_cast<int>(device_count()); });
  m.def("current_device", [] { return static_cast<int>(current_index); });
  m.def("set_device", [](int index) {
    start();
    Guard().setDevice({NPU, static_cast<c10::DeviceIndex>(index)});
  });
  m.def("start", &start);
  m.def("is_used", [] { return used.load(); });
  m.def("is_forked", [] { return forked.load(); });
  m.def("default_generator", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  m.def("hccl", [](const c10::intrusive_ptr<c10d::Backend>& gloo, int rank, int size) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<Hccl>(gloo, rank, size));
  });
}
