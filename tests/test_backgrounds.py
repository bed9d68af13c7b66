"""envs.py: videos, keys, colours, photographs and augmentations. Videos are tiny ones made here; DMControl-GB's own where they are at hand."""

import math
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import cv2
import imageio
import mujoco
import numpy as np
import pytest
import torch

import envs
import talas_phase1 as phase1

LEVELS = (80, 140, 200)  # the three frames of a tiny video


def write_video(path, frames):
    imageio.mimwrite(path, frames, fps=30, quality=9, macro_block_size=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Three videos of three frames at each level: video0 red, video2 green, video10 blue, brighter from frame to frame."""
    root = tmp_path_factory.mktemp("distractors")
    for level in ("video_easy", "video_hard"):
        (root / level).mkdir()
        for channel, number in enumerate((0, 2, 10)):
            frames = np.zeros((3, 64, 64, 3), np.uint8)
            frames[..., channel] = np.array(LEVELS)[:, None, None]
            write_video(root / level / f"video{number}.mp4", frames)
        (root / level / "notes.txt").write_text("not a video")
    return str(root)


def raw_render(env):
    """What MuJoCo renders of an environment's model and state, without any background."""
    with mujoco.Renderer(env.model, 84, 84) as renderer:
        for _ in range(2):  # an infinite plane is laid out around the camera of the update before
            renderer.update_scene(env.data, envs.task_row(env.env_id).camera)
        return renderer.render().copy()


def erode(mask, radius=2):
    kernel = np.ones((2 * radius + 1,) * 2, np.uint8)
    return cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0).astype(bool)


# ---------------------------------------------------------------------------------------------------------------------- videos
def test_videos_in_natural_numeric_order(tiny):
    assert [p.name for p in envs.list_videos(tiny, "video_hard")[0]] == ["video0.mp4", "video2.mp4", "video10.mp4"]


def test_videos_in_order_by_each_of_their_numbers(tiny, tmp_path):
    names = ["x².mp4", "1_10.mp4", "2_1.mp4", "2_9.mp4", "10_0.mp4"]
    (tmp_path / "video_hard").mkdir()
    for name in names[::-1]:
        shutil.copy(envs.list_videos(tiny, "video_hard")[0][0], tmp_path / "video_hard" / name)
    assert [p.name for p in envs.list_videos(str(tmp_path), "video_hard")[0]] == names


@pytest.mark.parametrize("setting", ["video_easy", "video_hard"])
def test_which_video_and_which_frame(make, tiny, setting):
    """The first episode shows the second video, the fourth the second again; a step shows its own frame, modulo the length; a reset frame 0."""
    env = make("cartpole_swingup", setting, distractors=tiny)
    for episode, channel in enumerate((1, 2, 0, 1)):
        obs, info = env.reset()
        colour = obs["pixels"][:, 2, 2].reshape(3, 3).astype(int)  # a corner of the sky, in each frame of the stack
        assert info["episode"] == episode and (np.abs(colour - LEVELS[0] * np.eye(3)[channel]) < 12).all()
    shown = [0, 0, 0]
    for step in range(1, 8):
        obs = env.step(np.zeros(1))[0]
        shown.append(step % 3)
        np.testing.assert_allclose(obs["pixels"][1::3, 2, 2], [LEVELS[t] for t in shown[-3:]], atol=12)  # it moves within a stack
    state = env.get_state()
    assert [abs(int(env.show(state, t)[2, 2, 1]) - LEVELS[t % 3]) < 12 for t in range(5)] == [True] * 5


def slow_resize(frame, size):
    """A frame by RL-ViGen's arithmetic, a pixel at a time: /255, bilinear with half-pixel centres and no antialiasing, x255; to be truncated."""
    height, width = frame.shape[:2]
    scaled, out = frame / 255.0, np.empty((size, size, 3))
    for i in range(size):
        y = max((i + 0.5) * height / size - 0.5, 0)
        y0 = int(y)
        y1, fy = min(y0 + 1, height - 1), y - y0
        for j in range(size):
            x = max((j + 0.5) * width / size - 0.5, 0)
            x0 = int(x)
            x1, fx = min(x0 + 1, width - 1), x - x0
            value = (1 - fy) * ((1 - fx) * scaled[y0, x0] + fx * scaled[y0, x1]) + fy * ((1 - fx) * scaled[y1, x0] + fx * scaled[y1, x1])
            out[i, j] = value * 255
    return out


