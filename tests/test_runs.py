"""Runs of the agent: what ends them, what they survive, how they are evaluated, and many at once."""

import csv
import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import tyro
from commands import PHASE1, RL, ROOT, SMALL, children, finish, is_running, metrics, only, returns, start, wait_for
from torch.utils.tensorboard import SummaryWriter

import envs
import talas_asymmetric_sac as rl
import talas_phase1 as phase1
from benchmarks import train_all


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_ctrl_c_in_the_middle_of_the_loop(tmp_path):
    args = ["--masker=none", "--actor-views=clean", "--critic-views=clean", "--eval-settings", "train", "--checkpoint-every=20"]
    args += ["--total-timesteps=5000"]
    process = start(RL, *SMALL[1:], "--env=cartpole_swingup", "--action-repeat=50", *args, cwd=tmp_path)
    wait_for(process, tmp_path, "runs/*/resume/0*20.state.pt")
    workers = children(process.pid)
    for pid in workers:  # a terminal tells them as well
        os.kill(pid, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, err = finish(process, 130, timeout=20)
    assert f"stopped; to go on: python {ROOT}/{RL}.py --resume runs/" in out and "Traceback" not in err
    time.sleep(1)
    assert workers and not [pid for pid in workers if is_running(pid)]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what ends a process")
def test_a_vector_environment_leaves_the_process_that_makes_it_as_it_was():
    """Gymnasium makes one environment there as well: a worker's one thread, deaf ear to Ctrl-C and end with its parent are not for it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's ignores it
    try:
        torch.set_num_threads(2)
        before = worker_state()
        gym.vector.AsyncVectorEnv([partial(envs.make_env_in_worker, "cartpole_swingup")], context="spawn").close()
        assert worker_state() == before == (2, signal.default_int_handler, 0)
    finally:
        signal.signal(signal.SIGINT, handler)


def worker_state() -> tuple:
    signal_at_parents_end = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(signal_at_parents_end))  # PR_GET_PDEATHSIG
    return torch.get_num_threads(), signal.getsignal(signal.SIGINT), signal_at_parents_end.value


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what ends a process")
def test_a_worker_has_one_thread_hears_no_ctrl_c_and_ends_with_its_parent(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), envs.start_worker) as pool:
        assert pool.submit(worker_state).result(timeout=120) == (1, signal.SIG_IGN, signal.SIGKILL)


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A run of 60 steps in this process, which evaluates nothing: a function of other flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl, "evaluate", lambda *_: {})
    rl.saving.__wrapped__.__defaults__[0].clear()  # what was said before, by another run
    args = ["--masker=none", "--actor-views=clean", "--critic-views=clean", "--eval-settings=train", "--action-repeat=50", "--checkpoint-every=20"]
    args = ["--env=cartpole_swingup", *SMALL, *args, "--total-timesteps=60", "--learning-starts=42"]
    return lambda *other: rl.main(*rl.read_args([*args, *other]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_until_all_processes_are_started(number):
    """Within stop_later nothing is interrupted; after it the signal arrives, once, where it would have, and both are heard as before."""
    heard, started = [], []
    before = {n: signal.signal(n, lambda number, _: heard.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with envs.stop_later():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            time.sleep(0.1)
            started.append(list(heard))
        assert started == [[]] and heard == [number]
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert heard == [number] * 2
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def first_workers(process: subprocess.Popen) -> list[int]:
    while not (workers := [pid for pid in children(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]):
        time.sleep(0.05)
        assert process.poll() is None
    return workers


def press_ctrl_c(process: subprocess.Popen, workers: list[int]) -> None:
    """As at a terminal, where all processes are told: here first the workers, in the middle of their imports."""
    time.sleep(0.5)
    for pid in workers:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)


EVALUATION = [f"--evaluate={next((ROOT / 'results' / 'agents').glob('cartpole*.pt'))}", "--eval-episodes=50"]
TRAINING = ["--env=cartpole_swingup", *SMALL, "--masker=none", "--actor-views=clean", "--critic-views=clean"]
TRAINING += ["--num-envs=2", "--total-timesteps=5000"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("flags", "patience"), [(EVALUATION, 20), (TRAINING, 60)], ids=["evaluation", "training"])
def test_a_run_is_told_to_stop_while_its_workers_start(tmp_path, flags, patience, number):
    process = start(RL, *flags, "--eval-settings", "train", cwd=tmp_path)
    workers = first_workers(process)
    if number == signal.SIGINT:
        press_ctrl_c(process, workers)
    else:
        process.terminate()
    out, err = finish(process, 128 + number, timeout=patience)
    assert "stopped; no checkpoint to go on from, start the same again" in out and "Traceback" not in err
    assert not [pid for pid in workers if is_running(pid)] and not list(tmp_path.glob("runs/*/metrics.json"))


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("to_all", [False, True], ids=["by kill", "by a terminal"])
def test_ctrl_c_while_frames_are_collected(tmp_path, to_all):
    """While the workers start; by kill in the moment in which the first one is there, and others may be half started."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's ignores it, and so would its children
    process = start(PHASE1, "--env=cartpole_swingup", "--overlay-images=10", cwd=tmp_path)
    signal.signal(signal.SIGINT, handler)
    wait_for(process, tmp_path, "runs/*/args.json")
    workers = first_workers(process)
    if to_all:
        press_ctrl_c(process, workers)
    else:
        process.send_signal(signal.SIGINT)
    _, err = finish(process, 130, timeout=60)
    assert "Traceback" not in err and not [pid for pid in workers if is_running(pid)]


def test_a_checkpoint_comes_after_what_it_counts_on(monkeypatch, short):
    """A run that goes on from it writes neither the curves nor the table's lines up to there again."""
    done, save, flush = [], rl.save_state, SummaryWriter.flush

    def look(folder, progress, *rest):
        done.append((progress.step, (folder.parent / "returns.csv").read_text().splitlines()[-1].split(",")[0]))
        return save(folder, progress, *rest)

    monkeypatch.setattr(rl, "save_state", look)
    monkeypatch.setattr(SummaryWriter, "flush", lambda self: (done.append("flushed"), flush(self))[1])
    short()
    assert [done[: i + 1][-2:] for i, each in enumerate(done) if each != "flushed"] == [["flushed", (step, str(step))] for step in (20, 40, 60)]


NOT_FINITE = [
    ("a loss", "obs", "4[3-5]"),
    ("an action", "pixels", 42),
    ("a reward or an observation", "rewards", 45),
    ("a weight", "encoder.0.weight", 60),
]


@pytest.mark.parametrize(("what", "holds", "step"), NOT_FINITE)
def test_what_is_not_finite_stops_the_run(tmp_path, monkeypatch, short, what, holds, step):
    policy, update, step_wait, steps = rl.Agent.policy, rl.Agent.update, gym.vector.AsyncVectorEnv.step_wait, []

    def spoil(self, batch):
        metrics = update(self, batch)
        steps.append(metrics)
        if len(steps) == 18:  # the last before a checkpoint
            self.encoder[0].weight.data[0] = np.nan
        return metrics

    def wait(self, timeout):
        obs, rewards, *rest = step_wait(self, timeout)
        steps.append(rewards)
        return obs, rewards * (np.nan if len(steps) == 45 else 1), *rest

    if what == "an action":
        monkeypatch.setattr(rl.Agent, "policy", lambda self, *seen, mean: policy(self, *seen, mean=mean) * np.nan)
    if "reward" in what:
        monkeypatch.setattr(gym.vector.AsyncVectorEnv, "step_wait", wait)
    if what == "a weight":
        monkeypatch.setattr(rl.Agent, "update", spoil)
    with pytest.raises(envs.UserError, match=f"step {step}: {what} is infinite or not a number"):
        short(*(["--critic-lr=1e9"] if what == "a loss" else []))
    folder = only(tmp_path, "runs/*")
    assert (folder / "not_finite.pt").is_file() and (not holds or holds in envs.load_tensors(folder / "not_finite.pt"))
    state = envs.load_tensors(sorted(folder.glob("resume/*.state.pt"))[-1])
    assert state["progress"]["step"] == 40
    assert all(weight.isfinite().all() for weight in state["agent"].values())


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process as Linux does")
def test_a_worker_that_hangs_twice_ends_the_run_and_it_goes_on_later(tmp_path, monkeypatch, capsys, short):
    """After five minutes each, or here two seconds. The first time once more, the second time the end; what it takes to go on is there."""
    add_step, calls = rl.Replay.add_step, []

    def stop(*args):
        add_step(*args)
        calls.append(args)
        if len(calls) in (40, 45):  # at step 40, an episode's end, so that the next reset is waited for; and five steps later
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
    (folder / "returns.csv").write_text("")  # the checkpoint has what was in it
    rl.main(*rl.read_args([f"--resume={folder}"]))
    assert [row["step"] for row in returns(folder)] == ["20", "40", "60"] and metrics(folder)["train/updates"] == 18


def test_media_that_are_gone_cost_an_evaluation_and_not_the_run(tmp_path, monkeypatch, capsys, short):
    """But the one at its end, which can be made up for."""

    def gone(*_):
        raise envs.UserError("--distractors media: no such folder")

    began = []
    monkeypatch.setattr(rl, "SummaryWriter", lambda *args, purge_step: (began.append(purge_step), SummaryWriter(*args, purge_step=purge_step))[1])
    monkeypatch.setattr(rl, "evaluate", gone)
    with pytest.raises(envs.UserError, match=r"--distractors media: no such folder; when that is mended, to go on: .* --resume runs/"):
        short("--eval-every=20")
    assert capsys.readouterr().err.count("warning: an evaluation cannot be written (--distractors media: no such folder); going on") == 1
    monkeypatch.setattr(rl, "evaluate", lambda *_: {"eval/train/return_mean": 1.0})
    folder = only(tmp_path, "runs/*")
    rl.main(*rl.read_args([f"--resume={folder}", "--total-timesteps=100"]))  # another length, which does not move the first update
    assert metrics(folder)["eval/train/return_mean"] == 1.0 and len(returns(folder)) == 5 and metrics(folder)["train/updates"] == 100 - 42
    assert began == [1, 61]  # TensorBoard forgets what came after the checkpoint
    assert metrics(folder)["train/seconds"] >= float(returns(folder)[-1]["seconds"]) > 0


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), BrokenPipeError(32, "pipe")], ids=repr)
def test_a_worker_that_dies_twice_ends_the_run(monkeypatch, capsys, short, error):
    """Once more after the first time, then a line. What a dead worker leads to are OSErrors as well, and yet no full disk's."""
    waited, step_wait = [], gym.vector.AsyncVectorEnv.step_wait

    def wait(self, timeout):
        waited.append(timeout)
        if len(waited) in (45, 50):
            raise error
        return step_wait(self, timeout)

    monkeypatch.setattr(gym.vector.AsyncVectorEnv, "step_wait", wait)
    with pytest.raises(envs.UserError, match=r"^a worker process died \(is there memory enough\?\); when that is mended, to go on: "):
        short()
    assert "once more, from the last checkpoint" in capsys.readouterr().out


