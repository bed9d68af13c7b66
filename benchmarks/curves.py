"""Learning curves of runs, finished or not, as one CSV, and its picture.

python benchmarks/curves.py --runs runs/<run> runs/<run> --labels TaLaS "no masker" --output results/cartpole
"""

import csv
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.lines import Line2D

HEADER = ["run", "figure", "step", "value"]


@dataclass
class Args:
    runs: tuple[str, ...]
    """run folders"""
    labels: tuple[str, ...]
    """a name for each"""
    output: str
    """writes <output>.csv and <output>.png"""


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def draw(path: Path) -> None:
    """<path>.png of a CSV that main wrote: training episodes, as a running mean over five, or a fortieth of the longest run's, and evaluations."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    rows, runs, kinds = read(path), {}, {}  # the legend: a colour for each run, a style for each kind of figure
    settings = dict.fromkeys(row["figure"].split("/")[1] for row in rows if row["figure"].endswith("/return_mean"))
    episodes = Counter(row["run"] for row in rows if row["figure"] == "train_return")
    window = max(5, max(episodes.values(), default=0) // 40)
    styles = dict(zip(settings, ("o-", "s--", "^:", "v-", "d--", "*:"), strict=False))
    for i, label in enumerate(dict.fromkeys(row["run"] for row in rows)):
        colour, points = f"C{i}", {}
        for row in rows:
            if row["run"] == label:
                points.setdefault(row["figure"], []).append((float(row["step"]), float(row["value"])))
        steps, returns = np.array(points.pop("train_return", [])).reshape(-1, 2).T
        ends = np.unique(steps)
        w = window if len(steps) >= 2 * window and len(ends) == len(steps) else 1  # of a short run, each episode
        steps, returns = ends, np.array([returns[steps == end].mean() for end in ends])  # of several environments, episodes that end together
        smooth = np.convolve(returns, np.ones(w) / w, mode="valid") if len(steps) else returns
        axes.plot(steps[w - 1 :], smooth, alpha=0.6, color=colour)
        runs[label] = Line2D([], [], color=colour, linewidth=4)
        kinds["training episodes" + f", mean of {w}" * (w > 1)] = Line2D([], [], color="grey")
        for setting, style in styles.items():
            if values := points.get(f"eval/{setting}/return_mean"):
                axes.plot(*zip(*values, strict=True), style, color=colour)
                kinds[f"mean policy, {setting}"] = Line2D([], [], color="grey", linestyle=style[1:], marker=style[0])
    axes.set_xlabel("agent steps")
    axes.set_ylabel("episode return")
    axes.grid(alpha=0.3)
    axes.legend([*runs.values(), *kinds.values()], [*runs, *kinds], fontsize=7)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(figure)


def main(args: Args) -> None:
    if len(args.runs) != len(args.labels):
        sys.exit(f"error: {len(args.runs)} --runs and {len(args.labels)} --labels: give one for each")
    if len(set(args.labels)) < len(args.labels):
        sys.exit("error: two --labels are one; a curve has to have a name of its own")
    if missing := [path for run in args.runs for name in ("returns", "evaluations") if not (path := Path(run) / f"{name}.csv").is_file()]:
        sys.exit(f"error: {missing[0]}: no such file; --runs are folders of talas_asymmetric_sac.py's runs")
    output = Path(f"{args.output}.csv")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for run, label in zip(args.runs, args.labels, strict=True):
            writer.writerows([label, "train_return", row["step"], row["return"]] for row in read(Path(run) / "returns.csv"))
            writer.writerows([label, row["figure"], row["step"], row["value"]] for row in read(Path(run) / "evaluations.csv"))
    draw(output)
    print(f"written: {output}, {output.with_suffix('.png')}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