@pytest.mark.parametrize("source", ["made here", "video_easy", "video_hard"])
def test_read_video_arithmetic(source, tmp_path, request):
    if source == "made here":  # noise, not square, larger one way and smaller the other; 35 frames: more than one chunk
        path = tmp_path / "video.mp4"
        write_video(path, np.random.default_rng(0).integers(0, 256, (35, 72, 120, 3), np.uint8))
    else:
        path = envs.list_videos(request.getfixturevalue("distractors"), source)[0][1]
    frames, capture = [], cv2.VideoCapture(str(path))
    while len(frames) < 35:
        frames.append(capture.read()[1][..., ::-1])
    video = envs.read_video(path, 35, 84)
    assert video.shape == (35, 84, 84, 3) and video.dtype == np.uint8
    for t in (0, 1, 34):
        expected = slow_resize(frames[t], 84)
        tie = np.abs(expected - expected.round()) < 1e-3  # a whole level, as in a flat patch: the last bit decides to which side it is cut
        assert np.array_equal(video[t][~tie], np.floor(expected[~tie])) and (~tie).mean() > 0.2
        assert np.abs(video[t][tie] - expected[tie]).max(initial=0) < 1.001
    assert not np.array_equal(video[0], video[34])
    assert np.array_equal(envs.read_video(path, 3, 84), video[:3])
    if source == "made here":
        assert len(envs.read_video(path, 1000, 84)) == 35


def test_a_video_of_the_observations_size_is_shown_as_it_is(tmp_path):
    path, frames = tmp_path / "video.mp4", np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    write_video(path, frames)
    capture = cv2.VideoCapture(str(path))
    assert np.abs(envs.read_video(path, 1, 64)[0].astype(int) - capture.read()[1][..., ::-1]).max() <= 1


def test_procedural_video():
    video = envs.procedural_video(np.random.default_rng(1), 40, 84)
    assert video.shape == (40, 84, 84, 3) and video.dtype == np.uint8 and video.std() > 10
    assert np.array_equal(video, envs.procedural_video(np.random.default_rng(1), 40, 84))
    assert not np.array_equal(video, envs.procedural_video(np.random.default_rng(2), 40, 84))
    assert all((video[t] != video[t + 10]).mean() > 0.01 for t in range(30))  # it moves
    image = envs.synthetic_image(np.random.default_rng(1), 84)
    assert image.shape == (84, 84, 3) and image.dtype == np.uint8 and np.array_equal(image, envs.synthetic_image(np.random.default_rng(1), 84))


def test_a_background_moves_until_the_episode_ends(make, tmp_path):
    """Neither video is cut to less than an episode, which would show it twice."""
    (tmp_path / "video_hard").mkdir()
    write_video(tmp_path / "video_hard/0.mp4", [np.full((64, 64, 3), 20 * t, np.uint8) for t in range(12)])
    for setting in ("procedural", "video_hard"):
        env = make("cartpole_swingup", setting, distractors=str(tmp_path), action_repeat=100)
        env.reset()
        state = env.get_state()
        assert len({env.show(state, t).tobytes() for t in range(env.episode_steps + 1)}) == env.episode_steps + 1 == 11


# ------------------------------------------------------------------------------------------------------------------------ keys
@pytest.mark.parametrize(
    "name, setting",
    [
        ("walker_walk", "video_easy"),
        ("walker_walk", "procedural"),
        ("finger_spin", "video_hard"),
        ("door", "video_hard"),
        ("unitree_walk", "procedural"),
    ],
)
def test_black_pixels_and_no_others_show_the_background(make, tiny, name, setting):
    env = make(name, setting, distractors=tiny)
    env.reset()
    obs = env.step(np.zeros(env.action_space.shape))[0]
    raw, frame = raw_render(env), env.render()
    black = (raw == 0).all(2)
    assert np.array_equal(obs["pixels"][-3:].transpose(1, 2, 0), frame) and 0.02 < black.mean() < 0.99
    assert np.array_equal(frame[~black], raw[~black])
    if setting == "procedural":
        assert frame[black].any(1).mean() > 0.9 and frame[black].std() > 5
    else:
        assert np.array_equal(frame[black], envs.read_video(envs.list_videos(tiny, setting)[0][1], 3, 84)[1][black])


def all_four(env, prompt):
    """(84, 84) bool: the pixels of which all four points show what the prompt names, where a mask has those with one."""
    objects = env.unwrapped._render(segmented=True).reshape(84, 4, 84, 4, 2)[:, range(4), :, (2, 0, 3, 1)]
    wanted = [(kind, i) for phrase in envs.parse_prompt(prompt) for kind, ids in env.unwrapped._lookup(phrase).items() for i in ids]
    shown = np.logical_or.reduce([(objects[..., 1] == kind) & (objects[..., 0] == i) for kind, i in wanted])
    assert np.array_equal(shown.any(0), env.segment(prompt))
    return shown.all(0)


KEYED_SHARE = {"walker_walk": 0.8, "cartpole_swingup": 0.8, "hammer": 0.5, "unitree_walk": 0.4}


@pytest.mark.parametrize("name", list(KEYED_SHARE))
def test_video_hard_leaves_the_robot_alone_and_keys_the_rest(make, tiny, name):
    train, hard, row = make(name), make(name, "video_hard", distractors=tiny), envs.task_row(name)
    for env in (train, hard):
        env.reset()
    for kind in (None, "spread", "good"):
        if kind:
            phase1.place(train.unwrapped, kind, np.random.default_rng(3))
        if train.below_ground:
            continue  # the A1 on its back: one looks through the floor, which tints it
        state = train.get_state()
        clean, shown = train.show(state, 0), hard.show(state, 1)
        assert np.array_equal(train.segment(row.prompt), hard.segment(row.prompt))
        core, keyed = erode(all_four(train, row.prompt), 1), (raw_render(hard) == 0).all(2)
        changed = (clean != shown).any(2)[core].sum()  # gaps narrower than a pixel show the ground through an antialiased one
        assert changed <= (0 if row.loader == "suite" else max(2, 0.02 * core.sum()))  # of a far hand, eroded, a hundred pixels are left
        assert keyed.mean() > KEYED_SHARE[name] and not keyed[core].any() and core.sum() > 10


