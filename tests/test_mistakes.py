"""What the three scripts answer to a person's mistakes, and to --help."""

import importlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import tyro
from commands import PHASE1, PHASE2, RL, ROOT, mistake

import envs
import talas_asymmetric_sac as rl

NO_MASKER = ["--env=walker_walk", "--masker=none"]

MISTAKES = [  # script, arguments, what the one line says
    (RL, ["--env=walker_wlak"], "did you mean walker_walk"),
    (PHASE1, ["--env=walker_wlak"], "did you mean walker_walk"),
    (PHASE2, ["--env=walker_wlak"], "did you mean walker_walk"),
    (RL, ["--env=walker_walk", "--masker-path=nowhere"], "no such masker"),
    (RL, [*NO_MASKER, "--augmentation=swap"], "swap or mix need a --masker"),
    (RL, [*NO_MASKER, "--clean-masker=teacher"], "--clean-masker"),
    (RL, [*NO_MASKER, "--overlay=nowhere"], "nowhere: no such folder"),
    (RL, [*NO_MASKER, "--distractors=.", "--eval-settings", "video_hard"], "video_hard/"),
    (RL, [*NO_MASKER, "--eval-settings", "video_hard"], "video_hard needs DMControl-GB's media: --distractors"),
    (RL, [*NO_MASKER, "--device=cuda:99"], "cuda:99"),
    (RL, ["--evaluate=nowhere.pt"], "nowhere.pt: not a checkpoint of this script (FileNotFoundError"),
    (RL, ["--resume=nowhere"], "nowhere: not the folder of a run"),
    (RL, ["--resume="], "not the folder of a run"),  # as of an empty variable of a shell
    (RL, ["--evaluate="], "not a checkpoint of this script"),
    (RL, [*NO_MASKER, "--exp-name=../elsewhere"], "has no /"),
    (RL, [*NO_MASKER, "--replay-size=99"], "at least 100 per environment"),
    (RL, [*NO_MASKER, "--num-envs=2", "--replay-size=199"], "at least 100 per environment"),
    (RL, [*NO_MASKER, "--gamma=1.5"], "--gamma 1.5: has to be a number from 0 to 1"),
    (RL, [*NO_MASKER, "--tau=1.5"], "--tau 1.5: has to be a number from 0 to 1"),
    (RL, [*NO_MASKER, "--init-alpha=0"], "--init-alpha 0.0: has to be a number from 1e-06"),
    (RL, [*NO_MASKER, "--learning-starts=-1"], "--learning-starts -1: has to be a number from 0"),
    (RL, [*NO_MASKER, "--overlay-images=9"], "--overlay-images 9: has to be a number from 10"),
    (PHASE1, ["--env=walker_walk", "--overlay-images=9"], "--overlay-images 9: has to be a number from 10"),
    (PHASE2, ["--env=walker_walk", "--overlay-images=9"], "--overlay-images 9: has to be a number from 10"),
    (PHASE1, ["--env=walker_walk", "--frames=1"], "--frames 1: has to be a number from 2"),
    (PHASE1, ["--env=walker_walk", "--test-frames=3"], "--test-frames 3: has to be a number from 4"),
    (PHASE1, ["--env=walker_walk", "--prompt=the walker and the dragon"], "'dragon' is not in walker_walk's vocabulary; it can name: feet"),
    (PHASE1, ["--env=walker_walk", "--prompt="], "--prompt '' names nothing"),  # as of an empty variable of a shell
    (PHASE1, ["--env=hopper_hop", "--prompt=the target"], "'target' is not in hopper_hop's vocabulary; it can name: calf, floor, foot"),
    (PHASE1, ["--env=walker_walk", "--distractors=nowhere"], "nowhere: no such folder"),
    (PHASE1, ["--env=walker_walk", "--seed=-1"], "seed -1: has to be a number from 0 to"),
    (PHASE1, ["--env=walker_walk", "--output=/dev/null/maskers"], "Not a directory: '/dev/null/maskers'"),
    (PHASE1, ["--env=cartpole_swingup", "--export-frames=x", "--sequence-length=126"], "an episode of cartpole_swingup has 125 steps"),
    (PHASE1, ["--env=walker_walk", "--exp-name=a/b"], "has no /"),
    (PHASE2, ["--env=walker_walk"], "talas_phase1.py --env walker_walk"),
    (PHASE2, ["--env=walker_walk", "--steps=0"], "steps 0: has to be a number from 1"),
    ("envs", ["--env=walker_walk", "--prompt="], "--prompt '' names nothing"),
    ("envs", ["--env=lqr_lqr_2_1"], "unknown --env 'lqr_lqr_2_1'"),
]


