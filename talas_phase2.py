"""TaLaS, Phase II: the augmentation-consistent student.

The teacher ψ_T knows clean frames only: in front of a video it fails. The student ψ_S, the same network started from the teacher's weights, sees
strongly augmented frames τ(o) and must give the teacher's mask of the clean frame o:

    min  BCE(ψ_S(τ(o)), ψ_T(o))          the teacher is frozen, and no segmentation model is in sight any more

    in    runs/maskers/<env>/teacher.pt and frames.npz, from Phase I
    out   runs/maskers/<env>/student.pt, the masker that the agent carries, and a run folder with curves, figures and a picture

    python talas_phase2.py --env walker_walk
"""

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs
from envs import Augmentation, UserError, augment, random_shift


@dataclass
class Args:
    env: str = "walker_walk"  # the task; `python envs.py` lists them
    seed: int = 1  # seeds the photographs, the batches and the augmentation
    augmentation: Augmentation = "mix"
    """τ. overlay: the paper's, half photograph, half frame; swap: what the teacher keeps, on a photograph; mix: both, see envs.augment"""
    steps: int | None = None  # gradient steps; by default 5,000, on the A1 3,000, on the cup 10,000, on cartpole_swingup 14,000
    batch_size: int = 32  # frames per gradient step; 64 leave a CPU's cache and take more than twice as long
    learning_rate: float | None = None
    """Adam's peak rate (one cycle); by default 1e-2, of more than 5,000 steps 4e-3: so long near 1e-2 may kill all ReLUs of a layer"""
    shift: int = 4  # random shift of every other frame and target, in pixels: the agent's augmented view is shifted as well (DrQ)
    overlay: str | None = None  # folder of photographs for τ (Places365 in the paper); or set TALAS_OVERLAY; synthetic images without one
    overlay_images: int = 5000  # how many photographs to sample from the folder
    maskers: str | None = None  # where teacher and frames lie and the student goes (the agent's --masker-path); by default runs/maskers/<env>
    exp_name: str = "phase2"  # names the run folder: runs/<env>__<exp_name>__<seed>__<time>-<process>
    device: str = "auto"  # cpu, cuda, cuda:1, ... or auto
    torch_deterministic: bool = True  # use deterministic kernels where torch has them


# ------------------------------------------------------------------------------------------------------------ the masker
class Masker(nn.Module):
    """ψ: an RGB frame to the probability, per pixel, that it belongs to the task. The network of talas_phase1.py, which explains it."""

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


def load_teacher(path: Path, env_id: str) -> tuple[Masker, dict]:
    """The teacher, frozen, and its checkpoint. Raises UserError if there is none or it was made for another task."""
    if not path.is_file():
        raise UserError(f"{path}: no teacher there; run `python talas_phase1.py --env {env_id}` first")
    try:
        checkpoint = envs.load_tensors(path)
        made_for, size = checkpoint["env_id"], checkpoint["image_size"]
        teacher = Masker()
        teacher.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"{path}: not a masker of Phase I ({envs.brief(error)})") from None
    if made_for != env_id or size != 84:
        raise UserError(f"{path} was made for {made_for} at {size} pixels, not for {env_id} at 84")
    return teacher.requires_grad_(False).eval(), checkpoint


