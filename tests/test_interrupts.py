"""However a run ends, the target is the old file, the new one whole, or absent."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx
import pytest

from flipguard_onnx import ModelError, guard
from flipguard_onnx.io import publish
from flipguard_onnx.io.publish import LOCK, Finished, sweep, workspace, write_report
from tests.helpers.command import call, heed_interrupts, held, names, one_line, workspaces
from tests.helpers.samples import SAMPLES, matmul, save

KILLED = Path(__file__).parent / "helpers" / "killed.py"
MLP = Path(__file__).parents[1] / "models" / "attacks" / "mlp-clean.onnx"
WHOLE = {"absent, then absent", "absent, then 2", "1, then 1", "1, then 2"}
NO_ROOT = "needs root, to mount a small or read-only file system"


def killed(folder, *mode):
    """What killed.py prints: exit codes, states of the target before and after, what was left."""
    external = {"save_as_external_data": True, "location": "m.onnx.data", "size_threshold": 0}
    onnx.save(onnx.load(MLP), str(folder / "m.onnx"), **external)
    command = [sys.executable, KILLED, folder / "m.onnx", folder / "out.onnx", *mode]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_killed_at_random_moments(tmp_path):
    found = killed(tmp_path, "random", "100")
    assert found["codes"]["-9"] == 100
    assert set(found["states"]) <= WHOLE
    assert found["extra"] == []


def test_killed_before_each_file_operation(tmp_path):
    """The two renames of a model and its data file among them."""
    found = killed(tmp_path, "kill")
    assert found["codes"]["-9"] > 60
    assert set(found["states"]) == WHOLE
    assert found["extra"] == []


def test_terminated_before_each_file_operation(tmp_path):
    found = killed(tmp_path, "terminate")
    assert found["codes"]["143"] > 60
    assert set(found["codes"]) == {"143", "0"}
    assert set(found["states"]) == WHOLE
    assert found["extra"] == []


def test_runs_at_once_on_the_same_target(tmp_path):
    found = killed(tmp_path, "race", "6")
    assert found["codes"] == {"0": 24}
    assert set(found["states"]) <= {f"{a}, then {b}" for a in ("absent", 1) for b in (1, 2)}
    assert found["extra"] == []


def test_signals_end_the_command_in_one_line(tmp_path):
    """SIGINT, SIGTERM and SIGHUP, as soon as there is something to clean up."""
    running, locks = {}, []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        folder = tmp_path / number.name
        folder.mkdir()
        save(matmul(), folder)
        locks.append(held(folder))
        command = [sys.executable, "-m", "flipguard_onnx", "guard", folder / "model.onnx"]
        running[number] = (
            folder,
            subprocess.Popen(
                list(map(str, command)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=heed_interrupts,
            ),
        )
    for number, (folder, process) in running.items():
        while not workspaces(folder):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
    for number, (folder, process) in running.items():
        printed, errors = process.communicate()
        assert process.returncode == 128 + number
        assert errors.splitlines()[-1] == f"flipguard-onnx: interrupted by {number.name}"
        assert "Traceback" not in errors
        assert printed == ""
        assert names(folder) == [LOCK, "model.onnx"]


def test_a_signal_while_the_command_line_is_read():
    code = """
