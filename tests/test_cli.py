"""The command line: what it writes, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from stepsmith import cli, demo, make_rule, store
from stepsmith.evaluate import records
from stepsmith.hub import TrainedRule, load, save
from stepsmith.meta import meta_train
from stepsmith.report import folder as results
from stepsmith.tasks import Quadratic

SMALL = ["--task", "quadratic", "--horizon", "10", "--steps", "60", "--copies", "2"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_train_evaluate_report_info(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "train", *SMALL)
    assert code == 0
    assert "rule.safetensors" in out.replace("\n", "")
    folder = tmp_path / "runs" / "train-quadratic"
    for name in ("config.json", "records.parquet", "run.safetensors", "rule.safetensors",
                 "report.html", "summary.json", "meta-training.svg"):  # fmt: skip
        assert (folder / name).exists(), name
    rule = str(folder / "rule.safetensors")
    code, out, _ = run(
        capsys, "evaluate", "--task", "quadratic", "--rule", rule, "-b", "adam", "--steps", "10",
        "--seeds", "3", "--tuning-seeds", "2",
    )  # fmt: skip
    assert code == 0
    assert "times the mean training loss of the best tuned" in " ".join(out.split())
    summary = json.loads((tmp_path / "runs/evaluate-quadratic/summary.json").read_text())
    assert {row["optimizer"] for row in summary["rows"]} == {"learned (quadratic)", "adam"}
    code, out, _ = run(capsys, "report", "runs/evaluate-quadratic")
    assert code == 0
    code, out, _ = run(capsys, "info", rule)
    assert "horizon" in out
    assert "LSTMRule" in out
    assert "threads on" in " ".join(out.split())  # the machine, in words
    assert "memory_gib" not in out


def test_evaluate_keeps_tuned_baselines(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        code, *_ = run(
            capsys, "evaluate", "-t", "quadratic", "-b", "adam", "--steps", "10", "--seeds", "3",
            "--tuning-seeds", "2", "--no-timing", "--cache", "kept",
        )  # fmt: skip
        assert code == 0
    (entry,) = (tmp_path / "kept").iterdir()
    assert entry.name.startswith("quadratic-adam-")


def test_transfer_prints_rules_by_tasks_and_goes_on_from_its_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "transfer", "-r", "quadratic", "-r", "mlp-mnist", "-t", "quadratic", "-t", "mlp-mnist@100",
        "-b", "adam", "--steps", "5", "--seeds", "2", "--tuning-seeds", "1", "--no-timing",
        "--source", "sample",
    ]  # fmt: skip
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    for word in ("learned (quadratic)", "learned (mlp-mnist)", "final loss"):
        assert word in " ".join(out.split())
    summary = json.loads((tmp_path / "runs/transfer/summary.json").read_text())
    assert {row["task"] for row in summary["rows"]} == {"quadratic", "mlp-mnist@100"}
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/cache").iterdir()}
    assert len(entries) == 2 * 3  # two rules and a baseline on each task
    assert run(capsys, *arguments)[0] == 0
    again = json.loads((tmp_path / "runs/transfer-2/summary.json").read_text())
    assert again["rows"] == summary["rows"]
    assert {
        path: path.stat().st_mtime_ns for path in (tmp_path / "runs/cache").iterdir()
    } == entries


@pytest.mark.parametrize("command", [["evaluate"], ["transfer", "-r", "quadratic"]])
def test_a_folder_with_results_is_refused_before_anything_is_measured(
    command, tmp_path, capsys, monkeypatch
):
    (tmp_path / "summary.json").write_text("{}")
    measured = []
    for name in ("evaluate", "transfer"):
        monkeypatch.setattr(cli, name, lambda *a, **k: measured.append(a))
    code, _, err = run(capsys, *command, "-t", "quadratic", "--folder", str(tmp_path))
    assert code == 2
    assert "holds the results of an earlier run" in err
    assert not measured


def test_bench_times_every_rule_beside_adamw(capsys):
    code, out, _ = run(capsys, "bench", "--task", "quadratic", "--rounds", "1")
    assert code == 0
    for name in ("joined", "l2o_dm", "rnnprop", "adamw"):
        assert name in out
    assert "10 parameters" in out


def test_runs_never_overwrite_older_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(capsys, "train", *SMALL)[0] == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "train-quadratic", "train-quadratic-2",
    ]  # fmt: skip


def test_training_on_several_tasks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smalltask.py").write_text(
        "from stepsmith.tasks import Quadratic\ndef small():\n    return Quadratic(2)\n"
    )
    assert run(capsys, "train", *SMALL, "--task", "smalltask:small")[0] == 0
    folder = tmp_path / "runs" / "train-quadratic-quadratic"
    trained = load(folder / "rule.safetensors")
    assert trained.manifest["tasks"] == ["quadratic", "quadratic"]
    assert trained.manifest["parameters"] == [10, 2]
    resume = ["train", "--resume", str(folder)]
    assert run(capsys, *resume, "--task", "smalltask:small")[0] == 0
    assert run(capsys, *resume, "--run-code")[0] == 0


def test_a_curriculum_and_its_resumption(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--task", "quadratic", "--steps", "200", "--curriculum", "5,10"]
    assert run(capsys, "train", *arguments)[0] == 0
    folder = tmp_path / "runs" / "train-quadratic"
    assert (folder / "stage-2-10" / "rule.safetensors").exists()
    trained = load(folder / "rule.safetensors")
    assert trained.horizon == 10
    assert run(capsys, "train", "--resume", str(folder))[0] == 0
    assert load(folder / "rule.safetensors").fingerprint == trained.fingerprint
    assert "curriculum" in run(capsys, "info", str(folder / "rule.safetensors"))[1]


def test_options_of_meta_training_reach_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"imitation": 0.5, "teacher-lr": 0.05, "accumulate": 2, "balance": "loss",
             "patience": 2, "proportions": "2,1"}  # fmt: skip
    options = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    tasks = ["--task", "quadratic", "--task", "quadratic"]
    arguments = ["--horizon", "10", "--steps", "200", "--copies", "2", *tasks, *options]
    assert run(capsys, "train", *arguments)[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    used = load(folder / "rule.safetensors").manifest["meta_training"]
    assert used["proportions"] == [2.0, 1.0]
    assert all(
        used[key.replace("-", "_")] == value for key, value in given.items() if key != "proportions"
    )
    assert run(capsys, "train", "--resume", str(folder))[0] == 0


def test_only_a_training_run_is_continued(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"task": "quadratic", "rules": []}')
    code, _, err = run(capsys, "train", "--resume", str(tmp_path))
    assert code == 2
    assert "not of a run of `stepsmith train`" in err


FEW = ["-t", "quadratic", "-b", "adam", "--steps", "5", "--seeds", "2", "--tuning-seeds", "1",
       "--no-timing"]  # fmt: skip


@pytest.fixture
def received(tmp_path, monkeypatch):
    """A run's folder from someone else, in a working directory that has the code it names."""
    monkeypatch.chdir(tmp_path)
    for name in ("theirs", "package/inner"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            "from pathlib import Path\nfrom stepsmith.tasks import Quadratic\n"
            "Path('ran').touch()\nmake = Quadratic\n"
        )

    def write(*tasks: str, **changes):
        config = {
            "tasks": list(tasks), "source": "auto", "data_dir": None, "device": "cpu",
            "rule": "joined", "rule_arguments": {}, "name": None, "command": "stepsmith train",
            "meta_training": {"steps": 20, "horizon": 10, "copies": 1, "lr": 0.01},
        }  # fmt: skip
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(json.dumps({**config, **changes}))
        return tmp_path / "run"

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in ("theirs", "package")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("task", "file"),
    [("theirs:make", "theirs.py"), ("package.inner:make", "package"), ("not.there:go", "no file")],
)
@pytest.mark.parametrize("typed", [[], ["--task", "theirs:other"], ["--task", "quadratic"]])
def test_a_folder_cannot_make_its_own_code_run(received, capsys, tmp_path, task, file, typed):
    folder = received("quadratic", task)
    code, _, err = run(capsys, "train", "--resume", str(folder), *typed)
    assert code == 2
    assert len(err.splitlines()) == 1
    for part in (f"{task!r} (", file, f"--task {task}", "--run-code", "config.json"):
        assert part in err
    assert not (tmp_path / "ran").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]


