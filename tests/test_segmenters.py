"""Text-prompted segmenters: the real code with tiny models from local folders, another tool's masks from the command line, and every way to fail."""

import csv
import dataclasses
import json
import os
import re
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tiny_models
import torch
from commands import PHASE1, ROOT, finish, metrics, only, run, start

import envs
import talas_phase1 as phase1
from benchmarks import prompts
from envs import UserError

CPU, ODD = torch.device("cpu"), 0.52  # a threshold that only the odd cell out passes


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with dino/, owl/ and sam.pth."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.register_sam()
    tiny_models.make_detectors(folder)
    tiny_models.make_sam(folder / "sam.pth")
    return folder


def arguments(models: Path, which: str = "owl", **changed) -> phase1.Args:
    weights = {"detector": str(models / which), "sam_checkpoint": str(models / "sam.pth")}
    return phase1.Args(**({"env": "hammer", "segmenter": "sam", "sequence_length": 1, "segment_size": 128} | weights | changed))


def odd_cell(row: int, column: int, size: int = 128) -> np.ndarray:
    """(size, size, 3) uint8: black, but for one white cell of four by four."""
    frame, cell = np.zeros((size, size, 3), np.uint8), size // 4
    frame[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
    return frame


# ------------------------------------------------------------------------------------------------------------ boxes, masks, pixels
@pytest.mark.parametrize("size", [64, 128, 200])
def test_what_the_detector_finds_is_cut_out_where_it_is(models, size):
    """A white cell at (row 0, column 2): its mask is there, not at (2, 0), not elsewhere; the frame without one stays empty."""
    segment, half = phase1.load_sam(arguments(models, box_threshold=ODD), CPU), size // 8
    frames = np.stack([odd_cell(0, 2, size), odd_cell(2, 1, size), np.zeros((size, size, 3), np.uint8)])
    masks = np.concatenate([segment(frame, ["hand"]) for frame in frames])
    assert masks.shape == (3, size, size)
    assert masks.dtype == bool
    for mask, frame in zip(masks[:2], frames, strict=False):
        box = np.roll(frame[..., 0] > 0, (half, half), (0, 1))  # see tiny_models
        assert envs.mask_iou(mask[None], box[None]) > 0.45, "a trained net draws the box, roughly"
        assert np.abs(np.argwhere(mask).mean(0) - np.argwhere(box).mean(0)).max() < size / 16
    assert not masks[2].any()


def test_thresholds(models):
    frame = odd_cell(0, 2)
    everything = phase1.load_sam(arguments(models, box_threshold=0.0), CPU)(frame, ["hand"])
    one = phase1.load_sam(arguments(models, box_threshold=ODD), CPU)(frame, ["hand"])
    assert everything.sum() > 3 * one.sum() > 0
    assert not phase1.load_sam(arguments(models, box_threshold=1.0), CPU)(frame, ["hand"]).any()
    assert (phase1.load_sam(arguments(models, box_threshold=ODD, iou_threshold=0.4), CPU)(frame, ["hand"]) == one).all()
    assert not phase1.load_sam(arguments(models, box_threshold=ODD, iou_threshold=0.6), CPU)(frame, ["hand"]).any()


def test_the_surest_boxes_count(models, monkeypatch):
    frame = odd_cell(0, 2)
    sure = phase1.load_sam(arguments(models, box_threshold=ODD), CPU)(frame, ["hand"])
    monkeypatch.setattr(phase1, "MOST_BOXES", 1)
    assert (phase1.load_sam(arguments(models, box_threshold=0.0), CPU)(frame, ["hand"]) == sure).all() and sure.any()


def test_the_segmenter_sees_red_as_red(monkeypatch, tmp_path):
    """OpenCV reads and writes blue first; the models want red first."""
    monkeypatch.chdir(tmp_path)
    args = phase1.Args(env="hammer", segmenter="sam", segment_frames=2, sequence_length=1, segment_size=8)
    red, blue = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    monkeypatch.setattr(phase1, "sequence_frames", lambda _, index: iter([(red, blue)[index]]))
    monkeypatch.setattr(phase1, "load_sam", lambda *_: lambda frame, phrases: np.stack([frame[..., 0] > 127 for _ in phrases]))
    (folder,) = phase1.run_sam(args, ["hand"], CPU)
    assert phase1.read_masks(args, folder, 8).mean((1, 2)).tolist() == [1, 0]
    args.export_frames = "frames"
    for index, colour in enumerate([[0, 0, 255], [255, 0, 0]]):
        phase1.export_sequence(args, index)
        assert cv2.imread(f"frames/{phase1.sequence_names(args)[index]}/00000.png")[0, 0].tolist() == colour


@pytest.mark.parametrize("detector", ["dino", "owl"])
def test_a_batch_is_its_phrases(models, detector):
    """Several phrases at once, of unlike lengths, give what each gives alone."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8).repeat(2, 1).repeat(2, 2)  # the detector's own size
    segment, phrases = phase1.load_sam(arguments(models, detector, box_threshold=0.1), CPU), ["hand", "a big hammer"]
    for frame in frames:
        together = segment(frame, phrases)
        assert together.any()
        for mask, phrase in zip(together, phrases, strict=True):
            assert (mask != segment(frame, [phrase])[0]).mean() < 0.002  # orders of summation differ


# ------------------------------------------------------------------------------------------------------------ from the command line
def test_sam_makes_a_teacher(models, tmp_path, monkeypatch, capsys):
    """The second time nothing is segmented, because the masks are there; half of them gone, half are made again."""
    weights = [f"--detector={models / 'dino'}", f"--sam-checkpoint={models / 'sam.pth'}", "--box-threshold=0.01", "--segment-size=128"]
    small = ["--segment-frames=4", "--test-frames=4", "--steps=3", "--batch-size=4", "--overlay-images=20", "--env=walker_walk", "--segmenter=sam"]
    path = {"PYTHONPATH": str(ROOT / "tests/site")}
    out, err = finish(start(PHASE1, *small, *weights, cwd=tmp_path, **path))
    assert "4/4" in err.split("segment:", 1)[1]
    assert out.count("walker ") >= 1 and "together" in out
    teacher = envs.load_tensors(tmp_path / "runs/maskers/walker_walk/teacher.pt")
    assert (teacher["segmenter"], teacher["prompt"]) == ("sam", "the walker")
    folder = only(tmp_path, "runs/walker_walk__phase1__*")
    figures = metrics(folder)
    assert 0 <= figures["segmenter/iou/walker"] == figures["segmenter/iou/together"] < 1
    masks = only(tmp_path, "runs/segmented/walker_walk/walker__*")
    assert re.fullmatch("walker__dino__sam__0.01__0.0__128__[0-9a-f]{8}", masks.name)
    made = {path.relative_to(masks): path.stat().st_mtime_ns for path in masks.rglob("*.png")}
    assert len(made) == 4
    with np.load(tmp_path / "runs/maskers/walker_walk/frames.npz") as archive:
        found = sum(cv2.imread(str(masks / path)).any() for path in made)
        assert len(archive["train_frames"]) <= found  # a mask of a pixel or two may be lost on the way down

    shutil.rmtree(sorted(masks.iterdir())[0])
    monkeypatch.chdir(tmp_path)
    phase1.run_sam(arguments(models, "dino", env="walker_walk", segment_frames=4, box_threshold=0.01), ["walker"], CPU)
    assert "1/1" in capsys.readouterr().err.split("segment:", 1)[1]
    again = {path.relative_to(masks): path.stat().st_mtime_ns for path in masks.rglob("*.png")}
    assert again.keys() == made.keys()
    assert sum(again[path] != made[path] for path in made) == 1


def paint(frames: Path, masks: Path, low: int, high: int) -> None:
    """Another tool: the warm colours between two saturations."""
    for path in frames.rglob("*.png"):
        hsv = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2HSV)
        out = masks / path.relative_to(frames)
        out.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(out), np.uint8((hsv[..., 0] < 25) & (hsv[..., 1] > low) & (hsv[..., 1] < high)) * 255)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with 48 frames of hammer, and two phrases' masks of them."""
    cwd = tmp_path_factory.mktemp("exported")
    out = run(PHASE1, "--env=hammer", "--segment-frames=48", "--segment-size=256", "--export-frames=frames", cwd=cwd)
    assert "3 sequences of 16 frames" in out
    paint(cwd / "frames", cwd / "the_hand", 40, 160)
    paint(cwd / "frames", cwd / "the_hammer", 160, 256)
    assert not (cwd / "runs").exists()
    return cwd


IMPORT = ["--env=hammer", "--segment-frames=48", "--segmenter=masks"]


def test_exported_frames(exported):
    """Sequences of sixteen consecutive frames, numbered; they show what the 84-pixel frames show."""
    sequences = sorted((exported / "frames").iterdir())
    assert [path.name for path in sequences] == [f"hammer_seed1_16frames_{i:04}" for i in range(3)]
    args = phase1.Args(env="hammer", sequence_length=16)
    for index, sequence in enumerate(sequences):
        names = sorted(path.name for path in sequence.iterdir())
        assert names == [f"{i:05}.png" for i in range(16)]
        large = np.stack([cv2.imread(str(sequence / name)) for name in names])[..., ::-1]
        assert large.shape[1:] == (256, 256, 3)
        if index < 2:
            small = phase1.collect_clip(args, "the hand", ((), index, "sequence", 16))["clean"].transpose(0, 2, 3, 1)
            shrunk = np.stack([cv2.resize(frame, (84, 84), interpolation=cv2.INTER_AREA) for frame in large])
            assert np.abs(shrunk.astype(float) - small).mean() < 6
            moved = np.abs(np.diff(small.astype(float), axis=0)).mean((1, 2, 3))
            assert moved.max() < 15  # no cut within a sequence
            assert moved.mean() > 0.1


def test_another_tools_masks_make_a_teacher(exported):
    flags = ["--test-frames=4", "--steps=3", "--batch-size=4", "--overlay-images=20", "--output=teacher"]
    out = run(PHASE1, *IMPORT, "--masks", "the_hand", "the_hammer", *flags, cwd=exported)
    assert "left out rather than taught as empty: 0 of 48" in out
    figures = metrics(only(exported, "runs/hammer__phase1__*"))
    assert figures["segmenter/iou/hand"] > 0.6  # two thirds of a hand are of the colours of skin
    assert 0 < figures["segmenter/iou/together"] < 0.9
    assert figures["segmenter/found/hammer"] == 1
    assert cv2.imread(str(only(exported, "runs/hammer__phase1__*") / "worst_masks.png")).shape == (3 * 168, 10 * 168, 3)
    with np.load(exported / "teacher/frames.npz") as archive:
        masks = np.unpackbits(archive["train_masks"]).reshape(48, 84, 84)
        assert archive["train_frames"].shape == (48, 3, 84, 84)
    whole = cv2.imread(str(exported / "the_hand/hammer_seed1_16frames_0001/00003.png"), 0)
    whole |= cv2.imread(str(exported / "the_hammer/hammer_seed1_16frames_0001/00003.png"), 0)
    share = cv2.resize(np.float32(whole), (84, 84), interpolation=cv2.INTER_AREA) / 255  # united and brought down, by area
    assert (masks[19][share > 0.99] == 1).all()
    assert (masks[19][share < 0.01] == 0).all()
    shutil.rmtree(exported / "runs")


def test_masks_of_one_phrase_by_two_tools_are_united(exported, monkeypatch):
    """Folders of the same name, and of a name with an article: none of them is lost."""
    monkeypatch.chdir(exported)
    for folder, source in (("one/hammer", "the_hand"), ("two/the_hammer", "the_hammer")):
        shutil.copytree(exported / source, folder)
    args = phase1.Args(env="hammer", segmenter="masks", segment_frames=48, sequence_length=16)
    whole = phase1.masks_by_phrase(dataclasses.replace(args, masks=("the_hand", "the_hammer")), "the hammer", CPU, 84)
    united = phase1.masks_by_phrase(dataclasses.replace(args, masks=("one/hammer", "two/the_hammer")), "the hammer", CPU, 84)
    assert list(whole) == ["hand", "hammer", "together"] and list(united) == ["hammer", "together"]
    assert (united["hammer"] == (whole["hand"] | whole["hammer"])).all()


# ------------------------------------------------------------------------------------------------------------ what does not fit
SEQUENCE = "hammer_seed1_16frames_0002"


def spoil(folder: Path, how: str) -> None:
    sequence = folder / SEQUENCE
    if how == "a folder is missing":
        shutil.rmtree(sequence)
    elif how == "some are missing":
        (sequence / "00003.png").unlink()
        (sequence / "00007.png").unlink()
    elif how == "more than frames":
        shutil.copy(sequence / "00015.png", sequence / "00016.png")
    elif how == "numbered from one":
        for i in range(15, -1, -1):
            (sequence / f"{i:05}.png").rename(sequence / f"{i + 1:05}.png")
    elif how == "other digits":
        for i in range(16):
            (sequence / f"{i:05}.png").rename(sequence / f"{i:03}.png")
    elif how == "cropped":
        cv2.imwrite(str(sequence / "00004.png"), np.zeros((256, 128), np.uint8))
    elif how == "no image":
        (sequence / "00004.png").write_bytes(b"half a mask")
    elif how in ("empty", "zeros and ones"):
        for path in folder.rglob("*.png"):
            cv2.imwrite(str(path), (cv2.imread(str(path), 0) > 0).astype(np.uint8) * (how != "empty"))
    else:
        assert how == "mostly empty"
        for path in sorted(folder.rglob("*.png"))[:40]:
            cv2.imwrite(str(path), np.zeros((8, 8), np.uint8))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a folder is missing", f"{SEQUENCE}: masks are missing: 0 for the frames 00000.png to 00015.png, first misfit 00000.png"),
        ("some are missing", f"{SEQUENCE}: masks are missing: 14 for the frames 00000.png to 00015.png, first misfit 00003.png"),
        ("more than frames", f"{SEQUENCE}: masks are too many: 17 for the frames 00000.png to 00015.png, first misfit 00016.png"),
        ("numbered from one", f"{SEQUENCE}: masks are misnumbered: 16 for the frames 00000.png to 00015.png, first misfit 00000.png"),
        ("other digits", f"{SEQUENCE}: masks are misnumbered: 16 for the frames 00000.png to 00015.png, first misfit 000.png"),
        ("cropped", f"{SEQUENCE}/00004.png: wrongly shaped, 128 by 256 pixels; the frames are square"),
        ("no image", f"{SEQUENCE}/00004.png: cannot be decoded as an image"),
        ("empty", "all 48 masks are empty (their largest value is 0): try other words"),
        ("zeros and ones", "all 48 masks are empty (their largest value is 1): try other words"),
        ("mostly empty", "nothing was found in 40 of 48 frames, see bad; try other words, or a lower --box-threshold"),
    ],
)
def test_masks_that_do_not_fit(exported, monkeypatch, tmp_path, how, said):
    shutil.copytree(exported / "the_hand", tmp_path / "bad")
    spoil(tmp_path / "bad", how)
    monkeypatch.chdir(tmp_path)
    args = phase1.Args(env="hammer", segmenter="masks", masks=("bad",), segment_frames=48, sequence_length=16)
    with pytest.raises(UserError) as error:
        phase1.masks_by_phrase(args, "the hand", CPU, 84)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_killed_process_was_writing_is_no_mask(exported, tmp_path):
    shutil.copytree(exported / "the_hand", tmp_path / "the_hand")
    (tmp_path / "the_hand/hammer_seed1_16frames_0000/.4711-00003.png").touch()
    args = phase1.Args(env="hammer", segmenter="masks", segment_frames=48, sequence_length=16)
    assert np.array_equal(phase1.read_masks(args, tmp_path / "the_hand", 84), phase1.read_masks(args, exported / "the_hand", 84))


