"""Prints, as JSON, where the TensorFlow of this interpreter is and how to compile against it.

Run by CMake as `python -I tensorflow_probe.py`, and by the build backend (with `--quick`, which imports nothing). No
file of the project is imported: `-I` keeps the isolated build environment of pip out, so that the TensorFlow found is
the user's own.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys

# Whichever of these is installed provides the `tensorflow` module.
DISTRIBUTIONS = (
    "tensorflow",
    "tensorflow-cpu",
    "tensorflow-intel",
    "tensorflow-cpu-aws",
    "tensorflow-rocm",
    "tensorflow-macos",
    "tf-nightly",
    "tf-nightly-cpu",
)


def probe(quick: bool) -> dict:
    """Returns what is known about the installed TensorFlow, an empty dictionary where there is none."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.origin:
        return {}
    for distribution in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        break
    else:
        return {}
    lib = os.path.dirname(os.path.realpath(spec.origin))
    found = {
        "distribution": distribution,
        "version": version,
        "lib": lib,
        "include": os.path.join(lib, "include"),
        "compile_flags": ["-D_GLIBCXX_USE_CXX11_ABI=1", "-DEIGEN_MAX_ALIGN_BYTES=64"],
    }
    if not quick:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        # What the import prints must not get between the lines of the answer.
        stdout = os.dup(1)
        os.dup2(2, 1)
        try:
            import tensorflow as tf

            found["version"] = tf.__version__
            found["lib"] = tf.sysconfig.get_lib()
            found["include"] = tf.sysconfig.get_include()
            found["compile_flags"] = [f for f in tf.sysconfig.get_compile_flags() if f.startswith("-D")]
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
    return found


if __name__ == "__main__":
    print(json.dumps(probe(quick="--quick" in sys.argv[1:])))
