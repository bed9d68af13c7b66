"""The benchmarks' arithmetic, against figures worked out by hand, and the tables of the committed CSVs."""

import contextlib
import csv
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import tyro

import envs
import talas_asymmetric_sac as rl
from benchmarks import curves, embeddings, equal, evaluate, figures, floors, masks, observability, speed, tables, train_all, visited

RESULTS = Path(__file__).parents[1] / "results"


def test_methods_have_the_names_of_their_flags():
    for name, flags in train_all.VARIANTS.items():
        args = tyro.cli(rl.Args, args=[*flags.split(), "--seed=7", "--encoder=small"])
        assert evaluate.method(args) == name
        assert name in tables.METHODS
    assert evaluate.method(rl.Args(critic_views="clean")) == "other"


def test_command_is_what_was_typed():
    typed = ["--env", "hammer", "--seed", "3", "--distractors", "my videos", "--eval-settings", "train", "procedural", "--no-overlap"]
    said = evaluate.command(tyro.cli(rl.Args, args=[*typed, "--resume", "auto"]))
    assert said == "python talas_asymmetric_sac.py --env hammer --seed 3 --distractors 'my videos' --eval-settings train procedural --no-overlap"
    assert tyro.cli(rl.Args, args=shlex.split(said)[2:]) == tyro.cli(rl.Args, args=typed)


def test_interval():
    """Of a thousand normal numbers: 1.96 standard errors on each side; of equal ones, none."""
    values = np.random.default_rng(1).normal(500, 50, 1000)
    low, high = evaluate.interval(values)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.3)
    assert high - low == pytest.approx(2 * 1.96 * 50 / np.sqrt(1000), rel=0.1)
    assert evaluate.interval(np.full(10, 7.0)) == (7, 7)


def test_rows_of_a_run_are_replaced(tmp_path):
    path = tmp_path / "table.csv"
    evaluate.replace_rows(path, "run", [{"run": "a", "value": "1"}, {"run": "a", "value": "2"}])
    evaluate.replace_rows(path, "run", [{"run": "b", "value": "3"}])
    evaluate.replace_rows(path, "run", [{"run": "a", "value": "4"}])
    assert [(row["run"], row["value"]) for row in tables.read(path)] == [("b", "3"), ("a", "4")]
    evaluate.replace_rows(path, "run", [{"run": "c", "value": "5", "new": "x"}])
    evaluate.replace_rows(path, "run", [{"run": "a", "value": "6"}])  # by code that does not know the column
    assert [tuple(row.values()) for row in tables.read(path)] == [("b", "3", ""), ("c", "5", "x"), ("a", "6", "")]
    before = path.read_text()
    with pytest.raises(ValueError):
        evaluate.replace_rows(path, "run", [{"run": "a", "value": "7"}, {"run": "a", "what": "8"}])
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_small_and_negative_returns():
    """Three digits, Adroit's success, and no share lost of what is no gain."""
    run = {"run": "a", "env": "pen", "method": "talas", "seed": "1", "commit": "abc1234", "agent_steps": "1000", "action_repeat": "2"}

    def cells(**returns: float) -> list[str]:
        episodes = [{"run": "a", "setting": s, "return": str(value), "success": "0.5"} for s, value in returns.items()]
        return [cell.strip() for cell in tables.ours([run], episodes, []).splitlines()[2].split("|")[6:12]]

    assert cells(train=0.4444, video_hard=0.3333) == [
        "0.444 (0.444 to 0.444; 1), success 50%",
        "",
        "",
        "0.333 (0.333 to 0.333; 1), success 50%",
        "25.0%",
        "",
    ]
    assert cells(train=-2, video_hard=-4)[4] == cells(train=0, video_hard=0)[4] == ""
    assert cells(train=812.4, video_hard=-2.38)[0::3] == ["812 (812 to 812; 1), success 50%", "-2.38 (-2.38 to -2.38; 1), success 50%"]


def test_tightness():
    """Two states 10 apart, each twice, 1 apart: within 1, between (10, 10, √101, √101)."""
    points = np.array([[[0.0, 0], [0, 1]], [[10, 0], [10, 1]]])
    assert embeddings.tightness(points) == pytest.approx(1 / np.mean([10, 10, np.sqrt(101), np.sqrt(101)]))
    assert embeddings.tightness(np.zeros((3, 4, 2)) + np.arange(3)[:, None, None]) == 0


