"""The catalogue of optimizers: nothing is missing in it, subclasses are treated as it says, missing slots are loud."""

import pickle
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import FUSED, MIXING, OPTIONS, SETUPS, optimizer_classes
from fused_variables import RULES

import freezeops as fz
from freezeops.ops import reference_updates
from freezeops.slots import lookup
from freezeops.slots.catalogue import Known, UpdateFormula, known_of, known_slots_of
from freezeops.step.formulas import formula_of

UNKNOWN = {
    "Optimizer": "the base class",
    "LossScaleOptimizer": "a wrapper",
    "MultiOptimizer": "a wrapper",
    "OptimizerMap": "an argument of MultiOptimizer",
}
"""Classes in `keras.optimizers` of which the catalogue knows nothing, and why."""


def class_of(setup):
    return getattr(keras.optimizers, setup.split()[0])


def built(setup, **options):
    optimizer = SETUPS[setup](**options)
    optimizer.build([keras.Variable(np.ones(shape), name=f"v{len(shape)}") for shape in [(3,), (4, 5)]])
    return optimizer


def expected_slots(optimizer):
    """The attributes that must hold slots, as far as the catalogue says."""
    slots, made_if = known_slots_of(type(optimizer))
    return [name for name in slots if name not in made_if or made_if[name](optimizer)]


class TestEveryOptimizerOfKeras:
    def test_is_in_the_catalogue(self):
        """A new one in `keras.optimizers` is to be described there, or here with the reason that it cannot be."""
        unknown = {name for name in optimizer_classes() if known_of(getattr(keras.optimizers, name)) == Known()}
        assert unknown == {name for name in UNKNOWN if hasattr(keras.optimizers, name)}

    def test_is_elementwise_or_says_why_not(self):
        said = {setup: known_of(class_of(setup)).elementwise for setup in SETUPS}
        assert {setup for setup, why in said.items() if isinstance(why, str)} == {*MIXING} & {*SETUPS}
        assert all(why is True for setup, why in said.items() if setup not in MIXING)

    @pytest.mark.parametrize("setup", SETUPS)
    def test_has_the_slots_that_are_known(self, setup):
        optimizer = built(setup)
        assert lookup.missing_slots(optimizer) == []
        assert expected_slots(optimizer) or setup == "SGD"
        seen = [[state.name for _, state in slots] for _, slots in lookup.slots_of(optimizer)]
        assert len(seen) == 2 and all(len(names) == len(set(names)) for names in seen)
        # Muon has one slot for a matrix, and two for all else.
        assert len(seen[0]) == len(expected_slots(optimizer))
        assert len(seen[1]) == len(expected_slots(optimizer)) - (setup == "Muon")

    @pytest.mark.parametrize("setup", SETUPS)
    def test_has_no_slots_of_unknown_role(self, setup):
        """But those that are not of their variable's shape: Adafactor's rows and columns."""
        optimizer = built(setup)
        known = {id(state) for _, slots in lookup.slots_of(optimizer) for _, state in slots}
        shapes = {tuple(variable.shape) for variable in optimizer._trainable_variables}
        unknown = [v.path for v in optimizer.variables if id(v) not in known and tuple(v.shape) in shapes]
        assert unknown == []

    @pytest.mark.parametrize("setup", SETUPS)
    def test_leaves_rows_without_gradients_alone_only_as_plain_sgd(self, setup):
        for option, arguments in OPTIONS.items():
            rows_only = setup == "SGD" and option in ("plain", "clipnorm", "clipvalue")
            assert lookup.writes_only_rows_with_gradients(SETUPS[setup](**arguments)) == rows_only, option


class TestFormulas:
    def formulas(self):
        optimizers = [built(setup) for setup in FUSED]
        optimizers += [built("RMSprop", **options) for options in ({"momentum": 0.9}, {"centered": True})]
        return [(optimizer, known_of(type(optimizer)).formula(optimizer)) for optimizer in optimizers]

    def test_are_there_for_the_optimizers_that_are_fused(self):
        assert {setup for setup in SETUPS if known_of(class_of(setup)).formula} == set(FUSED)

    def test_have_a_twin_each_and_tests(self):
        names = {formula.name for _, formula in self.formulas()}
        assert names == reference_updates.UPDATES.keys() == RULES.keys()

    def test_fit_the_twins(self):
        for optimizer, formula in self.formulas():
            slot_count, scalars = RULES[formula.name]
            assert set(formula.slots) <= set(expected_slots(optimizer)), formula.name
            assert len(formula.slots) == slot_count, formula.name
            # The twins also take the weight decay, and the rate that it is multiplied by.
            assert len(formula.scalars(optimizer, tf.constant(0.1), "float32")) + 2 == len(scalars), formula.name


