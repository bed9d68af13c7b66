"""The update against the method: numbers by hand, slow loops over samples, where gradients may flow, what each ablation changes; the replay."""

import contextlib
import copy
import csv
import dataclasses
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sysconfig
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from counting import Counting

import envs
import talas_asymmetric_sac as rl
import talas_phase1 as phase1
import talas_phase2 as phase2
from envs import UserError

B, A, P = 3, 2, 2  # batch, action and proprioception of most tests
SMALL = {"hidden_dim": 16, "batch_size": 4, "precision": "fp32", "encoder": "small"}
FROZEN = {"critic_lr": 0.0, "actor_lr": 0.0, "alpha_lr": 0.0}
CALM = {"shift": 0, "tau": 0.0, "init_alpha": 1e-8, **FROZEN}  # update() without chance; `calm` takes the policy's noise away


def jitter(module: nn.Module, scale: float) -> nn.Module:
    """Random weights and biases all over, so that nothing is equal, or zero, by its initialisation."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)
    return module


def make_masker(seed: int = 0) -> rl.Masker:
    torch.manual_seed(seed)
    return jitter(rl.Masker(), 0.03).requires_grad_(False).eval()


def make_agent(photo: int | None = None, masker: bool = True, proprio_dim: int = P, **flags) -> rl.Agent:
    """A small agent whose target differs from its critic. photo: the grey level of its only photograph; without one, random photographs."""
    psi = make_masker() if masker else None
    torch.manual_seed(1)
    photos = torch.randint(256, (4, 3, 128, 128), dtype=torch.uint8) if photo is None else torch.full((4, 3, 128, 128), photo, dtype=torch.uint8)
    agent = rl.Agent(rl.Args(**SMALL | flags), 9, proprio_dim, A, psi, photos)
    for module in (agent.actor, agent.critic, agent.target_critic):
        jitter(module, 0.2)
    return agent


def make_batch(n: int = B, seed: int = 2, proprio_dim: int = P, done: tuple[float, ...] = (0.0, 1.0, 0.0)) -> rl.Batch:
    g = torch.Generator().manual_seed(seed)
    frames, masks = (torch.randint(256, (2, n, c, 84, 84), generator=g, dtype=torch.uint8) for c in (9, 3))
    proprio, reward = torch.randn(2, n, proprio_dim, generator=g), torch.randn(n, generator=g)
    action, dones = torch.rand(n, A, generator=g) * 2 - 1, torch.tensor([done[i % len(done)] for i in range(n)])
    return rl.Batch(frames[0], masks[0], proprio[0], action, reward, dones, frames[1], masks[1], proprio[1])


def embeddings(agent: rl.Agent, n: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(B, agent.encoder(torch.zeros(1, 9, 84, 84)).shape[1]) for _ in range(n)]


def make_constant(agent: rl.Agent, q: tuple[float, float], target_q: tuple[float, float], mean: float, log_std: float) -> None:
    """Networks that give these outputs whatever they see."""
    with torch.no_grad():
        for parameter in [*agent.actor.parameters(), *agent.critic.parameters(), *agent.target_critic.parameters()]:
            parameter.zero_()
        for critic, values in ((agent.critic, q), (agent.target_critic, target_q)):
            for head, value in zip(critic.heads, values, strict=True):
                head.out.bias.fill_(value)
        agent.actor.head.out.bias[:A] = mean
        agent.actor.head.out.bias[A:] = math.atanh((log_std + 10) / 6 - 1)


def calm(agent: rl.Agent) -> rl.Agent:
    """The smallest standard deviation that the policy knows, e⁻¹⁰."""
    with torch.no_grad():
        agent.actor.head.out.weight[A:] = 0
        agent.actor.head.out.bias[A:] = -30
    return agent


def update(agent: rl.Agent, batch: rl.Batch, seed: int = 4) -> dict[str, float]:
    torch.manual_seed(seed)
    return {key: value.item() for key, value in agent.update(batch).items()}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def slow_act(agent: rl.Agent, z: torch.Tensor, proprio: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, float]:
    """One sample's action and log π, in float64, with 1 − tanh² u = 1 / cosh² u."""
    mean, raw = agent.actor.head(torch.cat([agent.actor.trunk(z[None]), proprio[None]], 1))[0].double().split(A)
    action, log_prob = torch.empty(A), 0.0
    for j in range(A):
        log_std = -10 + 6 * (math.tanh(raw[j]) + 1)
        u = mean[j].item() + math.exp(log_std) * noise[j].item()
        action[j] = math.tanh(u)
        log_prob += -0.5 * noise[j].item() ** 2 - log_std - 0.5 * math.log(2 * math.pi) + 2 * math.log(math.cosh(u))
    return action, log_prob


def slow_q(critic: rl.Critic, z: torch.Tensor, proprio: torch.Tensor, action: torch.Tensor) -> list[float]:
    return critic(z[None], proprio[None], action[None])[:, 0].tolist()


# ------------------------------------------------------------------------------------------------------------ the losses
@torch.no_grad()
def test_losses_by_hand():
    agent, batch, (z_c, z_a) = (a := make_agent(gamma=0.5, init_alpha=0.1)), make_batch(), embeddings(a, 2)
    make_constant(agent, q=(3, 5), target_q=(7, 4), mean=0.5, log_std=0.0)

    def log_prob(noise):  # of u = 0.5 + 1 · noise
        return sum(-0.5 * e**2 - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(0.5 + e) ** 2) for e in noise)

    torch.manual_seed(0)
    y = agent.target_q(z_c, batch)
    torch.manual_seed(0)
    noise = torch.randn(B, A).tolist()
    expected = [r + 0.5 * (1 - d) * (4 - 0.1 * log_prob(e)) for r, d, e in zip(batch.reward.tolist(), (0, 1, 0), noise, strict=True)]
    assert y.tolist() == pytest.approx(expected, rel=1e-5)

    # y = 1, 4, 3: (3 − y)² + (5 − y)² = 4 + 16, 1 + 1, 0 + 4, in sum 26; half of it over three samples; twice for two views
    loss, q = agent.critic_loss([z_c, z_a], batch, torch.tensor([1.0, 4.0, 3.0]))
    assert loss.item() == pytest.approx(26 / 3)
    assert q.tolist() == [[3.0] * 6, [5.0] * 6]
    assert agent.critic_loss([z_c], batch, torch.tensor([1.0, 4.0, 3.0]))[0].item() == pytest.approx(13 / 3)

    torch.manual_seed(0)
    loss, log_probs = agent.actor_loss([z_c, z_a], batch.proprio)
    torch.manual_seed(0)
    expected = [log_prob(e) for e in torch.randn(2 * B, A).tolist()]
    assert log_probs.tolist() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(0.1 * np.mean(expected) - 3, rel=1e-5)


def test_temperature_loss_by_hand():
    agent = make_agent(init_alpha=0.1)
    loss = agent.alpha_loss(torch.tensor([1.0, 4.0]))  # the target entropy is −2: −0.1 · ((1 − 2) + (4 − 2)) / 2
    loss.backward()
    assert loss.item() == pytest.approx(-0.05)
    assert agent.log_alpha.grad.item() == pytest.approx(-0.05)  # entropy, −2.5, is below its target: α rises


@pytest.mark.parametrize("judge", ["clean", "own"])
@torch.no_grad()
def test_losses_against_loops(judge):
    agent, batch = make_agent(actor_judge=judge, init_alpha=0.3), make_batch()
    z_c, z_a, next_z = embeddings(agent, 3)
    torch.manual_seed(5)
    y = agent.target_q(next_z, batch)
    torch.manual_seed(5)
    noise = torch.randn(B, A)
    for i in range(B):
        action, log_prob = slow_act(agent, next_z[i], batch.next_proprio[i], noise[i])
        value = min(slow_q(agent.target_critic, next_z[i], batch.next_proprio[i], action)) - 0.3 * log_prob
        assert y[i].item() == pytest.approx(batch.reward[i].item() + 0.99 * (1 - batch.done[i].item()) * value, rel=1e-4)

    total = 0.0
    for i in range(B):
        for z in (z_c, z_a):
            total += sum((q - y[i].item()) ** 2 for q in slow_q(agent.critic, z[i], batch.proprio[i], batch.action[i])) / 2
    assert agent.critic_loss([z_c, z_a], batch, y)[0].item() == pytest.approx(total / B, rel=1e-4)

    torch.manual_seed(6)
    loss, log_probs = agent.actor_loss([z_c, z_a], batch.proprio)
    torch.manual_seed(6)
    noise, total = torch.randn(2, B, A), 0.0
    for v, z in enumerate((z_c, z_a)):
        for i in range(B):
            action, log_prob = slow_act(agent, z[i], batch.proprio[i], noise[v, i])
            total += 0.5 * (0.3 * log_prob - min(slow_q(agent.critic, (z_c if judge == "clean" else z)[i], batch.proprio[i], action)))
            assert log_probs[v * B + i].item() == pytest.approx(log_prob, rel=1e-3, abs=1e-3)
    assert loss.item() == pytest.approx(total / B, rel=1e-4)


