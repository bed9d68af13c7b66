"""Starting the scripts as a person does, and reading what they leave."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RL, PHASE1, PHASE2 = "talas_asymmetric_sac", "talas_phase1", "talas_phase2"
SETTINGS = ("train", "video_easy", "video_hard") if os.environ.get("TALAS_DISTRACTORS") else ("train", "procedural")
SMALL = ["--total-timesteps=40", "--hidden-dim=16", "--encoder=small", "--batch-size=4", "--overlay-images=20", "--eval-episodes=1"]
FAMILIES = {"cartpole_swingup": 50, "hammer": 20, "unitree_walk": 100}  # of each a task, with an action repeat that makes episodes short
LENGTHS = {"cartpole_swingup": 20, "hammer": 10, "unitree_walk": 10}  # agent steps per episode at that repeat


def start(script: str, *args: str, cwd: Path, **env: str | None) -> subprocess.Popen:
    # The scripts choose the GL backend. One thread each: several run side by side here, and threads that wait for one another would starve.
    variables = {key: value for key, value in (os.environ | {"MUJOCO_GL": None, "OMP_NUM_THREADS": "1"} | env).items() if value is not None}
    command = [sys.executable, str(ROOT / f"{script}.py"), *args]
    return subprocess.Popen(command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0, timeout: int = 240) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, f"{out}\n{err}"
    return out, err


def run(script: str, *args: str, cwd: Path) -> str:
    return finish(start(script, *args, cwd=cwd))[0]


def mistake(script: str, *args: str, cwd: Path, code: int = 1, **env: str | None) -> str:
    """Run what must fail; check that it fails in one line, and leaves nothing of a run behind; return the line."""
    _, err = finish(start(script, *args, cwd=cwd, **env), code, timeout=120)
    assert "Traceback" not in err
    if code == 1:
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert not list(cwd.glob("runs/*__*")), "a run folder of a run that never was"
    return err


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def metrics(folder: Path) -> dict[str, float]:
    figures = json.loads((folder / "metrics.json").read_text())
    assert all(math.isfinite(value) for value in figures.values())
    return figures


def returns(folder: Path) -> list[dict[str, str]]:
    with (folder / "returns.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for(process: subprocess.Popen, cwd: Path, pattern: str, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not (found := list(cwd.glob(pattern))) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    if not found or process.poll() is not None:
        process.kill()
        raise AssertionError(process.communicate(timeout=60))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
