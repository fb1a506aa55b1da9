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

from stepsmith import cli, demo
from stepsmith.hub import load

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
    assert run(capsys, "train", "--resume", str(folder))[0] == 0


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
        (["train", "--task", "quadratic", "--seconds", "-3"], "must be above 0"),
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
    assert "config.json: not" in err


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
