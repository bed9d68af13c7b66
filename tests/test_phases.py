"""Phases I and II as they train: what a teacher and a student learn in a minute, from what, and whether the figures are those of their masks."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import envs
import talas_phase1 as phase1
import talas_phase2 as phase2


class Red(nn.Module):
    """A masker that one can see through: the task is what is red, and the probability climbs slowly about a half."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return (frames[:, 0].float() - 127.5) / 10


def test_report(tmp_path):
    """IoU by hand: a square of ten pixels, once a column off, once not there in one frame of four; and the sheet shows what is kept."""
    masks, clean, hidden = np.zeros((4, 84, 84), bool), np.zeros((4, 3, 84, 84), np.uint8), np.zeros((4, 3, 84, 84), np.uint8)
    masks[:, 20:30, 20:30] = True
    clean[:, 0, 20:30, 21:31] = 135  # 0.68
    clean[:, 0, 50:60, 50:60] = 120  # 0.32
    clean[:, 2] = 100
    hidden[:3] = clean[:3]
    figures = envs.report(Red(), {"clean": clean, "hidden": hidden, "masks": masks}, torch.device("cpu"), False, tmp_path / "sheet.png")
    expected = {"iou/clean": 90 / 110, "iou_1px/clean": 1, "iou/hidden": 0.75 * 90 / 110, "iou_1px/hidden": 0.75}
    assert figures == pytest.approx(expected)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))[..., ::-1]  # two rows, of each frame itself and what is kept, at twice the size
    assert sheet.shape == (2 * 168, 8 * 168, 3)
    frame, kept = sheet[:168, :168], sheet[:168, 168:336]
    assert (frame[50, 50] == (135, 0, 100)).all() and (frame[110, 110] == (120, 0, 100)).all()
    assert (kept[50, 50] == (135, 0, 100)).all() and not kept[110, 110].any()


def iou(path: Path, frames: np.ndarray, masks: np.ndarray) -> float:
    masker = phase2.Masker()
    masker.load_state_dict(envs.load_tensors(path)["state_dict"])
    with torch.no_grad():
        return float(envs.mask_iou((masker(torch.from_numpy(frames)) > 0).numpy(), masks).mean())


