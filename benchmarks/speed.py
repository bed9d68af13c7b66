"""Where the time goes: one command, one table. Medians, after a warm-up; what is compared within the update and the loop is timed in turn.

    python benchmarks/speed.py                 walker_walk, batch 128; some nine minutes on two cores, most of them for the slow ways
    python benchmarks/speed.py --no-sam        without the foundation model, whose image encoder takes ten seconds and more a frame on a CPU
    python benchmarks/speed.py --compile --updates-per-step 1 --loop-envs 1 8 --loop-steps 800           for a GPU

The masker and the agent have random weights: how long they take does not depend on what they have learned. Writes <output>/<device>.json, and as
<device>.txt what an update spends its time on.
"""

import importlib.util
import itertools
import math
import multiprocessing
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import talas_asymmetric_sac as talas
from envs import (
    UserError,
    cpu_has_bf16,
    list_videos,
    load_photographs,
    make_env,
    make_env_in_worker,
    read_video,
    set_up_torch,
    write_json,
    write_whole,
)


@dataclass
class Args:
    env: str = "walker_walk"  # the task
    batch_size: int = 128  # transitions per update
    encoder: Literal["sada", "medium", "small"] = "sada"  # as talas_asymmetric_sac.py's
    repeats: int = 3  # rounds over everything that is compared
    updates_per_step: float = 0.25  # of the loops
    loop_envs: tuple[int, ...] = (1, 4)  # environments of the loops
    loop_steps: int = 60  # agent steps of each loop
    stored: tuple[int, int] = (1_000, 100_000)  # steps in replay between which the update's time should not grow
    compile: bool = False  # time torch.compile's update as well, and have it in the loops; it takes a minute or two to compile
    sam: bool = True  # time segment-anything's ViT-B as well (its package and torchvision; random weights)
    device: str = "auto"  # cpu, cuda, ... or auto
    output: str = "results/speed"  # folder of the JSON file


def processor() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.is_file() else []
    return names[0] if names else platform.machine()


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_in_turn(ways: dict[str, Callable[[], object]], device: torch.device, repeats: int, seconds: float = 2.0) -> dict[str, float]:
    """Median seconds of each way: `repeats` rounds, in each of which every way is run for some `seconds`, and at least three times."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            began, n = time.perf_counter(), 0
            while n < 3 or time.perf_counter() - began < seconds:
                sync(device)
                start = time.perf_counter()
                way()
                sync(device)
                taken[name].append(time.perf_counter() - start)
                n += 1
    return {name: float(np.median(times)) for name, times in taken.items()}


def fill(replay: talas.Replay, steps: int, episode: int = 250) -> None:
    """Random episodes, as bytes: what is in the frames does not matter here."""
    rng = np.random.default_rng(0)
    frames, masks = (torch.from_numpy(rng.integers(0, 256, (1, n, 84, 84), dtype=np.uint8)) for n in (9, 3))
    seen, action = (frames, masks, torch.zeros(1, replay.proprio.shape[1])), np.zeros((1, replay.actions.shape[1]), np.float32)
    for step in range(steps):
        if step % episode == 0:
            replay.add_first(np.array([0]), *seen)
        replay.add_step(action, np.ones(1), np.zeros(1, bool), *seen)


def build(args: Args, spaces: tuple[int, int, int], photos: torch.Tensor, masked: bool, precision: str, channels_last: bool) -> talas.Agent:
    """An agent with random weights, on the photographs' device, as talas_asymmetric_sac.py makes it; or in the contiguous layout."""
    masker = talas.Masker().requires_grad_(False) if masked else None
    flags = talas.Args(precision=precision, encoder=args.encoder, masker="student" if masked else "none")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return talas.Agent(flags, *spaces, masker, photos).to(photos.device, memory_format=layout)


def update_masked_at_sampling(agent: talas.Agent, replay: talas.Replay, batch_size: int) -> None:
    batch = replay.sample(batch_size)
    masks = {"mask": talas.mask_stack(agent.masker, batch.obs), "next_mask": talas.mask_stack(agent.masker, batch.next_obs)}
    agent.update(batch._replace(**masks))


def time_plain(args: Args, spaces: tuple[int, int, int]) -> dict[str, float]:
    """The two yardsticks once more, in a process in which set_up_torch has not told glibc to keep freed pages: that is an optimisation too."""
    device, photos = torch.device("cpu"), load_photographs(None, 1000, 0)
    replay = talas.Replay(1, 1100, (9, 84, 84), spaces[1], spaces[2], device)
    fill(replay, 1000)
    masked, unmasked = (build(args, spaces, photos, which, "fp32", False) for which in (True, False))
    ways = {
        "unmasked, fp32, contiguous": lambda: unmasked.update(replay.sample(args.batch_size)),
        "masked, fp32, contiguous, masked at sampling": lambda: update_masked_at_sampling(masked, replay, args.batch_size),
    }
    return {f"{key}, pages given back": value for key, value in time_in_turn(ways, device, args.repeats).items()}