@pytest.mark.parametrize(("script", "args", "said"), MISTAKES, ids=[" ".join([script, *args]) for script, args, _ in MISTAKES])
def test_mistakes(refused, script, args, said):
    assert said in refused(script, *args)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the scripts, started as a person does, answer to a mistake of each kind; two at a time, because each takes seconds to start."""
    first = {script: (args, said) for script, args, said in MISTAKES[::-1]}
    with ThreadPoolExecutor(2) as pool:
        asked = {script: pool.submit(mistake, script, *args, cwd=tmp_path_factory.mktemp("mistake")) for script, (args, _) in first.items()}
        yield {script: (first[script][1], answer) for script, answer in asked.items()}


@pytest.mark.parametrize("script", [RL, PHASE1, PHASE2, "envs"])
def test_a_mistake_ends_a_script_in_one_line(answers, script):
    said, answer = answers[script]
    assert said in answer.result()


def parse(script: str, *args: str) -> None:
    rl.read_args([*args]) if script == RL else tyro.cli(importlib.import_module(script).Args, args=args, description=script)


@pytest.mark.parametrize(("script", "flag", "value"), [(RL, "--no-such-flag", "1"), (PHASE1, "--frames", "many"), (PHASE2, "--augmentation", "blur")])
def test_flags_that_there_are_not(capsys, script, flag, value):
    """tyro answers itself, in a box."""
    with pytest.raises(SystemExit) as ended:
        parse(script, f"{flag}={value}")
    assert ended.value.code == 2 and flag in capsys.readouterr().err


def test_what_a_resumed_run_and_an_evaluated_agent_take_from_the_command_line(tmp_path, monkeypatch):
    """Their own arguments, but for a few that are typed, a default among them; any other is refused, not dropped."""
    monkeypatch.chdir(tmp_path)
    typed = ["--env=cup_catch", "--exp-name=a[1]*", "--total-timesteps=1000", "--checkpoint-every=100", "--eval-settings", "train", "procedural"]
    own = replace(rl.read_args(typed)[0], precision="bf16")  # as a run writes it, of auto
    folder = Path("runs") / f"ball_in_cup_catch__{own.exp_name}__1__20260101-000000-1"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(asdict(own)))

    resume = f"--resume={folder}"
    assert rl.read_args([resume]) == (replace(own, resume=str(folder)), folder)
    given = {"total_timesteps": 500_000, "checkpoint_every": 2500, "device": "cpu", "precision": "fp32", "distractors": "x", "overlay": "y"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    changed = rl.read_args([resume, *flags, "--compile", "--no-cudagraphs"])[0]
    assert changed == replace(own, resume=str(folder), compile=True, cudagraphs=False, **given)
    for flags, named in ((["--batch-size=7"], "--batch-size: "), (["--env=hammer"], "--env: "), (["--gamma=0.99", "--num-envs=3"], "--num-envs: ")):
        with pytest.raises(envs.UserError, match=named):
            rl.read_args([resume, *flags])

    auto = "--resume=auto"
    assert rl.read_args([*typed, auto]) == (replace(own, resume="auto"), folder)
    assert rl.read_args([*typed, auto, "--precision=bf16"])[1] == folder
    assert rl.read_args([*typed, auto, "--precision=fp32"])[1] is None
    assert rl.read_args([*typed, auto, "--seed=2"])[1] is None

    agent = str(next((ROOT / "results/agents").glob("cartpole*.pt")))
    args, nobody = rl.read_args(["--evaluate", agent, "--seed=7", "--eval-episodes=2", "--distractors=x", "--precision=fp32"])
    assert (args.distractors, args.precision) == ("x", "fp32")
    assert nobody is None and (args.env, args.augmentation, args.seed, args.eval_episodes) == ("cartpole_swingup", "mix", 7, 2)
    with pytest.raises(envs.UserError, match=r"--masker: .* has its own, student"):
        rl.read_args(["--evaluate", agent, "--masker=none"])
    content = envs.load_tensors(Path(agent))
    envs.save_tensors(tmp_path / "elsewhere.pt", content | {"args": content["args"] | {"track": True, "device": "cuda"}})
    elsewhere = rl.read_args(["--evaluate=elsewhere.pt"])[0]  # nothing of which an evaluation on this machine needs
    assert (elsewhere.track, elsewhere.device) == (False, "cpu")
    (folder / "args.json").write_text(json.dumps(asdict(args)))
    assert rl.read_args([resume]) == (replace(args, resume=str(folder)), folder)  # an evaluation that was stopped is made once more
    with pytest.raises(envs.UserError, match="--total-timesteps: "):  # which it has no use for
        rl.read_args([resume, "--total-timesteps=7"])


NUMBERS = [
    (script, field.name)
    for script in (RL, PHASE1, PHASE2)
    for field in fields(importlib.import_module(script).Args)
    if re.search("int|float", str(field.type))
]


@pytest.mark.parametrize(("script", "name"), NUMBERS)
def test_numbers_that_make_no_sense(script, name):
    """Of each numeric flag: less than nothing, endless, not a number, beyond what anything could hold. One line that names the flag, at once."""
    module, flag = importlib.import_module(script), f"--{name.replace('_', '-')}"
    for value in ("-1", "-1e-9", "nan", "inf", "1e30", "10000000000000000000000", "1,5", "½", ""):
        try:
            args = tyro.cli(module.Args, args=["--env=walker_walk", f"{flag}={value}"], console_outputs=False)
        except SystemExit as parsed:
            assert parsed.code == 2, "tyro's own answer"
            continue
        with pytest.raises(envs.UserError) as error:
            module.main(args)
        assert str(error.value).startswith(f"{flag} ")
        assert "\n" not in str(error.value)


BENCHMARKS = [f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("[a-z]*.py")]


@pytest.mark.parametrize("script", ["envs", RL, PHASE1, PHASE2, *sorted(BENCHMARKS)])
def test_help_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(script, "--help")
    out = capsys.readouterr().out
    assert ended.value.code == 0
    source = (ROOT / f"{script.replace('.', '/')}.py").read_text().split("class Args")[1]
    for field in fields(importlib.import_module(script).Args):
        assert f"--{field.name.replace('_', '-')}" in out, field.name
        line, below = re.search(rf"\n    ({field.name}: .*)\n(.*)", source).groups()  # documented beside the field, or in a string below it
        said = line.split("  # ")[1] if "  # " in line else re.match(r' {4}"""(.+)"""', below)[1]
        assert " ".join(said.split()[:3]).lower() in " ".join(out.replace("│", " ").split()).lower(), f"{field.name} is not documented"
