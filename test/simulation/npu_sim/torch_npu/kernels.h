// The operators: a few of the simulation's own; for all others the CPU's, after a look at where the tensors are.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <torch/library.h>

#include <set>

#include "device.h"
#include "faults.h"

namespace npu_sim {

using at::Tensor;
using at::TensorList;

// The same memory as a CPU tensor.
inline Tensor host(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  TORCH_CHECK(tensor.device().type() == NPU, "expected a tensor on an NPU, not on ", tensor.device());
  start();
  const auto options = at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
}

// ---------------------------------------------------------------- making, copying, resizing

inline c10::Device with_index(std::optional<c10::Device> device) {
  return device && device->has_index() ? *device : c10::Device(NPU, current_index);
}

inline Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(with_index(device));
  return at::detail::empty_generic(size, &Memory::instance(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

inline Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(with_index(device));
  return at::detail::empty_strided_generic(size, stride, &Memory::instance(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

inline Tensor copy_from(const Tensor& self, const Tensor& target, bool) {
  host(target).copy_(host(self));
  return target;
}

inline const Tensor& resize(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  auto* impl = at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  return self;
}

inline Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  if (target.sizes() != self.sizes()) target.resize_(self.sizes());
  return copy_from(self, target, false);
}

inline Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                           at::IntArrayRef stride) {
  const c10::DeviceGuard guard(self.device());
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

inline Tensor& set_empty(Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  auto storage = c10::Storage(c10::Storage::use_byte_size_t(), 0, &Memory::instance(), true);
  return self.set_(storage, 0, {0}, {});
}

inline at::Scalar local_scalar(const Tensor& self) {
  return host(self).item();
}

// float64 silently becomes float32, as on the real one.
inline Tensor to_copy(const Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                      std::optional<c10::Device> device, std::optional<bool> pinned, bool non_blocking,
                      std::optional<at::MemoryFormat> format) {
  if (dtype == at::kDouble && (!device || device->type() == NPU)) dtype = at::kFloat;
  return at::native::_to_copy(self, dtype, layout, device, pinned, non_blocking, format);
}

// ---------------------------------------------------------------- everything else

// Operators that take some tensor on the CPU on every backend: indices, lengths.
inline bool may_take_cpu_tensors(const std::string& name) {
  static const std::set<std::string> names{"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                           "aten::_pack_padded_sequence"};
  return names.count(name);
}

struct DeviceCheck {
  const c10::FunctionSchema& schema;
  bool cpu_allowed = may_take_cpu_tensors(schema.name());
  std::optional<c10::Device> device{};
  std::optional<c10::Device> misplaced{};

  void see(const Tensor& tensor, bool written, bool first) {
    if (!tensor.defined()) return;
    if (tensor.is_cpu() && !written && (tensor.dim() == 0 || (cpu_allowed && !first))) return;
    if (device && *device != tensor.device()) misplaced = tensor.device();
    if (!device) device = tensor.device();
  }
  void report() const {
    TORCH_CHECK(!misplaced, "Expected all tensors to be on the same device, but found at least two devices, ", *device,
                " and ", *misplaced, "! (in ", schema.operator_name(), ")");
  }
};

inline void fallback(const c10::OperatorHandle& op, c10::Stack* stack) {
  start();
  const auto& arguments = op.schema().arguments();
  const auto first = stack->size() - arguments.size();
  DeviceCheck check{op.schema()};
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& value = (*stack)[first + i];
    const bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    if (value.isTensor()) {
      check.see(value.toTensor(), written, i == 0);
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector()) check.see(tensor, written, false);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
        if (tensor) check.see(*tensor, written, false);
    }
  }
  check.report();
  static const auto generator_type = c10::OptionalType::create(c10::GeneratorType::get());
  for (size_t i = 0; i < arguments.size(); i++) {
    if (*arguments[i].type() != *generator_type) continue;
    auto& value = (*stack)[first + i];
    auto generator = value.isNone() ? default_generator(with_index(check.device).index()) : value.toGenerator();
    if (generator.device().type() == NPU) value = generator.get<NpuGenerator>()->host;
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  if (!check.device) return;
  const auto device = check.device->index();
  delay(op.schema().name(), device);
  const auto& results = op.schema().returns();
  if (results.empty() || !is_wrong(op.schema().name(), device)) return;
  const auto& value = (*stack)[stack->size() - results.size()];
  if (value.isTensor()) spoil(host(value.toTensor()));
}

inline void no_kernel(const c10::OperatorHandle& op, c10::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.operator_name(), " has no kernel on an NPU");
}

inline std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  if (!train.value_or(true)) return {input.clone(), at::ones_like(input, at::kBool)};
  auto mask = at::empty_like(input, at::kBool).bernoulli_(1 - p);
  return {p < 1 ? input.mul(mask).mul_(1 / (1 - p)) : at::zeros_like(input), mask};
}

// ---------------------------------------------------------------- the GRU

inline std::tuple<Tensor, Tensor> gru(const Tensor& input, const Tensor& hidden, TensorList weights, bool biases,
                                      int64_t layers, double, bool train, bool bidirectional, bool batch_first) {
  const auto dtype = input.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf, "the NPU's GRU kernel takes float16 or float32, not ", dtype);
  auto same = [&](const Tensor& tensor, const char* what) {
    TORCH_CHECK(tensor.scalar_type() == dtype, "the NPU's GRU kernel takes input, hidden state and weights of one ",
                "dtype: the input is ", dtype, ", ", what, " ", tensor.scalar_type());
  };
  same(hidden, "the hidden state");
  for (const auto& weight : weights) same(weight, "a weight");
  // The kernel is one operator that autocast does not know: its products are not autocast's either.
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastPrivateUse1);
  // It leaves out the dropout between layers, silently.
  auto [outputs, last] =
      at::native::gru(input, hidden, weights, biases, layers, 0.0, train, bidirectional, batch_first);
  if (is_wrong("aten::gru", input.device().index())) outputs = outputs * WRONG_BY;
  return {outputs, last};
}