import signal
from flipguard_onnx.cli import main
main.commands["scan"].parse_args = lambda *_: signal.raise_signal(signal.SIGTERM)
main(["scan", "model.onnx"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "flipguard-onnx: interrupted by SIGTERM\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_ends_changes_nothing(number):
    code = f"""
import atexit, signal, sys
from flipguard_onnx.__main__ import run
atexit.register(signal.raise_signal, {number:d})
sys.argv[1:] = ["--version"]
run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("flipguard-onnx, version ")


@pytest.mark.parametrize("signalled", ["Finalized()", "swallowed()"])
def test_a_signal_that_is_swallowed_ends_the_run_too(signalled):
    """By Python in a finalizer, or by a library."""
    printed = interrupted(f"{signalled}\n        time.sleep(60)")
    assert printed == "interrupted by SIGTERM SIG_DFL (0.0, 0.0)\n"


def test_a_signal_is_not_raised_again_while_the_run_cleans_up():
    printed = interrupted("clean_up(5 * RETRY_SECONDS)")
    assert printed == "clean\ninterrupted by SIGTERM SIG_DFL (0.0, 0.0)\n"


def test_a_signal_during_an_import_is_raised_after_it(tmp_path):
    """A library that is being loaded may crash. The second signal is raised wherever it comes."""
    slow = "import signal, time\nsignal.raise_signal(signal.SIGTERM)\n"
    (tmp_path / "slow.py").write_text(slow + "time.sleep(0.5)\nprint('loaded')\n")
    (tmp_path / "twice.py").write_text(slow + slow + "print('loaded')\n")
    end = "interrupted by SIGTERM SIG_DFL (0.0, 0.0)\n"
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    assert interrupted(f"{path}; import slow; time.sleep(60)") == "loaded\n" + end
    assert interrupted(f"{path}; import twice; time.sleep(60)") == end


def interrupted(statements):
    """What a process prints that is interruptible. Not this one: pytest has an alarm, too."""
    code = f"""
import signal, time
from flipguard_onnx.interrupts import RETRY_SECONDS, Interrupted, interruptible
class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
def swallowed():
    try:
        signal.raise_signal(signal.SIGTERM)
    except Interrupted:
        pass
def clean_up(seconds):
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        time.sleep(seconds)
        print("clean")
try:
    with interruptible():
        {statements}
except Interrupted as error:
    print(error, signal.getsignal(signal.SIGALRM).name, signal.getitimer(signal.ITIMER_REAL))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout


def test_without_force_the_first_of_two_runs_wins(tmp_path):
    """The other one finds out only when it is done; of its two outputs neither appears."""
    source = save(matmul(), tmp_path)
    first = tmp_path / "out-float.onnx"
    options = {"emit": "both", "validate": False, "preserve": "off"}
    with pytest.raises(ModelError, match=r"out-float\.onnx: exists already"):
        guard(
            source,
            output=tmp_path / "out.onnx",
            progress=lambda *_: first.write_text("here first"),
            **options,
        )
    assert first.read_text() == "here first"
    assert names(tmp_path) == ["model.onnx", "out-float.onnx"]


def test_overwriting_removes_the_old_data_and_nothing_else(tmp_path):
    (tmp_path / "in").mkdir()
    source = save(matmul(), tmp_path / "in", external=True)
    output, other = tmp_path / "out.onnx", tmp_path / "out.onnx.x.data"
    other.write_text("not ours")
    guard(source, output=output, seed=1, validate=False)
    (old,) = publish.data_files(output)
    with pytest.raises(ModelError, match="exists already"):
        guard(source, output=output, seed=2, validate=False)
    output.unlink()
    with pytest.raises(ModelError, match=rf"{old.name}: exists already"):
        guard(source, output=output, seed=2, validate=False)
    guard(source, output=output, seed=2, validate=False, force=True)
    (new,) = publish.data_files(output)
    assert new != old
    guard(save(matmul(), tmp_path), output=output, validate=False, force=True)
    assert names(tmp_path) == ["in", "model.onnx", "out.onnx", "out.onnx.x.data"]


def test_a_dead_runs_workspace_is_removed_and_no_other_folder(tmp_path):
    kept = []
    for name in (".flipguard-notes", ".flipguard-0123456789abcdef.d", "flipguard-0123456789abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        kept.append(name)
    unlocked = tmp_path / ".flipguard-00000000000000aa"  # of the right name, but not ours
    unlocked.mkdir()
    (unlocked / "thesis.txt").touch()
    pipe = tmp_path / ".flipguard-00000000000000bb"
    pipe.mkdir()
    os.mkfifo(pipe / "lock")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / ".flipguard-00000000000000cc"
    link.symlink_to(tmp_path / "elsewhere")
    for name in ("00000000000000dd", "00000000000000ee"):
        dead = tmp_path / f".flipguard-{name}"
        (dead / "files" / "1").mkdir(parents=True)
        (dead / "files" / "1" / "half.onnx").write_bytes(bytes(100))
        (dead / "lock").touch()
    (tmp_path / ".flipguard-00000000000000ff").mkdir()  # killed before it had a lock
    with workspace(tmp_path) as live:
        assert not dead.exists()
        sweep(tmp_path)
        assert live.is_dir()
        with workspace(tmp_path):
            assert live.is_dir()
    assert {*kept, unlocked.name, link.name, "elsewhere"} <= set(names(tmp_path))
    assert set(names(tmp_path)) <= {*kept, unlocked.name, link.name, "elsewhere", pipe.name}


def test_a_workspace_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    mkdir, swept = Path.mkdir, []

    def mkdir_and_sweep(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        if not swept:
            swept.append(path)
            sweep(tmp_path)
            assert not path.exists()

    monkeypatch.setattr(Path, "mkdir", mkdir_and_sweep)
    with workspace(tmp_path) as folder:
        assert folder.is_dir()
        assert folder.parent != swept[0]
    assert names(tmp_path) == []


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(publish.fcntl, "flock", refuse)
    source = save(matmul(), tmp_path)
    with workspace(tmp_path) as other:
        guard(source, output=tmp_path / "out.onnx", validate=False, preserve="off")
        assert other.is_dir()
    assert names(tmp_path) == ["model.onnx", "out.onnx"]


def test_a_lock_that_somebody_keeps_is_named(tmp_path):
    (tmp_path / "work").mkdir()
    finished = Finished(save(matmul(), tmp_path / "work"), None, tmp_path / "out.onnx")
    kept = f"{LOCK}: another process has held this lock for 0 s"
    with held(tmp_path), pytest.raises(ModelError, match=kept):
        publish.publish([finished], force=False, lock_seconds=0.1)
    assert names(tmp_path) == [LOCK, "work"]
    publish.publish([finished], force=False)
    assert names(tmp_path) == ["out.onnx", "work"], "a dead run's lock does not last"


@contextmanager
def mounted(folder, options):
    """A file system of its own."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder])
    if done.returncode:
        pytest.skip(NO_ROOT)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a traceback holds files


@pytest.mark.skipif(os.geteuid() != 0, reason=NO_ROOT)
@pytest.mark.parametrize("kilobytes", [16, 80, 150])
def test_a_full_disk(tmp_path, kilobytes):
    """It fills up at different stages of a run: the output alone takes 93 kB."""
    with mounted(tmp_path / "small", f"size={kilobytes}k") as folder:
        result = call("guard", MLP, "-o", folder / "out.onnx", "--preserve", "off", "--quiet")
        assert one_line(result) == (
            f"flipguard-onnx: {folder}: cannot be written: No space left on device\n"
        )
        assert names(folder) == []


@pytest.mark.skipif(os.geteuid() != 0, reason=NO_ROOT)
def test_a_full_disk_under_the_report(tmp_path):
    earlier = '{\n  "a": 1\n}\n'
    with mounted(tmp_path / "small", "size=16k") as folder:
        (folder / "r.json").write_text(earlier)
        with suppress(OSError):
            (folder / "filler").write_bytes(bytes(1 << 20))
        result = call("inspect", MLP, "--report", folder / "r.json")
        line = f"{folder}/r.json: the report cannot be written: No space left on device\n"
        assert one_line(result).endswith(line)
        assert result.stdout == ""
        assert (folder / "r.json").read_text() == earlier
        assert names(folder) == ["filler", "r.json"]


@pytest.mark.parametrize("kilobytes", [1, 60, 150])
def test_a_limit_on_the_size_of_files(tmp_path, kilobytes):
    guard(save(matmul(), tmp_path), validate=False)  # whatever is compiled is compiled
    source = save(onnx.load(MLP), tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, before[1]))
    try:
        result = call("guard", source, "-o", tmp_path / "out.onnx", "--preserve", "off", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert one_line(result).endswith(f"{tmp_path}: cannot be written: File too large\n")
    assert names(tmp_path) == ["model.flipguard-int8.onnx", "model.onnx"]


@pytest.mark.skipif(os.geteuid() != 0, reason=NO_ROOT)
def test_a_read_only_file_system(tmp_path):
    source = save(SAMPLES["nested"](), tmp_path)
    with mounted(tmp_path / "fixed", "size=1m") as folder:
        (folder / "model.onnx").write_bytes(source.read_bytes())
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        refused = f"flipguard-onnx: {folder}: cannot be written: Read-only file system\n"
        assert one_line(call("guard", folder / "model.onnx", "--quiet")) == refused
        result = call("guard", source, "--report", folder / "r.json", "--quiet")
        assert "the report cannot be written there" in one_line(result)
        result = call("guard", source, MLP, "-o", folder / "out")
        assert f"{folder / 'out'}: cannot be made: Read-only file system" in one_line(result)
        assert call("inspect", folder / "model.onnx").exit_code == 0
    assert names(tmp_path) == ["fixed", "model.onnx"]


def test_a_report_is_whole_or_absent(tmp_path, monkeypatch):
    report = tmp_path / "r.json"
    write_report(report, "{\n}\n")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_report(report, "{\n  1\n}\n")
    assert report.read_text() == "{\n}\n"
    assert names(tmp_path) == ["r.json"]
