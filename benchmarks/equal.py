"""Are --cudagraphs and --compile the same computation? Updates from the same weights, batches and random numbers, done in each way.

    python benchmarks/equal.py                       bf16, as a GPU trains; --precision fp32 is without TF32 here

Printed are the largest relative differences from the plain updates in a metric, up to the first, sixth and last update, and in the last policy's
actions. Rounding grows from one update to the next: what it comes to by itself is in the row of weights that began a ten-millionth off. A graph has
to agree to the last bit, and its random numbers have to move on.
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


Metrics = list[dict[str, float]]


def train(args: Args, batches: list[talas.Batch], photos: torch.Tensor, off: float = 0.0, **ways: bool) -> tuple[Metrics, torch.Tensor]:
    """Each update's metrics, and actions (4, A) of the policy after the last one. Done in these `ways`; weights begin `off` by that share."""
    device = photos.device
    torch.manual_seed(1)
    flags = talas.Args(precision=args.precision, encoder=args.encoder, augmentation=args.augmentation, **ways)
    masker = talas.Masker().requires_grad_(False)
    agent = talas.Agent(flags, 9, batches[0].proprio.shape[1], batches[0].action.shape[1], masker, photos).to(device)
    with torch.no_grad():
        for weight in agent.parameters():
            weight.mul_(1 + off * torch.randn_like(weight))
    _, policy, update = talas.faster(agent, agent.masker, flags, device)
    metrics, seen = [], [part[:4] for part in (batches[0].obs, batches[0].mask, batches[0].proprio)]
    for i, batch in enumerate(batches):
        torch.manual_seed(100 + i)
        metrics.append({key: value.item() for key, value in update(batch).items()})
    for _ in range(6):  # the graph is captured by then
        torch.manual_seed(0)
        actions = policy(*seen).clone()
    if torch.equal(policy(*seen), actions):
        raise envs.UserError(f"{ways}: the policy draws the same noise again and again")
    return metrics, actions


def main(args: Args) -> None:
    if args.batch_size < 1 or args.updates < 1:
        raise envs.UserError("--batch-size and --updates have to be at least 1")
    device, _ = envs.set_up_torch(args.device, 0, True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    photos, replay = envs.load_photographs(None, 300, 0).to(device), talas.Replay(1, 1100, (9, 84, 84), 0, 6, device)
    fill(replay, 1000)
    batches = [replay.sample(args.batch_size) for _ in range(args.updates)]
    plain, acted = train(args, batches, photos, cudagraphs=False)
    ways = {"again": {"cudagraphs": False}, "a ten-millionth off": {"cudagraphs": False, "off": 1e-7}}
    for compiled, graph in itertools.product({False, args.compile}, {False, device.type == "cuda"}):
        if compiled or graph:
            ways["compiled" * compiled + ", " * (compiled and graph) + "CUDA graph" * graph] = {"compile": compiled, "cudagraphs": graph}
    names = [key.removeprefix("losses/") for key in plain[0]]
    print(f"{args.precision}, {args.encoder} encoder, {args.augmentation}, batch {args.batch_size}, on {device}")
    print(f"{'':<24}{'updates':>8}" + "".join(f"{name:>12}" for name in [*names, "action"]))
    for title, how in ways.items():
        metrics, actions = train(args, batches, photos, **how)
        for upto in sorted({1, min(6, args.updates), args.updates}):
            apart = [max(abs(a[key] - b[key]) / (abs(b[key]) + 1e-8) for a, b in zip(metrics[:upto], plain, strict=False)) for key in plain[0]]
            last = [(actions - acted).abs().max().item()] if upto == args.updates else []
            print(f"{title:<24}{upto:>8}" + "".join(f"{value:12.1e}" for value in apart + last), flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except envs.UserError as error:
        sys.exit(f"error: {error}")
