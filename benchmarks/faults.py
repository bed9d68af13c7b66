"""What long runs have to survive, on a real one: random SIGKILLs, and a soak in which nothing may grow. Linux; some twenty minutes on two cores.

    python benchmarks/faults.py                     both
    python benchmarks/faults.py --soak-steps 0      the kills alone

A short cartpole training is killed at random moments, every third time while it writes a checkpoint, and started again with `--resume auto`; its
weights, tables and evaluation have to be those of a run that nobody touched, bit for bit. The soak samples resident memory, file descriptors and
child processes of a long run with a small replay. Writes <output>/faults.json; exits with 1 if either fails.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import envs

SCRIPT = str(Path(__file__).parents[1] / "talas_asymmetric_sac.py")
CHEAP = [
    "--env=cartpole_swingup",
    "--masker=none",
    "--encoder=small",
    "--hidden-dim=16",
    "--batch-size=8",
    "--overlay-images=20",
    "--eval-episodes=1",
]
CHEAP += ["--eval-settings", "train", "--torch-deterministic"]


@dataclass
class Args:
    kills: int = 30  # SIGKILLs; 0: leave them out
    kill_steps: int = 4000  # agent steps of the run that is killed
    soak_steps: int = 30_000  # agent steps of the soak; 0: leave it out
    soak_replay: int = 5000  # frames that its replay keeps
    seed: int = 0  # seeds the moments
    output: str = "results"  # folder of the report


def start(cwd: Path, *flags: str) -> subprocess.Popen:
    media = {key: os.path.abspath(folder) for key in ("TALAS_DISTRACTORS", "TALAS_OVERLAY") if (folder := os.environ.get(key))}
    options = {"cwd": cwd, "env": os.environ | media, "preexec_fn": envs.end_with_parent, "text": True}
    return subprocess.Popen([sys.executable, SCRIPT, *CHEAP, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, float], list[dict[str, str]], str]:
    """All of a finished run that should not depend on what happened to it on the way."""
    weights = torch.load(run / "checkpoint.pt", weights_only=True)["weights"]
    figures = {key: value for key, value in json.loads((run / "metrics.json").read_text()).items() if key != "train/seconds"}
    with (run / "returns.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    return weights, figures, rows, (run / "evaluations.csv").read_text()


def kill(args: Args, folder: Path) -> dict[str, float]:
    """Kill a run at random moments, and compare it with an untouched one."""
    flags = ["--action-repeat=50", f"--total-timesteps={args.kill_steps}", "--learning-starts=100", "--checkpoint-every=40", "--eval-every=500"]
    whole = start(folder, *flags, "--exp-name=whole")
    chance, result = random.Random(args.seed), {"kills": 0, "kills/while a checkpoint was written": 0, "kills/before the first checkpoint": 0}
    out = whole.communicate()[0]
    if whole.returncode:
        raise SystemExit(f"error: the run that nobody kills ended with exit code {whole.returncode}\n{out[-2000:]}")
    bar = tqdm(total=args.kills, unit="kill")
    while result["kills"] < args.kills:
        process, began = start(folder, *flags, "--exp-name=pieces", "--resume=auto"), time.time()
        patience, writing = chance.uniform(2, 20), False
        while process.poll() is None and time.time() - began < patience + (30 if result["kills"] % 3 == 0 else 0):
            # Every third time the moment is one at which a file of a checkpoint lies there half written.
            half_written = folder.glob(f"runs/*pieces*/resume/.{process.pid}-*")
            writing = result["kills"] % 3 == 0 and time.time() - began > patience / 2 and any(half_written)
            if writing:
                break
            time.sleep(0.001)
        process.kill()
        out = process.communicate()[0]
        if process.returncode == 0:
            print(f"\nthe run came to its end after {result['kills']} kills; more of them take more --kill-steps")
            break
        if process.returncode != -9:
            raise SystemExit(f"error: after {result['kills']} kills the run ended with exit code {process.returncode}\n{out[-2000:]}")
        result["kills"] += 1
        result["kills/while a checkpoint was written"] += writing
        result["kills/before the first checkpoint"] += not list(folder.glob("runs/*pieces*/resume/[0-9]*.state.pt"))
        bar.update()
    bar.close()
    last = start(folder, *flags, "--exp-name=pieces", "--resume=auto")
    out = last.communicate()[0]
    runs = [next(folder.glob(f"runs/*{name}*")) for name in ("whole", "pieces")]
    a, b = map(outcome, runs) if last.returncode == 0 else (out, None)
    same = b is not None and all(torch.equal(a[0][key], b[0][key]) for key in a[0]) and a[1:] == b[1:]
    return result | {"kills/run folders": len(list(folder.glob("runs/*pieces*"))), "kills/end as if nothing had happened": float(same)}


def sample(pid: int) -> tuple[int, int, int]:
    """Resident KB, open file descriptors and processes of a process and its children."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    resident = sum(int(Path(f"/proc/{p}/status").read_text().split("VmRSS:")[1].split()[0]) for p in (pid, *children))
    return resident, sum(len(list(Path(f"/proc/{p}/fd").iterdir())) for p in (pid, *children)), 1 + len(children)


def soak(args: Args, folder: Path) -> dict[str, float]:
    """Sample a long run from when its replay is full: how much of its memory, descriptors and processes the last quarter has over the first."""
    flags = [
        f"--total-timesteps={args.soak_steps}",
        f"--replay-size={args.soak_replay}",
        "--checkpoint-every=1000",
        f"--eval-every={args.soak_steps}",
    ]
    process, samples, step = start(folder, *flags, "--exp-name=soak"), [], 0
    bar = tqdm(total=args.soak_steps, unit="step")
    while process.poll() is None and step < args.soak_steps - 200:  # the evaluation at the end has processes of its own
        time.sleep(2)
        for table in folder.glob("runs/*soak*/returns.csv"):
            rows = table.read_text().splitlines()
            step = int(rows[-1].split(",")[0]) if len(rows) > 1 else 0
        if process.poll() is None and step > 1.2 * args.soak_replay:
            samples.append(sample(process.pid))
        bar.update(step - bar.n)
    bar.close()
    out = process.communicate()[0]
    if process.returncode or len(samples) < 8:
        raise SystemExit(f"error: the soak ended with exit code {process.returncode} and {len(samples)} samples\n{out[-2000:]}")
    quarter, table = len(samples) // 4, np.array(samples, float)
    growth = np.median(table[-quarter:], 0) / np.median(table[:quarter], 0)
    names = ("resident memory", "file descriptors", "processes")
    figures = {f"soak/{name}, last quarter over first": value for name, value in zip(names, growth.tolist(), strict=True)}
    return figures | {"soak/samples": len(samples), "soak/resident MB": float(np.median(table[:, 0]) / 1024), "soak/steps": args.soak_steps}


def main(args: Args) -> None:
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            result |= kill(args, Path(folder))
        if args.soak_steps:
            result |= soak(args, Path(folder))
    for key, value in result.items():
        print(f"{key:<52}{value:10.3f}")
    path = Path(args.output) / "faults.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {}  # the half that was not run now stays
    envs.write_json(path, before | result)
    print(f"written: {path}")
    grown = [key for key, value in result.items() if "over first" in key and abs(value - 1) > 0.02]
    if grown or not result.get("kills/end as if nothing had happened", 1):
        sys.exit(f"error: {', '.join(grown) or 'the killed run ended otherwise than the whole one'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is under way ends with this process; the temporary folder goes
    main(tyro.cli(Args, description=__doc__))