def test_video_easy_keeps_the_ground(make, tiny):
    train, easy, hard = (make("walker_walk", setting, distractors=tiny) for setting in ("train", "video_easy", "video_hard"))
    for env in (train, easy, hard):
        env.reset()
    state = train.get_state()
    clean, half, gone = (env.show(state, 0) for env in (train, easy, hard))
    floor, walker = erode(train.segment("the floor")), train.segment("the walker")
    sky = erode(~train.segment("the floor and the walker"))
    assert floor.sum() > 500 and sky.sum() > 500 and np.array_equal(clean[erode(walker)], gone[erode(walker)])
    assert np.array_equal(clean[floor], half[floor]) and (clean[sky] != half[sky]).any(1).all()
    assert (clean[floor] != gone[floor]).any(1).mean() > 0.9 and np.array_equal(half[sky], gone[sky])


def test_walls_and_hills_are_keyed_too(make, tiny):
    """What manipulator and stacker have for a sky, and quadruped_escape for a ground."""
    for name, setting, share in (
        ("stacker_stack_2", "video_easy", 0.8),
        ("manipulator_bring_ball", "procedural", 0.9),
        ("quadruped_escape", "procedural", 0.8),
    ):
        env = make(name, setting, distractors=tiny)
        env.reset()
        black, mask = (raw_render(env) == 0).all(2), all_four(env, env.row.prompt)
        assert black.mean() > share and mask.any() and not black[mask].any()


def test_a_video_that_nobody_would_see_is_refused(make, tiny, monkeypatch):
    monkeypatch.setattr(envs.SuiteTask, "key", lambda self, level: None)
    env = make("walker_walk", "procedural")
    with pytest.raises(envs.UserError, match="walker_walk: procedural shows the clean scene; draw its sky and ground with textures skybox and grid"):
        env.reset()


def test_a1_keys_sky_and_ground_at_both_levels(make, tiny):
    train, easy, hard = (make("unitree_walk", setting, distractors=tiny) for setting in ("train", "video_easy", "video_hard"))
    for env in (train, easy, hard):
        env.reset()
    phase1.place(train.unwrapped, "good", np.random.default_rng(0))
    state = train.get_state()
    clean, half, gone = (env.show(state, 0) for env in (train, easy, hard))
    ground = erode(train.segment("the ground"))
    assert ground.sum() > 1000 and np.array_equal(half, gone)
    assert (half[ground] != clean[ground]).any(1).mean() > 0.95
    assert ((half == envs.read_video(envs.list_videos(tiny, "video_easy")[0][1], 1, 84)[0]).all(2))[ground].mean() > 0.6  # the rest: its mirror image


def test_adroit_keys_floor_and_void_then_the_table(make, tiny):
    train, easy, hard = (make("door", setting, distractors=tiny) for setting in ("train", "video_easy", "video_hard"))
    for env in (train, easy, hard):
        env.reset()
    state = train.get_state()
    clean, half, gone = (env.show(state, 0) for env in (train, easy, hard))
    table = erode(train.segment("the table"))
    assert table.sum() > 500 and np.array_equal(clean[table], half[table]) and (clean[table] != gone[table]).any(1).all()
    outside = erode(~train.segment("the hand, the door, the frame and the table"))
    assert outside.sum() > 50 and (clean[outside] != half[outside]).any(1).mean() > 0.9


# --------------------------------------------------------------------------------------------------------------------- colours
PALETTES = [
    {"grid_rgb1": [1.0, 0.0, 0.0], "grid_rgb2": [0.0, 0.0, 1.0], "skybox_rgb": [0.0, 1.0, 0.0], "self_rgb": [1.0, 1.0, 1.0]},
    {"grid_rgb1": [0.0, 1.0, 1.0], "grid_rgb2": [1.0, 1.0, 0.0], "skybox_rgb": [1.0, 0.0, 1.0], "self_rgb": [1.0, 1.0, 1.0]},
]
OWN = {  # the colours that the models come with
    "walker_walk": {"grid_rgb1": [0.1, 0.2, 0.3], "grid_rgb2": [0.2, 0.3, 0.4], "skybox_rgb": [0.4, 0.6, 0.8]},
    "unitree_walk": {"grid_rgb1": [0.2, 0.3, 0.4], "grid_rgb2": [0.1, 0.2, 0.3], "skybox_rgb": [0.4, 0.6, 0.8]},
}


