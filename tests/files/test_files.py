"""Files of masks and deltas: what is refused though the checksum is right, and how files are written."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from common import assert_same_bits
from file_mutations import contents, map_header, mutations, opened, sealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import freezeops as fz
from freezeops.files import delta, maskfile
from freezeops.storage import checkedfile

SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KIND = checkedfile.Kind(b"freezeops tests\n", 1, "test file", "write_test")


def make_variables():
    shapes = {"kernel": (6, 8), "bias": (8,), "scale": (8,), "empty": (0, 3), "scalar": ()}
    return [keras.Variable(np.zeros(shape, "float32"), name=name) for name, shape in shapes.items()]


@pytest.fixture
def masked(tmp_path):
    """A built optimizer, and the file of its masks."""
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.freeze("kernel", (slice(None), [1, 4]))
    optimizer.freeze("bias", [0, 3])
    optimizer.build(make_variables())
    fz.save_masks(optimizer, tmp_path / "masks")
    return optimizer, tmp_path / "masks"


def refuse_masks(optimizer, path, message):
    before = optimizer.masks_by_path()
    with pytest.raises(ValueError, match=message):
        fz.load_masks(optimizer, path)
    assert optimizer.masks_by_path() == before


def make_model(odd=False):
    keras.utils.set_random_seed(2)
    layers = [keras.layers.Dense(40, name="a"), keras.layers.Dense(3, name="b", dtype="bfloat16")]
    model = keras.Sequential([keras.Input((5,)), *layers])
    if odd:
        kernel = model.get_layer("a").kernel.numpy()
        kernel[:, 3] = np.array([0x7FC12345, 0x80000000, 0x00000001, 0x7F800000, 0x7F812345], np.uint32).view("f4")
        model.get_layer("a").kernel.assign(kernel)
        model.get_layer("a").bias.assign(np.arange(40))
        model.get_layer("b").bias.assign([1, 2, 3])
    return model


def weights_of(model):
    return {variable.path: variable.numpy() for variable in model.weights}


@pytest.fixture
def trained(tmp_path):
    """A base, and the delta of a model that was trained from it: positions as indices and as bits."""
    fz.export_delta(make_model(odd=True), make_model(), tmp_path / "delta")
    header, _ = opened(delta._KIND, (tmp_path / "delta").read_bytes())
    assert {entry["positions"] for entry in header["variables"]} == {"indices", "bits"}
    return make_model(), tmp_path / "delta"


def refuse_delta(model, path, message):
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        fz.apply_delta(model, path)
    for name, value in weights_of(model).items():
        assert_same_bits(value, before[name], name)


# Wrong content under a right checksum.


def deep(depth):
    return b'{"version": 1, "masks": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=True), "version True"),
        (lambda h: h.update(version=1.0), "version 1.0"),
        (lambda h: h.pop("masks"), "`masks` must be of type list"),
        (lambda h: h.update(masks=[[]]), "`path` must be of type str"),
        (lambda h: h["masks"].append(h["masks"][0]), "'kernel' twice"),
        (lambda h: h["masks"].pop(), "there must be 3 bytes of masks. Received: 4 bytes"),
        (lambda h: h["masks"][0].update(shape=[2**62, 4], layout=[2**62, 1, 4]), "`shape` must be a list of sizes"),
        (lambda h: h["masks"][0].update(shape=[2**62], layout=[1, 2**62, 1]), "must be a uint8 vector of"),
        (
            lambda h: h["masks"][0].update(shape=[2**62], layout=[2**62, 1, 1]),
            "`mask` must have the shape of its variable",
        ),
        (lambda h: h["masks"][0].update(layout=[2**62, 2**62, 0]), "`layout` must be a list of sizes"),
        (lambda h: h["masks"][0].update(layout=[-6, 8, -1]), "`layout` must be a list of sizes"),
        (lambda h: h["masks"][0].update(layout=[6, 8]), "must be \\(outer, kept, inner\\)"),
        (lambda h: h["masks"][0].update(layout=[6, 8.0, 1]), "`layout` must be a list of sizes"),
        (lambda h: h["masks"][0].update(layout=[6, 8, True]), "`layout` must be a list of sizes"),
        (lambda h: h["masks"][0].update(layout=[6, "8", 1]), "`layout` must be a list of sizes"),
        (lambda h: h["masks"][0].update(layout=[6, float("nan"), 1]), "`layout` must be a list of sizes"),
        (lambda h: h["masks"][0].update(path=3), "`path` must be of type str"),
        (lambda h: h["masks"][0].update(path="other/kernel"), "matches nothing"),
    ],
)
def test_masks_with_wrong_content_are_refused(masked, change, message):
    optimizer, path = masked
    path.write_bytes(sealed(maskfile._KIND, *map_header(maskfile._KIND, path.read_bytes(), change)))
    optimizer.unfreeze("bias", [3])
    refuse_masks(optimizer, path, message)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (deep(10**6), "header cannot be read"),
        (b'{"version": 1' + b"0" * 10**4 + b"}", "header cannot be read"),
        (b"[1, 2]", "no JSON object"),
        (b'{"version": 1, "version": 1}', "occurs twice"),
        (b"\xff\xfe", "header cannot be read"),
        ("{}".encode("utf-16"), "header cannot be read"),
    ],
)
def test_headers_that_are_none(masked, header, message):
    optimizer, path = masked
    path.write_bytes(sealed(maskfile._KIND, header, b""))
    refuse_masks(optimizer, path, message)


def test_a_header_longer_than_the_file(masked):
    optimizer, path = masked
    body = (2**63).to_bytes(8, "little") + b'{"version": 1}'
    path.write_bytes(maskfile._KIND.magic + checkedfile.hashlib.sha256(body).digest() + body)
    refuse_masks(optimizer, path, "longer than the file")


def test_errors_do_not_hold_whole_files(masked):
    optimizer, path = masked
    path.write_bytes(sealed(maskfile._KIND, {"version": 1, "polarity": "x" * 10**6}, b""))
    with pytest.raises(ValueError, match="its polarity is 'xxx") as caught:
        fz.load_masks(optimizer, path)
    assert len(str(caught.value)) < 1000


@settings(SETTINGS)
@given(st.data())
def test_fuzzed_masks_are_loaded_or_refused(masked, data):
    optimizer, path = masked
    whole = path.read_bytes()
    header, content = opened(maskfile._KIND, whole)
    before = optimizer.masks_by_path()
    other = path.with_name("fuzzed")
    other.write_bytes(
        sealed(maskfile._KIND, data.draw(mutations(header), "header"), data.draw(contents(content), "content"))
    )
    try:
        fz.load_masks(optimizer, other)
    except ValueError:
        assert optimizer.masks_by_path() == before
    else:
        loaded = maskfile._read(other)
        assert optimizer.masks_by_path() == before | loaded
        assert sum(mask.nbytes for mask in loaded.values()) == len(opened(maskfile._KIND, other.read_bytes())[1])
        fz.load_masks(optimizer, path)
        assert optimizer.masks_by_path() == before


def variable(header, name):
    return next(entry for entry in header["variables"] if entry["path"].endswith(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(variables={}), "`variables` must be of type list"),
        (lambda h: h["variables"].append(h["variables"][0]), "twice"),
        (lambda h: variable(h, "a/kernel").update(changed=-5), "`changed` must be from 0 to 200"),
        (lambda h: variable(h, "a/kernel").update(changed=2**62), "`changed` must be from 0 to 200"),
        (lambda h: variable(h, "a/kernel").update(changed=201), "`changed` must be from 0 to 200"),
        (lambda h: variable(h, "a/kernel").update(changed=True), "`changed` must be of type int"),
        (lambda h: variable(h, "a/kernel").update(changed=5.0), "`changed` must be of type int"),
        (lambda h: variable(h, "a/kernel").update(changed=float("nan")), "`changed` must be of type int"),
        (lambda h: variable(h, "a/kernel").pop("changed"), "`changed` must be of type int"),
        (lambda h: variable(h, "a/bias").update(changed=38), "39 bits are set. Received: changed=38"),
        (lambda h: variable(h, "b/bias").update(changed=2), "bytes that belong to no weight|must ascend|bits are set"),
        (lambda h: variable(h, "a/kernel").update(positions="bytes"), "`positions` must be 'indices' or 'bits'"),
        (lambda h: variable(h, "a/kernel").update(shape=[2**62, 4]), "`shape` must be a list of sizes"),
        (lambda h: variable(h, "a/kernel").update(shape=[2**62]), "must have the shapes"),
        (lambda h: variable(h, "a/kernel").update(shape=[40, 5]), "must have the shapes"),
        (lambda h: variable(h, "a/kernel").update(dtype="object"), "must have the shapes and dtypes"),
        (lambda h: variable(h, "a/kernel").update(base=""), "must be applied to the weights"),
        (lambda h: variable(h, "a/kernel").update(path="else/kernel"), "that the model has not"),
        (lambda h: h["variables"].pop(), "must have the weights of the model"),
        (lambda h: h["variables"].reverse(), "."),
    ],
)
def test_deltas_with_wrong_content_are_refused(trained, change, message):
    model, path = trained
    path.write_bytes(sealed(delta._KIND, *map_header(delta._KIND, path.read_bytes(), change)))
    refuse_delta(model, path, message)


def positions_file(path, positions):
    """The file with other positions of the five changes in `a/kernel`, which come first."""
    header, content = opened(delta._KIND, path.read_bytes())
    first = header["variables"][0]
    assert (first["path"].split("/")[-1], first["changed"], first["positions"]) == ("kernel", 5, "indices")
    path.write_bytes(sealed(delta._KIND, header, np.array(positions, np.uint32).tobytes() + content[20:]))


@pytest.mark.parametrize("positions", [[1, 2, 3, 4, 200], [1, 2, 2, 4, 5], [5, 4, 3, 2, 1], [0, 1, 2, 3, 2**32 - 1]])
def test_positions_that_do_not_ascend_or_are_outside(trained, positions):
    model, path = trained
    positions_file(path, positions)
    refuse_delta(model, path, "must ascend, up to 199")


def test_bytes_left_over_or_missing(trained):
    model, path = trained
    header, content = opened(delta._KIND, path.read_bytes())
    path.write_bytes(sealed(delta._KIND, header, content + b"x"))
    refuse_delta(model, path, "1 bytes that belong to no weight")
    path.write_bytes(sealed(delta._KIND, header, content[:-1]))
    refuse_delta(model, path, "are missing")


@settings(SETTINGS)
@given(st.data())
def test_fuzzed_deltas_are_applied_or_refused(trained, data):
    model, path = trained
    header, content = opened(delta._KIND, path.read_bytes())
    before = weights_of(model)
    other = path.with_name("fuzzed")
    header = data.draw(mutations(header), "header")
    other.write_bytes(sealed(delta._KIND, header, data.draw(contents(content), "content")))
    try:
        fz.apply_delta(model, other)
    except ValueError:
        for name, value in weights_of(model).items():
            assert_same_bits(value, before[name], name)
    else:
        changed = sum((value != before[name]).sum() for name, value in weights_of(model).items())
        assert changed <= sum(entry["changed"] for entry in header["variables"])
        for each in model.weights:
            each.assign(before[each.path])


def test_a_delta_that_fails_half_way_changes_nothing(trained, monkeypatch):
    model, path = trained
    before, assign, calls = weights_of(model), keras.Variable.assign, []

    def fail_once(self, value):
        calls.append(self.path)
        if len(calls) == 2:
            raise MemoryError("no room")
        return assign(self, value)

    monkeypatch.setattr(keras.Variable, "assign", fail_once)
    with pytest.raises(MemoryError, match="no room"):
        fz.apply_delta(model, path)
    assert len(calls) == 4  # two, and both taken back
    for name, value in weights_of(model).items():
        assert_same_bits(value, before[name], name)


# Writing.


def write(path, content=b"new"):
    checkedfile.write(Path(path), KIND, {}, content)


def content_of(path):
    return checkedfile.read(Path(path), KIND)[1]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o777])
def test_the_mode_of_an_existing_file_is_kept(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert content_of(path) == b"new"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_a_private_file_is_private_while_it_is_written(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    modes = []
    flock = checkedfile.fcntl.flock

    def look(descriptor, how):  # right after the temporary file was made
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        flock(descriptor, how)

    monkeypatch.setattr(checkedfile.fcntl, "flock", look)
    write(path)
    assert modes == [0o600]


@pytest.mark.parametrize("existing", [True, False])
def test_links_are_followed_and_stay(tmp_path, existing):
    folder = tmp_path / "folder"
    folder.mkdir()
    if existing:
        (folder / "target").write_bytes(b"old")
    (tmp_path / "middle").symlink_to(Path("folder") / "target")
    (tmp_path / "link").symlink_to("middle")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "middle").is_symlink()
    assert not (folder / "target").is_symlink()
    assert content_of(folder / "target") == content_of(tmp_path / "link") == b"new"
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "middle"] and os.listdir(folder) == ["target"]


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("what", ["directory", "FIFO", "device"])
def test_what_is_no_file_is_refused(masked, tmp_path, what):
    optimizer, _ = masked
    path = tmp_path / "strange"
    if what == "directory":
        path.mkdir()
    elif what == "FIFO":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    link = tmp_path / "link"
    link.symlink_to(path)
    for each in (path, link):
        with pytest.raises(ValueError, match=f"`path` must be that of a file.*is a {what}"):
            fz.save_masks(optimizer, each)
        with pytest.raises(ValueError, match=f"it is a {what}"):
            fz.load_masks(optimizer, each)
        with pytest.raises(ValueError, match=f"is a {what}"):
            fz.export_delta(make_model(), make_model(), each)
        with pytest.raises(ValueError, match=f"it is a {what}"):
            fz.apply_delta(make_model(), each)
    assert sorted(os.listdir(tmp_path)) == sorted({"link", "masks", *([path.name] if what != "device" else [])})


def run_python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(fz.__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(fz.__file__).parents[1])},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


# Without TensorFlow, whose import takes seconds.
LOAD_ALONE = """
import importlib.util, os, signal, sys, types
package = types.ModuleType("freezeops")
package.__path__ = ["freezeops"]
sys.modules["freezeops"] = package
from pathlib import Path
from freezeops.storage import checkedfile
kind = checkedfile.Kind(b"freezeops tests\\n", 1, "test file", "write_test")
path = Path(sys.argv[1])
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become somebody else")
def test_a_folder_that_lists_nothing():
    # Not pytest's, whose own folder is closed to everybody else.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o733)
    code = f"""{LOAD_ALONE}
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    os.listdir(path.parent)
except PermissionError:
    print("lists nothing")
for content in (b"old", b"new"):
    checkedfile.write(path, kind, {{}}, content)
print(checkedfile.read(path, kind)[1])
"""
    done = run_python(code, folder / "file")
    assert done.stdout.splitlines() == ["lists nothing", "b'new'"], done.stderr
    assert os.listdir(folder) == ["file"]
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write(tmp_path / "file")
    assert content_of(tmp_path / "file") == b"new"


