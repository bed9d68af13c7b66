"""Do a state's embeddings lie together, whatever the background? Ten states that an agent visits, each before forty unseen backgrounds: the encoder's
embeddings, their t-SNE map, and a tightness: the mean distance within states over that between states (0: the background does not matter).

python benchmarks/embeddings.py --checkpoints runs/.../checkpoint.pt runs/.../checkpoint.pt --labels TaLaS "no masker" --output results/embeddings

Needs scikit-learn. `benchmarks/figures.py` draws the map.
"""

import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.spatial.distance import cdist

sys.path.insert(0, str(Path(__file__).parents[1]))
import envs
import talas_asymmetric_sac as talas
from benchmarks.evaluate import with_media


@dataclass
class Args:
    checkpoints: tuple[str, ...]
    """agents of one task; the first one's policy visits the states"""
    labels: tuple[str, ...]
    """a name for each"""
    setting: envs.Setting = "video_hard"  # where the backgrounds come from; procedural needs no media
    states: int = 10  # moments of one episode, evenly spread
    backgrounds: int = 40  # of each; at most as many as the setting has videos
    distractors: str | None = None  # folder in DMControl-GB's layout; or set TALAS_DISTRACTORS; by default the run's own
    output: str = "results/embeddings"
    """writes <output>.csv"""


def visit(agent: talas.Agent, run: talas.Args, count: int) -> list[list[list[np.ndarray]]]:
    """`count` moments of an episode of the mean policy, evenly spread, each as the simulator's states of its three stacked frames."""
    env = envs.make_env(run.env, "train", run.seed + 10_000, **talas.env_options(run))
    obs, _ = env.reset()
    mask = partial(talas.mask_stack, agent.masker)
    states, done = [env.get_state()], False
    while not done:
        obs, _, terminated, truncated, _ = env.step(agent.policy(*talas.observe(mask, obs, torch.device("cpu")), mean=True)[0].numpy())
        states.append(env.get_state())
        done = terminated or truncated
    env.close()
    return [states[i - 2 : i + 1] for i in np.linspace(2, len(states) - 1, count).astype(int)]


def tightness(embeddings: np.ndarray) -> float:
    """Of (states, backgrounds, D): mean distance between two backgrounds of a state over that between two states."""
    states, backgrounds, _ = embeddings.shape
    distances = cdist(*[embeddings.reshape(states * backgrounds, -1)] * 2)
    same = np.repeat(np.arange(states), backgrounds)
    same = same[:, None] == same
    return float(distances[same & ~np.eye(len(distances), dtype=bool)].mean() / distances[~same].mean())


def main(args: Args) -> None:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise envs.UserError("t-SNE needs scikit-learn: pip install scikit-learn") from None
    if len(args.checkpoints) != len(args.labels) or args.states * args.backgrounds <= 30 or args.states < 2:
        raise envs.UserError("give a label for each of --checkpoints; t-SNE takes more than 30 of --states times --backgrounds, two states or more")
    agents = [talas.load_agent(Path(path)) for path in args.checkpoints]
    run = agents[0][1]["args"]
    if len({rest["args"].env for _, rest in agents}) > 1:
        raise envs.UserError("--checkpoints: agents of one task can be compared, these are of several")
    run = with_media(run, args.distractors, (args.setting,))
    moments = visit(agents[0][0], run, args.states)
    env = envs.make_env(run.env, args.setting, run.seed, **talas.env_options(run))
    different = 1 if args.setting == "train" else len(env._videos) if args.setting.startswith("video") else args.backgrounds
    if args.backgrounds > different:
        raise envs.UserError(f"--backgrounds {args.backgrounds}: --setting {args.setting} has {different}")
    stacks = np.empty((args.states, args.backgrounds, *env.observation_space["pixels"].shape), np.uint8)
    for b in range(args.backgrounds):
        env.reset(options={"episode": b})
        for s, moment in enumerate(moments):
            frames = [env.show(state, 10 * s + t) for t, state in enumerate(moment)]
            stacks[s, b] = np.concatenate(frames, 2).transpose(2, 0, 1)
    env.close()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{args.output}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "setting", "tightness", "state", "background", "x", "y"])
        for (agent, _), label in zip(agents, args.labels, strict=True):
            with torch.no_grad(), agent.autocast():
                pixels = torch.from_numpy(stacks).flatten(0, 1)
                views = [talas.apply_mask(part, talas.mask_stack(agent.masker, part), agent.dtype) for part in pixels.split(50)]
                embeddings = torch.cat([agent.encoder(view) for view in views]).float().unflatten(0, stacks.shape[:2]).numpy()
            tight = tightness(embeddings)
            print(f"{label:<20} within / between: {tight:.3f}")
            points = TSNE(random_state=0, init="pca").fit_transform(embeddings.reshape(len(pixels), -1))
            for i, (x, y) in enumerate(points):
                writer.writerow([label, args.setting, f"{tight:.4f}", *divmod(i, args.backgrounds), f"{x:.3f}", f"{y:.3f}"])
    print(f"written: {args.output}.csv")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (envs.UserError, OSError) as error:
        sys.exit(f"error: {error}")
