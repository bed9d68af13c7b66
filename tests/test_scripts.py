"""The three scripts end to end, as a person starts them, on small budgets; and what they answer to a person's mistakes."""

import contextlib
import csv
import ctypes
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import tyro
from filelock import FileLock
from torch.utils.tensorboard import SummaryWriter

import envs
import talas_asymmetric_sac as rl
import talas_phase1 as phase1

ROOT = Path(__file__).parents[1]
RL, PHASE1, PHASE2 = "talas_asymmetric_sac", "talas_phase1", "talas_phase2"
SETTINGS = ("train", "video_easy", "video_hard") if os.environ.get("TALAS_DISTRACTORS") else ("train", "procedural")
SMALL = ["--total-timesteps=40", "--hidden-dim=16", "--encoder=small", "--batch-size=4", "--overlay-images=20", "--eval-episodes=1"]
FAMILIES = {"cartpole_swingup": 50, "hammer": 20, "unitree_walk": 100}  # of each a task, with an action repeat that makes episodes short
LENGTHS = {"cartpole_swingup": 20, "hammer": 10, "unitree_walk": 10}  # agent steps per episode at that repeat


def start(script: str, *args: str, cwd: Path, **env: str | None) -> subprocess.Popen:
    # The scripts choose the GL backend. One thread each: several run side by side here, and threads that wait for one another would starve.
    variables = {key: value for key, value in (os.environ | {"MUJOCO_GL": None, "OMP_NUM_THREADS": "1"} | env).items() if value is not None}
    command = [sys.executable, str(ROOT / f"{script}.py"), *args]
    return subprocess.Popen(command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0, timeout: int = 240) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, f"{out}\n{err}"
    return out, err


def run(script: str, *args: str, cwd: Path) -> str:
    return finish(start(script, *args, cwd=cwd))[0]


def mistake(script: str, *args: str, cwd: Path, code: int = 1, **env: str | None) -> str:
    """Run what must fail; check that it fails in one line, and leaves nothing of a run behind; return the line."""
    _, err = finish(start(script, *args, cwd=cwd, **env), code, timeout=120)
    assert "Traceback" not in err
    if code == 1:
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert not list(cwd.glob("runs/*__*")), "a run folder of a run that never was"
    return err


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def metrics(folder: Path) -> dict[str, float]:
    figures = json.loads((folder / "metrics.json").read_text())
    assert all(math.isfinite(value) for value in figures.values())
    return figures


def returns(folder: Path) -> list[dict[str, str]]:
    with (folder / "returns.csv").open(newline="") as file:
        return list(csv.DictReader(file))


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
        task, short = f"--env={env_id}", ["--batch-size=4", "--overlay-images=20"]
        prompt = ["--prompt=the pole"] if env_id == "cartpole_swingup" else []
        run(PHASE1, task, *short, *prompt, "--frames=8", "--test-frames=4", "--steps=3", cwd=cwd)
        run(PHASE2, task, *short, "--steps=3", cwd=cwd)
        self.out = run(RL, task, *SMALL, f"--action-repeat={FAMILIES[env_id]}", cwd=cwd)
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


# ------------------------------------------------------------------------------------------------------------ end to end
@pytest.mark.parametrize("env_id", FAMILIES)
def test_three_scripts(trained, env_id):
    t = trained(env_id)
    shown = {"clean", "overlay", "procedural"} | set(SETTINGS) - {"train"}
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
    assert figures["train/steps"] == 40
    assert figures["train/updates"] == 40 - 32  # learning starts after four fifths
    for setting in SETTINGS:
        assert figures[f"eval/{setting}/episodes"] == 1
        assert figures[f"eval/{setting}/return_std"] == 0
        assert (f"eval/{setting}/success_rate" in figures) == (env_id == "hammer")
        assert (
            0 <= figures[f"iou/{'clean' if setting == 'train' else setting}"] <= figures[f"iou_1px/{'clean' if setting == 'train' else setting}"] <= 1
        )
        check_film(t.run / f"{setting}.mp4", length)
        assert f"\n{setting}" in t.out  # a row of the table
    rows = returns(t.run)
    assert [int(row["step"]) for row in rows] == list(range(length, 41, length))
    assert {int(row["length"]) for row in rows} == {length}
    assert all(math.isfinite(float(row["return"])) for row in rows)
    assert {row["success"] for row in rows} <= ({"True", "False"} if env_id == "hammer" else {""})
    assert json.loads((t.run / "args.json").read_text())["total_timesteps"] == 40
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


