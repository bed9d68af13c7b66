"""TaLaS, Phase I: language-guided mask distillation.

A sentence says what belongs to the task; a frozen segmenter finds it, once, in frames of the clean task; a tiny network, the teacher
masker ψ_T, learns to do the same in a fraction of a millisecond.

    in    a task and a prompt ("the hand, the hammer and the nail")
    out   runs/maskers/<env>/teacher.pt and frames.npz (which Phase II reads), and a run folder with curves, figures and a picture

    python talas_phase1.py --env walker_walk

Three segmenters turn frames and a prompt into masks. `sim`, the default, looks the prompt's phrases up in the simulator: privileged
masks, the yardstick that needs no download. `sam` finds each phrase with an open-vocabulary detector and cuts it out with Segment
Anything. `masks` reads what any other tool made of frames that --export-frames wrote: above all SAMWISE, a video model, the paper's.
The masks of these two lie as <phrase>.../<sequence>/<number>.png, a binary image for each frame: the interface, and the cache.
"""

import fnmatch
import functools
import multiprocessing
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from scipy.spatial.transform import Rotation
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# mujoco comes from envs.py, which has to choose the GL backend before it is imported
import envs
from envs import Setting, TalasEnv, UserError, augment, make_env, mask_iou, mujoco


@dataclass
class Args:
    env: str = "walker_walk"  # the task; `python envs.py` lists them
    prompt: str | None = None  # what belongs to the task, in plain English; by default the task's own. With masks: only for the report of their IoU
    segmenter: Literal["sim", "sam", "masks"] = "sim"  # who makes the masks, see above; masks: another tool, and --masks says where they are
    seed: int = 1  # seeds the frames, the network and the batches
    frames: int | None = None  # clean frames to train on; by default 5,000, fewer on tasks that render slowly, of the cup 10,000
    test_frames: int = 500  # frames that training never sees, for the IoU figures
    steps: int = 2000  # gradient steps
    batch_size: int = 32  # frames per gradient step; 64 leave a CPU's cache and take more than twice as long
    learning_rate: float = 5e-3  # Adam's peak learning rate; it warms up and decays to zero (one cycle)
    reconstruction_coef: float = 0.0  # weight of the page's masked reconstruction (Figure 1), the mean of (ψ(o)⊙o − m*⊙o)², beside the cross-entropy
    distractors: str | None = None  # folder with DMControl-GB's video_easy/ and video_hard/, only to report IoU on; or set TALAS_DISTRACTORS
    overlay: str | None = None  # folder of photographs, only to report IoU on; or set TALAS_OVERLAY; synthetic images without one
    overlay_images: int = 5000  # Phase II's number of photographs; a tenth as many, which it never sees, are sampled here
    output: str | None = None  # where teacher and frames go (Phase II's --maskers, the agent's --masker-path); by default runs/maskers/<env>

    # the segmenters sam and masks
    segment_frames: int = 1000  # frames to segment, instead of --frames, in whole sequences: large frames and the models are slow
    segment_size: int = 512  # pixels, height and width, of what the models see; a pixel of 84×84 is the mask's if an eighth of it is
    sequence_length: int | None = None  # consecutive frames in a sequence (half of these begin in spread states); by default 16, where sam segments 1
    export_frames: str | None = None  # write the frames to this folder, as <sequence>/<number>.png, and stop
    masks: tuple[str, ...] = ()  # folders of masks, <sequence>/<number>.png, 0 and 255, square; several are united; name them by their phrases
    detector: str = "IDEA-Research/grounding-dino-tiny"  # or OWLv2, google/owlv2-base-patch16-ensemble: by its name on the hub, or a local folder
    box_threshold: float = 0.3  # the detector's confidence from which a box counts (OWLv2 wants about 0.1)
    sam_type: Literal["vit_b", "vit_l", "vit_h"] = "vit_b"  # Segment Anything's size
    sam_checkpoint: str | None = None  # its weights, for instance sam_vit_b_01ec64.pth
    iou_threshold: float = 0.0  # Segment Anything's own estimate of a mask's IoU from which the mask counts

    exp_name: str = "phase1"  # names the run folder: runs/<env>__<exp_name>__<seed>__<time>-<process>
    device: str = "auto"  # cpu, cuda, cuda:1, ... or auto
    torch_deterministic: bool = True  # use deterministic kernels where torch has them


