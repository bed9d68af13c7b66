"""Real MuJoCo and real files throughout. Media come from the environment variables; a test that needs some that are not set is skipped."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # as envs.py does: a test may import MuJoCo before it
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: threads that wait for one another on a busy core cost many times what they bring
    os.environ.setdefault("OMP_NUM_THREADS", "1")


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