def shown_palette(env):
    """Which of PALETTES the textures of an environment's model show, ground and sky each by itself."""
    ground = env.model.tex("grid").data.reshape(-1, 3)[::7]
    sky = env.model.tex("skybox").data.reshape(-1, 3)[::97].astype(int)
    by_ground, by_sky = [], []
    for i, palette in enumerate(PALETTES):
        one, two, top = (np.array(palette[key]) * 255 for key in ("grid_rgb1", "grid_rgb2", "skybox_rgb"))
        if (ground == one).all(1).mean() > 0.4 and (ground == two).all(1).mean() > 0.4:  # a checker: half and half, but for its edge
            by_ground.append(i)
        coloured = sky[(sky != sky[:, :1]).any(1)]  # not the white marks
        if (np.abs(coloured - top).max(1) < 3).any() and not coloured[:, top == 0].any():  # from this colour to black
            by_sky.append(i)
    assert len(by_ground) == 1 and by_ground == by_sky
    return by_ground[0]


@pytest.mark.parametrize("name", list(OWN))
def test_color_settings_show_one_palette_per_episode(make, tmp_path, name):
    for level in ("easy", "hard"):
        torch.save(PALETTES if level == "easy" else PALETTES[:1], tmp_path / f"color_{level}.pt")
    env, seen = make(name, "color_easy", distractors=str(tmp_path)), []
    for episode in range(10):
        obs, _ = env.reset()
        seen.append(shown_palette(env))
        if episode < 2:
            assert np.array_equal(obs["pixels"][:3].transpose(1, 2, 0), raw_render(env))  # what was drawn is what is seen
            env.step(np.zeros(env.action_space.shape))
            assert shown_palette(env) == seen[-1]
        if set(seen) == {0, 1} and episode:
            break
    assert set(seen) == {0, 1}
    hard = make(name, "color_hard", distractors=str(tmp_path))  # its own file
    hard.reset()
    assert shown_palette(hard) == 0


def test_color_settings_draw_from_all_palettes(make, tmp_path):
    palettes = [{"grid_rgb1": [i / 100] * 3, "grid_rgb2": [0.0, 0.0, 0.0], "skybox_rgb": [0.0, 0.0, 0.0]} for i in range(100)]
    torch.save(palettes, tmp_path / "color_hard.pt")
    env, seen = make("cartpole_swingup", "color_hard", distractors=str(tmp_path)), set()
    for _ in range(6):
        env.reset()
        seen.add(int(np.bincount(env.model.tex("grid").data.ravel(), minlength=256)[1:].argmax()))
    assert len(seen) > 3 and max(seen) - min(seen) > 50


@pytest.mark.parametrize("name", list(OWN))
def test_a_models_own_colours_give_its_own_bytes(make, tmp_path, name):
    torch.save([OWN[name]], tmp_path / "color_easy.pt")
    train, same = make(name), make(name, "color_easy", distractors=str(tmp_path))
    assert np.array_equal(train.reset()[0]["pixels"], same.reset()[0]["pixels"])
    assert np.array_equal(train.model.tex_data, same.model.tex_data)


def test_color_settings_are_refused_where_the_textures_are_missing(tmp_path):
    torch.save(PALETTES, tmp_path / "color_easy.pt")
    with pytest.raises(envs.UserError, match="hammer") as error:
        envs.make_env("hammer", "color_easy", distractors=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["color_easy", "procedural"])