# ------------------------------------------------------------------------------------------------------------ the masker
class Masker(nn.Module):
    """ψ: an RGB frame to the probability, per pixel, that it belongs to the task. A small U-Net, of which the other two scripts have copies.

    Convolutions at 84×84 would cost as much as the agent's encoder, so there are none: the stem halves the picture, and the head gives the four
    pixels of a position at once. Edges need few features; telling a robot from a picture of a room needs depth where it is cheap, at 11×11.
    """

    def __init__(self, fine: int = 16, middle: int = 48, coarse: int = 64):
        super().__init__()
        self.stem = nn.Conv2d(3, fine, 4, stride=2, padding=1)  # 84×84 to 42×42
        self.down1 = nn.Conv2d(fine, middle, 3, stride=2, padding=1)  # 21×21
        self.conv1 = nn.Conv2d(middle, middle, 3, padding=1)
        self.down2 = nn.Conv2d(middle, coarse, 3, stride=2, padding=1)  # 11×11
        self.conv2 = nn.ModuleList(nn.Conv2d(coarse, coarse, 3, padding=1) for _ in range(2))
        self.up2 = nn.Conv2d(coarse, middle, 1)
        self.fuse1 = nn.Conv2d(middle, middle, 3, padding=1)
        self.up1 = nn.Conv2d(middle, fine, 1)
        self.fuse0 = nn.Conv2d(fine, fine, 3, padding=1)
        self.head = nn.Conv2d(fine, 4, 1)  # four logits a position, shuffled back to 84×84

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) frames in [0, 255], H and W even -> (N, H, W) logits."""
        fine = F.relu(self.stem(frames / 255 - 0.5))
        middle = F.relu(self.conv1(F.relu(self.down1(fine))))
        coarse = F.relu(self.down2(middle))
        for conv in self.conv2:
            coarse = coarse + F.relu(conv(coarse))
        middle = F.relu(self.fuse1(middle + F.interpolate(self.up2(coarse), size=middle.shape[-2:])))
        fine = F.relu(self.fuse0(fine + F.interpolate(self.up1(middle), size=fine.shape[-2:])))
        return F.pixel_shuffle(self.head(fine), 2).squeeze(1)


def masker_loss(logits: torch.Tensor, target: torch.Tensor, frames: torch.Tensor, reconstruction_coef: float) -> tuple[torch.Tensor, torch.Tensor]:
    """BCE(ψ(o), m*) and the mean of (ψ(o)⊙o − m*⊙o)² (0 if its weight is 0), o in [0, 1]; logits, target (N, H, W); frames (N, 3, H, W), bytes."""
    bce = F.binary_cross_entropy_with_logits(logits, target)
    if not reconstruction_coef:
        return bce, torch.zeros_like(bce)
    return bce, ((logits.sigmoid() - target).unsqueeze(1) * frames / 255).square().mean()


# ------------------------------------------------------------------------------------------------------------ the states to look at
Kind = Literal["spread", "random", "good", "sequence"]

# Joint ranges (rad, m), cut to a joint's limits if it has some. SPREAD: instead of those limits, or where a slide has none. GOOD: a good policy's;
# joints that are not named stay as reset left them (free bodies are turned all the same), and Adroit's other tasks have ARM.
SPREAD = {"ball_in_cup_catch": {"cup_x": (-0.25, 0.25), "cup_z": (-0.2, 0.3), "ball_x": (-0.35, 0.35), "ball_z": (-0.15, 0.7)}}
GOOD = {
    "cartpole_swingup": {"hinge_1": (-0.3, 0.3), "slider": (-0.8, 0.8)},
    "walker_walk": {"rooty": (-0.2, 0.2), "*_hip": (-0.3, 0.7), "*_knee": (-0.8, 0), "*_ankle": (-0.3, 0.3)},
    "ball_in_cup_catch": {"ball_x": (-0.015, 0.015), "ball_z": (0.335, 0.4)},
    "finger_spin": {"proximal": (0.2, 1.2), "distal": (-1.2, 0.2), "hinge": (-3.2, 3.2)},
    "cheetah_run": {"rooty": (-0.3, 0.3), "[bf]*": (-0.4, 0.4)},
    "unitree_walk": {"*_hip_joint": (-0.15, 0.15), "*_thigh_joint": (0.3, 1.2), "*_calf_joint": (-1.9, -0.92)},
    "pen": {"WRJ*": (-0.15, 0.15)},
}
GOOD |= {"walker_stand": GOOD["walker_walk"], "unitree_stand": GOOD["unitree_walk"]}
ARM = {"AR*": (-2, 2), "WRJ*": (-2, 2)}  # arm and wrist anywhere, within their limits; of fifty such poses one near the goal is taken, see GOALS
GOALS = {"pen": ("S_grasp", "S_grasp"), "door": ("S_grasp", "S_handle"), "hammer": ("tool", "S_target"), "relocate": ("S_grasp", "target")}


def scatter_joints(env: TalasEnv, kind: Literal["spread", "good"], rng: np.random.Generator) -> None:
    """Joints at random in their ranges (good: those that GOOD names), free bodies and walking robots in any pose (good: upright), near the ground."""
    model, data, hand = env.model, env.data, env.row.loader == "adroit"
    ranges = SPREAD.get(env.env_id, {}) if kind == "spread" else GOOD.get(env.env_id, ARM if hand else {})
    width = rng.uniform(0.2, 1) if hand else 1.0  # a share of each range: all of a hand's joints near their limits at once would be a rare sight
    lift = None  # the index in qpos of what lifts the robot
    for j in range(model.njnt):
        name, joint, q = model.joint(j).name, model.jnt_type[j], model.jnt_qposadr[j]
        span = next((span for pattern, span in ranges.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if joint == mujoco.mjtJoint.mjJNT_FREE:
            tumbled, tilt = (rng.random() < 0.5, 0.3) if kind == "spread" else (False, 0.04)
            upright = Rotation.from_euler("ZYX", [rng.uniform(-np.pi, np.pi), *rng.normal(0, tilt, 2)])
            data.qpos[q + 3 : q + 7] = (Rotation.random(rng=rng) if tumbled else upright).as_quat(scalar_first=True)
            if env.row.loader == "unitree":
                data.qpos[q : q + 2] = rng.uniform((-2, -2), (10, 2))  # where an episode gets: at x = 10 m the light is dimmer
            lift = q + 2 if lift is None else lift
        elif span or (kind == "spread" and (model.jnt_limited[j] or joint == mujoco.mjtJoint.mjJNT_HINGE)):
            limits = model.jnt_range[j] if model.jnt_limited[j] else (-np.pi, np.pi)
            low, high = np.clip(span or limits, *limits)
            data.qpos[q] = (low + high) / 2 + width * (high - low) * rng.uniform(-0.5, 0.5)
        lift = q if name == "rootz" else lift  # the suite's walkers' and cheetahs'; a slide of another name is not lifted
    if lift is not None:  # until the lowest corner of its geoms' bounding boxes touches the ground, z = 0
        mujoco.mj_kinematics(model, data)
        moving = np.flatnonzero(model.geom_bodyid > 0)
        up, box = data.geom_xmat[moving, 6:], model.geom_aabb[moving]  # the world's z in each geom's axes; its box there: centre, half sizes
        lowest = np.min(data.geom_xpos[moving, 2] + np.sum(up * box[:, :3], 1) - np.sum(np.abs(up) * box[:, 3:], 1))
        data.qpos[lift] += (0 if kind == "good" else rng.exponential(0.1)) - lowest


def place_object(env: TalasEnv, where: Literal["hand", "grip", "air", "table"], rng: np.random.Generator) -> None:
    """Put Adroit's object, which moves on three slides and three Euler hinges, in or near the palm, in the air or on the table."""
    mujoco.mj_kinematics(env.model, env.data)
    body, palm = env.model.body("Object"), env.data.body("palm")
    axes = palm.xmat.reshape(3, 3)  # x to the index finger, -y out of the palm, z to the fingertips
    rest, turn = Rotation.from_quat(body.quat, scalar_first=True), Rotation.random(rng=rng)
    position = palm.xpos + axes @ rng.normal((0.007, -0.05, 0.075), 0.03 if where == "hand" else 0.004)  # the middle of a fist
    if where == "air":
        position = rng.uniform((-0.2, -0.35, 0.1), (0.2, 0.2, 0.4))
    elif where == "table":  # flat, turned about the vertical
        position, turn = rng.uniform((-0.2, -0.35, 0.036), (0.2, 0.2, 0.04)), Rotation.from_euler("z", rng.uniform(0, 2 * np.pi)) * rest
    elif where == "grip" and env.env_id == "hammer":  # the head past the thumb, its face to the fingertips
        position += axes[:, 1] * 0.012
        turn = Rotation.from_matrix(axes @ np.diag((-1.0, 1.0, -1.0))) * Rotation.from_euler("y", rng.uniform(-0.6, 0.6))
    elif where == "grip" and env.env_id == "pen":  # near the target's orientation
        turn = Rotation.from_rotvec(rng.normal(0, 0.2, 3)) * Rotation.from_matrix(env.data.body("target").xmat.reshape(3, 3))
    env.data.qpos[-6:-3] = rest.inv().apply(position - body.pos)
    env.data.qpos[-3:] = (rest.inv() * turn).as_euler("XYZ")