def test_both_phases_learn(tmp_path, monkeypatch, capsys):
    """From spread states and random policies, on other photographs than they are tested with: the teacher finds the walker in clean frames, the
    student before photographs as well, from the teacher's weights and masks alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("TALAS_DISTRACTORS", "TALAS_OVERLAY"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def spy(module, name, argument):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (asked.append(given[argument]), original(*given))[1])

    spy(phase1, "collect", slice(2, 4))
    spy(envs, "load_photographs", 3)
    phase1.main(phase1.Args(env="walker_walk", frames=120, test_frames=40, steps=150, batch_size=16, overlay_images=50))
    assert asked == ["test", (({"spread": 20, "random": 10, "good": 10}, ("procedural",)), ({"spread": 60, "random": 60}, ()))]
    folder = tmp_path / "runs/maskers/walker_walk"
    with np.load(folder / "frames.npz") as archive:
        frames = dict(archive)
    assert all(path.name.endswith(f"-{os.getpid()}") for path in (tmp_path / "runs").glob("walker_walk__*"))
    masks, truth = frames["test_masks"], np.unpackbits(frames.pop("train_masks")).reshape(120, 84, 84)
    assert iou(folder / "teacher.pt", frames["test_clean"], masks) > 0.7
    assert iou(folder / "teacher.pt", frames["train_frames"], truth.astype(bool)) > 0.7
    np.savez(folder / "frames.npz", **frames)  # without the segmenter's masks: they are not Phase II's business

    teacher = (folder / "teacher.pt").read_bytes()
    phase2.main(phase2.Args(env="walker_walk", steps=10, learning_rate=0.0, overlay_images=50))
    weights = [envs.load_tensors(folder / f"{kind}.pt")["state_dict"] for kind in ("teacher", "student")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert "warning" not in capsys.readouterr().out
    phase2.main(phase2.Args(env="walker_walk", steps=10, learning_rate=0.5, overlay_images=50))
    assert "warning: clean frames too are worse than its teacher's" in capsys.readouterr().out
    with pytest.raises(envs.UserError, match=r"step \d+: the loss is (nan|inf); give a lower --learning-rate"):
        phase2.main(phase2.Args(env="walker_walk", steps=4, batch_size=4, learning_rate=1e9, overlay_images=50))
    phase2.main(phase2.Args(env="walker_walk", steps=150, batch_size=16, overlay_images=50))
    assert asked[2:] == ["train"] * 4 and (folder / "teacher.pt").read_bytes() == teacher
    for setting, gain in (("overlay", 0.25), ("procedural", 0.3)):
        before, after = (iou(folder / f"{kind}.pt", frames[f"test_{setting}"], masks) for kind in ("teacher", "student"))
        assert after > before + gain, setting
    assert iou(folder / "student.pt", frames["test_clean"], masks) > 0.7


def windows(images: torch.Tensor, pad: int) -> torch.Tensor:
    """(N, C, H, W), edges repeated, at each offset: (N, C, 2 pad + 1, 2 pad + 1, H, W)."""
    padded = F.pad(images.float(), (pad,) * 4, mode="replicate")
    return padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)


@pytest.mark.parametrize("kind", ["overlay", "swap"])
def test_what_the_student_is_taught(tmp_path, monkeypatch, kind):
    """The teacher's soft masks of clean frames, every other one shifted with its frame; augmented as was asked."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher, frames = phase2.Masker().requires_grad_(False), torch.randint(256, (12, 3, 84, 84), dtype=torch.uint8)
    teacher.head.weight.mul_(30)  # far from a half
    envs.save_tensors(Path("teacher.pt"), {"env_id": "walker_walk", "image_size": 84, "prompt": "", "state_dict": teacher.state_dict()})
    np.savez("frames.npz", train_frames=frames, test_clean=torch.zeros_like(frames[:4]), test_masks=np.zeros((4, 84, 84), bool))
    given, augment = [], phase2.augment
    monkeypatch.setattr(phase2, "augment", lambda *args: (given.append(args), augment(*args))[1])
    learned, loss = [], F.binary_cross_entropy_with_logits
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", lambda logits, target: (learned.append(target), loss(logits, target))[1])
    phase2.main(phase2.Args(env="walker_walk", maskers=".", steps=4, batch_size=8, shift=2, augmentation=kind, overlay_images=20))
    assert json.loads(next(Path("runs").glob("*/args.json")).read_text())["learning_rate"] == 1e-2  # of so short a schedule
    shown, masks, moved = windows(frames, 2), windows(teacher(frames.float()).sigmoid().unsqueeze(1), 2), []
    for (obs, target, _, asked), learned_from in zip(given, learned, strict=True):
        assert torch.equal(learned_from, target[:, 0])
        for b in range(8):
            ((n, row, column),) = (shown == obs[b, :, None, None]).all(5).all(4).all(1).nonzero().tolist()
            assert (masks[n, 0, row, column] - target[b, 0]).abs().max() < 0.02 and asked == kind  # bytes, perhaps of bf16
            moved.append((row, column) != (2, 2))
    assert masks.std() > 0.05 and sum(moved) in range(11, 17) and not any(moved[::2])  # mix: some of either kind everywhere


def random_frames(monkeypatch, n: int = 8) -> dict[str, np.ndarray]:
    """What collect returns from now on, twice: tests and training."""
    monkeypatch.delenv("TALAS_OVERLAY", raising=False)
    rng = np.random.default_rng(1)
    seen = {"clean": rng.integers(256, size=(n, 3, 84, 84), dtype=np.uint8), "masks": rng.random((n, 84, 84)) < 0.5}
    monkeypatch.setattr(phase1, "collect", lambda *_: (dict(seen), dict(seen)))
    return seen