class TestSubclasses:
    def test_inherit_slots_and_nothing_else(self):
        for setup in SETUPS:
            parent = class_of(setup)
            child = type("Child", (parent,), {})
            assert known_slots_of(child) == known_slots_of(parent)
            assert known_of(child) == Known()

    def test_of_keras_are_in_the_catalogue_themselves(self):
        adamw = keras.optimizers.AdamW
        assert known_of(adamw).elementwise is True and isinstance(
            known_of(adamw).formula(built("AdamW")), UpdateFormula
        )
        assert known_slots_of(adamw) == known_slots_of(keras.optimizers.Adam)

    def test_declare_their_own(self):
        child = type("Child", (keras.optimizers.Adam,), {})
        grandchild = type("Grandchild", (child,), {})
        fz.declare_elementwise(child)
        assert known_of(child).elementwise is True and known_of(grandchild).elementwise is None
        assert known_slots_of(child) == known_slots_of(keras.optimizers.Adam)
        slots = {"_momentums": fz.Slot("history")}
        fz.declare_slots(child, slots)
        assert known_slots_of(child)[0] == known_slots_of(grandchild)[0] == slots
        assert known_of(child).elementwise is True
        assert known_slots_of(keras.optimizers.Adam)[0] != slots
        fz.declare_slots(grandchild, {})
        assert known_slots_of(grandchild)[0] == {}

    def test_of_no_known_class_have_no_slots(self):
        assert known_slots_of(type("Own", (keras.optimizers.Optimizer,), {}))[0] == {}


class TestMissingSlots:
    @pytest.fixture(autouse=True)
    def nothing_was_said(self, monkeypatch):
        monkeypatch.setattr(lookup, "_warned_of", set())

    @pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup != "SGD"])
    def test_are_found(self, setup):
        for name in expected_slots(built(setup)):
            for broken in (None, [], 3):
                optimizer = built(setup)
                setattr(optimizer, name, broken)
                assert lookup.missing_slots(optimizer) == [name]
            delattr(optimizer, name)
            # Muon's momentums have had two names.
            assert name in lookup.missing_slots(optimizer)

    def test_are_said_once_when_the_optimizer_is_built(self):
        """As if Keras had renamed them."""
        for number in range(2):
            adam = built("Adam")
            adam._renamed = adam._velocities
            del adam._velocities
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fz.MaskedOptimizer(adam).build(adam._trainable_variables)
            texts = [str(one.message) for one in caught if "must have its slots" in str(one.message)]
            assert len(texts) == (1 if number == 0 else 0)
            assert all("Adam must" in text and "without _velocities" in text for text in texts)
            assert all("freezeops.declare_slots(Adam, ...)" in text for text in texts)

    def test_are_not_fused(self):
        adam = built("Adam")
        assert isinstance(formula_of(adam, adam), UpdateFormula)
        del adam._velocities
        assert formula_of(adam, adam) == "its slots are not where this version of freezeops knows them"

    def test_of_subclasses_are_said_too(self):
        class Bare(keras.optimizers.Adam):
            def build(self, variables):
                keras.optimizers.Optimizer.build(self, variables)

        optimizer = Bare()
        with pytest.warns(UserWarning, match=r"Bare must .*without _momentums, _velocities\. .*declare_slots\(Bare, "):
            fz.MaskedOptimizer(optimizer).build([keras.Variable(np.ones(3), name="v")])
        fz.declare_slots(Bare, {"_m": fz.Slot("first_moment")})
        assert lookup.missing_slots(optimizer) == []

    def test_nothing_is_said_where_none_is_missing(self):
        for setup in SETUPS:
            inner = built(setup)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*must have its slots")
                fz.MaskedOptimizer(inner).build(inner._trainable_variables)


def test_pickles_of_slots_name_the_module_that_they_always_named():
    slot = fz.Slot("history", initial=None)
    data = pickle.dumps(slot)
    assert b"freezeops.slots" in data and b"catalogue" not in data
    assert pickle.loads(data) == slot


def test_power_of_the_gradient_that_seeds():
    assert [fz.Slot(role).power for role in ("first_moment", "second_moment")] == [1, 2]