def test_what_a_killed_writer_left_is_removed(tmp_path):
    code = f"""{LOAD_ALONE}
os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
checkedfile.write(path, kind, {{}}, b"never")
"""
    path = tmp_path / "file"
    write(path, b"old")
    assert run_python(code, path).returncode == -9
    assert run_python(code, tmp_path / "file2").returncode == -9
    left = {each.name for each in tmp_path.iterdir()} - {"file"}
    assert len(left) == 2 and content_of(path) == b"old"
    write(path)
    # That of the other file is for its own next writer.
    (other,) = {each.name for each in tmp_path.iterdir()} - {"file"}
    assert other.startswith("file2.") and other in left
    write(tmp_path / "file2")
    assert sorted(os.listdir(tmp_path)) == ["file", "file2"]


def test_what_a_living_writer_writes_is_not_removed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        by_number = tmp_path / f"file.{living.pid}.01234567.tmp"
        by_number.write_bytes(b"")
        write(path)
        assert by_number.exists()
    finally:
        living.communicate(b"\n")
    # One of another host, or of another thread: its number says nothing, its lock does.
    replace, inside = os.replace, []

    def write_meanwhile(temporary, target):
        if not inside:
            inside.append(os.fspath(temporary))
            write(path, b"meanwhile")
            assert os.path.exists(temporary)
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", write_meanwhile)
    write(path)
    assert inside and content_of(path) == b"new"
    assert os.listdir(tmp_path) == ["file"]  # and by now the number is nobody's


