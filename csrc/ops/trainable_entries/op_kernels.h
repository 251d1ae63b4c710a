// The OpKernels of compact state that move entries, written once for both devices.
//
// Device is a struct with
//   Index                                              how it finds trainable entries
//   Find(ctx, first, layout, &index)                   from inputs `first` and on: mask, offsets and indices, checked
//   Gather(ctx, index, width, compact, sources)        writes the trainable entries of each source
//   Scatter(ctx, index, width, &value, compact)        the reverse, for a variable's value; its lock is held

#ifndef FREEZEOPS_OPS_TRAINABLE_ENTRIES_OP_KERNELS_H_
#define FREEZEOPS_OPS_TRAINABLE_ENTRIES_OP_KERNELS_H_

#include <cstdint>
#include <vector>

#include "ops/common/checks.h"
#include "ops/common/op_kernels.h"
#include "ops/trainable_entries/inputs.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace freezeops {

template <typename Device>
class CompactOp : public LayoutOp {
 public:
  explicit CompactOp(tensorflow::OpKernelConstruction* ctx) : LayoutOp(ctx) {
    OP_REQUIRES_OK(ctx, CheckDoesNotRepeat(layout_));
  }

 protected:
  using Index = typename Device::Index;

  // Inputs `first` and on are the mask, its offsets and the indices. Sets the number of entries of the compact tensors.
  absl::Status Find(tensorflow::OpKernelContext* ctx, int first, Index* index, int64_t* size) const {
    TF_RETURN_IF_ERROR(CheckTrainable(ctx, first, layout_, size));
    return Device::Find(ctx, first, layout_, index);
  }

  // Sets one output for each source.
  absl::Status Gather(tensorflow::OpKernelContext* ctx, const Index& index, int64_t size,
                      const std::vector<const tensorflow::Tensor*>& sources) const {
    std::vector<void*> compact;
    std::vector<const void*> whole;
    for (const tensorflow::Tensor* source : sources) {
      tensorflow::Tensor* output = nullptr;
      const int number = static_cast<int>(compact.size());
      TF_RETURN_IF_ERROR(ctx->allocate_output(number, tensorflow::TensorShape({size}), &output));
      compact.push_back(output->data());
      whole.push_back(source->data());
    }
    return size == 0 ? absl::OkStatus() : Device::Gather(ctx, index, width_, compact, whole);
  }

  // The variable's lock is held.
  absl::Status CheckVariable(tensorflow::Var* variable) const {
    return freezeops::CheckVariable(variable, dtype_, layout_, "its trainable entries are read or written");
  }
};

template <typename Device>
class GatherTrainableOp : public CompactOp<Device> {
 public:
  using CompactOp<Device>::CompactOp;

  void Compute(tensorflow::OpKernelContext* ctx) override {
    OP_REQUIRES_OK(ctx, CheckEntries("source", ctx->input(0).shape(), this->layout_));
    typename Device::Index index;
    int64_t size = 0;
    OP_REQUIRES_OK(ctx, this->Find(ctx, 1, &index, &size));
    OP_REQUIRES_OK(ctx, this->Gather(ctx, index, size, {&ctx->input(0)}));
  }
};

template <typename Device>
class ReadTrainableOp : public CompactOp<Device> {
 public:
  using CompactOp<Device>::CompactOp;

  void Compute(tensorflow::OpKernelContext* ctx) override {
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, 0, &variable));
    typename Device::Index index;
    int64_t size = 0;
    OP_REQUIRES_OK(ctx, this->Find(ctx, 1, &index, &size));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, this->CheckVariable(variable.get()));
    OP_REQUIRES_OK(ctx, this->Gather(ctx, index, size, {variable->tensor()}));
  }
};

template <typename Device>
class TakeTrainableOp : public CompactOp<Device> {
 public:
  using CompactOp<Device>::CompactOp;

  void Compute(tensorflow::OpKernelContext* ctx) override {
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, 0, &variable));
    typename Device::Index index;
    int64_t size = 0;
    OP_REQUIRES_OK(ctx, this->Find(ctx, 2, &index, &size));
    tensorflow::tf_shared_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, this->CheckVariable(variable.get()));
    const tensorflow::Tensor& gradient = ctx->input(1);
    const tensorflow::Tensor* const value = variable->tensor();
    OP_REQUIRES_OK(ctx, CheckSameShape("gradient", gradient.shape(), "variable", value->shape()));
    OP_REQUIRES_OK(ctx, this->Gather(ctx, index, size, {&gradient, value}));
  }
};

template <typename Device>
class ScatterTrainableOp : public CompactOp<Device> {
 public:
  using CompactOp<Device>::CompactOp;

  void Compute(tensorflow::OpKernelContext* ctx) override {
    VarPtr variable;
    OP_REQUIRES_OK(ctx, LookUp(ctx, 0, &variable));
    const tensorflow::Tensor& compact = ctx->input(1);
    typename Device::Index index;
    int64_t size = 0;
    OP_REQUIRES_OK(ctx, this->Find(ctx, 2, &index, &size));
    OP_REQUIRES_OK(ctx, CheckCompact(compact.shape(), size));
    tensorflow::mutex_lock lock(*variable->mu());
    OP_REQUIRES_OK(ctx, this->CheckVariable(variable.get()));
    if (this->layout_.inner == 0) return;
    OP_REQUIRES_OK(ctx, Device::Scatter(ctx, index, this->width_, variable->tensor(), compact));
  }
};

// Base of RankTrainable.
class RankOp : public tensorflow::OpKernel {
 public:
  explicit RankOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) { OP_REQUIRES_OK(ctx, GetKept(ctx, &kept_)); }

 protected:
  absl::Status CheckInputs(tensorflow::OpKernelContext* ctx) const {
    int64_t size;
    return CheckTrainable(ctx, 1, MaskLayout{1, kept_, 1}, &size);
  }

  int64_t kept_ = 0;
};

// Registers the four ops of a device; what follows is for the ops with a variable.
#define FREEZEOPS_REGISTER_COMPACT(NAME, DEVICE, ...)                                           \
  FREEZEOPS_REGISTER_OP("Freezeops>GatherTrainable", NAME, GatherTrainableOp<DEVICE>);          \
  FREEZEOPS_REGISTER_OP("Freezeops>ReadTrainable", NAME, ReadTrainableOp<DEVICE>, __VA_ARGS__); \
  FREEZEOPS_REGISTER_OP("Freezeops>TakeTrainable", NAME, TakeTrainableOp<DEVICE>, __VA_ARGS__); \
  FREEZEOPS_REGISTER_OP("Freezeops>ScatterTrainable", NAME, ScatterTrainableOp<DEVICE>, __VA_ARGS__)

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_TRAINABLE_ENTRIES_OP_KERNELS_H_
