"""The three scripts end to end, as a person starts them, one after the other, on small budgets; and what they make of one another's files."""

import contextlib
import csv
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from commands import (
    FAMILIES,
    LENGTHS,
    PHASE1,
    PHASE2,
    RL,
    SETTINGS,
    SMALL,
    children,
    finish,
    is_running,
    metrics,
    only,
    returns,
    run,
    start,
    wait_for,
)
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import talas_asymmetric_sac as rl


def check_film(path: Path, frames: int) -> None:
    """Camera, mask and what the agent sees, side by side: the third panel is the product of the others."""
    film = np.stack([np.asarray(frame) for frame in imageio.get_reader(path)]).astype(float)
    assert film.shape == (frames, 336, 1008, 3)
    camera, mask, seen = np.split(film, 3, axis=2)
    assert np.abs(camera * mask / 255 - seen).mean() < 4  # H.264 is lossy
    assert camera.std() > 5
    assert np.abs(mask - mask.mean(3, keepdims=True)).mean() < 2  # grey


class Trained:
    """A folder in which the three scripts have been run, one after the other, on one task."""

    def __init__(self, env_id: str, cwd: Path):
        self.env_id, self.cwd, self.maskers = env_id, cwd, cwd / f"runs/maskers/{env_id}"
        media = {"TALAS_DISTRACTORS": None} if env_id == "unitree_walk" else {}  # once without
        self.settings, self.steps = ("train", "procedural") if media else SETTINGS, 40 if env_id == "cartpole_swingup" else 20

        def begin(script: str, *args: str) -> str:
            return finish(start(script, f"--env={env_id}", *args, cwd=cwd, **media))[0]

        short, prompt = ["--batch-size=4", "--overlay-images=20"], ["--prompt=the pole"] if env_id == "cartpole_swingup" else []
        begin(PHASE1, *short, *prompt, "--frames=8", "--test-frames=4", "--steps=3")
        begin(PHASE2, *short, "--steps=3")
        self.out = begin(RL, *SMALL, f"--action-repeat={FAMILIES[env_id]}", f"--total-timesteps={self.steps}")
        self.run = only(cwd, "runs/*__talas__1__*")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(env_id): made when first asked for."""
    made: dict[str, Trained] = {}

    def get(env_id: str) -> Trained:
        if env_id.startswith("unitree") and not os.environ.get("MENAGERIE_ROOT"):
            pytest.skip("set MENAGERIE_ROOT to a folder that holds MuJoCo Menagerie's unitree_a1/")
        if env_id not in made:
            made[env_id] = Trained(env_id, tmp_path_factory.mktemp(env_id))
        return made[env_id]

    return get


@pytest.mark.parametrize("env_id", FAMILIES)
def test_three_scripts(trained, env_id):
    t = trained(env_id)
    shown = {"clean", "overlay", "procedural"} | set(t.settings) - {"train"}
    for phase in ("phase1", "phase2"):
        folder = only(t.cwd, f"runs/{env_id}__{phase}__1__*")
        figures = metrics(folder)
        assert {f"{iou}/{key}" for iou in ("iou", "iou_1px") for key in shown} <= figures.keys()
        assert figures["train/updates"] == 3
        assert json.loads((folder / "args.json").read_text())["env"] == env_id
        assert imageio.imread(folder / "masks.png").shape[2] == 3
        assert list(folder.glob("events.out.tfevents.*"))
    with np.load(t.maskers / "frames.npz") as frames:
        assert frames["train_frames"].shape == (8, 3, 84, 84)
        assert frames["test_clean"].shape == (4, 3, 84, 84)
        assert frames["train_frames"].dtype == np.uint8

    prompt = {"cartpole_swingup": "the pole", "hammer": "the hand, the hammer and the nail", "unitree_walk": "the robot"}[env_id]
    for kind in ("teacher", "student"):
        checkpoint = torch.load(t.maskers / f"{kind}.pt", weights_only=True)
        expected = {"kind": kind, "env_id": env_id, "image_size": 84, "prompt": prompt}
        assert {key: checkpoint[key] for key in expected} == expected

    figures, length = metrics(t.run), LENGTHS[env_id]
    assert figures["train/steps"] == t.steps
    assert figures["train/updates"] == t.steps // 5  # learning starts after four fifths
    for setting in t.settings:
        assert figures[f"eval/{setting}/episodes"] == 1
        assert figures[f"eval/{setting}/return_std"] == 0
        assert (f"eval/{setting}/success_rate" in figures) == (env_id == "hammer")
        assert (
            0 <= figures[f"iou/{'clean' if setting == 'train' else setting}"] <= figures[f"iou_1px/{'clean' if setting == 'train' else setting}"] <= 1
        )
        check_film(t.run / f"{setting}.mp4", length)
        assert f"\n{setting}" in t.out  # a row of the table
    rows = returns(t.run)
    assert [int(row["step"]) for row in rows] == list(range(length, t.steps + 1, length))
    assert {int(row["length"]) for row in rows} == {length}
    assert all(math.isfinite(float(row["return"])) for row in rows)
    assert {row["success"] for row in rows} <= ({"True", "False"} if env_id == "hammer" else {""})
    assert json.loads((t.run / "args.json").read_text())["total_timesteps"] == t.steps
    assert "photographs: 20 " in t.out
    tags = EventAccumulator(str(t.run)).Reload().Tags()
    assert {"charts/episodic_return", "charts/SPS", "losses/qf_loss", "losses/actor_loss", "eval/train/return_mean"} <= {*tags["scalars"]}
    assert "views/clean_and_augmented" in tags["images"]
    assert not [path for path in t.cwd.rglob("*") if path.suffix == ".tmp" or path.name.startswith(".")]


def test_evaluate_a_checkpoint(trained, tmp_path):
    """It carries its masker, and comes to the figures that ended its training."""
    t = trained("cartpole_swingup")
    shutil.copy(t.run / "checkpoint.pt", tmp_path / "agent.pt")
    run(RL, "--evaluate=agent.pt", "--eval-episodes=1", cwd=tmp_path)
    folder = only(tmp_path, "runs/cartpole_swingup__*")
    before, after = metrics(t.run), metrics(folder)
    assert {key: before[key] for key in after} == pytest.approx(after)
    assert {f"eval/{setting}/return_mean" for setting in SETTINGS} <= after.keys()
    check_film(folder / "train.mp4", LENGTHS["cartpole_swingup"])


def test_a_broken_ffmpeg_costs_the_films_only(trained, tmp_path):
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text("#!/bin/sh\n")  # an encoder that knows none: imageio raises an IndexError
    ffmpeg.chmod(0o755)
    flags = (f"--evaluate={trained('cartpole_swingup').run}/checkpoint.pt", "--eval-episodes=1", "--eval-settings", "train", "procedural")
    _, err = finish(start(RL, *flags, cwd=tmp_path, IMAGEIO_FFMPEG_EXE=str(ffmpeg)))
    assert err.count("a film cannot be written (by ffmpeg, IndexError") == 1 and "Traceback" not in err
    assert {"eval/train/return_mean", "eval/procedural/return_mean"} <= metrics(folder := only(tmp_path, "runs/*")).keys()
    assert not list(folder.rglob("*.mp4"))


def test_one_seed_is_one_run(trained, tmp_path, monkeypatch, one_thread):
    """The same twice, at once, with every masker flag, whether or not it is evaluated on the way; with another seed, or masker, something else."""
    t = trained("cartpole_swingup")
    shutil.copytree(t.maskers, tmp_path / "maskers")
    args = [*SMALL, "--env=cartpole_swingup", "--action-repeat=50", "--masker-path=maskers", "--eval-settings", "train", "--augmentation=mix"]
    args += ["--clean-masker=teacher", "--actor-judge=own", "--updates-per-step=0.5"]
    processes = [start(RL, *args, f"--exp-name={name}", *often, cwd=tmp_path) for name, often in (("a", ["--eval-every=30"]), ("b", []))]
    assert "step 30: train" in finish(processes[0])[0] and "step 30: train" not in finish(processes[1])[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl, "evaluate", lambda *_: {"eval/train/return_mean": 0.0})  # of the other two only what they learned counts
    for name, other in (("c", "--seed=2"), ("d", "--clean-masker=student")):
        rl.main(*rl.read_args([*args, f"--exp-name={name}", other]))
    rows = {}
    for name in "abcd":
        folder = only(tmp_path, f"runs/*__{name}__*")
        assert metrics(folder)["train/updates"] == 4
        with (folder / "evaluations.csv").open(newline="") as file:
            evaluated = [row["step"] for row in csv.DictReader(file) if row["figure"] == "eval/train/return_mean"]
        assert evaluated == (["30", "40"] if name == "a" else ["40"])
        figures = {key: value for key, value in metrics(folder).items() if key != "train/seconds"}
        rows[name] = [row["return"] for row in returns(folder)], figures, torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]
    assert rows["a"][:2] == rows["b"][:2]
    assert all(torch.equal(value, rows["b"][2][key]) for key, value in rows["a"][2].items())
    assert rows["a"][0] != rows["c"][0]
    assert rows["a"][0][0] == rows["d"][0][0]  # of random actions; but what was learned from them is not the same:
    assert any(not torch.equal(value, rows["d"][2][key]) for key, value in rows["a"][2].items() if key.startswith("encoder."))
    assert not (tmp_path / "runs/maskers").exists()  # --masker-path was given


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_an_interrupted_run_ends_as_if_nothing_had_happened(trained, tmp_path, monkeypatch, capsys):
    """Killed; told to stop; its worker killed; another one started meanwhile. In the end its files are those of the run that nobody touched."""
    shutil.copytree(trained("cartpole_swingup").maskers, tmp_path / "maskers")
    args = [*SMALL, "--env=cartpole_swingup", "--action-repeat=50", "--masker-path=maskers", "--eval-settings", "train", "--augmentation=mix"]
    args += ["--total-timesteps=140", "--learning-starts=30", "--checkpoint-every=20", "--eval-every=100", "--replay-size=100"]  # the ring goes round
    args += ["--clean-masker=teacher"]
    whole = start(RL, *args, "--exp-name=whole", cwd=tmp_path)
    again = [RL, *args, "--exp-name=pieces", "--resume=auto"]

    process = start(*again, cwd=tmp_path)
    wait_for(process, tmp_path, "runs/*__pieces__*/resume/0*20.state.pt")
    started = children(process.pid)
    process.kill()
    process.communicate(timeout=60)  # the pipes' other ends are closed: nobody outlives it
    time.sleep(1)
    assert started and not [pid for pid in started if is_running(pid)]
    folder = only(tmp_path, "runs/*__pieces__*")
    for name in ("student", "teacher"):
        (tmp_path / f"maskers/{name}.pt").write_text("made anew meanwhile, for another prompt")  # the run has its own

    process = start(*again, cwd=tmp_path)
    wait_for(process, tmp_path, "runs/*__pieces__*/resume/0*60.state.pt")
    process.terminate()
    begun = time.time()
    out, _ = finish(process, 143)
    assert time.time() - begun < 20 and "going on from step" in out
    command = out.split("to go on: python ")[1].split()
    assert command[1:] == ["--resume", str(folder.relative_to(tmp_path))]

    process = start(RL, *command[1:], cwd=tmp_path)
    wait_for(process, tmp_path, "runs/*__pieces__*/resume/0*80.state.pt")
    process.send_signal(signal.SIGSTOP)  # or it might end while the other one starts
    monkeypatch.chdir(tmp_path)
    with pytest.raises(envs.UserError, match="another process is at this run"):
        rl.main(*rl.read_args(again[1:]))
    process.send_signal(signal.SIGCONT)
    for pid in children(process.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone by itself meanwhile
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
    out, err = finish(process)
    assert "once more, from the last checkpoint" in out and out.count("going on from step") == 2
    assert "Traceback" in err  # of an environment, or of an evaluation, as the moment will have it

    finish(whole)
    expected = only(tmp_path, "runs/*__whole__*")
    weights, wanted = (torch.load(path / "checkpoint.pt", weights_only=True)["weights"] for path in (folder, expected))
    assert all(torch.equal(value, wanted[key]) for key, value in weights.items())
    rows, figures = ([{k: v for k, v in row.items() if k != "seconds"} for row in returns(path)] for path in (folder, expected)), []
    assert next(rows) == next(rows)
    for path in (folder, expected):
        figures.append({key: value for key, value in metrics(path).items() if key != "train/seconds"})
    assert figures[0] == figures[1]
    assert (folder / "evaluations.csv").read_text() == (expected / "evaluations.csv").read_text()
    assert not (folder / "resume").exists()
    rl.main(*rl.read_args(again[1:]))
    assert "came to its end before" in capsys.readouterr().out


def test_a_second_run_waits_for_the_first_ones_masker(trained, tmp_path, monkeypatch, capsys):
    """Whoever holds the lock makes the masker; another run, started meanwhile, takes what it finds when the lock is free."""
    t, folder = trained("cartpole_swingup"), tmp_path / "runs/maskers/cartpole_swingup"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl.subprocess, "run", None)  # nothing is made twice
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / "lock"):
            found = pool.submit(rl.find_masker, rl.Args(env="cartpole_swingup"), "student")
            time.sleep(1)
            assert not found.done()
            for name in ("teacher.pt", "student.pt"):
                shutil.copy(t.maskers / name, folder / name)
        masker, about = found.result(timeout=60)
    assert "waiting for a run that does" in capsys.readouterr().out and about == {"prompt": "the pole", "segmenter": "sim"}
    assert torch.equal(masker.stem.weight, envs.load_tensors(t.maskers / "student.pt")["state_dict"]["stem.weight"])


def test_a_phase_that_is_started_ends_with_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(rl.subprocess, "run", lambda command, **how: (asked.append(how), SimpleNamespace(returncode=1))[1])
    with pytest.raises(envs.UserError, match=r"talas_phase1\.py failed"):
        rl.find_masker(rl.Args(env="hammer"), "student")
    assert asked == [{"preexec_fn": envs.end_with_parent}]


def test_without_any_masker_both_phases_are_run(tmp_path, monkeypatch, capfd):
    """From the first, with the flags that concern them; if that fails, no second."""
    monkeypatch.chdir(tmp_path)
    args = rl.Args(env="cartpole_swingup", overlay="nowhere", overlay_images=20, distractors=".")
    with pytest.raises(envs.UserError, match=r"talas_phase1\.py failed"):
        rl.find_masker(args, "student")
    out, err = capfd.readouterr()
    assert "$ python talas_phase1.py --env=cartpole_swingup --overlay=nowhere --overlay-images=20 --device=auto --distractors=.\n" in out
    assert "nowhere: no such folder" in err and "talas_phase2.py" not in out + err


def test_phase_two_alone_is_made_up_for(trained, tmp_path, monkeypatch, capfd):
    """A teacher without a student, made by hand for a prompt of one's own, is Phase II's, and not made again: here without the frames."""
    t, folder = trained("cartpole_swingup"), tmp_path / "runs/maskers/cartpole_swingup"
    folder.mkdir(parents=True)
    shutil.copy(t.maskers / "teacher.pt", folder / "teacher.pt")
    before, student = (folder / "teacher.pt").read_bytes(), folder / "student.pt"
    monkeypatch.chdir(tmp_path)
    find = partial(rl.find_masker, rl.Args(env="cartpole_swingup", overlay="nowhere", overlay_images=20, distractors="."))  # the last is Phase I's
    with pytest.raises(envs.UserError, match=r"talas_phase2\.py failed"):
        find(which="student")
    out, err = capfd.readouterr()
    assert "talas_phase1.py" not in out and "talas_phase2.py --env=cartpole_swingup --overlay=nowhere --overlay-images=20 --device=auto\n" in out
    assert "frames.npz: cannot be read" in err and "Traceback" not in err
    assert (folder / "teacher.pt").read_bytes() == before
    (folder / "teacher.pt").rename(student)  # or only the student, whose teacher is asked for
    with pytest.raises(envs.UserError, match=r"student\.pt without the teacher\.pt"):
        find(which="teacher")
    assert student.read_bytes() == before


@pytest.mark.parametrize(("which", "scripts"), [("teacher", ["talas_phase1.py"]), ("student", ["talas_phase1.py", "talas_phase2.py"])])
def test_the_phases_that_are_needed_are_run_in_turn(trained, tmp_path, monkeypatch, which, scripts):
    t, folder, started = trained("cartpole_swingup"), tmp_path / "runs/maskers/cartpole_swingup", []
    monkeypatch.chdir(tmp_path)

    def phase(command: list[str], **_: object) -> SimpleNamespace:
        started.append(Path(command[1]).name)
        shutil.copy(t.maskers / ("teacher.pt" if len(started) == 1 else "student.pt"), folder)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(rl.subprocess, "run", phase)
    rl.find_masker(rl.Args(env="cartpole_swingup"), which)
    assert started == scripts


@pytest.mark.parametrize("script", [RL, PHASE1, PHASE2])
def test_a_folder_that_cannot_be_written(trained, tmp_path, refused, script):
    """For root, as which CI may run, a file in its place stands for a folder without permission."""
    (tmp_path / "runs").touch()
    args = {RL: ["--masker=none"], PHASE1: ["--output=maskers"], PHASE2: [f"--maskers={trained('cartpole_swingup').maskers}"]}[script]
    assert "Not a directory: 'runs/" in refused(script, "--env=cartpole_swingup", *args)


@pytest.mark.parametrize(("script", "flag", "which"), [(RL, "masker-path", "student"), (PHASE2, "maskers", "teacher")])
def test_a_masker_that_does_not_fit(trained, tmp_path, refused, script, flag, which):
    """One made for another task; one whose file is damaged, or no masker at all."""
    folder = tmp_path / "maskers"
    folder.mkdir()
    shutil.copy(trained("cartpole_swingup").maskers / f"{which}.pt", folder / f"{which}.pt")
    assert "made for cartpole_swingup" in refused(script, "--env=walker_walk", f"--{flag}=maskers")
    data = bytearray((folder / f"{which}.pt").read_bytes())
    (folder / f"{which}.pt").write_bytes(data[: len(data) // 2])
    assert "not a masker" in refused(script, "--env=cartpole_swingup", f"--{flag}=maskers")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 half an archive", "no masks"])
def test_frames_that_cannot_be_read(trained, tmp_path, refused, content):
    shutil.copy(trained("cartpole_swingup").maskers / "teacher.pt", tmp_path / "teacher.pt")
    if content == "no masks":
        np.savez(tmp_path / "frames.npz", train_frames=np.zeros((4, 3, 84, 84), np.uint8), test_clean=np.zeros((4, 3, 84, 84), np.uint8))
    elif content is not None:
        (tmp_path / "frames.npz").write_bytes(content)
    message = refused(PHASE2, "--env=cartpole_swingup", "--maskers=.")
    assert "frames.npz: cannot be read" in message
    assert "run Phase I again" in message


def test_a_file_that_is_no_checkpoint(trained, tmp_path, refused):
    t = trained("cartpole_swingup")
    (tmp_path / "half.pt").write_bytes((t.run / "checkpoint.pt").read_bytes()[:5000])
    for path in (tmp_path / "half.pt", t.maskers / "student.pt"):
        assert "not a checkpoint" in refused(RL, f"--evaluate={path}")


class Bait:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_hostile_files_are_not_executed(trained, tmp_path, refused):
    """A masker, a teacher or a checkpoint from elsewhere is data, never code."""
    t, hit = trained("cartpole_swingup"), tmp_path / "hit"
    hostile = torch.load(t.maskers / "student.pt", weights_only=True) | {"prompt": Bait(hit)}
    for name in ("student.pt", "teacher.pt"):
        torch.save(hostile, tmp_path / name)
    torch.save(torch.load(t.run / "checkpoint.pt", weights_only=True) | {"prompt": Bait(hit)}, tmp_path / "checkpoint.pt")
    torch.load(tmp_path / "student.pt", weights_only=False)
    assert hit.exists()  # the bait works
    hit.unlink()
    assert "not a masker" in refused(RL, "--env=cartpole_swingup", "--masker-path=.")
    assert "not a masker" in refused(PHASE2, "--env=cartpole_swingup", "--maskers=.")
    assert "not a checkpoint" in refused(RL, "--evaluate=checkpoint.pt")
    assert not hit.exists()
