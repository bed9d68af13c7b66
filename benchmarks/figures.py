"""All figures that can be drawn from the committed CSVs, without any training: learning curves, returns beside the page's methods, the t-SNE maps.

python benchmarks/figures.py
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.curves import HEADER, draw, plt
from benchmarks.evaluate import read
from benchmarks.tables import METHODS
from envs import UserError, task_row


@dataclass
class Args:
    results: str = "results"
    """the folder with the CSVs; pictures go beside them"""


def bars(results: Path) -> None:
    """returns.png: by task, in video_hard, the page's methods in grey and its TaLaS in blue, and our runs in orange with their agent steps."""
    page, runs, episodes = (read(results / name) for name in ("published_returns.csv", "runs.csv", "evaluations.csv"))
    tasks = list(dict.fromkeys(row["task"] for row in page))
    figure, grid = plt.subplots(2, 4, figsize=(13, 5.5))
    for task, axes in zip(tasks, grid.flat, strict=True):
        shown = [
            (row["method"], float(row["mean_return"]), "tab:blue" if row["method"] == "TaLaS" else "0.7")
            for row in page
            if row["task"] == task and row["setting"] == "video_hard"
        ]
        ours = defaultdict(lambda: defaultdict(list))  # of a method at a budget, by commit, each run's mean
        for run in (run for run in runs if run["env"] == task):
            returns = [float(row["return"]) for row in episodes if (row["run"], row["setting"]) == (run["run"], "video_hard")]
            if returns:
                what = METHODS[run["method"]], int(run["agent_steps"]), run["action_repeat"], run["segmenter"]
                ours[what][run["commit"]].append(np.mean(returns))
        for (method, steps, repeat, segmenter), runs_of in ours.items():
            method += f" ×{repeat}" * (int(repeat) != task_row(task).repeat) + f" ({segmenter})" * (segmenter not in ("sim", "none"))
            for commit, means in runs_of.items():
                which = f" ({commit})" * (len(runs_of) > 1) + f", {len(means)} runs" * (len(means) > 1)
                shown.append((f"ours: {method}, {steps / 1000:g}k{which}", float(np.mean(means)), "tab:orange"))
        names, values, colours = zip(*shown, strict=True)
        axes.barh(names, values, color=colours)
        axes.invert_yaxis()
        axes.tick_params(labelsize=6)
        axes.set_title(task, fontsize=8)
    figure.suptitle("video_hard returns: the page's (grey, its TaLaS blue) and ours (orange; agent steps; masks are privileged)", fontsize=9)
    figure.tight_layout()
    figure.savefig(results / "returns.png", dpi=130)
    plt.close(figure)


def maps(path: Path) -> None:
    """<path>.png: a t-SNE map per run, a colour per state."""
    runs = defaultdict(list)
    for row in read(path):
        runs[row["run"], row["setting"], row["tightness"]].append((float(row["x"]), float(row["y"]), int(row["state"])))
    figure, grid = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 4), squeeze=False)
    for ((run, setting, tightness), points), axes in zip(runs.items(), grid.flat, strict=True):
        x, y, state = zip(*points, strict=True)
        axes.scatter(x, y, c=state, cmap="tab10", s=8)
        states = len(set(state))
        shown = f"{states} states, {len(points) // states} backgrounds of {setting}"
        axes.set_title(f"{run}: within / between {float(tightness):.2f}\n({shown})", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(figure)


def main(args: Args) -> None:
    results, drawn = Path(args.results), []
    if missing := [name for name in ("published_returns.csv", "runs.csv", "evaluations.csv") if not (results / name).is_file()]:
        raise UserError(f"{results}/{missing[0]}: no such file; --results is a folder like results/")
    for path in sorted(results.glob("*.csv")):
        head = path.read_text().partition("\n")[0]
        if head.split(",") == HEADER:
            draw(path)
        elif head.endswith("state,background,x,y"):
            maps(path)
        else:
            continue
        drawn.append(str(path.with_suffix(".png")))
    bars(results)
    print(f"written: {', '.join([*drawn, str(results / 'returns.png')])}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
