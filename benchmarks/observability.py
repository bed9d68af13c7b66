"""What cartpole's camera does not show, and what that costs: the agent's own update, on the state instead of pictures, less what the picture hides.

    full        position, angle and both velocities
    positions   position and angle (its cosine and sine) in the last three frames: what a perfect encoder could read off whole poles
    seen        the same, but cosine and sine are 0 where fewer than 20 of the pole's pixels show: beyond the picture's border, which
                the cart can reach

No encoder and no augmentation: what is left of the difference is the task's own. Of another task there is the full state (dm_control's or Adroit's
own observation, the A1's coordinates and velocities): how fast the update by itself learns it.

    python benchmarks/observability.py
    python benchmarks/observability.py --env walker_walk --steps 25000 --updates-per-step 0.5 --precision bf16 --label "half an update a step"
"""

import csv
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import talas_asymmetric_sac as talas
from benchmarks.curves import HEADER
from envs import AdroitTask, Loader, SuiteTask, UserError, make_env, resolve_env_id, set_up_torch


@dataclass
class Args:
    env: str = "cartpole_swingup"  # or any other task
    steps: int = 4000  # agent steps, the first 500 of them random
    seeds: tuple[int, ...] = (1, 2)  # a run of each variant for each
    variants: tuple[Literal["full", "positions", "seen"], ...] | None = None  # what the agent is given; by default all three, of other tasks full
    updates_per_step: float = 1.0  # updates per agent step after the random ones
    learning_rate: float = 1e-3  # of actor, critic and temperature
    layer_norm: bool = False  # the agent's --layer-norm
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks
    eval_every: int = 0  # agent steps between evaluations of the mean policy, as curves have them; 0 makes none
    eval_episodes: int = 10  # of each evaluation
    label: str | None = None  # the curves' name, to which the seed is added, and the variant, if there are several; by default the task
    output: Path = Path("runs/states.csv")  # training returns, in benchmarks/curves.py's columns; what it has of other names stays


def state_of(task: Loader) -> np.ndarray:
    """What a task's own library gives agents that do not see; of the A1 all coordinates but where it stands, and all velocities."""
    if isinstance(task, SuiteTask):
        return np.concatenate([np.ravel(part) for part in task.env.task.get_observation(task.env.physics).values()])
    return task.env._get_obs() if isinstance(task, AdroitTask) else np.concatenate([task.data.qpos[2:], task.data.qvel])


class State(gym.Wrapper):
    """A task with its state, or what can be seen of it (cartpole's), as proprioception, and one black pixel as the picture."""

    def __init__(self, env_id: str, variant: str, seed: int):
        super().__init__(make_env(env_id, seed=seed))
        self.variant, self.hidden = variant, []
        self.frames: deque[list[float]] = deque(maxlen=1 if variant == "full" else 3)
        if env_id != "cartpole_swingup":
            self.unwrapped.render = lambda: np.zeros((84, 84, 3), np.uint8)  # nobody looks

    def look(self) -> dict[str, np.ndarray]:
        black = np.zeros((9, 1, 1), np.uint8)
        if self.unwrapped.env_id != "cartpole_swingup":
            return {"pixels": black, "proprio": state_of(self.unwrapped.task).astype(np.float32)}
        (x, angle), (speed, spin) = self.unwrapped.physics.data.qpos, self.unwrapped.physics.data.qvel
        self.hidden.append(self.unwrapped.segment("the pole").sum() < 20)  # a whole pole has 55 to 95
        seen = self.variant != "seen" or not self.hidden[-1]
        self.frames.append([x, math.cos(angle) * seen, math.sin(angle) * seen] + ([speed / 2, spin / 8] if self.variant == "full" else []))
        return {"pixels": black, "proprio": np.array(self.frames, np.float32).ravel()}

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        self.frames.clear()
        self.hidden.clear()
        for _ in range(self.frames.maxlen):
            obs = self.look()
        return obs, info

    def step(self, action: np.ndarray):
        _, reward, terminated, truncated, info = self.env.step(action)
        return self.look(), reward, terminated, truncated, info


def play(env: State, act: Callable[[dict[str, np.ndarray]], np.ndarray]) -> tuple[float, dict]:
    """One episode of what `act` does with each observation: its return, and what the task says at its end."""
    obs, total, done = env.reset()[0], 0.0, False
    while not done:
        obs, reward, terminated, truncated, info = env.step(act(obs))
        total, done = total + reward, terminated or truncated
    return total, info


