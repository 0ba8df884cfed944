// Collectives: Gloo's, over the devices' memory, with HCCL's refusals.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <unistd.h>

#include "kernels.h"

namespace npu_sim {

using c10d::Work;
using WorkPtr = c10::intrusive_ptr<Work>;

struct Hccl final : c10d::Backend {
  Hccl(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : Backend(rank, size), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override {
    return "hccl";
  }
  void setSequenceNumberForGroup() override {
    gloo_->setSequenceNumberForGroup();
  }
  uint64_t getSequenceNumberForGroup() override {
    return gloo_->getSequenceNumberForGroup();
  }

  WorkPtr allreduce(std::vector<Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    if (is_rank("NPU_SIM_HUNG_RANK", getRank())) hang();
    if (is_rank("NPU_SIM_LOST_RANK", getRank()))
      for (auto& tensor : tensors) host(tensor).zero_();
    return reduced(tensors, options, [&](auto& aliases, auto& sum) { return gloo_->allreduce(aliases, sum); });
  }
  WorkPtr allreduce_coalesced(std::vector<Tensor>& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    WorkPtr last;
    for (auto& tensor : tensors) {
      std::vector<Tensor> one{tensor};
      last = allreduce(one, options);
    }
    return last ? done(tensors) : last;
  }
  WorkPtr reduce(std::vector<Tensor>& tensors, const c10d::ReduceOptions& options) override {
    return reduced(tensors, options, [&](auto& aliases, auto& sum) { return gloo_->reduce(aliases, sum); });
  }
  WorkPtr reduce_scatter(std::vector<Tensor>& outputs, std::vector<std::vector<Tensor>>& inputs,
                         const c10d::ReduceScatterOptions& options) override {
    auto aliases = all(inputs);
    return reduced(outputs, options, [&](auto& out, auto& sum) { return gloo_->reduce_scatter(out, aliases, sum); });
  }
  WorkPtr _reduce_scatter_base(Tensor& output, Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto from = one(input);
    std::vector<Tensor> outputs{output};
    return reduced(outputs, options,
                   [&](auto& out, auto& sum) { return gloo_->_reduce_scatter_base(out[0], from, sum); });
  }
  WorkPtr broadcast(std::vector<Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    auto aliases = all(tensors);
    return done(tensors, gloo_->broadcast(aliases, options));
  }
  WorkPtr allgather(std::vector<std::vector<Tensor>>& outputs, std::vector<Tensor>& inputs,
                    const c10d::AllgatherOptions& options) override {
    auto from = all(inputs);
    auto to = all(outputs);
    return done(outputs.at(0), gloo_->allgather(to, from, options));
  }
  WorkPtr _allgather_base(Tensor& output, Tensor& input, const c10d::AllgatherOptions& options) override {
    auto from = one(input);
    auto to = one(output);
    return done({output}, gloo_->_allgather_base(to, from, options));
  }
  WorkPtr gather(std::vector<std::vector<Tensor>>& outputs, std::vector<Tensor>& inputs,
                 const c10d::GatherOptions& options) override {
    auto from = all(inputs);
    auto to = all(outputs);
    return done(outputs.empty() ? std::vector<Tensor>{} : outputs[0], gloo_->gather(to, from, options));
  }
  WorkPtr scatter(std::vector<Tensor>& outputs, std::vector<std::vector<Tensor>>& inputs,
                  const c10d::ScatterOptions& options) override {
    auto from = all(inputs);
    auto to = all(outputs);
    return done(outputs, gloo_->scatter(to, from, options));
  }
  WorkPtr alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& output_sizes,
                        std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& options) override {
    auto from = one(input);
    auto to = one(output);
    return done({output}, gloo_->alltoall_base(to, from, output_sizes, input_sizes, options));
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    claim_device();
    return done({}, gloo_->barrier(options));
  }
  // These two may cross each other, so they are not waited for.
  WorkPtr send(std::vector<Tensor>& tensors, int rank, int tag) override {
    auto aliases = checked(tensors);
    return gloo_->send(aliases, rank, tag);
  }
  WorkPtr recv(std::vector<Tensor>& tensors, int rank, int tag) override {
    auto aliases = checked(tensors);
    return gloo_->recv(aliases, rank, tag);
  }

