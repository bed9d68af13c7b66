"""TaLaS: asymmetric soft actor-critic on masked observations.

The masker ψ (Phases I and II) is frozen and lets the agent see only what belongs to its task. A replayed observation is seen twice:

    clean      c = shift(ψ(o) ⊙ o)                             o: three stacked frames, ψ applied to each on its own
    augmented  a = ψ_S(τ(shift(o))) ⊙ τ(shift(o))              τ: a photograph laid over the frames

    z_c = f(c), z_a = f(a)                                      one encoder f, trained by the critic's loss alone
    y   = r + γ (1 − d) ( min_k Q̄_k(z'_c, u') − α log π(u'|z'_c) ),  u' ~ π(·|z'_c)          the target is clean
    L_Q = ½ Σ_k [ (Q_k(z_c, u) − y)² + (Q_k(z_a, u) − y)² ]                                  the critic sees both views
    L_π = ½ Σ_v [ α log π(u_v|z_v) − min_k Q_k(z_c, u_v) ],  v in {c, a},  u_v ~ π(·|z_v)    the actor acts on both, judged on the clean one

The last line is the asymmetry: an action chosen from the augmented view is judged by what the clean view knows.

    python talas_asymmetric_sac.py --env hammer --seed 1               makes a masker if there is none, trains, evaluates, films
    python talas_asymmetric_sac.py --evaluate runs/.../checkpoint.pt   evaluates and films only
"""

import copy
import gc
import glob
import importlib.util
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs
from envs import Augmentation, Setting, UserError, augment, make_env, mask_iou, random_shift


@dataclass
class Args:
    env: str = "walker_walk"  # the task; `python envs.py` lists them
    seed: int = 1  # seeds the agent: episodes, network, exploration, batches; a masker that is made first has Phase I's and II's default seed
    total_timesteps: int = 500_000  # agent steps, one action each; control steps are this times the action repeat
    action_repeat: int | None = None  # control steps per action; by default the task's own, as `python envs.py` lists it
    reward: Literal["dense", "sparse"] = "dense"  # Adroit: the shaped reward, corrected and scaled, or the sparse one, which needs demonstrations

    # the method and its ablations (README has the table; benchmarks/evaluate.py's METHOD and train_all.py's VARIANTS name runs by these flags)
    masker: Literal["student", "teacher", "none"] = "student"  # who masks the augmented view, and all at evaluation; none: whole frames
    clean_masker: Literal["student", "teacher"] | None = None  # who masks the clean view and what the collecting policy sees; by default --masker
    actor_views: Literal["clean", "both"] = "both"  # views that the actor is trained on
    actor_judge: Literal["clean", "own"] = "clean"  # by which view's Q an action is judged: the clean one (asymmetric), or its own (symmetric)
    critic_views: Literal["clean", "both"] = "both"  # views that the critic is trained on
    augmentation: Augmentation = "overlay"  # τ of the update (Phase II has its own). overlay: the paper's; swap: pasted on a photograph; mix: both
    masker_path: str | None = None  # folder with student.pt and teacher.pt; by default runs/maskers/<env>, made there by Phases I and II if missing

    # soft actor-critic: DMC-GB2's SADA unless said otherwise
    batch_size: int = 128  # transitions per update (SADA: 256)
    learning_starts: int = 1000  # random agent steps before the first update (SADA: 2000); at most four fifths of a short run
    updates_per_step: float = 1.0  # updates per agent step (SADA: 0.5)
    actor_lr: float = 5e-4  # Adam's learning rate for the actor
    critic_lr: float = 5e-4  # Adam's learning rate for encoder and critic
    alpha_lr: float = 5e-4  # Adam's learning rate for the entropy temperature (β1 0.5, which is SVEA's)
    init_alpha: float = 0.1  # the entropy temperature at the start
    gamma: float = 0.99  # discount per agent step
    tau: float = 0.01  # the target critic moves this share of the way at each update (not the augmentation τ)
    shift: int = 4  # random shift of replayed observations, pixels (DrQ)
    encoder: Literal["sada", "medium", "small"] = "sada"  # SADA's four 3×3 convolutions; with more strides, a third (medium), a tenth of their cost
    hidden_dim: int = 1024  # width of the actor's and the critics' two hidden layers
    layer_norm: bool = False  # normalise these layers before their ReLUs (ours; SADA does not): much faster from states, see results/README.md
    replay_size: int = 500_000  # frames kept, one per agent step; memory is taken as it fills (a GPU's at once), 28 KB each with the mask

    # media
    distractors: str | None = None  # folder in DMControl-GB's layout for the video and colour settings; or set TALAS_DISTRACTORS
    overlay: str | None = None  # folder of photographs for τ (Places365 in the paper); or set TALAS_OVERLAY; synthetic images without one
    overlay_images: int = 5000  # how many photographs to sample from the folder

    # evaluation, logging, machine
    evaluate: str | None = None  # a checkpoint.pt: evaluate and film it, with its own arguments, on this --seed's episodes; train nothing
    eval_every: int = 25_000  # agent steps between evaluations; one always ends the run
    eval_episodes: int | None = None  # episodes per setting, with the policy's mean action; by default 10, in training at most half as many as it has
    eval_settings: tuple[Setting, ...] | None = None  # by default train, video_easy, video_hard; without --distractors train, procedural
    resume: str | None = None  # folder of an interrupted run to go on with, by its own arguments; auto: the run that this same command began, if any
    checkpoint_every: int = 2500  # agent steps between checkpoints, each at the next end of an episode; replay, all of it, lies on the disk as well
    exp_name: str = "talas"  # names the run folder: runs/<env>__<exp_name>__<seed>__<time>-<process>
    device: str = "auto"  # cpu, cuda, cuda:1, ... or auto
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the networks, losses are fp32; auto: bf16 where fast; fp32: TF32 convolutions on a GPU
    num_envs: int = 1  # environments, a process each; an agent step is an action in one of them, updates keep their number per agent step
    overlap: bool = True  # simulate and render the next frame during the update, whose replay then lacks it; --no-overlap: the textbook's order
    compile: bool = False  # torch.compile the update (needs g++ and Python's headers, and a minute or two at the first update)
    cudagraphs: bool = True  # on a CUDA GPU, update, policy and masker as a CUDA graph each: one launch instead of hundreds
    torch_deterministic: bool = True  # use deterministic kernels where torch has them
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "talas"  # the project there (the team comes from WANDB_ENTITY)


def settings_of(asked: tuple[Setting, ...] | None, distractors: str | None) -> tuple[Setting, ...]:
    media = distractors or os.environ.get("TALAS_DISTRACTORS")
    return asked or (("train", "video_easy", "video_hard") if media else ("train", "procedural"))


def env_options(args: Args) -> dict:
    return {"distractors": args.distractors, "reward": args.reward, "action_repeat": args.action_repeat}


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