def close_fingers(env: TalasEnv, rng: np.random.Generator) -> None:
    """Close Adroit's fingers for 0.2 s, all else held still, so that the simulator finds the grip on what is in the hand."""
    model, data = env.model, env.data
    fingers = np.array([j for j in range(model.njnt) if model.joint(j).name[:2] in ("FF", "MF", "RF", "LF", "TH")])  # joint j is qpos[j]
    low, high = model.jnt_range[fingers].T
    grip = np.where(low == 0, rng.uniform(0.5, 1) * high, rng.uniform(-0.1, 0.1, len(fingers)))  # ranges of flexion start at 0, of spreading below
    grip[-5:] = rng.uniform(0.6, 1) * np.array([0.9, 1.1, 0.1, 0.3, -0.6])  # the thumb, across the palm
    data.ctrl[np.isin(model.actuator_trnid[:, 0], fingers)] = grip
    others = np.setdiff1d(np.arange(model.nq), fingers)
    pose = data.qpos[others].copy()
    for _ in range(100):
        mujoco.mj_step(model, data)
        data.qpos[others], data.qvel[others] = pose, 0
    data.qvel[:] = 0


def place(env: TalasEnv, kind: Literal["spread", "good"], rng: np.random.Generator) -> None:
    """Bring the simulation into one `spread` or `good` state, at rest, its motors aimed at it."""
    model, data = env.model, env.data
    env.task.reset(rng)
    tries = []
    for _ in range(50):
        scatter_joints(env, kind, rng)
        if env.row.loader == "adroit" and env.env_id != "door":
            place_object(env, "grip" if kind == "good" else rng.choice(["hand", "hand", "air", "table"]), rng)
        data.qvel[:] = 0
        mujoco.mj_forward(model, data)
        away = 0.0
        stuck = data.ncon > 0 and data.contact.dist.min() < -0.005  # what is 5 mm deep in something would be shot out of it
        if kind == "good" and env.env_id in GOALS:
            here, there = (data.site(site).xpos for site in GOALS[env.env_id])
            away = float(np.linalg.norm(here - there)) * rng.uniform(1, 2)  # not always the very nearest
        tries.append((stuck, away, data.qpos.copy()))
        if not stuck and not away:  # with a goal never: the nearest of all fifty
            break
    data.qpos[:] = min(tries, key=lambda t: t[:2])[2]
    driven, kp = model.actuator_trnid[:, 0], -model.actuator_biasprm[:, 1]
    for i in np.flatnonzero((model.actuator_trntype == mujoco.mjtTrn.mjTRN_JOINT) & (kp > 0)):  # gain · ctrl = kp · qpos; torque motors have no kp
        data.ctrl[i] = data.qpos[model.jnt_qposadr[driven[i]]] * kp[i] / model.actuator_gainprm[i, 0]
    if kind == "good" and env.row.loader == "adroit":
        close_fingers(env, rng)
    mujoco.mj_forward(model, data)