 private:
  static std::vector<Tensor> checked(TensorList tensors) {
    std::vector<Tensor> aliases;
    for (const auto& tensor : tensors) {
      TORCH_CHECK(tensor.device().type() == NPU, "HCCL takes tensors on an NPU, not on ", tensor.device());
      TORCH_CHECK(tensor.is_contiguous(), "HCCL takes contiguous tensors only");
      TORCH_CHECK(tensor.scalar_type() != at::kDouble, "HCCL does not support float64");
      aliases.push_back(host(tensor));
    }
    return aliases;
  }
  std::vector<Tensor> all(TensorList tensors) {
    auto aliases = checked(tensors);
    claim_device();
    return aliases;
  }
  std::vector<std::vector<Tensor>> all(const std::vector<std::vector<Tensor>>& lists) {
    std::vector<std::vector<Tensor>> aliases;
    for (const auto& tensors : lists) aliases.push_back(all(tensors));
    return aliases;
  }
  Tensor one(const Tensor& tensor) {
    return all(TensorList(tensor)).at(0);
  }

  // HCCL has no mean: it sums, and then divides.
  template <typename Options, typename Collective>
  WorkPtr reduced(std::vector<Tensor>& tensors, const Options& options, Collective collective) {
    using c10d::ReduceOp;
    static const std::set<at::ScalarType> dtypes{at::kChar, at::kShort, at::kInt,  at::kLong,
                                                 at::kHalf, at::kFloat, at::kBFloat16};
    auto aliases = all(tensors);
    for (const auto& tensor : tensors)
      TORCH_CHECK(dtypes.count(tensor.scalar_type()), "HCCL does not reduce ", tensor.scalar_type());
    auto changed = options;
    const bool mean = options.reduceOp == ReduceOp::AVG;
    if (mean) changed.reduceOp = ReduceOp::SUM;
    auto work = done(tensors, collective(aliases, changed));
    if (mean)
      for (auto& alias : aliases) alias.div_(getSize());
    return work;
  }

  // Waits, and hands the NPU's tensors, not their aliases, to whoever asks for the result.
  WorkPtr done(const std::vector<Tensor>& results, const WorkPtr& work = {}) {
    if (work) work->wait();
    std::vector<c10::Device> where;
    for (const auto& tensor : results)
      if (std::find(where.begin(), where.end(), tensor.device()) == where.end()) where.push_back(tensor.device());
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::ofTensors(), where);
    future->markCompleted(results);
    return Work::create_from_future(future);
  }

  // On the first collective the ranks compare their devices: two on one mean a forgotten set_device.
  void claim_device() {
    if (claimed_) return;
    char name[256] = "";
    gethostname(name, sizeof(name) - 1);
    check_index(current_index);
    const auto machine = static_cast<int64_t>(std::hash<std::string>()(name));
    std::vector<Tensor> mine{at::tensor({machine, static_cast<int64_t>(devices()[current_index])}, at::kLong)};
    std::vector<std::vector<Tensor>> theirs{{}};
    for (int i = 0; i < getSize(); i++) theirs[0].push_back(at::empty_like(mine[0]));
    gloo_->allgather(theirs, mine)->wait();
    for (int i = 0; i < getSize(); i++)
      TORCH_CHECK(i == getRank() || !theirs[0][i].equal(mine[0]), "HCCL: ranks ", getRank(), " and ", i,
                  " both use npu:", static_cast<int>(current_index),
                  ". Call torch.npu.set_device(local_rank) before the first collective");
    claimed_ = true;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
  bool claimed_ = false;
};

}  // namespace npu_sim