def test_two_environments_go_on_as_if_nothing_had_happened(tmp_path, monkeypatch, short):
    flags, add_step, calls = ["--num-envs=2", "--total-timesteps=120", "--checkpoint-every=40"], rl.Replay.add_step, []
    short("--exp-name=whole", *flags)

    def full(self, *row):
        calls.append(row)
        if len(calls) == 35:  # step 70; the checkpoint is of step 40
            raise OSError("disk full")
        add_step(self, *row)

    with monkeypatch.context() as patch:
        patch.setattr(rl.Replay, "add_step", full)
        with pytest.raises(envs.UserError, match="to go on"):
            short("--exp-name=pieces", *flags)
    folders = [only(tmp_path, f"runs/*__{name}__*") for name in ("pieces", "whole")]
    rl.main(*rl.read_args([f"--resume={folders[0]}"]))
    weights = [torch.load(folder / "checkpoint.pt", weights_only=True)["weights"] for folder in folders]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    rows = [[{key: value for key, value in row.items() if key != "seconds"} for row in returns(folder)] for folder in folders]
    assert rows[0] == rows[1] and [(row["episode"], row["env"]) for row in rows[0]] == [(str(e), str(i)) for e in range(3) for i in range(2)]


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
    """TensorBoard opens its file by name for every write, from a thread: the full device takes the name in one step."""

    def writer(folder: Path, **kwargs) -> SummaryWriter:
        made = SummaryWriter(folder, **kwargs)
        (tmp_path / "full").symlink_to("/dev/full")
        (tmp_path / "full").replace(only(folder, "events*"))
        return made

    monkeypatch.setattr(rl, "SummaryWriter", writer)
    monkeypatch.setattr(rl, "evaluate", lambda *_: {"eval/train/return_mean": 1.0})
    short()
    assert capsys.readouterr().err.count("warning: TensorBoard's curves cannot be written") == 1
    folder = only(tmp_path, "runs/*")
    assert metrics(folder)["train/updates"] == 18 and "eval/train/return_mean" in (folder / "evaluations.csv").read_text()


