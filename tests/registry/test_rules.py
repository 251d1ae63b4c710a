"""What users say about masks: polarity, `where`, patterns, layers, and the order of calls."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import freezeops as fz
from freezeops.masks.where import named_entries


def dense_model(names=("encoder", "head")):
    layers = [keras.layers.Dense(4, name=name) for name in names]
    model = keras.Sequential([keras.Input((3,)), *layers])
    return model


@pytest.fixture(params=["before build", "after build"])
def when(request):
    return request.param


def optimizer_for(variables, when, calls, **kwargs):
    """An optimizer on which `calls` are made before or after it is built."""
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(1.0), **kwargs)
    if when == "after build":
        optimizer.build(variables)
        calls(optimizer)
    else:
        calls(optimizer)
        optimizer.build(variables)
    return optimizer


def trained(optimizer, variable):
    """Which entries of a variable a step of ones moves."""
    before = variable.numpy()
    optimizer.apply([tf.ones(variable.shape)], [variable])
    return variable.numpy() != before


def test_true_is_trainable(when):
    variable = keras.Variable(np.zeros((2, 3), "float32"))
    mask = np.array([[True, False, True], [False, False, True]])
    optimizer = optimizer_for([variable], when, lambda o: o.register_mask(variable, mask))
    assert np.array_equal(optimizer.mask_for(variable).to_numpy(), mask)
    assert np.array_equal(trained(optimizer, variable), mask)


WHERES = {
    "boolean array": (np.eye(4, 5, dtype=bool), np.eye(4, 5, dtype=bool)),
    "nested list": (np.eye(4, 5, dtype=bool).tolist(), np.eye(4, 5, dtype=bool)),
    "tensor": (tf.eye(4, 5) > 0, np.eye(4, 5, dtype=bool)),
    "broadcast rows": (np.array([[True], [False]] * 2), np.arange(4)[:, None] % 2 == 0),
    "broadcast columns": (np.array([[True, False, False, True, False]]), np.isin(range(5), [0, 3])),
    "scalar": (True, True),
    "scalar false": (False, False),
    "none": (None, True),
    "slice": (np.s_[:2], np.arange(4)[:, None] < 2),
    "tuple": (np.s_[1:, 2], (np.arange(4)[:, None] >= 1) & (np.arange(5) == 2)),
    "ellipsis": (np.s_[..., 2], np.arange(5) == 2),
    "only ellipsis": (..., True),
    "element": ((1, 2), (np.arange(4)[:, None] == 1) & (np.arange(5) == 2)),
    "negative step": (np.s_[::-2], np.arange(4)[:, None] % 2 == 1),
    "pairs": (([0, 3], [1, 2]), (np.arange(20).reshape(4, 5) == 1) | (np.arange(20).reshape(4, 5) == 17)),
    "boolean in tuple": ((np.array([True, False, False, True]), 0), np.isin(np.arange(20), [0, 15]).reshape(4, 5)),
    "integer": (2, np.arange(4)[:, None] == 2),
    "list of rows": ([0, 2], np.isin(range(4), [0, 2])[:, None]),
    "array of rows": (np.array([-1, 0, 0]), np.isin(range(4), [0, 3])[:, None]),
    "no rows": ([], False),
}  # fmt: skip


@pytest.mark.parametrize("case", WHERES)
@pytest.mark.parametrize("verb", ["freeze", "unfreeze", "train_only"])
def test_verbs_act_on_what_where_names(verb, case, when):
    where, named = WHERES[case]
    named = np.broadcast_to(named, (4, 5))
    start = np.arange(20).reshape(4, 5) % 3 == 0
    variable = keras.Variable(np.zeros((4, 5), "float32"), name="v")

    def calls(optimizer):
        optimizer.register_mask(variable, start)
        getattr(optimizer, verb)(variable, where)

    optimizer = optimizer_for([variable], when, calls)
    expected = {"freeze": start & ~named, "unfreeze": start | named, "train_only": named}[verb]
    assert np.array_equal(optimizer.mask_for(variable).to_numpy(), expected)
    assert np.array_equal(trained(optimizer, variable), expected)


def test_where_takes_few_bits_where_few_are_needed():
    assert named_entries(np.s_[:50], (100, 64)).nbytes == 13
    assert named_entries([3, 5], (100, 64)).nbytes == 13
    assert named_entries(np.s_[:, 3], (100, 64)).nbytes == 8
    assert named_entries(np.s_[..., 3, :], (10, 20, 30)).nbytes == 3
    assert named_entries(None, (100, 64)).nbytes == 1


def test_calls_apply_in_order_and_the_last_wins(when):
    variable = keras.Variable(np.zeros((6,), "float32"))

    def calls(optimizer):
        optimizer.train_only(variable, [0])
        optimizer.freeze(variable)
        optimizer.unfreeze(variable, np.s_[2:5])
        optimizer.freeze(variable, 3)

    optimizer = optimizer_for([variable], when, calls)
    assert optimizer.mask_for(variable).indices().tolist() == [2, 4]


def test_register_mask_replaces(when):
    variable = keras.Variable(np.zeros((6,), "float32"))

    def calls(optimizer):
        optimizer.freeze(variable)
        optimizer.register_mask(variable, np.arange(6) < 2)

    optimizer = optimizer_for([variable], when, calls)
    assert optimizer.mask_for(variable).indices().tolist() == [0, 1]


def test_mask_for_before_build_follows_the_rules():
    model = dense_model()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), masks={"head/kernel": np.eye(4) > 0})
    optimizer.freeze("head/kernel", 0)
    optimizer.freeze(model.get_layer("encoder"))
    assert optimizer.mask_for(model.get_layer("head").kernel).indices().tolist() == [5, 10, 15]
    assert optimizer.mask_for(model.get_layer("encoder").bias).count() == 0
    assert optimizer.mask_for(model.get_layer("head").bias).density == 1.0


def test_users_array_is_copied():
    variable = keras.Variable(np.zeros((3,), "float32"))
    mask = np.array([True, False, True])
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.register_mask(variable, mask)
    mask[:] = False
    optimizer.build([variable])
    assert optimizer.mask_for(variable).indices().tolist() == [0, 2]


@pytest.mark.parametrize("where", [np.eye(4, dtype=int), [(0, 1), (2, 2)], np.argwhere(np.eye(4) > 0)])
def test_integer_arrays_of_more_axes_are_refused(where, when):
    variable = keras.Variable(np.zeros((4, 4), "float32"))
    with pytest.raises(ValueError, match=r"must be a vector.*`where\.astype\(bool\)`"):
        optimizer_for([variable], when, lambda o: o.freeze(variable, where))


def test_targets_may_be_generators_and_are_copied(when):
    model = dense_model()
    targets = [model.layers[1]]

    def calls(optimizer):
        optimizer.freeze(layer for layer in model.layers[:1])
        optimizer.freeze(targets)
        targets.clear()

    optimizer = optimizer_for(model.trainable_variables, when, calls)
    assert optimizer.density == 0.0


# Targets.


def frozen_paths(optimizer, model):
    return {v.path for v in model.trainable_variables if not optimizer.mask_for(v).count()}


TARGETS = {
    "variable": (lambda m: m.layers[0].kernel, {"net/encoder/kernel"}),
    "tf.Variable": (lambda m: m.layers[0].kernel.value, {"net/encoder/kernel"}),
    "layer": (lambda m: m.layers[1], {"net/head/kernel", "net/head/bias"}),
    "model": (lambda m: m, {f"net/{a}/{b}" for a in ("encoder", "head") for b in ("kernel", "bias")}),
    "list": (lambda m: [m.layers[0].bias, m.layers[1]], {"net/encoder/bias", "net/head/kernel", "net/head/bias"}),
    "nested lists": (lambda m: [[m.layers[0].bias], ("head/bias",)], {"net/encoder/bias", "net/head/bias"}),
    "whole path": (lambda m: "net/head/kernel", {"net/head/kernel"}),
    "tail of path": (lambda m: "head/kernel", {"net/head/kernel"}),
    "pattern": (lambda m: r".*/bias", {"net/encoder/bias", "net/head/bias"}),
    "pattern on a tail": (lambda m: r"e.*r/.*", {"net/encoder/kernel", "net/encoder/bias"}),
    "alternatives": (lambda m: r"(encoder|head)/kernel", {"net/encoder/kernel", "net/head/kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_targets(case, when):
    target, expected = TARGETS[case]
    # Sequential puts its name in front when it builds its layers itself.
    layers = [keras.layers.Dense(4, name="encoder"), keras.layers.Dense(4, name="head")]
    model = keras.Sequential(layers, name="net")
    model.build((None, 3))
    assert {v.path for v in model.trainable_variables} == TARGETS["model"][1]
    optimizer = optimizer_for(model.trainable_variables, when, lambda o: o.freeze(target(model)))
    assert frozen_paths(optimizer, model) == expected


def test_part_of_a_name_is_not_enough(when):
    model = dense_model()
    with pytest.raises(ValueError, match="matches nothing"):
        optimizer_for(model.trainable_variables, when, lambda o: o.freeze("ernel"))


def test_plain_name_that_fits_two_is_ambiguous(when):
    model = dense_model()
    with pytest.raises(ValueError, match=r"plain name must fit one.*'kernel'.*encoder/kernel.*head/kernel"):
        optimizer_for(model.trainable_variables, when, lambda o: o.freeze("kernel"))


def test_whole_path_is_not_ambiguous(when):
    with keras.name_scope("a"):
        inner = keras.Variable(np.zeros(2, "float32"), name="kernel")
    outer = keras.Variable(np.zeros(2, "float32"), name="kernel")
    assert (inner.path, outer.path) == ("a/kernel", "kernel")
    optimizer = optimizer_for([inner, outer], when, lambda o: o.freeze("kernel"))
    assert [optimizer.mask_for(v).count() for v in (inner, outer)] == [2, 0]


def test_unmatched_pattern_lists_the_nearest_paths(when):
    model = dense_model()
    with pytest.raises(ValueError, match=r"'encoder/kernl', which matches nothing.*encoder/kernel"):
        optimizer_for(model.trainable_variables, when, lambda o: o.freeze("encoder/kernl"))


def test_unknown_variable(when):
    model = dense_model()
    stranger = keras.Variable(np.zeros(3, "float32"), name="stranger")
    with pytest.raises(ValueError, match=r"built with\. Received: variable 'stranger' of shape \(3,\)"):
        optimizer_for(model.trainable_variables, when, lambda o: o.freeze(stranger))


def test_unbuilt_layer(when):
    model = dense_model()
    with pytest.raises(ValueError, match=r"must have been built.*'late'"):
        optimizer_for(model.trainable_variables, when, lambda o: o.freeze(keras.layers.Dense(2, name="late")))


def test_layer_that_is_built_between_rule_and_optimizer():
    model = keras.Sequential([keras.layers.Dense(4), keras.layers.ReLU(), keras.layers.Dense(2)])
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.freeze(model.layers[:2])
    model.build((None, 3))
    optimizer.build(model.trainable_variables)
    counts = [optimizer.mask_for(v).count() for v in model.trainable_variables]
    assert counts == [0, 0, 8, 2]


def test_layers_without_variables_are_no_error(when):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.ReLU()])
    optimizer = optimizer_for(model.trainable_variables, when, lambda o: o.freeze(model.layers))
    assert optimizer.density == 0.0


def test_frozen_batch_normalization_warns(when):
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm")])
    with pytest.warns(UserWarning, match=r"still moves in the forward pass: .*norm/moving_mean"):
        optimizer_for(model.trainable_variables, when, lambda o: o.freeze(model))


def test_no_warning_where_nothing_moves(when, recwarn):
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)])
    norm = model.layers[0]
    norm.trainable = False
    dense = dense_model()
    optimizer_for(dense.trainable_variables, when, lambda o: o.freeze([dense, norm]))
    assert not [w for w in recwarn if "still moves" in str(w.message)]


def test_module_as_target(when):
    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.weight = tf.Variable(tf.zeros((2, 2)), name="weight")

    module = Module()
    optimizer = optimizer_for(module.trainable_variables, when, lambda o: o.freeze(module))
    assert optimizer.mask_for(module.weight).count() == 0


def test_tf_variable_by_name(when):
    variable = tf.Variable(tf.zeros((2, 2)), name="weight")
    optimizer = optimizer_for([variable], when, lambda o: o.freeze("weight", 0))
    assert np.array_equal(trained(optimizer, variable), [[False, False], [True, True]])


# What is set aside.


def test_layouts_chosen_at_build():
    variables = [keras.Variable(np.zeros((8, 6), "float32"), name=f"v{i}") for i in range(6)]
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), maskable={"v3": "columns", "v4": "none", "v5": "rows"})
    optimizer.freeze(variables[1], [0, 1])
    optimizer.freeze(variables[2])
    optimizer.build(variables)
    bytes_ = [report.bytes for report in optimizer.describe()]
    # One bit per entry where nothing is known, or only that all is frozen.
    assert bytes_ == [6, 1, 6, 1, 0, 1]


def test_later_mask_that_does_not_fit_names_maskable():
    variable = keras.Variable(np.zeros((8, 6), "float32"), name="table")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.freeze(variable, [0, 1])
    optimizer.build([variable])
    optimizer.freeze(variable, [2])
    with pytest.raises(ValueError, match=r"maskable={'table': 'elements'}"):
        optimizer.freeze(variable, (3, 3))
    assert optimizer.mask_for(variable) == fz.Mask.rows((8, 6), [3, 4, 5, 6, 7])


def test_maskable_elements_keeps_every_entry_open():
    variable = keras.Variable(np.zeros((8, 6), "float32"), name="table")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), maskable={"table": "elements"})
    optimizer.freeze(variable, [0, 1])
    optimizer.build([variable])
    optimizer.freeze(variable, (3, 3))
    assert optimizer.mask_for(variable).count() == 35


def test_rules_that_ask_for_more_than_maskable():
    variable = keras.Variable(np.zeros((8, 6), "float32"), name="table")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), maskable={"table": "rows"})
    optimizer.freeze(variable, np.s_[:, 1])
    with pytest.raises(ValueError, match="must fit into what was set aside"):
        optimizer.build([variable])
    assert not optimizer.built and not optimizer.inner_optimizer.built


def test_not_maskable():
    variable = keras.Variable(np.zeros((8,), "float32"), name="v")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), maskable={"v": "none"})
    optimizer.build([variable])
    with pytest.raises(ValueError, match="has no bits"):
        optimizer.freeze(variable)
    optimizer.unfreeze(variable)
    assert trained(optimizer, variable).all()


# Permanent.


def test_permanent_has_no_slots():
    model = dense_model()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    optimizer.freeze("encoder/.*", permanent=True)
    optimizer.build(model.trainable_variables)
    names = [v.path for v in optimizer.variables]
    assert not [name for name in names if "encoder" in name]
    before = [v.numpy() for v in model.trainable_variables]
    optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables])
    moved = [(v.numpy() != b).any() for v, b in zip(model.trainable_variables, before, strict=True)]
    assert moved == [False, False, True, True]
    with pytest.raises(ValueError, match=r"must stay frozen.*encoder/kernel"):
        optimizer.unfreeze("encoder/kernel", 0)
    with pytest.raises(ValueError, match=r"must stay frozen"):
        optimizer.register_mask("encoder/kernel", True)
    optimizer.freeze("encoder/kernel")
    assert optimizer.mask_for(model.layers[0].kernel).count() == 0
    assert optimizer.mask_gradients([tf.ones((3, 4))], [model.layers[0].kernel])[0].numpy().sum() == 0


def test_permanent_everywhere_still_counts_steps():
    model = dense_model()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    optimizer.freeze(model, permanent=True)
    optimizer.build(model.trainable_variables)
    optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables])
    optimizer.finalize_variable_values(model.trainable_variables)
    assert int(optimizer.iterations) == 1


def test_permanent_misused():
    model = dense_model()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam())
    with pytest.raises(ValueError, match="`where` must be None with `permanent=True`"):
        optimizer.freeze("head/kernel", 0, permanent=True)
    optimizer.freeze("head/kernel", permanent=True)
    optimizer.unfreeze("head/kernel", 0)
    with pytest.raises(ValueError, match="must stay frozen"):
        optimizer.build(model.trainable_variables)
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam())
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.freeze("head/kernel", permanent=True)
    assert optimizer.density == 1.0