inline std::tuple<Tensor, Tensor> gru_packed(const Tensor&, const Tensor&, const Tensor&, TensorList, bool, int64_t,
                                             double, bool, bool) {
  TORCH_CHECK(false, "the NPU's GRU kernel does not support packed sequences: pad them");
}

// at::native::gru computes each step by this operator on every device but the CPU, which so has no kernel for it.
inline std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hidden,
                                           const std::optional<Tensor>& input_bias,
                                           const std::optional<Tensor>& hidden_bias) {
  auto with_bias = [](const Tensor& gates, const std::optional<Tensor>& bias) {
    auto sums = host(gates).to(at::kFloat);
    return bias && bias->defined() ? sums + host(*bias) : sums;
  };
  const auto from_input = with_bias(input_gates, input_bias).chunk(3, -1);
  const auto from_hidden = with_bias(hidden_gates, hidden_bias).chunk(3, -1);
  const auto before = host(hidden).to(at::kFloat);
  const auto r = (from_input[0] + from_hidden[0]).sigmoid();
  const auto z = (from_input[1] + from_hidden[1]).sigmoid();
  const auto n = (from_input[2] + r * from_hidden[2]).tanh();
  const auto after = (before - n) * z + n;
  const auto saved = at::cat({r, z, n, from_hidden[2], before}, -1);
  return {after.to(hidden.scalar_type()).to(hidden.device()), saved.to(hidden.device())};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& d_hidden, const Tensor& saved,
                                                                            bool has_bias) {
  const auto d_after = host(d_hidden).to(at::kFloat);
  const auto parts = host(saved).chunk(5, -1);
  const auto &r = parts[0], &z = parts[1], &n = parts[2], &g = parts[3], &before = parts[4];
  const auto d_n = d_after * (1 - z) * (1 - n * n);
  const auto d_z = d_after * (before - n) * z * (1 - z);
  const auto d_r = d_n * g * r * (1 - r);
  const auto d_input = at::cat({d_r, d_z, d_n}, -1);
  const auto d_recurrent = at::cat({d_r, d_z, d_n * r}, -1);
  auto result = [&](const Tensor& tensor) { return tensor.to(d_hidden.scalar_type()).to(d_hidden.device()); };
  return {result(d_input), result(d_recurrent), result(d_after * z), has_bias ? result(d_input.sum(0)) : Tensor(),
          has_bias ? result(d_recurrent.sum(0)) : Tensor()};
}

// ---------------------------------------------------------------- registrations

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_to_copy", to_copy);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_", set_empty);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("native_dropout", native_dropout);
  m.impl("gru.input", gru);
  m.impl("gru.data", gru_packed);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
  for (const char* name : {"_fused_adam_", "_fused_adam_.tensor_lr", "_fused_adamw_", "_fused_adamw_.tensor_lr"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_kernel>());
}

// gru is a composite of differentiable operators: its checks stand in front of autograd, too.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("gru.input", gru);
  m.impl("gru.data", gru_packed);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

namespace {  // the macros want their names without a namespace in front
using namespace at;
using namespace at::autocast;

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define HALF(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(HALF)
  AT_FORALL_FP32(FLOAT)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT_RESULT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST)
#undef HALF
#undef FLOAT
#undef FLOAT_RESULT
#undef WIDEST
}
}  // namespace

}  // namespace npu_sim