# ------------------------------------------------------------------------------------------------------------ main
def main(args: Args) -> None:
    started = time.time()
    args.env = envs.resolve_env_id(args.env)
    envs.check_flags(args, shift=0, overlay_images=10)
    args.steps = args.steps or envs.task_row(args.env).student_steps
    if args.learning_rate is None:
        args.learning_rate = 1e-2 if args.steps <= 5000 else 4e-3
    device, bf16 = envs.set_up_torch(args.device, args.seed, args.torch_deterministic)

    folder = Path(args.maskers or f"runs/maskers/{args.env}")
    teacher, checkpoint = load_teacher(folder / "teacher.pt", args.env)
    try:
        with np.load(folder / "frames.npz", allow_pickle=False) as archive:
            frames, tests = archive["train_frames"], {key[5:]: archive[key] for key in archive.files if key.startswith("test_")}
        tests["clean"], tests["masks"]  # a KeyError now rather than after the training
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"{folder}/frames.npz: cannot be read ({envs.brief(error)}); bring the teacher's own, or run Phase I again") from None
    photos = envs.load_photographs(args.overlay, args.overlay_images, args.seed, "train").to(device)  # Phase I kept the others for its overlay test
    run = Path(f"runs/{args.env}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    run.mkdir(parents=True, exist_ok=True)
    envs.write_json(run / "args.json", asdict(args))
    writer = SummaryWriter(run)

    print(f"Phase II on {args.env}: {len(frames):,} frames, augmentation {args.augmentation}", flush=True)
    teacher.to(device, memory_format=torch.channels_last)
    # ψ_T(o) once for every clean frame: neither the frames nor the frozen teacher change. Bytes, so that 5,000 masks are 35 MB.
    masks_t = torch.from_numpy((envs.predict(teacher, frames, device, bf16) * 255).round().astype(np.uint8)).unsqueeze(1)  # (N, 1, H, W)
    frames_t = torch.from_numpy(frames)  # (N, 3, H, W) uint8
    student = Masker()
    student.load_state_dict(checkpoint["state_dict"])
    student.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate)
    warm = 0.2 if args.steps == 10 else 0.1  # of ten steps, OneCycleLR would divide by a tenth of them minus one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps, pct_start=warm)
    bar = tqdm(range(args.steps), desc="train the student", unit="step", mininterval=1 if sys.stderr.isatty() else 15)
    for step in bar:
        batch = torch.randint(len(frames), (args.batch_size,))
        obs, target = frames_t[batch].to(device), masks_t[batch].to(device)  # (B, 3, H, W), (B, 1, H, W)
        # Only every other: a shift moves what is at the picture's edge out of it, or doubles it, and a masker has to know it unshifted as well.
        shifted_obs, shifted_target = random_shift(obs, target, pad=args.shift)
        obs[1::2], target[1::2] = shifted_obs[1::2], shifted_target[1::2]  # in place: indexing by `batch` has made copies
        target = target / 255  # ψ_T(o)
        augmented = augment(obs, target, photos, args.augmentation)  # τ(o)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = student(augmented.contiguous(memory_format=torch.channels_last))
        loss = F.binary_cross_entropy_with_logits(logits.float(), target.squeeze(1))  # BCE(ψ_S(τ(o)), ψ_T(o))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.2)  # without it walker_walk once fell to an empty mask at the peak rate
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            if not loss.isfinite():
                raise UserError(f"step {step}: the loss is {loss.item()}; give a lower --learning-rate")
            writer.add_scalar("losses/bce", loss.item(), step)
            bar.set_postfix(bce=f"{loss.item():.4f}", refresh=False)
        if step % 1000 == 0:
            some = slice(None, None, -(-args.batch_size // 8))  # eight, spread over the batch: of mix, some of each kind
            shown = torch.cat([augmented[some] / 255, (logits[some].sigmoid().float().unsqueeze(1) * augmented[some] / 255)], 3)
            writer.add_images("views/augmented_and_kept", shown.clamp(0, 1), step)

    # ---- what came of it
    print("\nthe teacher", end="")
    figures = {f"teacher_{key}": value for key, value in envs.report(teacher, tests, device, bf16, run / "teacher_masks.png").items()}
    print("\nthe student", end="")
    figures |= envs.report(student, tests, device, bf16, run / "masks.png")
    if figures["iou/clean"] < 0.95 * figures["teacher_iou/clean"]:
        print("warning: clean frames too are worse than its teacher's, so its training went wrong: try a lower --learning-rate, or another --seed")
    for key, value in figures.items():
        writer.add_scalar(key, value, args.steps)
    writer.close()
    figures |= {"train/updates": args.steps, "seconds": round(time.time() - started, 1)}
    envs.write_json(run / "metrics.json", figures)
    checkpoint |= {"kind": "student", "augmentation": args.augmentation, "state_dict": student.cpu().state_dict()}
    envs.save_tensors(folder / "student.pt", checkpoint)
    print(f"\nwritten: {folder}/student.pt, {run}/metrics.json, {run}/masks.png (look at it)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:  # OSError: a disk that is full, a folder that cannot be written; it names the file
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
