"""What the masks cost a trained agent: its returns with its masker's masks and with the simulator's own, and both on states that it visits.

python benchmarks/visited.py --checkpoint runs/.../checkpoint.pt --output results/visited
"""

import csv
import sys
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.evaluate import with_media
from envs import Setting, UserError, make_env, mask_iou, write_image
from talas_asymmetric_sac import Agent, load_agent, mask_stack, observe


@dataclass
class Args:
    checkpoint: str
    """of a run with a masker"""
    settings: tuple[Setting, ...] = ("train", "video_hard")  # each with both masks
    drawn: tuple[Setting, ...] = ("train", "procedural")  # the picture's: the project's own backgrounds, so that it can be shown anywhere
    distractors: str | None = None  # folder in DMControl-GB's layout; or set TALAS_DISTRACTORS; by default the run's own
    episodes: int = 10  # of each, with the policy's mean action; the same as the run's own evaluation
    output: str = "results/visited"
    """writes <output>.csv and <output>.png"""


def roll(agent: Agent, args, prompt: str, setting: Setting, episode: int, simulators: bool) -> tuple[float, float, list[np.ndarray]]:
    """One episode: its return, its mean IoU, and ten pictures of a frame, what the student keeps of it, and what the simulator's mask keeps."""
    env = make_env(args.env, setting, args.seed + 10_000, distractors=args.distractors, reward=args.reward, action_repeat=args.action_repeat)
    obs, _ = env.reset(options={"episode": episode})
    true_masks: deque[torch.Tensor] = deque(maxlen=obs["pixels"].shape[0] // 3)
    total, ious, pictures, done = 0.0, [], [], False
    while not done:
        pixels, mask, proprio = observe(partial(mask_stack, agent.masker), obs, torch.device("cpu"))
        frame, true, kept = obs["pixels"][-3:], env.segment(env.nameable(prompt)), mask[0, -1].numpy() > 127
        true_masks.extend([torch.from_numpy(true).byte() * 255] * (1 if true_masks else true_masks.maxlen))
        ious.append(mask_iou(kept[None], true[None])[0])
        pictures.append(np.concatenate([frame, frame * kept, frame * true], 1))
        action = agent.policy(pixels, torch.stack(list(true_masks))[None] if simulators else mask, proprio, mean=True)[0].numpy()
        obs, reward, terminated, truncated, _ = env.step(action)
        total, done = total + reward, terminated or truncated
    env.close()
    return total, float(np.mean(ious)), [pictures[int(i)] for i in np.linspace(min(5, len(pictures) - 1), len(pictures) - 1, 10)]


def main(args: Args) -> None:
    agent, checkpoint = load_agent(Path(args.checkpoint))
    run, prompt = checkpoint["args"], checkpoint["prompt"]
    if args.episodes < 1 or not args.settings or not args.drawn:
        raise UserError("nothing to play: --episodes, --settings and --drawn have to be at least one")
    if run.masker == "none":
        raise UserError(f"--checkpoint {args.checkpoint}: an agent without a masker")
    run = with_media(run, args.distractors, (*args.settings, *args.drawn))
    table = []
    print(f"{'setting':<12}{'masks':<11}{'return':>8}{'± std':>7}{run.masker + ' IoU':>13}")
    for setting in args.settings:
        for masks in (run.masker, "simulator"):
            rows = [roll(agent, run, prompt, setting, episode, masks == "simulator")[:2] for episode in range(args.episodes)]
            table += [[setting, masks, i, f"{total:.2f}", f"{iou:.4f}"] for i, (total, iou) in enumerate(rows)]
            totals, ious = np.array(rows).T
            print(f"{setting:<12}{masks:<11}{totals.mean():>8.1f}{totals.std():>7.1f}{ious.mean():>13.3f}", flush=True)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{args.output}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["setting", "masks", "episode", "return", "iou"], *table])
    sheet = np.concatenate([np.concatenate(roll(agent, run, prompt, setting, 0, False)[2], 2) for setting in args.drawn], 1)
    write_image(Path(f"{args.output}.png"), cv2.resize(sheet.transpose(1, 2, 0)[..., ::-1], None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST))
    print(f"written: {args.output}.csv, {args.output}.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
