"""Files from outside: what can be decoded is converted, what cannot be is skipped or refused in one line that names it. None of them is code."""

import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import PIL.Image
import pytest
import torch
from commands import ROOT

import envs
import talas_asymmetric_sac as rl
import talas_phase2 as phase2
from envs import UserError

RED = (200, 20, 10)


@pytest.fixture(autouse=True)
def bounded():
    """No file takes ten seconds or a gigabyte."""

    def memory(what: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{what}:")[1].split()[0])  # KB

    if (linux := Path("/proc/self/clear_refs")).exists():
        linux.write_text("5")  # forgets the peak that earlier tests have reached
        before = memory("VmRSS")
    began = time.process_time()  # not the clock's: on a busy machine another process may need that long to import torch
    yield
    assert time.process_time() - began < 10
    assert not linux.exists() or memory("VmHWM") - before < 1_000_000


# ------------------------------------------------------------------------------------------------------------ photographs
def png_header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels, and has none."""
    content = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + content))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + content + checksum


def write_photograph(path: Path, kind: str) -> None:
    image = PIL.Image.new("RGB", (90, 60), RED)
    if kind == "grey":
        image = image.convert("L")
    elif kind == "alpha":
        image.putalpha(128)
    elif kind == "palette":
        image = image.quantize(4)
    elif kind == "cmyk":
        image = image.convert("CMYK")
    elif kind == "1 bit":
        image = image.convert("1", dither=PIL.Image.Dither.NONE)
    elif kind == "one pixel":
        image = image.resize((1, 1))
    elif kind == "a line":
        image = image.resize((3000, 1))
    elif kind == "rotated":  # by EXIF: stored on its side, its upper part red and its lower blue when it is upright
        image = PIL.Image.new("RGB", (60, 60), (0, 0, 255))
        image.paste(RED, (0, 0, 30, 60))
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # turn clockwise by a quarter
        return image.save(path, quality=95, exif=exif)
    elif kind == "16 bit":
        return cv2.imwrite(str(path), np.full((60, 90, 3), np.array(RED[::-1]) * 257, np.uint16))
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    if kind == "damaged notes":  # in place of the JFIF header, EXIF whose list of five entries ends at once: Pillow warns, pixels are whole
        notes, data = b"Exif\0\0II*\0\x08\0\0\0\x05\0", path.read_bytes()
        path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(notes)) + notes + data[20:])


@pytest.mark.parametrize(
    ("kind", "suffix", "colour"),
    [
        ("plain", ".jpg", RED), ("plain", ".png", RED), ("plain", ".webp", RED), ("plain", ".bmp", RED), ("grey", ".jpg", (73,) * 3),
        ("grey", ".png", (73,) * 3), ("alpha", ".png", RED), ("palette", ".png", RED), ("cmyk", ".jpg", RED), ("1 bit", ".png", (0,) * 3),
        ("one pixel", ".png", RED), ("a line", ".png", RED), ("16 bit", ".png", RED), ("rotated", ".jpg", None),
        ("damaged notes", ".jpg", RED),
    ],
)  # fmt: skip
def test_photographs_are_converted(tmp_path, kind, suffix, colour):
    path = tmp_path / f"photo{suffix}"
    write_photograph(path, kind)
    with warnings.catch_warnings(action="error"):
        photo = envs.read_photograph(path)
    assert photo.shape == (128, 128, 3) and photo.dtype == np.uint8
    if kind == "rotated":
        assert np.abs(photo[:50].astype(int) - RED).max() < 12 and np.abs(photo[-50:].astype(int) - (0, 0, 255)).max() < 12
    else:
        assert np.abs(photo.astype(int) - colour).max() < 12


BROKEN_PHOTOGRAPHS: dict[str, Callable[[Path], object]] = {
    "nothing in it": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("not an image"),
    "its signature alone": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "a program": lambda path: shutil.copy(os.path.realpath("/proc/self/exe"), path),
    "3.6 gigapixels by its header": lambda path: path.write_bytes(png_header(60_000, 60_000)),
    "60 megapixels by its header": lambda path: path.write_bytes(png_header(10_000, 6_000)),
    "60 megapixels, and all there": lambda path: PIL.Image.new("L", (10_000, 6_000)).save(path, "png"),
    "no pixel by its header": lambda path: path.write_bytes(png_header(0, 10)),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "an animation's header": lambda path: path.write_bytes(b"GIF89a\x01\x00"),
}


@pytest.mark.parametrize("kind", BROKEN_PHOTOGRAPHS)
def test_broken_photographs_are_skipped(tmp_path, monkeypatch, kind):
    """With one warning each; an error names the folder if nothing else is in it."""
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    Path("media").mkdir()
    BROKEN_PHOTOGRAPHS[kind](Path("media/broken.jpg"))
    with warnings.catch_warnings(action="ignore"), pytest.raises(UserError, match="media: none of its images can be read"):
        envs.load_photographs("media", 5000, 1)
    write_photograph(Path("media/good.png"), "plain")
    with pytest.warns(UserWarning, match=r"broken\.jpg: skipped") as caught:
        assert len(envs.load_photographs("media", 5000, 1)) == 1
    assert len(caught) == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_photograph_that_may_not_be_read(tmp_path):
    write_photograph(tmp_path / "secret.png", "plain")
    (tmp_path / "secret.png").chmod(0)
    with pytest.warns(UserWarning, match=r"secret\.png: skipped"):
        assert envs.read_photograph(tmp_path / "secret.png") is None


# ------------------------------------------------------------------------------------------------------------ videos
@pytest.mark.parametrize(("ffmpeg", "said"), [("/nowhere/ffmpeg", "OSError: by ffmpeg, FileNotFoundError"), (None, "")])
def test_a_film_that_cannot_be_written_is_an_oserror_that_says_why(tmp_path, ffmpeg, said):
    """In a process of its own: imageio looks for ffmpeg once."""
    code = f"import numpy, envs; envs.write_film(envs.Path({str(tmp_path / 'a.mp4')!r}), [numpy.zeros((16, 16, 3), numpy.uint8)] * 3)"
    variables = {key: value for key, value in (os.environ | {"IMAGEIO_FFMPEG_EXE": ffmpeg}).items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (ffmpeg is None) == (tmp_path / "a.mp4").is_file(), done.stderr
    assert not said or said in done.stderr.splitlines()[-1]


def write_video(path: Path, frames: int = 3, size: tuple[int, int] = (64, 64), **options) -> None:
    imageio.mimwrite(path, [np.full((*size, 3), 60 * (i + 1), np.uint8) for i in range(frames)], fps=10, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("video.mp4", {"macro_block_size": 8}), ("video.avi", {"codec": "mjpeg"}), ("video.mkv", {"codec": "ffv1", "pixelformat": "yuv420p"}),
        ("video.mov", {"codec": "mpeg4"}), ("video.webm", {"codec": "libvpx"}), ("one frame.mp4", {"frames": 1, "macro_block_size": 8}),
        ("tiny.mp4", {"size": (8, 8), "macro_block_size": 2}), ("wide.mp4", {"size": (16, 640), "macro_block_size": 8}),
        ("grey.mp4", {"pixelformat": "gray", "macro_block_size": 8}), ("häßliche Größe 2.mp4", {"macro_block_size": 8}),
    ],
)  # fmt: skip
def test_videos_are_converted(tmp_path, name, options):
    write_video(tmp_path / name, **options)
    video = envs.read_video(tmp_path / name, 5, 84)
    assert video.shape[1:] == (84, 84, 3) and video.dtype == np.uint8 and len(video) == (1 if "one" in name else 3)
    assert np.abs(video[0].astype(int) - 60).max() < 15


def huge_video(path: Path) -> None:
    """An AVI whose header promises 900 megapixels a frame."""
    write_video(path, codec="rawvideo", pixelformat="bgr24")
    data = bytearray(path.read_bytes())
    place = data.index(b"strf") + 12
    assert struct.unpack_from("<ii", data, place) == (64, -64)  # rows from above
    struct.pack_into("<ii", data, place, 30_000, -30_000)
    path.write_bytes(data)


BROKEN_VIDEOS = {name: BROKEN_PHOTOGRAPHS[name] for name in ("nothing in it", "a text", "a folder", "a link to nothing", "a pipe", "a program")} | {
    "its beginning alone": lambda path: (write_video(path, macro_block_size=8), path.write_bytes(path.read_bytes()[:200])),
    "without its index": lambda path: (write_video(path, macro_block_size=8), path.write_bytes(path.read_bytes().replace(b"moov", b"xxxx"))),
    "a photograph": lambda path: path.write_bytes(png_header(10, 10)),
    "900 megapixels by its header": huge_video,
    "52 megapixels by its header, and all there": lambda path: imageio.mimwrite(
        path, [np.zeros((6500, 8000, 3), np.uint8)], fps=1, codec="mjpeg", macro_block_size=4
    ),
}


@pytest.mark.parametrize("kind", BROKEN_VIDEOS)
def test_broken_videos_are_skipped_and_counted(tmp_path, make, kind):
    folder = tmp_path / "video_hard"
    folder.mkdir()
    BROKEN_VIDEOS[kind](folder / ("0.avi" if "header" in kind else "0.mp4"))
    with warnings.catch_warnings(action="ignore"), pytest.raises(UserError, match="video_hard: none of its videos can be decoded"):
        envs.list_videos(str(tmp_path), "video_hard")
    write_video(folder / "1.mp4", macro_block_size=8)
    with pytest.warns(UserWarning, match=r"0\.(mp4|avi): .*skipped") as caught:
        env = make("cartpole_swingup", "video_hard", distractors=str(tmp_path))
    assert len(caught) == 1 and env.videos_skipped == 1
    for _ in range(2):
        assert np.abs(env.reset()[0]["pixels"][:, 2, 2].astype(int) - 60).max() < 15  # a corner of the sky shows the good one


# ------------------------------------------------------------------------------------------------------------ tensors
class Bait:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def small_agent() -> rl.Agent:
    torch.manual_seed(0)
    args = rl.Args(env="hammer", hidden_dim=8, encoder="small", precision="fp32")
    return rl.Agent(args, 9, 1, 1, rl.Masker(), torch.zeros(4, 3, 128, 128, dtype=torch.uint8))


class Files:
    """A good file of every kind, and what reads it: content to compare, or UserError."""

    def __init__(self, folder: Path):
        self.folder, agent = folder, small_agent()
        masker = {"kind": "student", "env_id": "hammer", "image_size": 84, "prompt": "the hammer", "state_dict": agent.masker.state_dict()}
        for name in ("student.pt", "teacher.pt"):
            envs.save_tensors(folder / name, masker)
        rl.save_agent(folder / "agent.pt", agent, 7, {"prompt": "the hammer"})
        self.replay, self.space = self.fresh()
        for _ in range(3):
            seen = (torch.full(shape, 7, dtype=torch.uint8) for shape in ((1, 9, 84, 84), (1, 3, 84, 84)))
            self.replay.add_first(np.array([0]), *seen, torch.zeros(1, 1))
        rl.save_state(folder / "resume", rl.Progress(step=5), agent, self.replay, self.space, rl.Progress())
        rng = np.random.default_rng(0)
        colours = [{name: rng.random(3).tolist() for name in ("grid_rgb1", "grid_rgb2", "skybox_rgb")} for _ in range(3)]
        torch.save(colours, folder / "color_hard.pt", _use_new_zipfile_serialization=False)  # DMControl-GB's format, which has no checksums

    def fresh(self) -> tuple[rl.Replay, gym.Space]:
        return rl.Replay(1, 10, (9, 84, 84), 1, 1, torch.device("cpu")), gym.spaces.Box(-1, 1, (1, 1))

    def read(self, kind: str) -> list:
        if kind == "student.pt":
            masker, prompt = rl.find_masker(rl.Args(env="hammer", masker_path=str(self.folder)), "student")
            return [prompt, *masker.state_dict().values()]
        if kind == "teacher.pt":
            masker, checkpoint = phase2.load_teacher(self.folder / kind, "hammer")
            return [checkpoint["prompt"], *masker.state_dict().values()]
        if kind == "agent.pt":
            agent, checkpoint = rl.load_agent(self.folder / kind)
            return [checkpoint["step"], checkpoint["prompt"], *agent.state_dict().values()]
        if kind == "color_hard.pt":
            return [torch.from_numpy(value) for palette in envs.load_colours(self.folder / kind) for value in palette.values()]
        (replay, space), agent = self.fresh(), small_agent()
        progress = rl.load_state(self.folder / "resume", agent, replay, space)
        return [progress.step, replay.n, replay.frames[:3], *agent.state_dict().values()]

    def path(self, kind: str) -> Path:
        return self.folder / ("resume/0000000005." + kind if kind in ("state.pt", "replay.pt") else kind)


KINDS = ("student.pt", "teacher.pt", "agent.pt", "state.pt", "replay.pt", "color_hard.pt")


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True))


def refusal(files: Files, kind: str, capsys) -> str:
    """What is said of a file that is refused: one line that names it."""
    with pytest.raises(UserError) as raised:
        files.read(kind)
    said = f"{raised.value}\n{capsys.readouterr().out}"
    assert str(files.path(kind).parent) in said and said.count("\n") <= 3
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_tensors_are_refused_or_whole(files, capsys, kind):
    """Flipped bytes, cut ends, swapped parts of a real file: refused in a line, or read as if nothing had happened; colours, at least as colours."""
    good, path, rng, refused = files.read(kind), files.path(kind), np.random.default_rng(len(kind)), 0
    data = path.read_bytes()
    other = (files.path("student.pt") if kind != "student.pt" else files.path("color_hard.pt")).read_bytes()
    mutants = [data[: int(len(data) * share)] for share in (0, 0.01, 0.5, 0.99)] + [
        data[:-1],
        data[1:],
        other[:100] + data[100:],
        data[:-100] + other[-100:],
    ]
    for _ in range(12):
        mutant = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            mutant[rng.integers(len(data))] ^= 1 << rng.integers(8)
        mutants.append(bytes(mutant))
    for mutant in mutants:
        path.write_bytes(mutant)
        try:
            content = files.read(kind)
            assert equal(content, good) or kind == "color_hard.pt"
            assert kind != "color_hard.pt" or all(value.shape == (3,) and ((value >= 0) & (value <= 1)).all() for value in content)
        except UserError as error:
            refused += 1
            assert str(files.folder) in str(error) and "\n" not in str(error)
        capsys.readouterr()
    assert refused >= (8 if kind != "color_hard.pt" else 6)
    path.write_bytes(data)
    assert equal(files.read(kind), good)  # nothing of a good file was lost on the way


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_tensors_are_not_executed(files, capsys, kind):
    hit, path = files.folder / "hit", files.path(kind)
    content = torch.load(path, weights_only=kind != "color_hard.pt")
    torch.save([{"grid_rgb1": Bait(hit)}] if kind == "color_hard.pt" else content | {"prompt": Bait(hit)}, path)
    torch.load(path, weights_only=False)
    assert hit.exists()  # the bait works
    hit.unlink()
    refusal(files, kind, capsys)
    assert not hit.exists()


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_tensors_of_another_kind_are_refused(files, capsys, kind):
    """Another format is named; so is what was made for another task or size; the wrong kind of file is no file of this kind."""
    path = files.path(kind)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format": 99}, path)
    assert "its format is 99" in refusal(files, kind, capsys)
    torch.save([1, 2, 3], path)
    refusal(files, kind, capsys)
    shutil.copy(files.path("agent.pt" if kind != "agent.pt" else "student.pt"), path)
    refusal(files, kind, capsys)
    if kind in ("student.pt", "teacher.pt"):
        other = {"state_dict": {}}, 'Missing key(s) in state_dict: "stem.weight"'
        for change, said in (({"env_id": "door"}, "was made for door"), ({"image_size": 64}, "at 64 pixels"), other):
            envs.save_tensors(path, content | change)
            assert said in refusal(files, kind, capsys)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"env": "hammer", "no_such_flag": 1}', b"\xff\xfe", b"[" * 10_000])
def test_a_runs_folder_with_damaged_arguments(tmp_path, content):
    (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(UserError, match=r"not the folder of a run of this script \(args\.json: .*\)"):
        rl.read_args(["--resume", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]