def test_one_seed_is_one_run(trained, tmp_path):
    """The same twice, at once, with every masker flag, whether or not it is evaluated on the way; with another seed, or masker, something else."""
    t = trained("cartpole_swingup")
    shutil.copytree(t.maskers, tmp_path / "maskers")
    args = [*SMALL, "--env=cartpole_swingup", "--action-repeat=50", "--masker-path=maskers", "--eval-settings", "train", "--augmentation=mix"]
    args += ["--clean-masker=teacher", "--actor-judge=own", "--updates-per-step=0.5"]
    processes = [start(RL, *args, f"--exp-name={name}", *often, cwd=tmp_path) for name, often in (("a", ["--eval-every=30"]), ("b", []))]
    assert "step 30: train" in finish(processes[0])[0] and "step 30: train" not in finish(processes[1])[0]
    processes = [start(RL, *args, f"--exp-name={name}", other, cwd=tmp_path) for name, other in (("c", "--seed=2"), ("d", "--clean-masker=student"))]
    for process in processes:
        finish(process)
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


def wait_for(process: subprocess.Popen, cwd: Path, pattern: str, timeout: float = 120) -> None:
    end = time.time() + timeout
    while not list(cwd.glob(pattern)) and time.time() < end and process.poll() is None:
        time.sleep(0.02)
    assert list(cwd.glob(pattern)) and process.poll() is None, process.communicate()


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_an_interrupted_run_ends_as_if_nothing_had_happened(trained, tmp_path):
    """Killed; told to stop; its worker killed; another one started meanwhile. In the end its files are those of the run that nobody touched."""
    shutil.copytree(trained("cartpole_swingup").maskers, tmp_path / "maskers")
    args = [*SMALL, "--env=cartpole_swingup", "--action-repeat=50", "--masker-path=maskers", "--eval-settings", "train", "--augmentation=mix"]
    args += ["--total-timesteps=140", "--learning-starts=30", "--checkpoint-every=20", "--eval-every=100", "--replay-size=100"]  # the ring goes round
    whole = start(RL, *args, "--exp-name=whole", cwd=tmp_path)
    again = [RL, *args, "--exp-name=pieces", "--resume=auto"]

    process = start(*again, cwd=tmp_path)
    wait_for(process, tmp_path, "runs/*__pieces__*/resume/0*20.state.pt")
    started = children(process.pid)
    process.kill()
    process.communicate()
    time.sleep(1)
    assert started and not [pid for pid in started if is_running(pid)]
    folder = only(tmp_path, "runs/*__pieces__*")
    (tmp_path / "maskers/student.pt").write_text("made anew meanwhile, for another prompt")  # the run has a copy

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
    assert "another process is at this run" in finish(start(*again, cwd=tmp_path), 1)[1]
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
    assert "came to its end before" in finish(start(*again, cwd=tmp_path))[0]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_ctrl_c_in_the_middle_of_the_loop(tmp_path):
    args = ["--masker=none", "--actor-views=clean", "--critic-views=clean", "--eval-settings", "train", "--checkpoint-every=20"]
    args += ["--total-timesteps=5000"]
    process = start(RL, *SMALL[1:], "--env=cartpole_swingup", "--action-repeat=50", *args, cwd=tmp_path)
    wait_for(process, tmp_path, "runs/*/resume/0*20.state.pt")
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = finish(process, 130, timeout=20)
    assert f"stopped; to go on: python {ROOT}/{RL}.py --resume runs/" in out and "Traceback" not in err
    time.sleep(1)
    assert workers and not [pid for pid in workers if is_running(pid)]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what ends a process")
def test_a_vector_environment_leaves_the_process_that_makes_it_as_it_was():
    """Gymnasium makes one environment there as well: a worker's one thread, deaf ear to Ctrl-C and end with its parent are not for it."""

    def state() -> tuple:
        signal_at_parents_end = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(signal_at_parents_end))  # PR_GET_PDEATHSIG
        return torch.get_num_threads(), signal.getsignal(signal.SIGINT), signal_at_parents_end.value

    threads, handler = torch.get_num_threads(), signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's ignores it
    torch.set_num_threads(2)
    before = state()
    gym.vector.AsyncVectorEnv([partial(envs.make_env_in_worker, "cartpole_swingup")], context="spawn").close()
    assert state() == before == (2, signal.default_int_handler, 0)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