def time_loops(args: Args, agent: talas.Agent, update: Callable, replay: talas.Replay, num_envs: int) -> dict[str, float]:
    """Seconds per agent step of loops like the script's; of one that does not render, and of one that does nothing else: medians of rounds."""
    device = replay.frames.device
    mask, policy, _ = talas.faster(agent, agent.masker, talas.Args(), device)  # a CUDA graph is for one number of observations
    vec_env = gym.vector.AsyncVectorEnv([partial(make_env_in_worker, args.env, seed=i) for i in range(num_envs)], context="spawn")
    obs, _ = vec_env.reset()
    loops: dict[str, list[float]] = {"exact": [], "overlapped": [], "without rendering": [], "rendering alone": []}

    def run(kind: str, steps: int) -> None:
        nonlocal obs
        seen, updates = talas.observe(mask, obs, device), 0
        for step in range(num_envs, steps + 1, num_envs):
            actions = np.zeros(vec_env.action_space.shape, np.float32)
            if kind != "rendering alone":
                actions = policy(*seen).cpu().numpy()
            if kind != "without rendering":
                vec_env.step_async(actions)
            if kind in ("exact", "rendering alone"):
                obs = vec_env.step_wait()[0]
            while kind != "rendering alone" and updates < int(args.updates_per_step * step):
                update(replay.sample(args.batch_size))
                updates += 1
            if kind == "overlapped":
                obs = vec_env.step_wait()[0]
            if kind != "rendering alone":
                seen = talas.observe(mask, obs, device)
        sync(device)

    for _ in range(args.repeats):
        for kind, times in loops.items():
            run(kind, max(4 * num_envs, math.ceil(4 / args.updates_per_step)))  # a CUDA graph is captured by the fourth time
            began, steps = time.perf_counter(), args.loop_steps // num_envs * num_envs
            run(kind, steps)
            times.append((time.perf_counter() - began) / steps)
    vec_env.close()
    return {kind: float(np.median(times)) for kind, times in loops.items()}