@pytest.mark.parametrize("task", ["theirs:make", "package.inner:make"])
@pytest.mark.parametrize("confirmed", ["--task", "--run-code"])
def test_code_that_the_user_confirms_runs(received, capsys, tmp_path, task, confirmed):
    folder = received("quadratic", task)
    arguments = [confirmed] if confirmed == "--run-code" else ["--task", task]
    assert run(capsys, "train", "--resume", str(folder), *arguments)[0] == 0
    assert (tmp_path / "ran").exists()
    assert load(folder / "rule.safetensors").manifest["tasks"] == ["quadratic"] * 2


def test_what_a_folder_names_writes_no_escapes_to_the_terminal(received, capsys):
    code, _, err = run(capsys, "train", "--resume", str(received("a\x1b[2J:b")))
    assert (code, "\x1b" in err) == (2, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": "quadratic"}, {"tasks": []}, {"tasks": [1]}, {"rule": None}, {"rule": 3},
        {"rule_arguments": []}, {"meta_training": 5}, {"name": 5}, {"data_dir": 7}, {"device": 0},
        {"meta_training": {"steps": 20, "out": "elsewhere"}},
        {"meta_training": {"steps": 20, "on_window": "print"}},
        {"meta_training": {"steps": 20, "colour": "red"}},
    ],
)  # fmt: skip
def test_a_configuration_that_is_none_is_one_line(received, capsys, changes):
    folder = received("quadratic", **changes)
    code, _, err = run(capsys, "train", "--resume", str(folder))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "config.json" in err


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(received, capsys):
    folder = received("quadratic")
    assert run(capsys, "train", "--resume", str(folder))[0] == 0
    assert load(folder / "rule.safetensors").manifest["inner_steps"] == 20


