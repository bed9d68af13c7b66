"""The final protocol for trained agents: so many episodes of the mean policy in each setting, with starts that training never had (the A1 has but
one); every episode goes into a table, and what produced the agent into another. `benchmarks/tables.py` makes the rest of them.

    python benchmarks/evaluate.py --checkpoints runs/.../checkpoint.pt --episodes 100 --settings train video_easy video_hard
    python benchmarks/evaluate.py --checkpoints runs/.../checkpoint.pt --export results/agents       writes the agent alone, in fp16, as well
"""

import csv
import json
import multiprocessing
import os
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import envs
import talas_asymmetric_sac as talas
from benchmarks.speed import processor
from benchmarks.train_all import VARIANTS

METHOD = ("masker", "clean_masker", "actor_views", "actor_judge", "critic_views", "augmentation")  # the flags that make a method


@dataclass
class Args:
    checkpoints: tuple[str, ...]
    """checkpoint.pt of runs"""
    episodes: int = 10  # per setting: 100 for a headline figure
    settings: tuple[envs.Setting, ...] | None = None  # by default train, video_easy, video_hard; without media train, procedural
    distractors: str | None = None  # folder in DMControl-GB's layout; or set TALAS_DISTRACTORS; by default the run's own
    machine: str | None = None  # where the agents were trained; by default this machine
    commit: str = ""  # with which code
    segmenter: str | None = None  # whose masks the maskers learned from (sim's are privileged); by default what the agent's file says
    output: str = "results"
    """writes <output>/runs.csv, a row per agent, and <output>/evaluations.csv, a row per episode; rows of the same run are replaced"""
    export: str | None = None  # a folder for the agents alone: masker, encoder and actor in half precision


def method(args: talas.Args) -> str:
    """The README's name of what these flags are."""
    args = replace(args, clean_masker=None if args.clean_masker == args.masker else args.clean_masker)
    for name, flags in VARIANTS.items():
        variant = tyro.cli(talas.Args, args=shlex.split(flags))
        if all(getattr(variant, flag) == getattr(args, flag) for flag in METHOD):
            return name
    return "other"


def command(args: talas.Args) -> str:
    """What was typed: the arguments that are not the defaults."""
    given = []
    for field in fields(args):
        value = getattr(args, field.name)
        if value == field.default or field.name in ("resume", "precision"):  # precision is what auto stood for
            continue
        flag, values = field.name.replace("_", "-"), value if isinstance(value, list | tuple) else [value]
        if isinstance(value, bool):
            flag, values = flag if value else f"no-{flag}", []
        given += [f"--{flag}", *map(str, values)]
    return shlex.join(["python", "talas_asymmetric_sac.py", *given])


def with_media(run: talas.Args, distractors: str | None, settings: tuple[envs.Setting, ...]) -> talas.Args:
    """A run's arguments with the media that are at hand. Raises UserError now for a setting that cannot be shown, not in the middle."""
    run = replace(run, distractors=distractors or os.environ.get("TALAS_DISTRACTORS") or run.distractors)
    for setting in dict.fromkeys(settings):
        envs.make_env(run.env, setting, **talas.env_options(run)).close()
    return run


def machine() -> str:
    """This one, as the tables name it."""
    return f"{processor()}, {os.cpu_count()} cores, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