def find_masker(args: Args, which: str) -> tuple[Masker, dict[str, str]]:
    """The student or teacher; its prompt and segmenter. Without --masker-path, a missing one is made first, by Phase I and, a student, Phase II."""
    folder = Path(args.masker_path or f"runs/maskers/{args.env}")
    path = folder / f"{which}.pt"
    if not args.masker_path and not path.is_file():
        print(f"no {which} in {folder}: making one first, by Phases I and II, or waiting for a run that does", flush=True)
        print("(on two cores ten minutes or so; cartpole's and the cup's up to half an hour)", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # runs that start together wait here for one another: the masker is made once
            for script, makes in (("talas_phase1.py", "teacher"), ("talas_phase2.py", "student")):
                if path.is_file() or (folder / f"{makes}.pt").is_file():  # another run was first, or the user made the teacher
                    continue
                if makes == "teacher" and (folder / "student.pt").is_file():  # Phase I would delete it
                    raise UserError(f"{folder}: student.pt without the teacher.pt that it was made from; copy that too, or delete the student")
                names = ("env", "overlay", "overlay_images", "device") + (("distractors",) if makes == "teacher" else ())
                flags = [f"--{name.replace('_', '-')}={value}" for name in names if (value := getattr(args, name))]
                print(f"$ python {script} {' '.join(flags)}", flush=True)
                if subprocess.run([sys.executable, Path(__file__).with_name(script), *flags], preexec_fn=envs.end_with_parent).returncode:
                    raise UserError(f"{script} failed (see above); no masker, no training. --masker none does without")
    if not path.is_file():
        raise UserError(f"{path}: no such masker; make it with talas_phase1.py and talas_phase2.py")
    try:
        checkpoint = envs.load_tensors(path)
        masker = Masker()
        masker.load_state_dict(checkpoint["state_dict"])
        made_for, size = checkpoint["env_id"], checkpoint["image_size"]
        about = {"prompt": checkpoint["prompt"], "segmenter": checkpoint.get("segmenter", "sim")}
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"{path}: not a masker ({envs.brief(error)})") from None
    if made_for != args.env or size != 84:
        raise UserError(f"{path} was made for {made_for} at {size} pixels, not for {args.env} at 84")
    return masker, about


def mask_stack(masker: Masker | None, stack: torch.Tensor) -> torch.Tensor:
    """(B, 3k, H, W) frames in [0, 255] -> (B, k, H, W) uint8 masks, 255 ψ(o): every frame of the stack on its own."""
    if masker is None:
        return torch.full_like(stack[:, ::3], 255, dtype=torch.uint8)
    frames = stack.reshape(-1, 3, *stack.shape[2:]).to(next(masker.parameters()).dtype)  # a camera's bytes are exact in bf16
    chunk = 96 if stack.device.type == "cpu" else len(frames)  # what a processor's cache holds: a sixth faster than 384 frames at once
    logits = torch.cat([masker(part) for part in frames.split(chunk)])
    return (logits.sigmoid() * 255).round().byte().unflatten(0, (len(stack), -1))


