"""TaLaS, Phase I: language-guided mask distillation.

A sentence says what belongs to the task; a frozen segmenter finds it, once, in frames of the clean task; a tiny network, the teacher
masker ψ_T, learns to do the same in a fraction of a millisecond.

    in    a task and a prompt ("the hand, the hammer and the nail")
    out   runs/maskers/<env>/teacher.pt and frames.npz (which Phase II reads), and a run folder with curves, figures and a picture

    python talas_phase1.py --env walker_walk

The segmenter that is built in, `sim`, looks the prompt's phrases up in the simulator: privileged masks, the yardstick that needs no
download. The method's own is a language-conditioned video model; whatever it is, it stands behind one function, `segment_frames`.
"""

import fnmatch
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.pool import Pool
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
    prompt: str | None = None  # what belongs to the task, in plain English; by default the task's own prompt
    segmenter: Literal["sim"] = "sim"  # who turns frames and prompt into masks; sim: the simulator's segmentation by vocabulary look-up (privileged)
    seed: int = 1  # seeds the frames, the network and the batches
    frames: int | None = None  # clean frames to train on; by default 5,000, fewer on tasks that render slowly
    test_frames: int = 500  # frames that training never sees, for the IoU figures
    steps: int = 2000  # gradient steps
    batch_size: int = 32  # frames per gradient step; 64 leave a CPU's cache and take more than twice as long
    learning_rate: float = 5e-3  # Adam's peak learning rate; it warms up and decays to zero (one cycle)
    reconstruction_coef: float = 0.0  # weight of Figure 1's masked reconstruction ‖ψ(o)⊙o − m*⊙o‖² beside the cross-entropy (our reading)
    distractors: str | None = None  # folder with DMControl-GB's video_easy/ and video_hard/, only to report IoU on; or set TALAS_DISTRACTORS
    overlay: str | None = None  # folder of photographs, only to report IoU on; or set TALAS_OVERLAY; synthetic images without one
    overlay_images: int = 5000  # how many photographs to sample from the folder
    output: str | None = None  # where the teacher and its frames go; by default runs/maskers/<env>
    exp_name: str = "phase1"  # names the run folder: runs/<env>__<exp_name>__<seed>__<time>-<process>
    device: str = "auto"  # cpu, cuda, cuda:1, ... or auto
    torch_deterministic: bool = True  # use deterministic kernels where torch has them


