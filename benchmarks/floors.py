"""What one has without learning: the returns of actions that are all zero, and of random ones. An agent's return says little without them.

python benchmarks/floors.py
"""

import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.observability import State, play
from envs import TASKS, UserError, resolve_env_id

POLICIES = ("zeros", "random")  # of a motor that a task drives to an angle, zero is the middle of its range, or the task's own pose


@dataclass
class Args:
    envs: tuple[str, ...] = tuple(TASKS)  # tasks, by default all of them
    episodes: int = 10  # of each policy; what a setting shows behind the agent changes nothing here, as nobody looks
    output: Path = Path("results/floors.csv")  # a row per episode


def choose(actions: gym.spaces.Box, policy: str, obs: dict[str, np.ndarray]) -> np.ndarray:
    """An action that does not look at the observation."""
    return actions.sample() if policy == "random" else np.zeros(actions.shape, np.float32)


def main(args: Args) -> None:
    env_ids = [resolve_env_id(env_id) for env_id in args.envs]
    if args.episodes < 1 or not env_ids:
        raise UserError("nothing to play: --envs and --episodes have to be at least one")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for env_id in tqdm(env_ids, unit="task"):
        for policy in POLICIES:
            env = State(env_id, "full", 10_000)
            env.action_space.seed(1)
            act = partial(choose, env.action_space, policy)
            returns = [play(env, act)[0] for _ in range(args.episodes)]
            env.close()
            rows += [[env_id, policy, episode, f"{value:.2f}"] for episode, value in enumerate(returns)]
            tqdm.write(f"{env_id:<18} {policy:<7} {np.mean(returns):>8.1f} ± {np.std(returns):.1f}")
    with args.output.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["env", "policy", "episode", "return"], *rows])
    print(f"written: {args.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
