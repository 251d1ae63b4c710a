"""Fused updates against what there is: one step of one variable, and one step of many small variables.

Beside `fz.MaskedOptimizer(..., fused=True)` with full and with compact state:

- Keras, unmasked: what all others are compared with;
- Keras + where: gradients masked by `tf.where` with a boolean mask;
- Keras + keep and restore: that, and the variable's frozen entries are put back after the step;
- ResourceApplyAdam, ResourceApplyMomentum: TensorFlow's own fused update, unmasked;
- the same wrapper with `fused=False`;
- PyTorch (`fused=True`, `foreach=True`) and jitted Optax, unmasked, where the interpreter given by
  `--peers-python` has them. Each works in a process of its own, in turn with all others.

Every step is real: the variable and its slots change, the gradient is made beforehand.
Steps are timed in rounds, in turn. What does not fit into `--memory` together is measured in
groups; the unmasked Keras step, TensorFlow's own, the copy and the rewrite take part in each
group, and ratios are formed within a round. Each group has a process of its own.

The limit: the fewest bytes that the case must move (`_masks.fewest_bytes`: gradient, variable,
slots and mask, counted in the cache lines that hold a trainable entry) at a rate measured in
the same rounds, read plus written. Copy: two threads each copy half of a float32 array of as
many entries to another. Rewrite: they multiply it by 1 in place. An update mostly rewrites, and
where that is faster than copying, more than all of the copy's limit can be reached.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import _common
import _masks
import keras
import numpy as np
import tensorflow as tf
from _masks import WIDTH
from _peers import GRADIENT, MOMENTUM, PEERS, RATE
from rich.table import Table

import freezeops as fz

OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "adam": lambda: keras.optimizers.Adam(RATE),
    "sgd_momentum": lambda: keras.optimizers.SGD(RATE, momentum=MOMENTUM),
}
SLOTS = {"adam": 2, "sgd_momentum": 1}
RESOURCE = {"adam": "ResourceApplyAdam", "sgd_momentum": "ResourceApplyMomentum"}
UNMASKED, OWN = "Keras, unmasked", "TensorFlow's own"
WHERE, RESTORE = "Keras + where", "Keras + keep and restore"
FUSED, UNFUSED = "fused", "not fused"
PASSES = ("copy", "rewrite")
"""Over memory; see `_common.two_thread_passes`."""

DENSITIES = (1.0, 0.5, 0.1, 0.01)
ROWS_DENSITY = 0.01
OTHERS_DENSITY = 0.5
"""Of `tf.where` and what is built on it, which look at every entry whatever the mask is."""

TARGETS = {
    ("full", 1.0, False): 0.25,
    ("full", 0.5, False): 0.25,
    ("compact", 0.5, False): 0.20,
    ("compact", 0.1, False): 0.15,
    ("full", 0.01, False): 0.12,
    ("compact", 0.01, False): 0.06,
    ("full", 0.01, True): 0.012,
    ("compact", 0.01, True): 0.012,
}
"""Adam without XLA: time of a step / time of the unmasked one, at most, by state, density and rows."""
OWN_TARGET = 1.0
"""Adam without XLA, full state, density 1: time of a step / time of ResourceApplyAdam, at most."""
JIT_TARGET = 1.02
"""Under XLA, full state at every density: time of a step / time of the unmasked one, at most."""

INSTANCES = 3
"""How often each step is made up to `LARGE`; see `_common.interleaved`."""
LARGE = _common.size_of("64M")
TENSOR_DENSITY = 0.5
MILLION = 2**20
GIGABYTE = 2**30


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to make a step.

    Attributes:
        kind: One of the names above, or of `_peers.PEERS`.
        density: Share of trainable entries, about.
        rows: Whether whole rows are trainable.
        state: "full" or "compact"; of others than ours "full".
    """

    kind: str
    density: float = 1.0
    rows: bool = False
    state: str = "full"

    @property
    def ours(self) -> bool:
        return self.kind in (FUSED, UNFUSED)

    @property
    def masked(self) -> bool:
        return self.ours or self.kind in (WHERE, RESTORE)

    @property
    def name(self) -> str:
        """For tables, and as a competitor."""
        return f"ours, {self.state}, {self.kind}" if self.ours else self.kind

    @property
    def case(self) -> str:
        """The mask, for tables."""
        return f"{self.density:g}{' rows' if self.rows else ''}" if self.masked else "unmasked"

    @property
    def competitor(self) -> str:
        return f"{self.name}, {self.case}"