def test_what_a_resumed_run_and_an_evaluated_agent_take_from_the_command_line(tmp_path, monkeypatch):
    """Their own arguments, but for a few that are typed, a default among them; any other is refused, not dropped."""
    monkeypatch.chdir(tmp_path)
    typed = ["--env=cup_catch", "--exp-name=a[1]*", "--total-timesteps=1000", "--checkpoint-every=100", "--eval-settings", "train", "procedural"]
    own = replace(rl.read_args(typed)[0], precision="bf16")  # as a run writes it, of auto
    folder = Path("runs") / f"ball_in_cup_catch__{own.exp_name}__1__20260101-000000-1"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(asdict(own)))

    resume = f"--resume={folder}"
    assert rl.read_args([resume]) == (replace(own, resume=str(folder)), folder)
    longer = rl.read_args([resume, "--total-timesteps=500000", "--checkpoint-every=2500", "--device=cpu", "--precision=fp32"])[0]
    assert (longer.total_timesteps, longer.checkpoint_every, longer.device, longer.precision) == (500_000, 2500, "cpu", "fp32")
    for flags, named in ((["--batch-size=7"], "--batch-size: "), (["--env=hammer"], "--env: "), (["--gamma=0.99", "--num-envs=3"], "--num-envs: ")):
        with pytest.raises(envs.UserError, match=named):
            rl.read_args([resume, *flags])

    auto = "--resume=auto"
    assert rl.read_args([*typed, auto]) == (replace(own, resume="auto"), folder)
    assert rl.read_args([*typed, auto, "--precision=bf16"])[1] == folder
    assert rl.read_args([*typed, auto, "--precision=fp32"])[1] is None
    assert rl.read_args([*typed, auto, "--seed=2"])[1] is None

    agent = str(next((ROOT / "results/agents").glob("*.pt")))
    args, nobody = rl.read_args(["--evaluate", agent, "--seed=7", "--eval-episodes=2"])
    assert nobody is None and (args.env, args.augmentation, args.seed, args.eval_episodes) == ("cartpole_swingup", "mix", 7, 2)
    with pytest.raises(envs.UserError, match=r"--masker: .* has its own, student"):
        rl.read_args(["--evaluate", agent, "--masker=none"])
    content = envs.load_tensors(Path(agent))
    envs.save_tensors(tmp_path / "elsewhere.pt", content | {"args": content["args"] | {"track": True, "device": "cuda", "cudagraphs": True}})
    elsewhere = rl.read_args(["--evaluate=elsewhere.pt"])[0]  # nothing of which an evaluation on this machine needs
    assert (elsewhere.track, elsewhere.device, elsewhere.cudagraphs) == (False, "cpu", False)
    (folder / "args.json").write_text(json.dumps(asdict(args)))
    with pytest.raises(envs.UserError, match="the folder of an evaluation"):
        rl.read_args([resume])


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A run of 60 steps in this process, which evaluates nothing: a function of other flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl, "evaluate", lambda *_: {})
    rl.saving.__wrapped__.__defaults__[0].clear()  # what was said before, by another run
    args = ["--masker=none", "--actor-views=clean", "--critic-views=clean", "--eval-settings=train", "--action-repeat=50", "--checkpoint-every=20"]
    args = ["--env=cartpole_swingup", *SMALL, *args, "--total-timesteps=60", "--learning-starts=42"]
    return lambda *other: rl.main(*rl.read_args([*args, *other]))


@pytest.mark.parametrize(("what", "holds"), [("a loss", "obs"), ("an action", "pixels"), ("a reward or an observation", "rewards")])
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, short, what, holds):
    act, step_wait, steps = rl.Agent.act, gym.vector.AsyncVectorEnv.step_wait, []

    def wait(self, timeout):
        obs, rewards, *rest = step_wait(self, timeout)
        steps.append(rewards)
        return obs, rewards * (np.nan if len(steps) == 45 else 1), *rest

    if what == "an action":
        monkeypatch.setattr(rl.Agent, "act", lambda self, *seen, mean: act(self, *seen, mean=mean) * np.nan)
    if "reward" in what:
        monkeypatch.setattr(gym.vector.AsyncVectorEnv, "step_wait", wait)
    with pytest.raises(envs.UserError, match=f"step 4[2-5]: {what} is infinite or not a number"):
        short(*(["--critic-lr=1e9"] if what == "a loss" else []))
    folder = only(tmp_path, "runs/*")
    assert holds in envs.load_tensors(folder / "not_finite.pt")
    state = envs.load_tensors(only(folder, "resume/0*40.state.pt"))
    assert all(weight.isfinite().all() for weight in state["agent"].values())


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process as Linux does")
def test_a_worker_that_hangs_twice_ends_the_run_and_it_goes_on_later(tmp_path, monkeypatch, capsys, short):
    """After five minutes each, or here two seconds. The first time once more, the second time the end; what it takes to go on is there."""
    add_step, calls = rl.Replay.add_step, []

    def stop(*args):
        add_step(*args)
        calls.append(args)
        if len(calls) in (45, 50):  # step 45, and from 40 on step 45 again
            monkeypatch.setattr(rl, "PATIENCE", 2)
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGSTOP)

    with monkeypatch.context() as patch:
        patch.setattr(rl.Replay, "add_step", stop)
        with pytest.raises(envs.UserError, match=r"^TimeoutError: .*; when that is mended, to go on: .* --resume runs/"):
            short()
    out, err = capsys.readouterr()
    assert "once more, from the last checkpoint" in out and out.count("going on from step 40") == 1 and err.count("Traceback") == 2
    for process in multiprocessing.active_children():
        process.join(10)  # killed, stopped or not
    assert not multiprocessing.active_children()
    folder = only(tmp_path, "runs/*")
    monkeypatch.setattr(rl, "PATIENCE", 60)
    with pytest.raises(envs.UserError, match=r"--total-timesteps 39: .* has made 40 steps already"):
        rl.main(*rl.read_args([f"--resume={folder}", "--total-timesteps=39"]))
    (folder / "returns.csv").write_text("")  # shorter than it was at the checkpoint
    rl.main(*rl.read_args([f"--resume={folder}"]))
    assert [row["step"] for row in returns(folder)] == ["60"] and metrics(folder)["train/updates"] == 18