@pytest.mark.parametrize("kind", ["sequence", "random"])
def test_a_sequence_is_never_cut(make, monkeypatch, kind):
    """Where the camera is under the floor, random states begin anew; consecutive frames go on."""
    env = make("unitree_walk")
    monkeypatch.setattr(envs.TalasEnv, "below_ground", True)
    times = [env.data.time for _ in phase1.visit_states(env, kind, 6, np.random.default_rng(3))]
    assert (np.diff(times) == pytest.approx(np.full(5, 0.01 * env.repeat))) == (kind == "sequence")


def test_a_sequence_as_long_as_an_episode_fits_into_one(make):
    """dm_control would begin another by itself."""
    env = make("cartpole_swingup")
    for seed in range(4):
        times = [env.data.time for _ in phase1.visit_states(env, "sequence", env.episode_steps, np.random.default_rng(seed))]
        assert np.diff(times) == pytest.approx(np.full(env.episode_steps - 1, 0.01 * env.repeat))


def test_phrases_that_are_no_names_of_folders(monkeypatch, tmp_path):
    """And models of one name that lie in two places."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phase1, "load_sam", lambda *_: None)
    monkeypatch.setattr(phase1, "sequence_frames", lambda *_: iter([]))
    folders = []
    for place in ("a", "b"):
        Path(place, "tiny").mkdir(parents=True)
        args = phase1.Args(env="hammer", segmenter="sam", detector=f"{place}/tiny", sam_checkpoint="sam.pth", sequence_length=1)
        folders += phase1.run_sam(args, ["hand", "/or nail", "../up", "häßliche hand"], CPU)
    assert len(set(folders)) == 8 and all(path.parent == Path("runs/segmented/hammer") for path in folders)
    assert [path.name.split("__")[0] for path in folders[:4]] == ["hand", "_or_nail", "_up", "häßliche_hand"]


def test_another_yardstick_is_said(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported)
    with pytest.raises(UserError, match="nowhere"):
        phase1.main(phase1.Args(env="hammer", segmenter="masks", masks=("nowhere",), segment_frames=48, prompt="the hand and its shadow"))
    said = "cannot name all of 'the hand and its shadow': IoU, except for single phrases, is with its masks of 'the hand, the hammer and the nail'"
    assert said in capsys.readouterr().out


def test_masks_of_other_frames_do_not_fit(exported):
    """Another seed, another length of sequences: other frames."""
    args = phase1.Args(env="hammer", segmenter="masks", masks=(str(exported / "the_hand"),), segment_frames=48, sequence_length=16, seed=2)
    with pytest.raises(UserError, match="hammer_seed2_16frames_0000: masks are missing: 0 for the frames"):
        phase1.masks_by_phrase(args, "the hand", CPU, 84)


def test_an_eighth_of_a_pixel_is_enough(tmp_path):
    """Of nine pixels one, in each place in turn, is too little, and two are enough."""
    args = phase1.Args(env="hammer", sequence_length=1, segment_frames=1)
    (folder := tmp_path / phase1.sequence_names(args)[0]).mkdir()
    for two in (False, True):
        mask, i = np.zeros((252, 252), bool), np.arange(84)
        for row in range(84):
            mask[3 * row + i % 3, 3 * i + (i // 3 + row) % 3] = True
            mask[3 * row + (i + 1) % 3, 3 * i + i % 3] |= two
        mask[:2, :2] = True  # else all are empty
        cv2.imwrite(str(folder / "00000.png"), np.uint8(mask) * 255)
        expected = np.full((84, 84), two)
        expected[0, 0] = True
        assert np.array_equal(phase1.read_masks(args, tmp_path, 84)[0], expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"segmenter": "masks"}, "--segmenter masks and --masks FOLDER go together"),
        ({"masks": ("there",)}, "--segmenter masks and --masks FOLDER go together"),
        ({"segmenter": "sam"}, "sam_vit_b_01ec64.pth"),
        ({"segmenter": "sam", "sam_type": "vit_h", "sam_checkpoint": "nowhere.pth"}, "nowhere.pth: cannot be loaded as the weights of vit_h"),
        ({"export_frames": "file/there", "segment_frames": 16}, "Not a directory: 'file/there"),
    ],
)
def test_mistakes(models, monkeypatch, tmp_path, given, said):
    """Nothing is left of a run that never was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises((UserError, OSError)) as error:  # a line either way
        phase1.main(phase1.Args(env="hammer", **given))
    assert said in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"detector": "dino"}, "cannot be loaded"),
        ({"detector": "nobody/has-this-one"}, "put its config.json, model.safetensors, preprocessor_config.json, tokenizer.json"),
        ({"sam_type": "vit_l"}, "cannot be loaded as the weights of vit_l"),
        ({"sam_checkpoint": "half.pth"}, "half.pth: cannot be loaded as the weights of vit_b"),
        ({"sam_checkpoint": "hostile.pth"}, "damaged, or more than plain data"),
    ],
)
def test_weights_that_cannot_be_used(models, monkeypatch, tmp_path, changed, said):
    """dino: a folder of that name without a model; a pickle of it would not be loaded either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    (tmp_path / "dino").mkdir()
    shutil.copy(models / "dino/config.json", tmp_path / "dino")
    torch.save({"hostile": Path.touch}, tmp_path / "dino/pytorch_model.bin")
    torch.save({"hostile": Path.touch}, tmp_path / "hostile.pth")
    (tmp_path / "half.pth").write_bytes((models / "sam.pth").read_bytes()[:1000])
    with pytest.raises(UserError) as error:
        phase1.load_sam(arguments(models, **changed), CPU)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_extra(models, monkeypatch):
    """transformers is imported for sam alone; where it is missing, the answer is how to install it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install -r requirements\.txt transformers"):
        phase1.load_sam(arguments(models), CPU)