@pytest.mark.parametrize("flags", [("both", "both", "clean"), ("both", "both", "own"), ("both", "clean", "clean"), ("clean", "both", "clean")])
@torch.no_grad()
def test_update_against_loops(flags):
    """From bytes to losses: which view goes where, on a batch where nothing is left to chance."""
    critic_views, actor_views, judge = flags
    agent = calm(make_agent(photo=200, critic_views=critic_views, actor_views=actor_views, actor_judge=judge, **CALM))
    batch = make_batch()
    with torch.enable_grad():
        metrics = update(agent, batch)

    def clean(obs, mask):
        return torch.stack([obs[3 * k + c] * (mask[k] / 255) / 255 for k in range(3) for c in range(3)])

    def augmented(obs):
        tau = 0.5 * obs + 0.5 * 200
        masks = [(255 * agent.masker(tau[None, 3 * k : 3 * k + 3]).sigmoid()).round() / 255 for k in range(3)]  # masks are bytes
        return torch.cat([tau[3 * k : 3 * k + 3] * masks[k] / 255 for k in range(3)])

    def f(pixels):
        return agent.encoder(pixels[None])[0]

    no_noise, q_loss, q_values, pi_loss = torch.zeros(A), 0.0, [], []
    for i in range(B):
        z = {"clean": f(clean(batch.obs[i].float(), batch.mask[i])), "augmented": f(augmented(batch.obs[i].float()))}
        next_z = f(clean(batch.next_obs[i].float(), batch.next_mask[i]))
        next_action, _ = slow_act(agent, next_z, batch.next_proprio[i], no_noise)
        y = batch.reward[i] + 0.99 * (1 - batch.done[i]) * min(slow_q(agent.target_critic, next_z, batch.next_proprio[i], next_action))
        for view in ("clean", "augmented"):
            if view == "clean" or critic_views == "both":
                q = slow_q(agent.critic, z[view], batch.proprio[i], batch.action[i])
                q_loss, q_values = q_loss + sum((value - y.item()) ** 2 for value in q) / 2 / B, q_values + q
            if view == "clean" or actor_views == "both":
                action, _ = slow_act(agent, z[view], batch.proprio[i], no_noise)
                pi_loss.append(-min(slow_q(agent.critic, z["clean" if judge == "clean" else view], batch.proprio[i], action)))
    assert metrics["losses/qf_loss"] == pytest.approx(q_loss, rel=5e-4)
    assert metrics["losses/qf_values"] == pytest.approx(np.mean(q_values), rel=5e-4)
    assert metrics["losses/actor_loss"] == pytest.approx(np.mean(pi_loss), rel=5e-4)


@torch.no_grad()
def test_the_actor_acts_on_embeddings_from_before_the_critics_step_and_is_judged_by_the_critic_after_it():
    agent, batch = calm(make_agent(photo=200, **CALM | {"critic_lr": 1e-2})), make_batch()
    encoder, critic = copy.deepcopy(agent.encoder), copy.deepcopy(agent.critic)
    with torch.enable_grad():
        metrics = update(agent, batch)
    views = agent.views(batch.obs, batch.mask)  # nothing in them is left to chance

    def loss(f, judge):
        z, losses = [f(view) for view in views], []
        for v, i in itertools.product(range(2), range(B)):
            action, _ = slow_act(agent, z[v][i], batch.proprio[i], torch.zeros(A))
            losses.append(-min(slow_q(judge, z[0][i], batch.proprio[i], action)))
        return np.mean(losses)

    assert metrics["losses/actor_loss"] == pytest.approx(loss(encoder, agent.critic), rel=5e-4)
    for other in ((agent.encoder, agent.critic), (encoder, critic)):
        assert abs(loss(*other) - metrics["losses/actor_loss"]) > 0.01 * abs(metrics["losses/actor_loss"])


@pytest.mark.parametrize("mean", [0.0, 0.7, -3.0, 9.0, -30.0, 60.0])
@pytest.mark.parametrize("log_std", [-9.0, -1.0, 0.0, 1.5])
@torch.no_grad()
def test_log_prob_against_torch_distributions(mean, log_std):
    agent = make_agent(proprio_dim=0)
    make_constant(agent, (0, 0), (0, 0), mean, log_std)
    z = embeddings(agent, 1)[0]
    torch.manual_seed(7)
    action, log_prob, mean_action = agent.actor(z, torch.zeros(B, 0))
    torch.manual_seed(7)
    u = mean + math.exp(log_std) * torch.randn(B, A).double()
    tanh = torch.distributions.TanhTransform(cache_size=1)  # the cache lends log_prob the u of an action that rounds to 1
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(math.exp(log_std), dtype=torch.float64))
    expected_action = tanh(u)
    expected = torch.distributions.TransformedDistribution(normal, [tanh]).log_prob(expected_action).sum(1)
    assert torch.isfinite(log_prob).all()
    torch.testing.assert_close(action.double(), expected_action, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mean_action, torch.full((B, A), math.tanh(mean)))


@torch.no_grad()
def test_termination_ends_the_return_and_truncation_does_not():
    agent, z = (a := make_agent(init_alpha=1e-8)), embeddings(a, 1)[0]
    make_constant(agent, q=(0, 0), target_q=(10, 20), mean=0, log_std=0)
    batch = make_batch(done=(0.0,))
    assert agent.target_q(z, batch).tolist() == pytest.approx((batch.reward + 0.99 * 10).tolist())
    batch = batch._replace(done=torch.ones(B))
    assert agent.target_q(z, batch).tolist() == batch.reward.tolist()


@torch.no_grad()
def test_proprioception_reaches_actor_and_critic():
    agent, batch, z = make_agent(), make_batch(), embeddings(make_agent(), 1)[0]
    other = batch.proprio + torch.tensor([0.0, 1.0])
    assert not torch.equal(agent.actor(z, batch.proprio)[2], agent.actor(z, other)[2])
    assert (agent.critic(z, batch.proprio, batch.action) != agent.critic(z, other, batch.action)).all()
    torch.manual_seed(0)
    y = agent.target_q(z, batch)
    batch = batch._replace(next_proprio=batch.next_proprio + 1)
    torch.manual_seed(0)
    assert (agent.target_q(z, batch) != y).tolist() == [True, False, True]  # the second is terminal


# ------------------------------------------------------------------------------------------------------------ gradients
def test_critic_loss_reaches_encoder_and_critic_only():
    agent, batch = make_agent(), make_batch()
    clean, augmented = agent.views(batch.obs, batch.mask)
    y = agent.target_q(agent.encoder(rl.apply_mask(batch.next_obs, batch.next_mask)), batch)
    assert not y.requires_grad
    agent.critic_loss([agent.encoder(clean), agent.encoder(augmented)], batch, y)[0].backward()
    for module in (agent.encoder, agent.critic):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    for module in (agent.actor, agent.target_critic, agent.masker):
        assert all(p.grad is None for p in module.parameters())
    assert agent.log_alpha.grad is None


def test_actor_loss_reaches_the_actor_only():
    """What the actor learns from makes no difference to encoder, critic, target and masker: not in their weights, not in their gradients."""
    results = []
    for judge, views in (("clean", "both"), ("own", "both"), ("clean", "clean")):
        agent = make_agent(actor_judge=judge, actor_views=views)
        update(agent, make_batch())
        others = [agent.encoder, agent.critic, agent.target_critic, agent.masker]
        grads = {f"{i} {name}": p.grad for i, module in enumerate(others) for name, p in module.named_parameters() if p.grad is not None}
        results.append(([weights(module) for module in others], grads, weights(agent.actor)))
        assert {key[0] for key in grads} == {"0", "1"}
    for others, grads, actor in results[1:]:
        assert all(same(a, b) for a, b in zip(others, results[0][0], strict=True))
        assert same(grads, results[0][1])
        assert not same(actor, results[0][2])


def test_alpha_is_a_constant_in_the_actor_loss():
    agent, batch = make_agent(), make_batch()
    loss, log_prob = agent.actor_loss(embeddings(agent, 2), batch.proprio)
    loss.backward()
    assert agent.log_alpha.grad is None
    assert not log_prob.requires_grad


def test_update_moves_what_it_should():
    agent, batch = make_agent(tau=0.3), make_batch()
    before = {name: weights(module) for name, module in agent.named_children()} | {"log_alpha": agent.log_alpha.item()}
    metrics = update(agent, batch)
    assert all(math.isfinite(value) for value in metrics.values())
    for name in ("encoder", "critic", "actor"):
        assert all(not torch.equal(value, before[name][key]) for key, value in getattr(agent, name).state_dict().items()), name
    assert agent.log_alpha.item() != before["log_alpha"]
    assert same(weights(agent.masker), before["masker"])
    for key, value in agent.target_critic.state_dict().items():
        torch.testing.assert_close(value, 0.7 * before["target_critic"][key] + 0.3 * agent.critic.state_dict()[key])


def test_temperature_moves_towards_its_target():
    for bias, rises in ((-30, True), (0, False)):  # a policy of one action; one with a standard deviation of e⁻⁴ to e²
        agent = make_agent()
        with torch.no_grad():
            agent.actor.head.out.weight.zero_()
            agent.actor.head.out.bias.copy_(torch.tensor([0.0, 0.0, bias, bias]) + (0 if rises else torch.tensor([0, 0, 0.75, 0.75])))
        before = agent.log_alpha.item()
        metrics = update(agent, make_batch())
        assert (metrics["losses/entropy"] < -A) == rises
        assert (agent.log_alpha.item() > before) == rises


@pytest.mark.parametrize(("which", "moved"), [("critic", {"encoder", "critic"}), ("actor", {"actor"}), ("alpha", {"log_alpha"})])
def test_each_learning_rate_is_its_own(which, moved):
    agent = make_agent(**FROZEN | {"tau": 0.0, f"{which}_lr": 1e-3})
    before = weights(agent)
    update(agent, make_batch())
    assert {name.split(".")[0] for name, value in weights(agent).items() if not torch.equal(value, before[name])} == moved


