// Base of the OpKernels of FusedUpdate: variables are looked up, locked and checked before anything is written.

#ifndef FREEZEOPS_OPS_FUSED_UPDATE_INPUTS_H_
#define FREEZEOPS_OPS_FUSED_UPDATE_INPUTS_H_

#include <algorithm>
#include <utility>
#include <vector>

#include "ops/common/op_kernels.h"
#include "ops/common/tf_compat.h"
#include "ops/fused_update/attributes.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/tensor.h"

namespace freezeops {

class FusedOp : public tensorflow::OpKernel {
 public:
  explicit FusedOp(tensorflow::OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetFusedAttributes(ctx, &attributes_));
    sparse_ = attributes_.NumberIn(attributes_.sparse);
    masked_ = attributes_.NumberIn(attributes_.masked);
    seeded_ = attributes_.NumberIn(attributes_.seeded);
  }

 protected:
  // Read-only inputs of a variable. Holding the tensors makes concurrent writers copy.
  struct Held {
    tensorflow::Tensor mask, offsets, indices;  // empty where the variable has none
    int64_t slot_size;                          // entries of each slot
    GradientRows rows;                          // where the gradient is slices
  };

  // The data that is written.
  struct Written {
    void* variable;
    void* slots[kMostSlots];
    uint8_t* unseeded;  // null: no slot waits
    int64_t unseeded_bytes;
  };

  // Reads and checks the mask of a variable and, in compact state, its offsets and indices.
  absl::Status ReadMask(tensorflow::OpKernelContext* ctx, int i, Held* held) const {
    const FusedAttributes& a = attributes_;
    const MaskLayout& layout = a.layouts[i];
    held->slot_size = entries(layout);
    if (masked_[i] < 0) return a.CheckUnmasked(i);
    TF_RETURN_IF_ERROR(ReadVariable(ctx, a.mask(masked_[i]), &held->mask));
    TF_RETURN_IF_ERROR(CheckDtype("mask", held->mask.dtype(), tensorflow::DT_UINT8, held->mask.shape()));
    TF_RETURN_IF_ERROR(CheckMask(held->mask.shape(), layout));
    if (!a.compact) return absl::OkStatus();
    const tensorflow::Tensor& offsets = held->offsets;
    const tensorflow::Tensor& indices = held->indices;
    TF_RETURN_IF_ERROR(ReadVariable(ctx, a.offsets(i), &held->offsets));
    TF_RETURN_IF_ERROR(ReadVariable(ctx, a.indices(i), &held->indices));
    return a.CheckIndex(i, offsets.dtype(), offsets.shape(), indices.dtype(), indices.shape(), &held->slot_size);
  }

  static bool HasWideIndices(const Held& held) { return tensorflow::DataTypeSize(held.indices.dtype()) == 8; }

  // Looks up what is written: of each variable itself, its slots, its unseeded bits, in this order.
  absl::Status LookUpWritten(tensorflow::OpKernelContext* ctx, std::vector<VarPtr>* variables) const {
    const FusedAttributes& a = attributes_;
    const auto look_up = [&](int input) {
      VarPtr variable;
      TF_RETURN_IF_ERROR(LookUp(ctx, input, &variable));
      variables->push_back(std::move(variable));
      return absl::OkStatus();
    };
    for (int i = 0; i < a.count(); ++i) {
      TF_RETURN_IF_ERROR(look_up(a.variable(i)));
      for (int j = 0; j < a.rule->slots; ++j) TF_RETURN_IF_ERROR(look_up(a.slot(i, j)));
      if (seeded_[i] >= 0) TF_RETURN_IF_ERROR(look_up(a.unseeded(seeded_[i])));
    }
    // Threads share out all variables at once: one that was there twice would be written by two of them.
    std::vector<tensorflow::Var*> each(variables->size());
    std::transform(variables->begin(), variables->end(), each.begin(),
                   [](const VarPtr& variable) { return variable.get(); });
    std::sort(each.begin(), each.end());
    const auto twice = std::adjacent_find(each.begin(), each.end());
    if (twice == each.end()) return absl::OkStatus();
    return InvalidArgument("variables and slots must be different ones. Received: one of shape ",
                           (*twice)->tensor()->shape().DebugString(), " twice");
  }

