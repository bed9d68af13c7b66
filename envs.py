"""Everything that the three TaLaS scripts share: files and processes, tasks, visual settings, simulator masks, photographs and augmentations.

env = make_env("walker_walk", "video_hard", seed=1, distractors="distractors/")    # a gymnasium.Env
obs, info = env.reset(options={"episode": 3})       # {"pixels": (9, 84, 84) uint8, "proprio": (P,) float32}
mask = env.unwrapped.segment("the walker")          # (84, 84) bool, the simulator's own, of the frame just rendered

python envs.py                  lists the tasks
python envs.py --env hammer     writes a picture of that task under every setting, with its mask
"""

import atexit
import contextlib
import ctypes
import difflib
import fnmatch
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import urllib.error
import urllib.request
import warnings
import weakref
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial, reduce
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display; has to be set before MuJoCo is imported
try:
    import mujoco
except Exception as error:  # PyOpenGL fails in many ways when there is no EGL, so nothing narrower would do
    gl = os.environ.get("MUJOCO_GL")
    sys.exit(f"error: MuJoCo cannot start with MUJOCO_GL={gl} ({error}): unset it; on Debian or Ubuntu apt-get install libegl1 libgl1")

import cv2
import gymnasium as gym
import imageio.v2 as imageio
import mujoco_menagerie
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import tyro
from dm_control import suite
from dm_control.suite import common
from dm_control.utils import rewards

# MuJoCo deprecates what some of the suite's models say, and tells in every process; no user can mend that.
logging.getLogger("absl").addFilter(lambda record: "deprecated" not in record.getMessage())

Setting = Literal["train", "color_easy", "color_hard", "video_easy", "video_hard", "procedural"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)


class UserError(ValueError):
    """Something that the person at the keyboard can mend. The scripts print it as one line and exit with 1."""


def check_flags(args: Any, **least: float) -> None:
    """Raises UserError for a number that makes no sense (by default, whole ones are at least 1, others at least 0), or an --exp-name with a /."""
    if Path(args.exp_name).name != args.exp_name:
        raise UserError(f"--exp-name {args.exp_name!r}: is a part of a folder's name, so it has no /")
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            low = least.get(name, 0 if name == "seed" or isinstance(value, float) else 1)
            high = {"gamma": 1, "tau": 1, "seed": 2**31 - 1}.get(name, 1e9)
            if not low <= value <= high:  # NaN is neither
                raise UserError(f"--{name.replace('_', '-')} {value}: has to be a number from {low:,} to {high:,.0f}")


def set_up_torch(name: str, seed: int, deterministic: bool) -> tuple[torch.device, bool]:
    """Seed torch; the device called `name` (auto: a GPU if there is one), and whether bf16 is fast on it. Raises UserError if it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from None
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current one
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's part in it
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        # Keep freed tensors' pages: by default each step hands them back and pays for fresh ones, a tenth (bf16) to half (fp32) of an update's time.
        # M_MMAP_THRESHOLD 1 GB, M_TRIM_THRESHOLD never, M_TOP_PAD 64 MB. Where an old glibc refuses the first, all() leaves out the other two, which
        # alone would fix that threshold at 128 KB and so have every tensor mapped anew.
        all(ctypes.CDLL(None).mallopt(*option) for option in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 26)))
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: costs a tenth of the time, and all of replay's memory at once
    return device, (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16())


# Files and processes. What is written is there whole or not at all; what is read is data, never code; who is started ends with who started it.
VERSION, FORMAT = "0.8.0", 3  # this project's, and that of its maskers and checkpoints


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file under a temporary name, put it onto the disk and rename it. Raises OSError, and leaves nothing, where that fails."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # the suffix stays: numpy and ffmpeg go by it
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save's RuntimeError does not say why; of the temporary file's name nobody has heard
        why = "is the disk full?" if isinstance(error, RuntimeError) else error.strerror or error
        raise OSError(f"{why}: '{path}'") from error
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, as a rule; or its folder is a file
            temporary.unlink()


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, partial(torch.save, {**content, "format": FORMAT, "version": VERSION}))


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, partial(Path.write_text, data=json.dumps(content, indent=2)))


def write_image(path: Path, image: np.ndarray) -> None:
    """BGR or grey, uint8, in the format that the suffix names. cv2.imwrite says nothing when a disk is full."""
    write_whole(path, partial(Path.write_bytes, data=cv2.imencode(path.suffix, image)[1]))


def write_film(path: Path, frames: list[np.ndarray]) -> None:
    """mp4 of (H, W, 3) uint8 frames, 25 a second."""

    def encode(temporary: Path) -> None:
        try:
            imageio.mimwrite(temporary, frames, fps=25, macro_block_size=None)
        except Exception as error:  # an ffmpeg that is missing or broken fails in many ways
            raise OSError(f"by ffmpeg, {brief(error)}") from None

    write_whole(path, encode)


def load_plain(path: Path) -> Any:
    """torch.load on the CPU, of plain data: no code is run, and checksums are compared, which torch does not. Raises whatever damage leads to."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"damaged at {damaged}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("damaged, or more than plain data, which is never loaded") from None


def load_tensors(path: Path) -> dict[str, Any]:
    """What save_tensors wrote. Raises ValueError for another format, and whatever damage leads to."""
    content = load_plain(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"its format is {content.get('format')}, of TaLaS {content.get('version')}; here it is {FORMAT}, of TaLaS {VERSION}")
    return content