def test_interquartile_mean():
    """Of three seeds on two tasks, the middle half: of 0, 100, ..., 500 the mean of 100 to 400. Two seeds are too few."""
    runs, episodes = [], []
    for i, (task, seed) in enumerate((task, seed) for task in ("walker_walk", "cheetah_run") for seed in "123"):
        about = {"env": task, "method": "talas", "segmenter": "sim", "seed": seed, "agent_steps": "1000", "action_repeat": "4"}
        runs.append({"run": f"{task}{seed}", **about})
        episodes += [{"run": f"{task}{seed}", "setting": "video_hard", "return": str(100 * i + j)} for j in (-1, 1)]
    aggregated = tables.aggregates(runs, episodes)
    assert "| TaLaS, overlay | sim | 1,000 | walker_walk 3, cheetah_run 3 | 250 |" in aggregated
    for run in runs[3:]:
        run["action_repeat"] = "8"  # a budget is one of agent steps: the benchmark's 500,000 are more frames on some tasks
    assert tables.aggregates(runs, episodes) == aggregated
    other = [run | {"run": f"{run['run']} ×2", "action_repeat": "2"} for run in runs[:2]]  # two seeds of another repeat are not more of the first
    assert tables.aggregates([*runs, *other], [*episodes, *(row | {"run": f"{row['run']} ×2", "return": "900"} for row in episodes)]) == aggregated
    lone = {"run": "finger", "env": "finger_spin", "method": "talas", "segmenter": "sim", "seed": "1", "agent_steps": "1000", "action_repeat": "4"}
    finger = {"run": "finger", "setting": "video_hard", "return": "900"}  # one seed of a third task is left out, and takes nothing else along
    assert tables.aggregates([*runs, lone], [*episodes, finger]) == aggregated
    # All 729 ways to redraw three seeds within each of two tasks, where the table draws 5,000 of them.
    draws = [list(itertools.product(means, repeat=3)) for means in ((0, 100, 200), (300, 400, 500))]
    every = sorted(np.mean(sorted((*a, *b))[1:5]) for a in draws[0] for b in draws[1])
    low, high = map(float, aggregated.splitlines()[-1].split("|")[-2].split(" to "))
    assert low == pytest.approx(np.quantile(every, 0.025), abs=13) and high == pytest.approx(np.quantile(every, 0.975), abs=13)
    assert "No aggregates" in tables.aggregates(runs[:5], episodes)
    again = [run | {"run": f"{run['run']} again", "seed": "1"} for run in runs]  # one seed under other names is one seed
    assert "No aggregates" in tables.aggregates(again, [row | {"run": f"{row['run']} again"} for row in episodes])


def test_what_the_page_says_when_it_is_counted():
    page = tables.read(RESULTS / "published_returns.csv")
    assert tables.firsts(page).startswith("5 of 12")
    dmc, unitree = tables.published(page, tables.DMC), tables.published(page, tables.UNITREE)
    assert dmc.splitlines()[-1].endswith("| 7.5% |")
    assert "715.8 / 662.0" in dmc
    assert "299.5 / 131.5" in unitree


def test_the_maskers_table():
    values = {("", "clean"): 0.9, ("mix", "clean"): 0.85, ("mix", "video_hard"): 0.81, ("overlay", "video_hard"): 0.31}
    about = {"seconds": "60", "commit": "abc1234"}
    rows = [
        {"env": "walker_walk", "augmentation": name, "figure": f"{kind}/{setting}", "value": str(values.get((name, setting), 0.5))} | about
        for name in ("", "mix", "overlay")
        for setting in tables.MASK_SETTINGS
        for kind in ("iou", "iou_1px")
    ]
    teacher, student, *_, compared = tables.maskers(rows).splitlines()[2:]
    assert compared == "| `walker_walk` | 0.500 / 0.500 / 0.500 / 0.310 | 0.850 / 0.500 / 0.500 / 0.810 |"  # overlay and mix; nobody has swap
    assert teacher == "| `walker_walk` | teacher | 0.900 (0.900) |" + " 0.500 (0.500) |" * 4 + "  | 60 | abc1234 |"
    assert student == "|  | student | 0.850 (0.850) |" + " 0.500 (0.500) |" * 3 + " 0.810 (0.810) | 0.900 | 60 | abc1234 |"
    brief = tables.maskers(rows, brief=True).splitlines()[2]
    assert brief == "| `walker_walk` | 0.900 (0.900) | 0.850 (0.850) |" + " 0.500 (0.500) |" * 3 + " 0.810 (0.810) |"
    without_media = tables.maskers([row for row in rows if "video" not in row["figure"]]).splitlines()[3]
    assert without_media == "|  | student | 0.850 (0.850) | 0.500 (0.500) | 0.500 (0.500) |  |  |  | 60 | abc1234 |"


