"""What a meta-training keeps on disk: early, whatever the disk does, for one process at a time."""

from __future__ import annotations

import builtins
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from stepsmith import load, store
from stepsmith.meta import checkpoint, meta_train, progress, train_curriculum, trainer
from stepsmith.meta.checkpoint import Saver
from stepsmith.store import CheckpointError
from stepsmith.tasks import Quadratic

SMALL = {"horizon": 6, "copies": 2, "validations": 2, "validation_copies": 2, "samples": 60}
STEPS = 96


def whole(**options):
    return meta_train(Quadratic(3), steps=STEPS, **{**SMALL, **options})


def refuse(monkeypatch, *names: str, after: int = 0, calls: int = 10**9) -> list[str]:
    """Let the disk refuse files of these names, from one call on and for so many."""
    put, tried = store.write, []

    def write(path: Path, *arguments) -> None:
        if path.name in names and "stepsmith-" not in path.parent.name:
            tried.append(path.name)
            if after < len(tried) <= after + calls:
                raise CheckpointError(f"{path}: could not be written (No space left on device)")
        put(path, *arguments)

    monkeypatch.setattr(store, "write", write)
    return tried


def test_checkpoints_that_fail_are_said_when_that_changes_and_end_nothing(
    tmp_path, monkeypatch, caplog
):
    want = whole()
    tried = refuse(monkeypatch, "run.safetensors", after=2, calls=3)
    got = whole(out=tmp_path, checkpoint_seconds=1e-9)
    assert got.fingerprint == want.fingerprint
    assert len(tried) == 1 + STEPS // 12 + 1
    said = [record.getMessage() for record in caplog.records]
    assert sum("No space left" in line for line in said) == 1
    assert sum("can be written again" in line for line in said) == 1
    assert load(tmp_path / "rule.safetensors").fingerprint == want.fingerprint
    more = meta_train(Quadratic(3), steps=2 * STEPS, out=tmp_path, resume=True, **SMALL)
    assert more.manifest["inner_steps"] == 2 * STEPS