@pytest.mark.parametrize(
    ("typed", "differ"),
    [
        (["--lr", "0.5"], "--lr (the run has 0.01)"),
        (["--steps", "40"], "--steps (the run has 20)"),
        (["--seconds", "9"], "--seconds (the run has None)"),
        (["--curriculum", "5,10"], "--curriculum (the run has None)"),
        (["--hidden", "4"], "--hidden (the run has None)"),
        (["--rule", "rnnprop"], "--rule (the run has 'joined')"),
        (["--task", "mlp-mnist"], "--task (the run has ['quadratic'])"),
        (["--out", "elsewhere"], "--out"),
        (["--name", "mine", "--device", "cuda"], "--device (the run has 'cpu'), --name"),
        (["--proportions", "1,2"], "--proportions"),
        (["--lr", "0.01", "--horizon", "10", "--steps", "20", "--out", "."], None),
        (["--task", "quadratic", "--rule", "joined", "--copies", "1"], None),
        (["--checkpoint-seconds", "7"], None),
    ],
)
def test_options_beside_resume_are_the_runs_or_refused(received, capsys, typed, differ):
    folder = received("quadratic")
    code, _, err = run(capsys, "train", "--resume", str(folder), *typed)
    if differ is None:
        assert code == 0
        used = load(folder / "rule.safetensors").manifest["meta_training"]
        assert used["checkpoint_seconds"] == (7 if "7" in typed else 120)
    else:
        assert code == 2
        assert differ in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_checkpoint_seconds_are_checked_before_a_folder_is_made(
    tmp_path, capsys, monkeypatch, value
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "train", *SMALL, "--checkpoint-seconds", value)
    assert code == 2
    assert "checkpoint" in err
    assert not list(tmp_path.iterdir())


def test_checkpoint_seconds_reach_the_meta_training(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "train", *SMALL, "--checkpoint-seconds", "7")[0] == 0
    manifest = load(tmp_path / "runs" / "train-quadratic" / "rule.safetensors").manifest
    assert manifest["meta_training"]["checkpoint_seconds"] == 7


@pytest.mark.parametrize("option", ["--out", "--folder", "--cache"])
@pytest.mark.parametrize("place", ["file", "file/sub", "/dev/full", "link"])
@pytest.mark.parametrize("command", [["evaluate"], ["transfer", "-r", "quadratic"]])
def test_places_are_tried_before_anything_is_made_or_measured(
    command, place, option, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    before = sorted(tmp_path.iterdir())
    for name in ("evaluate", "transfer", "_made"):
        monkeypatch.setattr(cli, name, lambda *a, **k: pytest.fail("began"))
    code, _, err = run(capsys, *command, *FEW, option, place)
    assert code == 2
    assert f"{option} {place}" in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["train", "demo"])