def test_a_suite_task_without_the_textures_is_refused(tmp_path, monkeypatch, setting):
    """Every suite task has both today."""
    torch.save(PALETTES, tmp_path / "color_easy.pt")
    bare = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
    monkeypatch.setattr(envs.SuiteTask, "model", property(lambda self: bare, lambda self, model: None), raising=False)
    with pytest.raises(envs.UserError, match="walker_walk has not the textures skybox and grid") as error:
        envs.make_env("walker_walk", setting, distractors=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("level", ["easy", "hard"])
def test_the_real_colour_files(distractors, level):
    palettes = envs.load_colours(Path(distractors) / f"color_{level}.pt")
    assert len(palettes) == 100
    for palette in palettes:
        assert {"grid_rgb1", "grid_rgb2", "skybox_rgb"} <= set(palette)
        for key in ("grid_rgb1", "grid_rgb2", "skybox_rgb"):
            assert palette[key].shape == (3,) and palette[key].dtype == np.float64 and 0 <= palette[key].min() <= palette[key].max() <= 1
    assert len({palette["grid_rgb1"].tobytes() for palette in palettes}) > 50


class Hostile:
    """Unpickled by the ordinary loader, it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("how", ["torch.save", "old torch.save", "pickle"])
def test_a_hostile_colour_file_does_nothing(tmp_path, how):
    path, target = tmp_path / "color_easy.pt", tmp_path / "made by the pickle"
    if how == "pickle":
        path.write_bytes(pickle.dumps([Hostile(target)]))
    else:
        torch.save([Hostile(target)], path, _use_new_zipfile_serialization=how == "torch.save")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(envs.UserError, match=re.escape(str(path))) as error:
            envs.make_env("walker_walk", "color_easy", distractors=str(tmp_path))
    assert "\n" not in str(error.value) and not target.exists()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 cut", "list", "number", "a key is missing", "not a colour", "NaN", "cut"])
def test_a_damaged_colour_file(tmp_path, content):
    path = tmp_path / "color_easy.pt"
    things = {"list": [], "number": 3, "a key is missing": [{"grid_rgb1": [0.0, 0.0, 0.0]}], "not a colour": [dict.fromkeys(PALETTES[0], "red")]}
    things["NaN"] = [dict.fromkeys(PALETTES[0], [math.nan] * 3)]
    torch.save(things.get(content, PALETTES * 50), path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(envs.UserError, match=re.escape(str(path))) as error:
        envs.make_env("walker_walk", "color_easy", distractors=str(tmp_path))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- folders that do not fit
def test_settings_without_media(monkeypatch):
    monkeypatch.delenv("TALAS_DISTRACTORS", raising=False)
    for setting in ("color_easy", "color_hard", "video_easy", "video_hard"):
        with pytest.raises(envs.UserError, match=f"{setting}.*TALAS_DISTRACTORS.*procedural"):
            envs.make_env("walker_walk", setting)


def test_the_environment_variable_and_the_argument(make, monkeypatch, tiny, tmp_path):
    monkeypatch.setenv("TALAS_DISTRACTORS", tiny)
    by_variable = make("cartpole_swingup", "video_hard").reset()[0]["pixels"]
    monkeypatch.setenv("TALAS_DISTRACTORS", str(tmp_path))
    assert np.array_equal(by_variable, make("cartpole_swingup", "video_hard", distractors=tiny).reset()[0]["pixels"])  # the argument goes first


@pytest.mark.parametrize("setting", ["color_hard", "video_easy", "video_hard"])
def test_distractors_without_the_setting_asked_for(tmp_path, setting):
    folders = {"missing": tmp_path / "missing", "empty": tmp_path / "empty", "partial": tmp_path / "partial", "no videos": tmp_path / "no videos"}
    folders["empty"].mkdir()
    (folders["partial"] / "something_else").mkdir(parents=True)
    (folders["no videos"] / setting).mkdir(parents=True)
    (folders["no videos"] / setting / "readme.txt").write_text("")
    for folder in folders.values():
        with pytest.raises(envs.UserError, match=re.escape(str(folder))) as error:
            envs.make_env("walker_walk", setting, distractors=str(folder))
        assert setting in str(error.value) and "\n" not in str(error.value)
    if setting.startswith("video"):
        with pytest.raises(envs.UserError, match="something_else"):
            envs.make_env("walker_walk", setting, distractors=str(folders["partial"]))


# ----------------------------------------------------------------------------------------------------------------- photographs
def write_photos(folder, n):
    """Images of one grey each, 10, 20, ..., half of them in a folder below."""
    (folder / "below").mkdir(parents=True)
    for i in range(n):
        suffix = (".png", ".jpg", ".JPEG", ".bmp")[i % 4]
        cv2.imwrite(str(folder / ("below" if i % 2 else ".") / f"{i}{suffix}"), np.full((40, 60, 3), 10 * (i + 1), np.uint8))


def greys(photos):
    return sorted((photos.float().mean((1, 2, 3)) / 10).round().int().tolist())


def test_photographs_are_a_seeded_sample_searched_recursively(tmp_path, capsys):
    write_photos(tmp_path, 12)
    everything = envs.load_photographs(str(tmp_path), 5000, 1)
    assert everything.shape == (12, 3, 128, 128) and everything.dtype == torch.uint8 and greys(everything) == list(range(1, 13))
    assert "12" in capsys.readouterr().out  # the count is printed
    some = envs.load_photographs(str(tmp_path), 5, 1)
    assert len(set(greys(some))) == 5 and torch.equal(some, envs.load_photographs(str(tmp_path), 5, 1))
    assert len({tuple(greys(envs.load_photographs(str(tmp_path), 5, seed))) for seed in range(8)}) > 3
    assert re.search(r"\b5\b.*\b12\b", capsys.readouterr().out)


def test_a_photograph_is_its_centre_square_in_rgb(tmp_path):
    image = np.zeros((128, 256, 3), np.uint8)
    image[:, :64], image[:, 64:192], image[:, 192:] = (0, 255, 0), (10, 20, 200), (0, 255, 0)  # BGR: reddish between two green margins
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    photo = envs.read_photograph(tmp_path / "photo.png")
    assert photo.shape == (128, 128, 3) and photo.dtype == np.uint8 and (photo == (200, 20, 10)).all()
    cv2.imwrite(str(tmp_path / "tall.png"), image.transpose(1, 0, 2))
    assert (envs.read_photograph(tmp_path / "tall.png") == (200, 20, 10)).all()
    cv2.imwrite(str(tmp_path / "grey.png"), image[..., 2])
    assert (envs.read_photograph(tmp_path / "grey.png") == 200).all()


def test_held_out_photographs_stay_held_out(tmp_path, monkeypatch):
    """Whatever the seed and the count, no photograph is in both parts, with a folder and without. Of `count` a tenth is tested on."""
    monkeypatch.delenv("TALAS_OVERLAY", raising=False)
    train, test = (envs.load_photographs(None, 20, 1, part) for part in ("train", "test"))
    assert (len(train), len(test)) == (20, 2) and not {p.numpy().tobytes() for p in train} & {p.numpy().tobytes() for p in test}
    write_photos(tmp_path, 24)
    train = {grey for seed in range(4) for grey in greys(envs.load_photographs(str(tmp_path), 20, seed, "train"))}
    test = {grey for seed in range(4) for grey in greys(envs.load_photographs(str(tmp_path), 20, seed, "test"))}
    assert not train & test and len(train) > 15 and len(test) > 1
    assert len(envs.load_photographs(str(tmp_path), 5000, 1, "train")) == 21 and len(envs.load_photographs(str(tmp_path), 5000, 1, "test")) == 3
    assert len(envs.load_photographs(str(tmp_path), 20, 1, "test")) == 2


def test_photograph_folders_that_are_empty_or_missing(tmp_path):
    (tmp_path / "photo.txt").write_text("not an image")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(envs.UserError, match=re.escape(str(folder))) as error:
            envs.load_photographs(str(folder), 10, 1)
        assert "\n" not in str(error.value)


def test_the_real_photographs(overlay_folder):
    photos = envs.load_photographs(None, 16, 1)  # by TALAS_OVERLAY
    assert photos.shape == (16, 3, 128, 128) and torch.equal(photos, envs.load_photographs(overlay_folder, 16, 1))
    assert len({photo.numpy().tobytes() for photo in photos}) == 16 and photos.float().std((1, 2, 3)).median() > 20


def test_synthetic_photographs(monkeypatch, capsys):
    monkeypatch.delenv("TALAS_OVERLAY", raising=False)
    photos = envs.load_photographs(None, 12, 1)
    assert photos.shape == (12, 3, 128, 128) and photos.dtype == torch.uint8 and "synthetic" in capsys.readouterr().out
    assert torch.equal(photos, envs.load_photographs(None, 12, 1)) and not torch.equal(photos, envs.load_photographs(None, 12, 2))
    assert len({photo.numpy().tobytes() for photo in photos}) == 12 and photos.float().std((1, 2, 3)).min() > 1


# --------------------------------------------------------------------------------------------------------------- augmentations
def test_random_crops():
    """On a photograph that shows its own coordinates: where each crop lies, how large it is, whether it is flipped."""
    ramp = torch.arange(128, dtype=torch.uint8)
    photo = torch.stack([ramp.repeat(128, 1), ramp.repeat(128, 1).T, torch.full((128, 128), 7, dtype=torch.uint8)])[None]
    torch.manual_seed(0)
    crops = envs.random_crops(photo, 4000, 8)
    assert crops.shape == (4000, 3, 8, 8) and crops.dtype == torch.float32 and crops.min() >= 0 and crops.max() <= 127
    assert torch.allclose(crops[:, 2], torch.tensor(7.0))
    x, y = crops[:, 0, 4], crops[:, 1, :, 4]  # along a row, along a column
    width, height = (8 * (values[:, 4] - values[:, 3]) / 128 for values in (x, y))  # with a sign: negative is flipped
    assert (height > 0).all() and 0.45 < (width < 0).float().mean() < 0.55
    area, aspect = (width * height).abs(), (width / height).abs()
    assert area.min() > 0.19 and area.max() < 1.001 and aspect.min() > 0.74 and aspect.max() < 1.34
    assert area.min() < 0.22 and area.max() > 0.95 and aspect.min() < 0.77 and aspect.max() > 1.3
    for centre, extent in (((x[:, 3] + x[:, 4]) / 2 + 0.5, width.abs() * 64), ((y[:, 3] + y[:, 4]) / 2 + 0.5, height * 64)):
        assert (centre - extent).min() > -0.1 and (centre + extent).max() < 128.1  # inside the photograph
        assert (centre - extent).max() > 40 and centre.std() > 5
    photos = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 16, 16)
    shares = torch.bincount(envs.random_crops(photos, 5000, 2).mean((1, 2, 3)).round().long(), minlength=10) / 5000
    assert (shares - 0.1).abs().max() < 0.03  # any photograph, as often as any other


@pytest.mark.parametrize("mask", [1.0, 0.3])
def test_mix_keeps_no_lines_beside_the_agent(mask):
    """A bright agent before a flat scene: its own edges are the only ones, and not a pixel of the scene stays for them, of a soft mask either."""
    n, inside = 3000, torch.zeros(12, 12, dtype=torch.bool)
    inside[4:8, 3:7] = True
    obs = torch.where(inside, 200, 100).to(torch.uint8).expand(n, 3, 12, 12)
    torch.manual_seed(3)
    got = envs.augment(obs, mask * inside.float().expand(n, 1, 12, 12), torch.full((1, 3, 16, 16), 7, dtype=torch.uint8), "mix")
    around = got[:, 0, ~inside]
    bare = ((around - 7).abs() < 0.1).all(1) | ((around - 200).abs() < 0.1).all(1)  # the photograph, or the same in the agent's colour
    assert abs(bare.float().mean() - 0.278) < 0.03  # the half of the swaps that keeps no patches or bands, and the others' that are empty


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize(("contrast", "share"), [(4, 0), (32.5, 0.15), (61, 0.3)])
def test_mix_keeps_lines_by_their_contrast(upright, contrast, share):
    """A step in the scene's green, which one threshold in 5 to 60 finds and another does not: three swaps of ten keep what is on both sides of it."""
    n, scene = 6000, torch.full((3, 12, 12), 100.0)
    scene[1, 6:] += contrast
    torch.manual_seed(3)
    photos, nothing = torch.full((1, 3, 16, 16), 7, dtype=torch.uint8), torch.zeros(n, 1, 12, 12)
    shown = envs.augment((scene.mT if upright else scene).expand(n, 3, 12, 12), nothing, photos, "mix")[n // 2 :, 0] > 20  # darkened, perhaps
    line = torch.zeros(12, 12, dtype=torch.bool)
    line[5:7] = True
    assert abs((shown == (line.mT if upright else line)).all(2).all(1).float().mean() - share) < 0.03


@pytest.mark.parametrize(("pixels", "share"), [(9, 0), (10, 0.3)])
def test_mix_takes_an_agents_colour_from_ten_pixels_on(pixels, share):
    """Three photographs of ten, here overlaid, have its colour on the mean."""
    n, mask = 3000, torch.zeros(12, 12)
    mask.view(-1)[:pixels] = 1
    obs = torch.where(mask > 0, 200, 100).to(torch.uint8).expand(n, 3, 12, 12)
    torch.manual_seed(3)
    got = envs.augment(obs, mask.expand(n, 1, 12, 12), torch.full((1, 3, 16, 16), 7, dtype=torch.uint8), "mix")[n // 10 : n // 2, :, 6:]
    plain, tinted = (((got - (100 + photo) / 2).abs() < 0.1).flatten(1).all(1) for photo in (7, 200))
    assert (plain | tinted).all() and abs(tinted.float().mean() - share) < 0.04


def test_mix_keeps_patches_or_horizontal_bands():
    """Of a flat scene without an agent: every fourth swap keeps patches of it, another fourth bands, which go from edge to edge."""
    n, nothing = 3000, torch.zeros(1, 1, 12, 12)
    obs, photos = torch.full((n, 3, 12, 12), 100, dtype=torch.uint8), torch.full((1, 3, 16, 16), 7, dtype=torch.uint8)
    torch.manual_seed(3)
    scene = (envs.augment(obs, nothing.expand(n, 1, 12, 12), photos, "mix")[:, 0] - 100).abs() < 0.1
    parted = scene.flatten(1).any(1) & ~scene.flatten(1).all(1)
    by_rows, by_columns = (parted & (scene == first).flatten(1).all(1) for first in (scene[:, :, :1], scene[:, :1]))
    assert by_rows.float().mean() > 0.06 and by_columns.float().mean() < 0.02 and (parted & ~by_rows).float().mean() > 0.06


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    obs = torch.randint(0, 256, (5, 9, 6, 6), generator=generator, dtype=torch.uint8)
    mask = torch.rand(5, 3, 6, 6, generator=generator)
    photos = torch.randint(0, 256, (7, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return obs, mask, photos


def by_loops(kind, obs, mask, image, alpha):
    out = np.zeros(obs.shape)
    for b in range(obs.shape[0]):
        for frame in range(obs.shape[1] // 3):
            for channel in range(3):
                for y in range(obs.shape[2]):
                    for x in range(obs.shape[3]):
                        o, i, m = float(obs[b, 3 * frame + channel, y, x]), float(image[b, channel, y, x]), float(mask[b, frame, y, x])
                        out[b, 3 * frame + channel, y, x] = (1 - alpha) * o + alpha * i if kind == "overlay" else m * o + (1 - m) * i
    return out


@pytest.mark.parametrize("kind, alpha", [("overlay", 0.5), ("overlay", 0.2), ("swap", 0.5)])
def test_overlay_and_swap_against_loops(batch, kind, alpha):
    obs, mask, photos = batch
    torch.manual_seed(3)
    image = envs.random_crops(photos, 5, 6)
    torch.manual_seed(3)
    got = envs.augment(obs, mask, photos, kind, alpha)
    assert got.shape == obs.shape and got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), by_loops(kind, obs, mask, image, alpha), atol=1e-3)
    torch.manual_seed(3)
    assert torch.equal(envs.augment(obs.float(), None if kind == "overlay" else mask, photos, kind, alpha), got)


def test_one_photograph_over_the_frames_of_a_stack(batch):
    obs, _, photos = batch
    nothing = torch.zeros(5, 3, 6, 6)
    swapped = envs.augment(obs, nothing, photos, "swap")  # nothing kept: the photographs alone
    assert torch.equal(swapped[:, :3], swapped[:, 3:6]) and torch.equal(swapped[:, :3], swapped[:, 6:])
    assert len({image.numpy().tobytes() for image in swapped}) == 5  # and one for each sample
    assert torch.equal(envs.augment(obs, nothing + 1, photos, "swap"), obs.float())
    assert not torch.equal(envs.augment(obs, nothing, photos, "swap"), swapped)  # drawn anew each time
    with pytest.raises(ValueError, match="conv: no such augmentation"):  # as when a fork adds the name before the branch
        envs.augment(obs, nothing, photos, "conv")


def test_mix_is_a_tenth_clean_four_tenths_overlay_half_swap():
    n, generator = 3000, torch.Generator().manual_seed(4)
    obs = torch.randint(1, 156, (n, 6, 1, 1), generator=generator, dtype=torch.uint8).repeat(1, 1, 12, 12)  # no black, so that seams show
    obs[:, :, 10] += 100  # a line
    mask = torch.zeros(n, 2, 12, 12)
    mask[:, :, 4:8, 3:7] = 1
    mask[:, :, 3, 3:7] = 0.25  # the agent's edge
    photos = torch.randint(1, 256, (7, 3, 16, 16), generator=generator, dtype=torch.uint8)
    torch.manual_seed(3)
    image = envs.random_crops(photos, n, 12).repeat(1, 2, 1, 1)
    torch.manual_seed(3)
    got, m = envs.augment(obs, mask, photos, "mix", 0.4), mask.repeat_interleave(3, 1)

    def pixels(candidate):  # (n, 12, 12): where all channels of all frames are the candidate's
        return ((got - candidate).abs() < 1e-2).all(1)

    # Three photographs of ten are shifted to the mean colour of the agent: here of 16 pixels and 4 quarters in each of the two frames.
    kept = (m * obs).unflatten(1, (2, 3)).sum((1, 3, 4)).repeat(1, 2) / 34  # (n, 6)
    tinted = (image + (kept - image.mean((2, 3)))[:, :, None, None]).clamp(0, 255)
    frame, photo, shifted = pixels(obs.float()), pixels(image), pixels(tinted)
    plain, agentlike = (pixels(0.6 * obs + 0.4 * other).all((1, 2)) for other in (image, tinted))
    overlaid = plain | agentlike
    assert abs(agentlike.float().mean() - 0.3 * 0.4) < 0.03
    recoloured = shifted.sum((1, 2)) > photo.sum((1, 2))  # one or the other, not some of each
    photo = torch.where(recoloured[:, None, None], shifted, photo)
    behind = torch.where(recoloured[:, None, None, None], tinted, image)
    clean = frame.all((1, 2))

    def seam(keep):
        """(n, 12, 12): what share of the (first) frame a pixel has, where `keep` of it is not the photograph; -1 where it is something else."""
        shares = ((got - (1 - keep) * behind) / (keep * obs)).unflatten(1, (2, 3))
        share = shares.mean(2)
        grey = ((shares - share.unsqueeze(2)).abs() < 2e-3).all(2) & (share > 0.249) & (share < 1.001)
        return torch.where(grey.all(1), share[:, 0], -1)

    assert clean[:300].all() and overlaid[300:1500].all() and not overlaid[1500:].any()
    assert clean[1500:].float().mean() < 0.12  # patches that leave the whole scene
    rest, whole, partial = ~overlaid, seam(torch.ones(1)), seam(torch.tensor(0.25))
    alone = rest & photo[:, 8:].all((1, 2)) & photo[:, :3].all((1, 2)) & photo[:, :, 7:].all((1, 2)) & photo[:, :, :3].all((1, 2))
    assert abs(alone.float().mean() - 0.128) < 0.02  # nothing of the scene: a fifth of the half, and empty patches
    seamed = alone & (whole[:, 7, 3:7] < 0.999).any(1)
    assert abs(seamed.sum() / alone.sum() - 0.8) < 0.07  # dark seams, in four fifths:
    for share in (whole[seamed][:, 7, 3:7], partial[seamed][:, 3, 3:7]):  # below the agent, and above it, where a pixel is the agent's by a quarter
        assert share.min() < 0.27 and share.max() > 0.98 and abs(share.mean() - 0.625) < 0.02
    assert (partial[alone & ~seamed][:, 3, 3:7] > 0.999).all() and (whole[alone & ~seamed][:, 4:8, 3:7] > 0.999).all()
    lined = frame[:, 10:].all((1, 2)) & photo[:, [0, 1, 2, 8]].all((1, 2)) & ~clean
    assert abs(lined.float().mean() - 0.15) < 0.03  # the line, and the pixels that touch it
    edge = (m[0, 0] > 0) & (m[0, 0] < 1)
    assert (photo | (whole > 0))[rest][:, ~edge].all()  # every other pixel is the photograph's or the scene's, if darker,
    assert ((partial > 0) | (whole > 0))[rest][:, edge].all()  # and on the agent's edge the scene's (patches), or both
    assert frame[rest][:, 5:7, 4:6].all()  # the agent is always kept
    patched = rest & ~clean & (whole > 0)[:, :3].any((1, 2))
    assert 0.15 < patched.float().mean() < 0.3
