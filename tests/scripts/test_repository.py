"""What the repository says in two places agrees."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_pre_commit_has_the_versions_of_the_dev_extra():
    (dev,) = re.findall(r"^dev = \[(.*)\]$", PYPROJECT, re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = set(re.findall(r'"([\w-]+==[\d.]+)"', dev))
    assert {name.split("==")[0] for name in pinned} >= {"clang-format", "ruff", "typos"}
    assert pinned == {pin for pin in re.findall(r'\["([\w-]+==[\d.]+)"\]', hooks) if "pre-commit-hooks" not in pin}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_commits_that_blame_passes_over_are_moves():
    text = (ROOT / ".git-blame-ignore-revs").read_text(encoding="utf-8")
    hashes = re.findall(r"^[0-9a-f]+$", text, re.MULTILINE)
    assert hashes and all(len(one) == 40 for one in hashes)
    log = subprocess.run(["git", "log", "--format=%H %s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    subjects = dict(line.split(" ", 1) for line in log.splitlines())
    if len(subjects) > 100:  # not in a shallow clone
        assert set(hashes) <= set(subjects)
        moves = {one for one, subject in subjects.items() if subject.startswith("Pure moves")}
        assert moves <= set(hashes), "a commit of pure moves is not in .git-blame-ignore-revs"


@pytest.mark.parametrize("workflow", ["ci.yml", "weekly.yml"])
def test_workflows_call_what_there_is(workflow):
    text = (ROOT / ".github" / "workflows" / workflow).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"- run: (.*)", text)
    assert commands
    for command in commands:
        program, *arguments = command.split()
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), command
        else:
            assert (ROOT / program).exists(), command


def test_contributing_names_files_that_there_are():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"`([\w./]+/[\w./]*)", text) if "<" not in path and "*" not in path}
    paths -= {path for path in paths if path.startswith(("csrc/ops/", "optimizers/", ".venv/", "build/"))}
    paths |= {path.replace("<op>", "mask_gradient") for path in re.findall(r"`(csrc/ops/<op>/\w+\.\w+)`", text)}
    assert len(paths) > 20
    assert not sorted(path for path in paths if not (ROOT / path).exists())
