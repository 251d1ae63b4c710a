"""What is chosen where a GPU is visible: CUDA kernels, or the reference twins and one warning. No GPU is needed."""

import dataclasses
import warnings

import pytest
import tensorflow as tf

from freezeops import __main__ as command
from freezeops import ops
from freezeops.ops import gpu_check, native, reference

KERNELS = native.CudaKernels("nvcc 13.0.88", (75, 80, 86, 89, 90), (90,), runtime=13000, driver=13010)
GPU = native.Gpu("NVIDIA H100", 90)


@pytest.fixture
def machine(monkeypatch):
    """Makes freezeops believe that there is a GPU."""

    def make(kernels, *gpus):
        monkeypatch.delenv("FREEZEOPS_BACKEND", raising=False)
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: list(gpus))
        monkeypatch.setattr(native, "op_library", lambda: "the library")
        monkeypatch.setattr(native, "has_cuda", lambda: kernels is not None)
        monkeypatch.setattr(native, "cuda_kernels", lambda: kernels)
        monkeypatch.setattr(native, "gpus", lambda: gpus)
        monkeypatch.setattr(gpu_check, "_problems", {})

    return make


@pytest.mark.parametrize("capability", [75, 80, 86, 87, 89, 90, 100, 120, 0])
def test_kernels_run(machine, capability):
    machine(KERNELS, GPU, native.Gpu("another", capability))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = ops.paths()
    assert {paths[name] for name in ops._OPS if name not in ops.CPU_ONLY} == {"native"}
    assert {paths[name] for name in ops.CPU_ONLY} == {"reference (a GPU is visible and the op is for CPUs)"}


def test_an_op_for_cpus_runs_as_its_twin(machine, monkeypatch):
    machine(KERNELS, GPU)
    called = []
    monkeypatch.setattr(reference, "sampled_matmul", lambda *arguments: called.append(arguments))
    ops.sampled_matmul(tf.ones((3, 4)), tf.ones((3, 5)), None, None, None, None)
    assert len(called) == 1


@pytest.mark.parametrize("driver, shown", [(12080, "12.8"), (0, "0.0")])
def test_old_driver_leads_to_the_twins_and_one_warning(machine, driver, shown):
    machine(dataclasses.replace(KERNELS, driver=driver), GPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert ops._library() is None
            assert f"the driver supports CUDA {shown}" in ops.paths()["mask_gradient"]
    (warning,) = caught
    assert warning.category is UserWarning and warning.filename == __file__  # at the caller's line, however deep
    for part in (f"CUDA {shown}", "CUDA 13.0", "Install a driver for CUDA 13", "FREEZEOPS_BACKEND=reference"):
        assert part in str(warning.message)


@pytest.mark.parametrize("capability", [70, 61, 72])
def test_old_gpu_leads_to_the_twins_and_one_warning(machine, capability):
    machine(KERNELS, GPU, native.Gpu("Tesla V100", capability))
    with pytest.warns(UserWarning, match=f"Tesla V100 has compute capability {capability / 10}.*ARCHITECTURES"):
        assert ops._library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops._library() is None


def test_machine_code_is_for_its_own_major_version():
    kernels = dataclasses.replace(KERNELS, architectures=(75, 86), ptx=(86,))
    assert [each for each in (70, 75, 80, 86, 89, 90, 120) if kernels.run_on(each)] == [75, 86, 89, 90, 120]
    assert not dataclasses.replace(kernels, ptx=()).run_on(90)


def test_ptx_needs_a_driver_of_its_own_cuda():
    """Of the same major version: that is enough for machine code alone."""
    older = dataclasses.replace(KERNELS, runtime=13010, driver=13000)
    newer_gpu = native.Gpu("NVIDIA X", 130)
    assert gpu_check.gpu_problem(older, [GPU]) is None
    assert "Install a driver for CUDA 13.1 or newer" in gpu_check.gpu_problem(older, [newer_gpu])
    assert gpu_check.gpu_problem(dataclasses.replace(older, driver=13010), [newer_gpu]) is None


def test_library_without_cuda_kernels_says_nothing(machine):
    machine(None, GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops._library() is None
    assert "no CUDA kernels" in ops.paths()["mask_gradient"]


def test_without_a_gpu_the_driver_does_not_matter(machine):
    machine(dataclasses.replace(KERNELS, driver=0))
    assert ops.paths()["mask_gradient"] == "native"


def test_twins_run_in_place_of_kernels_that_cannot(machine):
    machine(dataclasses.replace(KERNELS, driver=12080), GPU)
    with pytest.warns(UserWarning, match="cannot run here"):
        masked = ops.mask_gradient(tf.ones(3), tf.constant([5], tf.uint8), ops.Layout(1, 3, 1))
    assert masked.numpy().tolist() == [1, 0, 1]


def rows(kernels, *gpus):
    diagnosis = native.Diagnosis({}, "auto", [], "loaded", "avx2", kernels, gpus)
    return dict(command._cuda_rows(diagnosis))


def test_diagnosis_names_all_there_is_to_know():
    told = rows(KERNELS, GPU)
    assert (
        told["CUDA kernels"] == "yes, for compute capabilities 7.5, 8.0, 8.6, 8.9, 9.0 and, as PTX of 9.0, newer ones"
    )
    assert told["compiled for"] == "CUDA 13.0 (nvcc 13.0.88)"
    assert told["GPU driver"] == "supports CUDA 13.1"
    assert told["GPUs that TensorFlow sees"] == "NVIDIA H100 (compute capability 9.0)"
    assert told["can they run"] == "driver and GPU are new enough"


def test_diagnosis_without_gpu_or_kernels():
    told = rows(dataclasses.replace(KERNELS, driver=0))
    assert told["GPU driver"] == "none found" and told["can they run"] == "no GPU to run them on"
    assert rows(None, GPU)["CUDA kernels"] == "no"
    assert "Install a driver" in rows(dataclasses.replace(KERNELS, driver=12040), GPU)["can they run"]


def test_versions_are_read_from_the_library_without_a_driver():
    kernels = native.cuda_kernels()
    if kernels is None:
        pytest.skip("the library in use has no CUDA kernels: no nvcc when it was built")
    assert kernels.runtime >= 12000 and kernels.compiler.startswith("nvcc ")
    assert gpu_check.cuda_version(kernels.runtime) in kernels.compiler
    assert kernels.architectures and kernels.ptx and kernels.driver >= 0
