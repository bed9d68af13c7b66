"""An environment to count with. In a file of its own, which worker processes import without torch."""

import gymnasium as gym
import numpy as np


class Counting(gym.Env):
    """Frames that say when they are: episode and step; the reward is the step's number."""

    observation_space = gym.spaces.Dict(pixels=gym.spaces.Box(0, 255, (9, 4, 5), np.uint8), proprio=gym.spaces.Box(-9, 9, (1,), np.float32))
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length: int, ends: str):
        self.length, self.ends, self.episode = length, ends, -1

    def look(self) -> dict[str, np.ndarray]:
        frames = [np.full((3, 4, 5), 8 * self.episode + max(self.t + k, 0), np.uint8) for k in (-2, -1, 0)]
        return {"pixels": np.concatenate(frames), "proprio": np.array([self.t], np.float32)}

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self.look(), {"episode": self.episode}

    def step(self, action):
        self.t += 1
        over = self.t == self.length
        return self.look(), float(self.t), over and self.ends == "terminated", over and self.ends == "truncated", {}