def profile(update: Callable, batch: talas.Batch, device: torch.device) -> str:
    """The operations of five updates, the dearest first; on a GPU its kernels as well, which of a CUDA graph are all that there is."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * (device.type == "cuda")]) as profiler:
        for _ in range(5):
            update(batch)
        sync(device)
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=50, max_name_column_width=100)


def time_sam() -> float:
    """Seconds for one frame's image embedding and one box's mask by segment-anything's ViT-B with random weights, on the CPU."""
    try:
        torch.ops.load_library(next(Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C.*")))
    except (OSError, StopIteration):  # it is not for this torch: the operators that torchvision's import declares kernels for are missing
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from segment_anything import SamPredictor, sam_model_registry

    predictor, frame = SamPredictor(sam_model_registry["vit_b"]()), np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)

    def segment() -> None:
        predictor.set_image(frame)
        predictor.predict(box=np.array([20, 20, 60, 60]), multimask_output=False)

    return time_in_turn({"sam": segment}, torch.device("cpu"), 1, 0)["sam"]


def main(args: Args) -> None:
    if args.updates_per_step <= 0 or min(args.loop_envs, default=0) < 1:
        raise UserError("--updates-per-step has to be above 0, and --loop-envs at least 1")
    if args.loop_steps < max(8, *args.loop_envs) or args.repeats < 1:
        raise UserError("--loop-steps has to be at least 8, and a step of every one of --loop-envs, and --repeats 1")
    if not 0 < args.stored[0] < args.stored[1]:
        raise UserError("--stored: is two numbers of steps, the smaller first")
    device, bf16 = set_up_torch(args.device, 0, True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {os.cpu_count()} cores"
    photos = load_photographs(None, 1000, 0).to(device)
    env = make_env(args.env)
    env.reset()
    spaces = (9, env.observation_space["proprio"].shape[0], env.action_space.shape[0])
    result: dict[str, float | str] = {"device": name, "env": args.env, "batch_size": args.batch_size, "threads": torch.get_num_threads()}

    replay = talas.Replay(1, max(args.stored) + max(args.stored) // 250 + 8, (9, 84, 84), spaces[1], spaces[2], device)
    fill(replay, args.stored[0])
    fast = "bf16" if bf16 else "fp32"
    agents = {(m, p, c): build(args, spaces, photos, m, p, c) for m in (True, False) for p in {fast, "fp32"} for c in (True, False)}
    agent = agents[True, fast, True]

    # ---- the parts of a step
    masker, one = agent.masker, replay.sample(1)
    mask, policy, update = talas.faster(agent, masker, talas.Args(compile=args.compile), device)
    batch = replay.sample(args.batch_size)
    parts = {
        "physics": lambda: [env.task.step(np.zeros(spaces[2])) for _ in range(env.repeat)],
        "render": env.render,
        "mask (one stack)": lambda: mask(one.obs),
        "act": lambda: policy(one.obs, one.mask, one.proprio),
        "sample": lambda: replay.sample(args.batch_size),
        "update": lambda: update(batch),
    }
    for _ in range(4):  # compiled and captured
        update(batch)
    result |= {f"step/{key}": value for key, value in time_in_turn(parts, device, args.repeats).items()}
    if distractors := os.environ.get("TALAS_DISTRACTORS"):
        decode = partial(read_video, list_videos(distractors, "video_hard")[0][0], env.episode_steps + 1, env.size)
        result["episode/video decoded"] = time_in_turn({"": decode}, device, 1)[""]
        result["ratio/video decoded, over rendering the episode"] = result["episode/video decoded"] / (env.episode_steps * result["step/render"])

    # ---- the update, each optimisation on and off
    ways = {}
    for (masked, precision, channels_last), which in agents.items():
        title = f"{'masked' if masked else 'unmasked'}, {precision}, {'channels_last' if channels_last else 'contiguous'}"
        ways[title] = lambda which=which: which.update(replay.sample(args.batch_size))
    launched = f"masked, {fast}, channels_last"
    default = launched + ", CUDA graph" * (device.type == "cuda")
    for compiled, graph in itertools.product({False, args.compile}, {False, device.type == "cuda"}):
        if compiled or graph:
            ours = (compiled, graph) == (args.compile, device.type == "cuda")  # made above: compiling takes a minute
            way = update if ours else talas.faster(agent, masker, talas.Args(compile=compiled, cudagraphs=graph), device)[2]
            ways[launched + ", compiled" * compiled + ", CUDA graph" * graph] = lambda way=way: way(replay.sample(args.batch_size))
    yardsticks = ["unmasked, fp32, contiguous", "masked, fp32, contiguous, masked at sampling"]
    ways[yardsticks[1]] = lambda: update_masked_at_sampling(agents[True, "fp32", False], replay, args.batch_size)
    updates = time_in_turn(ways, device, args.repeats)
    if device.type == "cpu":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            plain = pool.apply(time_plain, (args, spaces))
        updates, yardsticks = updates | plain, yardsticks + list(plain)
    result |= {f"update/{key}": value for key, value in updates.items()}

    # ---- the loop: what of the rendering is hidden behind the update
    for n in args.loop_envs:
        suffix, loops = f"{n} environment{'s' * (n > 1)}", time_loops(args, agent, update, replay, n)
        exact, overlapped, without, rendering = loops.values()
        result |= {f"loop/{key}, {suffix}": value for key, value in loops.items()}
        result[f"ratio/rendering hidden behind the update, {suffix}"] = (exact - overlapped) / (exact - without)
        result[f"ratio/overlapped loop over the slower of its two halves, {suffix}"] = overlapped / max(without, rendering)

    # ---- the masker alone, beside the foundation model
    threads, stack = torch.get_num_threads(), one.obs.cpu()
    lone = build(args, spaces, photos.cpu(), True, "bf16" if cpu_has_bf16() else "fp32", True).masker
    for n in dict.fromkeys((1, threads)):
        torch.set_num_threads(n)
        key = f"masker/stack of 3 frames, {n} thread{'s' * (n > 1)}"
        result[key] = time_in_turn({"": lambda: talas.mask_stack(lone, stack)}, torch.device("cpu"), args.repeats)[""]
    torch.set_num_threads(threads)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # at its peak, before segment-anything comes
    if args.sam:
        result["masker/segment-anything ViT-B, 1 frame"] = sam = time_sam()
        result["ratio/segment-anything over masker, per frame, all threads"] = sam / (result[key] / 3)

    # ---- replay: does the update's time grow with it, and what does it take
    few = time_in_turn({"": lambda: update(replay.sample(args.batch_size))}, device, args.repeats)[""]
    fill(replay, args.stored[1] - args.stored[0])
    many = time_in_turn({"": lambda: update(replay.sample(args.batch_size))}, device, args.repeats)[""]
    arrays = sum(value.nbytes for value in vars(replay).values() if torch.is_tensor(value))
    result |= {f"replay/update at {args.stored[0]:,} steps": few, f"replay/update at {args.stored[1]:,} steps": many}
    result |= {
        "replay/GB per 100,000 steps": arrays / max(args.stored) * 1e5 / 1e9,
        "replay/GB of the process at its peak, with the emptier replay": resident / 1e9,
    }

    for title in [*yardsticks, *(title for title in updates if title.startswith(launched) and title != default)]:
        result[f"ratio/update {title}, over the default"] = updates[title] / updates[default]
    result["ratio/update at the fuller replay over the emptier"] = many / few

    print(f"\n{name}; {args.env}, batch {args.batch_size}, {threads} threads, bf16 {'on' if bf16 else 'off'}\n")
    for key, value in ((key, value) for key, value in result.items() if isinstance(value, float)):
        print(f"{key:<72}" + (f"{value:10.3f}" if key.startswith(("ratio", "replay/GB")) else f"{value * 1e3:10.2f} ms"))
    path = Path(args.output) / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    write_whole(path.with_suffix(".txt"), partial(Path.write_text, data=profile(update, batch, device)))
    print(f"written: {path}, and beside it as .txt what an update spends its time on")
    env.close()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