def test_media_that_are_gone_cost_an_evaluation_and_not_the_run(tmp_path, monkeypatch, capsys, short):
    """But the one at its end, which can be made up for."""

    def gone(*_):
        raise envs.UserError("--distractors media: no such folder")

    monkeypatch.setattr(rl, "evaluate", gone)
    with pytest.raises(envs.UserError, match=r"--distractors media: no such folder; when that is mended, to go on: .* --resume runs/"):
        short("--eval-every=20")
    assert capsys.readouterr().err.count("warning: an evaluation cannot be written (--distractors media: no such folder); going on") == 1
    monkeypatch.setattr(rl, "evaluate", lambda *_: {"eval/train/return_mean": 1.0})
    folder = only(tmp_path, "runs/*")
    rl.main(*rl.read_args([f"--resume={folder}"]))
    assert metrics(folder)["eval/train/return_mean"] == 1.0 and len(returns(folder)) == 3


def test_a_full_disk_costs_what_cannot_be_written(tmp_path):
    """Files of at most 1 MB: tables fit, checkpoints do not. It is said once, nothing lies half written, and the error at the end is a line."""
    args = ["--masker=none", "--actor-views=clean", "--critic-views=clean", "--eval-settings", "train", "--total-timesteps=60"]
    args += ["--checkpoint-every=20", "--eval-every=20", "--hidden-dim=128"]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    command = [sys.executable, str(ROOT / f"{RL}.py"), *SMALL, "--env=cartpole_swingup", "--action-repeat=50", *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    for what in ("an evaluation", "a checkpoint to resume from"):
        assert done.stderr.count(f"warning: {what} cannot be written") == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "no checkpoint to go on from, start the same again" in done.stderr.splitlines()[-1]
    folder = only(tmp_path, "runs/*")
    assert [row["step"] for row in returns(folder)] == ["20", "40", "60"]
    assert not list(folder.rglob("*.state.pt")) and not list(folder.glob("*.pt")) and not list(folder.rglob(".*"))


def test_a_replay_that_cannot_be_had(tmp_path):
    """In an address space of 30 GB, which holds the scripts' libraries and not 28 TB of frames: a line, before any run folder."""
    args = ["--env=cartpole_swingup", "--masker=none", "--device=cpu", "--total-timesteps=1000000000", "--replay-size=1000000000"]
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (30 * 10**9, 30 * 10**9))
    command = [sys.executable, str(ROOT / f"{RL}.py"), *SMALL, *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False, preexec_fn=limit)
    assert done.returncode == 1 and "too much; give a smaller --replay-size" in done.stdout
    assert done.stderr == "error: --replay-size 1,000,000,000: 28268.0 GB cannot be had on cpu; give a smaller one\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends
