"""envs.py: the environment, the three loaders' rewards and states, masks and prompts, the command line. Videos and photographs: test_backgrounds."""

import gc
import http.server
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import cv2
import gymnasium as gym
import mujoco
import numpy as np
import pytest
from dm_control import suite
from dm_control.mujoco import Physics
from gymnasium.utils.env_checker import check_env

import envs
import talas_phase1 as phase1

ROOT = Path(envs.__file__).parent
FAMILIES = ["cartpole_swingup", "unitree_walk", "hammer"]
ADROIT = {"pen": 0, "door": 4, "hammer": 2, "relocate": 6}  # where the hand's 24 joints start in qpos
SCALE = {"pen": 50, "door": 1, "hammer": 10, "relocate": 30}  # what the dense rewards are divided by


def rollout(env, steps=2, **reset):
    """All that a user sees of the start of an episode, as bytes and numbers."""
    rng, (obs, info) = np.random.default_rng(0), env.reset(**reset)
    trace = [obs["pixels"].tobytes(), obs["proprio"].tobytes(), info["episode"]]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        trace += [obs["pixels"].tobytes(), obs["proprio"].tobytes(), reward, terminated, truncated]
    return trace


# ------------------------------------------------------------------------------------------------------------- gymnasium's API
@pytest.mark.parametrize("name", FAMILIES)
def test_check_env_and_observations(make, name):
    env = make(name)
    check_env(env, skip_render_check=True)
    obs, info = env.reset(seed=3)
    proprio = 24 if name == "hammer" else 0
    assert obs["pixels"].shape == (9, 84, 84) and obs["pixels"].dtype == np.uint8 and obs["pixels"].flags.c_contiguous
    assert obs["proprio"].shape == (proprio,) and obs["proprio"].dtype == np.float32
    assert env.observation_space["proprio"].shape == (proprio,) and info["episode"] == 0
    assert env.action_space.low.min() == env.action_space.low.max() == -1 and env.action_space.high.min() == env.action_space.high.max() == 1
    frame = env.render().transpose(2, 0, 1)
    assert np.array_equal(obs["pixels"], np.concatenate([frame] * 3))  # the stack of a reset: the first frame, three times
    frames = [frame] * 3
    for _ in range(3):
        obs = env.step(env.action_space.sample())[0]
        frames.append(env.render().transpose(2, 0, 1))
        assert np.array_equal(obs["pixels"], np.concatenate(frames[-3:]))  # oldest first, RGB within each
        assert not np.array_equal(frames[-1], frames[-2])


def test_size_stack_and_colour_order(make):
    env = make("walker_walk", image_size=500, frame_stack=2)  # larger than the model's offscreen buffer
    obs, _ = env.reset()
    assert obs["pixels"].shape == (6, 500, 500) and env.observation_space["pixels"].shape == (6, 500, 500)
    red, _, blue = obs["pixels"][:3, 20, 20].astype(int)
    assert blue > red + 20  # the sky is blue


@pytest.mark.parametrize("name", FAMILIES)
def test_physics_is_dm_controls_on_its_suite_only(make, name):
    physics = make(name).unwrapped.physics
    assert isinstance(physics, Physics) if name == "cartpole_swingup" else physics is None


def test_vector_environments(make):
    """Two episodes through Gymnasium's vector environments, which start the next episode on the step after the last."""
    thunks = [partial(envs.make_env, "cartpole_swingup", "train", seed, action_repeat=500) for seed in (1, 2)]
    for vector in (gym.vector.SyncVectorEnv(thunks), gym.vector.AsyncVectorEnv(thunks[:1], context="spawn")):
        first, _ = vector.reset()
        assert first["pixels"].shape == (vector.num_envs, 9, 84, 84) and first["proprio"].shape == (vector.num_envs, 0)
        actions = np.full(vector.action_space.shape, 0.5, np.float32)
        truncations = [vector.step(actions)[3].tolist() for _ in range(2)]
        second = vector.step(actions)[0]
        assert truncations == [[False] * vector.num_envs, [True] * vector.num_envs]
        for i in range(vector.num_envs):
            single = make("cartpole_swingup", "train", i + 1)
            assert np.array_equal(first["pixels"][i], single.reset()[0]["pixels"])
            assert np.array_equal(second["pixels"][i], single.reset()[0]["pixels"])
        vector.close()


def test_one_episode_truncates_and_never_terminates(make):
    env = make("walker_walk", action_repeat=250)
    for _ in range(2):
        env.reset()
        flags = [env.step(np.ones(6))[2:4] for _ in range(4)]
        assert flags == [(False, False)] * 3 + [(False, True)]


@pytest.mark.parametrize("name", [name for name, row in envs.TASKS.items() if row.loader in ("suite", "unitree", "adroit")])
def test_episode_lengths(name):
    row = envs.task_row(name)
    assert row.steps * row.repeat == (200 if row.loader == "adroit" else 1000)
    assert row.success_steps == {"pen": 20, "door": 25, "hammer": 25, "relocate": 25}.get(name, 0)
    assert row.repeat == {"cartpole_swingup": 8, "finger_spin": 2}.get(name, 4 if row.loader == "suite" else 2)  # published practice


