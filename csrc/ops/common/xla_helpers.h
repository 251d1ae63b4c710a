// Helpers of the XLA kernels: masks as integers of a float's width, rows gathered, scattered and summed.
//
// Kernels are plain HLO, which XLA fuses into whatever makes or takes the values, and calls of native kernels where
// these are faster (xla_cpu.cc of an op).

#ifndef FREEZEOPS_OPS_COMMON_XLA_HELPERS_H_
#define FREEZEOPS_OPS_COMMON_XLA_HELPERS_H_

#include <cstdint>
#include <vector>

#include "ops/common/checks.h"
#include "ops/common/layout_attr.h"
#include "ops/common/xla_compat.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"

// Registered for the JIT devices directly: the registration macro of XLA's own kernels takes effect only if the library
// is loaded before XLA is used for the first time.
#define FREEZEOPS_REGISTER_XLA(OP, KERNEL)                         \
  REGISTER_KERNEL_BUILDER(Name(OP).Device("XLA_CPU_JIT"), KERNEL); \
  REGISTER_KERNEL_BUILDER(Name(OP).Device("XLA_GPU_JIT"), KERNEL)

namespace freezeops {

absl::Status GetShape(tensorflow::XlaOpKernelContext* ctx, int input, tensorflow::TensorShape* shape);

inline absl::Status GetShape(tensorflow::XlaOpKernelContext* ctx, int input, PartialTensorShape* shape) {
  tensorflow::TensorShape known;
  TF_RETURN_IF_ERROR(GetShape(ctx, input, &known));
  *shape = known;
  return absl::OkStatus();
}

// The unsigned integers as wide as a floating type. Values are chosen as integers: a choice among floats may turn a
// signalling NaN into a quiet one.
xla::PrimitiveType IntegersFor(tensorflow::DataType dtype);

// Integers in the tensor's shape: all bits set where an entry is trainable, none where it is frozen. Values are joined
// by AND and OR with these and not by Select, which the CPU's compiler turns into a branch where one side is expensive
// to compute: mispredicted at every other entry of a random mask.
xla::XlaOp TrainableBits(xla::XlaOp mask, const MaskLayout& layout, const tensorflow::TensorShape& shape,
                         xla::PrimitiveType integers);

// Returns integers with all bits set where a predicate holds, else 0.
xla::XlaOp AllBits(xla::XlaOp predicate, xla::PrimitiveType integers);

// Chooses among integers by such a mask.
xla::XlaOp Choose(xla::XlaOp mask, xla::XlaOp chosen, xla::XlaOp other);

// A result of a native kernel that XLA calls on the CPU.
struct CallResult {
  xla::Shape shape;
  int64_t operand = -1;  // the operand that it overwrites; -1: a buffer of its own
};

// Calls a native kernel by the name that its xla_cpu.cc registers.
std::vector<xla::XlaOp> CallNative(xla::XlaBuilder* builder, const char* name, const std::vector<xla::XlaOp>& operands,
                                   const std::vector<CallResult>& results);

// [count] or, where a bit stands for more than one entry, [count, inner].
std::vector<int64_t> DimsOf(int64_t count, int64_t inner);

// Gathers the rows of `values` (a layout that does not repeat) that the indices name, as DimsOf(their number, inner).
// An index that is out of range gathers some other row.
xla::XlaOp GatherRows(xla::XlaOp values, xla::XlaOp indices, const MaskLayout& layout);

// DimsOf(kept, inner) floats, with rows replaced that `indices` name, which ascend; those out of range are dropped.
xla::XlaOp ScatterRows(xla::XlaOp value, xla::XlaOp indices, xla::XlaOp rows, const MaskLayout& layout, int64_t count,
                       tensorflow::DataType dtype, xla::PrimitiveType type);

// A tensor [rows, width]: the sum of the values that each row is named for, zeros where none is. A row that is out of
// range is dropped.
xla::XlaOp SumOfRows(xla::XlaOp values, xla::XlaOp indices, int64_t rows, int64_t width);

}  // namespace freezeops

#endif  // FREEZEOPS_OPS_COMMON_XLA_HELPERS_H_
