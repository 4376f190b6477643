"""Many models in one run: every one accounted for, whatever happens to the others."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from multiprocessing import active_children
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from flipguard_onnx import DeviceError, GuardOptions, ModelError, guard, guard_many
from flipguard_onnx.io.publish import LOCK
from flipguard_onnx.pipeline import batch as fleet
from flipguard_onnx.pipeline.batch import find_models, model_seed
from flipguard_onnx.runtime.pool import Lost, core_shares, on_dask
from tests.helpers.command import call, heed_interrupts, held, names, one_line, workspaces
from tests.helpers.samples import SAMPLES, matmul, model, node, save, tied_embedding, weights

EXPORTS = Path(__file__).parents[2] / "models" / "exports"

FAST = {"validate": False, "preserve": "off"}
PLAIN = ("--no-validate", "--preserve", "off")


@pytest.fixture
def models(tmp_path):
    """A folder with a model, two bad ones and one in a folder below, and what is none of them."""
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    save(matmul(), folder, "good.onnx")
    save(SAMPLES["nested"](), folder / "below", "good.onnx")
    save(model([node("Relu", "x", "y")], {"x": (1, [3])}, {"y": (1, [3])}), folder, "empty.onnx")
    (folder / "broken.ONNX").write_text("no model")
    (folder / "readme.txt").write_text("no model")
    guard(folder / "good.onnx", "int4", emit="both", **FAST)
    return folder


@pytest.fixture
def one_process(monkeypatch):
    """For what does not depend on processes: they take a second each to start."""
    monkeypatch.setattr(
        fleet,
        "in_processes",
        lambda task, items, *_: (pair for pair in enumerate(map(task, items))),
    )


def outputs(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_summary_and_the_worst_exit_code(models, tmp_path):
    other = save(matmul((40, 30)), tmp_path, "other.onnx")
    report = tmp_path / "r.json"
    result = call("guard", models, other, "-o", tmp_path / "out", "--jobs", 2, "--report", report)
    assert result.exit_code == 2
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert list(lines) == [
        "model",
        *(
            str(models / name)
            for name in ("below/good.onnx", "broken.ONNX", "empty.onnx", "good.onnx")
        ),
        str(other),
        "drift",
        "preserve",
        f"({models}/below/good.onnx)",
        "speed",
        "otherwise",
        "session.disable_quant_qdq=1,",
        f"({models}/below/good.onnx,",
        "guarded",
    ]
    assert lines["guarded"] == "guarded   3 models, 2 failed"
    assert lines[str(models / "broken.ONNX")].endswith(
        "not an ONNX model (its protobuf does not parse)"
    )
    assert "nothing to guard" in lines[str(models / "empty.onnx")]
    written = ["below/good", "good", "other"]
    assert outputs(tmp_path / "out") == [f"{name}.flipguard-int8.onnx" for name in written]
    read = json.loads(report.read_text())
    assert read["code"] == 2
    assert [m["code"] for m in read["models"]] == [0, 2, 2, 0, 0]
    assert [m["report"] is None for m in read["models"]] == [False, True, True, False, False]
    assert [m["error"] is None for m in read["models"]] == [True, False, False, True, True]
    first = read["models"][0]
    line = lines[first["model"]].split()
    assert line[1:3] == ["0", f"{first['report']['coverage']:.2%}"]
    assert line[3] == f"{first['report']['flips'] / first['report']['weights']:.2%}"
    assert line[-1] in first["report"]["outputs"]
    alone = call("guard", other, "--quiet", "--report", report, "-o", tmp_path / "alone.onnx")
    assert alone.exit_code == 0
    assert set(json.loads(report.read_text())) == set(first["report"])


@pytest.fixture
def model_folder(tmp_path):
    """As for onnxruntime-genai and transformers.js: settings, and graphs in a folder below."""
    folder = tmp_path / "llm"
    (folder / "onnx").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    settings = {"model": {"decoder": {"filename": "onnx/model.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    proto = onnx.load(save(tied_embedding(), tmp_path))
    data = {"save_as_external_data": True, "size_threshold": 0, "location": "model.onnx.data"}
    onnx.save(proto, folder / "onnx" / "model.onnx", **data)
    save(matmul(), folder / "onnx", "encoder.onnx")
    (folder / "onnx" / "added.json").write_text("[]")
    return folder


@pytest.mark.usefixtures("one_process")
def test_what_a_model_folder_is_written_to_can_be_run(model_folder, tmp_path):
    out, report = tmp_path / "out", tmp_path / "r.json"
    result = call("guard", model_folder, "-o", out, *PLAIN, "--report", report)
    assert result.exit_code == 0
    assert "copied    3 other files of the models' folders\n" in result.stdout
    copied = ["genai_config.json", "onnx/added.json", "tokenizer.json"]
    (data,) = out.glob("onnx/model.onnx.*.data")
    written = ["onnx/encoder.onnx", "onnx/model.onnx", f"onnx/{data.name}"]
    assert outputs(out) == sorted([*copied, *written])
    read = json.loads(report.read_text())
    assert read["copied"] == [str(out / name) for name in copied]
    settings = json.loads((out / "genai_config.json").read_text())
    graph = onnx.load(out / settings["model"]["decoder"]["filename"]).graph
    assert "DequantizeLinear" in {n.op_type for n in graph.node}


@pytest.mark.usefixtures("one_process")
def test_files_that_are_there_are_replaced_only_if_that_is_wanted(model_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    message = one_line(call("guard", model_folder, "-o", out, *PLAIN))
    assert message.endswith("tokenizer.json: exists already; --force overwrites it\n")
    assert outputs(out) == ["tokenizer.json"]
    assert call("guard", model_folder, "-o", out, "--force", *PLAIN).exit_code == 0
    assert (out / "tokenizer.json").read_text() == "{}"


@pytest.mark.usefixtures("one_process")
def test_a_model_folder_is_written_below_itself_or_beside_its_models(model_folder):
    below = model_folder / "guarded"
    assert call("guard", model_folder, "-o", below, *PLAIN).exit_code == 0
    assert not (below / "guarded").exists()
    result = guard_many([model_folder], output=model_folder, **FAST)
    written = [path for o in result.outcomes if o.report for path in o.report.outputs]
    assert len(written) == 2
    assert all(path.endswith(".flipguard-int8.onnx") for path in written)
    assert not result.copied


@pytest.mark.usefixtures("one_process")
def test_nothing_goes_along_where_no_model_was_guarded(model_folder, tmp_path):
    (model_folder / "onnx" / "model.onnx").write_text("broken")
    (model_folder / "onnx" / "encoder.onnx").write_text("broken")
    assert call("guard", model_folder, "-o", tmp_path / "out", *PLAIN).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_folder_with_one_model_has_the_report_and_the_progress_of_the_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EXPORTS / "genai", folder)
    result = call("guard", folder, "-o", tmp_path / "out", "--preserve", "off")
    assert result.exit_code == 0
    assert "model.onnx: validating ..." in result.stderr.splitlines()
    assert "\nvalid     on 8 inputs" in result.stdout
    assert result.stdout.endswith("\ncopied    3 other files of the models' folders\n")
    (folder / "model.onnx.data").unlink()
    failed = call("guard", folder, "-o", tmp_path / "other" / "out")
    assert failed.exit_code == 2
    assert not failed.stdout
    said = failed.stderr.splitlines()
    assert said[-1].endswith("needs the data file 'model.onnx.data': it does not exist")
    assert not (tmp_path / "other").exists()


def test_large_files_of_a_model_folder_are_linked(model_folder, tmp_path):
    weights = model_folder / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(fleet.LINKED)
    result = guard_many([model_folder], output=tmp_path / "out", **FAST)
    assert result.code == 0
    assert (tmp_path / "out" / "model.safetensors").samefile(weights)
    assert not (tmp_path / "out" / "tokenizer.json").samefile(model_folder / "tokenizer.json")


@pytest.mark.usefixtures("one_process")
def test_a_summary_warns_as_reports_of_single_models_do(tmp_path):
    for name in "abcd":
        save(matmul((64, 40)), tmp_path, f"{name}.onnx")
    (nested := tmp_path / "n").mkdir()
    save(SAMPLES["nested"](), nested, "nested.onnx")
    result = call("guard", tmp_path, "-o", tmp_path / "out", "--no-validate")
    assert result.exit_code == 0
    single = call("guard", nested / "nested.onnx", "-o", tmp_path / "x.onnx", "--no-validate")
    (warning,) = (line for line in single.stdout.splitlines() if line.startswith("preserve"))
    lines = result.stdout.splitlines()
    assert lines[lines.index(warning) + 1] == f"          ({nested / 'nested.onnx'})"
    speed = lines.index(next(line for line in lines if line.startswith("speed")))
    named = ", ".join(str(tmp_path / f"{name}.onnx") for name in "abc")
    assert lines[speed + 3] == f"          ({named} and 2 more)"


@pytest.mark.usefixtures("one_process")
def test_a_failed_validation_alone_is_exit_code_1(models, tmp_path):
    good = models / "good.onnx", models / "below" / "good.onnx"
    result = call("guard", *good, "-o", tmp_path / "out", "--quiet", "--max-drift", "0.001")
    assert "both would be written to" in one_line(result)
    good[1].rename(models / "better.onnx")
    options = ("-o", tmp_path / "out", "--quiet", "--max-drift", "0.001")
    result = call("guard", good[0], models / "better.onnx", *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert [line.split(" by ")[0] for line in result.stderr.splitlines()] == [
        f"flipguard-onnx: {path}: the outputs drift" for path in (good[0], models / "better.onnx")
    ]
    assert outputs(tmp_path / "out") == []


def test_folders_are_searched_and_outputs_left_alone(models, tmp_path):
    """Links to files are followed, as in a model hub's cache; links to folders are not."""
    (models / "link.onnx").symlink_to(models / "good.onnx")
    (models / "nowhere.onnx").symlink_to(models / "none")
    (models / "loop").symlink_to(models)
    (models / "folder.onnx").mkdir()
    (models / ".flipguard-0123456789abcdef").mkdir()
    save(matmul(), models / ".flipguard-0123456789abcdef")
    found = [str(place) for _, place in find_models([models])]
    assert found == [
        *("below/good.onnx", "broken.ONNX", "empty.onnx", "good.onnx", "link.onnx", "nowhere.onnx"),
    ]
    written = tmp_path / "in" / "good.flipguard-int4.onnx"
    assert find_models([written]) == [(written, Path(written.name))], "unless it is asked for"
    with pytest.raises(ModelError, match=r"no \.onnx file in this folder"):
        find_models([models / "folder.onnx"])