def test_action_repeat_sums_rewards(make):
    """Against dm_control stepped by hand from the same state."""
    env, hand = make("walker_walk"), suite.load("walker", "walk")
    env.reset()
    hand.reset()
    mujoco.mj_setState(hand.physics.model.ptr, hand.physics.data.ptr, env.get_state()[0], mujoco.mjtState.mjSTATE_INTEGRATION)
    hand.physics.forward()
    rng, rewards = np.random.default_rng(1), []
    for _ in range(5):
        action = rng.uniform(-1, 1, 6)
        expected = [hand.step(action).reward for _ in range(4)]
        rewards.append(env.step(action)[1])
        assert rewards[-1] == pytest.approx(sum(expected), abs=1e-9)
        np.testing.assert_allclose(env.unwrapped.physics.data.qpos, hand.physics.data.qpos, atol=1e-9)
    assert min(rewards) > 0 and len(set(rewards)) == 5


def test_actions_are_clipped_and_scaled(make):
    env = make("quadruped_walk", action_repeat=1)  # its actions are not from -1 to 1
    env.reset()
    low, high = env.unwrapped.physics.model.actuator_ctrlrange.T
    for action, expected in ((-1, low), (0, (low + high) / 2), (7, high)):
        env.step(np.full(12, action, np.float32))
        np.testing.assert_allclose(env.unwrapped.physics.data.ctrl, expected)


@pytest.mark.parametrize(
    "name, setting", [("cartpole_swingup", s) for s in envs.SETTINGS] + [("hammer", "procedural"), ("unitree_stand", "procedural")]
)
def test_determinism(make, name, setting, request):
    """One seed and one action sequence: identical bytes; episode i is the same by its number and in its turn."""
    folder = request.getfixturevalue("distractors") if setting.startswith(("color", "video")) else None
    a, b = (make(name, setting, 1, distractors=folder) for _ in range(2))
    first, second = rollout(a), rollout(a)
    assert len({first[0], first[3], first[8]}) == 3  # the pictures do move
    assert rollout(b, options={"episode": 1}) == second and second[2] == 1
    assert rollout(b, options={"episode": 0}) == first  # also backwards, in a used environment
    assert rollout(b)[2] == 1  # and the count goes on from there
    assert rollout(b, seed=1) == first  # a seed starts the count anew
    assert first[0] != second[0] and rollout(b, seed=2)[0] != first[0]  # the A1's start is always the published one: its background


# ----------------------------------------------------------------------------------------------------------------------- Adroit
def documented_reward(name, d, m):
    """The dense reward by the book (gymnasium-robotics's documentation, D4RL, DAPG), unscaled, and which of its bonuses were in it."""
    site, body = (lambda s: d.site_xpos[m.site(s).id]), (lambda b: d.xpos[m.body(b).id])
    dist, got = (lambda x, y: float(np.sqrt(((x - y) ** 2).sum()))), set()

    def bonus(label, when, amount):
        if when:
            got.add(label)
        return amount if when else 0.0

    palm = site("S_grasp")
    if name == "hammer":
        depth = dist(site("S_target"), site("nail_goal"))
        r = -0.1 * dist(palm, body("Object")) - dist(site("tool"), site("S_target")) - 10 * depth - 0.01 * float(np.sqrt((d.qvel**2).sum()))
        r += bonus("lift", body("Object")[2] > 0.04 and site("tool")[2] > 0.04, 2) + bonus("near", depth < 0.02, 25) + bonus("in", depth < 0.01, 75)
    elif name == "door":
        hinge = float(d.joint("door_hinge").qpos[0])
        r = -0.1 * dist(palm, site("S_handle")) - 0.1 * (hinge - 1.57) ** 2 - 1e-5 * float((d.qvel**2).sum())
        r += bonus("ajar", hinge > 0.2, 2) + bonus("open", hinge > 1.0, 8) + bonus("done", hinge > 1.35, 10)
    elif name == "relocate":
        ball, target = body("Object"), site("target")
        r = -0.1 * dist(palm, ball) + bonus("lift", ball[2] > 0.04, 1.0 - 0.5 * dist(palm, target) - 0.5 * dist(ball, target))
        r += bonus("near", dist(ball, target) < 0.1, 10) + bonus("very near", dist(ball, target) < 0.05, 20)
    else:  # pen: D4RL's and DAPG's distance has weight 1 (the documentation's "0.1" is in no code)
        away = dist(body("Object"), site("eps_ball"))
        pen, goal = site("object_top") - site("object_bottom"), site("target_top") - site("target_bottom")
        same = float(pen @ goal / np.sqrt((pen @ pen) * (goal @ goal)))
        r = -away + same + bonus("close", away < 0.075 and same > 0.9, 10) + bonus("closer", away < 0.075 and same > 0.95, 50)
        r += bonus("dropped", body("Object")[2] < 0.075, -5)
    return r, got


BONUSES = {"hammer": {"lift", "near", "in"}, "door": {"ajar", "open", "done"}}
BONUSES |= {"relocate": {"lift", "near", "very near"}, "pen": {"close", "closer", "dropped"}}