def apply_mask(stack: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """ψ(o) ⊙ o: (B, 3k, H, W) frames in [0, 255] and (B, k, H, W) masks in [0, 255] -> (B, 3k, H, W) of `dtype` in [0, 1]."""
    return (stack.to(dtype).unflatten(1, (-1, 3)) * (mask / 255**2).to(dtype).unsqueeze(2)).flatten(1, 2)


# ------------------------------------------------------------------------------------------------------------ networks
def orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.orthogonal_(module.weight, math.sqrt(2) if isinstance(module, nn.Conv2d) else 1.0)
        nn.init.zeros_(module.bias)


class Encoder(nn.Sequential):
    """f: (B, 9, 84, 84) in [0, 1] -> (B, D). Black, which is what a mask leaves of the background, is zero."""

    def __init__(self, channels: int, kind: str):
        shapes = {  # (kernel, stride) of each layer
            "sada": [(3, 2), (3, 1), (3, 1), (3, 1)],  # D = 39,200
            "medium": [(3, 2), (3, 2), (3, 1), (3, 1)],  # D = 8,192
            "small": [(4, 4), (3, 2), (3, 1)],  # D = 2,048
        }
        super().__init__()
        for i, (kernel, stride) in enumerate(shapes[kind]):
            self.extend([nn.Conv2d(32 if i else channels, 32, kernel, stride), nn.ReLU()])
        self.apply(orthogonal)
        self.to(memory_format=torch.channels_last)  # after the initialisation: orthogonal_ cannot write into it

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        features = super().forward(views.contiguous(memory_format=torch.channels_last))  # once: the convolution and its gradient would do it each
        return features.permute(0, 2, 3, 1).flatten(1)  # in channels_last's own order: nn.Flatten would copy, and its gradient as well


def trunk(embedding_dim: int) -> nn.Sequential:
    """(B, D) -> (B, 50). Proprioception is joined after it, where 39,200 features cannot drown it."""
    return nn.Sequential(nn.Linear(embedding_dim, 50), nn.LayerNorm(50), nn.Tanh())


class Head(nn.Module):
    """Two hidden layers, normalised or not, and an output layer that stays in fp32: at Q = 100, bf16 would round to the next half."""

    def __init__(self, inputs: int, hidden: int, outputs: int, norm: bool):
        super().__init__()
        layers = []
        for width in (inputs, hidden):
            layers += [nn.Linear(width, hidden), *([nn.LayerNorm(hidden)] if norm else []), nn.ReLU()]
        self.hidden, self.out = nn.Sequential(*layers), nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.hidden(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.out(h.float())


class Actor(nn.Module):
    def __init__(self, embedding_dim: int, proprio_dim: int, action_dim: int, hidden: int, norm: bool):
        super().__init__()
        self.trunk, self.head = trunk(embedding_dim), Head(50 + proprio_dim, hidden, 2 * action_dim, norm)
        self.apply(orthogonal)

    def forward(self, z: torch.Tensor, proprio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A sampled action (B, A), its log π (B,), and tanh of the mean (B, A); both actions in [-1, 1]."""
        mean, log_std = self.head(torch.cat([self.trunk(z), proprio], 1)).chunk(2, dim=1)
        log_std = -10 + 6 * (torch.tanh(log_std) + 1)  # into [-10, 2]
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        # u = tanh x: log π(u) = log N(x) − Σ log(1 − tanh² x), the last term as 2 (log 2 − x − softplus(−2x)): 1 − tanh² would underflow
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - x - F.softplus(-2 * x))
        return torch.tanh(x), log_prob.sum(1), torch.tanh(mean)


class Critic(nn.Module):
    """Q_1, Q_2: (B, D), (B, P), (B, A) -> (2, B)."""

    def __init__(self, embedding_dim: int, proprio_dim: int, action_dim: int, hidden: int, norm: bool):
        super().__init__()
        self.trunk = trunk(embedding_dim)
        self.heads = nn.ModuleList(Head(50 + proprio_dim + action_dim, hidden, 1, norm) for _ in range(2))
        self.apply(orthogonal)

    def forward(self, z: torch.Tensor, proprio: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.trunk(z), proprio, action], 1)
        return torch.stack([head(x).squeeze(1) for head in self.heads])


# ------------------------------------------------------------------------------------------------------------ the update
class Batch(NamedTuple):
    """Transitions, in the order in which Replay.sample fills them."""

    obs: torch.Tensor  # (B, 9, 84, 84) uint8, whole frames
    mask: torch.Tensor  # (B, 3, 84, 84) uint8, 255 ψ(o)
    proprio: torch.Tensor  # (B, P) float32
    action: torch.Tensor  # (B, A) float32
    reward: torch.Tensor  # (B,) float32
    done: torch.Tensor  # (B,) float32, 1 for a termination; a time limit is none
    next_obs: torch.Tensor
    next_mask: torch.Tensor
    next_proprio: torch.Tensor


class Agent(nn.Module):
    """The networks and the method's losses, as functions of tensors. `masker` masks the augmented view. clean_masker, which makes replay's masks
    (`faster`), is here only to be cast, moved and kept in a run's state with the others; checkpoint.pt is without it."""

    def __init__(
        self,
        args: Args,
        channels: int,
        proprio_dim: int,
        action_dim: int,
        masker: Masker | None,
        photos: torch.Tensor | None,
        clean_masker: Masker | None = None,
    ):
        super().__init__()
        self.args, self.photos, self.spaces = args, photos, (channels, proprio_dim, action_dim)
        self.encoder = Encoder(channels, args.encoder)
        dims = (self.encoder(torch.zeros(1, channels, 84, 84)).shape[1], proprio_dim, action_dim, args.hidden_dim, args.layer_norm)
        self.actor, self.critic = Actor(*dims), Critic(*dims)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha)))
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # by a CUDA graph; elsewhere it makes no difference
        self.critic_optimizer = adam([*self.encoder.parameters(), *self.critic.parameters()], lr=args.critic_lr)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_lr)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.alpha_lr, betas=(0.5, 0.999))
        self.optimizers = (self.critic_optimizer, self.actor_optimizer, self.alpha_optimizer)
        self.target_entropy = -float(action_dim)
        self.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32  # of the views and, by autocast, of the networks
        frozen = {"dtype": self.dtype, "memory_format": torch.channels_last}  # cast here, once, and not by autocast at every call
        self.masker, self.clean_masker = (psi and psi.requires_grad_(False).to(**frozen) for psi in (masker, clean_masker))

    def autocast(self) -> torch.autocast:
        """bf16 where asked for. A context keeps the weights that it has cast, so there is a new one after every step of an optimiser."""
        return torch.autocast(self.log_alpha.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def views(self, obs: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """The clean and, if anyone learns from it, the augmented view of one shifted stack, (B, 9, 84, 84) in [0, 1] each; obs, mask as in Batch."""
        obs, mask = random_shift(obs, mask, pad=self.args.shift)
        clean = apply_mask(obs, mask, self.dtype)  # c = shift(ψ(o) ⊙ o) = shift(ψ(o)) ⊙ shift(o)
        if "both" not in (self.args.critic_views, self.args.actor_views):
            return [clean]
        augmented = augment(obs.to(self.dtype), mask / 255, self.photos, self.args.augmentation)  # τ(shift(o))
        return [clean, apply_mask(augmented, mask_stack(self.masker, augmented), self.dtype)]  # a = ψ_S(τ(shift(o))) ⊙ τ(shift(o))

    @torch.no_grad()
    def target_q(self, next_z: torch.Tensor, batch: Batch) -> torch.Tensor:
        """y = r + γ (1 − d) ( min_k Q̄_k(z'_c, u') − α log π(u'|z'_c) ): (B,)."""
        next_action, next_log_prob, _ = self.actor(next_z, batch.next_proprio)
        next_q = self.target_critic(next_z, batch.next_proprio, next_action).min(0).values - self.log_alpha.exp() * next_log_prob
        return batch.reward + self.args.gamma * (1 - batch.done) * next_q

    def critic_loss(self, z: list[torch.Tensor], batch: Batch, target_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L_Q = ½ Σ_k Σ_v (Q_k(z_v, u) − y)², averaged over the batch; and Q (2, V·B). z: the views that the critic learns from."""
        q = self.critic(torch.cat(z), batch.proprio.repeat(len(z), 1), batch.action.repeat(len(z), 1))
        return 0.5 * (q - target_q.repeat(len(z))).square().sum() / len(target_q), q

    def actor_loss(self, z: list[torch.Tensor], proprio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L_π = mean over views v of α log π(u_v|z_v) − min_k Q_k(z_c, u_v); and log π (V·B,). z: stop-gradient embeddings, the clean one first."""
        proprio = proprio.repeat(len(z), 1)
        action, log_prob, _ = self.actor(torch.cat(z), proprio)
        judge = [z[0]] * len(z) if self.args.actor_judge == "clean" else z  # the asymmetry: judged on the clean view
        q = torch.minimum(*self.critic(torch.cat(judge), proprio, action))  # min(0)'s gradient is 25 kernels on a GPU
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), log_prob.detach()

    def alpha_loss(self, log_prob: torch.Tensor) -> torch.Tensor:
        """The temperature falls while the policy's entropy is above −|A|, and rises below."""
        return (-self.log_alpha.exp() * (log_prob + self.target_entropy)).mean()

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One step of critic and encoder, actor, temperature and target. Returns metrics, still on the device."""
        with self.autocast(), torch.no_grad():
            views = self.views(batch.obs, batch.mask)
            next_clean = apply_mask(*random_shift(batch.next_obs, batch.next_mask, pad=self.args.shift), self.dtype)  # a shift of its own
            target_q = self.target_q(self.encoder(next_clean), batch)
        with self.autocast():
            z = list(self.encoder(torch.cat(views)).split(len(batch.obs)))  # z_c, z_a in one pass
            critic_loss, q = self.critic_loss(z if self.args.critic_views == "both" else z[:1], batch, target_q)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        # The actor learns on the embeddings from before the encoder's step, detached: f is the critic's alone.
        z = [view.detach() for view in (z if self.args.actor_views == "both" else z[:1])]
        with self.autocast():
            actor_loss, log_prob = self.actor_loss(z, batch.proprio)
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # the critic judges here, and does not learn
        self.actor_optimizer.step()

        alpha_loss = self.alpha_loss(log_prob)
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        with torch.no_grad():  # Q̄ ← (1 − tau) Q̄ + tau Q; the encoder has no target copy
            torch._foreach_lerp_(list(self.target_critic.parameters()), list(self.critic.parameters()), self.args.tau)
        metrics = {"qf_loss": critic_loss, "qf_values": q.mean(), "actor_loss": actor_loss, "alpha_loss": alpha_loss}
        metrics |= {"alpha": self.log_alpha.exp(), "entropy": -log_prob.mean()}
        return {f"losses/{name}": value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def policy(self, obs: torch.Tensor, mask: torch.Tensor, proprio: torch.Tensor, mean: bool) -> torch.Tensor:
        """(N, A) float32: the policy's actions for N masked observations, sampled, or their means."""
        with self.autocast():
            sample, _, mean_action = self.actor(self.encoder(apply_mask(obs, mask, self.dtype)), proprio)
        return mean_action if mean else sample


# ------------------------------------------------------------------------------------------------------------ replay
def observe(mask_of: Callable, obs: dict[str, np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One observation or N of them as pixels (N, 9, H, W) uint8, masks (N, 3, H, W) uint8 by `mask_of`, a masker's mask_stack, proprio (N, P)."""
    pixels, proprio = (torch.from_numpy(obs[key]).to(device) for key in ("pixels", "proprio"))
    pixels = pixels.view(-1, *pixels.shape[-3:])
    with torch.no_grad():
        return pixels, mask_of(pixels), proprio.view(len(pixels), proprio.shape[-1])


class Replay:
    """Every frame once, as bytes, with its mask; stacks are put together when sampled. A ring of rows, in which the newest replaces the oldest.

    Rows are numbered as they are written. Row n lies in slot n % capacity and is never changed, so a checkpoint writes only what is new. It has one
    environment's frame, the action, reward and termination that led to it, and its history: the numbers of its episode's last k + 1 rows (k: frames
    of a stack), oldest first, n itself last. So history[:k] is the observation before the action, history[1:] the one after it. No action led to an
    episode's first row; it stands in for those that are missing before it, so its own history is n, k + 1 times.
    An episode of T steps has T + 1 rows, with other environments' between them: the row after n, if there is one, is among the next 2·num_envs, and
    has n as its history[-2].
    What is large lies on the device, the book-keeping on the CPU, so that a batch is drawn without waiting for a GPU.
    """

    STORES = ("frames", "masks", "proprio", "actions", "rewards", "dones", "history")

    def __init__(self, num_envs: int, capacity: int, pixels: tuple[int, int, int], proprio_dim: int, action_dim: int, device: torch.device):
        empty = partial(torch.empty, device=device)  # the system hands out memory when it is written to
        self.frames, self.masks = empty(capacity, 3, *pixels[1:], dtype=torch.uint8), empty(capacity, *pixels[1:], dtype=torch.uint8)
        self.proprio, self.actions = empty(capacity, proprio_dim), empty(capacity, action_dim)
        self.rewards, self.dones = empty(capacity), empty(capacity)
        self.history = torch.full((capacity, pixels[0] // 3 + 1), -1)
        self.newest = torch.zeros(num_envs, pixels[0] // 3 + 1, dtype=torch.int64)  # by environment, its last row's history
        self.capacity, self.n = capacity, 0  # n: rows ever written

    def add_first(self, which: np.ndarray, pixels: torch.Tensor, masks: torch.Tensor, proprio: torch.Tensor) -> None:
        """What the environments `which` (M,) begin an episode with: pixels (M, 9, H, W), masks (M, 3, H, W), proprio (M, P)."""
        numbers = self.n + torch.arange(len(which))
        self.newest[which] = numbers[:, None]
        nothing = torch.zeros(len(which))
        self._write(numbers, [pixels[:, -3:], masks[:, -1], proprio, nothing[:, None], nothing, nothing, self.newest[which]])

    def add_step(self, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray, *next_seen: torch.Tensor) -> None:
        """A step of every environment, to its next observation. A truncated episode's last one is as good as any: it bootstraps."""
        pixels, masks, proprio = next_seen
        numbers = self.n + torch.arange(len(pixels))
        self.newest = torch.cat([self.newest[:, 1:], numbers[:, None]], 1)
        self._write(numbers, [pixels[:, -3:], masks[:, -1], proprio, *map(torch.from_numpy, (actions, rewards, terminated)), self.newest])

    def _write(self, numbers: torch.Tensor, rows: list[torch.Tensor]) -> None:
        start = int(numbers[0]) % self.capacity
        head = min(len(numbers), self.capacity - start)  # the rest goes to the ring's beginning
        for store, content in zip((getattr(self, key) for key in self.STORES), rows, strict=True):
            content = content.to(store.device, store.dtype, non_blocking=True)
            # slices: by index a GPU that is told to be deterministic would sort
            store[start : start + head], store[: len(numbers) - head] = content[:head], content[head:]
        self.n = int(numbers[-1]) + 1

    def written_since(self, before: int) -> dict[str, torch.Tensor]:
        """For a file: the rows from number `before` on."""
        numbers = torch.arange(max(before, self.n - self.capacity), self.n)
        stores = {key: getattr(self, key) for key in self.STORES}
        return {"numbers": numbers} | {key: store[(numbers % self.capacity).to(store.device)].cpu() for key, store in stores.items()}

    def restore(self, written: dict[str, torch.Tensor]) -> None:
        """What written_since returned, in the same order."""
        numbers, *rows = (written[key][-self.capacity :] for key in ("numbers", *self.STORES))
        self._write(numbers, rows)

    def _stacks(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stacks (B, 3k, H, W) and masks (B, k, H, W) of the frames in slots (B, k), and the last one's proprioception (B, P)."""
        frames, masks = (store.index_select(0, slots.flatten()).unflatten(0, slots.shape) for store in (self.frames, self.masks))
        return frames.flatten(1, 2), masks, self.proprio[slots[:, -1]]

    def sample(self, batch_size: int) -> Batch:
        """Stored transitions, each as likely as any other: rows are drawn until enough of them have a whole history and an action that led there."""
        drawn = self.history[:0]
        while len(drawn) < batch_size:
            rows = self.history[torch.randint(min(self.n, self.capacity), (batch_size,))]  # (B, k + 1)
            whole = self.history[rows[:, 0] % self.capacity, -1] == rows[:, 0]  # its oldest row has not been overwritten
            led_to = rows[:, -2] < rows[:, -1]  # not an episode's first row, whose history is only itself
            drawn = torch.cat([drawn, rows[led_to & whole]])
        slots = (drawn[:batch_size] % self.capacity).to(self.frames.device, non_blocking=True)
        row = slots[:, -1]
        return Batch(*self._stacks(slots[:, :-1]), self.actions[row], self.rewards[row], self.dones[row], *self._stacks(slots[:, 1:]))


def free_memory(device: torch.device) -> float:
    """GB that can be had on a device; on the CPU without swapping, where Linux tells it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    path = Path("/proc/meminfo")
    return int(path.read_text().split("MemAvailable:")[1].split()[0]) * 1024 / 1e9 if path.is_file() else math.inf


# ------------------------------------------------------------------------------------------------------------ checkpoints
def save_agent(path: Path, agent: Agent, step: int, about: dict[str, str | None]) -> None:
    """What --evaluate takes: the agent, with its masker, that one's prompt and segmenter, and its arguments."""
    weights = {key: value for key, value in agent.state_dict().items() if not key.startswith("clean_masker.")}  # not deployed
    envs.save_tensors(path, {"args": asdict(agent.args), "spaces": agent.spaces, "step": step, "weights": weights, **about})


def load_agent(path: Path, precision: str | None = None) -> tuple[Agent, dict]:
    """The agent, on the CPU, in its own or another precision, and the rest: args, step, prompt, segmenter."""
    try:
        checkpoint = envs.load_tensors(path)
        checkpoint["args"] = args = Args(**checkpoint["args"] | ({"precision": precision} if precision else {}))
        agent = Agent(args, *checkpoint["spaces"], None if args.masker == "none" else Masker(), None)
        missing, unexpected = agent.load_state_dict(checkpoint["weights"], strict=False)
        strange = unexpected + [key for key in missing if not key.startswith(("critic.", "target_critic."))]  # an exported agent has no critics
        if strange:
            raise ValueError(f"weights of other networks, {strange[0]}")
        return agent, checkpoint
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"{path}: not a checkpoint of this script ({envs.brief(error)})") from None


@dataclass
class Progress:
    """What the loop counts and collects: with weights, replay and chance, all that a resumed run needs."""

    step: int = 0  # agent steps
    updates: int = 0
    seconds: float = 0.0  # of the loop, evaluations among them
    episodes: list[int] = field(default_factory=list)  # by environment, the episode that it begins next
    parts: dict[str, int] = field(default_factory=dict)  # replay's files, oldest first, with the number of rows written by the end of each
    learning_starts: int = 0  # random steps before the updates, fixed as the run begins: a short run's are fewer, and stay so if it becomes longer
    about: dict[str, str | None] = field(default_factory=dict)  # the masker's prompt and segmenter
    returns: list[str] = field(default_factory=lambda: ["step,episode,return,length,success,seconds,env"])  # the lines of returns.csv
    evaluations: list[str] = field(default_factory=lambda: ["step,figure,value"])  # and of evaluations.csv


def save_state(folder: Path, progress: Progress, agent: Agent, replay: Replay, actions: gym.Space, before: Progress) -> Progress:
    """RUN/resume/<step>.state.pt and, as <step>.replay.pt, replay's rows since the state `before`. These two states and what they need stay."""
    folder.mkdir(exist_ok=True)
    part = f"{progress.step:010}.replay.pt"
    envs.save_tensors(folder / part, replay.written_since(max(before.parts.values(), default=0)))
    alive = {name: rows for name, rows in before.parts.items() if rows > replay.n - replay.capacity}  # not all overwritten since
    progress = replace(progress, parts=alive | {part: replay.n})
    state = {"progress": asdict(progress), "agent": agent.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in agent.optimizers]}
    # All the chance there is in this process; episodes draw theirs from (seed, episode).
    state |= {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(replay.frames.device) if replay.frames.is_cuda else None}
    state |= {"actions": actions.np_random.bit_generator.state}
    envs.save_tensors(folder / f"{progress.step:010}.state.pt", state)
    needed = {f"{each.step:010}.state.pt" for each in (before, progress)}.union(before.parts, progress.parts)
    for path in folder.glob("[0-9]*"):
        if path.name not in needed:
            path.unlink()
    return progress


def load_state(folder: Path, agent: Agent, replay: Replay, actions: gym.Space) -> Progress:
    """Bring agent, replay and chance to where the newest state that can be read left them."""
    for path in sorted(folder.glob("[0-9]*.state.pt"), reverse=True):
        try:
            state = envs.load_tensors(path)
            progress = Progress(**state["progress"])
            for part in progress.parts:
                replay.restore(envs.load_tensors(folder / part))
            if replay.n != max(progress.parts.values()):
                raise ValueError(f"{part} is not the one that it was saved with")
            agent.load_state_dict(state["agent"])
            for optimizer, content in zip(agent.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(content)
            torch.set_rng_state(state["torch"])
            if replay.frames.is_cuda and state["cuda"] is not None:
                torch.cuda.set_rng_state(state["cuda"], replay.frames.device)
            actions.np_random.bit_generator.state = state["actions"]
            return progress
        except Exception as error:  # damaged files fail in many ways
            print(f"warning: {path} cannot be used ({envs.brief(error)})", flush=True)
    raise UserError(f"{folder}: none of its checkpoints can be used by TaLaS {envs.VERSION}; start the run anew")


def open_run(run: Path, args: Args, cleanup: ExitStack) -> None:
    """A run's folder, and nobody else's meanwhile."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        cleanup.enter_context(FileLock(run / "lock", timeout=0))
        for unfinished in run.rglob(".[0-9]*-*"):  # what a process was writing when it was killed
            unfinished.unlink()
        envs.write_json(run / "args.json", asdict(args))
    except Timeout:
        raise UserError(f"{run}: another process is at this run") from None


def find_run(args: Args) -> Path | None:
    """The folder of the run to go on with: the one asked for, or for auto the newest in runs/ that was given these arguments, if there is one."""
    if args.resume != "auto":
        return Path(args.resume)
    resolved = ("precision",) if args.precision == "auto" else ()  # args.json has what auto became
    ignored = dict.fromkeys(("resume", "checkpoint_every", "device", "compile", "cudagraphs", *resolved))  # None on both sides: not compared
    asked = json.loads(json.dumps(asdict(args) | ignored))
    for path in sorted(Path("runs").glob(f"{args.env}__{glob.escape(args.exp_name)}__{args.seed}__*/args.json"), reverse=True):
        with suppress(ValueError, TypeError, OSError):
            if asdict(Args()) | json.loads(path.read_text()) | ignored == asked:  # a flag that did not exist then had its default
                return path.parent
    return None


@contextmanager
def saving(what: str, said: set[str] = set()) -> Iterator[None]:  # noqa: B006
    """A disk that is full or gone costs what cannot be written, not the run. Says so once: the one default set remembers what was said."""
    try:
        yield
    except OSError as error:
        if what not in said:
            tqdm.write(f"warning: {what} cannot be written ({error}); going on without", file=sys.stderr)
        said.add(what)


# ------------------------------------------------------------------------------------------------------------ evaluation
PATIENCE = 300  # seconds that a worker may take for a step; for an episode, three times as long
load_agent_once, make_env_once = lru_cache(1)(load_agent), lru_cache(make_env)  # once per process; each evaluation has new ones


def play(path: Path, args: Args, job: tuple[Setting, int]) -> tuple[float, float, list[list[float]], list[np.ndarray], int]:
    """One episode of the mean policy of the agent in `path`, on the CPU: the return; whether it was a success (NaN: cannot be said); IoU, without
    and with a pixel of tolerance, of its masks with the simulator's at every fifth step; of episode 0 the film, as (84, 252, 3) uint8; and how many
    of the setting's videos could not be decoded."""
    setting, episode = job
    agent, checkpoint = load_agent_once(path, args.precision if envs.cpu_has_bf16() else "fp32")
    env = make_env_once(args.env, setting, args.seed + 10_000, **env_options(args))  # other episodes than training's
    obs, info = env.reset(options={"episode": episode})
    total, ious, film, step, done = 0.0, [], [], 0, False
    while not done:
        pixels, mask, proprio = observe(partial(mask_stack, agent.masker), obs, torch.device("cpu"))
        newest = mask[0, -1].numpy()
        if episode == 0:  # camera, mask and what the agent sees, side by side
            frame, grey = obs["pixels"][-3:].transpose(1, 2, 0), newest[..., None]
            film.append(np.concatenate([frame, grey.repeat(3, 2), (frame * (grey / 255)).astype(np.uint8)], 1))
        if checkpoint["prompt"] and step % 5 == 0:
            true = env.segment(env.nameable(checkpoint["prompt"]))
            ious.append([mask_iou(newest[None] > 127, true[None], tolerance)[0] for tolerance in (0, 1)])
        obs, reward, terminated, truncated, info = env.step(agent.policy(pixels, mask, proprio, mean=True)[0].numpy())
        total, step, done = total + reward, step + 1, terminated or truncated
    return total, float(info.get("episode_success", math.nan)), ious, film, env.videos_skipped


def play_all(path: Path, args: Args, jobs: list[tuple[Setting, int]]) -> Iterator[tuple]:
    """What play returns for each job, in their order."""
    # A process per core plays whole episodes, policy and all: rendering takes most of the time, and the figures do not depend on who plays what.
    # Spawned: EGL does not survive a fork.
    pool = ProcessPoolExecutor(min(len(jobs), envs.cores(), 16), multiprocessing.get_context("spawn"), envs.start_worker)
    with envs.stop_later():
        futures = [pool.submit(play, path, args, job) for job in jobs]
    try:
        for future in futures:
            yield future.result(timeout=3 * PATIENCE)
    except TimeoutError:  # which would count as an OSError, and so as a disk's
        raise RuntimeError(f"an episode is not over after {3 * PATIENCE} seconds") from None
    finally:
        # After an error, not the episodes that are left: they would be played to their ends, and one that hangs waited for.
        pool.shutdown(wait=all(future.done() for future in futures), cancel_futures=True)


def evaluate(path: Path, args: Args, settings: tuple[Setting, ...], episodes: int, folder: Path | None) -> dict[str, float]:
    """Undiscounted returns and masks' IoU of a checkpoint's mean policy, by setting. With a folder, films go there, and a table is printed."""
    jobs = [(setting, episode) for setting in settings for episode in range(episodes)]
    played = list(play_all(path, args, jobs))
    figures, table = {}, f"\n{args.env}, {episodes} episodes each\n{'setting':<12}{'return':>9}{'± std':>8}{'mask IoU':>10}{'success':>9}"
    for i, setting in enumerate(settings):
        totals, successes, ious, films, skipped = zip(*played[i * episodes : (i + 1) * episodes], strict=True)
        mean, std, success = np.mean(totals), np.std(totals), np.mean(successes)
        name = "clean" if setting == "train" else setting  # as Phases I and II call it
        iou = np.concatenate(ious).mean(0) if ious[0] else np.full(2, math.nan)
        figures |= {f"eval/{setting}/return_mean": float(mean), f"eval/{setting}/return_std": float(std), f"eval/{setting}/episodes": episodes}
        optional = {f"eval/{setting}/success_rate": success, f"iou/{name}": iou[0], f"iou_1px/{name}": iou[1]}
        optional[f"eval/{setting}/videos_skipped"] = skipped[0] or math.nan  # its return is over fewer videos than others'
        figures |= {key: float(value) for key, value in optional.items() if not np.isnan(value)}
        table += f"\n{setting:<12}{mean:9.1f}{std:8.1f}{'–' if np.isnan(iou[0]) else f'{iou[0]:.3f}':>10}"
        table += f"{'–' if np.isnan(success) else f'{success:.0%}':>9}"
        if folder:
            with saving("a film"):
                envs.write_film(folder / f"{setting}.mp4", [panel.repeat(4, 0).repeat(4, 1) for panel in films[0]])
    if folder:
        print(table)
    return figures


# ------------------------------------------------------------------------------------------------------------ the loop
def faster(agent: Agent, clean_masker: Masker | None, args: Args, device: torch.device) -> tuple[Callable, Callable, Callable]:
    """The masking of an observation, the collecting policy and the update, as --compile and --cudagraphs want them."""
    mask_of, policy, update = partial(mask_stack, clean_masker), partial(agent.policy, mean=False), agent.update
    if args.compile:
        update = torch.compile(update, options={"fallback_random": True})  # eager mode's random numbers
    if args.cudagraphs and device.type == "cuda":  # a graph replays what it captured: tensors may change, a Python number may not
        os.environ.setdefault("TD_LOGGING_LEVEL", "WARNING")  # or it tells of every capture
        from tensordict.nn import CudaGraphModule  # takes a second or two

        mask_of, policy, update = (CudaGraphModule(function, warmup=4) for function in (mask_of, policy, update))
    return mask_of, policy, update


def train(args: Args, run: Path, settings: tuple[Setting, ...], env: envs.TalasEnv, device: torch.device, cleanup: ExitStack) -> None:
    """From the beginning, or from the run's last checkpoint, to the end. `env` is asked for its sizes only; cleanup closes what has to be closed."""
    total_steps = -(-args.total_timesteps // args.num_envs) * args.num_envs  # whole steps of all environments; args stay as they were given
    pixels, proprio = (env.observation_space[key].shape for key in ("pixels", "proprio"))
    spaces = (pixels[0], proprio[0], env.action_space.shape[0])
    episodes = args.eval_episodes or max(1, min(10, total_steps // (2 * env.episode_steps)))
    action_space = gym.vector.utils.batch_space(env.action_space, args.num_envs)
    action_space.seed(args.seed)
    kept = run / "resume"
    who_masks = (args.masker, args.clean_masker or args.masker)  # of the augmented view, and of the clean one
    reached = max((int(path.name[:10]) for path in kept.glob("[0-9]*.state.pt")), default=0)
    if total_steps < reached:
        raise UserError(f"--total-timesteps {args.total_timesteps:,}: {run} has made {reached:,} steps already")

    # ---- the frozen maskers, the photographs, the agent
    found = {"none": (None, {"prompt": None, "segmenter": None})}
    for which in who_masks:  # resumed: load_state brings the weights that made replay's masks; the files may have changed since
        found[which] = found.get(which) or ((Masker(), {}) if reached else find_masker(args, which))
    (masker, about), (clean_masker, _) = (found[which] for which in who_masks)
    both = "both" in (args.critic_views, args.actor_views)
    photos = envs.load_photographs(args.overlay, args.overlay_images, args.seed).to(device) if both else None
    torch.manual_seed(args.seed)  # anew: making a Masker has drawn from it
    agent = Agent(args, *spaces, masker, photos, clean_masker).to(device)
    capacity = min(args.replay_size, total_steps + total_steps // env.episode_steps + 8 * args.num_envs)
    free = free_memory(device)
    size = capacity * (4 * pixels[1] * pixels[2] + 4 * sum(spaces[1:]) + 40) / 1e9  # bytes by Replay.STORES; 40 = 4 + 4 + 4 × 8
    print(f"replay: at most {size:.1f} GB, as it fills, of {free:.1f} GB free" + (": too much; give a smaller --replay-size" if size > free else ""))
    try:
        replay = Replay(args.num_envs, capacity, pixels, proprio[0], spaces[2], device)
    except RuntimeError:
        raise UserError(f"--replay-size {args.replay_size:,}: {size:.1f} GB cannot be had on {device}; give a smaller one") from None
    mask_of, policy, update = faster(agent, clean_masker, args, device)

    # ---- the run's folder, as the last checkpoint left it
    open_run(run, args, cleanup)
    learning_starts = max(args.num_envs, min(args.learning_starts, 4 * total_steps // 5))
    fresh = Progress(episodes=[0] * args.num_envs, learning_starts=learning_starts, about=about)
    progress = load_state(kept, agent, replay, action_space) if reached else fresh
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, sync_tensorboard=True, config=asdict(args), name=run.name, dir=run, id=run.name, resume="allow")
    curves = partial(saving, "TensorBoard's curves")
    writer = SummaryWriter(run, purge_step=progress.step + 1)  # TensorBoard forgets what came after the checkpoint
    cleanup.callback(curves()(writer.close))  # the context manager as a decorator: on a full disk, closing may fail as well
    writer.add_text("args", "\n".join(f"{key}: {value}  " for key, value in asdict(args).items()))

    def log(figures: dict[str, float | torch.Tensor]) -> None:
        with curves():
            for key, value in figures.items():
                writer.add_scalar(key, value, progress.step)

    def write_table(name: str, lines: list[str]) -> None:
        """Whole each time: a resumed run's table loses its lines from after the checkpoint."""
        with saving(name):
            envs.write_whole(run / name, partial(Path.write_text, data="\n".join([*lines, ""])))

    write_table("returns.csv", progress.returns)
    write_table("evaluations.csv", progress.evaluations)

    def report(folder: Path | None) -> dict[str, float]:
        """Save, evaluate (films go into `folder`), log. What is drawn here leaves the run's random numbers alone."""
        check("a weight", agent.parameters(), **agent.state_dict())
        save_agent(run / "checkpoint.pt", agent, progress.step, progress.about)
        try:
            figures = evaluate(run / "checkpoint.pt", args, settings, episodes, folder)
        except UserError as error:  # lost media count as a lost disk: `saving` says so, and the run goes on
            raise OSError(str(error)) from None
        progress.evaluations += [f"{progress.step},{key},{value:.4f}" for key, value in figures.items()]
        write_table("evaluations.csv", progress.evaluations)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), agent.autocast():
            shown = replay.sample(8)
            views = [view[:, -3:].float() for view in agent.views(shown.obs, shown.mask)]
        with curves():
            writer.add_images("views/clean_and_augmented", torch.cat(views, 3), progress.step)
        log(figures)
        return figures

    def check(what: str, values: Iterable[torch.Tensor], **came_from: torch.Tensor) -> None:
        if not all(value.isfinite().all() for value in values):
            with saving("not_finite.pt"):
                envs.save_tensors(run / "not_finite.pt", came_from)
            raise UserError(
                f"step {progress.step}: {what} is infinite or not a number; what it came from, if there was room, is in {run}/not_finite.pt"
            )

    def learn() -> None:
        """The updates that are due after progress.step agent steps."""
        while progress.updates < int(args.updates_per_step * (progress.step - progress.learning_starts)):
            batch = replay.sample(args.batch_size)
            metrics = update(batch)
            progress.updates += 1
            look = progress.updates % 100 == 1  # until then metrics stay on a GPU, and nothing waits for it
            if look or device.type == "cpu":
                check("a loss", metrics.values(), **batch._asdict(), **metrics)
            if look:
                log(metrics | {"charts/SPS": progress.step / (time.time() - began)})

    print(f"TaLaS on {args.env}: {total_steps:,} agent steps × repeat {env.repeat} = {total_steps * env.repeat:,} control steps")
    print(f"masker {args.masker}, {args.precision} on {device}; learning starts at {progress.learning_starts:,}; run folder {run}")
    print(f"going on from step {progress.step:,}" if progress.step else "from the beginning", flush=True)

    # ---- the environments
    chances = [{"seed": args.seed + 100_000 * i, "first_episode": episode} for i, episode in enumerate(progress.episodes)]
    makers = [partial(envs.make_env_in_worker, args.env, **chance, **env_options(args)) for chance in chances]
    # The loop resets them itself: then an ended episode's last observation comes like any other. Gymnasium's default inserts a step for the reset.
    with envs.stop_later():
        vec_env = gym.vector.AsyncVectorEnv(makers, context="spawn", autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    cleanup.callback(setattr, vec_env, "closed", True)  # or its destructor would wait for the processes; main kills them
    began = time.time() - progress.seconds  # as if there had been no interruption
    saved, tried = replace(progress), progress.step  # the last state that was saved; the step at which that was last tried
    ended = np.ones(args.num_envs, bool)
    bar = tqdm(total=total_steps, initial=progress.step, unit="step", mininterval=1 if sys.stderr.isatty() else 30)

    # ---- the loop
    while progress.step < total_steps:
        if ended.any():
            vec_env.reset_async(options={"reset_mask": ended})
            seen = observe(mask_of, vec_env.reset_wait(timeout=PATIENCE)[0], device)
            check("a first observation", [seen[2]], proprio=seen[2])
            replay.add_first(np.flatnonzero(ended), *(part[ended] for part in seen))
            progress.episodes = [episode + int(over) for episode, over in zip(progress.episodes, ended, strict=True)]
        actions = action_space.sample() if progress.step < progress.learning_starts else policy(*seen).cpu().numpy()
        check("an action", [torch.from_numpy(actions)], pixels=seen[0], mask=seen[1], proprio=seen[2])
        vec_env.step_async(actions)
        progress.step += args.num_envs
        if args.overlap:
            learn()
        obs, rewards, terminated, truncated, info = vec_env.step_wait(timeout=PATIENCE)
        came_from = {"actions": torch.from_numpy(actions), "rewards": torch.from_numpy(rewards), "proprio": torch.from_numpy(obs["proprio"])}
        check("a reward or an observation", (came_from["rewards"], came_from["proprio"]), **came_from)
        seen, ended = observe(mask_of, obs, device), terminated | truncated
        replay.add_step(actions, rewards, terminated, *seen)
        for i in np.flatnonzero(ended):
            total, length, success = info["episode"]["r"][i], info["episode"]["l"][i], info.get("episode_success", [""] * args.num_envs)[i]
            progress.returns.append(f"{progress.step},{progress.episodes[i] - 1},{total:.3f},{length},{success},{time.time() - began:.1f},{i}")
            log({"charts/episodic_return": total, "charts/episodic_length": length})
            bar.set_postfix({"return": f"{total:.1f}"}, refresh=False)
        if ended.any():
            write_table("returns.csv", progress.returns)
        if not args.overlap:
            learn()
        if progress.step % args.eval_every < args.num_envs and progress.step < total_steps:
            with saving("an evaluation"):
                figures = report(None)
                bar.write(f"step {progress.step:,}: " + ", ".join(f"{s} {figures[f'eval/{s}/return_mean']:.1f}" for s in settings))
        if ended.any() and progress.step - tried >= args.checkpoint_every:
            check("a weight", agent.parameters(), **agent.state_dict())
            progress.seconds, tried = time.time() - began, progress.step
            with curves():
                writer.flush()  # a resumed run keeps these curves, and TensorFlow's writer, if installed, would hold them back for minutes
            # No simulator's state is saved: an environment in the middle of an episode (others may be) will go on with its next one.
            with saving("a checkpoint to resume from"):
                saved = save_state(kept, progress, agent, replay, action_space, saved)
        bar.update(args.num_envs)
    bar.close()
    vec_env.close()

    # ---- the end: the table, the films, the figures
    figures = report(run) | {"train/steps": progress.step, "train/updates": progress.updates, "train/seconds": round(time.time() - began, 1)}
    envs.write_json(run / "metrics.json", figures)
    shutil.rmtree(kept, ignore_errors=True)  # gigabytes of replay, which nobody needs any more
    films, again = ", ".join(f"{setting}.mp4" for setting in settings), shlex.join(["python", sys.argv[0], "--evaluate", f"{run}/checkpoint.pt"])
    print(f"\nwritten to {run}: checkpoint.pt, metrics.json, returns.csv, {films}\nagain: {again}")


# ------------------------------------------------------------------------------------------------------------ main
def read_args(argv: list[str] | None = None) -> tuple[Args, Path | None]:
    """The command line's arguments, and the folder of the run to go on with, if any. With --resume or --evaluate the defaults are that run's or
    agent's own arguments, and only the flags in `free`, of which the first is --resume or --evaluate itself, may differ from them."""
    args, run = tyro.cli(Args, args=argv, description=__doc__), None
    args.env = envs.resolve_env_id(args.env)
    if args.evaluate is not None:
        own = replace(load_agent_once(Path(args.evaluate))[1]["args"], device="cpu", track=False)  # played on the CPU, wherever it was trained
        free = ("evaluate", "eval_settings", "eval_episodes", "distractors", "precision", "seed")
    elif args.resume is not None and (run := find_run(args)):
        free = ("resume", "total_timesteps", "checkpoint_every", "device", "precision", "compile", "cudagraphs", "distractors", "overlay")
        try:
            own = Args(**json.loads((run / "args.json").read_text()))
            own = replace(own, eval_settings=own.eval_settings and tuple(own.eval_settings))  # JSON has lists only
            free = ("resume", "distractors", "precision") if own.evaluate else free
        except Exception as error:  # damaged files fail in many ways
            raise UserError(f"--resume {run}: not the folder of a run of this script (args.json: {envs.brief(error)})") from None
    else:
        return args, None
    args = tyro.cli(Args, args=argv, default=own)  # once more, over its own arguments
    args.env = envs.resolve_env_id(args.env)
    for key in vars(args):
        if key not in free and getattr(args, key) != getattr(own, key):
            flag, mode, *allowed = (f"--{name.replace('_', '-')}" for name in (key, *free))
            raise UserError(f"{flag}: {run or args.evaluate} has its own, {getattr(own, key)}; beside {mode} only {', '.join(allowed)}")
    return args, run


def main(args: Args, run: Path | None = None) -> None:
    """Train, go on with `run`, or evaluate: what read_args read."""
    if run and (run / "metrics.json").is_file():
        shutil.rmtree(run / "resume", ignore_errors=True)
        return print(f"{run} came to its end before; nothing to do")
    if args.masker == "none" and (args.clean_masker or args.augmentation in ("swap", "mix")):
        raise UserError("--masker none: --clean-masker and --augmentation swap or mix need a --masker")
    envs.check_flags(args, learning_starts=0, shift=0, init_alpha=1e-6, overlay_images=10)
    if args.replay_size < 100 * args.num_envs:
        raise UserError(f"--replay-size {args.replay_size}: has to be at least 100 per environment")
    if args.track and not importlib.util.find_spec("wandb"):
        raise UserError("--track needs Weights & Biases: pip install wandb")
    settings = settings_of(args.eval_settings, args.distractors)
    for setting in dict.fromkeys((*settings, "train")):  # better an error now than after the training; train asks the last one for its sizes
        env = make_env(args.env, setting, args.seed, **env_options(args))
        env.reset()
        env.close()
    device, bf16 = envs.set_up_torch(args.device, args.seed, args.torch_deterministic)
    if args.precision == "auto":
        args.precision = "bf16" if bf16 else "fp32"

    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # runs that start in the same second get folders of their own
    run = run or Path(f"runs/{args.env}__{args.exp_name}__{args.seed}__{stamp}{'__evaluate' if args.evaluate else ''}")

    def again() -> str:
        if not list(run.glob("resume/[0-9]*.state.pt")):  # an evaluation has none
            return "no checkpoint to go on from, start the same again"
        return "to go on: " + shlex.join(["python", sys.argv[0], "--resume", str(run)])

    for attempt in (1, 2):
        try:
            with ExitStack() as cleanup:
                if not args.evaluate:
                    return train(args, run, settings, env, device, cleanup)
                open_run(run, args, cleanup)
                figures = evaluate(Path(args.evaluate), args, settings, args.eval_episodes or 10, run)
                figures |= {"train/steps": load_agent_once(Path(args.evaluate))[1]["step"]}
                envs.write_json(run / "metrics.json", figures)
                return print(f"\nwritten: {run}/metrics.json and {', '.join(f'{setting}.mp4' for setting in settings)}")
        except UserError:
            raise
        except Exception as error:  # most likely a worker process that died or does not answer
            disk = isinstance(error, OSError) and not isinstance(error, ConnectionError)
            if not disk:
                traceback.print_exc()
            if disk or attempt == 2 or args.evaluate:
                what = "a worker process died (is there memory enough?)" if isinstance(error, EOFError | ConnectionError) else envs.brief(error)
                raise UserError(f"{what}; when that is mended, {again()}") from None
            print("\nonce more, from the last checkpoint, if there is one", flush=True)
        except SystemExit:
            print(f"\nstopped; {again()}", flush=True)
            raise
        finally:
            for process in multiprocessing.active_children():  # whatever they are in the middle of
                process.kill()
        gc.collect()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main(*read_args())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