def visit_states(env: TalasEnv, kind: Kind, count: int, rng: np.random.Generator) -> Iterator[None]:
    """Bring the simulation into `count` states to be looked at, and yield at each. Nothing is rendered here.

    A random policy shows a masker only what a random policy sees: a pole that hangs, a walker that lies. So half of the frames with the simulator's
    masks are of `spread` states, from anywhere in the joints' ranges, settled for a few control steps. `good` states, for tests, are a good policy's.
    A `sequence` is of consecutive agent steps, as a video model wants them, from a spread state or from within a random policy's episode.
    """
    task = env.task
    for i in range(count):
        if kind in ("spread", "good"):
            place(env, kind, rng)
            for _ in range(rng.integers(0, 6)):
                task.step(task.hold())
        else:
            steps = 1  # agent steps from the last state to this one
            if i == 0 or (kind == "random" and env.below_ground):  # begin anew; a sequence is never cut
                if kind == "sequence" and rng.random() < 0.5:
                    place(env, "spread", rng)
                else:
                    task.reset(rng)
                    if kind == "sequence":  # begins in an episode's first half, where `count` steps are left
                        steps = int(rng.integers(1, min(env.episode_steps // 2, env.episode_steps - count + 2)))
                action = rng.uniform(-1, 1, env.model.nu)
                keep = rng.choice([0.0, 0.8, 0.95])  # the chance that a control step keeps the last one's action: noise, or pushes that get somewhere
            if kind == "random":  # neighbouring steps look alike, and physics is cheap beside rendering
                steps = rng.integers(1, 5)
            for _ in range(steps * env.repeat):
                if rng.random() >= keep:
                    action = rng.uniform(-1, 1, env.model.nu)
                task.step(action)
        yield


# ------------------------------------------------------------------------------------------------------------ the frames
CLIP = 50  # states that a process collects in one go (of sequences: one), from a seed of their own: the same, however many processes there are
make_env_once = functools.lru_cache(make_env)


def collect_clip(args: Args, prompt: str, clip: tuple[tuple[Setting, ...], int, Kind, int]) -> dict[str, np.ndarray]:
    """One clip, n states: {"clean": (n, 3, H, W) uint8, "masks": (n, H, W) bool, the simulator's}; under each setting's name the same states in it,
    as "clean"; of sequences also "masks/<phrase>", for each phrase that the simulator can name."""
    settings, index, kind, n = clip
    rng = np.random.default_rng([args.seed, int(len(settings) > 0), index])  # 1: tests; 0: training, whose sequences sequence_frames visits again
    env, *others = (make_env_once(args.env, setting, args.seed, distractors=args.distractors) for setting in ("train", *settings))
    named = {"masks": env.nameable(prompt)}
    if kind == "sequence":
        named |= {f"masks/{phrase}": phrase for phrase in envs.parse_prompt(prompt) if phrase in env.vocabulary}
    seen = {key: np.empty((n, 3, env.size, env.size), np.uint8) for key in ("clean", *settings)}
    seen |= {key: np.empty((n, env.size, env.size), bool) for key in named}
    for i, _ in enumerate(visit_states(env, kind, n, rng)):
        seen["clean"][i] = env.render().transpose(2, 0, 1)
        for key, words in named.items():
            seen[key][i] = env.segment(words)
        for setting, other in zip(settings, others, strict=True):
            if i % 25 == 0:  # a new background, two a clip
                other.reset(options={"episode": 2 * index + i // 25})
            seen[setting][i] = other.show(env.get_state(), int(rng.integers(other.episode_steps))).transpose(2, 0, 1)
    return seen


def in_processes(function: Callable, jobs: Iterable, what: str) -> list:
    """The function's results for each job, in their order, with a bar. Raises UserError when a process dies or does not come back."""
    # Rendering is what takes the time, and a renderer uses one core, so each core gets a process. Spawned: EGL does not survive a fork.
    pool = ProcessPoolExecutor(min(envs.cores(), 8), multiprocessing.get_context("spawn"), envs.start_worker)
    try:
        with envs.stop_later():
            futures = [pool.submit(function, job) for job in jobs]
            bar = tqdm(futures, what, unit="clip", mininterval=1 if sys.stderr.isatty() else 15)
        return [future.result(timeout=900) for future in bar]
    except (BrokenExecutor, TimeoutError) as error:
        raise UserError(f"{what}: a process died or hangs ({envs.brief(error)}); is there memory enough? Start the same again") from None
    finally:
        for process in multiprocessing.active_children():  # whatever they are in the middle of
            process.kill()
        pool.shutdown(cancel_futures=True)  # its thread may otherwise meet the interpreter's own end


def collect(args: Args, prompt: str, *wanted: tuple[dict[Kind, int], tuple[Setting, ...]]) -> list[dict[str, np.ndarray]]:
    """For each (counts, settings), collect_clip's arrays of so many states of each kind. Settings (training: none) tell their clips apart."""
    jobs = []
    for counts, settings in wanted:
        length = args.sequence_length if "sequence" in counts else CLIP
        clips = [(kind, min(length, count - i)) for kind, count in counts.items() for i in range(0, count, length)]
        jobs += [(settings, index, *clip) for index, clip in enumerate(clips)]
    collected = in_processes(functools.partial(collect_clip, args, prompt), jobs, "collect frames")
    groups = [[clip for job, clip in zip(jobs, collected, strict=True) if job[0] == settings] for _, settings in wanted]
    return [{key: np.concatenate([clip[key] for clip in group]) for key in group[0]} for group in groups]


# ------------------------------------------------------------------------------------------------------------ the segmenters sam and masks
MOST_BOXES = 10  # of a phrase in a frame, the surest: a mask each, and hundreds of a hesitant detector's would fill the memory
SAM_WEIGHTS = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}
DETECTOR_FILES = """without a network, put its config.json, model.safetensors, preprocessor_config.json, tokenizer.json, tokenizer_config.json, \
special_tokens_map.json and vocab.txt (OWLv2: vocab.json and merges.txt) into a folder, and give that as --detector"""


def sequence_names(args: Args) -> list[str]:
    """Folders of frames and masks, named by all flags that the frames depend on, except their size: masks of other frames do not fit. Whoever changes
    the task itself, in the code, has to delete them."""
    count = -(-args.segment_frames // args.sequence_length)
    return [f"{args.env}_seed{args.seed}_{args.sequence_length}frames_{i:04}" for i in range(count)]


def sequence_frames(args: Args, index: int) -> Iterator[np.ndarray]:
    """One sequence's frames, (H, W, 3) uint8: the states that collect_clip sees, larger."""
    env = make_env_once(args.env, "train", args.seed, image_size=args.segment_size)
    for _ in visit_states(env, "sequence", args.sequence_length, np.random.default_rng([args.seed, 0, index])):
        yield env.render()


def export_sequence(args: Args, index: int) -> None:
    """Write one sequence's frames for another tool, <sequence>/<number>.png, in the place of any of that name; other sequences stay as they are."""
    folder = Path(args.export_frames) / sequence_names(args)[index]
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(sequence_frames(args, index)):
        envs.write_image(folder / f"{i:05}.png", frame[..., ::-1])


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, H) bool -> (size, size) bool: a pixel is set from an eighth of its area on. This agrees best with TalasEnv.segment's masks (IoU 0.96 on the
    cup to 0.99); from half of its area on it would be 0.64 to 0.90, and the cup's string would all but vanish."""
    return cv2.resize(np.float32(mask), (size, size), interpolation=cv2.INTER_AREA if len(mask) > size else cv2.INTER_NEAREST) >= 1 / 8


def read_masks(args: Args, folder: Path, size: int) -> np.ndarray:
    """(n, size, size) bool: a folder's masks, sequence after sequence. Raises UserError for misfits."""
    expected, masks, peak = [f"{i:05}.png" for i in range(args.sequence_length)], [], 0
    for sequence in sequence_names(args):
        where, there = f"{folder}/{sequence}", {path.name for path in (folder / sequence).glob("[!.]*.png")}
        if odd := sorted(there ^ set(expected)):
            what = "missing" if len(there) < len(expected) else "too many" if len(there) > len(expected) else "misnumbered"
            fit = f"{len(there)} for the frames {expected[0]} to {expected[-1]}, first misfit {odd[0]} (the flags as when exported?)"
            raise UserError(f"{where}: masks are {what}: {fit}")
        for name in expected:
            if (mask := envs.decode_image(folder / sequence / name, cv2.IMREAD_GRAYSCALE)) is None:
                raise UserError(f"{where}/{name}: cannot be decoded as an image")
            if mask.shape[0] != mask.shape[1]:
                raise UserError(f"{where}/{name}: wrongly shaped, {mask.shape[1]} by {mask.shape[0]} pixels; the frames are square")
            peak = max(peak, int(mask.max()))
            masks.append(resize_mask(mask > 127, size))
    if not np.any(masks):
        hint = "try other words or a lower --box-threshold; in another tool's masks 255 is what the prompt names"
        raise UserError(f"{folder}: all {len(masks)} masks are empty (their largest value is {peak}): {hint}")
    return np.stack(masks)


def load_sam(args: Args, device: torch.device) -> Callable[[np.ndarray, list[str]], np.ndarray]:
    """A function of an (H, W, 3) uint8 frame and P phrases that returns (P, H, W) bool masks: boxes by the detector, masks of them by SAM."""
    try:
        from segment_anything import SamPredictor, sam_model_registry
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
    except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision of different builds
        raise UserError(f"--segmenter sam: {envs.brief(error)}; pip install -r requirements.txt transformers==5.24.0, all from one index") from None
    try:
        weights = envs.load_plain(Path(str(args.sam_checkpoint)))
        sam = sam_model_registry[args.sam_type]()
        sam.load_state_dict(weights)
    except Exception as error:  # no file, or a damaged one, which fails in many ways
        why = f"cannot be loaded as the weights of {args.sam_type}, which are at https://dl.fbaipublicfiles.com/segment_anything/{SAM_WEIGHTS[args.sam_type]}"
        raise UserError(f"--sam-checkpoint {args.sam_checkpoint}: {why} ({envs.brief(error)})") from None
    there = {"local_files_only": Path(args.detector).is_dir() or not envs.online(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))}
    try:
        processor = AutoProcessor.from_pretrained(args.detector, **there)
        detector = AutoModelForZeroShotObjectDetection.from_pretrained(args.detector, use_safetensors=True, **there).to(device).eval()
    except Exception as error:  # no network, no files, damaged files: each in its own way
        raise UserError(f"--detector {args.detector}: cannot be loaded ({envs.brief(error)}); {DETECTOR_FILES}") from None
    predictor = SamPredictor(sam.to(device).eval())

    @torch.no_grad()
    def segment(frame: np.ndarray, phrases: list[str]) -> np.ndarray:
        boxes, size = [], [frame.shape[:2]]
        for phrase in phrases:  # one at a time: of several in one sentence, Grounding DINO does not always say which it has found
            output = detector(**processor(images=[frame], text=[[phrase]], return_tensors="pt").to(device))
            (one,) = processor.post_process_grounded_object_detection(output, threshold=args.box_threshold, target_sizes=size)
            boxes.append(one["boxes"][one["scores"].argsort(descending=True)[:MOST_BOXES]])  # (K, 4), pixels: left, top, right, bottom
        if not any(map(len, boxes)):
            return np.zeros((len(phrases), *frame.shape[:2]), bool)
        predictor.set_image(frame)  # what takes the time: once a frame, whatever the phrases
        scaled = predictor.transform.apply_boxes_torch(torch.cat(boxes), frame.shape[:2])
        drawn, quality, _ = predictor.predict_torch(None, None, scaled, multimask_output=False)  # (K, 1, H, W) bool, (K, 1)
        drawn = drawn[:, 0] & (quality >= args.iou_threshold)[..., None]
        return np.stack([part.any(0).cpu().numpy() for part in drawn.split([len(part) for part in boxes])])

    return segment


def run_sam(args: Args, phrases: list[str], device: torch.device) -> list[Path]:
    """Segment by sam, into a folder of masks per phrase; returns the folders. They are a cache: named by phrase, models, thresholds and size, and
    only sequences that lack a frame are segmented."""
    names, cache = sequence_names(args), Path(f"runs/segmented/{args.env}")
    checksum = zlib.crc32(f"{args.detector} {args.sam_checkpoint}".encode())  # of whole paths: others, in other folders, may have these names as well
    models = f"{Path(args.detector).name}__{Path(str(args.sam_checkpoint)).stem}__{args.box_threshold}__{args.iou_threshold}__{args.segment_size}"
    folders = [cache / (re.sub(r"[^\w-]+", "_", phrase) + f"__{models}__{checksum:08x}") for phrase in phrases]
    wanted = [i for i, name in enumerate(names) if any(len([*(folder / name).glob("[0-9]*.png")]) < args.sequence_length for folder in folders)]
    segment = load_sam(args, device) if wanted else None
    for i in tqdm(wanted, "segment", unit="sequence", mininterval=1 if sys.stderr.isatty() else 15):
        for number, frame in enumerate(sequence_frames(args, i)):
            for folder, mask in zip(folders, segment(frame, phrases), strict=True):
                (folder / names[i]).mkdir(parents=True, exist_ok=True)
                envs.write_image(folder / names[i] / f"{number:05}.png", np.uint8(mask) * 255)
    return folders


def masks_by_phrase(args: Args, prompt: str, device: torch.device, size: int) -> dict[str, np.ndarray]:
    """The masks m* of sam or of another tool: {phrase: (n, size, size) bool, "together": their union}, a phrase as its folder is named."""
    folders = [Path(folder) for folder in args.masks] or run_sam(args, envs.parse_prompt(prompt), device)
    parts: dict[str, np.ndarray] = {}
    for folder in folders:  # two of one name, a phrase by two tools, are united
        name = re.sub("^(the|an?) ", "", folder.absolute().name.split("__")[0].replace("_", " ").lower())  # the_hand, or hand__dino__...: hand
        parts[name] = parts.get(name, False) | read_masks(args, folder, size)
    parts["together"] = np.any(list(parts.values()), axis=0)
    found = parts["together"].any((1, 2))
    if found.mean() < 0.5:
        where = f"in {len(found) - found.sum()} of {len(found)} frames, see {', '.join(map(str, folders))}"
        raise UserError(f"--prompt {prompt!r}: nothing was found {where}; try other words, or a lower --box-threshold, or other --masks")
    return parts


# ------------------------------------------------------------------------------------------------------------ the report
def report_segmenter(parts: dict[str, np.ndarray], training: dict[str, np.ndarray], sheet: Path) -> dict[str, float]:
    """IoU of masks_by_phrase's parts with the simulator's masks, which collect brought, printed and as figures; and a picture of the ten worst
    frames: frame, what the segmenter keeps, what the simulator does."""
    figures, union = {}, parts["together"]
    print(f"\n{'segmented':<24}{'found':>7}{'IoU with the simulator':>24}")
    for name, masks in parts.items():
        true = training.get("masks" if name == "together" else f"masks/{name}")  # none: not in the prompt, or not in the simulator's vocabulary
        found, iou = float(masks.any((1, 2)).mean()), None if true is None else float(mask_iou(masks, true).mean())
        print(f"{name:<24}{found:>7.0%}{'–' if iou is None else f'{iou:.3f}':>24}")
        figures |= {f"segmenter/found/{name}": found} | ({} if iou is None else {f"segmenter/iou/{name}": iou})
    worst = np.argsort(mask_iou(union, training["masks"]))[:10]
    frames = training["clean"][worst]
    envs.write_sheet(sheet, [np.concatenate(frames * keep, 2) for keep in (1, union[worst, None], training["masks"][worst, None])])
    return figures


# ------------------------------------------------------------------------------------------------------------ main
def main(args: Args) -> None:
    args.env = envs.resolve_env_id(args.env)
    envs.check_flags(args, frames=2, test_frames=4, overlay_images=10)
    device, bf16 = envs.set_up_torch(args.device, args.seed, args.torch_deterministic)
    args.distractors = args.distractors or os.environ.get("TALAS_DISTRACTORS")
    if args.distractors and not Path(args.distractors).is_dir():
        raise UserError(f"--distractors {args.distractors}: no such folder")
    if (args.segmenter == "masks") != bool(args.masks):
        raise UserError("--segmenter masks and --masks FOLDER go together; --export-frames writes the frames that the masks are to be of")
    args.sequence_length = args.sequence_length or (1 if args.segmenter == "sam" and not args.export_frames else 16)
    env = make_env(args.env, "train", args.seed)
    env.reset()
    prompt = env.row.prompt if args.prompt is None else args.prompt
    if args.sequence_length > env.episode_steps:
        raise UserError(f"--sequence-length {args.sequence_length}: an episode of {args.env} has {env.episode_steps} steps")
    if args.segmenter == "sim":
        env.segment(prompt)  # a phrase that the simulator does not know is an error before anything is written
    elif (yardstick := env.nameable(prompt)) != prompt:
        print(f"the simulator cannot name all of {prompt!r}: IoU, except for single phrases, is with its masks of {yardstick!r}", flush=True)
    env.close()
    if args.export_frames:
        in_processes(functools.partial(export_sequence, args), range(len(sequence_names(args))), f"render {args.segment_size}² frames")
        return print(f"written: {len(sequence_names(args))} sequences of {args.sequence_length} frames in {args.export_frames}/")
    train(args, prompt, {} if args.segmenter == "sim" else masks_by_phrase(args, prompt, device, env.size), device, bf16)


def train(args: Args, prompt: str, parts: dict[str, np.ndarray], device: torch.device, bf16: bool) -> None:
    """Collect frames, train the teacher on the segmenter's masks of them (parts; if none, the simulator's), report, and write it all."""
    torch.manual_seed(args.seed)  # anew: building the segmenters' models has drawn from it, reading their masks has not
    started, output = time.time(), Path(args.output or f"runs/maskers/{args.env}")
    run = Path(f"runs/{args.env}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    photos = envs.load_photographs(args.overlay, args.overlay_images, args.seed, "test")  # Phase II trains on the others
    output.mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    envs.write_json(run / "args.json", asdict(args))
    writer = SummaryWriter(run)

    # ---- the frames, and the segmenter's masks m* of them
    n = len(parts["together"]) if parts else args.frames or envs.task_row(args.env).mask_frames
    t = args.test_frames
    print(f"Phase I on {args.env}: {n:,} clean frames, prompt: {prompt!r}, masks: {args.segmenter}", flush=True)
    settings = ("procedural", *(name for name in ("video_easy", "video_hard") if args.distractors and (Path(args.distractors) / name).is_dir()))
    # The tests first: what is wrong with the media shows at once. Their masks are the simulator's, the yardstick.
    for_tests = {"spread": t - t // 2, "random": t // 4, "good": t // 2 - t // 4}
    for_training = {"sequence": n} if parts else {"spread": n // 2, "random": n - n // 2}
    tests, training = collect(args, prompt, (for_tests, settings), (for_training, ()))
    tests["overlay"] = augment(torch.from_numpy(tests["clean"]), None, photos, "overlay").byte().numpy()
    frames, masks, figures = training["clean"], training["masks"], {}  # the simulator's, unless there are others
    if parts:
        figures, masks = report_segmenter(parts, training, run / "worst_masks.png"), parts["together"]
        found = masks.any((1, 2))
        print(f"left out rather than taught as empty: {n - found.sum()} of {n} frames, in which nothing was found")
        frames, masks, n = frames[found], masks[found], int(found.sum())
    if not masks.any():
        raise UserError(f"--prompt {prompt!r}: not one pixel of {n} frames shows it")
    arrays = {"train_frames": frames, "train_masks": np.packbits(masks), **{f"test_{key}": value for key, value in tests.items()}}
    for name in ("teacher.pt", "student.pt"):
        (output / name).unlink(missing_ok=True)  # made from other frames, perhaps for another prompt
    envs.write_whole(output / "frames.npz", functools.partial(np.savez, **arrays))

    # ---- the teacher
    masker = Masker().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(masker.parameters(), lr=args.learning_rate)
    warm = 0.2 if args.steps == 10 else 0.1  # of ten steps, OneCycleLR would divide by a tenth of them minus one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=warm)
    frames_t, masks_t = torch.from_numpy(frames), torch.from_numpy(masks)
    bar = tqdm(range(args.steps), desc="train the teacher", unit="step", mininterval=1 if sys.stderr.isatty() else 15)
    for step in bar:
        batch = torch.randint(n, (args.batch_size,))
        obs, target = frames_t[batch].to(device, memory_format=torch.channels_last), masks_t[batch].to(device).float()  # (B, 3, H, W), (B, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = masker(obs)
        bce, reconstruction = masker_loss(logits.float(), target, obs, args.reconstruction_coef)
        loss = bce + args.reconstruction_coef * reconstruction
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(masker.parameters(), 0.2)  # without it a teacher of hammer once stayed at an IoU of 0.78 instead of 0.89
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            if not loss.isfinite():
                raise UserError(f"step {step}: the loss is {loss.item()}; give a lower --learning-rate")
            writer.add_scalar("losses/bce", bce.item(), step)
            if args.reconstruction_coef:
                writer.add_scalar("losses/reconstruction", reconstruction.item(), step)
            bar.set_postfix(bce=f"{bce.item():.4f}", refresh=False)

    # ---- what came of it
    figures |= envs.report(masker, tests, device, bf16, run / "masks.png")
    for key, value in figures.items():
        writer.add_scalar(key, value, args.steps)
    writer.close()
    figures |= {"frames": n, "mask_pixels": float(masks.sum((1, 2)).mean()), "train/updates": args.steps, "seconds": round(time.time() - started, 1)}
    envs.write_json(run / "metrics.json", figures)
    about = {"kind": "teacher", "env_id": args.env, "image_size": frames.shape[-1], "prompt": prompt, "segmenter": args.segmenter}
    envs.save_tensors(output / "teacher.pt", about | {"state_dict": masker.cpu().state_dict()})
    print(f"\nwritten: {output}/teacher.pt, {output}/frames.npz, {run}/metrics.json, {run}/*masks.png (look at them)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:  # OSError: a disk that is full, a folder that cannot be written; it names the file
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