def test_leftovers_with_the_number_of_this_process(tmp_path):
    # In a container numbers begin anew.
    (tmp_path / f"file.{os.getpid()}.01234567.tmp").write_bytes(b"")
    (tmp_path / f"file.{10**30}.01234567.tmp").write_bytes(b"")
    for name in ("file.tmp", "file.1x.01234567.tmp", f"file.{10**9}.0123456.tmp", f"a.file.{10**9}.01234567.tmp"):
        (tmp_path / name).write_bytes(b"")  # nothing of ours
    (tmp_path / f"file.{10**9}.89abcdef.tmp").symlink_to(tmp_path / "file.tmp")
    (tmp_path / f"file.{10**9}.89abcdee.tmp").mkdir()
    os.mkfifo(tmp_path / f"file.{10**9}.89abcded.tmp")
    write(tmp_path / "file")
    assert len(os.listdir(tmp_path)) == 4 + 3 + 1


def test_taken_for_a_leftover_before_it_was_locked(tmp_path, monkeypatch):
    flock, taken = checkedfile.fcntl.flock, []

    def take(descriptor, how):
        if not taken:
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        flock(descriptor, how)

    monkeypatch.setattr(checkedfile.fcntl, "flock", take)
    write(tmp_path / "file")
    assert taken and content_of(tmp_path / "file") == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(checkedfile.fcntl, "flock", refuse)
    leftover = tmp_path / f"file.{10**9}.89abcdef.tmp"
    leftover.write_bytes(b"")
    write(tmp_path / "file")
    assert content_of(tmp_path / "file") == b"new"
    assert leftover.exists()  # nobody knows


def test_the_header_is_read_back(tmp_path):
    checkedfile.write(tmp_path / "file", KIND, {"a": [1, {"b": "ü"}]}, b"")
    assert checkedfile.read(tmp_path / "file", KIND) == ({"version": 1, "a": [1, {"b": "ü"}]}, b"")