def test_a_torchvision_of_another_build(models, monkeypatch, tmp_path):
    """It dies on import with a RuntimeError, and Segment Anything with it."""
    (tmp_path / "segment_anything.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "segment_anything", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"torchvision::nms does not exist; pip install -r requirements\.txt .* all from one index"):
        phase1.load_sam(arguments(models), CPU)


def die(job: int) -> None:
    os._exit(1)


def test_a_process_that_hangs_is_noticed(monkeypatch):
    asked: Future = Future()
    asked.result = lambda timeout: Future().result(timeout=timeout / 1e6)
    monkeypatch.setattr(phase1, "ProcessPoolExecutor", lambda *_: SimpleNamespace(submit=lambda *_: asked, shutdown=lambda **_: None))
    with pytest.raises(UserError, match=r"hang: a process died or hangs \(TimeoutError"):
        phase1.in_processes(print, [1], "hang")


def test_a_dead_process_is_noticed():
    with pytest.raises(UserError, match="a process died or hangs"):
        phase1.in_processes(die, [1, 2], "collect")


def test_phrases_the_simulator_cannot_name(make):
    """sam may be asked for anything; what it finds is compared with the task's own prompt then."""
    env = make("hammer")
    assert env.nameable("the hand and the nail") == "the hand and the nail"
    assert env.nameable("the hand and the robot's shadow") == "the hand, the hammer and the nail"
    args = phase1.Args(env="hammer", sequence_length=2)
    seen = phase1.collect_clip(args, "the hand and the robot's shadow", ((), 0, "sequence", 2))
    assert seen.keys() == {"clean", "masks", "masks/hand"}
    assert (seen["masks/hand"] & ~seen["masks"]).sum() == 0
    assert seen["masks"].sum() > seen["masks/hand"].sum() > 0


def test_segmenter_report(tmp_path, capsys):
    """IoU by part and together, by hand: half of a mask is 0.5, a phrase without a yardstick has none, whatever it is called; the worst
    frame comes first."""
    true = np.zeros((12, 84, 84), bool)
    true[:, :, :40] = True
    half = true.copy()
    half[:, :, 20:] = False
    half[7] = False
    clean = np.full((12, 3, 84, 84), 200, np.uint8)
    nothing = np.zeros_like(true)
    parts = {"hand": half, "shadow": nothing, "masks": nothing, "clean": nothing, "together": half}
    figures = phase1.report_segmenter(parts, {"clean": clean, "masks": true, "masks/hand": half}, tmp_path / "w.png")
    assert figures["segmenter/iou/hand"] == 1
    assert not {"segmenter/iou/shadow", "segmenter/iou/masks", "segmenter/iou/clean"} & figures.keys()
    assert figures["segmenter/iou/together"] == pytest.approx(11 / 12 * 0.5)
    assert figures["segmenter/found/hand"] == pytest.approx(11 / 12)
    sheet = cv2.imread(str(tmp_path / "w.png"))
    assert sheet.shape == (504, 1680, 3)
    assert not sheet[168:336, :168].any()
    assert sheet[336:, :80].all()
    json.dumps(figures)
    assert "–" in capsys.readouterr().out


def test_prompts_benchmark(models, exported, monkeypatch, capsys):
    """Detectors, prompts and another tool's masks over the same frames: a table and a sheet."""
    monkeypatch.chdir(exported)
    weights = {"detectors": (str(models / "owl"),), "box_thresholds": (ODD,), "sam_checkpoint": str(models / "sam.pth")}
    prompts.main(prompts.Args(env="hammer", prompts=("the hand", "a tool"), masks=("the_hand",), frames=16, size=64, output="table", **weights))
    rows = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    assert [(row["segmenter"].split()[0], row["prompt"]) for row in rows] == [("masks", "the_hand"), ("owl", "the hand"), ("owl", "a tool")]
    assert float(rows[0]["iou"]) > 0.2
    assert float(rows[1]["seconds_per_frame"]) > 0
    assert cv2.imread("table.png").shape == (5 * 168, 8 * 168, 3)
    assert "IoU" in capsys.readouterr().out
