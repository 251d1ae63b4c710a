"""The loader: what it refuses, what it says, and what it loads."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits

import freezeops as fz
from freezeops import backend
from freezeops._version import __version__
from freezeops.masks import packing
from freezeops.ops import native

RUNNING = tf.__version__
MINOR = ".".join(RUNNING.split(".")[:2])
LIBRARY_NAME = f"libfreezeops_tf{MINOR.replace('.', '_')}.so"
BUILT = Path(native.__file__).parents[1] / LIBRARY_NAME
REMEDY = "pip install --no-deps --force-reinstall ."


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """A loader with nothing loaded yet that looks for libraries in an empty folder."""
    monkeypatch.delenv("FREEZEOPS_BACKEND", raising=False)
    spec = importlib.util.spec_from_file_location("fresh_native", native.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh_native", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_DIRECTORY", tmp_path)
    return module


def place(folder, name=LIBRARY_NAME, content=b"not a library", **info):
    """Writes a library and, unless `info` is {'build': None}, its build information."""
    (folder / name).write_bytes(content)
    build = {"freezeops_version": __version__, "tensorflow_version": RUNNING} | info
    if info.get("build", ...) is not None:
        (folder / name).with_suffix(".json").write_text(json.dumps(build))


def refused(loader):
    """Asks for the library, checks that it is refused with one warning, and returns the warning's text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert loader.op_library() is None
        assert loader.op_library() is None
        assert loader.has_cuda() is False
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    text = str(caught[0].message)
    assert f"no compiled ops for TensorFlow {RUNNING}" in text
    assert REMEDY in text
    assert "FREEZEOPS_BACKEND=reference" in text
    return text


def test_missing_library_warns_once(loader, tmp_path):
    assert f"None was found in {tmp_path}" in refused(loader)