def evaluate(agent: talas.Agent, env: State, episodes: int) -> dict[str, float]:
    """What the mean policy has, which acts without noise: its mean return and, of Adroit, the share of its episodes that succeed."""

    def act(obs: dict[str, np.ndarray]) -> np.ndarray:
        return agent.policy(*talas.observe(partial(talas.mask_stack, None), obs, torch.device("cpu")), mean=True)[0].numpy()

    returns, infos = zip(*(play(env, act) for _ in range(episodes)), strict=True)
    successes = [info["episode_success"] for info in infos if "episode_success" in info]
    success = {"eval/train/success_rate": float(np.mean(successes))} if successes else {}
    return {"eval/train/return_mean": float(np.mean(returns))} | success


def learn(args: Args, variant: str, seed: int) -> Iterator[tuple[int, dict[str, float]]]:
    """By episode, as they end, the step at its end and the training return; of cartpole the share of pictures that hide the pole, of Adroit success.
    At the end of the first episode of every --eval-every steps, the mean policy's as well."""
    device, _ = set_up_torch("cpu", seed, True)
    talas.Encoder = lambda channels, kind: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())  # nothing to encode
    given = {"actor_views": "clean", "critic_views": "clean", "shift": 0, **dict.fromkeys(("actor_lr", "critic_lr", "alpha_lr"), args.learning_rate)}
    env = State(args.env, variant, seed)
    env.action_space.seed(seed)
    obs, _ = env.reset()
    state, actions = len(obs["proprio"]), env.action_space.shape[0]
    agent = talas.Agent(talas.Args(precision=args.precision, layer_norm=args.layer_norm, **given), 9, state, actions, None, None)
    rows = args.steps + args.steps // 100 + 8  # one more for each episode, of which Adroit's are the shortest
    replay = talas.Replay(1, rows, obs["pixels"].shape, state, actions, device)
    mask = partial(talas.mask_stack, None)
    seen = talas.observe(mask, obs, device)
    replay.add_first(np.array([0]), *seen)
    judge = State(args.env, variant, seed + 1000) if args.eval_every else None  # other episodes than training's
    last, total, updates = 0, 0.0, 0
    for step in (bar := tqdm(range(1, args.steps + 1), unit="step", mininterval=1 if sys.stderr.isatty() else 30)):
        action = env.action_space.sample() if step <= 500 else agent.policy(*seen, mean=False)[0].numpy()
        obs, reward, terminated, truncated, info = env.step(action)
        seen = talas.observe(mask, obs, device)
        replay.add_step(action[None], np.array([reward]), np.array([terminated]), *seen)
        total += reward
        if truncated:
            hidden = {"pole_hidden": float(np.mean(env.hidden))} if env.hidden else {}
            success = {"train_success": float(info["episode_success"])} if "episode_success" in info else {}
            figures = {"train_return": total} | hidden | success
            if judge and step // args.eval_every > last // args.eval_every:
                with torch.random.fork_rng(devices=[]):  # the actor draws its noise even where only the mean is asked for
                    figures |= evaluate(agent, judge, args.eval_episodes)
                bar.write(f"step {step:,}: " + ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items()))
            yield step, figures
            bar.set_postfix({"return": f"{total:.1f}"}, refresh=False)
            last, total, seen = step, 0.0, talas.observe(mask, env.reset()[0], device)
            replay.add_first(np.array([0]), *seen)
        while updates < int(args.updates_per_step * (step - 500)):
            agent.update(replay.sample(128))
            updates += 1
    env.close()
    if judge:
        judge.close()


def main(args: Args) -> None:
    args.env = resolve_env_id(args.env)
    cartpole = args.env == "cartpole_swingup"
    args.variants = args.variants or (("full", "positions", "seen") if cartpole else ("full",))
    if args.steps < 1250:
        raise UserError(f"--steps {args.steps}: give at least 1250, of which 500 are random")
    if not cartpole and args.variants != ("full",):
        raise UserError(f"--env {args.env}: what is seen of the state is known of cartpole_swingup only; give --variants full")
    rows = list(csv.reader(args.output.read_text().splitlines())) if args.output.is_file() else [HEADER]
    if rows[:1] != [HEADER]:
        raise UserError(f"{args.output}: not a table of curves; give another --output")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for variant in args.variants:
            label = ", ".join([args.label or args.env, *([variant] if len(args.variants) > 1 else []), f"seed {seed}"])
            rows, episodes = [row for row in rows if row[0] != label], []
            with args.output.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows(rows)
                for step, figures in learn(args, variant, seed):
                    episodes.append(figures)
                    rows += (new := [[label, figure, step, f"{value:.6g}"] for figure, value in figures.items()])
                    writer.writerows(new)
                    file.flush()  # what an interrupted run has had stays
            last = {figure: np.mean([figures[figure] for figures in episodes[-8:]]) for figure in episodes[0] if "/" not in figure}
            print(f"{label}, the last 8 episodes: " + ", ".join(f"{figure} {mean:.4g}" for figure, mean in last.items()), flush=True)
    print(f"written: {args.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