def test_returns_without_learning(tmp_path):
    """A pole that nobody pushes hangs; twice the same random actions score the same; and the table, worked out by hand."""
    for name in ("floors.csv", "again.csv"):
        floors.main(floors.Args(envs=("cartpole_swingup", "finger_spin"), episodes=1, output=tmp_path / name))
    rows = tables.read(tmp_path / "floors.csv")
    assert rows == tables.read(tmp_path / "again.csv")
    assert [(row["env"], row["policy"], row["episode"]) for row in rows][1::2] == [(e, "random", "0") for e in ("cartpole_swingup", "finger_spin")]
    assert float(rows[0]["return"]) < 1 < float(rows[1]["return"]) and float(rows[2]["return"]) == 0
    with pytest.raises(envs.UserError, match="nothing to play"):
        floors.main(floors.Args(envs=("hammer",), episodes=0))
    rows = [{"env": "walker_walk", "policy": p, "return": value} for p, value in (("zeros", "1"), ("zeros", "3"), ("random", "-4"))]
    page = [{"task": "walker_walk", "setting": "video_easy", "method": m, "mean_return": value} for m, value in (("SAC", "9"), ("TaLaS", "20"))]
    page += [{"task": "walker_walk", "setting": "video_hard", "method": "TaLaS", "mean_return": "7.5"}]
    assert tables.floors(rows, page).splitlines()[2] == "| `walker_walk` | 2.0 ± 1.0 | -4.0 ± 0.0 | 9 / 7.5 | 20 / 7.5 |"
    committed = tables.read(RESULTS / "floors.csv")
    assert {(row["env"], row["policy"]) for row in committed} == set(itertools.product(envs.TASKS, floors.POLICIES)) and len(committed) == 240


def test_tables_and_figures_come_from_the_committed_files(tmp_path):
    """Nothing else is needed, and what is committed is what they make."""
    results = tmp_path / "results"
    results.mkdir()
    for path in RESULTS.glob("*.csv"):
        shutil.copy(path, results)
    committed = {}
    for name, count in (("README.md", 1), ("results/README.md", 2)):
        committed[name] = (RESULTS.parent / name).read_text()
        (tmp_path / name).write_text(re.sub("(from here -->).*?(<!-- to here)", r"\1\n\2", committed[name], flags=re.DOTALL))
        assert committed[name].count("from here -->") == count and "`walker_walk` | teacher" not in (tmp_path / name).read_text()
    tables.main(tables.Args(results=str(results)))
    assert {name: (tmp_path / name).read_text() for name in committed} == committed
    (results / "masks.csv").rename(tmp_path / "elsewhere.csv")  # what is not there is said, and takes no table along
    with pytest.raises(envs.UserError, match=r"results/masks\.csv: no such file"):
        tables.main(tables.Args(results=str(results)))
    with pytest.raises(envs.UserError, match=r"published_returns\.csv: no such file"):
        figures.main(figures.Args(results=str(tmp_path)))
    assert {name: (tmp_path / name).read_text() for name in committed} == committed
    figures.main(figures.Args(results=str(results)))
    drawn = {path.name for path in results.glob("*.png")}
    curves = {"ball_in_cup_catch.png", "cartpole.png", "cartpole_ablations.png", "cartpole_long.png", "cartpole_seed2.png", "hammer.png"}
    curves |= {"batches.png", "cartpole_medium.png", "hammer_reward.png", "observability.png", "positions.png"}
    curves |= {"encoders.png", "h100.png", "h100_five.png", "layer_norm.png", "one_masker.png", "states.png", "unitree_stand.png", "walker_stand.png"}
    assert drawn == curves | {"embeddings.png", "returns.png", "walker_encoders.png"}
    for name in drawn:
        old, new = (imageio.imread(folder / name).astype(float) for folder in (RESULTS, results))
        assert old.shape == new.shape and np.abs(old - new).mean() < 1, name  # a machine's fonts may differ a little