@pytest.mark.parametrize("name", list(ADROIT))
def test_dense_reward_is_the_documented_one(make, name):
    env, rng, seen = make(name), np.random.default_rng(1), set()
    task, model, data = env.task, env.task.model, env.task.data
    mine = mujoco.MjData(model)  # a second simulation of the same steps
    for i in range(48):
        task.reset(rng)
        if i % 3:
            phase1.place(env.unwrapped, ("spread", "good")[i % 3 - 1], rng)
            data.qvel[:] = rng.normal(0, 0.3, model.nv)
        if name == "relocate" and i % 2:  # the ball in its goal, now nearer, now farther; its frame has the world's axes
            data.qpos[-6:-3] += data.site("target").xpos + rng.normal(0, 0.03, 3) - data.body("Object").xpos
        if name == "hammer" and i % 6 == 4:
            data.qpos[-7] = rng.uniform(0.07, 0.09)  # the nail, nearly or quite in
        action, state = rng.uniform(-1, 1, env.action_space.shape), np.zeros(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_setState(model, mine, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        low, high = model.actuator_ctrlrange.T
        mine.ctrl[:] = (low + high) / 2 + action * (high - low) / 2
        mujoco.mj_step(model, mine, 5)
        expected, got = documented_reward(name, mine, model)
        reward, terminated, info = task.step(action)
        assert reward * SCALE[name] == pytest.approx(expected, abs=1e-6) and not terminated
        assert isinstance(info["success"], bool)
        seen |= got
    assert seen == BONUSES[name]


@pytest.mark.parametrize("name, start", ADROIT.items())
def test_adroit_steps_as_the_benchmark_does(make, name, start):
    """Same seed, same actions: the same joints as gymnasium-robotics's own environment, bit for bit, and its sparse reward, which is 10 or -0.1."""
    env, bare = make(name, reward="sparse", action_repeat=1), gym.make(f"AdroitHand{name.title()}-v1", reward_type="sparse").unwrapped
    env.task.reset(np.random.default_rng(3))
    bare.reset(seed=3)
    for action in np.random.default_rng(0).uniform(-1, 1, (30, *env.action_space.shape)):
        reward, _, info = env.task.step(action)
        _, bare_reward, _, _, bare_info = bare.step(action)
        assert np.array_equal(env.task.data.qpos, bare.data.qpos)
        assert reward == bare_reward == -0.1 and not info["success"] and not bare_info["success"]
    proprio = env.reset()[0]["proprio"]
    proprio_after = env.step(env.action_space.sample())[0]["proprio"]
    assert np.array_equal(proprio_after, env.task.data.qpos[start : start + 24].astype(np.float32)) and (proprio_after != proprio).any()
    assert env.task.model.joint(start).name == "WRJ1" and env.task.model.joint(start + 23).name == "THJ0"
    bare.close()


def test_an_episode_ends_within_an_agent_step(make, monkeypatch):
    """What terminates is not simulated further, and the time limit says so for itself."""
    env = make("walker_walk", action_repeat=250)  # four agent steps
    env.reset()
    action, taken = np.zeros(6, np.float32), []
    assert [env.step(action)[2:4] for _ in range(4)] == [(False, False)] * 3 + [(False, True)]
    env.reset()
    monkeypatch.setattr(env.unwrapped.task, "step", lambda action: (taken.append(action), (0.5, len(taken) == 3, {}))[1])
    assert env.step(action)[1:4] == (1.5, True, False) and len(taken) == 3


@pytest.mark.parametrize("repeat", [2, 5])
def test_episode_success_wants_more_than_25_control_steps(make, repeat):
    env = make("hammer", reward="sparse", action_repeat=repeat)
    env.reset()
    still = env.task.hold().astype(np.float32)
    _, reward, _, _, info = env.step(still)
    assert reward == pytest.approx(-0.1 * repeat) and not info["success"] and not info["episode_success"]
    env.task.data.qpos[-7] = 0.09  # the nail is in
    for step in range(1, 16):
        _, reward, _, _, info = env.step(still)
        assert info["success"] and reward == pytest.approx(10 * repeat) and info["episode_success"] == (repeat * step > 25)
    env.task.data.qpos[-7] = 0.0
    info = env.step(still)[4]
    assert not info["success"] and info["episode_success"]  # once earned, it stays
    env.reset()
    assert not env.step(still)[4]["episode_success"]


# ------------------------------------------------------------------------------------------------------------------- Unitree A1
A1_Q0 = np.array([0.05, 0.22, -0.8, 0.05, 0.22, -0.8, 0.1, 0.68, 0, 0.1, 0.68, 0])
A1_RANGES = {
    "unitree_walk": [(-0.6, 0.2), (-0.8, 0.8), (-2.0, -0.916298)],
    "unitree_stand": [(-0.802851, 0.802851), (-1.0472, 4.18879), (-2.69653, -0.916298)],
}
A1_START = {"unitree_walk": (0.43, [0.0] * 12), "unitree_stand": (0.096, [0.05, 1.3, -2.69653] * 2 + [0.1, 1.3, -2.69653] * 2)}


def slow_a1_reward(name, model, qpos, qvel, q):
    """The published formulas from qpos, qvel and the targets q alone; velocities by finite differences of the pose."""

    def pose(t):
        data = mujoco.MjData(model)
        data.qpos[:] = qpos
        mujoco.mj_integratePos(model, data.qpos, qvel.copy(), t)
        mujoco.mj_kinematics(model, data)
        com = sum(model.body_mass[b] * data.xipos[b] for b in range(1, model.nbody)) / sum(model.body_mass[1:])
        w, x, y, z = data.qpos[3:7] / np.linalg.norm(data.qpos[3:7])
        r = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
             [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]  # fmt: skip
        return com, np.array(r)

    eps = 1e-6
    (com0, r0), (com1, r1), (_, r) = pose(-eps), pose(eps), pose(0)
    v, spin = (com1 - com0) / (2 * eps), (r1 - r0) / (2 * eps) @ r.T  # skew-symmetric matrix of the world's angular velocity
    e_x, e_z, h = r[:, 0], r[:, 2], qpos[2]
    s = 1.0 if h >= 0.36 else 0.1 ** (((0.36 - h) / 0.18) ** 2)  # a Gaussian that is 0.1 at the margin
    p_z, p_x = sum((e_z - [0, 0, 1]) ** 2), sum((e_x - [1, 0, 0]) ** 2)
    if name == "unitree_stand":
        a = [2 * (q[i] - low) / (high - low) - 1 for i, (low, high) in enumerate(A1_RANGES[name] * 4)]
        return (2 * s + e_z[2]) / 3 - 0.08 * sum(x * x for x in a) / 12 - 0.1 * p_z - 0.05 * p_x
    w = (3 * s + e_z[2] + e_x[0]) / 5 - 0.05 * sum((q - A1_Q0) ** 2) / 12 - 0.05 * v[2] ** 2
    w -= 0.005 * (spin[2, 1] ** 2 + spin[0, 2] ** 2) + 0.1 * p_z + 0.05 * p_x
    m = max(0.0, 1 - 0.9 * max(0.0, 1 - v[0]))  # dm_control's linear tolerance is 0.1 at its margin
    m = m if 0.9 * (1 - v[0]) < 1 else 0.0
    return (w + m + w * m) / 3


@pytest.mark.parametrize("name", list(A1_START))
def test_a1_rewards_start_and_actions(make, name):
    env, rng, seen = make(name), np.random.default_rng(0), []
    task, model, data = env.task, env.task.model, env.task.data
    for i in range(40):
        phase1.place(env.unwrapped, "spread" if i % 2 else "good", rng)
        for _ in range(rng.integers(1, 4)):
            reward, terminated, _ = task.step(rng.uniform(-1, 1, 12))
        seen.append(reward)
        assert not terminated and reward == pytest.approx(slow_a1_reward(name, model, data.qpos, data.qvel, data.ctrl), abs=5e-6)
    assert np.ptp(seen) > 0.5
    height, joints = A1_START[name]
    task.reset(rng)
    assert data.time == 0 and np.array_equal(data.qpos[:3], (0, 0, height)) and np.array_equal(data.qpos[7:], joints)
    assert [model.actuator(i).name for i in (0, 3, 6, 9)] == ["FR_hip", "FL_hip", "RR_hip", "RL_hip"]
    for action, bound in ((-1, 0), (1, 1)):
        task.step(np.full(12, action))
        np.testing.assert_allclose(data.ctrl, [span[bound] for span in A1_RANGES[name]] * 4)
    assert data.time == pytest.approx(0.02)  # two control steps
    assert env.unwrapped.episode_steps == 500 and envs.task_row(name).repeat == 2


@pytest.mark.parametrize(
    ("name", "camera", "fovy", "position"),
    [
        ("hammer", "vil_camera", 45, (0, 0, 1.1)), ("door", "vil_camera", 45, (0, 0, 1.5)), ("pen", "vil_camera", 45, (0, -0.8, 0.8)),
        ("unitree_walk", "mounted", 45, (0.7, 0, 0.5)), ("unitree_stand", "mounted", 45, (0.7, 0, 0.5)),
    ],
)  # fmt: skip
def test_the_benchmarks_cameras(make, name, camera, fovy, position):
    """Where they stand and look: Adroit's down, turned by half, or at 45 degrees; the A1's from before its head, back and down."""
    env, rotation = make(name), np.empty(9)
    placed = env.model.cam(camera)
    assert envs.task_row(name).camera == camera and placed.fovy[0] == fovy and tuple(placed.pos) == position
    assert (env.model.vis.quality.shadowsize, env.model.vis.quality.offsamples) == (2048, 4)  # the suite's
    mujoco.mju_quat2Mat(rotation, placed.quat)
    ahead = -rotation.reshape(3, 3)[:, 2]
    tilted = {"pen": (0, np.sqrt(0.5), -np.sqrt(0.5))} | dict.fromkeys(("unitree_walk", "unitree_stand"), (-np.sin(0.83), 0, -np.cos(0.83)))
    np.testing.assert_allclose(ahead, tilted.get(name, (0, 0, -1)), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- states to train masks on
@pytest.mark.parametrize("name", list(envs.TASKS))
def test_states_masks_and_vocabulary(make, name):
    """Spread and good states come from the generator alone; every row's default prompt and every phrase that it knows shows something."""
    env, row = make(name), envs.task_row(name)
    env.reset()
    assert env.task.model.vis.quality.offsamples == 4  # of a pixel's colour, as of its mask
    unseen = set(row.vocabulary)
    for kind in ("spread", "good"):
        states = []
        for seed in (5, 6, 5):
            phase1.place(env.unwrapped, kind, np.random.default_rng(seed))
            states.append(np.concatenate([x.ravel() for x in env.get_state()]))
            assert np.isfinite(env.task.data.qpos).all()
            mask = env.segment(row.prompt)
            assert mask.shape == (84, 84) and mask.dtype == bool and 5 < mask.sum() < 84 * 84
            unseen -= {phrase for phrase in unseen if env.segment(phrase).any()}
        assert np.array_equal(states[0], states[2]) and not np.array_equal(states[0], states[1])
    assert not unseen


def test_good_states_are_good(make):
    rng, caught = np.random.default_rng(0), []
    walker, pole, cup = (make(name) for name in ("walker_walk", "cartpole_swingup", "ball_in_cup_catch"))
    for _ in range(10):
        for env in (walker, pole, cup):
            phase1.place(env.unwrapped, "good", rng)
        assert walker.physics.torso_upright() > 0.9 and pole.physics.pole_angle_cosine().min() > 0.9
        for _ in range(20):  # the ball may still have to fall to the bottom of the cup
            cup.task.step(cup.task.hold())
        caught.append(cup.physics.in_target())
    assert np.mean(caught) >= 0.9
    tilts = []
    for _ in range(20):
        phase1.place(walker.unwrapped, "spread", rng)
        tilts.append(walker.physics.torso_upright())
        assert walker.physics.data.ncon == 0 or walker.physics.data.contact.dist.min() > -0.1  # above the ground, not in it
    assert min(tilts) < -0.5 and max(tilts) > 0.5


@pytest.mark.parametrize("name", ["walker_walk", "cheetah_run"])
def test_robots_stand_on_the_ground_or_a_little_above(make, name):
    """Their capsules' lowest points: good, at most a few centimetres above it; spread, 0.1 m on the average."""
    env = make(name)
    env.reset()
    model, data = env.task.model, env.task.data
    robot = np.flatnonzero(model.geom_bodyid > 0)
    assert (model.geom_type[robot] == envs.mujoco.mjtGeom.mjGEOM_CAPSULE).all()
    height = {"good": [], "spread": []}
    for kind, heights in height.items():
        for seed in range(60):
            phase1.place(env.unwrapped, kind, np.random.default_rng(seed))
            ends = np.abs(data.geom_xmat[robot, 8]) * model.geom_size[robot, 1]
            heights.append((data.geom_xpos[robot, 2] - ends - model.geom_size[robot, 0]).min())
    assert min(height["good"] + height["spread"]) > -1e-6
    assert max(height["good"]) < 0.08 and 0.06 < np.mean(height["spread"]) - np.mean(height["good"]) < 0.15


@pytest.mark.parametrize("name", ["pen", "door", "hammer", "relocate"])
def test_adroits_states(make, name):
    """Spread: nothing is deep in anything, and the motors leave the joints where they are. Good: the hand closed, its object in it, and the goal
    nearer than in spread states."""
    env = make(name)
    env.reset()
    model, data, away = env.task.model, env.task.data, {}
    driven = model.actuator_biasprm[:, 1] < 0
    flexed = [j for j in range(model.njnt) if model.joint(j).name[:2] in ("FF", "MF", "RF", "LF") and model.jnt_range[j, 0] == 0]
    for kind in ("spread", "good"):
        away[kind] = []
        for seed in range(6):
            phase1.place(env.unwrapped, kind, np.random.default_rng(seed))
            here, there = (data.site(site).xpos for site in phase1.GOALS[name])
            away[kind].append(np.linalg.norm(here - there))
            if kind == "spread":
                assert data.contact.dist.min(initial=0) > -0.005 and np.abs(data.actuator_force[driven]).max() < 1e-3 and driven.any()
                continue
            assert np.mean(data.qpos[flexed] / model.jnt_range[flexed, 1]) > 0.4
            if name != "door":  # its palm faces -y, and its fingers point along z
                held = data.body("palm").xmat.reshape(3, 3).T @ (data.body("Object").xpos - data.body("palm").xpos)
                assert np.linalg.norm(held - (0.007, -0.038 if name == "hammer" else -0.05, 0.075)) < 0.02
    assert np.mean(away["good"]) < 0.6 * np.mean(away["spread"]) or name == "pen"  # whose goal is a direction


@pytest.mark.parametrize("name", ["walker_walk", "door", "pen", "reacher_easy", "finger_turn_hard", "swimmer_swimmer6"])
def test_get_state_and_show(make, name):
    """A state carries what episodes change in the model, too: where the door's frame, the targets and their light stand."""
    source, copy, prompt = make(name, seed=1), make(name, seed=2), envs.task_row(name).prompt
    before = source.reset()[0], copy.reset()[0]
    source.step(source.action_space.sample())
    state = source.get_state()
    assert not np.array_equal(before[0]["pixels"], before[1]["pixels"])
    frame, mask = source.render(), source.segment(prompt)
    assert np.array_equal(copy.show(state, 0), frame) and np.array_equal(copy.segment(prompt), mask)


def test_procedural_is_keyed_as_video_hard(make):
    env = make("walker_walk", "procedural")
    assert not any(env.model.tex(name).data.any() for name in ("skybox", "grid")) and not np.array(env.model.vis.rgba.haze)[:3].any()


def test_a_task_without_a_row_names_its_target_if_it_has_one(make):
    for name, prompt in (("reacher_easy", "the robot and the target"), ("hopper_hop", "the robot")):
        env = make(name)
        env.reset()
        assert env.row.prompt == prompt and 50 < env.segment(prompt).sum() < 3000


def test_words_that_name_nothing(make):
    """A slip in a vocabulary is no phrase that shows nothing."""
    env = make("cartpole_swingup")
    env.reset()
    env.vocabulary = env.vocabulary | {"pole": "poel_*"}
    with pytest.raises(envs.UserError, match=r"'pole' is in cartpole_swingup's vocabulary, but its model has no 'poel_\*' to be seen"):
        env.segment("the cart and the pole")


def test_a_row_keeps_its_prompt(monkeypatch):
    monkeypatch.setitem(envs.TASKS, "hopper_hop", envs.Task("suite", 4, 250, 0, "the torso and the foot"))
    assert envs.make_env("hopper_hop").row.prompt == "the torso and the foot"


def test_what_an_error_says_is_one_line():
    assert envs.brief(ValueError("one\n\ttwo")) == "ValueError: one two"
    assert envs.brief(OSError("x" * 400)) == "OSError: " + "x" * 291


def test_motors_have_ranges(monkeypatch):
    monkeypatch.setitem(envs.SUITE, "lqr_lqr_2_1", ("lqr", "lqr_2_1"))
    with pytest.raises(envs.UserError, match="lqr_lqr_2_1: a motor without a ctrlrange"):
        envs.make_env("lqr_lqr_2_1")


def test_front_legs_are_in_front(make):
    env = make("unitree_walk")
    for phrase, letter in (("front legs", "F"), ("rear legs", "R")):
        geoms = env._lookup(phrase)[int(mujoco.mjtObj.mjOBJ_GEOM)]
        assert {env.model.body(env.model.geom_bodyid[g]).name[0] for g in geoms} == {letter}


def test_the_a1s_scene_is_the_published_one(make):
    m = make("unitree_walk").model
    assert (m.stat.extent, m.opt.timestep, m.vis.quality.shadowsize) == (0.8, 0.002, 2048)
    head, ground, light = m.vis.headlight, m.mat("ground"), m.nlight - 1
    lights = (head.ambient, 0.4), (head.diffuse, 0.8), (head.specular, 0.1), (m.light_diffuse[light], 0.7), (m.light_specular[light], 0.03)
    for got, wanted in lights:
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert m.nlight == 2 and m.light_pos[light].tolist() == [-1, -1, 4]
    np.testing.assert_allclose(m.light_dir[light], np.array([1, 1, -4]) / 18**0.5, atol=1e-6)
    assert ground.texrepeat.tolist() == [5, 5] and ground.texuniform[0] == 1 and ground.reflectance[0] == pytest.approx(0.2)
    np.testing.assert_allclose(m.mat("carbonfibre").rgba, (0.25, 0.25, 0.25, 1), atol=1e-6)
    np.testing.assert_allclose(m.mat("dark").rgba, (0.2, 0.2, 0.2, 1), atol=1e-6)


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_the_end_of_one_environment_leaves_another_alone(how):
    """MuJoCo's renderer would free its buffers in the other's OpenGL context, whose frames were nearly black from then on."""
    other, env = envs.make_env("ball_in_cup_catch"), envs.make_env("cartpole_swingup")
    other.reset()
    env.reset()
    frame, mask = env.render(), env.segment("the cart")
    if how == "closed":
        other.close()
    del other
    gc.collect()
    assert np.array_equal(env.render(), frame) and np.array_equal(env.segment("the cart"), mask) and mask.any()
    env.close()


# -------------------------------------------------------------------------------------------------------------- masks and prompts
def test_segment_is_the_simulators(make):
    """Against a renderer and a look-up of our own, at the four points of a pixel that a picture is drawn from."""
    env = make("walker_walk")
    env.reset()
    phase1.place(env.unwrapped, "good", np.random.default_rng(0))
    model, data = env.physics.model.ptr, env.physics.data.ptr
    frame = env.render()
    model.vis.global_.offwidth = model.vis.global_.offheight = 336
    with mujoco.Renderer(model, 336, 336) as renderer:
        renderer.enable_segmentation_rendering()
        renderer.update_scene(data, 0)
        ids = renderer.render()[..., 0]
    legs, torso = np.zeros((2, 84, 84), bool)
    for y, x in np.ndindex(84, 84):
        for down, right in ((0, 2), (1, 0), (2, 3), (3, 1)):
            if (g := ids[4 * y + down, 4 * x + right]) >= 0:
                name = model.body(model.geom_bodyid[g]).name
                legs[y, x] |= name.endswith(("thigh", "leg", "foot"))
                torso[y, x] |= name == "torso"
    assert torso.sum() > 50 and legs.sum() > 50
    assert np.array_equal(env.segment("the torso"), torso) and np.array_equal(env.segment("legs"), legs)
    assert np.array_equal(env.segment("The legs, and a torso."), legs | torso) and np.array_equal(env.segment("the walker"), legs | torso)
    assert np.array_equal(env.render(), frame)  # a mask leaves the picture alone


@pytest.mark.parametrize(("name", "most"), [("walker_walk", 0.015), ("cheetah_run", 0.03), ("unitree_walk", 0.002)])
def test_a_mask_has_every_pixel_that_shows_a_part(make, name, most):
    """What a keyed frame, black but for the robot, loses without it. The points upside down are wrong in 0.021, 0.042 and 0.005 of its pixels."""
    env, wrong, shown = make(name, "procedural"), 0, 0
    env.model.mat_reflectance[:] = 0  # the floor is a mirror
    env.reset()
    nothing = mujoco.MjvOption()
    nothing.geomgroup[:] = [0, name == "unitree_walk", 0, 0, 0, 0]  # the A1's floor stays
    with mujoco.Renderer(env.model, 84, 84) as renderer:
        for seed in range(10):
            phase1.place(env.unwrapped, "good", np.random.default_rng(seed))
            frame, mask = env._render(), env.segment(env.row.prompt)
            for _ in range(2):
                renderer.update_scene(env.data, env.row.camera, nothing)
            changed = (frame != renderer.render()).any(2)
            wrong, shown = wrong + (mask ^ changed).sum(), shown + changed.sum()
    assert shown > 3000 and wrong < most * shown


def test_the_a1_on_its_back_is_seen_through_the_floor(make):
    """Its camera is below, where the floor is drawn as glass; masks look through it as well."""
    env, seen = make("unitree_walk"), 0
    env.reset()
    for seed in range(13):
        phase1.place(env.unwrapped, "spread", np.random.default_rng(seed))
        if env.data.cam_xpos[env.model.camera("mounted").id][2] < 0:
            seen += 1
            assert env.segment("the robot").sum() > 500 and not env.segment("the ground").any()
    assert seen > 1


def test_the_cups_string_is_a_tendon(make):
    env = make("cup_catch")
    env.reset()
    string, rest = env.segment("the string"), env.segment("cup and ball")
    assert string.sum() > 3 and (string & rest).sum() < 4  # some pixels show a part of both
    assert np.array_equal(env.segment(envs.task_row("cup_catch").prompt), string | rest)


def test_a_suite_task_without_a_row(make):
    env = make("reacher_easy")
    env.reset()
    assert env.repeat == 4 and env.episode_steps == 250
    assert (env.segment("the arm and the hand") <= env.segment("the robot")).all() and env.segment("the hand").any()
    assert env.segment(envs.task_row("reacher_easy").prompt).sum() == env.segment("the robot").sum() + env.segment("the target").sum()


@pytest.mark.parametrize("name", ["reacher_easy", "finger_turn_easy"])  # a geom of the world, a site of the world
def test_a_suite_tasks_goal_is_in_its_default_mask(make, name):
    """Where the target is drawn, seen by moving it away, the agent sees."""
    env = make(name)
    env.reset()
    before, mask = env.render().astype(int), env.segment(env.row.prompt)
    places = (env.model.geom("target") if name == "reacher_easy" else env.model.site("target")).pos
    places[:] = (0, 0, -5)
    mujoco.mj_forward(env.model, env.data)
    changed = np.abs(env.render() - before).max(2) > 60
    assert changed.sum() > 50
    assert (changed & mask).sum() > 0.9 * changed.sum()


def test_a_skin_is_its_bones(make):
    """The dog's geoms are hidden; what one sees is a skin."""
    env = make("dog_walk")
    env.reset()
    frame, without = env.render().astype(int), mujoco.MjvOption()
    without.flags[mujoco.mjtVisFlag.mjVIS_SKIN] = 0
    with mujoco.Renderer(env.model, 84, 84) as renderer:
        renderer.update_scene(env.data, env.row.camera, without)
        changed = (frame - renderer.render()).any(2)
    mask = env.segment("the robot")
    assert mask.sum() > 300 and (changed & mask).sum() > 0.95 * mask.sum()


@pytest.mark.parametrize(
    "prompt, phrases",
    [
        ("the hand, the hammer and the nail", ["hand", "hammer", "nail"]),
        ("The Hand, a hammer, and an  Anchor.", ["hand", "hammer", "anchor"]),
        ("front legs", ["front legs"]),
        ("sand and thermos", ["sand", "thermos"]),  # neither "and" nor "the" inside a word
    ],
)
def test_prompt_grammar(prompt, phrases):
    assert envs.parse_prompt(prompt) == phrases


@pytest.mark.parametrize("prompt", ["", "  ", "the and a, an.", ","])
def test_an_empty_prompt(prompt):
    with pytest.raises(envs.UserError, match="--prompt"):
        envs.parse_prompt(prompt)


def test_an_unknown_phrase_lists_what_can_be_named(make):
    env = make("hammer")
    env.reset()
    with pytest.raises(envs.UserError) as error:
        env.segment("the hand and the sausage")
    message = str(error.value)
    assert "'sausage'" in message and "\n" not in message and all(phrase in message for phrase in envs.task_row("hammer").vocabulary)


def test_mask_iou_against_loops():
    rng = np.random.default_rng(0)
    pred, true = rng.random((2, 6, 9, 11)) < np.array([0.05, 0.1, 0.3, 0.3, 0.5, 0.9])[:, None, None]
    pred[0], true[0], pred[1], true[2] = False, False, False, False  # an empty pair, and two that are empty on one side
    for tolerance in (0, 1, 2):
        for n, iou in enumerate(envs.mask_iou(pred, true, tolerance)):

            def near(mask, y, x, r=tolerance):
                return any(mask[j, i] for j in range(max(0, y - r), min(9, y + r + 1)) for i in range(max(0, x - r), min(11, x + r + 1)))

            shared = union = 0
            for y in range(9):
                for x in range(11):
                    p, t = pred[n, y, x], true[n, y, x]
                    union += p or t
                    shared += bool((p and near(true[n], y, x)) or (t and near(pred[n], y, x)))
            assert iou == pytest.approx(shared / union if union else 1.0)
    assert envs.mask_iou(pred, true).shape == (6,) and envs.mask_iou(pred, true)[0] == 1 and envs.mask_iou(pred, true)[1] == 0


# ------------------------------------------------------------------------------------------------------- errors and the command line
@pytest.mark.parametrize(
    "name, near", [("hammr", "hammer"), ("walker_wlak", "walker_walk"), ("cup_cach", "cup_catch"), ("reacher_esay", "reacher_easy")]
)
def test_unknown_task_names_near_matches(name, near):
    with pytest.raises(envs.UserError) as error:
        envs.make_env(name)
    assert near in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert envs.resolve_env_id("cup_catch") == "ball_in_cup_catch" and envs.task_row("cup_catch") == envs.TASKS["ball_in_cup_catch"]


def test_unknown_setting():
    with pytest.raises(envs.UserError, match=r"video_medium.*train, color_easy, color_hard, video_easy, video_hard, procedural"):
        envs.make_env("walker_walk", "video_medium")


@pytest.mark.parametrize("how", ["empty folder", "missing folder", "no network", "broken XML", "another XML", "no mesh"])
def test_no_a1(monkeypatch, tmp_path, request, how):
    real = request.getfixturevalue("menagerie") if how.endswith(("XML", "mesh")) else None
    monkeypatch.delenv("MENAGERIE_ROOT", raising=False)
    if how == "no network":  # nobody listens there
        monkeypatch.setenv("MENAGERIE_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("MENAGERIE_BASE_URL", "http://127.0.0.1:9")
    else:
        (tmp_path / "empty folder").mkdir()
        if real:
            robot = shutil.copytree(Path(real) / "unitree_a1", tmp_path / how / "unitree_a1")
            if how == "no mesh":
                (robot / "assets/calf.obj").unlink()
            else:
                (robot / "a1.xml").write_text("<mujoco><worldbody>" if how == "broken XML" else "<svg><g/></svg>")
        monkeypatch.setenv("MENAGERIE_ROOT", str(tmp_path / how))
    with pytest.raises(envs.UserError, match="MENAGERIE_ROOT") as error:
        envs.make_env("unitree_walk")
    assert "\n" not in str(error.value) and ("no network" in str(error.value)) == (how == "no network")


def test_online_is_whoever_gets_an_answer():
    """If only that there is no such page."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # which knows no HEAD
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file"
        assert envs.online(url)
    assert not envs.online(url)


def run(*args, **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "envs.py"), *args], capture_output=True, text=True, timeout=300, **kwargs)


def test_command_line_names_the_packages_that_gl_needs():
    result = run(env=os.environ | {"MUJOCO_GL": "nonsense"})
    assert result.returncode == 1 and "libegl1" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_the_tasks_are_listed(capsys):
    envs.main(envs.Args())
    out = capsys.readouterr().out
    for name, row in envs.TASKS.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert row.loader in line and row.prompt in line and f" {row.repeat} " in line and f" {row.steps} " in line
    assert "reacher_easy" in out


def test_command_line_draws_a_sheet(tmp_path, monkeypatch):
    monkeypatch.delenv("TALAS_DISTRACTORS", raising=False)
    result = run("--env", "cheetah_run", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")  # nothing from EGL at the interpreter's exit, nor from MuJoCo, which deprecates this model
    sheets = list(tmp_path.glob("*.png"))
    assert len(sheets) == 1 and sheets[0].name == "cheetah_run.png"
    sheet = cv2.imread(str(sheets[0]))
    assert sheet.std() > 20 and sheet.shape == (2 * 252, 6 * 252, 3)  # without media: a row for train, one for procedural
    for setting in ("color_easy", "color_hard", "video_easy", "video_hard"):
        assert f"{setting}: " in result.stdout


def test_a_terrain_is_its_episodes():
    """quadruped_escape draws another in each; two environments do not take each other's, and the process ends without a word."""
    script = """
import numpy as np, envs
a, b = (envs.make_env("quadruped_escape", action_repeat=4) for _ in range(2))
first, other, again = (a.reset(options={"episode": i})[0]["pixels"] for i in (3, 0, 3))
b.reset(options={"episode": 0}), b.render()
assert np.array_equal(first, again) and not np.array_equal(first, other)
assert np.array_equal(a.reset(options={"episode": 3})[0]["pixels"], first)
assert np.array_equal(b.reset(options={"episode": 3})[0]["pixels"], first)
b.reset(options={"episode": 0})
assert np.array_equal(b.show(a.get_state(), 0), a.render())
for i in range(2):  # as Phase I visits states
    a.task.reset(np.random.default_rng(i))
    shown = a.render()
    a.close()
    assert np.array_equal(a.render(), shown)
a.close()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(envs.__file__).parent, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("Traceback"), done.stderr.count("EGL")) == (0, 0, 0), done.stderr