def test_curves_that_cannot_be_written_cost_only_themselves(tmp_path, monkeypatch, capsys, short):
    """TensorBoard opens its file by name for every write; a folder of that name stands for a disk that does not take it."""

    def writer(folder: Path, **kwargs) -> SummaryWriter:
        made = SummaryWriter(folder, **kwargs)
        events = only(folder, "events*")
        events.unlink()
        events.mkdir()
        return made

    monkeypatch.setattr(rl, "SummaryWriter", writer)
    monkeypatch.setattr(rl, "evaluate", lambda *_: {"eval/train/return_mean": 1.0})
    short()
    assert capsys.readouterr().err.count("warning: TensorBoard's curves cannot be written") == 1
    folder = only(tmp_path, "runs/*")
    assert metrics(folder)["train/updates"] == 18 and "eval/train/return_mean" in (folder / "evaluations.csv").read_text()


def test_several_environments_in_the_textbooks_order(tmp_path, short):
    """Whole steps of all of them, an update per agent step, and every environment's episodes in the table."""
    short("--total-timesteps=41", "--num-envs=2", "--no-overlap")
    folder = only(tmp_path, "runs/*")
    figures, rows = metrics(folder), returns(folder)
    assert (figures["train/steps"], figures["train/updates"]) == (42, 42 - 33)
    assert [(row["step"], row["env"], row["length"]) for row in rows] == [("40", "0", "20"), ("40", "1", "20")]
    assert rows[0]["return"] != rows[1]["return"]


def test_without_masker(tmp_path):
    """SAC with random shift: no masker is made, nothing is masked."""
    args = ["--masker=none", "--actor-views=clean", "--critic-views=clean", "--eval-settings", "train", "procedural", "--precision=fp32"]
    run(RL, *SMALL, "--env=cartpole_swingup", "--action-repeat=50", *args, "--overlay=nowhere", cwd=tmp_path)  # clean views look at no photograph
    folder = only(tmp_path, "runs/*")
    assert folder.name.startswith("cartpole_swingup__talas__1__")
    figures = metrics(folder)
    assert figures["train/updates"] == 8
    assert {"eval/train/return_mean", "eval/procedural/return_mean"} <= figures.keys()
    assert not [key for key in figures if "video" in key or "iou" in key]
    film = np.stack([np.asarray(frame) for frame in imageio.get_reader(folder / "train.mp4")])
    assert film[:, :, 340:668].min() > 250  # the mask is white


def test_a_second_run_waits_for_the_first_ones_masker(trained, tmp_path):
    """Whoever holds the lock makes the masker; another run, started meanwhile, takes what it finds when the lock is free."""
    t = trained("cartpole_swingup")
    folder = tmp_path / "runs/maskers/cartpole_swingup"
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        process = start(RL, *SMALL, "--env=cartpole_swingup", "--action-repeat=50", "--eval-settings", "train", cwd=tmp_path)
        said = process.stdout.readline()
        time.sleep(2)
        waited = process.poll() is None and not list(tmp_path.glob("runs/*__talas__*"))
        for name in ("teacher.pt", "student.pt"):
            shutil.copy(t.maskers / name, folder / name)
    out, _ = finish(process)
    assert waited and "waiting for a run that does" in said and "$ python" not in out
    assert not list(tmp_path.glob("runs/*__phase*"))
    assert metrics(only(tmp_path, "runs/*__talas__*"))["train/updates"] == 8


def test_phase_two_alone_is_made_up_for(trained, tmp_path, monkeypatch):
    """A teacher without a student, made by hand for a prompt of one's own, is Phase II's, and not made again."""
    t, folder = trained("cartpole_swingup"), tmp_path / "runs/maskers/cartpole_swingup"
    folder.mkdir(parents=True)
    for name in ("teacher.pt", "frames.npz"):
        shutil.copy(t.maskers / name, folder / name)
    before = (folder / "teacher.pt").read_bytes()
    out, err = finish(start(RL, *SMALL, "--env=cartpole_swingup", "--overlay=nowhere", cwd=tmp_path), 1)
    assert "talas_phase1.py" not in out and "talas_phase2.py --env=cartpole_swingup --overlay=nowhere --overlay-images=20" in out
    assert "nowhere: no such folder" in err and "talas_phase2.py failed" in err and "Traceback" not in err
    assert (folder / "teacher.pt").read_bytes() == before
    (folder / "frames.npz").unlink()  # as when only the teacher was brought along
    monkeypatch.chdir(tmp_path)
    find, student = partial(rl.find_masker, rl.Args(env="cartpole_swingup"), device=torch.device("cpu")), folder / "student.pt"
    with pytest.raises(envs.UserError, match=r"teacher\.pt without frames\.npz"):
        find(which="student")
    assert (folder / "teacher.pt").read_bytes() == before
    (folder / "teacher.pt").rename(student)  # or only the student, whose teacher is asked for
    with pytest.raises(envs.UserError, match=r"student\.pt without the teacher\.pt"):
        find(which="teacher")
    assert student.read_bytes() == before