def replace_rows(path: Path, key: str, rows: list[dict]) -> None:
    """Write rows that have one value of `key` (a run, a task) into a CSV, in place of those that had it. A column that only others have stays."""
    others = [row for row in read(path) if row[key] != rows[0][key]]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows[:1] + others for name in row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(others + rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    envs.write_whole(path, write)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the mean over episodes."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
    return tuple(stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval)


def export(path: Path, folder: Path) -> None:
    """The agent without critics and optimisers, in half precision: what --evaluate needs."""
    checkpoint = envs.load_tensors(path)
    kept = {key: value.half() for key, value in checkpoint["weights"].items() if not key.startswith(("critic.", "target_critic."))}
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{checkpoint['args']['env']}__{checkpoint['args']['exp_name']}__{checkpoint['args']['seed']}.pt"
    elsewhere = dict.fromkeys(("eval_settings", "eval_episodes", "distractors", "overlay", "masker_path", "resume"))  # what this machine has
    envs.save_tensors(target, checkpoint | {"args": checkpoint["args"] | elsewhere, "weights": kept})
    print(f"written: {target}, {target.stat().st_size / 1e6:.1f} MB")


def main(args: Args) -> None:
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # an error now rather than after the episodes
    if args.episodes < 1 or not args.checkpoints:
        raise envs.UserError("nothing to evaluate: --checkpoints and --episodes have to be at least one")
    for name in args.checkpoints:
        path = Path(name)
        checkpoint = talas.load_agent(path)[1]
        run = checkpoint["args"]
        label = f"{run.env}__{run.exp_name}__{run.seed}__{checkpoint['step']}"
        for row in read(output / "runs.csv"):
            if row["run"] == label and row["command"] != command(run):
                raise envs.UserError(
                    f"{output}/runs.csv has a {label} of other flags, {row['command']!r}: give runs an --exp-name of their own, or another --output"
                )
        settings = tuple(dict.fromkeys(talas.settings_of(args.settings, args.distractors or run.distractors)))
        played_as = with_media(run, args.distractors, settings)
        jobs = [(setting, episode) for setting in settings for episode in range(args.episodes)]
        played = list(tqdm(talas.play_all(path, played_as, jobs), path.parent.name, len(jobs), unit="episode"))
        rows, print_row = [], "{:<12}{:>9}{:>8}{:>18}{:>11}{:>10}{:>9}".format
        print(f"\n{label}\n" + print_row("setting", "return", "± std", "95% interval", "clipped", "mask IoU", "success"))
        for (setting, episode), (total, success, ious, *_) in zip(jobs, played, strict=True):
            iou, iou_1px = np.mean(ious, 0) if ious else (np.nan, np.nan)
            figures = {"return": total, "iou": iou, "iou_1px": iou_1px, "success": success}
            rows.append({"run": label, "setting": setting, "episode": episode} | {key: f"{value:.4f}" for key, value in figures.items()})
        for setting in settings:
            returns, iou, success = (np.array([float(row[key]) for row in rows if row["setting"] == setting]) for key in ("return", "iou", "success"))
            low, high = interval(returns)  # clipped: each negative return as 0, as RL-ViGen averages
            cells = f"{returns.mean():.1f}", f"{returns.std():.1f}", f"{low:.1f} to {high:.1f}", f"{returns.clip(0).mean():.1f}"
            print(print_row(setting, *cells, f"{iou.mean():.3f}", f"{success.mean():.0%}").replace("nan%", "–").replace("nan", "–"))
        metrics, episodes = path.parent / "metrics.json", read(path.parent / "returns.csv")
        if metrics.is_file():
            seconds = json.loads(metrics.read_text()).get("train/seconds", "")
        else:  # a run that was stopped, or is not over
            seconds = ([row["seconds"] for row in episodes if int(row["step"]) <= checkpoint["step"]] or [""])[-1]
        about = {"run": label, "env": run.env, "method": method(run), "seed": run.seed, "agent_steps": checkpoint["step"]}
        segmenter = "none" if run.masker == "none" else args.segmenter or checkpoint.get("segmenter", "sim")
        about |= {"action_repeat": run.action_repeat or envs.task_row(run.env).repeat, "segmenter": segmenter, "precision": run.precision}
        about |= {"machine": args.machine or machine(), "commit": args.commit, "seconds": seconds, "command": command(run)}
        skipped = {setting: episode[-1] for (setting, _), episode in zip(jobs, played, strict=True)}  # another set of videos than others were shown
        replace_rows(output / "runs.csv", "run", [about | {"videos_skipped": sum(skipped.values())}])
        replace_rows(output / "evaluations.csv", "run", rows)
        if args.export:
            export(path, Path(args.export))
    print(f"\nwritten: {output}/runs.csv, {output}/evaluations.csv")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (envs.UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():  # they would play their episodes to the end
            process.kill()
        sys.exit(130)