def test_evaluation_fills_the_tables(tmp_path):
    """Of a masked agent: a row for the run, one per episode, and the agent alone, in half precision, which does the same."""
    args = rl.Args(env="cartpole_swingup", action_repeat=50, hidden_dim=16, encoder="small", precision="fp32", seed=3, augmentation="mix")
    args = replace(args, distractors=os.environ.get("TALAS_DISTRACTORS", "/home/me"), overlay="/home/me/photographs")
    torch.manual_seed(1)
    about = {"prompt": "the pole", "segmenter": "masks"}
    rl.save_agent(tmp_path / "checkpoint.pt", rl.Agent(args, 9, 0, 1, rl.Masker(), None), 40, about)
    shutil.copy(tmp_path / "checkpoint.pt", tmp_path / "whole.pt")
    (tmp_path / "metrics.json").write_text('{"train/seconds": 12.5}')
    given = {"checkpoints": (str(tmp_path / "checkpoint.pt"),), "episodes": 2, "settings": ("train",), "commit": "abc1234"}
    evaluate.main(evaluate.Args(**given, output=str(tmp_path / "out"), export=str(tmp_path / "agents")))
    (run,) = tables.read(tmp_path / "out/runs.csv")
    expected = {"env": "cartpole_swingup", "method": "talas_mix", "seed": "3", "agent_steps": "40", "action_repeat": "50", "segmenter": "masks"}
    expected |= {"commit": "abc1234", "seconds": "12.5", "videos_skipped": "0"}
    assert {key: run[key] for key in expected} == expected
    rows = tables.read(tmp_path / "out/evaluations.csv")
    assert [(row["run"], row["setting"], row["episode"]) for row in rows] == [(run["run"], "train", "0"), (run["run"], "train", "1")]
    assert all(0 < float(row["iou_1px"]) < 1 for row in rows) and rows[0]["return"] != rows[1]["return"]
    rl.save_agent(tmp_path / "checkpoint.pt", rl.Agent(replace(args, gamma=0.9), 9, 0, 1, rl.Masker(), None), 40, about)
    with pytest.raises(envs.UserError, match="has a cartpole_swingup__talas__3__40 of other flags"):  # not put in the first one's place
        evaluate.main(evaluate.Args(**given, output=str(tmp_path / "out")))
    exported = tmp_path / "agents/cartpole_swingup__talas__3.pt"
    look = {"pixels": np.random.default_rng(0).integers(0, 256, (8, 9, 84, 84), np.uint8), "proprio": np.zeros((8, 0), np.float32)}
    whole, half = (rl.load_agent(path)[0] for path in (tmp_path / "whole.pt", exported))  # on one look: over an episode, half bits add up
    actions = [agent.policy(*rl.observe(partial(rl.mask_stack, agent.masker), look, torch.device("cpu")), mean=True) for agent in (whole, half)]
    assert torch.allclose(actions[1], actions[0], atol=0.01) and np.ptp(actions[0]) > 0.02
    published = envs.load_tensors(exported)["args"]
    assert (published["distractors"], published["overlay"]) == (None, None)  # where things lie on this machine
    assert exported.stat().st_size < 0.6 * (tmp_path / "whole.pt").stat().st_size


def test_committed_agents_can_be_played():
    """README's third line: what lies in results/agents has the format of today's code."""
    paths = list((RESULTS / "agents").glob("*.pt"))
    assert paths
    for path in paths:
        agent, checkpoint = rl.load_agent(path)
        assert path.name.startswith(checkpoint["args"].env) and agent.masker is not None
        assert path.name in (RESULTS.parent / "README.md").read_text()