def variants_of(densities: Sequence[float], unfused: bool, peers: bool) -> list[Variant]:
    """All that is compared with the unmasked Keras step and TensorFlow's own."""
    cases = [(density, False) for density in densities] + [(ROWS_DENSITY, True)]
    result = [Variant(WHERE, OTHERS_DENSITY), Variant(RESTORE, OTHERS_DENSITY)]
    for kind in [FUSED, UNFUSED] if unfused else [FUSED]:
        for state in ("full", "compact"):
            # A variable without a frozen entry has full state.
            result += [Variant(kind, *case, state) for case in cases if state == "full" or case[0] < 1]
    return result + [Variant(peer) for peer in PEERS if peers]


def targets_of(optimizer: str, jit: bool, variant: Variant) -> tuple[float | None, float | None]:
    """The ratios to reach, where there are any: to the unmasked Keras step, and to TensorFlow's own."""
    if variant.kind != FUSED:
        return None, None
    if jit:
        return (JIT_TARGET if variant.state == "full" else None), None
    if optimizer != "adam":
        return None, None
    own = OWN_TARGET if variant.state == "full" and variant.density == 1 else None
    return TARGETS.get((variant.state, variant.density, variant.rows)), own


def fewest_bytes(variant: Variant, optimizer: str, size: int) -> float:
    """The fewest bytes that a step must move; others than ours are taken to update all entries."""
    if variant.ours:
        return _masks.fewest_bytes(size, SLOTS[optimizer], variant.density, variant.rows, variant.state)
    return _masks.fewest_bytes(size, SLOTS[optimizer], 1, False, "full") - size / 8 + size * variant.masked


Update = Callable[[Sequence[tf.Tensor], Sequence[keras.Variable]], Any]


