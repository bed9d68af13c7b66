"""Are --cudagraphs and --compile the same computation? Updates from the same weights, batches and random numbers, done in each way.

    python benchmarks/equal.py                       bf16, as a GPU trains; --precision fp32 is without TF32 here

Printed are the largest relative differences from the plain updates in a metric, up to the first, sixth and last update. They grow from one update to
the next: what roundings come to by themselves is in the rows of weights that began a ten-millionth or a hundred-thousandth off. Ends with an error
if a graph's policy or mask, or an uncompiled graph's update, is not the same to the last bit, or its random numbers stand still.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import envs
import talas_asymmetric_sac as talas
from benchmarks.speed import fill


@dataclass
class Args:
    precision: Literal["bf16", "fp32"] = "bf16"  # of the networks
    encoder: Literal["sada", "medium", "small"] = "small"  # as talas_asymmetric_sac.py's
    augmentation: envs.Augmentation = "mix"  # of the update
    batch_size: int = 128  # transitions per update
    updates: int = 24  # from the same start
    compile: bool = True  # torch.compile's updates as well; they take a minute or two to compile
    device: str = "auto"  # cpu, cuda, ... or auto


def train(args: Args, batches: list[talas.Batch], photos: torch.Tensor, off: float = 0.0, **ways: bool) -> list[dict[str, float]]:
    """Each update's metrics, done in these `ways` from weights that begin `off` by that share. Raises UserError if policy and mask do not agree."""
    device, first = photos.device, batches[0]
    torch.manual_seed(1)
    flags = talas.Args(precision=args.precision, encoder=args.encoder, augmentation=args.augmentation, **ways)
    masker = talas.Masker().requires_grad_(False)
    agent = talas.Agent(flags, 9, first.proprio.shape[1], first.action.shape[1], masker, photos).to(device)
    with torch.no_grad():
        for weight in agent.parameters():
            weight.mul_(1 + off * torch.randn_like(weight))
    mask, policy, update = talas.faster(agent, agent.masker, flags, device)
    metrics, seen = [], [part[:4] for part in (first.obs, first.mask, first.proprio)]
    for i, batch in enumerate(batches):
        torch.manual_seed(100 + i)
        metrics.append({key: value.item() for key, value in update(batch).items()})
    with torch.no_grad():
        for _ in range(6):  # graphs are captured by then
            torch.manual_seed(0)
            actions, masks = policy(*seen).clone(), mask(seen[0]).clone()
        if torch.equal(policy(*seen), actions):
            raise envs.UserError(f"{ways}: the policy draws the same noise again and again")
        torch.manual_seed(0)
        if not torch.equal(actions, agent.policy(*seen, mean=False)) or not torch.equal(masks, talas.mask_stack(agent.masker, seen[0])):
            raise envs.UserError(f"{ways}: the policy or the mask is not the plain one's")
    return metrics


def main(args: Args) -> None:
    if args.batch_size < 1 or args.updates < 1:
        raise envs.UserError("--batch-size and --updates have to be at least 1")
    device, _ = envs.set_up_torch(args.device, 0, True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    photos, replay = envs.load_photographs(None, 300, 0).to(device), talas.Replay(1, 1100, (9, 84, 84), 0, 6, device)
    fill(replay, 1000)
    batches = [replay.sample(args.batch_size) for _ in range(args.updates)]
    plain = train(args, batches, photos, cudagraphs=False)
    ways = {"again": {"cudagraphs": False}, **{f"weights {off} off": {"cudagraphs": False, "off": off} for off in (1e-7, 1e-5)}}
    for compiled, graph in itertools.product({False, args.compile}, {False, device.type == "cuda"}):
        if compiled or graph:
            ways["compiled" * compiled + ", " * (compiled and graph) + "CUDA graph" * graph] = {"compile": compiled, "cudagraphs": graph}
    names = [key.removeprefix("losses/") for key in plain[0]]
    print(f"{args.precision}, {args.encoder} encoder, {args.augmentation}, batch {args.batch_size}, on {device}")
    print(f"{'':<24}{'updates':>8}" + "".join(f"{name:>12}" for name in names))
    for title, how in ways.items():
        metrics = train(args, batches, photos, **how)
        for upto in sorted({1, min(6, args.updates), args.updates}):
            apart = [max(abs(a[key] - b[key]) / (abs(b[key]) + 1e-8) for a, b in zip(metrics[:upto], plain, strict=False)) for key in plain[0]]
            print(f"{title:<24}{upto:>8}" + "".join(f"{value:12.1e}" for value in apart), flush=True)
        if title == "CUDA graph" and any(apart):
            raise envs.UserError("a CUDA graph's updates are not the plain ones")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except envs.UserError as error:
        sys.exit(f"error: {error}")
