"""Where the values of a training step would be on a GPU, read from its graph and TensorFlow's table of kernels.

Needs no GPU, but a TensorFlow that has GPU kernels. A value that a kernel makes in device memory and another wants in
host memory is a copy for which the step waits: masks must add none.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework.kernels import get_registered_kernels_for_op

import freezeops as fz
from freezeops.ops import native


@pytest.fixture(autouse=True)
def needs_kernels():
    if not any(k.device_type == "GPU" for k in get_registered_kernels_for_op("MatMul").kernel):
        pytest.skip("this TensorFlow has no GPU kernels")
    if native.cuda_kernels() is None:
        pytest.skip("the library in use has no CUDA kernels: it was built without nvcc")


def attribute_types(op, name):
    value = op.get_attr(name)
    return [each.as_datatype_enum for each in (value if isinstance(value, list) else [value])]


def gpu_kernel(op):
    """The kernel that the op would have on a GPU, or None if it has one on the host only."""
    found = {}
    for kernel in get_registered_kernels_for_op(op.type).kernel:
        types = {c.name: set(c.allowed_values.list.type) for c in kernel.constraint if c.allowed_values.list.type}
        if all(set(attribute_types(op, name)) <= allowed for name, allowed in types.items()):
            found[kernel.device_type] = kernel
    return found.get("GPU") or found.get("DEFAULT")


def on_host(op, arguments, count):
    """For each of an op's inputs, or outputs, whether it is in host memory."""
    kernel = gpu_kernel(op)
    places = []
    for argument in arguments:
        number = 1
        if argument.number_attr:
            number = op.get_attr(argument.number_attr)
        elif argument.type_list_attr:
            number = len(op.get_attr(argument.type_list_attr))
        places += [kernel is None or argument.name in kernel.host_memory_arg] * number
    assert len(places) == count
    return places


def copies_to_host(graph):
    """Pairs of ops between which a value would be copied from the device to the host."""
    copies = []
    for op in graph.get_operations():
        wants_on_host = on_host(op, op.op_def.input_arg, len(op.inputs))
        for tensor, wanted in zip(op.inputs, wants_on_host, strict=True):
            made = tensor.op
            if made.type == "Placeholder":  # what the function is given: handles, and tensors on the device
                made_on_host = tensor.dtype in (tf.resource, tf.int32)
            else:
                made_on_host = on_host(made, made.op_def.output_arg, len(made.outputs))[tensor.value_index]
            if wanted and not made_on_host:
                copies.append((made.type, op.type, tensor.dtype.name))
    return sorted(copies)


def graph_of_step(optimizer, gradient, **masking):
    variable = keras.Variable(np.ones((64, 40), "float32"), name="w")
    optimizer = fz.MaskedOptimizer(optimizer, **masking) if masking else optimizer
    if masking:
        optimizer.register_mask(variable, np.random.default_rng(0).random((64, 40)) < 0.5)
    optimizer.build([variable])
    step = tf.function(lambda g: optimizer.apply([g], [variable]), autograph=False)
    return step.get_concrete_function(gradient).graph


DENSE = tf.TensorSpec([64, 40])
SLICES = tf.IndexedSlicesSpec([64, 40], tf.float32, tf.int64, tf.int32, [None])


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "Adam": lambda: keras.optimizers.Adam(0.1),
    "AdamW": lambda: keras.optimizers.AdamW(0.1, use_ema=True, clipnorm=1.0),
}


# Those that have no option which keeps a step from being fused.
FUSED = {
    "SGD momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "AdamW": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.1, 10)),
    "Adam amsgrad": lambda: keras.optimizers.Adam(0.1, amsgrad=True),
}


def added_copies(make, gradient, **masking):
    bare = copies_to_host(graph_of_step(make(), gradient))
    graph = graph_of_step(make(), gradient, **masking)
    added = copies_to_host(graph)
    for each in bare:
        if each in added:
            added.remove(each)
    return added, graph


@pytest.mark.parametrize("gradient", [DENSE, SLICES], ids=["dense", "sparse"])
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_add_no_copy_to_the_host(name, state, gradient):
    added, _ = added_copies(OPTIMIZERS[name], gradient, state=state)
    assert not added


@pytest.mark.parametrize("gradient", [DENSE, SLICES], ids=["dense", "sparse"])
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_add_no_copy_to_the_host(name, state, gradient):
    added, graph = added_copies(FUSED[name], gradient, state=state, fused=True)
    assert not added
    (fused,) = [op for op in graph.get_operations() if op.type == "Freezeops>FusedUpdate"]
    assert gpu_kernel(fused) is not None and gpu_kernel(fused).device_type == "GPU"


def test_a_copy_would_be_seen():
    @tf.function(autograph=False)
    def step(x):
        return tf.reshape(x, [tf.cast(tf.reduce_max(x), tf.int32)])

    assert copies_to_host(step.get_concrete_function(DENSE).graph)