def test_an_agent_of_other_networks_is_named_by_what_does_not_fit(tmp_path):
    content = envs.load_tensors(next((RESULTS / "agents").glob("cartpole*.pt")))
    renamed = {key.replace("masker.stem", "masker.conv0"): value for key, value in content["weights"].items()}
    fewer = {key: value for key, value in content["weights"].items() if key != "actor.trunk.0.weight"}
    envs.save_tensors(tmp_path / "less.pt", content | {"weights": fewer})
    with pytest.raises(envs.UserError, match=r"less\.pt: not a checkpoint .*weights of other networks, actor\.trunk\.0\.weight\)"):
        rl.load_agent(tmp_path / "less.pt")
    envs.save_tensors(tmp_path / "fork.pt", content | {"weights": renamed})
    with pytest.raises(
        envs.UserError, match=r"fork\.pt: not a checkpoint of this script \(ValueError: weights of other networks, masker\.conv0\.weight\)"
    ):
        rl.load_agent(tmp_path / "fork.pt")


@pytest.fixture
def hurried(tmp_path) -> Path:
    """The committed agent, in a hurry: twenty steps an episode."""
    content = envs.load_tensors(next((RESULTS / "agents").glob("cartpole*.pt")))
    envs.save_tensors(tmp_path / "hurried.pt", content | {"args": content["args"] | {"action_repeat": 50, "precision": "fp32"}})
    return tmp_path / "hurried.pt"


def test_with_the_simulators_masks(tmp_path, hurried, monkeypatch):
    given, policy = [], rl.Agent.policy

    def act(self, pixels, mask, proprio, mean):
        given.append(mask)
        return policy(self, pixels, mask, proprio, mean)

    monkeypatch.setattr(rl.Agent, "policy", act)
    output = str(tmp_path / "visited")
    visited.main(visited.Args(str(hurried), settings=("train",), drawn=("procedural",), episodes=2, output=output))
    rows = tables.read(Path(f"{output}.csv"))
    played = [("train", masks, episode) for masks in ("student", "simulator") for episode in "01"]
    assert [(row["setting"], row["masks"], row["episode"]) for row in rows] == played
    soft, true = given[0], given[40:60]  # the first episode by the student's masks, and by the simulator's
    assert len(given) == 100 and len(soft.unique()) > 2 and all(mask.unique().tolist() == [0, 255] for mask in true)
    assert all(torch.equal(after[:, :-1], before[:, 1:]) for before, after in itertools.pairwise(true))
    env = envs.make_env("cartpole_swingup", seed=rl.Args().seed + 10_000, action_repeat=50)
    env.reset(options={"episode": 0})
    assert np.array_equal(true[0][0], np.stack([env.segment("the cart and the pole")] * 3) * 255)
    env.close()
    given.clear()
    monkeypatch.setattr(rl, "make_env_once", envs.make_env)
    run = rl.load_agent(hurried)[1]["args"]
    for row in rows[:2]:  # the student's are those of an evaluation
        assert float(row["return"]) == pytest.approx(rl.play(hurried, run, ("train", int(row["episode"])))[0], abs=0.01)
    assert imageio.imread(f"{output}.png").shape == (3 * 168, 10 * 168, 3)


def test_moments_of_an_episode(hurried, monkeypatch):
    """Evenly spread, three consecutive states each, and shown again as they were."""
    agent, checkpoint = rl.load_agent(hurried)
    seen, policy = [], rl.Agent.policy
    monkeypatch.setattr(rl.Agent, "policy", lambda self, pixels, *rest, mean: seen.append(pixels[0].numpy()) or policy(self, pixels, *rest, mean))
    moments = embeddings.visit(agent, checkpoint["args"], 4)
    assert [len(moment) for moment in moments] == [3] * 4
    env = envs.make_env("cartpole_swingup", seed=1, action_repeat=50)
    env.reset()
    for moment, step in zip(moments[:3], (2, 8, 14), strict=True):  # of 21 observations; nobody acts on the last
        frames = [env.show(state, t) for t, state in enumerate(moment)]
        assert np.array_equal(np.concatenate(frames, 2).transpose(2, 0, 1), seen[step])
    env.close()


def test_embeddings_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(envs.UserError, match="pip install scikit-learn"):
        embeddings.main(embeddings.Args((), ()))


