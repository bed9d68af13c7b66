"""Write the tables of results/README.md, and the masks' on the front page, each between its two marks, from the committed CSVs: the maskers' IoU; the
page's returns beside ours, what its own tables say when they are counted, and where each of our figures comes from. Trains and evaluates nothing.

python benchmarks/tables.py
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.evaluate import interval, read
from envs import SETTINGS, TASKS, Augmentation, UserError, task_row

BEGIN, END = "<!-- benchmarks/tables.py writes the {} from here -->", "<!-- to here -->"
DMC = ("cartpole_swingup", "walker_walk", "walker_stand", "ball_in_cup_catch", "finger_spin", "cheetah_run")
UNITREE = ("unitree_walk", "unitree_stand")
SHOWN = ("train", "procedural", "video_easy", "video_hard")
MASK_SETTINGS = ("clean", "overlay", "procedural", "video_easy", "video_hard")
COMPARED = ("clean", "overlay", "procedural", "video_hard")  # of students of the three augmentations
METHODS = {  # the README's ablations, with their names in the tables
    "talas": "TaLaS, overlay",
    "talas_mix": "TaLaS, mix",
    "symmetric": "symmetric TaLaS",
    "symmetric_mix": "symmetric TaLaS, mix",
    "teacher": "TaLaS without Phase II",
    "teacher_mix": "TaLaS without Phase II, mix",
    "figure2": "TaLaS of Figure 2",
    "figure2_mix": "TaLaS of Figure 2, mix",
    "sada": "SADA's update",
    "svea": "SVEA's update",
    "sac": "SAC",
    "other": "other flags",
}


@dataclass
class Args:
    results: str = "results"
    """holds masks.csv, published_returns.csv, runs.csv, evaluations.csv and a README.md that the tables go into, as does the one above it"""


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def maskers(rows: list[dict[str, str]], brief: bool = False) -> str:
    """IoU (with a pixel of tolerance) of each task's teacher and student on the test frames; what the student keeps of its teacher's clean IoU; and
    students of the three augmentations beside one another.

    Brief, for the front page: a row per task, of the teacher the clean IoU only.
    """
    cells = {(row["env"], row["augmentation"], row["figure"]): float(row["value"]) for row in rows}
    about = {(row["env"], row["augmentation"]): [row["seconds"], row["commit"]] for row in rows}

    def shown(env: str, masker: str) -> list[str]:
        pairs = [[cells.get((env, masker, f"{kind}/{setting}")) for kind in ("iou", "iou_1px")] for setting in MASK_SETTINGS]
        return [f"{iou:.3f} ({iou_1px:.3f})" if iou is not None else "" for iou, iou_1px in pairs]  # without media there are no videos

    teachers, students, full = "", "mix", []  # a teacher has no augmentation
    tasks = sorted({env for env, _ in about}, key=lambda env: (list(TASKS).index(env) if env in TASKS else len(TASKS), env))
    if brief:
        head = ["IoU (with one pixel of tolerance)", "teacher, clean", "student, clean", *MASK_SETTINGS[1:]]
        return table(head, [[f"`{env}`", shown(env, teachers)[0], *shown(env, students)] for env in tasks])
    for env in tasks:
        hard = cells.get((env, students, "iou/video_hard"))
        kept = f"{hard / cells[env, teachers, 'iou/clean']:.3f}" if hard is not None else ""
        full.append([f"`{env}`", "teacher", *shown(env, teachers), "", *about[env, teachers]])
        full.append(["", "student", *shown(env, students), kept, *about[env, students]])
    by_augmentation, augmentations = [], [name for name in get_args(Augmentation) if any((env, name) in about for env in tasks)]
    for env in (env for env in tasks if any((env, name) in about for name in augmentations if name != students)):
        ious = [[cells.get((env, name, f"iou/{setting}")) for setting in COMPARED] for name in augmentations]
        by_augmentation.append([f"`{env}`", *(" / ".join(f"{iou:.3f}" for iou in own if iou is not None) for own in ious)])
    return f"""{table(["task", "masker", *MASK_SETTINGS, "video_hard over the teacher's clean", "seconds", "commit"], full)}