def test_import_without_a_library_says_nothing_and_the_first_use_warns(loader, tmp_path):
    place(tmp_path, "libfreezeops_tf1_99.so", tensorflow_version="1.99.3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.register_ops()
    assert "libfreezeops_tf1_99.so: built for TensorFlow 1.99.3" in refused(loader)


def test_library_for_another_tensorflow_is_refused_and_both_versions_named(loader, tmp_path):
    place(tmp_path, "libfreezeops_tf1_99.so", tensorflow_version="1.99.3")
    assert f"libfreezeops_tf1_99.so: built for TensorFlow 1.99.3, running TensorFlow {RUNNING}" in refused(loader)


def test_renamed_library_is_refused(loader, tmp_path):
    place(tmp_path, tensorflow_version="1.99.3")
    assert f"its name says TensorFlow {MINOR}, its build information TensorFlow 1.99.3" in refused(loader)


def test_library_from_another_freezeops_is_refused(loader, tmp_path):
    place(tmp_path, freezeops_version="0.0.1")
    assert f"built from freezeops 0.0.1, running freezeops {__version__}" in refused(loader)


def test_library_without_build_information_is_refused(loader, tmp_path):
    place(tmp_path, build=None)
    assert "its build information" in refused(loader)


@pytest.mark.parametrize("text", ["{", "[]", '{"tensorflow_version": 2}'])
def test_unreadable_build_information_is_refused(loader, tmp_path, text):
    place(tmp_path)
    (tmp_path / LIBRARY_NAME).with_suffix(".json").write_text(text)
    assert "its build information" in refused(loader)


def test_a_library_that_cannot_be_read_is_refused(loader, tmp_path):
    place(tmp_path)
    (tmp_path / LIBRARY_NAME).unlink()
    (tmp_path / LIBRARY_NAME).mkdir()
    loader.register_ops()  # an import goes on
    assert "it could not be loaded" in refused(loader)


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\x02\x01\x01" + bytes(57) + b"\1" * 99])
def test_corrupt_library_is_refused(loader, tmp_path, content):
    place(tmp_path, content=content)
    assert "it could not be loaded" in refused(loader)


def test_reference_backend_loads_nothing_and_says_nothing(loader, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.register_ops()
        assert loader._loaded is None
        assert loader.op_library() is None
        assert packing.host_module() is None
        assert loader.has_cuda() is False
        diagnosis = loader.diagnosis()
    assert diagnosis.backend == "reference"
    assert diagnosis.isa is None


@pytest.mark.parametrize("use", ["register_ops", "op_library", "has_cuda", "diagnosis"])
def test_another_backend_is_an_error_before_anything_is_loaded(loader, monkeypatch, use):
    monkeypatch.setenv("FREEZEOPS_BACKEND", "refrence")
    with pytest.raises(ValueError, match="must be 'auto' or 'reference'. Received: FREEZEOPS_BACKEND='refrence'"):
        getattr(loader, use)()
    assert loader._loaded is None
    with pytest.raises(ValueError, match="FREEZEOPS_BACKEND must be"):
        packing.pack_bits(np.ones(3, bool))


def test_an_empty_backend_is_auto(monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", "")
    assert backend.name() == "auto" and not backend.is_reference()


def test_a_missing_host_module_is_said_in_the_diagnosis(monkeypatch):
    monkeypatch.delenv("FREEZEOPS_BACKEND", raising=False)
    monkeypatch.setattr(packing, "_imported", None)
    monkeypatch.setitem(sys.modules, "freezeops._host", None)  # the import system's own way of saying "not there"
    assert packing.host_module() is None
    assert packing.host_status().startswith("not in use: ")
    assert packing.pack_bits(np.array([True, False, True])).tolist() == [5]


def test_diagnosis_names_every_library_and_why_it_was_refused(loader, tmp_path):
    place(tmp_path, "libfreezeops_tf1_99.so", tensorflow_version="1.99.3")
    place(tmp_path)
    with pytest.warns(UserWarning, match="no compiled ops"):
        diagnosis = loader.diagnosis()
    reasons = {report.path.name: report.reason for report in diagnosis.libraries}
    assert "running TensorFlow" in reasons["libfreezeops_tf1_99.so"]
    assert "could not be loaded" in reasons[LIBRARY_NAME]
    assert diagnosis.versions["TensorFlow"] == RUNNING
    assert diagnosis.isa is None


needs_library = pytest.mark.skipif(not BUILT.exists(), reason=f"{LIBRARY_NAME} is not built")


def run_python(code, **environment):
    """Runs code in a new interpreter from the folder that holds the package and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(native.__file__).parents[2],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_library
def test_old_library_next_to_the_right_one_does_not_matter(tmp_path):
    shutil.copy(BUILT, tmp_path)
    shutil.copy(BUILT.with_suffix(".json"), tmp_path)
    place(tmp_path, "libfreezeops_tf1_99.so", tensorflow_version="1.99.3")
    code = f"""
import os
import warnings
from pathlib import Path
warnings.simplefilter("error", UserWarning)
os.environ["FREEZEOPS_BACKEND"] = "reference"
from freezeops.ops import native  # which loads nothing now
del os.environ["FREEZEOPS_BACKEND"]
native._DIRECTORY = Path({str(tmp_path)!r})
assert hasattr(native.op_library(), "freezeops_mask_gradient")
print([(report.path.name, report.loaded) for report in native.diagnosis().libraries])
"""
    printed = run_python(code, FREEZEOPS_BACKEND="")
    assert f"[('libfreezeops_tf1_99.so', False), ('{LIBRARY_NAME}', True)]" in printed


@needs_library
@pytest.mark.parametrize("half", [0.1, 0.5, 0.95])
def test_truncated_library_is_refused(tmp_path, half):
    content = BUILT.read_bytes()
    place(tmp_path, content=content[: int(len(content) * half)])
    code = f"""
import os
from pathlib import Path
os.environ["FREEZEOPS_BACKEND"] = "reference"
from freezeops.ops import native  # which loads nothing now
del os.environ["FREEZEOPS_BACKEND"]
native._DIRECTORY = Path({str(tmp_path)!r})
print(native.op_library())
"""
    assert run_python(code, FREEZEOPS_BACKEND="", PYTHONWARNINGS="ignore").strip().endswith("None")


@needs_library
def test_import_registers_the_ops_and_starts_no_device():
    code = """
import tensorflow as tf
import freezeops
print(freezeops.ops.native._loaded.used.loaded)
cpu = tf.config.list_physical_devices("CPU")[0]
# Only before TensorFlow has started its devices.
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
print(len(tf.config.list_logical_devices("CPU")))
"""
    assert run_python(code, FREEZEOPS_BACKEND="").split() == ["True", "2"]


class TrainStep(tf.Module):
    """A train step that is saved as a SavedModel."""

    def __init__(self, state, jit):
        super().__init__()
        self.variable = tf.Variable(np.resize(ODD, (4, 4)), name="w")
        inner = keras.optimizers.AdamW(0.1, weight_decay=0.1)
        self.optimizer = fz.MaskedOptimizer(inner, masks={"w": np.eye(4, dtype=bool)}, state=state)
        self.optimizer.build([self.variable])
        self.step = tf.function(self._step, jit_compile=jit, autograph=False)

    def _step(self):
        self.optimizer.apply([tf.ones([4, 4])], [self.variable])
        return self.variable.read_value()


ODD = np.array([0x7FC12345, 0x80000000, 0x00000001, 0x7F800000, 0x3F800000], np.uint32).view("f4")


@needs_library
def test_saved_train_steps_run_in_a_process_that_only_imports_freezeops(tmp_path, monkeypatch):
    monkeypatch.delenv("FREEZEOPS_BACKEND", raising=False)
    expected = {}
    for state in ("full", "compact"):
        for jit in (False, True):
            folder = str(tmp_path / f"{state}{jit}")
            module = TrainStep(state, jit)
            module.step()
            tf.saved_model.save(module, folder)
            expected[folder] = module.step().numpy()
    code = f"""
import numpy as np
import tensorflow as tf
import freezeops
for folder in {list(expected)}:
    module = tf.saved_model.load(folder)
    np.save(folder + ".npy", module.step())
"""
    run_python(code, FREEZEOPS_BACKEND="")
    for folder, values in expected.items():
        assert_same_bits(np.load(folder + ".npy"), values, folder)
        assert_same_bits(values[~np.eye(4, dtype=bool)], np.resize(ODD, (4, 4))[~np.eye(4, dtype=bool)], folder)


@needs_library
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_set_can_be_lowered(isa):
    code = "from freezeops.ops import native; print('isa', native.diagnosis().isa)"
    chosen = run_python(code, FREEZEOPS_BACKEND="", FREEZEOPS_ISA=isa).split()[-1]
    order = ["generic", "avx2", "avx512"]
    assert order.index(chosen) <= order.index(isa)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_python_dash_m_prints_the_diagnosis(backend):
    code = "import runpy, sys; sys.argv = ['freezeops']; runpy.run_module('freezeops', run_name='__main__')"
    with_width = {"COLUMNS": "160", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(native.__file__).parents[2],
        env={**os.environ, "FREEZEOPS_BACKEND": backend, **with_width},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for expected in (RUNNING, __version__, "mask_gradient", "restore_frozen", "CUDA"):
        assert expected in done.stdout
    if backend == "reference":
        assert "FREEZEOPS_BACKEND=reference" in done.stdout