def test_curves(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/returns.csv").write_text("step,return\n" + "".join(f"{10 * i},{i}\n" for i in range(1, 9)))
    (tmp_path / "run/evaluations.csv").write_text("step,figure,value\n40,eval/train/return_mean,3.5\n80,eval/train/return_mean,7.5\n")
    curves.main(curves.Args(runs=(str(tmp_path / "run"),), labels=("ours",), output=str(tmp_path / "curve")))
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert [row["value"] for row in rows if row["figure"] == "train_return"] == [str(i) for i in range(1, 9)]
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_links_lead_somewhere():
    """Those of the two READMEs to files and headings; GitHub names a heading by its words, in lower case, with dashes between them."""
    root, broken = RESULTS.parent, []
    text = {path: path.read_text() for path in (root / "README.md", RESULTS / "README.md")}
    headings = {path: [re.sub(r"\]\(.*?\)", "", line) for line in own.splitlines() if line.startswith("#")] for path, own in text.items()}
    anchors = {path: {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in lines} for path, lines in headings.items()}
    for path, own in text.items():
        links = [link for link in re.findall(r"\]\((.*?)\)", own) if not link.startswith("http")]
        assert len(links) > 10
        for link in links:
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            broken += [] if target.exists() and (not anchor or anchor in anchors[target]) else [link]
    assert not broken


def test_curves_of_a_run_that_has_hardly_begun(tmp_path):
    """No training episode is over yet, or fewer than are averaged over; a folder that is none is a line, and costs no table that is there."""
    for episodes in (0, 3):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/returns.csv").write_text("step,return\n" + "".join(f"{10 * i},{i}\n" for i in range(episodes)))
        (tmp_path / "run/evaluations.csv").write_text("step,figure,value\n40,eval/train/return_mean,3.5\n")
        curves.main(curves.Args(runs=(str(tmp_path / "run"),), labels=("ours",), output=str(tmp_path / "curve")))
    before = (tmp_path / "curve.csv").read_text()
    mistakes = [(("run", "nowhere"), ("a", "b"), "nowhere/returns.csv: no such file"), (("run",), ("a", "b"), "give one for each")]
    for runs, labels, said in (*mistakes, (("run", "run"), ("a", "a"), "a name of its own")):
        with pytest.raises(SystemExit, match=said):
            curves.main(curves.Args(runs=tuple(str(tmp_path / run) for run in runs), labels=labels, output=str(tmp_path / "curve")))
    assert (tmp_path / "curve.csv").read_text() == before


def test_maskers_figures_are_of_the_run_that_made_them(tmp_path, monkeypatch):
    """A later run of the phase that was told to write elsewhere is not taken for it, nor one of elsewhere for one that was told nothing."""
    monkeypatch.chdir(tmp_path)
    for i, (name, maskers) in enumerate((("phase2__1", None), ("mine__2", "runs/maskers/walker_walk"), ("phase2__3", "elsewhere"))):
        run = Path(f"runs/walker_walk__{name}")
        run.mkdir(parents=True)
        (run / "args.json").write_text(json.dumps({"maskers": maskers, "steps": i}))
        (run / "metrics.json").write_text("{}")
        os.utime(run / "metrics.json", (i, i))
    assert masks.newest_run("walker_walk", "phase2", Path("runs/maskers/walker_walk"))[0]["steps"] == 1
    assert masks.newest_run("walker_walk", "phase2", Path("elsewhere"))[0]["steps"] == 2
    with pytest.raises(envs.UserError, match="wrote runs/maskers_swap/walker_walk"):
        masks.newest_run("walker_walk", "phase2", Path("runs/maskers_swap/walker_walk"))
    with pytest.raises(envs.UserError, match="no run of walker_walk's phase1"):
        masks.newest_run("walker_walk", "phase1", Path("runs/maskers/walker_walk"))
    with pytest.raises(envs.UserError, match=r"student.pt: not there"):
        masks.main(masks.Args(envs=("walker_walk",)))


def test_equal_tells_rounding_from_sameness(capsys):
    """The same again differs nowhere; weights a little off make a difference, and a small one."""
    equal.main(equal.Args(precision="fp32", batch_size=4, updates=7, compile=False, device="cpu"))
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"e[+-]\d\d", line)]
    apart = {line[:24].strip() + line[24:32].strip(): [float(value) for value in line[32:].split()] for line in lines}
    assert list(apart) == ["again1", "again6", "again7", *(f"weights {off} off{n}" for off in ("1e-07", "1e-05") for n in (1, 6, 7))]
    assert not any(value for key, values in apart.items() if key.startswith("again") for value in values)
    for off in ("1e-07", "1e-05"):
        first, last = (max(apart[f"weights {off} off{n}"]) for n in (1, 7))
        assert float(off) / 100 < first < 1e-2 and first <= last < 0.5  # by how much it grows is chance