### By augmentation

Students of one teacher, `python talas_phase2.py --env <env> --augmentation <name> --maskers runs/maskers_<name>/<env>`: IoU {" / ".join(COMPARED)}.

{table(["task", *augmentations], by_augmentation)}"""


def published(page: list[dict[str, str]], tasks: tuple[str, ...]) -> str:
    """The page's returns, video_easy / video_hard, with means over the tasks and the drop between them."""
    cells = {(row["task"], row["setting"], row["method"]): float(row["mean_return"]) for row in page if row["task"] in tasks}
    methods = list(dict.fromkeys(method for _, _, method in cells))
    rows = [[f"`{task}`", *(f"{cells[task, 'video_easy', m]:g} / {cells[task, 'video_hard', m]:g}" for m in methods)] for task in tasks]
    easy, hard = ({m: np.mean([cells[task, s, m] for task in tasks]) for m in methods} for s in ("video_easy", "video_hard"))
    rows.append(["mean", *(f"{easy[m]:.1f} / {hard[m]:.1f}" for m in methods)])
    rows.append(["drop", *(f"{1 - hard[m] / easy[m]:.1%}" for m in methods)])
    return table(["task", *methods], rows)


def floors(rows: list[dict[str, str]], page: list[dict[str, str]]) -> str:
    """Returns without learning, ± their deviation over episodes, and the page's lowest and TaLaS's, video_easy / video_hard."""
    cells = []
    for task in dict.fromkeys(row["env"] for row in rows):
        own = [np.array([float(row["return"]) for row in rows if (row["env"], row["policy"]) == (task, policy)]) for policy in ("zeros", "random")]
        theirs = [
            {row["method"]: float(row["mean_return"]) for row in page if (row["task"], row["setting"]) == (task, setting)}
            for setting in ("video_easy", "video_hard")
        ]
        lowest, talas = (" / ".join(f"{of(returns):g}" for returns in theirs if returns) for of in (lambda r: min(r.values()), lambda r: r["TaLaS"]))
        cells.append([f"`{task}`", *(f"{returns.mean():.1f} ± {returns.std():.1f}" for returns in own), lowest, talas])
    return table(["task", "zeros", "random actions", "the page's lowest", "the page's TaLaS"], cells)


def firsts(page: list[dict[str, str]]) -> str:
    """How often TaLaS has the highest return of a task and setting, by the page's tables."""
    columns = defaultdict(dict)
    for row in page:
        columns[row["task"], row["setting"]][row["method"]] = float(row["mean_return"])
    won = [key for key, returns in columns.items() if key[0] in DMC and max(returns, key=lambda method: returns[method]) == "TaLaS"]
    return f"{len(won)} of {len([key for key in columns if key[0] in DMC])} ({', '.join(f'`{task}` {setting}' for task, setting in won)})"


def played_in(episodes: list[dict[str, str]]) -> list[str]:
    """The tables' settings: those that are always shown, and the colours, if any agent was evaluated in them."""
    return [*SHOWN, *(setting for setting in SETTINGS if setting not in SHOWN and any(row["setting"] == setting for row in episodes))]