@pytest.mark.parametrize("curriculum", [False, True])
def test_a_rule_that_cannot_be_saved_is_returned_and_kept_elsewhere(
    tmp_path, monkeypatch, caplog, curriculum
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    refuse(monkeypatch, "rule.safetensors", "run.safetensors")
    folder = tmp_path / "out"
    if curriculum:
        small = {key: value for key, value in SMALL.items() if key != "horizon"}
        got = train_curriculum(Quadratic(3), horizons=(2, 4), steps=STEPS, out=folder, **small)
    else:
        got = whole(out=folder)
    assert not (folder / "rule.safetensors").exists()
    spares = list(tmp_path.glob("stepsmith-*/rule.safetensors"))
    assert got.fingerprint in {load(spare).fingerprint for spare in spares}
    assert all(f"The trained rule is in {spare}" in caplog.text for spare in spares)


def test_a_rule_that_can_be_kept_nowhere_is_returned(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    refuse(monkeypatch, "rule.safetensors")
    assert whole(out=tmp_path).fingerprint == whole().fingerprint
    assert "Nor could it be kept elsewhere" in caplog.text


class Clock:
    """Seconds as a test gives them; `cost` go by in every checkpoint."""

    def __init__(self, monkeypatch, cost: float):
        self.now, self.cost, self.saved = 100.0, cost, []
        monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(checkpoint, "save_run", self.save)

    def save(self, run, path) -> None:
        self.now += self.cost
        self.saved.append(self.now - 100)

    def run(self, seconds: float, longest: float, window: float = 1.0) -> list[float]:
        saver = Saver(Path("run.safetensors"), longest)
        while self.now < 100 + seconds:
            self.now += window
            if saver.due():
                saver.save(None)  # pyright: ignore[reportArgumentType]
        return self.saved


@pytest.mark.parametrize("longest", [30.0, 120.0])
def test_the_first_window_is_saved_and_intervals_grow_to_the_longest(monkeypatch, longest):
    saved = Clock(monkeypatch, cost=0.0).run(600, longest)
    assert saved[0] == 1
    for before, now in itertools.pairwise(saved):
        assert now - before == min(longest, before)  # at most half of the work is lost


def test_early_checkpoints_cost_little_and_long_ones_wait_no_longer_than_asked(monkeypatch):
    saved = Clock(monkeypatch, cost=1.0).run(600, 120.0)
    assert len(saved) * 1.0 <= 2 + 600 / checkpoint.COST
    dear = Clock(monkeypatch, cost=60.0).run(2000, 120.0)
    assert all(now - before <= 120 + 60 + 1 for before, now in itertools.pairwise(dear))


@pytest.mark.parametrize("curriculum", [False, True])
def test_a_folder_whose_run_was_killed_before_its_first_checkpoint_starts_again(
    tmp_path, curriculum, caplog
):
    tmp_path.joinpath("config.json").write_text("{}")
    if curriculum:
        small = {key: value for key, value in SMALL.items() if key != "horizon"}
        got, want = (
            train_curriculum(Quadratic(3), horizons=(2, 4), steps=STEPS, **small, **where)
            for where in ({"out": tmp_path, "resume": True}, {})
        )
    else:
        got, want = whole(out=tmp_path, resume=True), whole()
        assert "no checkpoint yet" in caplog.text
    assert got.fingerprint == want.fingerprint
    for learn in (meta_train, train_curriculum):
        with pytest.raises(CheckpointError, match="no such file"):
            learn(Quadratic(3), steps=20 * STEPS, out=tmp_path / "void", resume=True)
    assert not (tmp_path / "void").exists()


def test_a_rule_without_its_checkpoint_is_not_overwritten_by_resuming(tmp_path):
    whole(out=tmp_path)
    (tmp_path / "run.safetensors").unlink()
    with pytest.raises(ValueError, match="holds an earlier meta-training"):
        whole(out=tmp_path, resume=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 255
    path.write_bytes(bytes(data))


def rewritten(change):
    def act(path: Path) -> None:
        tensors, manifest = store.read(path, "run")
        change(tensors, manifest)
        store.write(path, tensors, manifest)

    return act


DAMAGES = {
    "cut": (cut, "not a readable"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable"),
    "flipped": (flip, "does not match"),
    "format": (rewritten(lambda t, m: m.update(format=99, version="9.9")), "Stepsmith 9.9"),
    "tensor": (rewritten(lambda t, m: t.pop("best/head.weight", t.popitem())), "no whole"),
    "shape": (rewritten(lambda t, m: t.update({key: value.reshape(-1)[:1].clone() for key, value
                        in t.items() if key.startswith("weights/")})), "no whole.*shape"),
    "progress": (rewritten(lambda t, m: m["progress"].pop("updates")), "no whole"),
    "episodes": (rewritten(lambda t, m: m.update(episodes=[])), "no whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_said_with_what_to_do(tmp_path, name):
    want = whole(out=tmp_path)
    damage, match = DAMAGES[name]
    damage(tmp_path / "run.safetensors")
    with pytest.raises(CheckpointError, match=match) as refused:
        whole(out=tmp_path, resume=True)
    assert "delete it to begin this run from its start" in str(refused.value)
    assert "\n" not in str(refused.value)
    for file in ("run", "rule"):
        (tmp_path / f"{file}.safetensors").unlink()
    assert whole(out=tmp_path, resume=True).fingerprint == want.fingerprint


def test_checkpoints_from_before_formats_were_counted_are_read(tmp_path):
    want = whole(out=tmp_path)
    rewritten(lambda t, m: (m.pop("format"), m.pop("version")))(tmp_path / "run.safetensors")
    assert whole(out=tmp_path, resume=True).fingerprint == want.fingerprint


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("learn", [meta_train, train_curriculum])
def test_a_folder_is_one_processs_at_a_time(tmp_path, learn, resume):
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ValueError, match="another process is writing there"),
    ):
        learn(Quadratic(3), steps=20 * STEPS, out=tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_parts_of_files_that_a_kill_left_go(tmp_path):
    whole(out=tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f".run.safetensors.{ended.pid}-34", f".rule.safetensors.{ended.pid}-34", ".mine"):
        (tmp_path / name).write_text("part")
    whole(out=tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".lock", ".mine"]


@pytest.mark.parametrize("where", ["file", "file/sub", "/dev/full/sub"])
def test_a_place_is_tried_before_anything_is_trained(tmp_path, monkeypatch, where):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(trainer.Run, "validate", lambda run: pytest.fail("began"))
    with pytest.raises(CheckpointError, match="no folder that can be written to"):
        whole(out=tmp_path / where)


STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("sent", STOPS)
def test_a_signal_amid_the_first_validation_saves_and_ends_before_a_window(
    tmp_path, monkeypatch, sent
):
    original = trainer.Run.validate

    def validate(run):
        os.kill(os.getpid(), sent)
        return original(run)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Run, "validate", validate)
        patched.setattr(trainer.Run, "window", lambda run: pytest.fail("a window"))
        with pytest.raises(KeyboardInterrupt, match="continue with resume=True"):
            whole(out=tmp_path)
    assert (tmp_path / "run.safetensors").exists()
    assert whole(out=tmp_path, resume=True).fingerprint == whole().fingerprint


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_schedulers_signals_in_a_row_do_not_disturb_the_saving(tmp_path, monkeypatch, second):
    put = checkpoint.save_run
    sent = []

    def save_run(run, path):
        if run.progress.updates == 2 and not sent:
            sent.append(True)
            os.kill(os.getpid(), second)
        put(run, path)

    monkeypatch.setattr(checkpoint, "save_run", save_run)

    def stop(run, window) -> None:
        if run.progress.updates == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        whole(out=tmp_path, on_window=stop)
    assert sent
    assert store.read(tmp_path / "run.safetensors", "run")[1]["progress"]["updates"] == 2


def test_a_second_ctrl_c_acts_at_once(monkeypatch):
    windows = []
    original = trainer.Run.window

    def window(run):
        windows.append(True)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return original(run)

    monkeypatch.setattr(trainer.Run, "window", window)
    with pytest.raises(KeyboardInterrupt):
        whole()
    assert len(windows) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_hang_up_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        whole(on_window=lambda run, window: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruption_whose_checkpoint_failed_says_so(tmp_path, monkeypatch):
    refuse(monkeypatch, "run.safetensors")

    def stop(run, window) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="could not be saved"):
        whole(out=tmp_path, on_window=stop)


def test_a_signal_in_the_last_window_still_saves_the_rule(tmp_path):
    def stop(run, window) -> None:
        if run.spent >= 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        whole(out=tmp_path, on_window=stop)
    assert load(tmp_path / "rule.safetensors").fingerprint == whole().fingerprint


class Broken:
    """TensorBoard's writer on a disk that is full for a while."""

    fails, added, made = 0, 0, 0

    def __init__(self, folder: str):
        Broken.made += 1

    def add_scalar(self, name: str, value: float, at: int) -> None:
        if Broken.fails > 0:
            Broken.fails -= 1
            raise OSError(28, "No space left on device")
        Broken.added += 1

    def close(self) -> None:
        if Broken.fails > 0:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", [1, 10**6])
def test_events_that_cannot_be_written_are_said_and_tried_again(
    tmp_path, monkeypatch, caplog, fails
):
    pytest.importorskip("tensorboard")
    import torch.utils.tensorboard

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", Broken)
    monkeypatch.setattr(progress, "AGAIN", 0.0)
    Broken.fails, Broken.added, Broken.made = fails, 0, 0
    assert whole(out=tmp_path, tensorboard=True).fingerprint == whole().fingerprint
    said = [r.getMessage() for r in caplog.records if "TensorBoard" in r.getMessage()]
    assert sum("cannot be written" in line for line in said) == 1
    assert sum("can be written again" in line for line in said) == (fails == 1)
    assert Broken.made == (2 if fails == 1 else STEPS // 12)
    assert (Broken.added > 0) == (fails == 1)


@pytest.mark.parametrize("learn", [meta_train, train_curriculum])
def test_without_tensorboard_nothing_begins(tmp_path, monkeypatch, learn):
    imported = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return imported(name, *arguments, **options)

    for name in [name for name in sys.modules if "tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="TensorBoard is not installed"):
        learn(Quadratic(3), steps=20 * STEPS, out=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_a_bar_that_nobody_reads_ends_nothing(monkeypatch):
    class Gone:
        encoding, closed = "utf-8", False

        def write(self, text: str = "") -> int:
            raise BrokenPipeError(32, "Broken pipe")

        flush = write

        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            raise OSError("none")

    monkeypatch.setattr(sys, "stdout", Gone())
    got = whole(progress=True)
    monkeypatch.undo()
    assert torch.equal(*(next(iter(one.weights.values())) for one in (got, whole())))