def test_a_policy_whose_noise_stands_still_is_found(monkeypatch):
    monkeypatch.setattr(rl, "faster", lambda agent, masker, *_: (partial(rl.mask_stack, masker), partial(agent.policy, mean=True), agent.update))
    with pytest.raises(envs.UserError, match="same noise"):
        equal.main(equal.Args(batch_size=4, updates=1, compile=False, device="cpu"))


def test_a_task_is_learned_from_its_state(monkeypatch, tmp_path):
    """Three whole episodes, and an update for every fifty of the steps that are not random; of cartpole alone it is known what a picture hides."""
    monkeypatch.setattr(rl, "Encoder", rl.Encoder)  # which learn replaces
    updates, update = [], rl.Agent.update
    monkeypatch.setattr(rl.Agent, "update", lambda agent, batch: updates.append(batch.proprio.shape) or update(agent, batch))
    episodes = list(observability.learn(observability.Args(env="walker_walk", steps=764, updates_per_step=0.02), "full", 1))
    assert [step for step, _ in episodes] == [250, 500, 750] and all(0 < figures["train_return"] < 1000 for _, figures in episodes)
    assert updates == [(128, 24)] * 5
    given = observability.Args(env="walker_walk", steps=764, updates_per_step=0.02, eval_every=400, eval_episodes=1)
    judged = list(observability.learn(given, "full", 1))
    assert [list(figures) for _, figures in judged] == [["train_return"], ["train_return", "eval/train/return_mean"], ["train_return"]]
    assert [row["train_return"] for _, row in judged] == [row["train_return"] for _, row in episodes]  # evaluations change nothing
    not_curves = tmp_path / "other.csv"
    not_curves.write_text("variant,seed\n")
    for wrong in ({"env": "walker_walk", "variants": ("seen",)}, {"steps": 1000}, {"output": not_curves}):
        with pytest.raises(envs.UserError):
            observability.main(observability.Args(**wrong))
    assert not_curves.read_text() == "variant,seed\n"


def test_curves_of_states_are_added_to_their_table(monkeypatch, tmp_path):
    """Of other names, those that are there stay; of the same name the new one stands, an interrupted one as far as it came."""

    def interrupted(*_):
        yield 250, {"train_return": 3.0}
        raise KeyboardInterrupt

    played = iter([[(250, {"train_return": 1.0})], [(250, {"train_return": 2.0, "train_success": 1.0})], interrupted()])
    monkeypatch.setattr(observability, "learn", lambda *_: next(played))
    for seeds, end in (((1, 2), contextlib.nullcontext()), ((1,), pytest.raises(KeyboardInterrupt))):
        with end:
            observability.main(observability.Args(env="hammer", seeds=seeds, label="a", output=tmp_path / "new" / "states.csv"))
    assert curves.read(tmp_path / "new" / "states.csv") == [
        {"run": f"a, seed {seed}", "figure": figure, "step": "250", "value": value}
        for seed, figure, value in ((2, "train_return", "2"), (2, "train_success", "1"), (1, "train_return", "3"))
    ]
    curves.draw(tmp_path / "new" / "states.csv")


@pytest.mark.parametrize(("env_id", "size"), [("hammer", 46), ("unitree_stand", 35), ("finger_spin", 9)])
def test_a_state_is_a_tasks_whole_state(request, env_id, size):
    """A step changes much of it (not the spinner that nobody pushed), and nothing is drawn."""
    if env_id == "unitree_stand":
        request.getfixturevalue("menagerie")
    env = observability.State(env_id, "full", 1)
    before = env.reset()[0]
    after = env.step(env.action_space.sample())[0]
    assert before["proprio"].shape == (size,) and before["proprio"].dtype == np.float32
    assert (before["proprio"] != after["proprio"]).mean() > 0.4 and not after["pixels"].any()
    env.close()


