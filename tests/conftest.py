"""Real MuJoCo and real files throughout. Media come from the environment variables; a test that needs some that are not set is skipped."""

import importlib
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # whatever the machine has, what is tested is the CPU's
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # as envs.py does: a test may import MuJoCo before it
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: threads that wait for one another on a busy core cost many times what they bring
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Torch's threads and whether it is deterministic are as they were, and no test plays in an environment that another one has changed."""
    import torch

    import talas_asymmetric_sac as rl
    import talas_phase1 as phase1

    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    for once in (rl.make_env_once, rl.load_agent_once, phase1.make_env_once):
        once.cache_clear()


def media(variable, what):
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"set {variable} to {what}")
    return folder


@pytest.fixture
def distractors():
    return media("TALAS_DISTRACTORS", "a folder in DMControl-GB's layout (video_easy/, video_hard/, color_easy.pt, color_hard.pt)")


@pytest.fixture
def overlay_folder():
    return media("TALAS_OVERLAY", "a folder of photographs")


@pytest.fixture
def menagerie():
    return media("MENAGERIE_ROOT", "a folder that holds MuJoCo Menagerie's unitree_a1/")


@pytest.fixture
def make(request):
    """envs.make_env, closing what it made when the test ends; skips an A1 task where there is no A1."""
    import envs

    made = []

    def make_env(env_id, *args, **kwargs):
        if env_id.startswith("unitree"):
            request.getfixturevalue("menagerie")
        made.append(envs.make_env(env_id, *args, **kwargs))
        return made[-1]

    yield make_env
    for env in made:
        env.close()


@pytest.fixture
def one_thread():
    """As a worker has: two add up in another order, and over an episode the last bits grow. nothing_is_left_behind sets it back."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(script, *args): what it raises, in this process: one line, which its end prints. Nothing is left of a run that never was."""
    import tyro
    from commands import RL, SMALL

    import envs
    import talas_asymmetric_sac as rl

    monkeypatch.chdir(tmp_path)
    for name in ("TALAS_DISTRACTORS", "TALAS_OVERLAY"):
        monkeypatch.delenv(name, raising=False)

    def call(script, *args):
        module = importlib.import_module(script)
        with pytest.raises((envs.UserError, OSError)) as error:
            module.main(*rl.read_args([*SMALL, *args])) if script == RL else module.main(tyro.cli(module.Args, args=args))
        assert "\n" not in str(error.value) and not list(tmp_path.glob("runs/*__*"))
        return str(error.value)

    return call
