"""The GPU measurements, as far as they can be held without a GPU: parts, time, rows, the result's shape."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from scrimp.methods import METHODS, Method

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
NEW = Method(name="new", pieces={"optimizer": "new"}, terms="", source="")


@pytest.fixture
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Return a function that imports a module of the folder, whose names are not taken from others."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def a_setting(load: Callable[[str], ModuleType], tmp_path: Path, *, tiny: bool = False) -> Any:
    return load("_tasks").Setting(device="cpu" if tiny else "cuda", tiny=tiny, work=tmp_path)


def candidate(name: str, method: str, needed: int, *, fits: bool = True) -> dict[str, Any]:
    return {"name": name, "method": method, "recipe": {}, "needed_bytes": needed, "fits": fits}


CANDIDATES = [candidate("a, all", "a", 9), candidate("a, least", "a", 5), candidate("b", "b", 99, fits=False)]
FOUND_EARLIER = {
    "plan": {"status": "done", "candidates": CANDIDATES, "chosen": "a, all"},
    "time a run": {"status": "done", "trials": 1, "seeds": 1},
}


@pytest.mark.parametrize("tiny", [True, False])
def test_every_part_has_tasks_of_different_names(load: Any, tmp_path: Path, tiny: bool) -> None:
    setting = a_setting(load, tmp_path, tiny=tiny)
    for part in load("run").PARTS:
        names = [task.name for task in part.tasks(setting, FOUND_EARLIER, lambda: 100.0)]
        assert names, part.name
        assert len(set(names)) == len(names), part.name


def test_the_parts_share_at_most_25_minutes(load: Any) -> None:
    run = load("run")
    assert 20 < sum(part.minutes for part in run.PARTS) <= run.MINUTES == 25
    assert [part.name for part in run.PARTS] == ["tests", "headlines", "planner", "speed", "pretrain"]


def test_what_a_part_leaves_over_goes_to_the_next_ones(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load("run")
    now = 1000.0
    monkeypatch.setattr(run.time, "monotonic", lambda: now)
    parts = [replace(run.PARTS[0], minutes=minutes) for minutes in (1, 1, 2)]
    clock = run.Clock(100.0, parts, _began=now)
    first, second, third = clock.waiting
    assert clock.begin(first) == 25
    now += 10  # of its 25 seconds
    assert clock.begin(second) == 30
    now += 30
    assert clock.begin(third) == 60
    now += 61
    assert run.Clock(100.0, [third], _began=1000.0).begin(third) == 0


def test_a_method_that_joins_the_catalogue_is_measured_in_every_part(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, speed, pretrain, headlines = (load(n) for n in ("planner", "speed", "pretrain", "headlines"))
    for module in (planner, speed):
        monkeypatch.setattr(module, "METHODS", (*METHODS, NEW))
    assert {**planner.METHODS_ON, "optimizer.name": "new"} in planner.cases()
    assert "new" in speed.contestants(tiny=False)
    assert headlines.wanted([*CANDIDATES, candidate("new", "new", 7)], None)[-1]["name"] == "new"
    *_, suite = pretrain.tasks(a_setting(load, tmp_path), FOUND_EARLIER, lambda: 100.0)
    assert suite.command[suite.command.index("--methods") + 1] == "all"


def test_the_least_recipe_of_each_method_and_the_chosen_one_are_run_if_they_fit(
    load: Any, tmp_path: Path
) -> None:
    tasks = load("headlines").tasks(a_setting(load, tmp_path, tiny=True), FOUND_EARLIER, lambda: 100.0)
    assert [task.name for task in tasks] == ["plan", "a, least", "a, all"]


def test_at_least_twenty_configurations_cover_what_was_promised(load: Any) -> None:
    planner = load("planner")
    cases = planner.cases()
    assert len(cases) >= planner.LEAST_CASES == 20
    families = [case for case in cases if "family" in case]
    assert {case["precision"] for case in families} == {"fp32", "bf16-mixed", "bf16"}
    assert {case["seq"] for case in families} >= {64, 512, 1024, 2048, 4096}
    assert len({case["family"] for case in families}) >= 8
    assert {case.get("activations") for case in families} >= {None, "recompute", "recompute-mlp"}
    assert {case.get("loss") for case in families} == {None, "chunked"}
    assert "llama-7b" in {case.get("model.name") for case in cases}


def process(load: Any, code: str, name: str = "it", document: Path | None = None) -> Any:
    return load("_tasks").Task(name=name, command=(sys.executable, "-c", code), document=document)


def test_a_process_that_fails_is_a_row_with_its_sentence(load: Any) -> None:
    row = load("_tasks").perform(process(load, "raise ValueError('no such card')"), 60)
    assert (row["name"], row["status"]) == ("it", "failed")
    assert row["why"] == "exit code 1: ValueError: no such card"
    assert "Traceback" in row["said"]


def test_the_last_line_of_a_process_is_what_it_found(load: Any) -> None:
    row = load("_tasks").perform(process(load, 'print("warming up"); print(\'{"peak": 7}\')'), 60)
    assert (row["status"], row["peak"], row["why"]) == ("done", 7, "")
    assert row["seconds"] > 0


@pytest.fixture
def lifeline(tmp_path: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Return code of a child that would live on, and whether it did: who holds a pipe open is alive."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def lives() -> bool:
        assert os.read(reader, 1) == b"x", "it never ran"
        try:
            return os.read(reader, 1) != b""
        except BlockingIOError:
            return True

    yield f"import time; held = open({str(pipe)!r}, 'wb', 0); held.write(b'x'); time.sleep(60)", lives
    os.close(reader)


def test_a_process_that_takes_too_long_is_ended_with_what_it_started(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lifeline: tuple[str, Callable[[], bool]]
) -> None:
    tasks = load("_tasks")
    monkeypatch.setattr(tasks, "LEAST_S", 0.0)
    child, lives = lifeline
    document = tmp_path / "suite" / "bench.json"
    code = (
        "import subprocess, sys, time, pathlib; pathlib.Path('suite').mkdir();"
        "pathlib.Path('suite/bench.json').write_text('[1]');"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    row = tasks.perform(process(load, code, document=document), 3.0)
    assert (row["status"], row["why"]) == ("late", "it was ended: its 3 s did not suffice")
    assert row["document"] == [1]  # what was written until then counts
    assert not lives()


def test_a_process_that_ends_leaves_nothing_behind(
    load: Any, tmp_path: Path, lifeline: tuple[str, Callable[[], bool]]
) -> None:
    child, lives = lifeline
    code = (
        "import subprocess, sys, time;"
        f"child = subprocess.Popen([sys.executable, '-c', {'import sys;' + child!r}]);"
        f"time.sleep(0.5); print('{{}}')"
    )
    row = load("_tasks").perform(process(load, code), 60)
    assert row["status"] == "done"
    assert row["seconds"] < 30
    assert not lives()


def test_the_limit_holds_for_a_process_that_does_not_want_to_end(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = load("_tasks")
    monkeypatch.setattr(tasks, "LEAST_S", 0.0)
    asked = tmp_path / "asked"
    code = (
        "import pathlib, signal, time;"
        f"signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(asked)!r}).touch());"
        "[time.sleep(1) for _ in range(60)]"
    )
    row = tasks.perform(process(load, code), 2.0)
    assert row["status"] == "late"
    assert asked.exists()  # it could have saved
    assert row["seconds"] < 2.4  # the grace of 0.8 s would not fit behind the limit


def test_a_process_that_is_asked_to_end_may_still_end_well(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = load("_tasks")
    monkeypatch.setattr(tasks, "LEAST_S", 0.0)
    code = (
        "import signal, sys, time;"
        "signal.signal(signal.SIGTERM, lambda *_: (print('{\"peak\": 7}'), sys.exit(0)));"
        "time.sleep(60)"
    )
    row = tasks.perform(process(load, code), 2.0)
    assert (row["status"], row["peak"]) == ("done", 7)


def test_a_limit_leaves_most_of_itself_to_the_work(load: Any) -> None:
    tasks = load("_tasks")
    assert (
        tasks.GRACE_S + tasks.KILL_S <= tasks.LEAST_S < 60 * min(part.minutes for part in load("run").PARTS)
    )


def test_no_process_is_begun_without_time(load: Any) -> None:
    row = load("_tasks").perform(process(load, "raise SystemExit(1)"), 1.0)
    assert (row["status"], row["seconds"]) == ("late", 0.0)


def test_an_old_document_is_not_taken_for_a_new_one(load: Any, tmp_path: Path) -> None:
    document = tmp_path / "bench.json"
    document.write_text("{}", encoding="utf-8")
    load("os").utime(document, (1, 1))
    row = load("_tasks").perform(process(load, "raise SystemExit(2)", document=document), 60)
    assert row["status"] == "failed"
    assert "document" not in row


def test_memory_that_ran_out_is_a_finding(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def work(spec: dict[str, int]) -> dict[str, Any]:
        raise torch.OutOfMemoryError(f"tried to allocate {spec['gib']} GiB\nand a stack")

    monkeypatch.setattr(sys, "argv", ["it", '{"gib": 90}'])
    load("_tasks").answer(work)
    row = json.loads(capsys.readouterr().out)
    assert row == {"status": "out of memory", "why": "tried to allocate 90 GiB"}
    assert row["status"] in load("_tasks").FOUND


def a_part(load: Any, log: Path) -> Any:
    """Return a part of three processes that log that they ran; the second fails until a file is there."""
    write = f"log = open({str(log)!r}, 'a'); print(NAME, file=log);"
    fails = f"import pathlib; assert pathlib.Path({str(log.with_name('mended'))!r}).exists();"

    def tasks(setting: Any, rows: Any, left: Any) -> Iterator[Any]:
        for name, more in (("one", ""), ("two", fails), ("three", "")):
            yield process(load, f"NAME = {name!r}; {write} {more} print('{{\"peak\": 7}}')", name)

    def summary(rows: Any, expect: Any) -> dict[str, Any]:
        expect("found", sum(row["status"] == "done" for row in rows), at_least=3)
        return {"rows": len(rows)}

    return load("_tasks").Part(name="planner", minutes=1, tasks=tasks, summary=summary)


def go(load: Any, part: Any, tmp_path: Path, *, again: bool = False) -> dict[str, Any]:
    run, path = load("run"), tmp_path / "gpu.json"
    setting = a_setting(load, tmp_path, tiny=True)
    document = run.Document.open(path, setting, None, again=again, parts=[part])
    if not document.finished(part.name):
        run.measure(part, setting, document, run.Clock(60.0, [part]))
    whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return whole


def test_a_rerun_tries_what_failed_and_keeps_the_rest(load: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    part = a_part(load, log)
    first = go(load, part, tmp_path)
    assert log.read_text().split() == ["one", "two", "three"]  # what failed ended nothing
    assert [row["status"] for row in first["results"]["planner"]["rows"]] == ["done", "failed", "done"]
    assert first["results"]["planner"]["finished"] is False
    assert first["targets"] == [{"part": "planner", "what": "found", "value": 2, "at_least": 3, "met": False}]
    (tmp_path / "mended").touch()
    second = go(load, part, tmp_path)
    assert log.read_text().split() == ["one", "two", "three", "two"]
    assert second["results"]["planner"]["finished"] is True
    assert [target["met"] for target in second["targets"]] == [True]
    go(load, part, tmp_path)
    assert len(log.read_text().split()) == 4
    go(load, part, tmp_path, again=True)
    assert len(log.read_text().split()) == 7


def test_the_result_says_on_what_it_was_made(load: Any, tmp_path: Path) -> None:
    whole = go(load, a_part(load, tmp_path / "log"), tmp_path)
    assert whole["benchmark"] == "gpu"
    assert {"made", "command", "busy", "load", "seconds", "targets", "results"} <= whole.keys()
    environment = whole["environment"]
    assert (environment["device"], environment["tiny"]) == ("cpu", True)
    assert {"torch", "scrimp", "python"} <= environment["versions"].keys()
    part = whole["results"]["planner"]
    assert part.keys() == {"finished", "seconds", "summary", "rows"}
    assert part["seconds"] == pytest.approx(sum(row["seconds"] for row in part["rows"]), abs=0.05)


def test_a_result_of_another_machine_is_not_gone_on_with(load: Any, tmp_path: Path) -> None:
    part = a_part(load, tmp_path / "log")
    go(load, part, tmp_path)
    path = tmp_path / "gpu.json"
    path.write_text(path.read_text().replace('"tiny": true', '"tiny": false'), encoding="utf-8")
    with pytest.raises(SystemExit, match="another machine"):
        go(load, part, tmp_path)


@pytest.mark.parametrize(
    ("before", "row", "kept"),
    [
        (None, {"status": "late", "seconds": 0.0}, "row"),
        ({"status": "failed", "seconds": 3.0}, {"status": "failed", "seconds": 2.0}, "row"),
        ({"status": "failed", "seconds": 3.0}, {"status": "late", "seconds": 0.0}, "before"),
        ({"status": "late", "document": {}}, {"status": "failed", "seconds": 2.0}, "before"),
        ({"status": "late", "document": {}}, {"status": "late", "seconds": 2.0, "document": {}}, "row"),
        ({"status": "late", "document": {}}, {"status": "out of memory", "seconds": 2.0}, "row"),
    ],
)
def test_a_rerun_loses_nothing_that_was_found(load: Any, before: Any, row: Any, kept: str) -> None:
    assert load("run")._richer(before, row) is {"before": before, "row": row}[kept]


def test_a_rerun_without_time_leaves_every_row_as_it_was(load: Any, tmp_path: Path) -> None:
    run, part = load("run"), a_part(load, tmp_path / "log")
    first = go(load, part, tmp_path)
    setting = a_setting(load, tmp_path, tiny=True)
    document = run.Document.open(tmp_path / "gpu.json", setting, None, again=False, parts=[part])
    run.measure(part, setting, document, run.Clock(0.0, [part]))
    again = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert again["results"] == first["results"]


@pytest.mark.parametrize("again", [True, False])
def test_to_measure_anew_is_passed_on_to_the_suites(load: Any, tmp_path: Path, again: bool) -> None:
    setting = replace(a_setting(load, tmp_path), again=again)
    assert ("--again" in load("_tasks").bench(setting, "it", ["speed"]).command) == again


SMI = (
    "0, GPU-aa11, NVIDIA H100 80GB HBM3, 9.0, 570.1, 81559, 3\n1, GPU-bb22, NVIDIA L4, 8.9, 570.1, 23034, 0\n"
)


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        ("", "NVIDIA H100 80GB HBM3"),
        ("1", "NVIDIA L4"),
        ("GPU-bb", "NVIDIA L4"),
        ("0,1", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_the_card_is_torchs_first_device(load: Any, visible: str, name: str) -> None:
    found = load("_card").read(SMI, visible)
    assert found["name"] == name
    assert load("_card").read("", visible) is None


def test_the_cards_memory_is_in_bytes(load: Any) -> None:
    found = load("_card").read(SMI, "")
    assert (found["memory_bytes"], found["used_bytes"]) == (81559 * 2**20, 3 * 2**20)
    assert (found["capability"], found["driver"]) == ("9.0", "570.1")


@pytest.mark.parametrize(
    ("seconds", "trials", "seeds"), [(0.0, 1, 1), (240.0, 1, 1), (800.0, 3, 1), (1_300.0, 3, 3)]
)
def test_time_decides_on_learning_rates_and_seeds_alone(
    load: Any, tmp_path: Path, seconds: float, trials: int, seeds: int
) -> None:
    pretrain = load("pretrain")
    # 5 rounds of 30 s for a run of each: 10 to begin it, and 20 for 2 M tokens beside three others.
    stated = {"tokens": 2 * 10**6, "contestants": 20, "jobs": 4, "tokens_per_s": 400_000.0, "start_s": 10.0}
    chosen = pretrain.choose(seconds, **stated)
    assert chosen == {"trials": trials, "seeds": seeds}
    runs = trials + seeds - 1
    assert 5 * runs * 30 <= pretrain.USABLE * seconds or runs == 1
    rows = {**FOUND_EARLIER, "time a run": {"status": "done", **chosen}}
    *_, suite = pretrain.tasks(a_setting(load, tmp_path), rows, lambda: seconds)
    given = {
        name: suite.command[suite.command.index(name) + 1] for name in ("--tokens", "--trials", "--seeds")
    }
    assert given == {"--tokens": "2097152", "--trials": str(trials), "--seeds": str(seeds)}
    assert suite.name == "llama-60m 2097152 tokens"


def test_the_tokens_are_whole_steps(load: Any) -> None:
    pretrain = load("pretrain")
    for job, tokens in ((pretrain.JOB, pretrain.TOKENS), (pretrain.TINY_JOB, pretrain.TINY_TOKENS)):
        assert tokens % (job["batch"] * job["seq"]) == 0
    assert f"{pretrain.TOKENS:,} tokens" in pretrain.__doc__


def test_a_method_that_does_not_make_it_is_a_row_marked_late(load: Any) -> None:
    loss = {"median": 2.0, "lowest": 2.0, "highest": 2.0, "all": [2.0]}
    contestants = [
        {"name": "slow", "status": "partial", "why": "", "loss": {**loss, "median": 1.0}, "lr": 0.1},
        {"name": "absent", "status": "missing", "why": "pip install it", "loss": None, "lr": None},
        {"name": "adamw", "status": "done", "why": "", "loss": loss, "lr": 0.01},
        {"name": "fira", "status": "done", "why": "", "loss": {**loss, "median": 1.5}, "lr": 0.02},
        {"name": "broken", "status": "failed", "why": "no such card", "loss": None, "lr": None},
    ]
    job = {"model": "llama-60m", "tokens": 2**21}
    document = {"job": job, "protocol": {"trials": 3, "seeds": 1}, "contestants": contestants}
    held: dict[str, tuple[int, dict[str, int]]] = {}

    def expect(what: str, value: int, **limits: int) -> None:
        held[what] = (value, limits)

    found = load("pretrain").summary([{"name": "it", "document": document}], expect)
    assert found["title"] == "llama-60m from random weights, 2,097,152 tokens with every method"
    assert [(m["name"], m["status"]) for m in found["methods"]] == [
        ("fira", "done"),
        ("adamw", "done"),
        ("slow", "late"),
        ("absent", "missing"),
        ("broken", "failed"),
    ]
    assert found["methods"][2]["loss"] is None  # a search cut short compares with no other
    assert "the same command goes on" in found["methods"][2]["why"]
    assert held == {
        "pretrain: contestants that are failed": (1, {"below": 1}),
        "pretrain: contestants that are late": (1, {"below": 1}),
    }


def test_a_step_is_timed_from_an_idle_device_to_an_idle_device(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, seen = load("_held"), []
    monkeypatch.setattr(held.torch.cuda, "synchronize", lambda _: seen.append("wait"))
    monkeypatch.setattr(held.time, "perf_counter", lambda: seen.append("clock") or float(len(seen)))
    loop = SimpleNamespace(
        job=SimpleNamespace(device=SimpleNamespace(type="cuda")),
        progress=SimpleNamespace(step=2),
        run=lambda until: seen.append(f"until {until}"),
    )
    assert held.timed(loop, 3) == 3.0
    assert seen == ["wait", "clock", "until 5", "wait", "clock"]


def test_counts_of_a_report_name_what_broke(load: Any) -> None:
    report = (
        '<testsuites><testsuite tests="3" skipped="1" failures="1" errors="0">'
        '<testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure message="1 != 2"/></testcase>'
        '<testcase classname="t" name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    found = load("gpu_tests").counts(report)
    assert found == {"tests": 3, "skipped": 1, "failures": 1, "errors": 0, "broken": ["t::b: 1 != 2"]}


def test_speed_is_ours_over_the_trainers_within_a_pair(load: Any) -> None:
    contestants = [
        {"name": "adamw", "tokens_per_s": {"all": [100.0, 200.0]}, "speed_ratio": {"all": [1.0, 1.0]}},
        {"name": "transformers", "tokens_per_s": {"all": [50.0, 100.0]}, "speed_ratio": {"all": [0.5, 0.4]}},
        {"name": "fira", "tokens_per_s": None, "speed_ratio": None},
    ]
    row = {"name": "m", "document": {"job": {"batch": 2, "seq": 50}, "contestants": contestants}}
    held = []
    found = load("speed").summary([row], lambda *args, **limits: held.append((args, limits)))["m"]
    assert found["transformers"]["reference_over_it"]["all"] == [2.0, 2.5]
    assert found["adamw"]["ms_per_step"]["all"] == [1000.0, 500.0]
    assert "fira" not in found
    assert held == [(("speed: m: tokens/s, ours / Trainer", 2.25), {"at_least": 0.98})]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "planer"], "there is no 'planer'"),
        (["--device", "cpu"], "add --tiny"),
        (["--minutes", "0"], "above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    load: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        load("run").main(words)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_prediction_is_held_against_what_the_allocator_gave(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, planner = load("run"), load("planner")
    monkeypatch.setattr(planner, "TINY", planner.TINY[:1])
    monkeypatch.setattr(sys, "argv", ["run.py"])
    path = tmp_path / "gpu.json"
    run.main(
        ["--device", "cpu", "--tiny", "--parts", "planner", "--json", str(path), "--work", str(tmp_path)]
    )
    (row,) = json.loads(path.read_text(encoding="utf-8"))["results"]["planner"]["rows"]
    assert row["status"] == "done", row
    assert abs(row["error_percent"]) < 0.5
    assert row["ended"] == {"in what it asks for": "finished", "in too little": "out of memory"}
    assert row["verdicts_right"] == 2
    assert len(row["losses"]) == 7
    assert len(row["seconds_per_step"]["all"]) == 5
    assert row["seconds_per_step"]["lowest"] > 0
    assert row["predicted_terms"].keys() >= {"weights", "gradients", "optimizer state", "activations"}