def test_what_is_seen_of_a_pole_out_of_the_picture():
    """Three looks at the cart's position, and at the angle as far as it shows."""
    env = observability.State("cartpole_swingup", "seen", 1)
    assert env.reset()[0]["proprio"].shape == (9,) and env.hidden == [False] * 3
    for x, angle, seen in ((0.0, 1.57, True), (5.0, 0.3, False)):  # behind the rail some of its pixel's points show
        env.unwrapped.data.qpos[:] = x, angle
        envs.mujoco.mj_forward(env.unwrapped.model, env.unwrapped.data)
        expected = [x, math.cos(angle), math.sin(angle)] if seen else [x, 0, 0]
        assert env.look()["proprio"][-3:] == pytest.approx(expected) and env.hidden[-1] != seen
    env.close()


@pytest.mark.parametrize("wrong", ["policy", "mask"])
def test_a_policy_or_a_mask_of_its_own_is_found(monkeypatch, wrong):
    def faster(agent, masker, *_):
        ways = {"mask": partial(rl.mask_stack, masker), "policy": partial(agent.policy, mean=False)}
        ways |= {wrong: {"mask": lambda obs: torch.zeros(4, 3, 84, 84, dtype=torch.uint8), "policy": lambda *seen: torch.rand(4, 6)}[wrong]}
        return ways["mask"], ways["policy"], agent.update

    monkeypatch.setattr(rl, "faster", faster)
    with pytest.raises(envs.UserError, match="is not the plain one's"):
        equal.main(equal.Args(batch_size=4, updates=1, compile=False, device="cpu"))


def test_ways_are_timed_in_turn(monkeypatch):
    """Medians: one slow turn of seven, and the warm-up, do not count."""
    turns, clock = [], [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def way(name: str, seconds: float) -> None:
        turns.append(name)
        clock[0] += 5 if len(turns) in (1, 3) else seconds

    ways = {"slow": partial(way, "slow", 0.04), "fast": partial(way, "fast", 0.01)}
    taken = speed.time_in_turn(ways, torch.device("cpu"), 2, seconds=0)
    assert turns == ["slow", "fast"] + (["slow"] * 3 + ["fast"] * 3) * 2
    assert taken == pytest.approx({"slow": 0.04, "fast": 0.01})


def test_speed_table(tmp_path, monkeypatch):
    """Every ratio is of two times in the same table, and replay's memory is what its rows take."""
    monkeypatch.setattr(speed, "time_in_turn", partial(speed.time_in_turn, seconds=0))
    small = {"batch_size": 4, "encoder": "small", "repeats": 1, "loop_envs": (2,), "loop_steps": 8, "stored": (200, 400)}
    speed.main(speed.Args(**small, sam=False, device="cpu", output=str(tmp_path)))
    (table,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    seconds = {key: value for key, value in table.items() if key.split("/")[0] in ("step", "update", "loop", "masker")}
    assert len(seconds) > 20 and all(value > 0 for value in seconds.values())
    fast = "bf16" if envs.cpu_has_bf16() else "fp32"
    slow = table["update/unmasked, fp32, contiguous, pages given back"] / table[f"update/masked, {fast}, channels_last"]
    assert table["ratio/update unmasked, fp32, contiguous, pages given back, over the default"] == pytest.approx(slow)
    kinds = ("exact", "overlapped", "without rendering", "rendering alone")
    exact, overlapped, without, alone = (table[f"loop/{kind}, 2 environments"] for kind in kinds)
    hidden, limit = (exact - overlapped) / (exact - without), overlapped / max(without, alone)
    assert table["ratio/rendering hidden behind the update, 2 environments"] == pytest.approx(hidden)
    assert table["ratio/overlapped loop over the slower of its two halves, 2 environments"] == pytest.approx(limit)
    row = 4 * 84**2 + 4 * (0 + 6 + 2) + 8 * 4  # frame and mask; action, reward and end; the history's four numbers
    assert table["replay/GB per 100,000 steps"] == pytest.approx(row * (400 + 1 + 8) / 400 / 1e4, rel=1e-4)
    (spent,) = tmp_path.glob("*.txt")
    assert "convolution" in spent.read_text()
