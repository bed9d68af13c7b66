"""Which words, and which segmenter? Prompts by detectors over one task's frames: IoU with the simulator's masks of the task's own prompt, how often
anything was found, seconds per frame, and a picture of them all.

python benchmarks/prompts.py --env hammer --prompts "the hand, the hammer and the nail" "a robot hand and a hammer" \
    --detectors IDEA-Research/grounding-dino-tiny google/owlv2-base-patch16-ensemble --sam-checkpoint sam_vit_b_01ec64.pth

Other tools' masks of frames that `talas_phase1.py --export-frames` wrote can stand beside them: --masks FOLDER, one per prompt.
"""

import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import envs
import talas_phase1 as phase1


@dataclass
class Args:
    env: str = "walker_walk"  # the task
    prompts: tuple[str, ...] = ()  # by default the task's own
    detectors: tuple[str, ...] = ()  # names on the hub or local folders, for --segmenter sam
    box_thresholds: tuple[float, ...] = (0.3,)  # each detector is tried with each
    sam_type: Literal["vit_b", "vit_l", "vit_h"] = "vit_b"  # Segment Anything's size
    sam_checkpoint: str | None = None  # its weights
    masks: tuple[str, ...] = ()  # folders of other tools' masks, each of a whole prompt: here none are united
    frames: int = 64  # as many as were exported, with --masks
    size: int = 512  # pixels, of what the models see
    seed: int = 1  # of the frames
    device: str = "auto"  # cpu, cuda, cuda:1, ... or auto
    output: str = "results/prompts"
    """writes <output>.csv and <output>.png"""


def main(args: Args) -> None:
    args.env = envs.resolve_env_id(args.env)
    device, _ = envs.set_up_torch(args.device, args.seed, True)
    if not args.detectors and not args.masks:
        raise envs.UserError("nothing to compare: give --detectors and --sam-checkpoint, or --masks")
    if args.prompts and not args.detectors:
        raise envs.UserError("--prompts: are for --detectors; masks are of what they are of")
    if args.frames < 1 or (args.detectors and not args.box_thresholds):
        raise envs.UserError("nothing to compare on: --frames and --box-thresholds have to be at least one")
    own, length = envs.make_env(args.env).row.prompt, 16 if args.masks else 1
    common = {"env": args.env, "seed": args.seed, "segment_frames": args.frames, "segment_size": args.size, "sequence_length": length}
    common |= {"sam_type": args.sam_type, "sam_checkpoint": args.sam_checkpoint}
    rows: list[tuple[str, str, np.ndarray, float]] = []  # segmenter, prompt, masks (n, H, W), seconds per frame
    first = phase1.Args(**common)
    names = phase1.sequence_names(first)
    (seen,) = phase1.collect(first, own, ({"sequence": len(names) * length}, ()))
    size = seen["masks"].shape[-1]
    for folder in args.masks:
        rows.append(("masks", folder, phase1.read_masks(first, Path(folder), size), float("nan")))
    large = [frame for i in range(len(names)) for frame in phase1.sequence_frames(first, i)] if args.detectors else []
    for detector in args.detectors:
        for threshold in args.box_thresholds:
            segment = phase1.load_sam(phase1.Args(**common, detector=detector, box_threshold=threshold), device)
            for prompt in args.prompts or (own,):
                began, masks = time.perf_counter(), []
                for frame in large:
                    masks.append(phase1.resize_mask(segment(frame, envs.parse_prompt(prompt)).any(0), size))
                seconds = (time.perf_counter() - began) / len(large)
                rows.append((f"{Path(detector).name} at {threshold}, {args.sam_type}", prompt, np.stack(masks), seconds))

    chosen = np.linspace(0, len(seen["masks"]) - 1, 8).astype(int)
    frames, sheet = seen["clean"][chosen], [seen["clean"][chosen], seen["clean"][chosen] * seen["masks"][chosen, None]]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{args.output}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env", "segmenter", "prompt", "iou", "iou_1px", "found", "seconds_per_frame", "frames", "device"])
        print(f"{'IoU':>6}{'±1px':>7}{'found':>7}{'s/frame':>9}  segmenter: prompt")
        for segmenter, prompt, masks, seconds in rows:
            iou, iou_1px = (float(envs.mask_iou(masks, seen["masks"], tolerance).mean()) for tolerance in (0, 1))
            found = float(masks.any((1, 2)).mean())
            figures = [f"{iou:.4f}", f"{iou_1px:.4f}", f"{found:.4f}", f"{seconds:.3f}"]
            writer.writerow([args.env, segmenter, prompt, *figures, len(masks), device])
            print(f"{iou:>6.3f}{iou_1px:>7.3f}{found:>7.0%}{seconds:>9.2f}  {segmenter}: {prompt}")
            sheet.append(frames * masks[chosen, None])
    envs.write_sheet(Path(f"{args.output}.png"), [np.concatenate(row, 2) for row in sheet])
    print(f"written: {args.output}.csv, {args.output}.png (rows: frames, the simulator's masks, then as above)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (envs.UserError, OSError) as error:
        sys.exit(f"error: {error}")
