"""Several workers: `MultiWorkerMirroredStrategy` over real processes on the loopback interface."""

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from common import assert_same_bits
from processes import Script, run_script

SCRIPT = Path(__file__).with_name("workers_script.py")
SECONDS = 240


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """Workers that run one case; a context that leaves none behind."""

    def __init__(self, case, folder, workers=2, **environment):
        self.case, self.folder = case, folder
        addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
        self.scripts = []
        for task in range(workers):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": task}}
            log = folder / f"{case}_{task}_{time.monotonic_ns()}.log"
            self.scripts.append(self._start(log, {"TF_CONFIG": json.dumps(config)} | environment))

    def _start(self, log, environment):
        defaults = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
        return Script(SCRIPT, [self.case, str(self.folder)], os.environ | defaults | environment, log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for script in self.scripts:
            script.kill()

    def wait(self):
        """All workers end well, or the test fails with what each said."""
        deadline = time.monotonic() + SECONDS
        ended = []
        for task, script in enumerate(self.scripts):
            code = script.wait(max(deadline - time.monotonic(), 1))
            if code is None:
                code = f"still running after {SECONDS} s"
            ended.append((f"worker {task}", code, script.printed()))
        # All of them: where one dies, the others say only that they lost it.
        assert all(code == 0 and f"{self.case} passed" in log for _, code, log in ended), "\n".join(
            f"{worker}: {code}\n{log[-3000:]}" for worker, code, log in ended
        )

    def wait_for(self, name):
        """Until a worker has made a file of that name."""
        deadline = time.monotonic() + SECONDS
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline and all(s.poll() is None for s in self.scripts), [
                script.printed()[-2000:] for script in self.scripts
            ]
            time.sleep(0.02)


def results(folder, case, tasks):
    return [dict(np.load(folder / f"{case}_{task}.npz")) for task in tasks]


def run_alone(case, folder, **extra):
    """A case in one process without TF_CONFIG."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"} | extra
    assert f"{case} passed" in run_script(
        SCRIPT, [case, str(folder)], environment, folder / f"{case}_alone.log", SECONDS
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_optimizer(tmp_path, backend):
    with Cluster("every_optimizer", tmp_path, FREEZEOPS_BACKEND=backend) as cluster:
        cluster.wait()
    run_alone("every_optimizer", tmp_path)
    first, second, alone = results(tmp_path, "every_optimizer", [0, 1, "one"])
    for name in alone:
        assert_same_bits(first[name], second[name], name)
        # The sum over two halves of the batch is in another order. Muon's and Lion's steps are signs of small sums.
        np.testing.assert_allclose(first[name], alone[name], atol=2e-2 if name in ("Muon", "Lion") else 2e-4)


def test_compact(tmp_path):
    with Cluster("compact", tmp_path) as cluster:
        cluster.wait()
    run_alone("compact", tmp_path)
    first, second, alone = results(tmp_path, "compact", [0, 1, "one"])
    for name in alone:
        assert_same_bits(first[name], second[name], name)
        np.testing.assert_allclose(first[name], alone[name], atol=2e-2 if name == "Lion" else 2e-4)


def test_parts_of_gradients(tmp_path):
    with Cluster("skips", tmp_path) as cluster:
        cluster.wait()
    run_alone("skips", tmp_path)
    first, second, alone = results(tmp_path, "skips", [0, 1, "one"])
    for name in alone:
        assert_same_bits(first[name], second[name], name)
        np.testing.assert_allclose(first[name], alone[name], atol=2e-4)


def test_compact_state_of_the_chiefs_mask(tmp_path):
    with Cluster("compact_chief", tmp_path) as cluster:
        cluster.wait()


def test_masks_are_the_chiefs(tmp_path):
    with Cluster("chief", tmp_path) as cluster:
        cluster.wait()


def test_loss_scale(tmp_path):
    with Cluster("loss_scale", tmp_path) as cluster:
        cluster.wait()
    first, second = results(tmp_path, "loss_scale", [0, 1])
    assert_same_bits(first["table"], second["table"])


def test_keras_fit_still_fails(tmp_path):
    """So says docs/training.md. When this fails, Keras has been mended: test `fit` here, and change the docs."""
    with Cluster("keras_fit", tmp_path) as cluster:
        cluster.wait()
    assert all(result["fails"] for result in results(tmp_path, "keras_fit", [0, 1]))


def test_tf_keras_fit(tmp_path):
    pytest.importorskip("tf_keras")
    with Cluster("tf_keras_fit", tmp_path) as cluster:
        cluster.wait()
    run_alone("tf_keras_fit", tmp_path)
    first, second, alone = results(tmp_path, "tf_keras_fit", [0, 1, "one"])
    for name in alone:
        assert_same_bits(first[name], second[name], name)
        np.testing.assert_allclose(first[name], alone[name], atol=2e-4)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker(tmp_path, victim):
    """One worker is killed; the cluster starts again from the last checkpoint and ends as if nothing had happened."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with Cluster("resume", whole) as cluster:
        cluster.wait()
    with Cluster("resume", broken, STEP_SECONDS="0.3") as cluster:
        cluster.wait_for("saved_0_6")
        cluster.scripts[victim].kill()
        # The others cannot go on; whoever runs the cluster ends them, as __exit__ does here.
    with Cluster("resume", broken) as cluster:
        cluster.wait()
    starts = sorted(int(path.name.split("_")[-1]) for path in broken.glob("started_*_at_*"))
    assert starts[:2] == [0, 0] and starts[2] == starts[3] >= 6, starts
    expected = results(whole, "resume", [0])[0]
    for task in (0, 1):
        actual = results(broken, "resume", [task])[0]
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_same_bits(actual[name], expected[name], name)


def test_parameter_server_is_refused(tmp_path):
    run_alone("parameter_server", tmp_path, PORTS=" ".join(map(str, free_ports(2))))