class Enough(Exception):
    """Enough steps were seen."""


@pytest.mark.parametrize(
    ("phase", "steps", "default", "peak"),
    [(phase1, 30, None, 5e-3), (phase2, None, 30, 1e-2), (phase2, None, 5000, 1e-2), (phase2, None, 5001, 4e-3)],
)
def test_how_fast_the_phases_learn(tmp_path, monkeypatch, phase, steps, default, peak):
    """One cycle of Adam: from a 25th of the peak up for a tenth of the steps, and down to nothing; as many as the task wants if nobody says; no
    gradient longer than 0.2."""
    monkeypatch.chdir(tmp_path)
    rates, norms, adam = [], [], torch.optim.Adam.step

    def step(self, *args):
        if default and len(rates) == 31:
            raise Enough
        rates.append(self.param_groups[0]["lr"])
        norms.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).norm().item())
        return adam(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    if default:
        monkeypatch.setitem(envs.TASKS, "walker_walk", dataclasses.replace(envs.TASKS["walker_walk"], student_steps=default))
    frames, masks = random_frames(monkeypatch).values()
    if phase is phase1:
        args = phase1.Args(env="walker_walk", frames=8, steps=steps, batch_size=4, overlay_images=10, reconstruction_coef=100)
        phase1.train(args, "the walker", {}, torch.device("cpu"), False)
    else:
        state = phase2.Masker().state_dict()
        state["head.weight"] *= 300  # sure of everything, and of something else where a photograph lies
        envs.save_tensors(Path("teacher.pt"), {"env_id": "walker_walk", "image_size": 84, "prompt": "", "state_dict": state})
        np.savez("frames.npz", train_frames=frames, test_clean=frames, test_masks=masks)
        with contextlib.suppress(Enough):
            phase2.main(phase2.Args(env="walker_walk", maskers=".", steps=steps, batch_size=4, overlay_images=10))
    assert rates[0] == pytest.approx(peak / 25)
    if steps or default == 30:
        assert len(rates) == 30 and rates[2] == max(rates) == pytest.approx(peak) and rates == rates[:3] + sorted(rates[3:], reverse=True)
        assert rates[-1] < peak / 1e5
    else:
        assert len(rates) == 31 and rates == sorted(rates) and rates[-1] < 1.3 * rates[0]  # thousands are to come
    assert max(norms) == pytest.approx(0.2, abs=1e-4)  # these begin at many times that


def test_a_clip_is_of_its_prompt_and_seed():
    """The masks are the prompt's; other seeds, and tests, which the same clips of training never show, are other states."""

    def clip(kind, prompt="the pole", settings=(), seed=1):
        return phase1.collect_clip(phase1.Args(env="cartpole_swingup", seed=seed), prompt, (settings, 0, kind, 4))

    for kind in ("spread", "random"):
        pole, both = clip(kind), clip(kind, "the cart and the pole")
        assert np.array_equal(pole["clean"], both["clean"]) and not (pole["masks"] & ~both["masks"]).any()
        assert 0 < pole["masks"].sum() < both["masks"].sum() - 4 * 20
        shown = [{frame.tobytes() for frame in seen["clean"]} for seen in (pole, clip(kind, settings=("procedural",)), clip(kind, seed=2))]
        assert len(set.union(*shown)) == 12


def test_a_clip_has_two_backgrounds(monkeypatch):
    """Its own: no other clip's."""
    begun, reset = [], envs.TalasEnv.reset
    monkeypatch.setattr(envs.TalasEnv, "reset", lambda self, **how: (begun.append((self.setting, how["options"]["episode"])), reset(self, **how))[1])
    for index in (0, 3):
        phase1.collect_clip(phase1.Args(env="cartpole_swingup"), "the pole", (("procedural",), index, "random", 26))
    assert begun == [("procedural", episode) for episode in (0, 1, 6, 7)]


def test_a_new_teacher_replaces_the_old_student(tmp_path, monkeypatch):
    """Its frames are not the student's any more. It is of its seed, and of the masked reconstruction, where that is asked for."""
    monkeypatch.chdir(tmp_path)
    random_frames(monkeypatch)
    Path("maskers").mkdir()
    teachers, args = [], {"frames": 8, "steps": 3, "batch_size": 4, "overlay_images": 10, "output": "maskers"}
    for changed in ({}, {}, {"reconstruction_coef": 100.0}, {"seed": 2}):
        torch.manual_seed(len(teachers))  # as if a segmenter's models had drawn something
        Path("maskers/student.pt").touch()
        phase1.train(phase1.Args(env="cartpole_swingup", **args | changed), "the pole", {}, torch.device("cpu"), False)
        assert sorted(path.name for path in Path("maskers").iterdir()) == ["frames.npz", "teacher.pt"]
        teachers.append(envs.load_tensors(Path("maskers/teacher.pt"))["state_dict"]["stem.weight"])
    assert torch.equal(teachers[0], teachers[1]) and len({tuple(teacher.flatten().tolist()) for teacher in teachers}) == 3
    with pytest.raises(envs.UserError, match="the loss is nan; give a lower --learning-rate"):
        phase1.train(phase1.Args(env="cartpole_swingup", **args | {"learning_rate": 1e30}), "the pole", {}, torch.device("cpu"), False)
    assert [path.name for path in Path("maskers").iterdir()] == ["frames.npz"]  # whose teacher they are not


def test_a_student_is_of_its_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TALAS_OVERLAY", raising=False)
    frames = np.random.default_rng(1).integers(256, size=(8, 3, 84, 84), dtype=np.uint8)
    envs.save_tensors(Path("teacher.pt"), {"env_id": "walker_walk", "image_size": 84, "prompt": "", "state_dict": phase2.Masker().state_dict()})
    np.savez("frames.npz", train_frames=frames, test_clean=frames, test_masks=np.zeros((8, 84, 84), bool))
    students = []
    for seed in (1, 1, 2):
        phase2.main(phase2.Args(env="walker_walk", maskers=".", seed=seed, steps=2, batch_size=4, overlay_images=20))
        students.append(envs.load_tensors(Path("student.pt"))["state_dict"]["stem.weight"])
    assert torch.equal(students[0], students[1]) and not torch.equal(students[0], students[2])


def test_frames_without_a_mask_are_not_taught(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = random_frames(monkeypatch)
    masks = seen["masks"].copy()
    masks[[1, 4, 5]] = False
    args = phase1.Args(env="walker_walk", steps=2, batch_size=4, overlay_images=10, segmenter="masks", output="out")
    phase1.train(args, "the walker", {"walker": masks, "together": masks}, torch.device("cpu"), False)
    with np.load("out/frames.npz") as archive:
        assert np.array_equal(archive["train_frames"], seen["clean"][[0, 2, 3, 6, 7]])
    assert "3 of 8 frames" in capsys.readouterr().out


def test_random_states_are_of_fresh_and_held_actions_and_spread_ones_are_settled(make, monkeypatch):
    env, actions, held = make("cartpole_swingup"), [], []
    step = env.task.step
    monkeypatch.setattr(env.task, "step", lambda action: (actions.append(action.tobytes()), step(action))[1])
    for seed in range(8):
        actions.clear()
        list(phase1.visit_states(env, "random", 10, np.random.default_rng(seed)))
        held.append(len(set(actions)) / len(actions))
    assert max(held) == 1 and min(held) < 0.5
    assert len({round(env.data.time, 3) for _ in phase1.visit_states(env, "spread", 20, np.random.default_rng(0))}) == 6  # of no to five steps