def brief(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def end_with_parent() -> None:
    """In a process just started: be killed when the one that started it ends, SIGKILL included. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def start_worker() -> None:
    """What a worker process begins with: one thread, as others keep the cores busy, and no ear for Ctrl-C, which is for its parent."""
    if not (parent := multiprocessing.parent_process()):
        return  # the main process, where Gymnasium makes an environment as well, to ask it for its spaces
    end_with_parent()
    if not parent.is_alive():
        os._exit(1)  # it was killed in the seconds that it took to come here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


@contextlib.contextmanager
def stop_later() -> Iterator[None]:
    """For starting processes: none is left half started by Ctrl-C or SIGTERM, which the parent hears when all are there; they hear no Ctrl-C."""
    heard: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    resource_tracker.ensure_running()  # a process of multiprocessing's own: the first one to be started unblocks SIGINT when it is there
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a new process inherits; here, other threads still hear it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if heard:
            signal.raise_signal(heard[0])


def online(url: str) -> bool:
    """Does somebody answer, if only with an error? Downloaders' own retries take seconds without a network and minutes behind a firewall."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)
    return True


def cpu_has_bf16() -> bool:
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def cores() -> int:
    """How many this process may use: of a machine's sixty-four a scheduler may lend it two."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------- tasks
@dataclass(frozen=True)
class Task:
    """One row of the table: what is simulated, how it is seen, and what can be named in it."""

    loader: Literal["suite", "unitree", "adroit"]
    repeat: int  # control steps per agent step
    steps: int  # agent steps per episode; times `repeat`, no more than the simulator's own limit, past which dm_control begins a new one by itself
    camera: int | str
    prompt: str  # the default prompt of Phase I
    mask_frames: int = 5000  # frames for Phase I by default: fewer where rendering is slow, more of the thin string
    vocabulary: dict[str, str] = field(default_factory=dict)  # phrase -> names in the model; "x+", or a * at its end, with all bodies below it
    success_steps: int = 0  # an episode is a success when its goal holds for more than so many control steps (Adroit); 0: none is reported
    student_steps: int = 5000  # gradient steps of Phase II by default: the A1, large in its picture, needs fewer, a thin pole or string more


_CARTPOLE = {"cart": "cart", "pole": "pole_*", "rail": "rail*", "floor": "floor"}
_WALKER = {"walker": "torso *thigh *leg *foot", "torso": "torso", "legs": "*thigh *leg *foot", "feet": "*foot", "floor": "floor"}
_CUP = {"cup": "cup cup_part_*", "ball": "ball", "string": "string", "ground": "ground"}
_FINGER = {"finger": "proximal distal", "spinner": "spinner", "fingertip": "fingertip", "ground": "ground"}
_CHEETAH = {"cheetah": "torso *thigh *shin *foot", "torso": "torso", "legs": "*thigh *shin *foot", "head": "head", "ground": "ground"}
_HAND = {"hand": "forearm+", "fingers": "palm+", "forearm": "forearm", "table": "table", "floor": "ground"}
_A1 = {"robot": "trunk+", "trunk": "trunk", "body": "trunk", "legs": "??_hip+", "front legs": "F?_hip+", "rear legs": "R?_hip+", "hips": "*_hip"}
_A1 |= {"thighs": "*_thigh", "calves": "*_calf", "feet": "*_calf", "ground": "floor", "floor": "floor"}  # the feet one sees are the calf's mesh

TASKS: dict[str, Task] = {  # loader, action repeat, agent steps, camera, prompt, mask frames, vocabulary
    "cartpole_swingup":  Task("suite", 8, 125, 0, "the cart and the pole", 5000, _CARTPOLE, student_steps=14_000),
    "walker_walk":       Task("suite", 4, 250, 0, "the walker", 5000, _WALKER),
    "walker_stand":      Task("suite", 4, 250, 0, "the walker", 5000, _WALKER),
    "ball_in_cup_catch": Task("suite", 4, 250, 0, "the cup, the ball and the string", 10_000, _CUP, student_steps=10_000),
    "finger_spin":       Task("suite", 2, 500, 0, "the finger and the spinner", 5000, _FINGER),
    "cheetah_run":       Task("suite", 4, 250, 0, "the cheetah", 5000, _CHEETAH),
    "unitree_walk":      Task("unitree", 2, 500, "mounted", "the robot", 800, _A1, student_steps=3000),
    "unitree_stand":     Task("unitree", 2, 500, "mounted", "the robot", 800, _A1, student_steps=3000),
    "pen":               Task("adroit", 2, 100, "vil_camera", "the hand, the pen and the target", 3000,
                              _HAND | {"pen": "Object+", "target": "target+"}, success_steps=20),
    "door":              Task("adroit", 2, 100, "vil_camera", "the hand, the door and the frame", 3000,
                              _HAND | {"door": "door+", "handle": "latch+", "latch": "latch+", "frame": "frame"}, success_steps=25),
    "hammer":            Task("adroit", 2, 100, "vil_camera", "the hand, the hammer and the nail", 3000,
                              _HAND | {"hammer": "Object+", "nail": "nail+", "board": "nail_board"}, success_steps=25),
    "relocate":          Task("adroit", 2, 100, "vil_camera", "the hand, the ball and the target", 3000,
                              _HAND | {"ball": "Object+", "target": "target"}, success_steps=25),
}  # fmt: skip
ALIASES = {"cup_catch": "ball_in_cup_catch"}
SUITE = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS if domain != "lqr"}  # whose actions have no bounds


def resolve_env_id(env_id: str) -> str:
    """The canonical name of a task. Raises UserError with near matches for one that does not exist."""
    env_id = ALIASES.get(env_id, env_id)
    if env_id not in TASKS and env_id not in SUITE:
        near = difflib.get_close_matches(env_id, [*TASKS, *ALIASES, *SUITE], n=3, cutoff=0.5) or list(TASKS)[:3]
        raise UserError(f"unknown --env {env_id!r}: did you mean {', '.join(near)}? `python envs.py` lists all")
    return env_id


def task_row(env_id: str) -> Task:
    """The table's row; a suite task that is not in it gets repeat 4 and, from TalasEnv, its own model's vocabulary, and no target if it has none."""
    return TASKS.get(resolve_env_id(env_id)) or Task("suite", 4, 250, 0, "the robot and the target")


# ---------------------------------------------------------------------------------------------------- the three loaders
class Loader:
    """A simulated task without pixels: `model`, `data` and SuiteTask's methods. All chance comes from reset's `rng`; a field of the model that reset
    changes has to be in TalasEnv.EPISODE_FIELDS. Here is what the three share, and the look of the suite and the A1: their sky is drawn with the
    texture "skybox", their ground with "grid"."""

    textures: mujoco.MjSpec  # a scene with (at least) the same two textures, to generate them in other colours
    hand = slice(0)  # of qpos, what is observed beside the pixels: Adroit's hand

    def ctrl(self, action: np.ndarray) -> np.ndarray:
        """(A,) an action in [-1, 1] as what the motors are told: torques, or angles to go to."""
        low, high = self.model.actuator_ctrlrange.T
        return low + (action + 1) / 2 * (high - low)

    def hold(self) -> np.ndarray:
        """The action that leaves the motors' targets where they are: what to settle a state with."""
        low, high = self.model.actuator_ctrlrange.T
        return 2 * (self.data.ctrl - low) / (high - low) - 1

    def key(self, level: Literal["easy", "hard"]) -> None:
        """Paint the sky, or sky and ground, black: colours, marks and the haze at the horizon. Reflections in the ground stay, as in RL-ViGen."""
        backdrop = {"background"} & {self.model.tex(t).name for t in range(self.model.ntex)}  # a wall that manipulator and stacker have for a sky
        for name in ("skybox", *backdrop) if level == "easy" else ("skybox", *backdrop, "grid"):
            self.model.tex(name).data[:] = 0
        bare = (self.model.geom_type == mujoco.mjtGeom.mjGEOM_HFIELD) & (self.model.geom_matid == -1)  # quadruped_escape's ground, without a texture
        if level == "hard" and bare.any():
            self.model.geom_matid[bare] = self.model.mat("grid").id
        self.model.vis.rgba.haze[:3] = 0

    def recolour(self, palette: dict[str, np.ndarray]) -> None:
        """Generate the ground's checker and the sky's gradient anew in a palette's colours. MuJoCo's own compiler draws them."""
        sky, ground = (self.model.tex(name).data for name in ("skybox", "grid"))  # a KeyError where there are none, as on Adroit
        self.textures.texture("grid").rgb1, self.textures.texture("grid").rgb2 = palette["grid_rgb1"], palette["grid_rgb2"]
        self.textures.texture("skybox").rgb1 = palette["skybox_rgb"]
        drawn = self.textures.compile()
        sky[:], ground[:] = drawn.tex("skybox").data, drawn.tex("grid").data


class SuiteTask(Loader):
    """A task of dm_control's suite."""

    def __init__(self, env_id: str):
        scene = "<mujoco><include file='./common/skybox.xml'/><include file='./common/materials.xml'/></mujoco>"
        self.textures = mujoco.MjSpec.from_string(scene, include=common.ASSETS)
        self.env = suite.load(*SUITE[env_id], task_kwargs={"random": 0})
        self.physics = self.env.physics
        self.model, self.data = self.physics.model.ptr, self.physics.data.ptr

    def reset(self, rng: np.random.Generator) -> None:
        self.env.task.random.seed(rng.integers(2**32))
        self.env.reset()
        if self.physics._contexts:  # quadruped_escape makes one for its terrain; nobody draws in it, and its end at the exit is a traceback
            self.physics._free_rendering_contexts()

    def step(self, action: np.ndarray) -> tuple[float, bool, dict[str, Any]]:
        """One control step of an action in [-1, 1]. Returns (reward, terminated, info)."""
        timestep = self.env.step(self.ctrl(action))
        return float(timestep.reward or 0), timestep.discount == 0, {}  # None where dm_control, past its time limit, has begun anew


# RL-ViGen's A1: the scene around MuJoCo Menagerie's robot. Position targets (rad) per leg (abduction, hip, knee), legs FR, FL, RR, RL: the walk's
# ranges (the stand's are the robot's own) and reference targets q0; the stand's start.
_A1_SCENE = """<mujoco>
    <include file="a1.xml"/><include file="./common/skybox.xml"/><include file="./common/visual.xml"/>
    <statistic extent=".8" center="0 0 .1"/>
    <asset>
        <texture name="grid" type="2d" builtin="checker" rgb1=".2 .3 .4" rgb2=".1 .2 .3" width="300" height="300" mark="edge" markrgb=".8 .8 .8"/>
        <material name="ground" texture="grid" texrepeat="5 5" texuniform="true" reflectance=".2"/>
    </asset>
    <worldbody>
        <geom name="floor" type="plane" size="0 0 .05" material="ground" group="1"/>
        <light pos="-1 -1 4" dir="1 1 -4" diffuse=".7 .7 .7" specular=".03 .03 .03"/>
    </worldbody>
</mujoco>"""
_A1_WALK = [(-0.6, 0.2), (-0.8, 0.8), (-2.0, -0.916298)] * 4
_A1_Q0 = np.array([0.05, 0.22, -0.8, 0.05, 0.22, -0.8, 0.1, 0.68, 0, 0.1, 0.68, 0])
_A1_CROUCH = np.array([0.05, 1.3, -2.69653, 0.05, 1.3, -2.69653, 0.1, 1.3, -2.69653, 0.1, 1.3, -2.69653])


class UnitreeTask(Loader):
    """RL-ViGen's two Unitree A1 tasks."""

    def __init__(self, env_id: str):
        robot, cache = mujoco_menagerie.get("unitree_a1"), mujoco_menagerie.Cache()
        try:
            if not cache.root and not cache.is_cached(robot) and not online(f"{cache.base_url}/{robot.asset}"):
                raise OSError("no network")
            files = common.ASSETS | robot.assets("a1")  # from MENAGERIE_ROOT, the package's cache or its download
            spec = mujoco.MjSpec.from_string(_A1_SCENE, files, files)
        except (mujoco_menagerie.MenagerieError, OSError, SyntaxError, ValueError) as error:  # the last two: damaged XML
            hint = "set MENAGERIE_ROOT to a folder that holds MuJoCo Menagerie's unitree_a1/"
            raise UserError(f"{env_id} needs the Unitree A1, which cannot be downloaded or read ({brief(error)}): {hint}") from None
        spec.material("carbonfibre").textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = ""
        spec.material("carbonfibre").rgba = (0.25, 0.25, 0.25, 1)
        self.walk, trunk = env_id == "unitree_walk", spec.body("trunk")
        trunk.pos = (0, 0, 0.43 if self.walk else 0.096)
        trunk.add_camera(name="mounted", pos=(0.7, 0, 0.5), euler=(0, 0.83, 1.57))  # rides before the head and looks back and down
        self.textures, self.model = spec, spec.compile()
        self.data = mujoco.MjData(self.model)
        if self.walk:
            self.model.actuator_ctrlrange[:] = _A1_WALK

    def key(self, level: Literal["easy", "hard"]) -> None:
        super().key("hard")  # sky and ground at both levels: the camera looks down, and RL-ViGen's key would change nothing

    def reset(self, rng: np.random.Generator) -> None:
        """The published start, the same every time."""
        mujoco.mj_resetData(self.model, self.data)
        if not self.walk:
            self.data.qpos[7:] = _A1_CROUCH
        mujoco.mj_forward(self.model, self.data)

    def step(self, action: np.ndarray) -> tuple[float, bool, dict[str, Any]]:
        """One control step of 0.01 s: five of physics."""
        data, trunk = self.data, self.data.body("trunk")
        data.ctrl[:] = self.ctrl(action)
        mujoco.mj_step(self.model, data, 5)
        mujoco.mj_step1(self.model, data)  # mj_step leaves poses one physics step behind qpos; dm_control does the same
        mujoco.mj_subtreeVel(self.model, data)
        axes, velocity = trunk.xmat.reshape(3, 3), trunk.subtree_linvel  # columns: the trunk's axes in the world; m/s, its subtree's centre of mass
        e_x, e_z = axes[:, 0], axes[:, 2]
        s = rewards.tolerance(trunk.xpos[2], (0.36, np.inf), margin=0.18)
        tilt = 0.1 * np.sum((e_z - (0, 0, 1)) ** 2) + 0.05 * np.sum((e_x - (1, 0, 0)) ** 2)  # 0.1 p_z + 0.05 p_x
        if not self.walk:
            return float((2 * s + e_z[2]) / 3 - 0.08 * np.mean(self.hold() ** 2) - tilt), False, {}
        w = (3 * s + e_z[2] + e_x[0]) / 5 - 0.05 * np.mean((data.ctrl - _A1_Q0) ** 2) - 0.05 * velocity[2] ** 2
        w += -0.005 * np.sum((axes @ data.qvel[3:6])[:2] ** 2) - tilt  # ω in the world; a free joint's is in its own frame
        m = rewards.tolerance(velocity[0], (1, np.inf), margin=1, sigmoid="linear")
        return float((w + m + w * m) / 3), False, {}


# Adroit: a divisor of the dense reward (pen's is VRL3's; by its 20 for door and 100 for hammer the entropy term would drown a step's 0.03); the
# camera's position and Euler angles (the benchmark's; relocate's is ours: from the side, where the palm does not hide the ball); what the palm's
# distance is measured to in the reward.
_ADROIT: dict[str, dict[str, Any]] = {
    "pen":      {"scale": 50, "camera": ((0, -0.8, 0.8), (np.pi / 4, 0, 0)), "palm_to": None},
    "door":     {"scale": 1, "camera": ((0, 0, 1.5), (0, 0, 3.14)), "palm_to": ("site", "S_handle")},
    "hammer":   {"scale": 10, "camera": ((0, 0, 1.1), (0, 0, 3.14)), "palm_to": ("body", "Object")},
    "relocate": {"scale": 30, "camera": ((1, 0.1, 0.7), (-0.232, 1.056, 1.836)), "palm_to": ("body", "Object")},
}  # fmt: skip


class AdroitTask(Loader):
    """A task of gymnasium-robotics' Adroit hand, with the benchmark's camera and a corrected reward."""

    def __init__(self, env_id: str, reward: Literal["dense", "sparse"]):
        # Imports the package only here, as that takes a second; on import it prints that v1's dense rewards changed: see step.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            self.env = gym.make(f"gymnasium_robotics:AdroitHand{env_id.title()}-v1", reward_type=reward).unwrapped
        self.dense, self.spec = reward == "dense", _ADROIT[env_id]
        self.model, self.data = self.env.model, self.env.data
        self.model.vis.quality.shadowsize = 2048  # the suite's; 4096 take a third more time, for two pixels in a thousand
        self.model.vis.quality.offsamples = 4  # the suite's as well, and what segment counts on
        wrist = self.model.joint("WRJ1").qposadr[0]
        self.hand = slice(wrist, wrist + 24)
        camera, (position, euler) = self.model.cam("vil_camera"), self.spec["camera"]
        camera.pos, camera.fovy = position, 45
        mujoco.mju_euler2Quat(camera.quat, np.array(euler, float), "xyz")

    def key(self, level: Literal["easy", "hard"]) -> None:
        """Make the floor, or floor and table, render exactly black: no colour, texture, highlight or mirror. The void is black anyway. Ours."""
        black = self.model.mat("groundplane")  # the table's legs have no material of their own, and would keep a highlight
        black.rgba, black.texid = (0, 0, 0, 1), -1
        black.specular = black.shininess = black.reflectance = black.emission = 0
        for g in range(self.model.ngeom):
            if {self.model.geom(g).name, self.model.body(self.model.geom_bodyid[g]).name} & ({"ground"} if level == "easy" else {"ground", "table"}):
                self.model.geom_matid[g], self.model.geom_rgba[g] = black.id, (0, 0, 0, 1)

    def reset(self, rng: np.random.Generator) -> None:
        self.env.np_random = rng
        self.env.reset()

    def step(self, action: np.ndarray) -> tuple[float, bool, dict[str, Any]]:
        """One control step. `success`: the goal holds at it."""
        _, reward, _, _, info = self.env.step(action)
        if self.dense and self.spec["palm_to"]:
            # gymnasium-robotics 1.4.2 adds +0.1 d, d = |palm - object|; its documentation, D4RL and DAPG have -0.1 d = +0.1 d - 0.2 d.
            kind, name = self.spec["palm_to"]
            reward -= 0.2 * np.linalg.norm(self.data.site("S_grasp").xpos - getattr(self.data, kind)(name).xpos)
        mujoco.mj_kinematics(self.model, self.data)  # the step leaves positions 2 ms behind the joints: picture and proprio of one instant
        mujoco.mj_camlight(self.model, self.data)
        return float(reward) / (self.spec["scale"] if self.dense else 1), False, {"success": bool(info["success"])}


# ------------------------------------------------------------------------------------------------ backgrounds and colours
def synthetic_image(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8: dead leaves (overlapping shapes, sizes by a power law) or coloured 1/f noise, both with natural-image spectra."""
    if rng.random() < 0.3:
        frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) + 1 / size
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, size, size))) / frequency ** rng.uniform(0.8, 1.6), s=(size, size))
        mixed = np.einsum("ij,jhw->hwi", np.eye(3) + rng.normal(0, 0.5, (3, 3)), noise / noise.std())
        return np.clip(mixed * rng.uniform(30, 60) + rng.uniform(60, 195, 3), 0, 255).astype(np.uint8)
    image = np.full((size, size, 3), rng.integers(0, 256, 3), np.uint8)
    for radius in np.sort(size * 0.02 / rng.uniform(0.04, 1, rng.integers(30, 150)))[::-1]:  # large ones first, so that small ones stay seen
        centre, colour = rng.integers(0, size, 2).tolist(), rng.integers(0, 256, 3).tolist()
        if rng.random() < 0.5:
            axes = (int(radius) + 1, int(radius * rng.uniform(0.3, 1)) + 1)
            cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
        else:
            box = cv2.boxPoints((centre, (2 * radius, 2 * radius * rng.uniform(0.2, 1)), rng.uniform(0, 180)))
            cv2.fillConvexPoly(image, box.astype(np.int32), colour, cv2.LINE_AA)
    return np.clip(image + rng.normal(0, rng.uniform(0, 12), image.shape), 0, 255).astype(np.uint8)


def procedural_video(rng: np.random.Generator, length: int, size: int) -> np.ndarray:
    """(length, size, size, 3) uint8: a synthetic landscape that drifts, with shapes that cross it on paths of their own."""
    canvas = synthetic_image(rng, 2 * size)
    phase, speed = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.01, 0.06, 2)
    n = rng.integers(2, 7)
    radius, start, velocity = rng.uniform(4, 20, n), rng.uniform(0, size, (n, 2)), rng.normal(0, 1.5, (n, 2))
    colours = rng.integers(0, 256, (n, 3))
    video = np.empty((length, size, size, 3), np.uint8)
    for t in range(length):
        y, x = (size * (1 + np.sin(phase + speed * t)) / 2).astype(int)
        video[t] = canvas[y : y + size, x : x + size]
        for i in range(n):
            centre = ((start[i] + velocity[i] * t + radius[i]) % (size + 2 * radius[i]) - radius[i]).astype(int)
            cv2.circle(video[t], centre.tolist(), int(radius[i]), colours[i].tolist(), -1, cv2.LINE_AA)
    return video


@lru_cache
def list_videos(distractors: str, setting: Setting) -> tuple[list[Path], int]:
    """The videos of DMControl-GB's video_easy/ or video_hard/ in natural numeric order, and how many others cannot be decoded (a warning each)."""
    folder, videos = Path(distractors) / setting, []
    if not folder.is_dir():
        have = sorted(p.name for p in Path(distractors).glob("*"))  # nothing of no folder
        raise UserError(f"--distractors {distractors}: expected DMControl-GB's layout, but no {setting}/ among {', '.join(have) or 'nothing'}")
    listed = [p for p in folder.iterdir() if p.suffix.lower() in {".mp4", ".avi", ".mov", ".mkv", ".webm"}]
    for path in sorted(listed, key=lambda p: ([int(number) for number in re.findall("[0-9]+", p.stem)], p.name)):
        try:
            read_video(path, 1, 84)
            videos.append(path)
        except UserError as error:
            warnings.warn(f"{error}: skipped", stacklevel=2)
    if not videos:
        raise UserError(f"{folder}: {'none of its videos can be decoded' if listed else 'no videos (.mp4, .avi, .mov, .mkv, .webm) in it'}")
    return videos, len(listed) - len(videos)


def read_video(path: Path, length: int, size: int) -> np.ndarray:
    """(T, size, size, 3) uint8 RGB: the first `length` frames of a video, fewer if it is shorter. Raises UserError if none can be decoded."""
    capture, frames = cv2.VideoCapture(str(path) if path.is_file() else ""), []  # a pipe would wait for ever
    sane = capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT) <= MAX_PIXELS
    while sane and len(frames) < length and (decoded := capture.read())[0]:  # one at a time: 500 frames of 352² in floating point are 700 MB
        rgb = torch.from_numpy(decoded[1]).permute(2, 0, 1).flip(0) / 255  # (3, h, w), from BGR
        # RL-ViGen's arithmetic: bilinear with half-pixel centres, no antialiasing, truncated to bytes
        frames.append((F.interpolate(rgb[None], (size, size), mode="bilinear", align_corners=False)[0] * 255).byte().permute(1, 2, 0))
    capture.release()
    if not frames:
        raise UserError(f"{path}: no frame of this video can be decoded")
    return torch.stack(frames).contiguous().numpy()


def load_colours(path: Path) -> list[dict[str, np.ndarray]]:
    """The 100 palettes of DMControl-GB's color_easy.pt or color_hard.pt. Its pickle may name numpy's array reconstructors and nothing else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the colour settings need DMControl-GB's {path.name}")
    allowed = [(np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, np.dtypes.Float64DType]
    try:
        with torch.serialization.safe_globals(allowed):
            palettes = load_plain(path)
        names = ("grid_rgb1", "grid_rgb2", "skybox_rgb")
        colours = np.array([[np.asarray(palette[name], float).reshape(3) for name in names] for palette in palettes or [{}]])  # (N, 3, 3)
        if not np.isfinite(colours).all():
            raise ValueError("a colour is not a number")
        return [dict(zip(names, palette, strict=True)) for palette in colours.clip(0, 1)]
    except Exception as error:  # a damaged or hostile file fails in many ways; all of them are the file's fault
        raise UserError(f"{path}: not a DMControl-GB colour file ({brief(error)})") from None


# ------------------------------------------------------------------------------------------------------ the environment
def close_renderer(renderer: mujoco.Renderer) -> None:
    """MuJoCo's own close (3.17) frees in whichever OpenGL context is current, perhaps another environment's, which would then draw nothing."""
    renderer._gl_context.make_current()
    renderer.close()


class TalasEnv(gym.Env):
    """A task seen through a camera, under a visual setting.

    Observations are {"pixels": (3 * frame_stack, image_size, image_size) uint8, RGB frames, channel first, oldest first; "proprio": (P,) float32},
    P = 24 hand joint angles on Adroit (rad), 0 elsewhere. Actions are Box(-1, 1). `distractors` (or TALAS_DISTRACTORS) is a folder in DMControl-GB's
    layout; `reward` matters on Adroit only; `action_repeat` overrides the table's. Raises UserError for whatever the caller can mend.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}
    EPISODE_FIELDS = ("body_pos", "body_quat", "geom_pos", "geom_size", "site_pos", "site_quat", "site_size", "site_rgba", "light_pos", "hfield_data")

    def __init__(
        self,
        env_id: str,
        setting: Setting = "train",
        seed: int = 1,
        *,
        distractors: str | None = None,
        image_size: int = 84,
        frame_stack: int = 3,
        reward: Literal["dense", "sparse"] = "dense",
        action_repeat: int | None = None,
        first_episode: int = 0,
    ):
        if setting not in SETTINGS:
            raise UserError(f"unknown setting {setting!r}: choose from {', '.join(SETTINGS)}")
        self.env_id, self.setting, self.base_seed = resolve_env_id(env_id), setting, seed
        self.distractors = distractors or os.environ.get("TALAS_DISTRACTORS")
        self.row = task_row(self.env_id)
        self.repeat = self.row.repeat if action_repeat is None else action_repeat
        self.episode_steps = self.row.steps * self.row.repeat // max(1, self.repeat)
        if self.repeat < 1 or self.episode_steps < 1:
            raise UserError(f"--action-repeat {self.repeat}: an episode of {self.env_id} has {self.row.steps * self.row.repeat} control steps")
        self.size, self.render_mode, self.videos_skipped = image_size, "rgb_array", 0
        loaders = {"suite": SuiteTask, "unitree": UnitreeTask, "adroit": partial(AdroitTask, reward=reward)}
        self.task = loaders[self.row.loader](self.env_id)
        self.model, self.data = self.task.model, self.task.data
        self.physics = getattr(self.task, "physics", None)  # dm_control's, on its suite
        if not (np.diff(self.model.actuator_ctrlrange) > 0).all():
            raise UserError(f"{env_id}: a motor without a ctrlrange, so an action from -1 to 1 tells it nothing; give it one")
        self.vocabulary = self.row.vocabulary or self._names()
        if self.env_id not in TASKS and "target" not in self.vocabulary:
            self.row = replace(self.row, prompt="the robot")
        if setting not in ("train", "procedural") and not self.distractors:
            raise UserError(f"{setting} needs DMControl-GB's media: --distractors FOLDER or TALAS_DISTRACTORS (`procedural` needs none)")
        if setting.startswith("video"):
            self._videos, self.videos_skipped = list_videos(self.distractors, setting)
        try:  # before a renderer is made, which copies the textures
            if setting.startswith("color"):
                self._palettes = load_colours(Path(self.distractors) / f"{setting}.pt")
                self.task.recolour(self._palettes[0])
            elif setting != "train":
                self.task.key("easy" if setting == "video_easy" else "hard")
        except KeyError:  # Adroit has no sky and hardly any ground in view
            raise UserError(f"{self.env_id} has not the textures skybox and grid, which {setting} repaints: choose another setting") from None
        self._renderers: dict[int, tuple[mujoco.Renderer, weakref.finalize]] = {}  # by their pictures' size
        self._background: np.ndarray | None = None  # (T, H, W, 3) uint8: the episode's video
        self._frames: deque[np.ndarray] = deque(maxlen=frame_stack)
        self._episode, self._step = first_episode - 1, 0
        self.action_space = gym.spaces.Box(-1, 1, (self.model.nu,), np.float32)
        pixels = gym.spaces.Box(0, 255, (3 * frame_stack, image_size, image_size), np.uint8)
        proprio = gym.spaces.Box(-np.inf, np.inf, self.data.qpos[self.task.hand].shape, np.float32)
        self.observation_space = gym.spaces.Dict(pixels=pixels, proprio=proprio)

    def _names(self) -> dict[str, str]:
        """The vocabulary of a model that the table does not know: each body, each geom of the world, "robot" (all bodies) and, if any, "target"."""
        bodies = [name for b in range(1, self.model.nbody) if (name := self.model.body(b).name)]
        world = [name for g in range(self.model.ngeom) if self.model.geom_bodyid[g] == 0 and (name := self.model.geom(g).name)]
        sites = [self.model.site(s).name for s in range(self.model.nsite)]
        target = {"target": "*target*"} if any("target" in name for name in bodies + world + sites) else {}
        return {name.replace("_", " ").lower(): name for name in bodies + world} | {"robot": " ".join(bodies)} | target

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start the next episode, or episode `options["episode"]`. Episode i draws everything from (seed, i)."""
        super().reset(seed=seed)
        if seed is not None:
            self.base_seed, self._episode = seed, -1
        self._episode = int((options or {}).get("episode", self._episode + 1))
        self._step, self._held = 0, 0
        self.task.reset(np.random.default_rng([self.base_seed, self._episode]))
        rng = np.random.default_rng([self.base_seed, self._episode, 1])  # of the look: one palette of the hundred, the procedural video
        if self.setting.startswith("color"):
            self.task.recolour(self._palettes[rng.integers(len(self._palettes))])
            self.close()  # the next renderer takes the new textures along
        elif self.setting == "procedural":
            self._background = procedural_video(rng, self.episode_steps + 1, self.size)
        elif self.setting != "train":  # RL-ViGen moves on by one before each episode, so the first episode shows the second video
            video = self._videos[(self._episode + 1) % len(self._videos)]
            self._background = read_video(video, self.episode_steps + 1, self.size)
        start = self.render()
        if self._background is not None and self.setting != "video_easy" and (start == self._background[0]).all(2).mean() < 0.05:
            raise UserError(
                f"{self.env_id}: {self.setting} shows the clean scene; draw its sky and ground with textures skybox and grid, or key them"
            )
        self._frames.extend([start] * self._frames.maxlen)
        return self._obs(), {"episode": self._episode}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One agent step: `repeat` control steps of one action, rewards summed. A time limit truncates; it never terminates."""
        action = np.clip(np.asarray(action, np.float64), -1, 1)  # replay has it unclipped: a policy has to keep to [-1, 1] itself
        reward, terminated = 0.0, False
        for _ in range(self.repeat):
            step_reward, terminated, info = self.task.step(action)
            reward += step_reward
            self._held += info.get("success", False)
            if terminated:
                break
        self._step += 1
        self._frames.append(self.render())
        if self.row.success_steps:  # Adroit: the benchmark's episode success beside the step's
            info["episode_success"] = self._held > self.row.success_steps
        return self._obs(), reward, terminated, self._step >= self.episode_steps, info

    def _obs(self) -> dict[str, np.ndarray]:
        pixels = np.concatenate(self._frames, axis=2).transpose(2, 0, 1)  # (3k, H, W), oldest frame first
        return {"pixels": np.ascontiguousarray(pixels), "proprio": self.data.qpos[self.task.hand].astype(np.float32)}

    def _render(self, segmented: bool = False) -> np.ndarray:
        """The present scene as (H, W, 3) uint8; or, four times as high and wide, as (4 H, 4 W, 2) int32, what is where: its id and its type."""
        size = 4 * self.size if segmented else self.size
        if size not in self._renderers:
            self.model.vis.global_.offwidth = self.model.vis.global_.offheight = size
            try:
                renderer = mujoco.Renderer(self.model, size, size)
            except Exception as error:  # what a missing driver raises depends on the backend
                gl = os.environ.get("MUJOCO_GL")
                raise UserError(f"MUJOCO_GL={gl} cannot render ({error}): unset it; on Debian or Ubuntu apt-get install libegl1 libgl1") from None
            closing = weakref.finalize(self, close_renderer, renderer)  # once: by close(), with the environment, or at the exit
            atexit.register(closing)  # last in, first out: after this renderer's start, so before EGL's own end
            self._renderers[size] = renderer, closing
        renderer, option = self._renderers[size][0], mujoco.MjvOption()
        if segmented:
            renderer.enable_segmentation_rendering()  # of this renderer, for good
            option.geomgroup[1] = not self.below_ground  # the A1's floor is alone in group 1
        if self.model.nhfield:  # quadruped_escape's terrain is another in every episode
            renderer._gl_context.make_current()
            mujoco.mjr_uploadHField(self.model, renderer._mjr_context, 0)
        # Twice for an infinite plane (the A1's), which MuJoCo lays out around the camera of the update before: a frame would depend on history.
        for _ in range(2 if self.row.loader == "unitree" else 1):
            renderer.update_scene(self.data, self.row.camera, option)
        return renderer.render()

    @property
    def below_ground(self) -> bool:
        """Is the camera under the floor (the A1's, when the robot lies on its back)? Then the floor is drawn as glass, but segmented as solid."""
        return bool(self.data.cam_xpos[self.model.camera(self.row.camera).id][2] < 0)

    def render(self) -> np.ndarray:
        """(H, W, 3) uint8: the present frame. Wherever the scene renders exactly black, the background shows."""
        frame = self._render()
        if self._background is None:
            return frame
        return np.where(frame.any(axis=2, keepdims=True), frame, self._background[self._step % len(self._background)])

    def segment(self, prompt: str) -> np.ndarray:
        """(H, W) bool: which pixels of the frame just rendered show what the prompt names. Raises UserError for a phrase it does not know.

        MuJoCo takes a pixel's colour from four points in it and its segmentation from one, and so would call a third of the pixels that show the cup
        or its string something else. Here a pixel belongs to all that one of its four points belongs to.
        """
        wanted = [self._lookup(phrase) for phrase in parse_prompt(prompt)]
        objects = self._render(segmented=True).reshape(self.size, 4, self.size, 4, 2)
        objects = objects[:, range(4), :, (2, 0, 3, 1)]  # (4, H, W, 2): OpenGL's usual points, one in each row and column of sixteen
        shown = [(objects[..., 1] == kind) & np.isin(objects[..., 0], ids) for phrase in wanted for kind, ids in phrase.items()]
        return np.logical_or.reduce(shown).any(0)

    def _lookup(self, phrase: str) -> dict[int, list[int]]:
        """The ids that a noun phrase stands for, by MuJoCo's object type. A body brings its geoms and sites, all bones bring their skin."""
        if phrase not in self.vocabulary:
            raise UserError(f"--prompt: {phrase!r} is not in {self.env_id}'s vocabulary; it can name: {', '.join(sorted(self.vocabulary))}")
        named = re.compile("|".join(fnmatch.translate(pattern) for pattern in self.vocabulary[phrase].split())).match
        model, trees = self.model, set()
        for b in range(1, model.nbody):  # parents come before their children
            if named(model.body(b).name + "+") or model.body_parentid[b] in trees:  # "x+" or "x*": with all bodies below it
                trees.add(b)
        bodies = trees | {b for b in range(1, model.nbody) if named(model.body(b).name)}
        found = {
            int(mujoco.mjtObj.mjOBJ_GEOM): [g for g in range(model.ngeom) if named(model.geom(g).name) or model.geom_bodyid[g] in bodies],
            int(mujoco.mjtObj.mjOBJ_SITE): [s for s in range(model.nsite) if named(model.site(s).name) or model.site_bodyid[s] in bodies],
            int(mujoco.mjtObj.mjOBJ_TENDON): [t for t in range(model.ntendon) if named(model.tendon(t).name)],
            int(mujoco.mjtObj.mjOBJ_SKIN): [s for s in range(model.nskin) if bodies >= set(model.skin_bonebodyid.tolist())],  # the dog's
        }
        if not any(found.values()):
            raise UserError(f"--prompt: {phrase!r} is in {self.env_id}'s vocabulary, but its model has no {self.vocabulary[phrase]!r} to be seen")
        return found

    def nameable(self, prompt: str) -> str:
        """The prompt, if the simulator can name all of it, and otherwise the task's own: what a language model's masks are compared with."""
        return prompt if all(phrase in self.vocabulary for phrase in parse_prompt(prompt)) else self.row.prompt

    def show(self, state: list[np.ndarray], t: int) -> np.ndarray:
        """(H, W, 3) uint8: a state taken from another setting of the same task (`get_state`), in front of this episode's background at step t."""
        mujoco.mj_setState(self.model, self.data, state[0], mujoco.mjtState.mjSTATE_INTEGRATION)
        for name, value in zip(self.EPISODE_FIELDS, state[1:], strict=True):
            getattr(self.model, name)[:] = value
        mujoco.mj_forward(self.model, self.data)
        self._step = t
        return self.render()

    def get_state(self) -> list[np.ndarray]:
        """What decides how the scene looks: MuJoCo's integration state, and what episodes change in the model."""
        state = np.empty(mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(self.model, self.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        return [state, *(getattr(self.model, name).copy() for name in self.EPISODE_FIELDS)]

    def close(self) -> None:
        for _, closing in self._renderers.values():
            closing()
            atexit.unregister(closing)
        self._renderers.clear()


make_env = TalasEnv


def make_env_in_worker(*args: Any, **kwargs: Any) -> gym.Env:
    start_worker()
    return gym.wrappers.RecordEpisodeStatistics(make_env(*args, **kwargs))


# ------------------------------------------------------------------------------------------------- masks and their report
def parse_prompt(prompt: str) -> list[str]:
    """The noun phrases of a plain English list: "The hand, the hammer and a nail" -> ["hand", "hammer", "nail"]."""
    words = [[word for word in part.split() if word not in {"the", "a", "an"}] for part in re.split(r"[,;.]|\band\b", prompt.lower())]
    phrases = [" ".join(phrase) for phrase in words if phrase]
    if not phrases:
        raise UserError(f"--prompt {prompt!r} names nothing; write something like 'the cart and the pole'")
    return phrases


def mask_iou(pred: np.ndarray, true: np.ndarray, tolerance: int = 0) -> np.ndarray:
    """Intersection over union of (N, H, W) bool masks, per frame, (N,) float; an empty pair counts 1."""
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)  # a pixel is shared if the other mask has one at most `tolerance` rows and columns away
    near_pred, near_true = (np.stack([cv2.dilate(m.astype(np.uint8), kernel) for m in masks]).astype(bool) for masks in (pred, true))
    shared = (pred & near_true) | (true & near_pred)
    union = (pred | true).sum((1, 2))
    return np.where(union == 0, 1.0, shared.sum((1, 2)) / np.maximum(union, 1))


@torch.no_grad()
def predict(masker: torch.nn.Module, frames: np.ndarray, device: torch.device, bf16: bool) -> np.ndarray:
    """(N, 3, H, W) uint8 -> (N, H, W) float32 probabilities, in batches, in the precision of the training."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = torch.cat([masker(part.to(device)) for part in torch.from_numpy(frames).split(100)])
    return logits.float().sigmoid().cpu().numpy()


def report(masker: torch.nn.Module, tests: dict[str, np.ndarray], device: torch.device, bf16: bool, sheet: Path) -> dict[str, float]:
    """{"iou/clean": mean IoU over the test frames at threshold 0.5, "iou_1px/clean": the same with one pixel of tolerance, ...}, printed as well.

    The sheet is a PNG to look at: a row per setting, frames of each kind of state and what the masker keeps of them.
    """
    figures, rows, n = {}, [], len(tests["masks"])
    chosen = sorted({0, n // 8, n // 4, n // 2, 5 * n // 8, 3 * n // 4, 7 * n // 8, n - 1})  # spread, random and good states come in this order
    print(f"\n{'test frames':<14}{'IoU':>8}{'IoU ±1px':>10}")
    for key, frames in ((key, frames) for key, frames in tests.items() if key != "masks"):
        pred = predict(masker, frames, device, bf16) > 0.5
        iou, iou_1px = (float(mask_iou(pred, tests["masks"], tolerance).mean()) for tolerance in (0, 1))
        print(f"{key:<14}{iou:>8.3f}{iou_1px:>10.3f}")
        figures |= {f"iou/{key}": iou, f"iou_1px/{key}": iou_1px}
        rows.append(np.concatenate([np.concatenate([frames[i], frames[i] * pred[i]], axis=2) for i in chosen], axis=2))
    write_sheet(sheet, rows)
    return figures


def write_sheet(path: Path, rows: list[np.ndarray]) -> None:
    """A PNG of rows (3, h, w), one below the other, twice as large."""
    picture = np.concatenate(rows, axis=1).transpose(1, 2, 0)[..., ::-1]
    write_image(path, cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST))


# ------------------------------------------------------------------------------------------ photographs and augmentations
MAX_PIXELS = PIL.Image.MAX_IMAGE_PIXELS = 50_000_000  # of a photograph or of a video's frame
PHOTO_SIZE = 128  # photographs are kept a little larger than an observation, so that a random crop still has detail
Augmentation = Literal["overlay", "swap", "mix"]  # swap and mix need a mask, and so a masker: talas_asymmetric_sac.py's main looks to that


def load_photographs(folder: str | None, count: int, seed: int, part: Literal["all", "train", "test"] = "all") -> torch.Tensor:
    """(N, 3, 128, 128) uint8: a seeded sample of at most `count` images under a folder (or TALAS_OVERLAY); without one, up to 1,000 synthetic images.

    Every tenth file is the maskers' `test` part, whatever the seed, a tenth of `count` drawn from it; the rest is `train`. Broken ones are skipped.
    """
    folder, count = folder or os.environ.get("TALAS_OVERLAY"), count // 10 if part == "test" else count
    rng = np.random.default_rng([seed, 3 if part == "test" else 2])
    if not folder:
        photos = [synthetic_image(rng, PHOTO_SIZE) for _ in range(min(count, 100 if part == "test" else 1000))]
        print(f"photographs: {len(photos):,} synthetic images (give --overlay FOLDER or set TALAS_OVERLAY for real ones)", flush=True)
    elif not Path(folder).is_dir():
        raise UserError(f"--overlay {folder}: no such folder")
    else:
        every = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp", ".bmp"})
        files = every[::10] if part == "test" else [p for i, p in enumerate(every) if part == "all" or i % 10]
        photos = [photo for i in sorted(rng.permutation(len(files))[:count]) if (photo := read_photograph(files[i])) is not None]
        if not photos:
            raise UserError(f"--overlay {folder}: {'none of its images can be read' if files else 'no or too few images (.jpg, .png, .webp, .bmp)'}")
        print(f"photographs: {len(photos):,} of the {len(every):,} in {folder}", flush=True)
    return torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).contiguous()


def decode_image(path: Path, flags: int) -> np.ndarray | None:
    """(H, W, 3) uint8 BGR or (H, W) uint8, as OpenCV's flags say, or None if the file cannot be decoded."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):  # damaged files fail in many ways
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        if path.is_file():  # a pipe would wait for ever
            PIL.Image.open(path).close()  # reads the header, and refuses one that promises more than MAX_PIXELS
            return cv2.imdecode(np.fromfile(path, np.uint8, count=1 << 28), flags)
    return None


def read_photograph(path: Path) -> np.ndarray | None:
    """(128, 128, 3) uint8 RGB: the centre square of one image file, or None, with a warning, if it cannot be decoded."""
    image = decode_image(path, cv2.IMREAD_COLOR)
    if image is None:
        warnings.warn(f"{path}: skipped, cannot be decoded as an image", stacklevel=2)
        return None
    side, (height, width) = min(image.shape[:2]), image.shape[:2]
    square = image[(height - side) // 2 :, (width - side) // 2 :, ::-1][:side, :side]
    return cv2.resize(square, (PHOTO_SIZE, PHOTO_SIZE), interpolation=cv2.INTER_AREA if side > PHOTO_SIZE else cv2.INTER_LINEAR)


def random_crops(photos: torch.Tensor, n: int, size: int) -> torch.Tensor:
    """(n, 3, size, size) float in [0, 255]: random photographs, each a random resized crop (20-100% of the area, aspect 3/4 to 4/3), half flipped."""
    device = photos.device
    chosen = photos[torch.randint(len(photos), (n,), device=device)].float()
    area, log_aspect = torch.empty(n, device=device).uniform_(0.2, 1), torch.empty(n, device=device).uniform_(np.log(3 / 4), np.log(4 / 3))
    width, height = ((area * torch.exp(sign * log_aspect)).sqrt().clamp(max=1) for sign in (1, -1))  # as shares of the photograph
    centre_x, centre_y = ((torch.rand(n, device=device) * 2 - 1) * (1 - share) for share in (width, height))
    flip = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(width)
    theta = torch.stack([width * flip, zero, centre_x, zero, height, centre_y], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    return F.grid_sample(chosen, grid, padding_mode="border", align_corners=False)


def random_shift(*stacks: torch.Tensor, pad: int) -> list[torch.Tensor]:
    """Shift (B, C_i, H, W) tensors together, each sample by a random offset of at most `pad` pixels, edges repeated."""
    batch, (height, width), device = len(stacks[0]), stacks[0].shape[-2:], stacks[0].device
    n, row, col = torch.arange(batch, device=device), *(torch.randint(2 * pad + 1, (batch,), device=device) for _ in range(2))
    shifted = []
    for stack in stacks:
        padded = torch.cat([stack[..., :1]] * pad + [stack] + [stack[..., -1:]] * pad, 3)  # F.pad has no bytes on a GPU
        padded = torch.cat([padded[:, :, :1]] * pad + [padded] + [padded[:, :, -1:]] * pad, 2)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 pad + 1, 2 pad + 1, H, W), a view
        shifted.append(windows[n, :, row, col])  # whole windows: a gather by pixel would take twice as long
    return shifted


def four_neighbours(maps: torch.Tensor, beyond: float) -> list[torch.Tensor]:
    """(B, k, H, W) -> four such: of every pixel the one below, above, right and left of it; `beyond` past the picture's edge."""
    padded = F.pad(maps, (1, 1, 1, 1), value=beyond)
    return [padded[..., 2:, 1:-1], padded[..., :-2, 1:-1], padded[..., 1:-1, 2:], padded[..., 1:-1, :-2]]


def augment(obs: torch.Tensor, mask: torch.Tensor | None, photos: torch.Tensor, kind: Augmentation, alpha: float = 0.5) -> torch.Tensor:
    """The strong augmentation τ of a stack, one photograph I per sample, the same over its k frames. Uses torch's generator.

    overlay (the paper's):  τ(o) = (1 - α) o + α I
    swap (ours):            τ(o) = m o + (1 - m) I: what the clean mask m keeps, pasted on a photograph, as in video_hard
    mix (ours):             10% clean, 40% overlay, 50% swap, in this order, so that neither seams nor colours nor lines tell agent from background.
                            Half of the swaps also keep patches or horizontal bands of the scene, three in ten its lines and edges (a rail, a shadow).
                            Four in five darken the mask's edge, each pixel by itself, at random: keying leaves such seams, where a pixel is in part
                            the agent's and else black. Three photographs in ten, overlays' too, are shifted to the agent's mean colour

    obs: (B, 3k, H, W) uint8, fp32 or (under autocast) bf16 in [0, 255]; mask: (B, k, H, W) in [0, 1], unused by overlay. Returns obs's shape, float.
    """
    batch, size, device = len(obs), obs.shape[-1], obs.device
    frames = (obs if obs.is_floating_point() else obs.float()).unflatten(1, (-1, 3))  # (B, k, 3, H, W)
    image = random_crops(photos, batch, size).unsqueeze(1).to(frames.dtype)  # (B, 1, 3, H, W)
    if kind == "overlay":
        return torch.lerp(frames, image, alpha).flatten(1, 2)
    if kind not in ("swap", "mix"):
        raise ValueError(f"{kind}: no such augmentation")
    keep = mask.to(frames.dtype)  # (B, k, H, W)
    if kind == "swap":
        return torch.lerp(image, frames, keep.unsqueeze(2)).flatten(1, 2)
    colour_sum, area = (frames.flatten(3) @ keep.flatten(2).unsqueeze(3)).sum((1, 3)), keep.sum((1, 2, 3)).unsqueeze(1)  # (B, 3), (B, 1)
    recolour = colour_sum / area.clamp(min=1) - image.mean((1, 3, 4))
    tint = (torch.rand(batch, 1, device=device) < 0.3) & (area > 9)  # of nine pixels or fewer, over all k frames, the colour is an accident
    image = (image + torch.where(tint, recolour, 0)[:, None, :, None, None].to(image.dtype)).clamp(0, 255)  # a GPU's autocast sums in fp32
    clean, overlaid = batch // 10, batch // 2  # the first tenth stays, the second half is swapped: samples come in no order
    parts = frames[:clean], torch.lerp(frames[clean:overlaid], image[clean:overlaid], alpha)
    frames, image, keep = frames[overlaid:], image[overlaid:], keep[overlaid:]  # (N, ...)
    patched, banded, seamed = (torch.rand(len(keep), 1, 1, 1, device=device) for _ in range(3))
    noise = torch.randn(len(keep), 1, 8, 8, device=device)
    noise = torch.where(banded < 0.5, noise[..., :1], noise)  # one column, which is every column: bands
    smooth = torch.ops.aten.upsample_bilinear2d(noise, [size, size], False)  # F.interpolate, told to be deterministic, is 35 kernels on a GPU
    patches = smooth > torch.randn(len(keep), 1, 1, 1, device=device)
    green, least = frames[:, :, 1].contiguous(), torch.empty(len(keep), 1, 1, 1, device=device).uniform_(5, 60)  # green is as good as grey
    below, beside = (green.diff(dim=2).abs() > least), (green.diff(dim=3).abs() > least)  # not max_pool2d: it takes ten times as long
    lines = F.pad(below, (0, 0, 1, 0)) | F.pad(below, (0, 0, 0, 1)) | F.pad(beside, (1, 0)) | F.pad(beside, (0, 1))  # (N, k, H, W)
    lines &= ~reduce(torch.logical_or, four_neighbours(keep > 0.05, False))  # beside the agent there are edges everywhere, its own
    kept = torch.where(patched < 0.5, patches, lines & (patched < 0.8))  # of the scene
    keep = torch.maximum(keep, kept.to(keep.dtype))
    inside = reduce(torch.minimum, four_neighbours(keep, 1))  # 1 where no neighbour is beyond the mask's edge
    noise = torch.rand(keep.shape, dtype=keep.dtype, device=device)  # rand_like would go by the layout, which torch.compile is free to choose
    dark = (seamed < 0.8) * (1 - inside) * noise * 0.75
    swapped = (frames * (keep * (1 - dark)).unsqueeze(2)).addcmul_(image, (1 - keep).unsqueeze(2))
    return torch.cat([*parts, swapped]).flatten(1, 2)


# ------------------------------------------------------------------------------------------------------------- the sheet
@dataclass
class Args:
    """List the tasks, or draw one under every setting, with its mask."""

    env: str | None = None  # the task to draw; without it, the tasks are listed
    prompt: str | None = None  # what the mask shows; by default the task's own prompt
    distractors: str | None = None  # folder in DMControl-GB's layout; or set TALAS_DISTRACTORS; without it, train and procedural only


def main(args: Args) -> None:
    """Print the table; or write <env>.png: a row per setting, the start and two later states under random actions, each with its mask."""
    if not args.env:
        print(f"{'task':<19}{'loader':<9}{'repeat':>6}{'steps':>7}  default prompt; what else can be named")
        for name, row in TASKS.items():
            print(f"{name:<19}{row.loader:<9}{row.repeat:>6}{row.steps:>7}  {row.prompt}; {', '.join(row.vocabulary)}")
        return print(f"\nand, with action repeat 4, the rest of dm_control's suite: {', '.join(name for name in SUITE if name not in TASKS)}")
    rows = []
    for setting in SETTINGS:
        try:
            env = make_env(args.env, setting, distractors=args.distractors)
            env.reset()
        except UserError as error:
            if setting == "train":
                raise
            print(f"{setting}: left out ({error})")
            continue
        prompt, cells = env.row.prompt if args.prompt is None else args.prompt, []
        env.action_space.seed(1)
        for steps in (0, 15, 35):
            for _ in range(steps):
                env.step(env.action_space.sample())
            cells += [env.render(), env.segment(prompt)[..., None].repeat(3, 2).astype(np.uint8) * 255]
        row = np.concatenate(cells, 1).repeat(3, 0).repeat(3, 1)
        rows.append(cv2.putText(row, setting, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 1, cv2.LINE_AA))
        env.close()
    write_image(Path(f"{env.env_id}.png"), np.concatenate(rows)[..., ::-1])
    print(f"written: {env.env_id}.png (columns: the start, then 15 and 50 random steps later, each with the mask of {prompt!r})")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