def ours(runs: list[dict[str, str]], episodes: list[dict[str, str]], page: list[dict[str, str]]) -> str:
    """A row per agent: mean return, its 95% interval over episodes, their number, Adroit's success rate; the drops; the page's TaLaS and its best."""
    rows = []
    for run in sorted(runs, key=lambda run: (run["env"], -int(run["agent_steps"]), list(METHODS).index(run["method"]), int(run["seed"]))):
        steps = f"{int(run['agent_steps']):,} × {run['action_repeat']}"
        cells, means = [f"`{run['env']}`", METHODS[run["method"]], run["seed"], f"`{run['commit']}`", steps], {}
        for setting in played_in(episodes):
            played = [row for row in episodes if (row["run"], row["setting"]) == (run["run"], setting)]
            returns, success = (np.array([float(row[key]) for row in played]) for key in ("return", "success"))
            cell = ""
            if played:
                low, high = interval(returns)
                means[setting] = returns.mean()
                cell = f"{number(returns.mean())} ({number(low)} to {number(high)}; {len(returns)})"
                cell += "" if np.isnan(success).any() else f", success {success.mean():.0%}"
            cells.append(cell)
        for easy, hard in (("train", "video_hard"), ("video_easy", "video_hard")):  # of a return that is no gain, no share can be lost
            cells.append(f"{1 - means[hard] / means[easy]:.1%}" if {easy, hard} <= means.keys() and means[easy] > 0 else "")
        for setting in ("video_easy", "video_hard"):
            said = {row["method"]: float(row["mean_return"]) for row in page if (row["task"], row["setting"]) == (run["env"], setting)}
            cells.append(f"{said['TaLaS']:g} / {max(said.values()):g}" if said else "")
        rows.append(cells)
    head = ["task", "method", "seed", "commit", "agent steps × repeat", *played_in(episodes), "drop from train", "from easy"]
    return table([*head, "page, easy: TaLaS / best", "page, hard: TaLaS / best"], rows)


def masks(runs: list[dict[str, str]], episodes: list[dict[str, str]]) -> str:
    """Of masked agents, the IoU of the masks with the simulator's, on the frames of the very episodes above."""
    rows = []
    for run in runs:
        cells = []
        for setting in played_in(episodes):
            pairs = [(float(row["iou"]), float(row["iou_1px"])) for row in episodes if (row["run"], row["setting"]) == (run["run"], setting)]
            iou, iou_1px = np.mean(pairs, 0) if pairs else (np.nan, np.nan)
            cells.append("" if np.isnan(iou) else f"{iou:.3f} ({iou_1px:.3f})")
        if any(cells):
            rows.append([f"`{run['env']}`", METHODS[run["method"]], run["seed"], f"`{run['commit']}`", *cells])
    return table(["task", "method", "seed", "commit", *played_in(episodes)], rows)


def sources(runs: list[dict[str, str]], episodes: list[dict[str, str]]) -> str:
    """Where each agent comes from."""
    rows = []
    for run in runs:
        counts = {setting: sum((row["run"], row["setting"]) == (run["run"], setting) for row in episodes) for setting in played_in(episodes)}
        played = ", ".join(f"{setting} {count}" for setting, count in counts.items() if count)
        played += f"; {skipped} videos that could not be decoded left out" if (skipped := int(run.get("videos_skipped") or 0)) else ""
        seconds = float(run["seconds"] or 0)
        taken = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds else ""
        about = [f"`{run['env']}`", METHODS[run["method"]], run["seed"], f"`{run['commit']}`", run["machine"], run["precision"], taken]
        rows.append([*about, run["segmenter"], played, f"`{run['command']}`"])
    return table(["task", "method", "seed", "commit", "machine", "precision", "wall time", "masks", "episodes", "command"], rows)