def test_places_are_tried_before_anything_is_trained(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "void" / "void")
    monkeypatch.setattr(cli, "meta_train", lambda *a, **k: pytest.fail("began"))
    monkeypatch.setattr(demo, "meta_train", lambda *a, **k: pytest.fail("began"))
    for place in ("file", "file/sub", "/dev/full", "nowhere"):
        assert run(capsys, command, "--out", place)[0] == 2


@pytest.mark.parametrize("command", ["evaluate", "transfer"])
def test_results_that_cannot_be_written_are_shown_and_kept_elsewhere(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    put = store.write_bytes

    def refused(path, data):
        if path.name == "records.parquet" and path.parent.name == "here":
            raise store.CheckpointError(f"{path}: could not be written (full)")
        put(path, data)

    monkeypatch.setattr(records, "write_bytes", refused)
    code, out, err = run(
        capsys, command, "-r", "quadratic", *FEW, "--folder", "here", "--cache", "cache"
    )
    assert code == 2
    assert "learned (quadratic)" in " ".join(out.split())
    (spare,) = tmp_path.glob("stepsmith-*")
    assert f"The results are in {spare}." in err
    assert run(capsys, "report", str(spare))[0] == 0
    assert (spare / "report.html").exists()


@pytest.mark.parametrize("fault", [OSError(28, "full"), ValueError("drawing"), MemoryError()])
def test_figures_that_fail_cost_nothing_else(tmp_path, capsys, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)

    def svg(figure):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(results, "svg", svg)
        code, out, _ = run(capsys, "evaluate", *FEW, "--folder", "here")
    assert code == 0
    assert "adam" in out
    assert "Results: here" in out
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert summary["rows"]
    assert run(capsys, "report", "here")[0] == 0
    again = json.loads((tmp_path / "here" / "summary.json").read_text())
    assert again["rows"] == summary["rows"]
    assert again["figures"] == ["quadratic.svg"]


def test_an_interruption_while_results_are_written_waits_for_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put = store.write_bytes

    def interrupted(path, data):
        if path.name == "records.parquet":
            os.kill(os.getpid(), signal.SIGTERM)
        put(path, data)

    monkeypatch.setattr(records, "write_bytes", interrupted)
    code, _, err = run(capsys, "evaluate", *FEW, "--folder", "here")
    assert (code, "results are in here" in err) == (2, True)
    assert run(capsys, "report", "here")[0] == 0


def test_an_interrupted_demo_leaves_what_it_measured(tmp_path, capsys, monkeypatch):
    stages = tuple(demo.Stage("mlp-mnist", "its own", ("adam",), 2, 1) for _ in range(2))
    monkeypatch.setattr(demo, "STAGES", stages)
    monkeypatch.setattr(demo, "META_TRAINING", {"copies": 1, "validations": 1,
                                                "validation_copies": 1, "horizon": 10})  # fmt: skip
    compared = []

    def compare(*arguments):
        if compared:
            raise KeyboardInterrupt
        compared.append(True)
        return original(*arguments)

    original = demo._compare
    monkeypatch.setattr(demo, "_compare", compare)
    assert run(capsys, "demo", "--seconds", "0.1", "--out", str(tmp_path))[0] == 2
    assert run(capsys, "report", str(tmp_path / "demo"))[0] == 0
    assert "mlp-mnist" in (tmp_path / "demo" / "report.html").read_text()


def test_paths_are_no_markup(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "evaluate", *FEW, "--folder", "[bold]r[/x]:fire:")
    assert code == 0
    assert "[bold]r[/x]:fire:/report.html" in out.replace("\n", "")
    assert run(capsys, "report", "[bold]r[/x]:fire:")[0] == 0


def test_every_command_ends_as_others_do_when_interrupted(capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "rerender", interrupted)
    monkeypatch.setattr(cli, "load", interrupted)
    for arguments in (["report", "here"], ["info", "mlp-mnist"]):
        code, _, err = run(capsys, *arguments)
        assert (code, "interrupted" in err) == (2, True)


def test_lists(capsys):
    listed = run(capsys, "tasks")[1]
    for name in ("convnet-sigmoid", "vit-small", "mlpWxW-ACTIVATION[-bn|-ln]", "fashion_mnist"):
        assert name in listed.replace("\n", "")
    assert len(listed.splitlines()) < 15
    out = run(capsys, "rules")[1]
    assert "joined" in out
    assert "rmsprop" in out


def test_a_users_own_task(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owntask.py").write_text(
        "import torch\nfrom stepsmith import Task\n"
        "def make():\n"
        "    data = (torch.randn(40, 3), torch.randn(40, 1))\n"
        "    return Task.from_module(lambda: torch.nn.Linear(3, 1),\n"
        "                            torch.nn.functional.mse_loss, data, batch_size=4)\n"
    )
    arguments = ["--task", "owntask:make", "--horizon", "5", "--steps", "20", "--copies", "1"]
    assert run(capsys, "train", *arguments)[0] == 0
    assert (tmp_path / "runs" / "train-owntask-make" / "rule.safetensors").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("train", "evaluate", "bench"):
        code, _, said = run(capsys, command, "--task", "quadratic", "--device", "cuda")
        assert (code, "this PyTorch sees no GPU; use cpu" in said) == (2, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    code, _, said = run(capsys, "train", *arguments, "--device", "cuda")
    assert code == 2
    assert "make your own there, such as by Task.from_module(..., device='cuda')" in said


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["train", "--task", "mlp-minst", "--steps", "9"], "unknown|Did you mean"),
        (["train", "--task", "quadratik", "--steps", "9"], "Did you mean 'quadratic'"),
        (["train", "--task", "quadratic", "--rule", "joind"], "Did you mean 'joined'"),
        (["train", "--task", "quadratic", "--seconds", "-3"], "must be a finite number > 0"),
        (["train", "--task", "quadratic", "--seconds", "3", "--steps", "3"], "not both"),
        (["train", "--task", "quadratic", "--steps", "9", "--lr", "-1"], "lr must be"),
        (["train", "--task", "quadratic", "--steps", "9", "--window", "7"], "multiple"),
        (["train", "--steps", "9", "--horizon", "5", "--curriculum", "5,10"], "not both"),
        (["train", "--steps", "9", "--curriculum", "5;10"], "with commas between"),
        (["train", "--task", "quadratic", "--steps", "9", "--curriculum", "9,5"], "must grow"),
        (["train", "--steps", "9", "--proportions", "2;1"], "with commas between"),
        (["train", *SMALL, "--proportions", "2,1"], "one a task"),
        (["train", "--resume", "nowhere"], "no such file; --resume takes the folder"),
        (["evaluate", "--task", "quadratic", "--seeds", "0", "-b", "adam"], "seeds must be"),
        (["bench", "--task", "quadratic", "--rounds", "0"], "rounds must be at least 1"),
        (["bench", "--task", "quadratic", "-r", "joyned"], "unknown bundled rule"),
        (["bench", "--task", "quadratic", "--backend", "cuda"], "unknown backend"),
        (["evaluate", "--task", "quadratic", "-b", "adm"], "Did you mean 'adam'"),
        (["evaluate", "--task", "quadratic", "--rule", "nope"], "known: convnet-mnist"),
        (
            ["evaluate", "--task", "mlp-mnist", "--source", "directory", "--data-dir", "void"],
            "void",
        ),
        (["evaluate", "--task", "mlp-mnist", "--source", "web"], "source"),
        (
            ["transfer", "-r", "mlp-mnist", "-t", "quadratic", "-t", "quadratic"],
            "2 tasks are called",
        ),
        (
            ["transfer", "-r", "mlp-mnist", "-t", "mlp-mnist@blur"],
            "unknown variant of mnist 'blur'",
        ),
        (["info", "nothing.safetensors"], "no such file"),
        (["report", "nowhere"], "no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, match, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert re.search(match, lines[0])
    assert "Traceback" not in err


def test_unknown_options_exit_with_2(capsys):
    assert run(capsys, "train", "--colour", "red")[0] == 2


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_left_alone(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stepsmith = [sys.executable, "-m", "stepsmith", "train"]
    run_of = ["--task", "quadratic", "--horizon", "20", "--steps", "2000", "--copies", "2"]
    folder = tmp_path / "runs" / "train-quadratic"
    checkpoint = folder / "run.safetensors"
    reached = [0]
    for arguments in (run_of, ["--resume", str(folder)]):
        process = subprocess.Popen(
            [*stepsmith, *arguments], cwd=tmp_path, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
            if checkpoint.exists():
                progress = store.read(checkpoint, "run")[1]["progress"]
                if progress["inner_steps"] > reached[-1]:
                    reached.append(progress["inner_steps"])
                    break
        process.kill()
        process.wait()
    assert 0 < reached[1] < reached[2] < 2000
    subprocess.run(
        [*stepsmith, "--resume", str(folder)], cwd=tmp_path, env=environment, check=True,
        capture_output=True,
    )  # fmt: skip
    left_alone = meta_train(Quadratic(), "joined", horizon=20, steps=2000, copies=2, samples=40_000)
    assert load(folder / "rule.safetensors").fingerprint == left_alone.fingerprint


def test_output_that_nobody_reads_ends_nothing(tmp_path):
    command = [sys.executable, "-m", "stepsmith", "evaluate", *FEW, "--folder", "here"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1", "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "here" / "report.html").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_can_be_continued(tmp_path, sent):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stepsmith", "train", "--task", "quadratic", "--horizon", "20",
               "--steps", "400000", "--copies", "2"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    folder = tmp_path / "runs" / "train-quadratic"
    deadline = time.monotonic() + 60
    while not (folder / "run.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert "interrupted" in err
    config = json.loads((folder / "config.json").read_text())
    config["meta_training"]["steps"] = 4000
    (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [*command[:4], "--resume", str(folder)], cwd=tmp_path, env=environment, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert "rule.safetensors" in done.stdout.replace("\n", "")
    assert load(folder / "rule.safetensors").horizon == 20


def test_demo_end_to_end(tmp_path, capsys, monkeypatch):
    stages = (
        demo.Stage("mlp-mnist", "its own", ("adam",), 2, 1),
        demo.Stage("mlp-fashion_mnist", "other data", ("adam",), 2, 1),
    )
    monkeypatch.setattr(demo, "STAGES", stages)
    monkeypatch.setattr(demo, "META_TRAINING", {"copies": 1, "validations": 1,
                                                "validation_copies": 1, "horizon": 10})  # fmt: skip
    code, out, _ = run(capsys, "demo", "--seconds", "1", "--out", str(tmp_path))
    assert code == 0
    assert (tmp_path / "demo" / "report.html").exists()
    assert load(tmp_path / "demo" / "rule.safetensors").name == "demo"
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "mlp-fashion_mnist" in page
    text = " ".join(out.split())
    assert "Final loss" in text
    assert "meta-training took" in text


HOSTILE = "[red]x[/red]\x1b[2J\u202e\nb"
SHOWN = r"[red]x[/red]\x1b[2J\u202e\nb"


def test_a_files_own_words_are_shown_and_not_obeyed(tmp_path, capsys):
    rule = make_rule("rnnprop")
    fields = {"name": HOSTILE, "tasks": [HOSTILE], "data": HOSTILE}
    path = save(TrainedRule(rule, rule.init(), fields), tmp_path / "rule")
    code, out, _ = run(capsys, "info", str(path))
    assert code == 0
    assert out.replace("\n", "").replace(" ", "").count(SHOWN) == 3
    assert not set("\x1b\u202e") & set(out)


def test_a_files_own_words_in_an_error(tmp_path, capsys):
    path = tmp_path / "rule.safetensors"
    store.write(path, {}, {"kind": HOSTILE})
    for told in (str(path), str(tmp_path / HOSTILE / "x.safetensors")):
        code, _, err = run(capsys, "info", told)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert r"x[/red]\x1b[2J\u202e" in err
        assert not set("\x1b\u202e") & set(err)


def lines_of(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.strip()]


QUADRATIC = ["train", "--task", "quadratic", "--horizon", "5"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["train", "--task", "quadratic", "--steps", "1", "--horizon", "1000"],
         "a budget of 1 steps is smaller than one window, of 1,000"),
        (["train", "--task", "quadratic", "--steps", "7", "--curriculum", "5,10"],
         "budget of 7 steps is smaller than one window, of 10"),
        ([*QUADRATIC, "--steps", "1.5"], "'--steps': .*integer.*, got '1.5'; see `"),
        ([*QUADRATIC, "--steps=abc"], "'--steps': .*integer.*, got 'abc'; see `"),
        ([*QUADRATIC, "--seconds", "nan"], "seconds must be a finite number > 0, got nan"),
        ([*QUADRATIC, "--seconds", "1e99"], "seconds must be a finite number > 0, got 1e"),
        ([*QUADRATIC, "--steps", "9", "--lr", "1e99"], "lr must be a finite number"),
        ([*QUADRATIC, "--steps", "9", "--seed", "-1"], "seed must be at least 0"),
        ([*QUADRATIC, "--steps", "9", "--copies", "9999999999"], "copies must be at most"),
        ([*QUADRATIC, "--steps", "9", "--hidden", "9999999999"], "hidden must be at most"),
        ([*QUADRATIC, "--steps", "9", "--step-scale", "inf"], "step_scale must be a finite"),
        ([*QUADRATIC, "--steps", "9", "--proportions", "nan"], r"proportions\[0\] must be"),
        ([*QUADRATIC, "--steps", "9", "--source", "[bold]"], "data: source must be one of"),
        ([*QUADRATIC, "--steps", "9", "--data-dir", "void"], "data: void is no folder"),
        ([*QUADRATIC, "--steps", "9", "--out", ""], "--out: is empty"),
        ([*QUADRATIC, "--steps", "9", "--name="], "--name: is empty"),
        ([*QUADRATIC, "--steps", "9", "--name", "a\nb"], "holds a control character"),
        ([*QUADRATIC, "--colour", "red"], "No such option: --colour.*; see `"),
        (["nosuch"], "No such command 'nosuch'; see `"),
        (["recipe", "run"], "Missing argument.*; see `"),
        (["info", ""], "is empty"),
        (["evaluate", "-t", "quadratic", "--scale", "huge"], "scale must be one of"),
        (["evaluate", "-t", "quadratic", "--steps", "9999999999"], "steps must be at most"),
        (["demo", "--seconds", "-1"], "seconds must be a finite number > 0"),
        (["recipe", "run", "a15-techniques", "--source", "web"], "source must be one of"),
        *((["train", "-t", "quadratic", "--device", device], f"device '?{device}")
          for device in ("cpu:7", "meta", "gpu", "cpu:256")),
        (["bench", "-t", ".:f"], "task '.:f': TypeError"),
        (["bench", "-t", "json:loads"], "task 'json:loads': TypeError"),
        (["bench", "-t", "os:getcwd"], "must return a Task"),
        (["bench", "-t", ":f"], "task ':f'"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line_and_leaves_nothing(arguments, match, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert len(lines_of(err)) == 1, err
    assert re.search(match, err)
    assert not list(tmp_path.iterdir())


def test_a_fault_of_ours_is_a_traceback_and_where_to_report_it(capsys, monkeypatch):
    def broken(name):
        return {}[name]

    monkeypatch.setattr(cli, "load", broken)
    code, _, err = run(capsys, "info", "mlp-mnist")
    assert code == 1
    assert "Traceback" in err
    assert "KeyError" in err
    assert "please report it with the traceback above" in lines_of(err)[-1]


def test_names_are_no_markup(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "markup.py").write_text(
        "from stepsmith.tasks import Quadratic\n"
        "def make():\n"
        "    task = Quadratic(2)\n"
        "    task.name = '[/bold] :smile: [red]x'\n"
        "    return task\n"
    )
    out = "runs [/]"
    small = ["--task", "markup:make", "--horizon", "5", "--steps", "20", "--out", out]
    code, said, err = run(capsys, "train", *small, "--name", "[/n]")
    assert code == 0, err
    assert "[/bold] :smile: [red]x" in " ".join(said.split())
    rule = tmp_path / out / "train-markup-make" / "rule.safetensors"
    code, said, _ = run(capsys, "info", str(rule))
    assert code == 0
    assert "[/n]" in said
    code, said, _ = run(capsys, "bench", "-t", "markup:make", "--rounds", "1", "-r", str(rule))
    assert code == 0
    code, said, _ = run(capsys, "report", str(rule.parent))
    assert code == 0


def test_a_users_loss_that_fails_later_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laterfails.py").write_text(
        "import torch\nfrom stepsmith import Task\ncalls = []\n"
        "def loss(output, target):\n"
        "    calls.append(0)\n"
        "    if len(calls) > 6:\n"
        "        raise KeyError('late')\n"
        "    return (output - target).square().mean()\n"
        "def make():\n"
        "    data = (torch.randn(40, 3), torch.randn(40, 1))\n"
        "    return Task.from_module(lambda: torch.nn.Linear(3, 1), loss, data, batch_size=4)\n"
    )
    code, _, err = run(capsys, "train", "-t", "laterfails:make", "--horizon", "5", "--steps", "50")
    assert code == 2
    assert len(lines_of(err)) == 1
    assert re.search(r"KeyError: 'late' \(.*laterfails.py, line 7, in loss\)", err)


@pytest.mark.parametrize(
    "config",
    ["[]", "{}", "[" * 100_000, "\x00", '{"tasks": 3, "meta_training": {}}',
     '{"tasks": ["quadratic"], "source": "auto", "data_dir": null, "rule": "joined", '
     '"rule_arguments": {}, "name": null, "command": "", "meta_training": {"colour": 1}}'],
    ids=range(6),
)  # fmt: skip
def test_a_configuration_that_is_none_is_not_resumed(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    code, _, err = run(capsys, "train", "--resume", str(tmp_path))
    assert code == 2
    assert len(lines_of(err)) == 1
    assert re.search("config.json: (not|meta_training has colour)", err)


def test_a_pipe_that_is_closed_and_a_disk_that_is_full():
    command = [sys.executable, "-m", "stepsmith", "tasks"]
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in closed.stderr
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert len(lines_of(done.stderr)) == 1


OWN_TASKS = """
import torch
from stepsmith.tasks import Quadratic
class Own(Quadratic):
    stacking = {stacking!r}
    def __init__(self):
        super().__init__(3)
        {name}
    def loss(self, *arguments):
        loss, buffers, metrics = super().loss(*arguments)
        return {loss}, buffers, metrics
"""


def own_task(folder, stacking="vmap", name="pass", loss="loss"):
    """A module of the user's with a task, each time under another name."""
    module = f"own_{len(list(folder.glob('own_*')))}_{abs(hash(folder))}"
    text = OWN_TASKS.format(stacking=stacking, name=name, loss=loss)
    (folder / f"{module}.py").write_text(text)
    return f"{module}:Own"


@pytest.mark.parametrize("name", ["self.name = ''", "self.name = 3", "self.name = None",
                                  "self.name = ' '", "self.name = ['a']"])  # fmt: skip
def test_a_users_task_needs_a_name(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    task = own_task(tmp_path, name=name)
    code, _, err = run(capsys, "bench", "-t", task, "--rounds", "1")
    assert code == 2
    assert len(lines_of(err)) == 1
    assert "its Task needs a name" in err


@pytest.mark.parametrize("stacking", ["vmap", "loop", "threads"])
@pytest.mark.parametrize(
    ("loss", "match"),
    [("loss.expand(3)", r"single number .*got \(3,\)"),
     ("loss.reshape(1)", r"single number .*got \(1,\)"),
     ("1.0", "single number .*got float"), ("None", "single number .*got NoneType"),
     ("torch.tensor(2.0)", "depends on no parameter")],
)  # fmt: skip
def test_a_users_loss_must_be_a_number_with_a_gradient(
    tmp_path, capsys, monkeypatch, loss, match, stacking
):
    monkeypatch.chdir(tmp_path)
    task = own_task(tmp_path, loss=loss, stacking=stacking)
    for command in (
        ["train", "--horizon", "5", "--steps", "20", "--copies", "2"],
        ["evaluate", "--steps", "4", "--seeds", "2", "--tuning-seeds", "1", "-b", "adam"],
        ["bench", "--rounds", "1", "-r", "joined"],
    ):
        code, _, err = run(capsys, *command, "-t", task)
        assert code == 2
        assert len(lines_of(err)) == 1
        assert re.search(match, err)


def test_importing_a_task_leaves_the_working_folder_last(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    for _ in range(2):
        assert run(capsys, "bench", "-t", own_task(tmp_path), "--rounds", "1")[0] == 0
        assert sys.path == [*before, str(tmp_path)]
