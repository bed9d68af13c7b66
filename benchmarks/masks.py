"""What maskers keep, in one picture and one table, from the test frames and metrics that the phases left. Tasks that the table has already are
replaced, others stay; the picture is drawn anew, of the tasks named. Students of the same teacher in runs/maskers_<augmentation>/<env> go into
the table as well. No training.

python benchmarks/masks.py --envs walker_walk cartpole_swingup hammer unitree_walk --commit abc1234 --output results/masks
"""

import filecmp
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.evaluate import machine, replace_rows
from envs import Augmentation, UserError, cpu_has_bf16, predict, resolve_env_id, write_sheet
from talas_phase2 import load_teacher


@dataclass
class Args:
    envs: tuple[str, ...]
    """tasks whose maskers lie in runs/maskers/<env>"""
    commit: str = ""  # with which code they were trained
    machine: str | None = None  # and where; by default this machine
    output: str = "results/masks"
    """writes <output>.png and <output>.csv"""
    settings: tuple[Literal["clean", "overlay", "procedural", "video_easy", "video_hard"], ...] = ("clean", "procedural")
    """the picture's settings: the project's own backgrounds, so that it can be shown anywhere"""


def newest_run(env_id: str, phase: str, folder: Path) -> tuple[dict, dict]:
    """The arguments and metrics of the last run of a phase, of whatever name, that wrote into the folder and not into another one."""
    flag = "output" if phase == "phase1" else "maskers"
    for path in sorted(Path("runs").glob(f"{env_id}__*/metrics.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        arguments, metrics = (json.loads((path.parent / name).read_text()) for name in ("args.json", "metrics.json"))
        if flag in arguments and Path(arguments[flag] or f"runs/maskers/{env_id}").resolve() == folder.resolve():
            return arguments, metrics
    raise UserError(f"runs/ has no run of {env_id}'s {phase} that wrote {folder}")


def main(args: Args) -> None:
    if not args.envs or not args.settings:
        raise UserError("nothing to show: --envs and --settings have to be at least one")
    rows = []
    for env_id in map(resolve_env_id, args.envs):
        folder = Path(f"runs/maskers/{env_id}")
        if missing := [name for name in ("student.pt", "frames.npz") if not (folder / name).is_file()]:
            raise UserError(f"{folder}/{missing[0]}: not there; run talas_phase1.py and talas_phase2.py --env {env_id}")
        masker, checkpoint = load_teacher(folder / "student.pt", env_id)  # a student's file is like its teacher's
        with np.load(folder / "frames.npz", allow_pickle=False) as archive:
            n = len(archive["test_masks"])
            chosen, cells = [n // 8, 5 * n // 8, 7 * n // 8], []
            for setting in args.settings:
                if f"test_{setting}" not in archive:
                    raise UserError(f"{folder}/frames.npz: no {setting} frames; Phase I makes them where it finds the media")
                frames = archive[f"test_{setting}"][chosen]
                kept = (frames * (predict(masker, frames, torch.device("cpu"), cpu_has_bf16()) > 0.5)[:, None]).astype(np.uint8)
                cells += [image for pair in zip(frames, kept, strict=True) for image in pair]
        rows.append(np.concatenate(cells, axis=2))
        found = [newest_run(env_id, phase, folder) for phase in ("phase1", "phase2")]
        for name in (name for name in get_args(Augmentation) if name != found[1][0]["augmentation"]):
            other = Path(f"runs/maskers_{name}/{env_id}")
            if (other / "student.pt").is_file() and filecmp.cmp(other / "teacher.pt", folder / "teacher.pt", shallow=False):
                found.append(newest_run(env_id, "phase2", other))
        figures = []
        for arguments, metrics in found:
            phase = "phase2" if "augmentation" in arguments else "phase1"
            common = {"steps": arguments["steps"], "seconds": f"{metrics['seconds']:.0f}", "segmenter": checkpoint["segmenter"]}
            common |= {"commit": args.commit, "machine": args.machine or machine()}
            for key in (key for key in metrics if key.startswith("iou")):
                row = {"env": env_id, "phase": phase, "augmentation": arguments.get("augmentation", ""), "seed": arguments["seed"]}
                figures.append(row | {"figure": key, "value": f"{metrics[key]:.4f}"} | common)
        replace_rows(Path(f"{args.output}.csv"), "env", figures)
    write_sheet(Path(f"{args.output}.png"), rows)
    print(f"written: {args.output}.png, {args.output}.csv")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