# ------------------------------------------------------------------------------------------------------------ the masker
class Masker(nn.Module):
    """ψ: an RGB frame to the probability, per pixel, that it belongs to the task. A small U-Net, 40 million multiply-adds a frame.

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
    """BCE(ψ(o), m*) and ‖ψ(o)⊙o − m*⊙o‖² (mean over pixels, o in [0, 1]); logits, target (N, H, W); frames (N, 3, H, W) in [0, 255]."""
    bce = F.binary_cross_entropy_with_logits(logits, target)
    if not reconstruction_coef:
        return bce, torch.zeros_like(bce)
    return bce, ((logits.sigmoid() - target).unsqueeze(1) * frames / 255).square().mean()


# ------------------------------------------------------------------------------------------------------------ the states to look at
Kind = Literal["spread", "random", "good"]

# Joint ranges (rad, m) by patterns of names. `spread`: for joints without limits; all others take their own. `good`: where a good policy keeps them.
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
ARM = {"AR*": (-2, 2), "WRJ*": (-2, 2)}  # Adroit's arm and wrist, to their limits; of many such poses the one nearest to the goal is taken
GOALS = {"pen": ("S_grasp", "S_grasp"), "door": ("S_grasp", "S_handle"), "hammer": ("tool", "S_target"), "relocate": ("S_grasp", "target")}


def scatter_joints(env: TalasEnv, kind: Literal["spread", "good"], rng: np.random.Generator) -> None:
    """Every joint at random in its range, free bodies and walking robots in any pose (good: upright), on or a little above the ground."""
    model, data, hand = env.model, env.data, env.row.loader == "adroit"
    ranges = SPREAD.get(env.env_id, {}) if kind == "spread" else GOOD.get(env.env_id, ARM if hand else {})
    width = rng.uniform(0.2, 1) if hand else 1.0  # twenty-four joints at their limits are a rare sight
    height = None  # the index in qpos of what lifts the robot
    for j in range(model.njnt):
        name, joint, q = model.joint(j).name, model.jnt_type[j], model.jnt_qposadr[j]
        span = next((span for pattern, span in ranges.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if joint == mujoco.mjtJoint.mjJNT_FREE:
            tumbled, tilt = kind == "spread" and rng.random() < 0.5, 0.3 if kind == "spread" else 0.04
            upright = Rotation.from_euler("ZYX", [rng.uniform(-np.pi, np.pi), *rng.normal(0, tilt, 2)])
            data.qpos[q + 3 : q + 7] = (Rotation.random(rng=rng) if tumbled else upright).as_quat(scalar_first=True)
            if env.row.loader == "unitree":
                data.qpos[q : q + 2] = rng.uniform((-2, -2), (10, 2))  # where an episode gets: at x = 10 m the light is dimmer
            height = q + 2 if height is None else height
        elif joint == mujoco.mjtJoint.mjJNT_BALL and kind == "spread":
            data.qpos[q : q + 4] = Rotation.random(rng=rng).as_quat(scalar_first=True)
        elif span or (kind == "spread" and (model.jnt_limited[j] or joint == mujoco.mjtJoint.mjJNT_HINGE)):
            limits = model.jnt_range[j] if model.jnt_limited[j] else (-np.pi, np.pi)
            low, high = np.clip(span or limits, *limits)
            data.qpos[q] = (low + high) / 2 + width * (high - low) * rng.uniform(-0.5, 0.5)
        height = q if name == "rootz" else height
    if height is not None:  # by its lowest point, over its geoms' boxes (centre, half sizes), along the world's z
        mujoco.mj_kinematics(model, data)
        robot = np.flatnonzero(model.geom_bodyid > 0)
        up, box = data.geom_xmat[robot, 6:], model.geom_aabb[robot]
        lowest = np.min(data.geom_xpos[robot, 2] + np.sum(up * box[:, :3], 1) - np.sum(np.abs(up) * box[:, 3:], 1))
        data.qpos[height] += (0 if kind == "good" else rng.exponential(0.1)) - lowest


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
    mujoco.mj_forward(model, data)


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
        stuck, away = data.ncon > 0 and data.contact.dist.min() < -0.005, 0.0  # what is 5 mm deep in something would be shot out of it
        if kind == "good" and env.env_id in GOALS:
            here, there = (data.site(site).xpos for site in GOALS[env.env_id])
            away = float(np.linalg.norm(here - there)) * rng.uniform(1, 2)  # not always the very nearest
        tries.append((stuck, away, data.qpos.copy()))
        if not stuck and not away:
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

    A random policy shows a masker only what a random policy sees: a pole that hangs, a walker that lies. So half of what it learns from are
    `spread` states, from anywhere in the joints' ranges, settled for a few control steps. `good` states, for tests, are a good policy's.
    """
    task = env.task
    for i in range(count):
        if kind == "random":
            if i == 0 or env.below_ground:
                task.reset(rng)
                action, held = rng.uniform(-1, 1, task.action_size), rng.choice([0.0, 0.8, 0.95])  # fresh noise, or pushes that get somewhere
            for _ in range(rng.integers(1, 5) * env.repeat):  # neighbouring steps look alike, and physics is cheap beside rendering
                if rng.random() >= held:
                    action = rng.uniform(-1, 1, task.action_size)
                task.step(action)
        else:
            place(env, kind, rng)
            for _ in range(rng.integers(0, 6)):
                task.step(task.hold())
        yield


