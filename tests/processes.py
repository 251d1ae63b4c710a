"""Scripts in processes of their own that need not wait for TensorFlow to be imported.

Each is forked from a server that has imported TensorFlow, Keras and freezeops and has
done nothing with them, so that devices, strategies and threads are the script's own.
What a test has to see of a start itself (which library is loaded, what is printed
then) needs a `subprocess`.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tensorflow", "keras", "freezeops"])


def _run(path: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [path, *arguments]
    sys.path[:0] = [str(Path(path).parent), str(Path(__file__).parent)]
    runpy.run_path(path, run_name="__main__")


class Script:
    """A Python script that runs; what it prints is in a file.

    Args:
        path: The script.
        arguments: Its command line.
        environment: All of its environment.
        log: The file.
    """

    def __init__(self, path: Path, arguments: list[str], environment: Mapping[str, str], log: Path):
        self.log = log
        self._process = _CONTEXT.Process(target=_run, args=(str(path), arguments, dict(environment), str(log)))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal's number if one ended it."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, or None if it still runs then."""
        self._process.join(seconds)
        return self.poll()

    def kill(self) -> int:
        """Ends it with SIGKILL, unless it has ended by itself; the exit code."""
        if self.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
        return self.wait()

    def printed(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""


def run_script(path: Path, arguments: list[str], environment: Mapping[str, str], log: Path, seconds: float) -> str:
    """Runs a script to its end, which must be a good one, and returns what it printed."""
    script = Script(path, arguments, environment, log)
    code = script.wait(seconds)
    if code is None:
        script.kill()
    assert code == 0, (
        f"{path.name} {' '.join(arguments)}: {code or f'still running after {seconds} s'}\n"
        + (script.printed()[-3000:])
    )
    return script.printed()