def test_the_temperatures_momentum_is_half():
    """Adam with β1 = 0.5 takes a step of one learning rate, and for the opposite gradient a third of one back (with 0.9, a nineteenth)."""
    agent = make_agent(alpha_lr=0.1, init_alpha=1.0)
    for gradient, expected in ((1.0, -0.1), (-1.0, -0.1 + 0.1 / 3)):
        agent.log_alpha.grad = torch.tensor(gradient)
        agent.alpha_optimizer.step()
        assert agent.log_alpha.item() == pytest.approx(expected, abs=1e-6)
    assert [optimizer.defaults["betas"][0] for optimizer in agent.optimizers] == [0.9, 0.9, 0.5]


@pytest.mark.parametrize("norm", [False, True])
def test_a_heads_layers(norm):
    """W₂ ReLU(n(W₁ ReLU(n(W₀ x)))), n: to mean 0 and variance 1 over a layer's features, with a gain and an offset that are learned."""
    torch.manual_seed(0)
    head, x = rl.Head(5, 8, 3, norm), torch.randn(6, 5)
    for weight in head.parameters():
        nn.init.normal_(weight)
    weights = [weight.detach().double() for weight in head.parameters()]
    assert len(weights) == (10 if norm else 6)
    h = x.double()
    for _ in range(2):
        h = h @ weights.pop(0).T + weights.pop(0)
        if norm:
            h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weights.pop(0) + weights.pop(0)
        h = h.clamp(min=0)
    torch.testing.assert_close(head(x).double(), h @ weights[0].T + weights[1], rtol=1e-5, atol=1e-5)


def test_actor_and_critic_by_hand():
    """A trunk, tanh(n(W z + b)), beside proprioception and, for the critics, the action; then the head."""
    agent, batch, z = make_agent(), make_batch(), torch.randn(B, 2048)

    def trunk(layers: nn.Sequential) -> torch.Tensor:
        h = z @ layers[0].weight.T + layers[0].bias
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return torch.tanh(h * layers[1].weight + layers[1].bias)

    x = torch.cat([trunk(agent.critic.trunk), batch.proprio, batch.action], 1)
    expected = torch.stack([head(x)[:, 0] for head in agent.critic.heads])
    torch.testing.assert_close(agent.critic(z, batch.proprio, batch.action), expected, rtol=1e-4, atol=1e-4)
    mean = agent.actor.head(torch.cat([trunk(agent.actor.trunk), batch.proprio], 1))[:, :A]
    torch.testing.assert_close(agent.actor(z, batch.proprio)[2], torch.tanh(mean), rtol=1e-4, atol=1e-4)


def test_a_heads_output_is_fp32():
    """Of hidden layers in bf16: a Q of 100 in bf16 would be a multiple of a half."""
    torch.manual_seed(0)
    head, x = rl.Head(5, 8, 3, False), 100 * torch.randn(64, 5)
    with torch.autocast("cpu", torch.bfloat16):
        h, out = head.hidden(x), head(x)
    assert h.dtype == torch.bfloat16 and out.dtype == torch.float32
    torch.testing.assert_close(out, h.float() @ head.out.weight.T + head.out.bias, rtol=1e-5, atol=1e-5)


def test_layer_norm_is_of_actor_and_critics():
    """Of all three heads, and of nobody's if it is not asked for."""
    for asked in (False, True):
        agent = rl.Agent(rl.Args(**SMALL, layer_norm=asked), 9, 0, 2, None, None)
        for head in (agent.actor.head, *agent.critic.heads, *agent.target_critic.heads):
            assert sum(isinstance(layer, nn.LayerNorm) for layer in head.modules()) == 2 * asked


@pytest.mark.parametrize(("kind", "size"), [("sada", 39_200), ("medium", 8_192), ("small", 2_048)])
def test_a_new_agent(kind, size):
    """The encoder's size and orthogonal start, and a target that starts as the critic; no weights but these are drawn anew."""
    agent = rl.Agent(rl.Args(**SMALL | {"encoder": kind}), 9, P, A, None, None)
    assert agent.encoder(torch.zeros(2, 9, 84, 84)).shape == (2, size)
    assert same(weights(agent.target_critic), weights(agent.critic)) and agent.target_critic is not agent.critic
    assert not any(p.requires_grad for p in agent.target_critic.parameters())
    for layer, gain in ((agent.encoder[0], 2), (agent.encoder[-2], 2), (agent.critic.heads[0].hidden[2], 1), (agent.actor.head.hidden[2], 1)):
        rows = layer.weight.detach().flatten(1)
        torch.testing.assert_close(rows @ rows.T, gain * torch.eye(len(rows)), atol=1e-4, rtol=0)
        assert not layer.bias.any()


# ------------------------------------------------------------------------------------------------------------ the asymmetry
@pytest.mark.parametrize("judge", ["clean", "own"])
@torch.no_grad()
def test_an_augmented_pixel_does_not_change_the_judgement(judge):
    agent, batch = make_agent(actor_judge=judge), make_batch()
    make_constant(agent, (0, 0), (0, 0), mean=0.3, log_std=-1)  # fixed actions, whatever is seen
    jitter(agent.critic, 0.3)
    clean, augmented = agent.views(batch.obs, batch.mask)
    touched = augmented.clone()
    touched[0, 4, 40, 40] += 0.5
    judgements, learned = [], []
    for view in (augmented, touched):
        z = [agent.encoder(clean), agent.encoder(view)]
        torch.manual_seed(0)
        judgements.append(agent.actor_loss(z, batch.proprio)[0].item())
        learned.append(agent.critic_loss(z, batch, batch.reward)[0].item())
    assert (judgements[0] == judgements[1]) == (judge == "clean")
    assert learned[0] != learned[1]


def seen_by_update(photo: int, **flags) -> dict[str, object]:
    """What an update with this photograph comes to: target, losses, and weights after it."""
    agent = make_agent(photo=photo, **flags)
    with torch.no_grad():
        agent.actor.head.out.weight.zero_()  # fixed actions
    seen: dict[str, object] = {}
    target_q = agent.target_q
    agent.target_q = lambda *args: seen.setdefault("y", target_q(*args))
    seen |= update(agent, make_batch())
    return seen | {"critic": [weights(agent.encoder), weights(agent.critic)], "actor": weights(agent.actor)}


@pytest.mark.parametrize("judge", ["clean", "own"])
def test_the_photograph_does_not_reach_target_and_judgement(judge):
    black, white = (seen_by_update(photo, actor_judge=judge, **FROZEN) for photo in (0, 255))
    assert torch.equal(black["y"], white["y"])
    assert (black["losses/actor_loss"] == white["losses/actor_loss"]) == (judge == "clean")
    assert black["losses/qf_loss"] != white["losses/qf_loss"]


def test_critic_views_clean():
    black, white = (seen_by_update(photo, critic_views="clean") for photo in (0, 255))
    assert black["losses/qf_loss"] == white["losses/qf_loss"]
    assert all(same(a, b) for a, b in zip(black["critic"], white["critic"], strict=True))
    black, white = (seen_by_update(photo, critic_views="both") for photo in (0, 255))
    assert not any(same(a, b) for a, b in zip(black["critic"], white["critic"], strict=True))


def test_actor_views_clean():
    black, white = (seen_by_update(photo, actor_views="clean", critic_lr=0.0) for photo in (0, 255))
    assert black["losses/actor_loss"] == white["losses/actor_loss"]
    assert same(black["actor"], white["actor"])
    black, white = (seen_by_update(photo, actor_views="both", critic_lr=0.0) for photo in (0, 255))
    assert not same(black["actor"], white["actor"])


def test_clean_views_only_need_no_photographs():
    agent, batch = make_agent(masker=False, critic_views="clean", actor_views="clean"), make_batch()
    agent.photos = None
    (clean,) = agent.views(batch.obs, batch.mask)
    assert clean.shape == (B, 9, 84, 84)
    assert all(math.isfinite(value) for value in update(agent, batch).values())


# ------------------------------------------------------------------------------------------------------------ the two views
def slow_mask(masker: nn.Module, stack: torch.Tensor) -> torch.Tensor:
    """(B, 9, H, W) in [0, 255] -> (B, 3, H, W) in [0, 1], one frame at a time."""
    return torch.stack([torch.cat([masker(o[None, 3 * k : 3 * k + 3]).sigmoid() for k in range(3)]) for o in stack])


@torch.no_grad()
def test_augmentation_flags():
    batch = make_batch()
    o, m = batch.obs.float(), batch.mask.repeat_interleave(3, 1) / 255
    overlaid, swapped = 0.5 * o + 0.5 * 200, m * o + (1 - m) * 200
    for kind, tau in (("overlay", overlaid), ("swap", swapped)):
        agent = make_agent(photo=200, shift=0, augmentation=kind)
        expected = slow_mask(agent.masker, tau).repeat_interleave(3, 1) * tau / 255
        torch.testing.assert_close(agent.views(batch.obs, batch.mask)[1], expected, rtol=0, atol=0.6 / 255)  # masks are bytes
    agent = make_agent(photo=200, masker=False, shift=0, augmentation="mix")
    batch = make_batch(40)
    o, m = batch.obs.float(), batch.mask.repeat_interleave(3, 1) / 255
    torch.manual_seed(0)
    view = agent.views(batch.obs, batch.mask)[1] * 255
    kinds = torch.stack([(view - tau).abs().amax((1, 2, 3)) < 0.01 for tau in (o, 0.5 * o + 0.5 * 200, m * o + (1 - m) * 200)])
    assert (kinds.sum(0) <= 1).all()  # the others are swaps with patches or seams: test_backgrounds has their shares
    assert (kinds.sum(1) > 0).all()  # some of each