# ------------------------------------------------------------------------------------------------------------ the frames
def segment_frames(env: TalasEnv, prompt: str) -> np.ndarray:
    """(H, W) bool: the mask m* of the frame just rendered. The seam: another segmenter maps frames and a prompt to masks here."""
    return env.segment(prompt)


CLIP = 50  # frames that a process collects in one go, from a seed of their own: the same frames, however many processes there are
make_env_once = functools.lru_cache(make_env)


def collect_clip(args: Args, prompt: str, settings: tuple[Setting, ...], clip: tuple[int, Kind, int]) -> dict[str, np.ndarray]:
    """One clip's frames of n states, {"clean": (n, 3, H, W) uint8, "masks": (n, H, W) bool}, and by setting, as it shows the same states."""
    index, kind, n = clip
    rng = np.random.default_rng([args.seed, len(settings) > 0, index])
    env, *others = (make_env_once(args.env, setting, args.seed, distractors=args.distractors) for setting in ("train", *settings))
    seen = {key: np.empty((n, 3, env.size, env.size), np.uint8) for key in ("clean", *settings)} | {"masks": np.empty((n, env.size, env.size), bool)}
    for i, _ in enumerate(visit_states(env, kind, n, rng)):
        seen["clean"][i] = env.render().transpose(2, 0, 1)
        seen["masks"][i] = segment_frames(env, prompt)
        for setting, other in zip(settings, others, strict=True):
            if i % 25 == 0:  # a new background
                other.reset(options={"episode": 2 * index + i // 25})
            seen[setting][i] = other.show(env.get_state(), int(rng.integers(other.episode_steps))).transpose(2, 0, 1)
    return seen


def collect(args: Args, prompt: str, counts: dict[Kind, int], settings: tuple[Setting, ...], pool: Pool) -> dict[str, np.ndarray]:
    """Frames of so many states of each kind, as collect_clip's, collected by a pool of processes. Those that are shown in settings are the tests."""
    kinds = [(kind, min(CLIP, count - i)) for kind, count in counts.items() for i in range(0, count, CLIP)]
    clips = pool.imap(functools.partial(collect_clip, args, prompt, settings), [(index, *kind) for index, kind in enumerate(kinds)])
    bar = {"unit": f"{CLIP} frames", "mininterval": 1 if sys.stderr.isatty() else 15}
    clips = list(tqdm(clips, f"collect {'test' if settings else 'clean'} frames", len(kinds), **bar))
    return {key: np.concatenate([clip[key] for clip in clips]) for key in clips[0]}


# ------------------------------------------------------------------------------------------------------------ the report
def report(masker: Masker, tests: dict[str, np.ndarray], device: torch.device, bf16: bool, sheet: Path) -> dict[str, float]:
    """{"iou/clean": mean IoU over the test frames at threshold 0.5, "iou_1px/clean": the same with one pixel of tolerance, ...}, printed as well."""
    figures, rows, n = {}, [], len(tests["masks"])
    chosen = sorted({0, n // 8, n // 4, n // 2, 5 * n // 8, 3 * n // 4, 7 * n // 8, n - 1})  # for the sheet, some of each kind of state
    print(f"\n{'test frames':<14}{'IoU':>8}{'IoU ±1px':>10}")
    for key, frames in ((key, frames) for key, frames in tests.items() if key != "masks"):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = torch.cat([masker(part.to(device)) for part in torch.from_numpy(frames).split(100)])
        pred = (logits > 0).cpu().numpy()  # ψ > 0.5
        iou, iou_1px = (float(mask_iou(pred, tests["masks"], tolerance).mean()) for tolerance in (0, 1))
        print(f"{key:<14}{iou:>8.3f}{iou_1px:>10.3f}")
        figures |= {f"iou/{key}": iou, f"iou_1px/{key}": iou_1px}
        rows.append(np.concatenate([np.concatenate([frames[i], frames[i] * pred[i]], axis=2) for i in chosen], axis=2))
    picture = np.concatenate(rows, axis=1).transpose(1, 2, 0)[..., ::-1]
    cv2.imwrite(str(sheet), cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST))
    return figures


# ------------------------------------------------------------------------------------------------------------ main
def main(args: Args) -> None:
    started = time.time()
    args.env = envs.resolve_env_id(args.env)
    prompt = args.prompt or envs.task_row(args.env).prompt
    device, bf16 = envs.set_up_torch(args.device, args.seed, args.torch_deterministic)

    if args.test_frames < 4 or (args.frames or 2) < 2:
        raise UserError("--frames and --test-frames: at least 2 and 4, so that there is one of each kind")
    args.distractors = args.distractors or os.environ.get("TALAS_DISTRACTORS")
    if args.distractors and not Path(args.distractors).is_dir():
        raise UserError(f"--distractors {args.distractors}: no such folder")
    output = Path(args.output or f"runs/maskers/{args.env}")
    run = Path(f"runs/{args.env}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    env = make_env(args.env, "train", args.seed)
    env.reset()
    env.segment(prompt)  # a phrase that the task does not know is an error before anything is written
    env.close()
    photos = envs.load_photographs(args.overlay, args.overlay_images, args.seed, "test")  # Phase II trains on the others
    output.mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=2))
    writer = SummaryWriter(run)

    n, t = args.frames or envs.task_row(args.env).mask_frames, args.test_frames
    print(f"Phase I on {args.env}: {n:,} clean frames, prompt: {prompt!r}, masks: {args.segmenter}", flush=True)
    settings = ("procedural", *(name for name in ("video_easy", "video_hard") if args.distractors and (Path(args.distractors) / name).is_dir()))
    # Rendering is what takes the time, and a renderer uses one core, so each core gets a process. Spawned: EGL does not survive a fork.
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), 8), envs.start_worker) as pool:
        # The tests first: what is wrong with the media shows at once.
        tests = collect(args, prompt, {"spread": t - t // 2, "random": t // 4, "good": t // 2 - t // 4}, settings, pool)
        training = collect(args, prompt, {"spread": n // 2, "random": n - n // 2}, (), pool)
    overlay = augment(torch.from_numpy(tests["clean"]), None, photos, "overlay").byte().numpy()
    tests = {"clean": tests.pop("clean"), "overlay": overlay, **tests}
    frames, masks = training["clean"], training["masks"]
    if not masks.any():
        raise UserError(f"--prompt {prompt!r}: not one pixel of {n} frames shows it")
    arrays = {"train_frames": frames, "train_masks": np.packbits(masks), **{f"test_{key}": value for key, value in tests.items()}}
    for name in ("teacher.pt", "student.pt"):
        (output / name).unlink(missing_ok=True)  # made from other frames, perhaps for another prompt
    envs.write_whole(output / "frames.npz", functools.partial(np.savez, **arrays))

    # ---- the teacher
    masker = Masker().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(masker.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1)
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
            writer.add_scalar("losses/bce", bce.item(), step)
            writer.add_scalar("losses/reconstruction", reconstruction.item(), step)
            bar.set_postfix(bce=f"{bce.item():.4f}", refresh=False)

    # ---- what came of it
    figures = report(masker, tests, device, bf16, run / "masks.png")
    for key, value in figures.items():
        writer.add_scalar(key, value, args.steps)
    writer.close()
    figures |= {"frames": n, "test_frames": args.test_frames, "train/updates": args.steps, "mask_pixels": float(masks.sum((1, 2)).mean())}
    figures |= {"seconds": round(time.time() - started, 1)}
    (run / "metrics.json").write_text(json.dumps(figures, indent=2))
    checkpoint = {"kind": "teacher", "env_id": args.env, "image_size": frames.shape[-1], "prompt": prompt, "state_dict": masker.cpu().state_dict()}
    envs.save_tensors(output / "teacher.pt", checkpoint)
    print(f"\nwritten: {output}/teacher.pt, {output}/frames.npz, {run}/metrics.json, {run}/masks.png (look at it)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