def test_without_any_masker_both_phases_are_run(tmp_path):
    """From the first, with the flags that concern them; if that fails, no second."""
    args = ["--env=cartpole_swingup", "--overlay=nowhere", "--distractors=.", "--eval-settings", "train"]
    out, err = finish(start(RL, *SMALL, *args, cwd=tmp_path), 1)
    assert "$ python talas_phase1.py --env=cartpole_swingup --overlay=nowhere --overlay-images=20 --device=auto --distractors=.\n" in out
    assert "nowhere: no such folder" in err and "talas_phase1.py failed" in err and "talas_phase2.py" not in out + err


def test_media_with_some_settings_only(tmp_path):
    """Phase I reports on the video settings that are there."""
    (tmp_path / "media").mkdir()
    args = ["--env=cartpole_swingup", "--frames=4", "--test-frames=4", "--steps=1", "--overlay-images=20", "--distractors=media"]
    run(PHASE1, *args, cwd=tmp_path)
    assert not [key for key in metrics(only(tmp_path, "runs/*__phase1__*")) if "video" in key]


def test_frames_do_not_depend_on_the_number_of_processes(monkeypatch):
    """Two processes collect what one does, clip by clip, and in the same order."""
    monkeypatch.setattr(phase1, "CLIP", 3)
    args, counts = phase1.Args(env="cartpole_swingup", seed=3), {"spread": 5, "random": 4}
    pools = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"), initializer=envs.start_worker)
    with pools(1) as one, pools(2) as two:
        a, b = (phase1.collect(args, "the cart and the pole", counts, ("procedural",), pool) for pool in (one, two))
    assert a.keys() == b.keys() == {"clean", "masks", "procedural"}
    assert a["clean"].shape == (9, 3, 84, 84) and a["masks"].shape == (9, 84, 84)
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert len({frame.tobytes() for frame in a["clean"]}) == 9
    assert (a["procedural"] != a["clean"]).any(1)[~a["masks"]].mean() > 0.5