def test_two_models_with_one_output_are_refused_before_anything(models, tmp_path):
    (tmp_path / "link").symlink_to(models)
    good = models / "good.onnx"
    for pair in (
        [good, good],
        [good, models / ".." / "in" / "good.onnx"],
        [models, tmp_path / "link"],
    ):
        with pytest.raises(ModelError, match="both would be written to"):
            guard_many(pair, **FAST)
    with pytest.raises(ModelError, match="both would be written to"):
        guard_many([good, models / "below" / "good.onnx"], tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()
    assert not list(models.glob("*int8*"))


@pytest.mark.usefixtures("one_process")
def test_outputs_that_are_there_stay(models, tmp_path):
    old = models / "good.flipguard-int8.onnx"
    old.write_text("mine")
    result = guard_many([models], **FAST)
    errors = {Path(o.model).relative_to(models).as_posix(): o.error for o in result.outcomes}
    assert errors["good.onnx"] == f"{old}: exists already; --force overwrites it"
    assert errors["below/good.onnx"] is None
    assert result.code == 2
    assert old.read_text() == "mine"
    assert guard_many([models / "good.onnx"], force=True, **FAST).code == 0
    other = save(matmul(), models, "good.flipguard-int8.onnx")
    content = other.read_bytes()
    result = guard_many([models / "good.onnx", other], force=True, **FAST)
    assert [o.code for o in result.outcomes] == [2, 0], "an output that is another one's input"
    assert other.read_bytes() == content


@pytest.mark.parametrize("emit", ["qdq", "float", "both"])
@pytest.mark.usefixtures("one_process")
def test_outputs_are_named_as_those_of_one_model_alone(models, tmp_path, emit):
    good = models / "good.onnx"
    alone = guard(good, "nf4", emit=emit, seed=1, **FAST)
    together = guard_many([good], tmp_path / "out", "nf4", emit=emit, **FAST)
    (outcome,) = together.outcomes
    assert [Path(p).name for p in outcome.report.outputs] == [Path(p).name for p in alone.outputs]
    assert outputs(tmp_path / "out") == sorted(Path(p).name for p in alone.outputs)


def codes(path):
    return {t.name: numpy_helper.to_array(t).tobytes() for t in onnx.load(path).graph.initializer}


@pytest.mark.usefixtures("one_process")
def test_a_seed_gives_every_model_draws_of_its_own(tmp_path):
    """Models of one architecture have the same tensor names: one stream would move them alike."""
    twin = matmul()
    twin.doc_string = "the same weights, another file"
    paths = [save(matmul(), tmp_path, "a.onnx"), save(twin, tmp_path, "b.onnx")]
    alike = [codes(next(iter(guard(path, seed=1, **FAST).outputs))) for path in paths]
    assert alike[0] == alike[1]
    first, second = guard_many(paths, tmp_path / "out", seed=1, **FAST).outcomes
    assert first.report.seed != second.report.seed
    found = [next(iter(outcome.report.outputs)) for outcome in (first, second)]
    assert codes(found[0]) != codes(found[1])
    guard(paths[1], output=tmp_path / "again.onnx", seed=second.report.seed, **FAST)
    assert (tmp_path / "again.onnx").read_bytes() == Path(found[1]).read_bytes()
    moved = paths[1].rename(tmp_path / "c.onnx")
    (alone,) = guard_many([moved], tmp_path / "alone", seed=1, **FAST).outcomes
    assert alone.report.seed == second.report.seed, "neither name nor company count"
    (fresh,) = guard_many([moved], tmp_path / "fresh", **FAST).outcomes
    assert fresh.report.seed != second.report.seed


def test_the_seed_of_a_model_depends_on_its_external_data(tmp_path):
    seeds = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        proto = matmul()
        values = numpy_helper.from_array(weights((70, 33), seed=ord(name)), "w")
        proto.graph.initializer[0].CopyFrom(values)
        seeds.add(model_seed(1, save(proto, tmp_path / name, external=True)))
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (
        tmp_path / "b" / "model.onnx"
    ).read_bytes()
    assert len(seeds | {model_seed(2, tmp_path / "b" / "model.onnx")}) == 3


def test_cores_are_dealt_out():
    for cores, count in ((8, 1), (8, 2), (8, 3), (2, 2), (1, 4), (3, 5)):
        shares = core_shares(range(cores), count)
        assert len(shares) == count
        assert set(chain(*shares)) == set(range(cores))
        if count <= cores:
            assert sum(map(len, shares)) == cores
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
        else:
            assert max(map(len, shares)) == 1


def test_every_process_keeps_to_its_cores(models, tmp_path):
    found = {}

    def look(*_):
        found.update({p.pid: os.sched_getaffinity(p.pid) for p in active_children()})

    before = os.sched_getaffinity(0)
    guard_many([models], tmp_path / "out", jobs=2, progress=look, **FAST)
    assert os.sched_getaffinity(0) == before
    assert sorted(map(sorted, found.values())) == sorted(
        map(sorted, core_shares(sorted(before), 2))
    )


def test_onnxruntime_keeps_to_the_cores_it_may_use(models):
    """By itself it starts a thread for each core of the machine, and binds it there."""
    code = f"""
import os
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, [core])
from flipguard_onnx.runtime.worker import load
load({str(models / "good.onnx")!r}, exact=True)
print({{frozenset(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}})
assert all(os.sched_getaffinity(int(task)) == {{core}} for task in os.listdir("/proc/self/task"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def kill_when(appears, pid):
    """In the background: kill -9 what `pid` returns, once a run has begun to write."""

    def kill():
        while not workspaces(appears):
            time.sleep(0.002)
        os.kill(pid(), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_process_that_dies_takes_one_model_with_it(tmp_path):
    paths = [save(matmul(), tmp_path, f"{name}.onnx") for name in "abc"]
    thread = kill_when(tmp_path, lambda: active_children()[0].pid)
    result = guard_many(paths, tmp_path / "out", **FAST)
    thread.join()
    assert [o.code for o in result.outcomes] == [2, 0, 0]
    assert result.outcomes[0].error == f"{paths[0]}: its process died (SIGKILL)"
    assert names(tmp_path / "out") == ["b.flipguard-int8.onnx", "c.flipguard-int8.onnx"]
    assert active_children() == []


def test_a_defect_is_one_models_failure(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(fleet, "guard", fail)
    job = fleet.Job(save(matmul(), tmp_path), (tmp_path / "out.onnx",), GuardOptions())
    assert fleet.run(job).code == 2
    assert fleet.run(job).error == "MemoryError"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_all_processes_and_leave_nothing_half_done(models, tmp_path, number):
    (tmp_path / "out" / "below").mkdir(parents=True)
    locks = held(tmp_path / "out"), held(tmp_path / "out" / "below")
    command = [sys.executable, "-m", "flipguard_onnx", models, "-o", tmp_path / "out", "--jobs", 2]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    while not workspaces(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, number)  # as a terminal does it
    printed, errors = process.communicate()  # until the last process that may print is gone
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == f"flipguard-onnx: interrupted by {number.name}"
    assert "Traceback" not in errors
    assert printed == ""
    assert outputs(tmp_path / "out") == [LOCK, f"below/{LOCK}"]
    assert not workspaces(tmp_path)
    for lock in locks:
        lock.close()


def test_without_dask_one_line_says_what_to_install(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    options = ("-o", tmp_path / "out", "--quiet", "--scheduler", "tcp://127.0.0.1:1")
    result = call("guard", models, *options)
    assert one_line(result).endswith(
        "a scheduler needs a package that is not installed: pip install 'distributed>=2025.1'\n"
    )


def test_dask_is_imported_for_a_scheduler_only(models, tmp_path):
    code = f"""
import sys
from flipguard_onnx import guard_many
if __name__ == "__main__":
    guard_many([{str(models / "good.onnx")!r}], {str(tmp_path / "out")!r}, validate=False)
    assert not {{"distributed", "dask"}} & set(sys.modules)
"""
    (tmp_path / "script.py").write_text(code)
    subprocess.run([sys.executable, tmp_path / "script.py"], check=True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "pigeon://x", "nonsense"])
def test_a_scheduler_that_is_not_there(address):
    pytest.importorskip("distributed")
    with pytest.raises(DeviceError, match=f"scheduler '{address}' cannot be used: "):
        list(on_dask(str, [1], address, connect_seconds=1))


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    gc.collect()  # a client that found no scheduler would close amid the start, and wait for ever
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None
    ) as running:
        yield running


def test_a_dask_worker_is_killed_and_nothing_is_lost(cluster, models, tmp_path, monkeypatch):
    """Relative paths, one bad model; a worker dies at work, another one takes over."""
    for index in range(5):
        save(matmul((70, 33 + index)), models, f"m{index}.onnx")

    def busy():
        at_work = [w.address for w in cluster.scheduler.workers.values() if w.processing]
        return next(n.pid for n in cluster.workers.values() if n.worker_address in at_work)

    monkeypatch.chdir(tmp_path)
    thread = kill_when(tmp_path, busy)
    done = []
    result = guard_many(
        ["in"],
        "out",
        scheduler=cluster.scheduler_address,
        seed=1,
        progress=lambda *s: done.append(s),
    )
    thread.join()
    assert [d[1:] for d in done] == [(n, 9) for n in range(10)]
    assert [o.model for o in result.outcomes] == [
        str(path) for path, _ in find_models([Path("in")])
    ]
    assert [o.code for o in result.outcomes] == [0, 2, 2, 0, *[0] * 5]
    assert all(o.report.validation for o in result.outcomes if not o.code)
    written = [Path(path) for o in result.outcomes if not o.code for path in o.report.outputs]
    assert sorted(written) == sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
    here = guard_many(["in"], "here", seed=1)
    for there, outcome in zip(result.outcomes, here.outcomes, strict=True):
        assert (there.code, there.report and there.report.seed) == (
            outcome.code,
            outcome.report and outcome.report.seed,
        )
    for path in written:
        same = tmp_path / "here" / path.relative_to(tmp_path / "out")
        assert path.read_bytes() == same.read_bytes()


def test_dask_overwrites_nothing_without_force(cluster, models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "good.flipguard-int8.onnx").write_text("mine")
    result = call(
        *("guard", models / "good.onnx", "-o", tmp_path / "out", *PLAIN),
        *("--scheduler", cluster.scheduler_address),
    )
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert (tmp_path / "out" / "good.flipguard-int8.onnx").read_text() == "mine"


def test_what_a_task_raises_on_a_worker_is_lost_and_told(cluster):
    found = dict(on_dask(int, ["1", "x"], cluster.scheduler_address))
    assert found[0] == 1
    assert isinstance(found[1], Lost)
    assert found[1].reason.startswith("ValueError: invalid literal for int()")