  // Checks variables, whose locks are held, and the gradients' shapes. Then gives each a buffer of its own, where a
  // read shares it, by unshare(value).
  template <typename Unshare>
  absl::Status PrepareWritten(tensorflow::OpKernelContext* ctx, const std::vector<VarPtr>& variables,
                              const Unshare& unshare, std::vector<Held>* held, std::vector<Written>* written) const {
    const FusedAttributes& a = attributes_;
    auto next = variables.begin();
    for (int i = 0; i < a.count(); ++i) {
      const int64_t slot_size = (*held)[i].slot_size;
      const VarPtr& variable = *next++;
      TF_RETURN_IF_ERROR(CheckWritten("variable", *variable, a.dtype, entries(a.layouts[i])));
      const tensorflow::TensorShape& shape = variable->tensor()->shape();
      TF_RETURN_IF_ERROR(a.CheckGradient(ctx, i, sparse_[i], shape, slot_size));
      if (sparse_[i] >= 0) (*held)[i].rows = RowsOf(shape, ctx->input(a.gradient(i)).shape());
      for (int j = 0; j < a.rule->slots; ++j) {
        TF_RETURN_IF_ERROR(CheckWritten("slot", **next++, a.dtype, slot_size));
      }
      if (seeded_[i] >= 0) {
        TF_RETURN_IF_ERROR(CheckWritten("unseeded", **next++, tensorflow::DT_UINT8, mask_bytes(slot_size)));
      }
    }
    for (const VarPtr& variable : variables) TF_RETURN_IF_ERROR(unshare(variable->tensor()));
    next = variables.begin();
    written->assign(a.count(), Written{});
    for (int i = 0; i < a.count(); ++i) {
      Written& each = (*written)[i];
      each.variable = (*next++)->tensor()->data();
      for (int j = 0; j < a.rule->slots; ++j) each.slots[a.rule->slot_positions[j]] = (*next++)->tensor()->data();
      if (seeded_[i] < 0) continue;
      each.unseeded_bytes = (*next)->tensor()->NumElements();
      each.unseeded = static_cast<uint8_t*>((*next++)->tensor()->data());
    }
    return absl::OkStatus();
  }

  FusedAttributes attributes_;
  std::vector<int> sparse_, masked_, seeded_;  // of each variable: its number in the attribute, or -1

 private:
  static absl::Status ReadVariable(tensorflow::OpKernelContext* ctx, int input, tensorflow::Tensor* value) {
    VarPtr variable;
    TF_RETURN_IF_ERROR(LookUp(ctx, input, &variable));
    tensorflow::tf_shared_lock lock(*variable->mu());
    *value = *variable->tensor();
    return absl::OkStatus();
  }

  // The variable's lock is held.
  static absl::Status CheckWritten(const char* name, tensorflow::Var& variable, tensorflow::DataType dtype,
                                   int64_t size) {
    if (!variable.is_initialized || !variable.tensor()->IsInitialized()) {
      return absl::FailedPreconditionError(
          absl::StrCat(name, " must be initialized before it is updated. Received: an uninitialized variable"));
    }
    const tensorflow::Tensor& value = *variable.tensor();
    if (value.dtype() == dtype && value.NumElements() == size) return absl::OkStatus();
    return InvalidArgument(name, " must be of dtype ", tensorflow::DataTypeString(dtype), " with ", size,
                           " entries. Received: one of dtype ", tensorflow::DataTypeString(value.dtype()),
                           " and shape ", value.shape().DebugString());
  }
};

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_FUSED_UPDATE_INPUTS_H_