@pytest.fixture
def one_thread():
    """As a worker has: two add up in another order, and over an episode the last bits grow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_evaluation_plays_every_episode_once(tmp_path, one_thread):
    """In processes, what a loop over the episodes comes to, with masks made a frame at a time; a success rate where there is one to tell."""
    args = rl.Args(env="hammer", action_repeat=20, hidden_dim=16, encoder="small", precision="fp32")
    torch.manual_seed(1)
    agent = rl.Agent(args, 9, 24, 26, rl.Masker(), None)
    rl.save_agent(tmp_path / "checkpoint.pt", agent, 0, "the hand")
    figures = rl.evaluate(tmp_path / "checkpoint.pt", args, ("train", "procedural"), 3, None)
    for setting in ("train", "procedural"):
        env, totals, ious = envs.make_env("hammer", setting, args.seed + 10_000, action_repeat=20), [], []
        for episode in range(3):
            (obs, _), done, step = env.reset(options={"episode": episode}), False, 0
            totals.append(0.0)
            while not done:
                pixels, proprio = torch.from_numpy(obs["pixels"])[None], torch.from_numpy(obs["proprio"])[None]
                with torch.no_grad():
                    mask = torch.cat([agent.masker(frame).sigmoid() for frame in pixels.float().split(3, 1)])[None]
                if step % 5 == 0:
                    ious.append(envs.mask_iou(mask[0, -1:].numpy() > 0.5, env.segment("the hand")[None])[0])
                obs, reward, _, done, _ = env.step(agent.act(pixels, (mask * 255).round().byte(), proprio, mean=True)[0])
                totals[-1] += reward
                step += 1
        env.close()
        assert figures[f"eval/{setting}/return_mean"] == pytest.approx(np.mean(totals), rel=1e-3)
        assert figures[f"eval/{setting}/return_std"] == pytest.approx(np.std(totals), rel=1e-2)
        assert figures[f"eval/{setting}/episodes"] == 3 and figures[f"eval/{setting}/success_rate"] == 0
        assert figures[f"iou/{'clean' if setting == 'train' else setting}"] == pytest.approx(np.mean(ious), abs=2e-3)


def test_success_is_an_episodes(tmp_path):
    """Of an agent that finds its nail in: more than 25 control steps make a success, 20 do not. The flags reach the environment."""
    args = rl.Args(env="hammer", reward="sparse", action_repeat=20, hidden_dim=16, encoder="small", precision="fp32", masker="none")
    rl.save_agent(tmp_path / "checkpoint.pt", rl.Agent(args, 9, 24, 26, None, None), 0, None)
    env = rl.make_env_once("hammer", "train", args.seed + 10_000, **rl.env_options(args))  # the one that it will play in
    env.task.env.init_qpos[-7] = 0.09
    for steps in (1, 2):
        env.episode_steps = steps
        total, success, *_ = rl.play(tmp_path / "checkpoint.pt", args, ("train", 0))
        assert total == pytest.approx(200 * steps) and success == (steps == 2)  # a sparse reward of 10 at each control step
    rl.make_env_once.cache_clear()
    env.close()


def test_train_all_runs_what_is_not_finished(tmp_path):
    """One table of all runs' figures; a second call runs nothing again; a run that fails is named."""
    flags = " ".join([*SMALL, "--action-repeat=50", "--eval-settings train"])
    args = ["--envs", "cartpole_swingup", "--variants", "sac", "--output=table.csv", f"--flags={flags}"]
    run("benchmarks/train_all", *args, cwd=tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = metrics(only(tmp_path, "runs/cartpole_swingup__sac__1__*"))
    assert {row["figure"]: float(row["value"]) for row in rows} == pytest.approx(expected, rel=1e-3)
    assert {(row["env"], row["variant"], row["seed"]) for row in rows} == {("cartpole_swingup", "sac", "1")}
    before = (tmp_path / "table.csv").read_text()
    out, err = finish(start("benchmarks/train_all", *args, "--seeds", "1", "-1", cwd=tmp_path), 1)
    assert "cartpole_swingup__sac__1: finished before" in out and "1 runs, 1 at a time\n" in out
    assert "1 of 2 runs failed: cartpole_swingup__sac__-1" in err and "Traceback" not in err
    only(tmp_path, "runs/cartpole_swingup__sac__1__*")
    _, err = finish(start("benchmarks/train_all", *args, "--name=other_", "--memory=0.1", cwd=tmp_path), 1)
    assert err.startswith("error: one run is expected to take ") and "of 0.1" in err
    _, err = finish(start("benchmarks/train_all", *args, "--name=other_", "--seeds", "-1", cwd=tmp_path), 1)  # another sweep leaves this one's rows
    assert "cartpole_swingup__other_sac__-1" in err and (tmp_path / "table.csv").read_text() == before


# ------------------------------------------------------------------------------------------------------------ mistakes
NO_MASKER = ["--env=walker_walk", "--masker=none"]
MISTAKES = [  # script, arguments, what the one line says
    (RL, ["--env=walker_wlak"], "did you mean walker_walk"),
    (PHASE1, ["--env=walker_wlak"], "did you mean walker_walk"),
    (PHASE2, ["--env=walker_wlak"], "did you mean walker_walk"),
    (RL, ["--env=walker_walk", "--masker-path=nowhere"], "no such masker"),
    (RL, [*NO_MASKER, "--augmentation=swap"], "swap or mix need a --masker"),
    (RL, [*NO_MASKER, "--clean-masker=teacher"], "--clean-masker"),
    (RL, [*NO_MASKER, "--overlay=nowhere"], "nowhere: no such folder"),
    (RL, [*NO_MASKER, "--distractors=.", "--eval-settings", "video_hard"], "video_hard/"),
    (RL, [*NO_MASKER, "--eval-settings", "video_hard"], "video_hard needs DMControl-GB's media: --distractors"),
    (RL, [*NO_MASKER, "--device=cuda:99"], "cuda:99"),
    (RL, [*NO_MASKER, "--cudagraphs", "--device=cpu"], "needs a CUDA GPU"),
    (RL, ["--evaluate=nowhere.pt"], "nowhere.pt: not a checkpoint of this script (FileNotFoundError"),
    (RL, ["--resume=nowhere"], "nowhere: not the folder of a run"),
    (PHASE1, ["--env=walker_walk", "--prompt=the walker and the dragon"], "'dragon' is not in walker_walk's vocabulary; it can name: feet"),
    (PHASE1, ["--env=walker_walk", "--distractors=nowhere"], "nowhere: no such folder"),
    (PHASE1, ["--env=walker_walk", "--seed=-1"], "seed -1: has to be a number from 0 to"),
    (PHASE1, ["--env=walker_walk", "--output=/dev/null/maskers"], "Not a directory: '/dev/null/maskers'"),
    (PHASE2, ["--env=walker_walk"], "talas_phase1.py --env walker_walk"),
    (PHASE2, ["--env=walker_walk", "--steps=0"], "steps 0: has to be a number from 1"),
    ("envs", ["--env=walker_walk", "--output=picture"], "picture: not the name of a picture"),
    ("envs", ["--env=lqr_lqr_2_1"], "unknown --env 'lqr_lqr_2_1'"),
]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(script, *args): what it raises, in this process: one line, which its end prints (below). Nothing is left of a run that never was."""
    monkeypatch.chdir(tmp_path)
    for name in ("TALAS_DISTRACTORS", "TALAS_OVERLAY"):
        monkeypatch.delenv(name, raising=False)

    def call(script: str, *args: str) -> str:
        module = importlib.import_module(script)
        with pytest.raises((envs.UserError, OSError)) as error:
            module.main(*rl.read_args([*args, *SMALL])) if script == RL else module.main(tyro.cli(module.Args, args=args))
        assert "\n" not in str(error.value) and not list(tmp_path.glob("runs/*__*"))
        return str(error.value)

    return call


@pytest.mark.parametrize(("script", "args", "said"), MISTAKES, ids=[" ".join([script, *args]) for script, args, _ in MISTAKES])
def test_mistakes(refused, script, args, said):
    assert said in refused(script, *args)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the scripts, started as a person does, answer to a mistake of each kind; two at a time, because each takes seconds to start."""
    first = {script: (script, args, said, 1) for script, args, said in MISTAKES[::-1]}
    first |= {flag: (script, [f"{flag}={value}"], flag, 2) for script, flag, value in TYRO}
    with ThreadPoolExecutor(2) as pool:
        asked = {key: pool.submit(mistake, s, *args, cwd=tmp_path_factory.mktemp("mistake"), code=code) for key, (s, args, _, code) in first.items()}
        yield {key: (first[key][2], answer) for key, answer in asked.items()}


TYRO = [(RL, "--no-such-flag", "1"), (PHASE1, "--frames", "many"), (PHASE2, "--augmentation", "blur")]  # it answers these itself, in a box


@pytest.mark.parametrize("key", [RL, PHASE1, PHASE2, "envs", *(flag for _, flag, _ in TYRO)])
def test_a_mistake_ends_a_script_in_one_line(answers, key):
    said, answer = answers[key]
    assert said in answer.result()


@pytest.mark.parametrize("script", [RL, PHASE1, PHASE2])
def test_a_folder_that_cannot_be_written(trained, tmp_path, script):
    """For root, as which CI may run, a file in its place stands for a folder without permission."""
    (tmp_path / "runs").touch()
    args = {RL: ["--masker=none", *SMALL], PHASE1: ["--output=maskers"], PHASE2: [f"--maskers={trained('cartpole_swingup').maskers}"]}[script]
    assert "runs" in (line := mistake(script, "--env=cartpole_swingup", *args, cwd=tmp_path)) and ("written" in line or "directory" in line)


NUMBERS = [
    (script, field.name)
    for script in (RL, PHASE1, PHASE2)
    for field in fields(importlib.import_module(script).Args)
    if re.search("int|float", str(field.type))
]


@pytest.mark.parametrize(("script", "name"), NUMBERS)
def test_numbers_that_make_no_sense(script, name):
    """Of each numeric flag: less than nothing, endless, not a number, beyond what anything could hold. One line that names the flag, at once."""
    module, flag = importlib.import_module(script), f"--{name.replace('_', '-')}"
    for value in ("-1", "-1e-9", "nan", "inf", "1e30", "10000000000000000000000", "1,5", "½", ""):
        try:
            args = tyro.cli(module.Args, args=["--env=walker_walk", f"{flag}={value}"], console_outputs=False)
        except SystemExit as parsed:
            assert parsed.code == 2, "tyro's own answer"
            continue
        with pytest.raises(envs.UserError) as error:
            module.main(args)
        assert str(error.value).startswith(f"{flag} ")
        assert "\n" not in str(error.value)


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


# ------------------------------------------------------------------------------------------------------------ --help
@pytest.mark.parametrize("script", [RL, PHASE1, PHASE2])
def test_help_explains_every_flag(script, tmp_path):
    out = run(script, "--help", cwd=tmp_path)
    source = (ROOT / f"{script}.py").read_text()
    for field in fields(importlib.import_module(script).Args):
        assert f"--{field.name.replace('_', '-')}" in out, field.name
        line, below = re.search(rf"\n    ({field.name}: .*)\n(.*)", source).groups()  # documented beside the field, or in a string below it
        said = line.split("  # ")[1] if "  # " in line else re.match(r' {4}"""(.+)"""', below)[1]
        assert " ".join(said.split()[:3]).lower() in " ".join(out.replace("│", " ").split()).lower(), f"{field.name} is not documented"