def aggregates(runs: list[dict[str, str]], episodes: list[dict[str, str]]) -> str:
    """Interquartile means over tasks and seeds, with stratified bootstrap intervals, of methods with three seeds or more on two tasks or more.

    rliable would be the library for it; its dependency arch 7.2.0 cannot be imported beside the pandas that it is installed with.
    """
    # by method, segmenter and agent steps; by task and action repeat; by seed, which may have several runs
    scores = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in runs:
        returns = [float(row["return"]) for row in episodes if (row["run"], row["setting"]) == (run["run"], "video_hard")]
        if returns and task_row(run["env"]).loader == "suite":
            scores[run["method"], run["segmenter"], int(run["agent_steps"])][run["env"], run["action_repeat"]][run["seed"]].append(np.mean(returns))
    means = {key: {task: {seed: np.mean(own) for seed, own in seeds.items()} for task, seeds in tasks.items()} for key, tasks in scores.items()}
    scores = {key: {task: seeds for task, seeds in tasks.items() if len(seeds) > 2} for key, tasks in means.items()}
    enough = {key: tasks for key, tasks in scores.items() if len({env for env, _ in tasks}) > 1}
    if not enough:
        return "No aggregates yet: they take three seeds on two tasks."
    rows, rng = [], np.random.default_rng(0)
    for (method, segmenter, steps), tasks in enough.items():
        resampled = [np.concatenate([rng.choice([*means.values()], len(means)) for means in tasks.values()]) for _ in range(5000)]  # within tasks
        low, high = np.percentile(stats.trim_mean(resampled, 0.25, axis=1), (2.5, 97.5))
        centre = stats.trim_mean([mean for means in tasks.values() for mean in means.values()], 0.25)
        seeds = ", ".join(f"{env} {len(means)}" for (env, _), means in tasks.items())
        rows.append([METHODS[method], segmenter, f"{steps:,}", seeds, f"{centre:.0f}", f"{low:.0f} to {high:.0f}"])
    return table(["method", "masks", "agent steps", "seeds by task", "video_hard, interquartile mean", "95% interval"], rows)


def main(args: Args) -> None:
    results = Path(args.results)
    front, own = results.parent / "README.md", results / "README.md"
    names = ("published_returns.csv", "runs.csv", "evaluations.csv", "masks.csv", "floors.csv")
    if missing := [path for path in (front, own, *(results / name for name in names)) if not path.is_file()]:
        raise UserError(
            f"{missing[0]}: no such file; --results is a folder like results/, whose tables are written into its README.md and the one above"
        )
    page, runs, episodes, mask_rows, floor_rows = (read(results / name) for name in names)
    if unknown := {run["method"] for run in runs} - METHODS.keys():
        raise UserError(f"{results}/runs.csv: unknown method {', '.join(unknown)}; give it a name in METHODS")
    returns = f"""### Ours

Undiscounted returns of the mean policy: mean (95% bootstrap interval over episodes; their number). **Where `sim` stands below as the masks' source,
they are the simulator's own, which the page's are not**; a benchmark run has 500,000 agent steps.
One row is one training run: intervals say nothing about other seeds. Cells that have not been run are empty.

{ours(runs, episodes, page)}

IoU (with a pixel of tolerance) of the masks in the same episodes:

{masks(runs, episodes)}

{aggregates(runs, episodes)}

Where they come from:

{sources(runs, episodes)}

### The page's

`published_returns.csv`, video_easy / video_hard; means over tasks and the drop between them, one minus their quotient, are computed here.

{published(page, DMC)}

{published(page, UNITREE)}

By these tables TaLaS has the highest return in {firsts(page)};
the page says 7 of 12. SGQN's mean on Unitree in video_easy is the one above; the page says 332.

### Without learning

Actions that are all zero, and random ones, in this project's tasks, ten episodes each (`python benchmarks/floors.py`; Adroit's divided
as in training); beside them the page's, video_easy / video_hard. With zeros the A1 lies upright on its folded legs, and of the cup's ten balls three
fall into it. What a return says begins above these figures.

{floors(floor_rows, page)}"""
    texts = {path: path.read_text() for path in (front, own)}
    for path, name, tables in ((front, "masks", maskers(mask_rows, brief=True)), (own, "masks", maskers(mask_rows)), (own, "returns", returns)):
        before, begin, rest = texts[path].partition(BEGIN.format(name))
        _, end, after = rest.partition(END)
        if not end:
            raise UserError(f"{path}: has no line {BEGIN.format(name)!r} with a line {END!r} below it, between which the tables go")
        texts[path] = f"{before}{begin}\n\n{tables}\n\n{end}{after}"
    for path, text in texts.items():
        path.write_text(text)
    print(f"written: {front}, {own}, {len(mask_rows)} figures of masks, {len(runs)} runs, {len(episodes)} episodes")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
