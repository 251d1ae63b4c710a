"""The contract with Keras and TensorFlow: everything private of theirs that freezeops uses, in one table.

Each line says whose it is, what it is called, what for, and what is off without it. `check` compares the table with
what is installed, once, as the first `MaskedOptimizer` is made: something that freezeops cannot do without is an error
then, anything else switches a feature off with a warning.

Read in Keras 3.12.0 to 3.15.1 and TensorFlow 2.21. What freezeops uses of tf_keras: `tf_keras_contract.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from freezeops.keras_compat import versions
from freezeops.keras_compat.inspection import arguments_of, find, is_of_package, mentions, sets
from freezeops.notices import warn


@dataclass(frozen=True)
class Feature:
    """A feature that freezeops can do without.

    Attributes:
        name: Its name, for users.
        without: What happens where it is off.
    """

    name: str
    without: str


FUSED = Feature("fused updates", "variables are updated by the inner optimizer's own code")
SEEDING = Feature("seeding", "slots of entries that become trainable go on as with unfreeze_policy='keep'")
SCALER = Feature(
    "masks before a LossScaleOptimizer's checks", "a NaN in a frozen entry makes a LossScaleOptimizer skip the step"
)
SWAP = Feature("SwapEMAWeights", "the callback is refused with a MaskedOptimizer")
AVERAGES = Feature("moving averages", "inner optimizers with use_ema=True are refused")
ACCUMULATION = Feature("gradient accumulation", "inner optimizers with gradient_accumulation_steps are refused")
COMPACT = Feature("compact state", "state='compact' is refused")
REPACK = Feature("repack", "`repack` is refused")
REPLICAS = Feature("several replicas", "tf.distribute strategies with several replicas are refused")
FILES = Feature(
    "what Keras is loading", "skip_mismatch=True is not seen, and files do not build the optimizer that they are for"
)
OTHER_VARIABLES = Feature(
    "names of a model's other variables", "masks of variables that are not trained here may be refused in a load"
)
OLD_CHECKPOINTS = Feature("old checkpoints", "checkpoints of freezeops before masks had layouts are refused")
WRITES = Feature("warnings of other writes", "layers and train steps that write frozen entries are not noticed")


@dataclass(frozen=True)
class Needs:
    """A private name that freezeops uses: a line of a table.

    Attributes:
        owner: Dotted name of the class, module or function that it belongs to.
        name: Its own name.
        what_for: What it is used for.
        without: The feature that is off without it; `None`: freezeops cannot do without.
        arguments: Of a callable: the names of its parameters, without `self`.
        replaced: Whether freezeops puts something of its own in its place, which must take the same arguments.
        called_by: Dotted name of a function that must mention it: what is kept but called no more is of no use.
        on_instances: Whether it is an attribute that methods of the class set.
        in_code: Whether it is looked for in the code of the function `owner`: a local variable that is read from the
            call stack, or an attribute that it uses.
        value: What it must be equal to.
        since: Version of the package that it is new in; it is not looked for in an older one.
    """

    owner: str
    name: str
    what_for: str
    without: Feature | None = None
    arguments: tuple[str, ...] | None = None
    replaced: bool = False
    called_by: str | None = None
    on_instances: bool = False
    in_code: bool = False
    value: Any = None
    since: str = ""

    def __str__(self) -> str:
        return f"`{self.owner}.{self.name}`" if not self.in_code else f"`{self.name}` in `{self.owner}`"

    def problem(self) -> str:
        """Returns what is wrong with it in the installed version; `""` if nothing is."""
        try:
            owner = find(self.owner)
            if self.in_code:
                return "" if mentions(owner, self.name) else f"{self} is missing"
            if self.on_instances:
                return "" if sets(owner, self.name) or hasattr(owner, self.name) else f"{self} is missing"
            found = find(f"{self.owner}.{self.name}")
        except AttributeError:
            return f"{self} is missing"
        if self.value is not None and found != self.value:
            return f"{self} is {found!r}, not {self.value!r}"
        if self.arguments is not None and (wrong := self._wrong_arguments(found)):
            return wrong
        if self.called_by is not None:
            try:
                caller = find(self.called_by)
            except AttributeError:
                return f"`{self.called_by}`, which calls {self}, is missing"
            # Of somebody's wrapper around the caller nothing is known.
            if is_of_package(caller, self.called_by) and not mentions(caller, self.name):
                return f"`{self.called_by}` does not call {self}"
        return ""

    def _wrong_arguments(self, found: Any) -> str:
        assert self.arguments is not None
        parameters = arguments_of(found)
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            return ""  # somebody's wrapper around it takes anything
        names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        count = len(self.arguments)
        needed = [each for each in parameters[count:] if each.default is each.empty and each.name in names]
        if tuple(names[:count]) != self.arguments or (names[count:] if self.replaced else needed):
            return f"{self} takes ({', '.join(names)}), not ({', '.join(self.arguments)})"
        return ""


class Contract:
    """A table of the private names of one package, compared with what is installed.

    Args:
        package: The package's name, for users.
        module: Its name for Python and `pip`.
        tested: The oldest and the newest version that freezeops is tested with.
        needs: The table.
    """

    def __init__(self, package: str, module: str, tested: tuple[str, str], needs: Sequence[Needs]):
        self.package = package
        self.module = module
        self.tested = tested
        self.needs = list(needs)
        self._broken: list[tuple[Needs, str]] | None = None
        self._told = False

    def broken(self) -> list[tuple[Needs, str]]:
        """Returns the lines that do not hold in the installed version, each with what is wrong."""
        if self._broken is None:
            problems = [(need, need.problem()) for need in self.needs if not self._is_too_old(need)]
            self._broken = [(need, problem) for need, problem in problems if problem]
        return self._broken

    def off(self) -> dict[Feature, list[str]]:
        """Returns the features that are off, each with what is wrong."""
        features: dict[Feature, list[str]] = {}
        for need, problem in self.broken():
            if need.without is not None:
                features.setdefault(need.without, []).append(problem)
        return features

    def check(self) -> None:
        """Raises if something is missing that freezeops cannot do without; warns once of features that are off.

        Raises:
            RuntimeError: If freezeops cannot work with the installed version.
        """
        if required := [problem for need, problem in self.broken() if need.without is None]:
            raise RuntimeError(f"{self._versions()}, where {'; '.join(required)}. {self._advice()}")
        if self.off() and not self._told:
            self._told = True
            warn(f"{self._versions()}. Off: {'; '.join(self.notes())}. {self._advice()}")

    def notes(self) -> list[str]:
        """Returns a sentence for each feature that is off."""
        return [
            f"{feature.name} ({problems[0]}{' and more' if len(problems) > 1 else ''}): {feature.without}"
            for feature, problems in self.off().items()
        ]

    def advice(self, feature: Feature) -> str:
        """Returns why a feature is off, and what to do."""
        return f"{'; '.join(self.off().get(feature, []))}. {self._advice()}"

    def version(self) -> str:
        """Returns the installed version."""
        return str(getattr(find(self.module), "__version__", "unknown"))

    def _versions(self) -> str:
        oldest, newest = self.tested
        return f"freezeops is known to work with {self.package} {oldest} to {newest}. Installed is {self.version()}"

    def _advice(self) -> str:
        return (
            f"Install a version that is known to work (pip install '{self.module}=={self.tested[1]}.*'), or a newer "
            "freezeops. `python -m freezeops` says more"
        )

    def _is_too_old(self, need: Needs) -> bool:
        return bool(need.since) and _numbers(self.version()) < _numbers(need.since)


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


_VALUES = "tensorflow.python.distribute.values.DistributedVariable"
_GRAPH = "tensorflow.python.framework.func_graph.FuncGraph"
_TRACKABLE = "tf.__internal__.tracking.AutoTrackable"

TENSORFLOW = Contract(
    "TensorFlow",
    "tensorflow",
    versions.TENSORFLOW,
    [
        Needs(
            "tensorflow.python.ops.resource_variable_ops.BaseResourceVariable",
            "_unique_id",
            "by which variables are told apart, and by which optimizers find the slots of a compact variable",
            on_instances=True,
        ),
        Needs("tf.__internal__", "tracking", "masks in checkpoints and SavedModels"),
        Needs(_TRACKABLE, "_trackable_children", "masks in checkpoints", arguments=("save_type",), replaced=True),
        Needs(
            _TRACKABLE,
            "_lookup_dependency",
            "restores masks before variables",
            arguments=("name", "cached_dependencies"),
            replaced=True,
            called_by="tensorflow.python.checkpoint.restore._queue_children_for_restoration",
        ),
        Needs(
            _VALUES,
            "_distributed_container",
            "from a replica's copy of a variable to the variable",
            REPLICAS,
            on_instances=True,
        ),
        Needs(
            "tensorflow.python.distribute.collective_all_reduce_strategy.CollectiveAllReduceExtended",
            "_num_workers",
            "masks that begin alike in several workers",
            REPLICAS,
            on_instances=True,
        ),
        Needs("tf.raw_ops", "AssignVariableOp", "takes the values out of a variable that is in use no more", REPACK),
        Needs("tf.raw_ops", "VariableShape", "finds functions that were traced before `repack`", REPACK),
        Needs(_GRAPH, "_scope_exit_callbacks", "looks at a function once it is traced", WRITES, on_instances=True),
        Needs(_GRAPH, "_add_scope_exit_callback", "looks at a function once it is traced", WRITES, ("fn",)),
        Needs(_GRAPH, "_watched_variables", "which variables a function reads", WRITES, on_instances=True),
        Needs(_GRAPH, "_get_function", "functions that a function calls", WRITES, ("name",)),
        Needs(_GRAPH, "outer_graph", "the outermost of the functions that are traced", WRITES, on_instances=True),
        Needs(
            "tensorflow.python.framework.auto_control_deps_utils",
            "READ_ONLY_RESOURCE_INPUTS_ATTR",
            "which variables a called function only reads",
            WRITES,
            value="_read_only_resource_inputs",
        ),
        Needs(
            "tensorflow.python.checkpoint.checkpoint._CheckpointRestoreCoordinator",
            "all_python_objects",
            "the model that a checkpoint is restored into",
            OTHER_VARIABLES,
            on_instances=True,
        ),
        Needs(
            "tensorflow.python.checkpoint.restore._queue_children_for_restoration",
            "checkpoint_position",
            "the checkpoint that is restored just now",
            OLD_CHECKPOINTS,
            in_code=True,
        ),
        Needs(_TRACKABLE, "_serialize_to_tensors", "consumes variables of an old checkpoint", OLD_CHECKPOINTS, ()),
        Needs(
            _TRACKABLE,
            "_restore_from_tensors",
            "consumes variables of an old checkpoint",
            OLD_CHECKPOINTS,
            ("restored_tensors",),
            replaced=True,
        ),
        Needs(
            "tensorflow.core.protobuf.trackable_object_graph_pb2",
            "TrackableObjectGraph",
            "masks of an old checkpoint, read without an optimizer",
            OLD_CHECKPOINTS,
        ),
        Needs(
            "tensorflow.python.trackable.base",
            "OBJECT_GRAPH_PROTO_KEY",
            "masks of an old checkpoint, read without an optimizer",
            OLD_CHECKPOINTS,
            value="_CHECKPOINTABLE_OBJECT_GRAPH",
        ),
    ],
)

_OPTIMIZER = "keras.optimizers.Optimizer"
_SCALER = "keras.optimizers.LossScaleOptimizer"
_SWAP = "keras.callbacks.SwapEMAWeights"
_SAVING = "keras.src.saving.saving_lib"

KERAS = Contract(
    "Keras",
    "keras",
    versions.KERAS,
    [
        Needs(
            _OPTIMIZER,
            "_trainable_variables",
            "the variables that an optimizer was built with, in the order of its slots",
            on_instances=True,
        ),
        Needs(
            _OPTIMIZER,
            "_trainable_variables_indices",
            "builds a wrapper without slots of its own",
            on_instances=True,
        ),
        Needs(_OPTIMIZER, "_var_key", "builds a wrapper without slots of its own", arguments=("variable",)),
        Needs(_OPTIMIZER, "_iterations", "counts a step in which every variable is frozen", on_instances=True),
        Needs(_OPTIMIZER, "_variables", "an optimizer's own variables, in files", on_instances=True),
        Needs(_OPTIMIZER, "_learning_rate", "how many variables an optimizer has before its build", on_instances=True),
        Needs(_OPTIMIZER, "_distribution_strategy", "creates variables where a strategy has them", on_instances=True),
        Needs(
            _OPTIMIZER,
            "add_variable_from_reference",
            "which slots an optimizer makes for a variable",
            arguments=("reference_variable", "name", "initializer"),
            replaced=True,
            called_by=f"{_OPTIMIZER}.add_optimizer_variables",
        ),
        Needs(_OPTIMIZER, "save_own_variables", "stores state once, by names", arguments=("store",), replaced=True),
        Needs(_OPTIMIZER, "load_own_variables", "refuses state that does not fit", arguments=("store",), replaced=True),
        Needs(
            _OPTIMIZER,
            "_model_variables_moving_average",
            "averages of frozen entries are the entries themselves",
            AVERAGES,
            on_instances=True,
        ),
        Needs(
            _OPTIMIZER,
            "_accumulated_gradients",
            "what was accumulated for an entry that is frozen now is dropped",
            ACCUMULATION,
            on_instances=True,
        ),
        Needs(
            _OPTIMIZER,
            "_apply_weight_decay",
            "leaves out variables that are updated in one pass",
            FUSED,
            ("variables",),
            replaced=True,
            called_by=f"{_OPTIMIZER}._backend_apply_gradients",
        ),
        Needs(
            _OPTIMIZER,
            "_distributed_tf_update_step",
            "updates variables in one pass",
            FUSED,
            ("distribution", "grads_and_vars", "learning_rate"),
            replaced=True,
            called_by=f"{_OPTIMIZER}._backend_update_step",
        ),
        Needs(_OPTIMIZER, "_use_weight_decay", "whether weight decay is for a variable", FUSED, ("variable",)),
        Needs("keras.optimizers.Nadam", "_u_product", "the factors of a step of Nadam", FUSED, on_instances=True),
        Needs(
            _OPTIMIZER,
            "update_step",
            "seeds slots right before a variable is updated",
            SEEDING,
            ("gradient", "variable", "learning_rate"),
            replaced=True,
            called_by=f"{_OPTIMIZER}._distributed_tf_update_step",
        ),
        Needs(
            _SCALER,
            "_tf_apply",
            "masks gradients before they are checked for NaN",
            SCALER,
            ("grads", "trainable_variables"),
            replaced=True,
            called_by=f"{_SCALER}.apply",
        ),
        Needs(f"{_SCALER}.build", "self", "the scaler that builds an optimizer", SCALER, in_code=True),
        Needs(f"{_SCALER}.build", "inner_optimizer", "the scaler that builds an optimizer", SCALER, in_code=True),
        *(
            Needs(_SWAP, name, "keeps frozen entries", SWAP, (), replaced=True, called_by=f"{_SWAP}.{caller}")
            for name, caller in (("_swap_variables", "on_test_begin"), ("_finalize_ema_values", "on_epoch_end"))
        ),
        Needs(_SWAP, "_tf_swap_variables", "swaps behind several wrappers", SWAP, ("optimizer",)),
        Needs(_SWAP, "_tf_finalize_ema_values", "finalizes behind several wrappers", SWAP, ("optimizer",)),
        Needs(
            "keras.Variable", "_path", "gives a compact variable the path of the model's", COMPACT, on_instances=True
        ),
        Needs(
            "keras.optimizers.MultiOptimizer",
            "_optimizer_map",
            "whether all optimizers inside are known",
            COMPACT,
            on_instances=True,
            since="3.15",
        ),
        Needs("keras.Variable", "_initialize", "gives a slot another shape", REPACK, ("value",)),
        Needs("keras.Variable", "_shape", "gives a slot another shape", REPACK, on_instances=True),
        Needs("keras.Variable", "_ndim", "gives a slot another shape", REPACK, on_instances=True),
        Needs(f"{_SAVING}.load_weights_only", "model", "the model that a file is loaded into", FILES, in_code=True),
        Needs(
            f"{_SAVING}.load_weights_only", "skip_mismatch", "whether what does not fit is skipped", FILES, in_code=True
        ),
        Needs(
            f"{_SAVING}._load_model_from_fileobj", "model", "the model that a file is loaded into", FILES, in_code=True
        ),
        Needs("keras.Layer", "_flatten_layers", "layers in layers", WRITES),
        Needs(
            "keras.Layer", "_non_trainable_variables", "state that a forward pass changes", WRITES, on_instances=True
        ),
    ],
)


def check_installed() -> None:
    """Raises unless freezeops can work with the installed Keras and TensorFlow; warns of features that are off.

    Raises:
        RuntimeError: If something is missing that freezeops cannot do without.
    """
    TENSORFLOW.check()
    KERAS.check()


def notes() -> list[str]:
    """Returns a sentence for each feature that is off with the installed Keras and TensorFlow."""
    return TENSORFLOW.notes() + KERAS.notes()


def is_on(feature: Feature) -> bool:
    """Returns `True` if the installed Keras and TensorFlow have all that a feature needs."""
    return feature not in TENSORFLOW.off() and feature not in KERAS.off()


def check_options(optimizer: Any, compact: bool) -> None:
    """Raises if an optimizer needs a feature that is off.

    Args:
        optimizer: An inner optimizer that wraps no other.
        compact: Whether it has compact state.

    Raises:
        RuntimeError: If something that it needs is not there.
    """
    if optimizer.use_ema:
        check(AVERAGES, f"{optimizer.name!r} with use_ema=True")
    if optimizer.gradient_accumulation_steps:
        steps = optimizer.gradient_accumulation_steps
        check(ACCUMULATION, f"{optimizer.name!r} with gradient_accumulation_steps={steps}")
    if compact:
        check(COMPACT, "state='compact'")


def check(feature: Feature, received: str) -> None:
    """Raises if a feature is off that somebody asks for.

    Args:
        feature: The feature.
        received: What was asked for, for the message.

    Raises:
        RuntimeError: If something that it needs is not there.
    """
    for contract in (TENSORFLOW, KERAS):
        if feature in contract.off():
            raise RuntimeError(
                f"{feature.name[0].upper()}{feature.name[1:]} must be left out with {contract.package} "
                f"{contract.version()}: {contract.advice(feature)}. Received: {received}"
            )
