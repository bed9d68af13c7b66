"""Train tasks × variants × seeds side by side on one machine, within limits of processes and memory, and collect their figures in one table.

    python benchmarks/train_all.py --envs walker_walk walker_stand --seeds 1 2 --variants talas sada --jobs 4 --flags="--total-timesteps 100000"

Each masker is made first, once; if that fails, nothing is trained. Start the same command after an interruption: what has finished is not run again,
and what was interrupted goes on from its last checkpoint. A run that fails is reported, and the others go on. Logs, one a run, go to runs/train_all/;
the table, from every run's metrics.json, to <output>.
"""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import talas_asymmetric_sac as talas
from envs import UserError, cores, end_with_parent, resolve_env_id, write_whole

ROOT = Path(__file__).parents[1]
VARIANTS = {  # the README's ablations
    "talas": "",
    "talas_mix": "--augmentation mix",
    "symmetric": "--actor-judge own",
    "symmetric_mix": "--actor-judge own --augmentation mix",
    "teacher": "--masker teacher",
    "teacher_mix": "--masker teacher --augmentation mix",
    "figure2": "--clean-masker teacher",
    "figure2_mix": "--clean-masker teacher --augmentation mix",
    "sada": "--masker none",
    "svea": "--masker none --actor-views clean",
    "sac": "--masker none --actor-views clean --critic-views clean",
}


@dataclass
class Args:
    envs: tuple[str, ...]
    """tasks"""
    seeds: tuple[int, ...] = (1,)  # a run for each task and variant
    variants: tuple[str, ...] = ("talas",)  # talas, talas_mix, symmetric, symmetric_mix, teacher, teacher_mix, figure2, figure2_mix, sada, svea, sac
    flags: str = ""  # what every run is given besides, as one string with an equals sign: --flags="--total-timesteps 100000 --encoder small"
    name: str = ""  # goes before the variant in runs' names, so that another sweep's runs, with other flags, are told apart: small_talas, ...
    jobs: int = 2  # runs at a time; each computes with an equal share of the cores, but for its evaluations
    memory: float | None = None  # GB that all runs may take together; by default what is free
    memory_per_run: float | None = None
    """GB that one is expected to take; by default its replay, if that is not a GPU's, 1.5, and 0.5 a core while it evaluates"""
    output: str = "results/train_all.csv"  # the table; rows of other runs stay in it


def finished(run: talas.Args) -> Path | None:
    """The metrics.json of a run that was given these arguments and came to its end."""
    folder = talas.find_run(run)
    return folder / "metrics.json" if folder and (folder / "metrics.json").is_file() else None


def main(args: Args) -> None:
    if unknown := set(args.variants) - VARIANTS.keys():
        raise UserError(f"unknown --variants {', '.join(unknown)}")
    if args.jobs < 1 or not (args.envs and args.seeds and args.variants):
        raise UserError("nothing to train: --envs, --seeds, --variants and --jobs have to be at least one")
    if "/" in args.name:
        raise UserError(f"--name {args.name!r}: is a part of a folder's name, so it has no /")
    args.envs = tuple(resolve_env_id(env_id) for env_id in args.envs)
    logs = Path("runs/train_all")
    logs.mkdir(parents=True, exist_ok=True)
    waiting, rows, failed = [], [], []
    for env_id, variant, seed in ((e, v, s) for s in args.seeds for e in args.envs for v in args.variants):
        own = [f"--env={env_id}", f"--seed={seed}", f"--exp-name={args.name}{variant}", "--resume=auto"]
        flags = own + shlex.split(VARIANTS[variant]) + shlex.split(args.flags)
        rows.append((env_id, variant, seed, flags, tyro.cli(talas.Args, args=flags)))
        name = f"{env_id}__{args.name}{variant}__{seed}"
        if finished(rows[-1][-1]):
            print(f"{name}: finished before")
        else:
            waiting.append((name, flags, rows[-1][-1]))
    run = rows[-1][-1]  # --flags are every run's
    replay = min(run.replay_size, run.total_timesteps) * 28.3e-6  # GB: a frame and its mask
    gpu = torch.cuda.is_available() and run.device != "cpu"
    each = args.memory_per_run or 1.5 + 0.5 * min(cores(), 16) + (0 if gpu else replay)
    memory = args.memory or talas.free_memory(torch.device("cpu"))
    room = talas.free_memory(torch.device("cuda" if run.device == "auto" else run.device)) if gpu else math.inf
    fit = min(memory / each, room / (replay + 3))  # 3 GB: networks, a batch, CUDA itself
    if waiting and fit < 1:
        raise UserError(
            f"one run is expected to take {each:.1f} GB of {memory:.1f}"
            + f", {replay + 3:.1f} of the GPU's" * gpu
            + "; give it a smaller --replay-size in --flags"
        )

    for *_, run in waiting:
        for masker in {run.masker, run.clean_masker or run.masker} - {"none"}:
            talas.find_masker(run, masker)  # one after the other, with all cores; here only to have them

    at_once = max(1, min(args.jobs, int(fit), len(waiting)))
    print(f"{len(waiting)} runs, {at_once} at a time" + f": more than {int(fit)} would not fit in memory, at {each:.1f} GB each" * (fit < args.jobs))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // at_once))}
    running: dict[str, subprocess.Popen] = {}
    bar = tqdm(total=len(waiting), unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, flags, _ = waiting.pop(0)
                command = [sys.executable, str(ROOT / "talas_asymmetric_sac.py"), *flags]
                with (logs / f"{name}.log").open("w") as log:
                    running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=end_with_parent)
            time.sleep(1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    bar.update()
                    if process.returncode:
                        failed.append(name)
                        bar.write(f"{name}: failed with exit code {process.returncode}; see {logs}/{name}.log")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()  # it ends its workers
        bar.close()

    output = Path(args.output)
    table = [["env", "variant", "seed", "figure", "value"], *(list(csv.reader(output.read_text().splitlines()))[1:] if output.is_file() else [])]
    for env_id, variant, seed, _, run in rows:
        if metrics := finished(run):
            key = [env_id, args.name + variant, str(seed)]
            table = [row for row in table if row[:3] != key]
            table += [[*key, figure, f"{value:.10g}"] for figure, value in json.loads(metrics.read_text()).items()]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, lambda path: path.write_text("".join(f"{','.join(row)}\n" for row in table)))
    print(f"written: {args.output}")
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where the runs' last checkpoints left them")
        sys.exit(130)