class Step:
    """A step of variables of one shape, with gradients that are there already.

    Args:
        variant: The way to make it.
        optimizer: One of `OPTIMIZERS`.
        jit: Whether XLA compiles it.
        gradients: A variable that holds the gradients, one after another along the first axis. Reading
            it copies nothing; as arguments hundreds of them would be looked at in Python in every call.
        mask: For the variants that are masked, of all variables.

    Attributes:
        variables: What is trained.
    """

    def __init__(self, variant: Variant, optimizer: str, jit: bool, gradients: tf.Variable, mask: np.ndarray | None):
        count, *shape = gradients.shape
        self.variables = [keras.Variable("ones", shape=shape, name=f"w{i}") for i in range(count)]
        update = self._update_of(variant, optimizer, mask)

        @tf.function(jit_compile=jit, autograph=False)
        def step() -> None:
            update(tf.unstack(gradients), self.variables)

        self._step = step

    def __call__(self) -> None:
        self._step()

    def _update_of(self, variant: Variant, optimizer: str, mask: np.ndarray | None) -> Update:
        if variant.kind == OWN:
            return _own_update(optimizer, self.variables)
        inner = OPTIMIZERS[optimizer]()
        if variant.ours:
            masks = {r"w\d+": mask}
            inner = fz.MaskedOptimizer(inner, masks=masks, state=variant.state, fused=variant.kind == FUSED)
        inner.build(self.variables)
        if variant.ours or variant.kind == UNMASKED:
            return inner.apply
        assert mask is not None
        # A variable, because ours can be changed between steps as well.
        held = tf.Variable(np.broadcast_to(mask, self.variables[0].shape), trainable=False)

        def where(gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> None:
            inner.apply([tf.where(held, gradient, 0.0) for gradient in gradients], variables)

        def restore(gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> None:
            kept = [tf.identity(variable.value) for variable in variables]
            where(gradients, variables)
            for variable, old in zip(variables, kept, strict=True):
                variable.assign(tf.where(held, variable.value, old))

        return where if variant.kind == WHERE else restore


def _own_update(optimizer: str, variables: Sequence[keras.Variable]) -> Update:
    """TensorFlow's own fused update, with slots and powers of its own."""

    def slots() -> list[tf.Variable]:
        return [tf.Variable(tf.zeros(variable.shape), trainable=False) for variable in variables]

    if optimizer == "sgd_momentum":
        momentums = slots()

        def momentum(gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> None:
            for gradient, variable, slot in zip(gradients, variables, momentums, strict=True):
                tf.raw_ops.ResourceApplyMomentum(
                    var=variable.value.handle, accum=slot.handle, lr=RATE, grad=gradient, momentum=MOMENTUM
                )

        return momentum
    first, second = slots(), slots()
    beta_1, beta_2 = 0.9, 0.999
    steps = tf.Variable(0.0, trainable=False)

    def adam(gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> None:
        step = steps.assign_add(1.0)
        powers = {"beta1_power": beta_1**step, "beta2_power": beta_2**step}
        for gradient, variable, m, v in zip(gradients, variables, first, second, strict=True):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.value.handle, m=m.handle, v=v.handle, lr=RATE, beta1=beta_1, beta2=beta_2, epsilon=1e-7,
                grad=gradient, **powers,
            )  # fmt: skip

    return adam


class Peer(AbstractContextManager):
    """Another library's steps, in a process of another interpreter; a context.

    Attributes:
        version: The library's; `None` where the interpreter does not have it.
        process: The process's id.
    """

    def __init__(self, python: str, kind: str, optimizer: str, size: int, instances: int):
        script = str(Path(__file__).with_name("_peers.py"))
        self._command = [python, script, kind, optimizer, str(size), str(instances)]
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = self._process.pid
        self._instances = instances
        try:
            ready = json.loads(self._answer())
        except BaseException:
            self.__exit__()
            raise
        self.version: str | None = ready.get("version")

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._process.kill()
        self._process.communicate()

    def steps(self) -> list[_common.Competitor]:
        """A step of each instance."""
        return [functools.partial(self._step, instance) for instance in range(self._instances)]

    def _step(self, instance: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{instance}\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended; see above.")
        return line


def groups_of(variants: Sequence[Variant], each: float, fixed: float, memory: float) -> Iterator[list[Variant]]:
    """Splits variants into groups that fit into memory.

    Args:
        variants: What is split.
        each: Bytes that one needs.
        fixed: Bytes that are needed in every group.
        memory: Bytes that there are; one variant is in each group at least.
    """
    count = max(int((memory - fixed) / each), 1)
    for start in range(0, len(variants), count):
        yield list(variants[start : start + count])


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one table is of."""

    optimizer: str
    jit: bool
    size: int

    @property
    def instances(self) -> int:
        return INSTANCES if self.size <= LARGE else 1


def measure_group(setting: Setting, variants: Sequence[Variant], repeats: int, python: str) -> dict[str, Any]:
    """Times variants and passes over memory in turn, in this process.

    Returns:
        "seconds" and "disturbed" as in a `Rounds`; "versions" of the peers that there are.
    """
    optimizer, instances = setting.optimizer, setting.instances
    shape = _masks.shape_of(setting.size)
    gradients = tf.Variable(tf.fill((1, *shape), GRADIENT), trainable=False)
    passes, pool = _common.two_thread_passes(setting.size)
    competitors: dict[str, list[_common.Competitor]] = {name: [each] for name, each in passes.items()}
    peers = {}
    with pool, ExitStack() as stack:
        for variant in variants:
            if variant.kind in PEERS:
                peer = stack.enter_context(Peer(python, variant.kind, optimizer, setting.size, instances))
                if peer.version is not None:
                    peers[variant.kind] = peer
                    competitors[variant.competitor] = peer.steps()
                continue
            mask = _masks.make_mask(shape, variant.density, variant.rows) if variant.masked else None
            competitors[variant.competitor] = [
                Step(variant, optimizer, setting.jit, gradients, mask) for _ in range(instances)
            ]
        processes = [peer.process for peer in peers.values()]
        # Large ones take long, and one call is enough to trace and touch everything.
        warmup, patience = (3, 4) if setting.size <= LARGE else (1, 2)
        rounds = _common.interleaved(competitors, repeats, warmup, helpers=processes, patience=patience)
    versions = {kind: str(peer.version) for kind, peer in peers.items()}
    return dataclasses.asdict(rounds) | {"versions": versions}


def measure_group_elsewhere(setting: Setting, variants: Sequence[Variant], repeats: int, python: str) -> dict[str, Any]:
    """The same in a process of its own: Keras's optimizers do not give all their memory back."""
    task = [dataclasses.astuple(setting), list(map(dataclasses.astuple, variants)), repeats, python]
    return json.loads(_common.in_fresh_process(__file__, "--group-of", json.dumps(task)))


Run = Callable[..., dict[str, Any]]
"""`measure_group`, here or elsewhere."""


def measure(
    setting: Setting, variants: Sequence[Variant], repeats: int, memory: float, python: str, run: Run
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Times all variants of one optimizer at one size, in groups that fit into memory.

    Returns:
        Results, and the versions of the peers that there are.
    """
    bases = [Variant(UNMASKED), Variant(OWN)]
    array = float(WIDTH * setting.size)
    each = (1 + SLOTS[setting.optimizer]) * array * setting.instances
    # Gradient, both arrays that are copied and rewritten, and three temporaries of a step.
    groups = list(groups_of(variants, each, 6 * array + len(bases) * each, memory))
    everything = _common.Rounds({}, False)
    results = []
    versions: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        measured = run(setting, [*bases, *group], repeats, python)
        rounds = _common.Rounds(measured["seconds"], measured["disturbed"])
        versions |= measured["versions"]
        everything = everything.followed_by(rounds)
        present = [variant for variant in group if variant.competitor in rounds.seconds]
        results += [result_of(setting, variant, rounds) | {"group": number} for variant in present]
    shared = [result_of(setting, base, everything) | {"group": None} for base in bases]
    return shared + results, versions


def result_of(setting: Setting, variant: Variant, rounds: _common.Rounds) -> dict[str, Any]:
    """What is reported of a variant."""
    fewest = fewest_bytes(variant, setting.optimizer, setting.size)
    moved = 2 * WIDTH * setting.size  # by a copy, or a rewrite
    times = rounds.times()
    target, own_target = targets_of(setting.optimizer, setting.jit, variant)
    name = variant.competitor
    return {
        **dataclasses.asdict(setting),
        **dataclasses.asdict(variant),
        "name": variant.name,
        "case": variant.case,
        "disturbed": rounds.disturbed,
        "median_ms": times[name]["median_ms"],
        "min_ms": times[name]["min_ms"],
        "ratio": rounds.ratio(name, Variant(UNMASKED).competitor),
        "target": target,
        "own_ratio": rounds.ratio(name, Variant(OWN).competitor),
        "own_target": own_target,
        "fewest_bytes": fewest,
        "of_limit": {each: fewest / moved * rounds.ratio(each, name) for each in PASSES},
        "bytes_per_second": {each: moved / times[each]["median_ms"] * _common.MILLISECONDS for each in PASSES},
    }


def table_of(setting: Setting, results: Sequence[dict[str, Any]]) -> Table:
    """The table of one optimizer at one size."""
    own = RESOURCE[setting.optimizer]
    title = f"One step, {setting.optimizer}, {name_of(setting.size)} float32, jit {'on' if setting.jit else 'off'}"
    columns = ["step", "density", "ms", "/ unmasked", "target", "/ TF's", "target", "fewest MB"]
    columns += [f"of {each}" for each in PASSES]
    table = _common.table(title, columns)
    for result in results:
        megabytes = result["fewest_bytes"] / 1e6
        digits = 3 if result["ratio"] < 0.995 else 2
        table.add_row(
            f"TF's {own}" if result["kind"] == OWN else result["name"],
            result["case"],
            f"{result['median_ms']:.3g}",
            _common.mark(f"{result['ratio']:.{digits}f}", result["disturbed"]),
            _common.verdict(result["ratio"], result["target"]),
            f"{result['own_ratio']:.2f}",
            _common.verdict(result["own_ratio"], result["own_target"]),
            f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.3g}",
            *(f"{result['of_limit'][each]:.0%}" for each in PASSES),
        )
    return table


def name_of(size: int) -> str:
    """A number of entries, for people."""
    return f"{size // MILLION}M ({size / 1e6:.0f} million)" if size % MILLION == 0 else f"{size:,}"


def tensor_variants() -> list[Variant]:
    """What is compared on many variables."""
    ours = [Variant(kind, TENSOR_DENSITY, state=state) for kind in (FUSED, UNFUSED) for state in ("full", "compact")]
    return [Variant(UNMASKED), Variant(OWN), Variant(WHERE, TENSOR_DENSITY), *ours]


def measure_tensors(optimizer: str, counts: Sequence[int], entries: int, repeats: int) -> list[dict[str, Any]]:
    """Times steps of as many entries in one variable and in many."""
    competitors = {}
    for count in counts:
        shape = (entries // count, 1)
        gradients = tf.Variable(tf.fill((count, *shape), GRADIENT), trainable=False)
        for variant in tensor_variants():
            mask = _masks.make_mask(shape, variant.density, False) if variant.masked else None
            # One instance, unlike above: all of it lies in the cache, and hundreds of variables take long to trace.
            competitors[f"{count} {variant.competitor}"] = [Step(variant, optimizer, False, gradients, mask)]
    rounds = _common.interleaved(competitors, repeats)
    unmasked = Variant(UNMASKED).competitor
    return [
        {
            "optimizer": optimizer,
            "name": RESOURCE[optimizer] if variant.kind == OWN else variant.name,
            "case": variant.case,
            "variables": count,
            "entries": entries // count,
            "disturbed": rounds.disturbed,
            "median_ms": rounds.times()[f"{count} {variant.competitor}"]["median_ms"],
            "ratio": rounds.ratio(f"{count} {variant.competitor}", f"{count} {unmasked}"),
            "growth": rounds.ratio(f"{count} {variant.competitor}", f"{counts[0]} {variant.competitor}"),
        }
        for variant in tensor_variants()
        for count in counts
    ]


def table_of_tensors(optimizer: str, counts: Sequence[int], results: Sequence[dict[str, Any]]) -> Table:
    """The table of many variables: a row for each variant, and columns for each number of variables."""
    columns = ["step", "density"]
    for count in counts:
        entries = next(result["entries"] for result in results if result["variables"] == count)
        columns += [f"{count} x {entries:,}, ms", "/ unmasked"]
        columns += [] if count == counts[0] else [f"/ {counts[0]}"]
    table = _common.table(f"One step, {optimizer}, many variables, float32, jit off", columns)
    for start in range(0, len(results), len(counts)):
        row = [results[start]["name"], results[start]["case"]]
        for result in results[start : start + len(counts)]:
            row += [f"{result['median_ms']:.2f}", _common.mark(f"{result['ratio']:.2f}", result["disturbed"])]
            row += [] if result["variables"] == counts[0] else [f"{result['growth']:.2f}"]
        table.add_row(*row)
    return table


def notes_of(results: Sequence[dict[str, Any]], versions: dict[str, str] | None) -> list[str]:
    """Lines below the tables."""
    notes = ["Density: share of trainable entries, at random or by rows of 1,024. Ratios: medians over the rounds."]
    groups = max((result["group"] for result in results if result["group"] is not None), default=1)
    if groups > 1:
        notes.append(
            f"Measured in up to {groups} groups for want of memory; the unmasked step, TensorFlow's own, copy and "
            "rewrite took part in each group, and a ratio is to those of the same group."
        )
    notes.append(
        "Of copy, of rewrite: the time that the fewest bytes take at the rate of two threads that copy an array of "
        "that size, or rewrite it in place, over the step's. More than 100%: rewriting beats copying, or caches help."
    )
    for size in dict.fromkeys(result["size"] for result in results):
        rates = [result["bytes_per_second"] for result in results if result["size"] == size]
        medians = [f"{each} {statistics.median(rate[each] for rate in rates) / 1e9:.1f} GB/s" for each in PASSES]
        notes.append(f"{name_of(size)}, read plus written: {', '.join(medians)}.")
    if versions is not None:
        notes += [f"{peer}: {versions.get(peer, 'not installed, left out')}." for peer in PEERS]
        if versions:
            notes.append("PyTorch and Optax: a process of their own, always without a mask.")
    return [*notes, _common.MARK_NOTE]


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=24, sizes=["16M", "128M"])
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["adam"])
    parser.add_argument("--jit", choices=["on", "off", "both"], default="both")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--no-unfused", action="store_true", help="leave out the same wrapper with fused=False")
    parser.add_argument("--no-peers", action="store_true", help="leave out PyTorch and Optax")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has them (default: this one)")
    parser.add_argument("--tensors", nargs="*", type=int, default=[1, 200], help="numbers of variables")
    parser.add_argument("--tensor-entries", type=int, default=200_000, help="entries of all those together")
    parser.add_argument("--memory", type=float, default=8.0, help="GB that tensors may take up")
    parser.add_argument("--one-process", action="store_true", help="faster, and for small sizes")
    # For the processes that `measure_group_elsewhere` starts.
    parser.add_argument("--group-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.group_of:
        given, variants, *rest = options.group_of
        print(json.dumps(measure_group(Setting(*given), [Variant(*each) for each in variants], *rest)))
        return None
    run = measure_group if options.one_process else measure_group_elsewhere
    if odd := [size for size in options.sizes if size % _masks.ROW]:
        parser.error(f"argument --sizes: must be multiples of {_masks.ROW}. Received: {odd}")
    repeats = _common.repeats_of(options)
    results: list[dict[str, Any]] = []
    tensors: list[dict[str, Any]] = []
    tables = []
    versions: dict[str, str] | None = None
    for optimizer in options.optimizer:
        for jit in {"on": [True], "off": [False], "both": [False, True]}[options.jit]:
            peers = not jit and not options.no_peers  # which do not depend on it
            variants = variants_of(options.densities, not options.no_unfused, peers)
            for size in options.sizes:
                setting = Setting(optimizer, jit, size)
                rounds = repeats if size <= LARGE else max(repeats // 4, 3)
                memory = options.memory * GIGABYTE
                of_one, found = measure(setting, variants, rounds, memory, options.peers_python, run)
                results += of_one
                tables.append(table_of(setting, of_one))
                if peers:
                    versions = (versions or {}) | found
        if options.tensors:
            of_one = measure_tensors(optimizer, options.tensors, options.tensor_entries, 2 * repeats)
            tensors += of_one
            tables.append(table_of_tensors(optimizer, options.tensors, of_one))
    data = {"benchmark": "fused", "results": results, "tensors": tensors, "peers": versions}
    _common.report(tables, notes_of(results, versions), data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
