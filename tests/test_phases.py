"""Phases I and II as they train: what a teacher and a student learn in a minute, from what, and whether the figures are those of their masks."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn

import envs
import talas_phase1 as phase1
import talas_phase2 as phase2


class Red(nn.Module):
    """A masker that one can see through: the task is what is red."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames[:, 0].float() - 127.5


@pytest.mark.parametrize("phase", [phase1, phase2])
def test_report(tmp_path, phase):
    """IoU by hand: a square of ten pixels, once a column off, once not there in one frame of four; and the sheet shows what is kept."""
    masks, clean, hidden = np.zeros((4, 84, 84), bool), np.zeros((4, 3, 84, 84), np.uint8), np.zeros((4, 3, 84, 84), np.uint8)
    masks[:, 20:30, 20:30] = True
    clean[:, 0, 20:30, 21:31] = 255
    clean[:, 2] = 100
    hidden[:3] = clean[:3]
    figures = phase.report(Red(), {"clean": clean, "hidden": hidden, "masks": masks}, torch.device("cpu"), False, tmp_path / "sheet.png")
    expected = {"iou/clean": 90 / 110, "iou_1px/clean": 1, "iou/hidden": 0.75 * 90 / 110, "iou_1px/hidden": 0.75}
    assert figures == pytest.approx(expected)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))[..., ::-1]  # two rows, of each frame itself and what is kept, at twice the size
    assert sheet.shape == (2 * 168, 8 * 168, 3)
    frame, kept = sheet[:168, :168], sheet[:168, 168:336]
    assert (frame[50, 50] == (255, 0, 100)).all() and (frame[100, 100] == (0, 0, 100)).all()
    assert (kept[50, 50] == (255, 0, 100)).all() and not kept[100, 100].any()


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

    spy(phase1, "collect", 2)
    spy(envs, "load_photographs", 3)
    phase1.main(phase1.Args(env="walker_walk", frames=120, test_frames=40, steps=150, batch_size=16, overlay_images=50))
    assert asked == ["test", {"spread": 20, "random": 10, "good": 10}, {"spread": 60, "random": 60}]
    folder = tmp_path / "runs/maskers/walker_walk"
    with np.load(folder / "frames.npz") as archive:
        frames = dict(archive)
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
    assert asked[3:] == ["train"] * 4 and (folder / "teacher.pt").read_bytes() == teacher
    for setting, gain in (("overlay", 0.25), ("procedural", 0.3)):
        before, after = (iou(folder / f"{kind}.pt", frames[f"test_{setting}"], masks) for kind in ("teacher", "student"))
        assert after > before + gain, setting
    assert iou(folder / "student.pt", frames["test_clean"], masks) > 0.7
