"""Learning curves of runs, finished or not, as one CSV and one PNG.

python benchmarks/curves.py --runs runs/<run> runs/<run> --labels TaLaS "no masker" --output results/cartpole
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro


@dataclass
class Args:
    runs: tuple[str, ...]
    """run folders"""
    labels: tuple[str, ...]
    """a name for each"""
    output: str
    """writes <output>.csv and <output>.png"""
    window: int = 5
    """episodes in the running mean"""


def main(args: Args) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4))
    with Path(f"{args.output}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "figure", "step", "value"])
        for run, label in zip(args.runs, args.labels, strict=True):
            rows = list(csv.DictReader((Path(run) / "returns.csv").open()))
            steps, returns = ([float(row[key]) for row in rows] for key in ("step", "return"))
            writer.writerows([label, "train_return", row["step"], row["return"]] for row in rows)
            smooth = np.convolve(returns, np.ones(args.window) / args.window, mode="valid")
            line = axes.plot(steps[args.window - 1 :], smooth, alpha=0.6, label=f"{label}: training episodes, mean of {args.window}")[0]
            figures = list(csv.DictReader((Path(run) / "evaluations.csv").open()))
            writer.writerows([label, row["figure"], row["step"], row["value"]] for row in figures)
            settings = dict.fromkeys(row["figure"].split("/")[1] for row in figures if row["figure"].endswith("/return_mean"))
            for setting, style in zip(settings, ("o-", "s--", "^:", "v-", "d--", "*:"), strict=False):
                points = [(float(row["step"]), float(row["value"])) for row in figures if row["figure"] == f"eval/{setting}/return_mean"]
                axes.plot(*zip(*points, strict=True), style, color=line.get_color(), label=f"{label}: mean policy, {setting}")
    axes.set_xlabel("agent steps")
    axes.set_ylabel("episode return")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(f"{args.output}.png", dpi=130)
    print(f"written: {args.output}.csv, {args.output}.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