@torch.no_grad()
def test_masker_none_leaves_views_whole():
    agent, batch = make_agent(photo=200, masker=False, shift=0), make_batch()
    assert (rl.mask_stack(None, batch.obs) == 255).all()
    clean, augmented = agent.views(batch.obs, rl.mask_stack(None, batch.obs))
    torch.testing.assert_close(clean, batch.obs / 255)
    torch.testing.assert_close(augmented, (0.5 * batch.obs + 0.5 * 200) / 255)


@torch.no_grad()
def test_each_view_has_its_own_masker():
    """The stored mask, whoever made it, masks the clean view; the agent's masker the augmented one (overlay)."""
    agent, batch = make_agent(), make_batch()

    def views(mask):
        torch.manual_seed(0)
        return agent.views(batch.obs, mask)

    before, other_mask = views(batch.mask), views(255 - batch.mask)
    agent.masker = make_masker(seed=9)
    other_masker = views(batch.mask)
    assert [torch.equal(a, b) for a, b in zip(before, other_mask, strict=True)] == [False, True]
    assert [torch.equal(a, b) for a, b in zip(before, other_masker, strict=True)] == [True, False]


@torch.no_grad()
def test_masks_are_made_frame_by_frame():
    masker, stack = make_masker(), make_batch().obs
    mask = rl.mask_stack(masker, stack)
    assert mask.shape == (B, 3, 84, 84)
    assert mask.dtype == torch.uint8
    assert len(mask.unique()) > 5
    torch.testing.assert_close(mask.float(), 255 * slow_mask(masker, stack.float()), rtol=0, atol=0.51)  # rounded, not cut off
    many = make_batch(40).obs  # 120 frames: in more than one part
    torch.testing.assert_close(rl.mask_stack(masker, many).float(), 255 * slow_mask(masker, many.float()), rtol=0, atol=0.51)
    for i in range(3):
        other = stack.clone()
        other[:, 3 * i : 3 * i + 3] = 255 - other[:, 3 * i : 3 * i + 3]
        changed = (rl.mask_stack(masker, other) != mask).flatten(2).any(2)
        assert changed.tolist() == [[k == i for k in range(3)]] * B