def test_weights_and_biases_gets_what_tensorboard_gets(tmp_path, monkeypatch, short):
    asked = []
    fake = SimpleNamespace(__spec__=object(), init=lambda **given: asked.append(given))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    short("--track", "--wandb-project-name=mine")
    (given,) = asked
    run = only(tmp_path, "runs/*").name
    assert (given["project"], given["name"], given["id"], given["sync_tensorboard"]) == ("mine", run, run, True) and given["config"]["track"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(rl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(envs.UserError, match="--track needs Weights & Biases: pip install wandb"):
        short("--track")


class Enough(Exception):
    """Enough was seen."""


def test_media_with_some_settings_only(tmp_path, monkeypatch):
    """Phase I reports on the video settings that are there."""
    asked = []

    def collect(args, prompt, tests, training):
        asked.append(tests[1])
        raise Enough

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phase1, "collect", collect)
    for folder in ("media", "media/video_hard", "media/video_easy"):
        Path(folder).mkdir()
        with pytest.raises(Enough):
            phase1.main(phase1.Args(env="cartpole_swingup", overlay_images=20, distractors="media"))
    assert asked == [("procedural",), ("procedural", "video_hard"), ("procedural", "video_easy", "video_hard")]


def test_frames_do_not_depend_on_the_number_of_processes(monkeypatch):
    """Two collect what this one does, clip by clip, and in the same order."""
    monkeypatch.setattr(phase1, "CLIP", 3)
    args, counts = phase1.Args(env="cartpole_swingup", seed=3), {"spread": 5, "random": 4}

    class Here:
        def __init__(self, *_):
            pass

        def submit(self, *call):
            done = Future()
            done.set_result(call[0](*call[1:]))
            return done

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(envs, "cores", lambda: 2)
    wanted = (counts, ("procedural",)), ({"spread": 2}, ())
    b, second = phase1.collect(args, "the cart and the pole", *wanted)
    monkeypatch.setattr(phase1, "ProcessPoolExecutor", Here)
    a, first = phase1.collect(args, "the cart and the pole", *wanted)
    assert a.keys() == b.keys() == {"clean", "masks", "procedural"}
    assert a["clean"].shape == (9, 3, 84, 84) and a["masks"].shape == (9, 84, 84)
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert len({frame.tobytes() for frame in [*a["clean"], *first["clean"]]}) == 11
    assert first.keys() == {"clean", "masks"} and np.array_equal(first["clean"], second["clean"])
    assert (a["procedural"] != a["clean"]).any(1)[~a["masks"]].mean() > 0.5


def test_evaluation_plays_every_episode_once(tmp_path, one_thread):
    """In processes, what a loop over the episodes comes to, with masks made a frame at a time; a success rate where there is one to tell."""
    args = rl.Args(env="hammer", action_repeat=20, hidden_dim=16, encoder="small", precision="fp32")
    torch.manual_seed(1)
    agent = rl.Agent(args, 9, 24, 26, rl.Masker(), None)
    rl.save_agent(tmp_path / "checkpoint.pt", agent, 0, {"prompt": "the hand"})
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
                obs, reward, _, done, _ = env.step(agent.policy(pixels, (mask * 255).round().byte(), proprio, mean=True)[0].numpy())
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
    rl.save_agent(tmp_path / "checkpoint.pt", rl.Agent(args, 9, 24, 26, None, None), 0, {"prompt": None})
    env = rl.make_env_once("hammer", "train", args.seed + 10_000, **rl.env_options(args))  # the one that it will play in
    env.task.env.init_qpos[-7] = 0.09
    for steps in (1, 2):
        env.episode_steps = steps
        total, success, *_ = rl.play(tmp_path / "checkpoint.pt", args, ("train", 0))
        assert total == pytest.approx(200 * steps) and success == (steps == 2)  # a sparse reward of 10 at each control step
    env.close()


def test_train_all_runs_what_is_not_finished(tmp_path, monkeypatch, capsys):
    """Here SAC with random shift: no masker is made, nothing is masked, no photograph looked at. One table of all runs' figures; a second call runs
    nothing again; a run that fails is named."""
    monkeypatch.chdir(tmp_path)
    flags = " ".join([*SMALL, "--action-repeat=50", "--eval-settings train procedural --precision=fp32 --overlay=nowhere"])

    def call(*more: str) -> None:
        args = ["--envs", "cartpole_swingup", "--variants", "sac", "--output=table.csv", f"--flags={flags}", "--memory-per-run=1", *more]
        train_all.main(tyro.cli(train_all.Args, args=args))

    call()
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    folder = only(tmp_path, "runs/cartpole_swingup__sac__1__*")
    expected = metrics(folder)
    assert expected["train/updates"] == 8 and {"eval/train/return_mean", "eval/procedural/return_mean"} <= expected.keys()
    assert not [key for key in expected if "video" in key or "iou" in key] and not (tmp_path / "runs/maskers").exists()
    film = np.stack([np.asarray(frame) for frame in imageio.get_reader(folder / "train.mp4")])
    assert film[:, :, 340:668].min() > 250  # the mask is white
    assert {row["figure"]: float(row["value"]) for row in rows} == pytest.approx(expected, rel=1e-3)
    assert {(row["env"], row["variant"], row["seed"]) for row in rows} == {("cartpole_swingup", "sac", "1")}
    before = (tmp_path / "table.csv").read_text()
    capsys.readouterr()
    with pytest.raises(envs.UserError, match="1 of 2 runs failed: cartpole_swingup__sac__-1"):
        call("--seeds", "1", "-1")
    out = capsys.readouterr().out
    assert "cartpole_swingup__sac__1: finished before" in out and "1 runs, 1 at a time\n" in out
    only(tmp_path, "runs/cartpole_swingup__sac__1__*")
    with pytest.raises(envs.UserError, match=r"one run is expected to take .* of 0\.1"):
        call("--name=other_", "--memory=0.1")
    with pytest.raises(envs.UserError, match="cartpole_swingup__other_sac__-1"):
        call("--name=other_", "--seeds", "-1")
    assert (tmp_path / "table.csv").read_text() == before  # another sweep leaves this one's rows