def test_apply_mask_against_loops():
    batch = make_batch()
    product = rl.apply_mask(batch.obs, batch.mask)
    assert product.dtype == torch.float32
    for b in range(B):
        for channel in range(9):
            expected = batch.obs[b, channel].numpy() / 255 * (batch.mask[b, channel // 3].numpy() / 255)
            np.testing.assert_allclose(product[b, channel].numpy(), expected, atol=1e-6)


def test_the_policy_acts_on_what_is_masked():
    """What the mask hides makes no difference to it, what it shows does; the mean is one action, samples differ."""
    agent, batch = make_agent(), make_batch()
    batch.mask[..., :42] = 0

    def act(obs, mask, mean=True):
        return agent.policy(obs, mask, batch.proprio, mean).numpy()

    hidden, shown, expected = batch.obs.clone(), batch.obs.clone(), act(batch.obs, batch.mask)
    hidden[..., :42], shown[..., 42:] = 255 - hidden[..., :42], 255 - shown[..., 42:]
    assert np.array_equal(act(hidden, batch.mask), expected)
    assert (act(shown, batch.mask) != expected).any(1).all() and (act(batch.obs, batch.mask // 2) != expected).any(1).all()
    samples = np.stack([act(batch.obs, batch.mask, mean=False) for _ in range(200)])
    assert samples.std(0).min() > 0 and np.abs(samples).max() <= 1 and (np.sign(samples - expected).mean(0) < 0.4).all()


# ------------------------------------------------------------------------------------------------------------ the shift
def find_offset(original: np.ndarray, shifted: np.ndarray, pad: int) -> tuple[int, int]:
    """The one offset by which (C, H, W) `original`, its edges repeated, became `shifted`."""
    channels, height, width = original.shape
    padded = np.empty((channels, height + 2 * pad, width + 2 * pad), original.dtype)
    for y in range(height + 2 * pad):
        for x in range(width + 2 * pad):
            padded[:, y, x] = original[:, min(max(y - pad, 0), height - 1), min(max(x - pad, 0), width - 1)]
    candidates = [(y, x) for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    found = [(y, x) for y, x in candidates if np.allclose(padded[:, y : y + height, x : x + width], shifted, atol=1e-6)]
    assert len(found) == 1, f"{len(found)} of {len(candidates)} offsets fit"
    return found[0]


def test_random_shift_against_loops():
    g = torch.Generator().manual_seed(0)
    obs, mask = (torch.randint(256, (60, c, 7, 9), generator=g, dtype=torch.uint8) for c in (9, 3))
    torch.manual_seed(0)
    for shift in (lambda: envs.random_shift(obs, mask, pad=2), lambda: envs.random_shift(obs[:, :3], mask[:, :1], pad=2)):
        shifted_obs, shifted_mask = shift()
        channels = shifted_obs.shape[1]
        assert shifted_obs.dtype == shifted_mask.dtype == torch.uint8
        joined = zip(torch.cat([obs[:, :channels], mask[:, : shifted_mask.shape[1]]], 1), torch.cat([shifted_obs, shifted_mask], 1), strict=True)
        offsets = [find_offset(a.numpy(), b.numpy(), 2) for a, b in joined]  # obs and mask moved together, or none would fit
        assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(5))
        assert len(set(offsets)) > 15  # rows and columns on their own, each sample on its own


def test_shift_in_the_update():
    """c = shift(ψ(o) ⊙ o); the augmented view has the same shift, the next observation one of its own."""
    agent, batch = make_agent(photo=200, masker=False, **FROZEN), make_batch(8)
    batch = batch._replace(next_obs=batch.obs, next_mask=batch.mask)
    seen = {}
    agent.encoder.register_forward_pre_hook(lambda module, inputs: seen.update({len(inputs[0]): inputs[0].detach()}))
    update(agent, batch)
    clean, augmented = seen[16].split(8)
    masked = (batch.obs / 255 * batch.mask.repeat_interleave(3, 1) / 255).numpy()
    offsets = [find_offset(o, c, 4) for o, c in zip(masked, clean.numpy(), strict=True)]
    overlaid = ((0.5 * batch.obs + 0.5 * 200) / 255).numpy()
    assert [find_offset(o, a, 4) for o, a in zip(overlaid, augmented.numpy(), strict=True)] == offsets
    next_offsets = [find_offset(o, c, 4) for o, c in zip(masked, seen[8].numpy(), strict=True)]
    assert sum(a != b for a, b in zip(next_offsets, offsets, strict=True)) >= 5
    assert min(len(set(offsets)), len(set(next_offsets))) >= 5


# ------------------------------------------------------------------------------------------------------------ the replay
def transitions(replay: rl.Replay) -> torch.Tensor:
    """The slots of all rows to which a transition leads that is still whole, by a look at each of them."""
    oldest, last, this = replay.history[:, 0], replay.history[:, -2], replay.history[:, -1]
    return ((last < this) & (this < replay.n) & (replay.history[oldest % replay.capacity, -1] == oldest)).nonzero().squeeze(1)


class PlainReplay:
    """Episodes as lists; stacks by plain indexing. Transitions carry their number as their action."""

    def __init__(self, capacity: int, lengths: list[int], seed: int = 0, through_files: bool = False):
        self.rng, self.transitions, self.n = np.random.default_rng(seed), [], 0
        self.replay = None
        for length, terminated in lengths:
            frames = [self.rng.integers(256, size=(3, 4, 5), dtype=np.uint8) for _ in range(length + 1)]
            masks = [self.rng.integers(256, size=(4, 5), dtype=np.uint8) for _ in range(length + 1)]
            proprio = self.rng.standard_normal((length + 1, 2)).astype(np.float32)
            stacks = [np.concatenate([frames[max(t + k, 0)] for k in (-2, -1, 0)]) for t in range(length + 1)]
            mask_stacks = [np.stack([masks[max(t + k, 0)] for k in (-2, -1, 0)]) for t in range(length + 1)]
            seen = [[torch.from_numpy(part)[None] for part in parts] for parts in zip(stacks, mask_stacks, proprio, strict=True)]
            if self.replay is None:
                self.replay = rl.Replay(1, capacity, (9, 4, 5), 2, 1, torch.device("cpu"))
            self.replay.add_first(np.array([0]), *seen[0])
            start, self.n = self.n, self.n + 1
            self.check(16)
            for t in range(length):
                done, reward = terminated and t == length - 1, float(self.rng.standard_normal())
                action = np.array([[len(self.transitions)]], np.float32)
                self.replay.add_step(action, np.array([reward]), np.array([done]), *seen[t + 1])
                self.n += 1
                oldest, number = start + max(t - 2, 0), start + t  # the oldest frame in its stack; its own
                rest = (stacks[t], mask_stacks[t], proprio[t], reward, done, stacks[t + 1], mask_stacks[t + 1], proprio[t + 1])
                self.transitions.append((oldest, number, *rest))
                self.check(16)
                if through_files and self.n % 3 == 0:
                    self.pass_through_files(capacity)

    def pass_through_files(self, capacity: int) -> None:
        """From here on, a replay that was put together from parts."""
        self.parts = [*getattr(self, "parts", []), self.replay.written_since(getattr(self, "before", 0))]
        before, self.before, self.replay = self.replay, self.replay.n, rl.Replay(1, capacity, (9, 4, 5), 2, 1, torch.device("cpu"))
        for part in self.parts:
            self.replay.restore(part)
        assert torch.equal(transitions(self.replay), transitions(before)) and self.replay.n == before.n
        self.replay.newest = before.newest  # files are written where an episode ends; here in its middle as well

    def check(self, samples: int) -> set[int]:
        """Sample; compare every field; return which transitions were seen."""
        if not self.transitions:
            return set()
        batch = self.replay.sample(samples)
        assert batch.obs.dtype == batch.next_obs.dtype == batch.mask.dtype == batch.next_mask.dtype == torch.uint8
        assert batch.obs.shape == (samples, 9, 4, 5)
        assert batch.mask.shape == (samples, 3, 4, 5)
        assert batch.reward.shape == batch.done.shape == (samples,)
        for i, index in enumerate(batch.action[:, 0].int().tolist()):
            oldest, _, obs, mask, proprio, reward, done, next_obs, next_mask, next_proprio = self.transitions[index]
            assert oldest >= self.n - self.replay.capacity, "its frames are overwritten"
            for got, expected in ((batch.obs, obs), (batch.mask, mask), (batch.proprio, proprio), (batch.reward, np.float32(reward))):
                np.testing.assert_array_equal(got[i].numpy(), expected)
            for got, expected in ((batch.next_obs, next_obs), (batch.next_mask, next_mask), (batch.next_proprio, next_proprio)):
                np.testing.assert_array_equal(got[i].numpy(), expected)
            assert batch.done[i].item() == float(done)
        return set(batch.action[:, 0].int().tolist())


EPISODES = [(5, False), (1, True), (2, False), (7, True), (1, False), (4, True), (12, False), (3, True), (6, False)]  # (length, terminated)


@pytest.mark.parametrize("through_files", [False, True])
@pytest.mark.parametrize("capacity", [17, 20, 31, 100])
def test_replay_against_lists(capacity, through_files):
    torch.manual_seed(0)
    plain = PlainReplay(capacity, EPISODES, through_files=through_files)
    frames = sum(length + 1 for length, _ in EPISODES)
    assert plain.replay.n == frames  # each once, and one more per episode than steps
    assert plain.replay.frames.shape == (capacity, 3, 4, 5)
    assert plain.replay.frames.dtype == plain.replay.masks.dtype == torch.uint8
    expected = {i for i, (oldest, *_) in enumerate(plain.transitions) if oldest >= frames - capacity}
    assert plain.check(2000) == expected and len(expected) > 6  # nothing is lost but what is overwritten
    counts = np.bincount(plain.replay.sample(20_000).action[:, 0].int().numpy())[min(expected) :]
    assert len(counts) == len(expected) and np.abs(counts * len(expected) / 20_000 - 1).max() < 0.25  # all alike


def test_a_replay_without_its_beginning():
    """Of what was written, restored from its second part on, into a longer ring: no transition reaches back behind that."""
    written, restored = (rl.Replay(2, capacity, (9, 4, 5), 1, 1, torch.device("cpu")) for capacity in (50, 100))

    def seen(n: int) -> list[torch.Tensor]:
        return [torch.zeros(n, *shape, dtype=torch.uint8) for shape in ((9, 4, 5), (3, 4, 5))] + [torch.zeros(n, 1)]

    written.add_first(np.arange(2), *seen(2))
    for t in range(10):
        if t == 5:
            written.add_first(np.array([1]), *seen(1))
        written.add_step(np.full((2, 1), t, np.float32), np.ones(2), np.zeros(2, bool), *seen(2))
    restored.restore(written.written_since(12))  # from the second one's new beginning; the first one is in the middle of its episode
    assert restored.n == written.n == 23 and len(transitions(written)) == 20
    assert (restored.history[transitions(restored)] >= 12).all() and len(transitions(restored)) == 5 + 2


def test_vector_environments_leave_transitions_only():
    """Episodes that end at different times, their resets the loop's: as many transitions as steps were made, none across episodes or environments."""
    lengths, ends, device = (1, 3, 5), ("truncated", "terminated", "truncated"), torch.device("cpu")
    makers = [functools.partial(Counting, *row) for row in zip(lengths, ends, strict=True)]
    vec_env = gym.vector.AsyncVectorEnv(makers, context="spawn", autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    replay, over = rl.Replay(3, 100, (9, 4, 5), 1, 1, device), np.ones(3, bool)
    for step in range(20):
        if over.any():
            first = rl.observe(functools.partial(rl.mask_stack, None), vec_env.reset(options={"reset_mask": over})[0], device)
            replay.add_first(np.flatnonzero(over), *(part[over] for part in first))
        actions = np.array([[step], [step + 100], [step + 200]], np.float32)
        obs, rewards, terminated, truncated, _ = vec_env.step(actions)
        replay.add_step(actions, rewards, terminated, *rl.observe(functools.partial(rl.mask_stack, None), obs, device))
        over = terminated | truncated
    vec_env.close()
    assert replay.n == sum(20 + -(-20 // length) for length in lengths) == len(transitions(replay)) + 20 + 7 + 4
    batch = replay.sample(2000)
    assert batch.obs.shape == (2000, 9, 4, 5) and len(set(batch.action[:, 0].tolist())) == 60
    for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        mine = batch.action[:, 0] // 100 == i
        assert 500 < mine.sum() < 850
        t, episode = batch.action[mine, 0] % 100 % length, batch.action[mine, 0] % 100 // length
        assert torch.equal(batch.reward[mine], t + 1)
        assert torch.equal(batch.proprio[mine, 0], t) and torch.equal(batch.next_proprio[mine, 0], t + 1)
        assert torch.equal(batch.done[mine], (t == length - 1).float() * (end == "terminated"))
        for k in range(3):
            assert torch.equal(batch.obs[mine][:, 3 * k, 0, 0], 8 * episode + (t + k - 2).clamp(min=0))
            assert torch.equal(batch.next_obs[mine][:, 3 * k, 0, 0], 8 * episode + (t + 1 + k - 2).clamp(min=0))


@pytest.fixture(scope="module", params=["overlap", "textbook"])
def looped(request, tmp_path_factory):
    """Two episodes of each of two environments, the second with updates: the run, its replay, what each batch was drawn from, and who acted how. The
    second environment's time limit is said to be a termination: no task at hand has any."""
    cwd, asked, acted, compiled, updates, evaluated = tmp_path_factory.mktemp("looped"), [], [], [], [], []
    textbook = request.param == "textbook"  # and, as if compiled, to whole steps of both
    for seed, name in enumerate(("student", "teacher")):
        checkpoint = {"env_id": "cartpole_swingup", "image_size": 84, "prompt": "the pole", "state_dict": make_masker(seed).state_dict()}
        envs.save_tensors(cwd / f"{name}.pt", checkpoint)
    sample, policy, step_wait = rl.Replay.sample, rl.Agent.policy, gym.vector.AsyncVectorEnv.step_wait

    def terminate(vec_env: gym.vector.AsyncVectorEnv, timeout: float) -> tuple:
        obs, rewards, _, ended, info = step_wait(vec_env, timeout)
        return obs, rewards, ended & [False, True], ended & [True, False], info

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(gym.vector.AsyncVectorEnv, "step_wait", terminate)
        patch.setattr(rl.Replay, "sample", lambda self, n: (asked.append((n, self, self.n)), sample(self, n))[1])
        patch.setattr(rl, "evaluate", lambda *given: (evaluated.append(given[3]), {"eval/train/return_mean": 0.0})[1])
        patch.setattr(torch, "compile", lambda f, **how: (compiled.append(how), lambda batch: (updates.append(batch), f(batch))[1])[1])
        patch.setattr(rl.Agent, "policy", lambda *seen, mean: (acted.append((policy(*seen, mean=mean), mean)), acted[-1][0])[1])
        args = {"masker_path": ".", "clean_masker": "teacher", "eval_settings": ("train",), "overlay_images": 20, "num_envs": 2, "eval_every": 25}
        args |= {"total_timesteps": 79 if textbook else 80, "learning_starts": 40, "action_repeat": 50, "overlap": not textbook, "compile": textbook}
        rl.main(rl.Args(env="cartpole_swingup", **SMALL | args))
    assert evaluated == [2] * 4 and compiled == [{"options": {"fallback_random": True}}] * textbook and len(updates) == 40 * textbook
    return next(cwd.glob("runs/*")), asked[0][1], [n for size, _, n in asked if size == SMALL["batch_size"]], acted, request.param


def test_the_loop_against_two_simulations(looped, make):
    """Replay holds what each environment, with a seed of its own, makes of its actions, with the teacher's masks; the table the sums of rewards."""
    run, replay, _, _, _ = looped
    figures = json.loads((run / "metrics.json").read_text())
    assert (figures["train/steps"], figures["train/updates"]) == (80, 40) and run.name.endswith(f"-{os.getpid()}")
    with (run / "returns.csv").open(newline="") as file:
        table = [(row["step"], row["episode"], row["env"], pytest.approx(float(row["return"]), abs=2e-3)) for row in csv.DictReader(file)]
    for i in range(2):
        env, row, teacher = make("cartpole_swingup", "train", 1 + 100_000 * i, action_repeat=50), i, make_masker(1)
        for episode in range(2):
            (obs, _), total = env.reset(), 0.0
            for t in range(21):
                if t:
                    obs, reward, *_ = env.step(replay.actions[row].numpy())
                    total += reward
                    assert replay.rewards[row].item() == pytest.approx(reward) and replay.dones[row] == (i == 1 and t == 20)
                frame = torch.from_numpy(obs["pixels"][-3:])
                assert torch.equal(replay.frames[row], frame) and replay.history[row].tolist() == [row - 2 * min(k, t) for k in (3, 2, 1, 0)]
                assert (replay.masks[row].int() - rl.mask_stack(teacher, frame[None])[0, 0].int()).abs().max() <= 1
                row += 2
            assert table[2 * episode + i] == (str(40 + 40 * episode), str(episode), str(i), total)
    assert len(table) == 4 and replay.n == 84 and len(transitions(replay)) == 80
    assert replay.capacity == 80 + 80 // 20 + 2 * 8  # steps, first frames, and some to spare


def test_who_acts_and_what_is_learned_from(looped):
    """At first chance, then the policy's samples; two updates a step, on a replay that lacks this step, or, in the textbook's order, has it."""
    _, replay, learned_from, acted, order = looped
    assert [mean for _, mean in acted] == [False] * 20
    first = gym.vector.utils.batch_space(gym.spaces.Box(-1, 1, (1,), np.float32), 2)
    first.seed(1)
    actions = replay.actions[:84].view(42, 2, 1)
    np.testing.assert_array_equal(actions[1:21], np.stack([first.sample() for _ in range(20)]))
    np.testing.assert_array_equal(actions[22:], np.stack([action for action, _ in acted]))  # 0 and 21: episodes' first frames
    steps = range(20, 40) if order == "overlap" else range(21, 41)
    assert learned_from == [2 * (k + 2) for k in steps for _ in range(2)]  # rows, after so many steps and the first frames of two episodes


def test_replay_keeps_what_it_is_asked_to(tmp_path, monkeypatch):
    """Of 130 steps in seven episodes, 137 frames, the newest hundred."""
    monkeypatch.chdir(tmp_path)
    sampled, sample = [], rl.Replay.sample
    monkeypatch.setattr(rl.Replay, "sample", lambda self, n: (sampled.append(self), sample(self, n))[1])
    monkeypatch.setattr(rl, "evaluate", lambda *_: {})
    args = {"masker": "none", "critic_views": "clean", "actor_views": "clean", "eval_settings": ("train",), "replay_size": 100}
    args |= {"total_timesteps": 130, "learning_starts": 129, "updates_per_step": 0.1, "action_repeat": 50}
    rl.main(rl.Args(env="cartpole_swingup", **SMALL | args))
    replay = sampled[-1]
    assert replay.capacity == len(replay.frames) == 100 and replay.n == 137
    assert sorted(replay.history[:, -1].tolist()) == list(range(37, 137))
    assert sorted(row[-1] for row in replay.history.tolist() if row[0] == row[-1]) == [n for n in range(37, 137) if n % 21 == 0]


def test_what_is_observed_is_masked():
    """By the masker that is handed over, frame by frame: what acts, and what lies in replay."""
    masker, rng, device = make_masker(), np.random.default_rng(5), torch.device("cpu")
    looks = [{"pixels": rng.integers(0, 256, (2, 9, 84, 84), np.uint8), "proprio": np.zeros((2, P), np.float32)} for _ in range(2)]
    replay, seen = rl.Replay(2, 20, (9, 84, 84), P, A, device), [rl.observe(functools.partial(rl.mask_stack, masker), look, device) for look in looks]
    replay.add_first(np.arange(2), *seen[0])
    replay.add_step(np.zeros((2, A), np.float32), np.ones(2), np.zeros(2, bool), *seen[1])
    for (pixels, mask, _), look in zip(seen, looks, strict=True):
        assert np.array_equal(pixels, look["pixels"]) and torch.equal(mask, rl.mask_stack(masker, pixels)) and 0 < mask.float().mean() < 255
    expected = torch.cat([rl.mask_stack(masker, torch.from_numpy(look["pixels"][:, -3:])) for look in looks]).squeeze(1).int()
    assert (replay.masks[:4].int() - expected).abs().max() <= 1  # a byte rounded the other way
    assert (expected[0] - expected[1]).abs().max() > 1


# ------------------------------------------------------------------------------------------------------------ speed changes nothing
def test_every_way_to_compute_gives_the_same_losses():
    """Over 200 batches, from the same weights. fp32: contiguous and channels_last layouts, masks made at replay's entry and when sampled; bf16."""
    agents = {name: make_agent(precision=name[:4], tau=0.0, **FROZEN) for name in ("fp32", "fp32 contiguous", "bf16")}
    for name, agent in agents.items():
        agent.to(memory_format=torch.contiguous_format if "contiguous" in name else torch.channels_last)
    losses = {name: [] for name in (*agents, "fp32 sampled")}
    for seed in range(200):
        batch = make_batch(1, seed=seed)
        masks = (rl.mask_stack(agents["fp32"].masker, stack) for stack in (batch.obs, batch.next_obs))  # together, when sampled
        batch = batch._replace(mask=next(masks), next_mask=next(masks))
        losses["fp32 sampled"].append(update(agents["fp32"], batch, seed))
        for stack, mask in ((batch.obs, batch.mask), (batch.next_obs, batch.next_mask)):  # frame by frame, at entry
            mask[:] = torch.cat([rl.mask_stack(agents["fp32"].masker, frame) for frame in stack.split(3, 1)], 1)
        for name, agent in agents.items():
            losses[name].append(update(agent, batch, seed))
    for key in ("losses/qf_loss", "losses/actor_loss", "losses/alpha_loss"):
        expected, contiguous, bf16, sampled = (np.array([row[key] for row in rows]) for rows in losses.values())
        size = np.abs(expected).mean()  # what a loss near zero is measured by
        for got in (contiguous, sampled):
            # In a few batches of this one sample a byte of its masks is rounded the other way, which shows; in a batch of 128 it would not.
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=5e-5 * size)
            assert np.isclose(got, expected, rtol=1e-5, atol=1e-5 * size).mean() > 0.97
            assert abs(got.sum() - expected.sum()) < 1e-5 * np.abs(expected).sum()
        assert np.abs(bf16 - expected).mean() < 0.03 * size  # of one sample; of all two hundred as one batch 2%:
        assert abs(bf16.mean() - expected.mean()) < 0.02 * size


@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
def test_compiled_losses():
    """--compile, as the script compiles: three updates that learn, from the same weights and random numbers."""
    eager, compiled = (make_agent(augmentation="mix") for _ in range(2))
    _, _, compiled.update = rl.faster(compiled, None, rl.Args(compile=True), torch.device("cpu"))
    for seed in range(3):
        expected, got = (update(agent, make_batch(4, seed=seed), seed) for agent in (eager, compiled))
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ maskers
def test_the_three_maskers_are_one_network():
    """Each script holds the network, so that each can be read on its own; they must not drift apart."""
    assert inspect.signature(rl.Masker) == inspect.signature(phase1.Masker) == inspect.signature(phase2.Masker)
    masker, frames = make_masker(), torch.randint(256, (2, 3, 84, 84)).float()
    for module in (phase1, phase2):
        other = module.Masker()
        other.load_state_dict(masker.state_dict())
        assert torch.equal(other(frames), masker(frames))


def test_masker_is_small():
    masker, flops = make_masker(), []

    def count(module, inputs, output):
        flops.append(output[0].numel() * module.weight[0].numel())

    for module in masker.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    assert masker(torch.zeros(1, 3, 84, 84)).shape == (1, 84, 84)
    assert 0 < sum(flops) <= 50e6


def test_masker_loss():
    ones, white = torch.ones(1, 2, 2), torch.full((1, 3, 2, 2), 255)
    bce, reconstruction = phase1.masker_loss(torch.zeros(1, 2, 2), ones, white, 1.0)
    assert bce.item() == pytest.approx(math.log(2))
    assert reconstruction.item() == pytest.approx(0.25)
    assert phase1.masker_loss(torch.zeros(1, 2, 2), ones, white, 0.0)[1].item() == 0
    rng = np.random.default_rng(0)
    logits, target, frames = rng.standard_normal((2, 4, 4)), rng.integers(0, 2, (2, 4, 4)), rng.integers(0, 256, (2, 3, 4, 4))
    bce, reconstruction = phase1.masker_loss(*(torch.from_numpy(x) for x in (logits, target.astype(float), frames)), 0.5)
    p = 1 / (1 + np.exp(-logits))
    assert bce.item() == pytest.approx(-np.mean(np.log(np.where(target == 1, p, 1 - p))))
    squares = [((p[n, y, x] - target[n, y, x]) * frames[n, c, y, x] / 255) ** 2 for n, c, y, x in np.ndindex(2, 3, 4, 4)]
    assert reconstruction.item() == pytest.approx(np.mean(squares))


def test_load_teacher(tmp_path):
    masker, path = make_masker(), tmp_path / "teacher.pt"
    envs.save_tensors(path, {"env_id": "hammer", "image_size": 84, "prompt": "the hammer", "state_dict": masker.state_dict()})
    teacher, checkpoint = phase2.load_teacher(path, "hammer")
    assert same(weights(teacher), weights(masker))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert checkpoint["prompt"] == "the hammer"
    with pytest.raises(UserError, match="made for hammer at 84 pixels, not for door"):
        phase2.load_teacher(path, "door")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a masker"):
        phase2.load_teacher(path, "hammer")
    with pytest.raises(UserError, match="no teacher there"):
        phase2.load_teacher(tmp_path / "nowhere.pt", "hammer")


@pytest.mark.parametrize("flags", [{"augmentation": "overlay"}, {"augmentation": "swap"}, {"augmentation": "mix"}, {"actor_judge": "own"}])
def test_replay_and_update_stay_on_their_device_and_wait_for_nothing(monkeypatch, flags):
    """On torch's meta device, which has no numbers: to look at a value (and wait for a GPU) is an error, and so is most arithmetic with the CPU's."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no meta
    device = torch.device("meta")
    agent = make_agent(**flags)
    agent.photos = agent.photos.to(device)
    agent.to(device)
    obs, replay = {"pixels": np.zeros((2, 9, 84, 84), np.uint8), "proprio": np.zeros((2, P), np.float32)}, rl.Replay(2, 20, (9, 84, 84), P, A, device)
    replay.add_first(np.arange(2), *rl.observe(functools.partial(rl.mask_stack, agent.masker), obs, device))
    for _ in range(30):
        replay.add_step(
            np.zeros((2, A), np.float32), np.ones(2), np.zeros(2, bool), *rl.observe(functools.partial(rl.mask_stack, agent.masker), obs, device)
        )
    batch = replay.sample(4)
    values = [*batch, *agent.update(batch).values()]
    assert len(values) == 15 and all(value.device == device for value in values)
    with pytest.raises(RuntimeError, match="meta"):
        values[-1].item()


def test_mix_bears_a_gpus_autocast(monkeypatch):
    """There sums of bf16 are fp32, and lerp takes one kind only."""
    total = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, *args, **kwargs: total(self.float(), *args, **kwargs))
    obs, photos = torch.rand(20, 9, 84, 84).bfloat16() * 255, torch.randint(256, (5, 3, 128, 128), dtype=torch.uint8)
    augmented = envs.augment(obs, torch.rand(20, 3, 84, 84), photos, "mix")
    assert augmented.dtype == torch.bfloat16 and augmented.shape == obs.shape


@pytest.mark.filterwarnings("ignore:This module is instantiated on a machine without CUDA")
def test_graphed_update_is_the_update():
    """Where there is no GPU, tensordict passes through: what can be tested here is that every field of a batch reaches the update."""
    from tensordict.nn import CudaGraphModule

    agents, clean_masker, batch = [make_agent() for _ in range(2)], make_masker(7), make_batch(4)
    mask, policy, graphed = faster = rl.faster(agents[1], clean_masker, rl.Args(), torch.device("cuda"))
    assert all(isinstance(function, CudaGraphModule) for function in faster)
    for update in (agents[0].update, graphed):
        torch.manual_seed(5)
        metrics = update(batch)
        assert {"losses/qf_loss", "losses/actor_loss"} <= metrics.keys()
    assert same(weights(agents[0]), weights(agents[1]))
    assert torch.equal(mask(batch.obs), rl.mask_stack(clean_masker, batch.obs))
    actions = []
    for act in (policy, functools.partial(agents[1].policy, mean=False)):
        torch.manual_seed(6)
        actions.append(act(batch.obs, batch.mask, batch.proprio))
    assert torch.equal(*actions)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full"), RuntimeError("what torch.save raises")])
def test_files_are_whole_or_not_there(tmp_path, error):
    path = tmp_path / "array.npz"
    envs.write_whole(path, lambda p: np.savez(p, a=np.arange(3)))
    assert [p.name for p in tmp_path.iterdir()] == ["array.npz"]  # not under another name, and no leftovers

    def half(temporary):
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        envs.write_whole(path, half)
    with pytest.raises(OSError, match=r"No such file or directory: '.*/nowhere/array\.npz'"):
        envs.write_whole(tmp_path / "nowhere/array.npz", lambda p: p.write_bytes(b""))
    assert np.load(path)["a"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["array.npz"]


def test_a_flipped_bit_is_found(tmp_path):
    """torch.load would hand out the damaged weights: it does not compare the archive's checksums."""
    path = tmp_path / "weights.pt"
    envs.save_tensors(path, {"weights": torch.arange(1000.0)})
    assert torch.equal(envs.load_tensors(path)["weights"], torch.arange(1000.0))
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor(500.0).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], torch.arange(1000.0))
    with pytest.raises(ValueError, match="damaged"):
        envs.load_tensors(path)
    torch.save({"weights": 1, "format": 1}, path)
    with pytest.raises(ValueError, match=f"its format is 1, of TaLaS None; here it is {envs.FORMAT}"):
        envs.load_tensors(path)


def make_run(seed: int, capacity: int = 40) -> tuple[rl.Agent, rl.Replay, gym.Space]:
    agent, space = make_agent(), gym.spaces.Box(-1, 1, (1, A))
    torch.manual_seed(seed)
    space.seed(seed)
    for module in (agent.encoder, agent.actor, agent.critic):  # one masker, as a run and its continuation have
        jitter(module, 0.01)
    return agent, rl.Replay(1, capacity, (9, 84, 84), P, A, torch.device("cpu")), space


def live(agent: rl.Agent, replay: rl.Replay, space: gym.Space, episodes: int) -> None:
    """Episodes of ten steps and random frames, an update after each."""
    for _ in range(episodes):
        for t in range(11):
            seen = torch.randint(256, (1, 9, 84, 84), dtype=torch.uint8), torch.randint(256, (1, 3, 84, 84), dtype=torch.uint8), torch.rand(1, P)
            if t:
                replay.add_step(space.sample(), torch.rand(1).numpy(), np.zeros(1, bool), *seen)
            else:
                replay.add_first(np.array([0]), *seen)
        agent.update(replay.sample(4))


@pytest.mark.parametrize("damage", [None, "newest", "replay", "missing", "content", "all"])
def test_a_run_goes_on_from_its_newest_good_state(tmp_path, capsys, damage):
    """Weights, optimisers, replay and chance, bit for bit; a damaged state is named, and the one before it used; two generations are kept."""
    run, progress = make_run(1), rl.Progress()
    for step in (50, 60, 70, 80):  # the ring of 40 frames goes round
        live(*run, 5 if step == 50 else 1)
        progress = rl.save_state(tmp_path, dataclasses.replace(progress, step=step), *run, progress)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if "state" in name] == ["0000000070.state.pt", "0000000080.state.pt"]
    assert [name[7:10] for name in names if "replay" in name] == ["050", "060", "070", "080"]
    if damage in ("newest", "all"):
        path = tmp_path / "0000000080.state.pt"
        path.write_bytes(path.read_bytes()[: -(path.stat().st_size // 3)])
    if damage == "replay":
        data = bytearray((tmp_path / "0000000080.replay.pt").read_bytes())
        data[len(data) // 2] ^= 4
        (tmp_path / "0000000080.replay.pt").write_bytes(data)
    if damage == "missing":
        (tmp_path / "0000000080.replay.pt").unlink()
    if damage == "content":  # it can be read, replay and all, but is of another agent
        path = tmp_path / "0000000080.state.pt"
        envs.save_tensors(path, envs.load_tensors(path) | {"agent": {}})
    if damage == "all":
        (tmp_path / "0000000070.state.pt").write_bytes(b"")
        with pytest.raises(UserError, match="none of its checkpoints can be used"):
            rl.load_state(tmp_path, *make_run(2))
        return

    expected = make_run(1)
    live(*expected, 11 if damage is None else 10)  # in one go, without a save
    other = make_run(2)
    loaded = rl.load_state(tmp_path, *other)
    out = capsys.readouterr().out
    assert (loaded.step, "0000000080" in out) == ((80, False) if damage is None else (70, True))
    live(*other, 3)
    assert same(weights(other[0]), weights(expected[0]))
    assert torch.equal(other[1].history, expected[1].history) and other[1].n == expected[1].n
    assert torch.equal(other[1].frames, expected[1].frames)
    progress = rl.save_state(tmp_path, dataclasses.replace(loaded, step=loaded.step + 30), *other, loaded)
    left = sorted(int(path.name[:10]) for path in tmp_path.glob("*.state.pt"))
    assert left == [loaded.step, loaded.step + 30]  # what was damaged is no generation
    live(*other, 1)
    rl.save_state(tmp_path, dataclasses.replace(progress, step=loaded.step + 40), *other, progress)
    assert not (tmp_path / "0000000050.replay.pt").exists()  # the ring has gone round since, in both states
    fresh = make_run(3)
    assert rl.load_state(tmp_path, *fresh).step == loaded.step + 40
    assert torch.equal(fresh[1].frames, other[1].frames) and torch.equal(fresh[1].history, other[1].history)


def test_a_state_that_cannot_be_used_leaves_nothing_in_replay(tmp_path):
    """Its part of replay was read before its weights turned out to be another agent's."""
    run, before = make_run(1, capacity=200), rl.Progress()
    for step in (50, 60):
        live(*run, 5 if step == 50 else 1)
        before = rl.save_state(tmp_path, rl.Progress(step=step), *run, before)
    path = tmp_path / "0000000060.state.pt"
    state = envs.load_tensors(path)
    envs.save_tensors(path, state | {"agent": {key: value for key, value in state["agent"].items() if key.startswith("masker.")}})
    other = make_run(2, capacity=200)
    assert rl.load_state(tmp_path, *other).step == 50
    assert other[1].n == 55 and transitions(other[1]).tolist() == [i for i in range(55) if i % 11 != 0]


@pytest.mark.parametrize("capacity", [30, 52, 55, 60])
def test_a_replay_that_is_shorter_than_what_a_checkpoint_adds(tmp_path, capacity):
    """Fifty steps, fifty-five rows a checkpoint: what fills the ring by itself needs nothing that came before."""
    run, before = make_run(1, capacity), rl.Progress()
    for step in (50, 100, 150):
        live(*run, 5)
        before = rl.save_state(tmp_path, rl.Progress(step=step), *run, before)
    other = make_run(2, capacity)
    assert rl.load_state(tmp_path, *other).step == 150
    assert other[1].n == 165 and all(torch.equal(getattr(other[1], key), getattr(run[1], key)) for key in other[1].STORES)
    assert torch.equal(transitions(other[1]), transitions(run[1])) and len(transitions(run[1])) > 20
    (tmp_path / "0000000150.state.pt").write_bytes(b"")  # the state before needs a part that the newest does not
    assert rl.load_state(tmp_path, *make_run(3, capacity)).step == 100


def test_a_state_takes_no_other_replay(tmp_path):
    """Two environments: a newer part, of a state that was never finished, ends elsewhere."""
    run, other = make_run(1, capacity=200), make_run(2, capacity=200)
    live(*run, 3)
    rl.save_state(tmp_path, rl.Progress(step=50), *run, rl.Progress())
    live(*other, 4)
    envs.save_tensors(tmp_path / "0000000050.replay.pt", other[1].written_since(0))
    with pytest.raises(UserError, match="none of its checkpoints can be used"):
        rl.load_state(tmp_path, *make_run(3, capacity=200))


def test_replay_that_is_not_whole_is_not_used(tmp_path):
    """A part is lost from the middle; or there is one only, of a checkpoint that was never finished; it goes with the next."""
    run, before = make_run(1, capacity=200), rl.Progress()
    for step in (50, 60, 70):
        live(*run, 5 if step == 50 else 1)
        before = rl.save_state(tmp_path, rl.Progress(step=step), *run, before)
    (tmp_path / "0000000060.replay.pt").unlink()
    with pytest.raises(UserError, match="none of its checkpoints can be used"):
        rl.load_state(tmp_path, *make_run(2, capacity=200))
    for path in tmp_path.glob("*.state.pt"):
        path.unlink()
    again = make_run(2, capacity=200)
    with pytest.raises(UserError, match="none of its checkpoints can be used"):
        rl.load_state(tmp_path, *again)
    live(*again, 1)
    rl.save_state(tmp_path, rl.Progress(step=10), *again, rl.Progress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000010.replay.pt", "0000000010.state.pt"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a crash of the machine may leave the name, and nothing behind it. It says whose it is."""
    done, calls = [], {"fsync": os.fsync, "replace": os.replace}
    for name in calls:
        monkeypatch.setattr(os, name, lambda *args, name=name: (done.append(name), calls[name](*args))[1])
    envs.save_tensors(tmp_path / "a.pt", {})
    assert done == ["fsync", "replace"]
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"format": envs.FORMAT, "version": envs.VERSION}


def test_what_a_killed_process_was_writing_goes(tmp_path):
    (tmp_path / "resume").mkdir()
    for name in (".4711-checkpoint.pt", "resume/.4711-0000000020.state.pt"):
        (tmp_path / name).touch()
    with contextlib.ExitStack() as cleanup:
        rl.open_run(tmp_path, rl.Args(), cleanup)
        assert {path.name for path in tmp_path.rglob("*")} == {"resume", "lock", "args.json"}


def test_auto_is_the_newest(tmp_path, monkeypatch):
    """Of the runs that were given these arguments and can be read, whatever may change from one start to the next."""
    monkeypatch.chdir(tmp_path)
    typed = ["--env=hammer", "--checkpoint-every=100"]
    for stamp in ("20260101-000000-1", "20260102-000000-1", "20260103-000000-1"):
        folder = Path(f"runs/hammer__talas__1__{stamp}")
        folder.mkdir(parents=True)
        envs.write_json(folder / "args.json", dataclasses.asdict(rl.read_args(typed)[0]))
    (folder / "args.json").write_text("{")
    newest = Path("runs/hammer__talas__1__20260102-000000-1/args.json")
    then = json.loads(newest.read_text())
    del then["layer_norm"]  # a flag that came later, ours or a fork's
    envs.write_json(newest, then)
    assert rl.read_args([*typed, "--resume=auto", "--layer-norm"]) == (rl.Args("hammer", checkpoint_every=100, resume="auto", layer_norm=True), None)
    for other in ("--checkpoint-every=7", "--device=cpu", "--compile", "--no-cudagraphs"):
        assert rl.read_args([*typed, "--resume=auto", other])[1].name.endswith("20260102-000000-1")


def test_settings_of(monkeypatch):
    monkeypatch.delenv("TALAS_DISTRACTORS", raising=False)
    assert rl.settings_of(None, None) == ("train", "procedural") and rl.settings_of(("train",), "media") == ("train",)
    assert rl.settings_of(None, "media") == ("train", "video_easy", "video_hard")


def test_torch_is_set_up_as_asked():
    for asked in (False, True):
        envs.set_up_torch("cpu", 7, asked)
        assert torch.are_deterministic_algorithms_enabled() == asked and torch.initial_seed() == 7
    assert not torch.utils.deterministic.fill_uninitialized_memory


# ------------------------------------------------------------------------------------------------------------ evaluation
class Seen(Exception):
    pass


@pytest.mark.parametrize("module", [rl, phase1])
def test_pools_processes_are_workers(monkeypatch, tmp_path, module):
    """They end with the process that started them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TALAS_DISTRACTORS", raising=False)

    def pool(processes, context, *initializer):
        raise Seen(*initializer)

    monkeypatch.setattr(module, "ProcessPoolExecutor", pool)
    with pytest.raises(Seen) as seen:
        list(rl.play_all(Path("x"), rl.Args(), [("train", 0)])) if module is rl else phase1.main(
            phase1.Args(env="cartpole_swingup", overlay_images=10)
        )
    assert seen.value.args == (envs.start_worker,)


def test_an_episode_is_played_and_measured(make):
    """Played once more by hand: the return; IoU at every fifth step, of pixels that the newest mask has above a half; the film, of what was seen."""
    committed = next((Path(__file__).parents[1] / "results/agents").glob("cartpole*.pt"))
    args = rl.Args("cartpole_swingup", action_repeat=90, precision="fp32")  # eleven steps
    rl.make_env_once("cartpole_swingup", "procedural", args.seed + 10_000, **rl.env_options(args)).videos_skipped = 2  # the one that it plays in
    total, success, ious, film, skipped = rl.play(committed, args, ("procedural", 0))
    agent, env = rl.load_agent(committed, "fp32")[0], make("cartpole_swingup", "procedural", args.seed + 10_000, action_repeat=90)
    (obs, _), rewards, true, step, over = env.reset(options={"episode": 0}), [], [], 0, False
    while not over:
        frames = torch.from_numpy(obs["pixels"]).unflatten(0, (3, 3)).float()
        with torch.no_grad():
            masks = (agent.masker(frames).sigmoid() * 255).round()
        action = agent.policy(torch.from_numpy(obs["pixels"])[None], masks[None].byte(), torch.zeros(1, 0), mean=True)[0]
        newest, mask = frames[-1].permute(1, 2, 0).numpy(), masks[-1].numpy()
        shown = np.split(film[step].astype(float), 3, 1)
        for panel, expected in zip(shown, (newest, np.stack([mask] * 3, 2), newest * mask[..., None] / 255), strict=True):
            assert np.abs(panel - expected).max() < 1  # of 255, cut to a byte
        if step % 5 == 0:
            drawn, named = mask > 127, env.segment("the cart and the pole")
            true.append([envs.mask_iou(drawn[None], named[None], tolerance)[0] for tolerance in (0, 1)])
        obs, reward, _, over, _ = env.step(action.numpy())
        rewards.append(reward)
        step += 1
    assert step == len(film) == 11 and total == pytest.approx(sum(rewards)) and math.isnan(success) and skipped == 2
    assert np.allclose(ious, true) and 0.3 < np.mean(true) < 0.99


def test_an_episode_that_does_not_end(monkeypatch):
    """A lost process, and no full disk: that would be an OSError."""
    monkeypatch.setattr(rl, "PATIENCE", 0.05)
    with pytest.raises(RuntimeError, match="an episode is not over after"), rl.saving("an evaluation"):
        list(rl.play_all(Path("nowhere.pt"), rl.Args(env="cartpole_swingup"), [("train", 0)]))
    for process in multiprocessing.active_children():
        process.kill()


def test_a_lost_video_marks_the_evaluation(monkeypatch):
    monkeypatch.setattr(rl, "play_all", lambda path, args, jobs: [(float(i), math.nan, [[0.5, 0.6]], [], 3) for i, _ in enumerate(jobs)])
    figures = rl.evaluate(Path("x"), rl.Args(), ("train", "video_hard"), 2, None)
    assert figures["eval/video_hard/videos_skipped"] == 3 and figures["eval/video_hard/return_mean"] == 2.5
    assert (figures["iou/clean"], figures["iou_1px/clean"]) == (0.5, 0.6)


def test_a_run_goes_on_with_its_own_masker(tmp_path):
    """Replay's masks are that one's, in whatever precision the run goes on."""
    run, other = make_run(1), make_run(1)
    live(*run, 5)
    rl.save_state(tmp_path, rl.Progress(step=50), *run, rl.Progress())
    with torch.no_grad():
        other[0].masker.head.bias += 1
    assert rl.load_state(tmp_path, *other).step == 50
    assert same(weights(other[0].masker), weights(run[0].masker))
    half = make_agent(precision="bf16")
    assert rl.load_state(tmp_path, half, *make_run(1)[1:]).step == 50
    assert half.masker.head.bias.dtype == torch.bfloat16 and torch.equal(half.masker.head.bias, run[0].masker.head.bias.bfloat16())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpoint_round_trip(tmp_path, precision):
    """A saved agent comes back with the same action, its masker in the precision that it had; a half-written checkpoint never lies under the name."""
    agent, batch = make_agent(precision=precision), make_batch()
    rl.save_agent(tmp_path / "checkpoint.pt", agent, 7, {"prompt": "the walker", "segmenter": "sim"})
    other, checkpoint = rl.load_agent(tmp_path / "checkpoint.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (checkpoint["args"], checkpoint["step"], checkpoint["prompt"], checkpoint["segmenter"]) == (agent.args, 7, "the walker", "sim")
    observation = batch.obs[:1], batch.mask[:1], batch.proprio[:1]
    assert torch.equal(other.policy(*observation, mean=True), agent.policy(*observation, mean=True))
    assert other.masker.stem.weight.dtype == agent.masker.stem.weight.dtype == agent.dtype
