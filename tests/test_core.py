"""The paper's maths against diffusers' schedulers, closed forms for Gaussians, and formulas written out by hand."""

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from diffusers.training_utils import compute_snr
from torch.distributions import MultivariateNormal, kl_divergence

from sbrush import core
from sbrush.core import (
    NoiseSchedule,
    add_noise,
    dmd_gap,
    guide,
    guided_epsilon,
    lora_loss,
    student_input,
    student_x0,
    to_epsilon,
    to_x0,
    vsd_gap,
    vsd_loss,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
ABAR = DDPMScheduler(**BETAS).alphas_cumprod.double()
SCHEDULE = NoiseSchedule.from_alphas_cumprod(ABAR.float())
TIMES = torch.tensor([0, 20, 250, 500, 750, 980, 999])
SHAPE = (len(TIMES), 4, 5, 3)
both_predictions = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(t):
    """alpha_t and sigma_t in float64, not read from the code under test."""
    abar = ABAR[t].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def close(actual, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_schedule_is_stable_diffusions():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    assert len(SCHEDULE) == 1000
    assert SCHEDULE.alpha.dtype == SCHEDULE.sigma.dtype == torch.float32
    close(SCHEDULE.alpha, np.sqrt(abar), rtol=2e-5, atol=0)
    close(SCHEDULE.sigma, np.sqrt(1 - abar), rtol=5e-5, atol=0)
    assert 1 / SCHEDULE.alpha[999].item() == pytest.approx(14.6490, abs=1e-3)


def test_sigma_keeps_float32_accuracy_where_abar_is_nearly_one():
    schedule = NoiseSchedule.from_alphas_cumprod(torch.tensor([1 - 1e-10], dtype=torch.float64))
    close(schedule.sigma, [1e-5], rtol=1e-6, atol=0)


def test_at_and_last_give_one_value_a_sample():
    alpha, sigma = SCHEDULE.at(TIMES)
    assert alpha.shape == sigma.shape == (len(TIMES), 1, 1, 1)
    assert alpha.flatten().tolist() == SCHEDULE.alpha[TIMES].tolist()
    assert sigma.flatten().tolist() == SCHEDULE.sigma[TIMES].tolist()
    assert SCHEDULE.start(3).tolist() == [999, 999, 999]
    assert SCHEDULE.start(3).dtype == torch.int64


def test_to_moves_both_halves_and_last_follows():
    moved = SCHEDULE.to("meta")
    assert {moved.alpha.device.type, moved.sigma.device.type, moved.start(2).device.type} == {"meta"}
    stayed = SCHEDULE.to("cpu")
    assert torch.equal(stayed.alpha, SCHEDULE.alpha) and torch.equal(stayed.sigma, SCHEDULE.sigma)


def test_add_noise_is_diffusers():
    x0, noise = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    close(add_noise(x0, noise, TIMES, SCHEDULE), DDPMScheduler(**BETAS).add_noise(x0, noise, TIMES))


@both_predictions
@pytest.mark.parametrize("t", TIMES.tolist())
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_to_x0_is_diffusers_pred_original_sample(scheduler, t, prediction):
    scheduler = scheduler(**BETAS, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    output, x_t = normal(2, 4, 5, 3, seed=3), normal(2, 4, 5, 3, seed=4)
    expected = scheduler.step(output, t, x_t).pred_original_sample
    close(to_x0(output, x_t, torch.tensor([t, t]), SCHEDULE, prediction), expected, rtol=1e-5, atol=1e-5)


def test_to_epsilon_and_to_x0_undo_diffusers_add_noise_and_get_velocity():
    x0, noise = normal(*SHAPE, seed=5), normal(*SHAPE, seed=6)
    ddpm = DDPMScheduler(**BETAS)
    x_t, v = ddpm.add_noise(x0, noise, TIMES), ddpm.get_velocity(x0, noise, TIMES)
    for prediction, output in {"epsilon": noise, "v_prediction": v}.items():
        close(to_epsilon(output, x_t, TIMES, SCHEDULE, prediction), noise, atol=1e-5)
        close(to_x0(output, x_t, TIMES, SCHEDULE, prediction), x0, atol=1e-5)


# --- the student ------------------------------------------------------------------------------------------------------


@both_predictions
def test_student_is_one_trailing_ddim_step_to_alpha_one(prediction):
    ddim = DDIMScheduler(
        **BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    ddim.set_timesteps(1)
    output, z = normal(2, 4, 5, 3, seed=7), normal(2, 4, 5, 3, seed=8)
    assert SCHEDULE.start(2).tolist() == ddim.timesteps.tolist() * 2
    expected = ddim.step(output, ddim.timesteps[0], z).prev_sample
    close(student_x0(output, z, SCHEDULE.start(2), SCHEDULE, prediction), expected, atol=1e-5)


def test_a_v_student_and_an_epsilon_student_of_one_function_give_one_x0():
    z, epsilon = normal(*SHAPE, seed=9), normal(*SHAPE, seed=10)
    alpha, sigma = by_hand(TIMES)
    v = ((epsilon - sigma * z) / alpha).float()  # eps = alpha v + sigma z
    as_epsilon = student_x0(epsilon, z, TIMES, SCHEDULE, "epsilon")
    as_v = student_x0(v, z, TIMES, SCHEDULE, "v_prediction")
    close(as_v, as_epsilon, atol=1e-5)


@both_predictions
def test_without_reparameterisation_the_output_is_the_image(prediction):
    output, z = normal(*SHAPE, seed=11), normal(*SHAPE, seed=12)
    x0 = student_x0(output, z, TIMES, SCHEDULE, prediction, reparameterised=False)
    assert torch.equal(x0, output)


def test_gradients_reach_the_networks_undiminished():
    """Every map is linear in the network's output, so its gradient is its coefficient."""
    alpha, sigma = by_hand(TIMES)
    x = normal(*SHAPE, seed=39)
    text = {"tokens": torch.zeros(1, 1, 1)}, {"tokens": torch.ones(len(TIMES), 1, 1)}

    def guided(output, scale, prediction):
        def denoise(x_t, t, text):
            return torch.cat([output] * (len(x_t) // len(output))) * text["tokens"][:, :, :, None]

        return guided_epsilon(denoise, x, TIMES, text[1], text[0], scale, SCHEDULE, prediction)

    cases = [
        (lambda output: add_noise(output, x, TIMES, SCHEDULE), alpha),
        (lambda output: to_epsilon(output, x, TIMES, SCHEDULE, "epsilon"), 1),
        (lambda output: to_epsilon(output, x, TIMES, SCHEDULE, "v_prediction"), alpha),
        (lambda output: student_x0(output, x, TIMES, SCHEDULE, "epsilon"), -sigma / alpha),
        (lambda output: student_x0(output, x, TIMES, SCHEDULE, "v_prediction"), -sigma),
        (lambda output: student_x0(output, x, TIMES, SCHEDULE, "epsilon", reparameterised=False), 1),
        (lambda output: guided(output, 1, "v_prediction"), alpha),
        (lambda output: guided(output, 4.5, "epsilon"), 4.5),
    ]
    for i, (function, coefficient) in enumerate(cases):
        output = normal(*SHAPE, seed=40).requires_grad_()
        function(output).sum().backward()
        assert output.grad is not None, i
        close(output.grad, coefficient * torch.ones(SHAPE, dtype=torch.float64))


# --- float32, whatever the networks compute in ------------------------------------------------------------------------


def values_at(dtype):
    """Every function of the module on the same numbers, which bfloat16 holds exactly, given in `dtype`."""
    x, output, noise = (normal(*SHAPE, seed=seed).bfloat16().to(dtype) for seed in (13, 14, 15))
    text = {"tokens": torch.ones(len(TIMES), 2, 3, dtype=dtype)}

    def denoise(x_t, t, text):
        return torch.cat([output, noise])[: len(x_t)]

    yield add_noise(x, noise, TIMES, SCHEDULE)
    for prediction in "epsilon", "v_prediction":
        yield to_epsilon(output, x, TIMES, SCHEDULE, prediction)
        yield to_x0(output, x, TIMES, SCHEDULE, prediction)
        for reparameterised in True, False:
            yield student_x0(output, x, TIMES, SCHEDULE, prediction, reparameterised=reparameterised)
        for scale in 1, 4.5:
            yield guided_epsilon(denoise, x, TIMES, text, text, scale, SCHEDULE, prediction)
    yield vsd_gap(output, x, TIMES, SCHEDULE)
    yield dmd_gap(output, x, noise)
    yield vsd_loss(x, output.float())
    yield lora_loss(output, noise, TIMES, SCHEDULE)
    yield lora_loss(output, noise, TIMES, SCHEDULE, weight="min-snr")
    yield lora_loss(output, noise, TIMES, SCHEDULE, weight="v")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_are_float32_and_no_digit_is_lost_to_the_networks_dtype(dtype):
    for i, (actual, expected) in enumerate(zip(values_at(dtype), values_at(torch.float32), strict=True)):
        assert actual.dtype == torch.float32, i
        assert torch.equal(actual, expected), i


# --- guidance ---------------------------------------------------------------------------------------------------------


class Denoiser:
    """A stand-in for a UNet: a nonlinear function of image, timestep and text; it notes the size of its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, x_t, t, text):
        self.batches.append(len(x_t))
        mean = text["tokens"].mean(dim=(1, 2)) + text["pooled"].mean(dim=1)
        return torch.tanh(x_t * mean.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 500)


def conditioning(batch, seed):
    return {"tokens": normal(batch, 3, 8, seed=seed), "pooled": normal(batch, 5, seed=seed + 100)}


X_T, COND, NULL = normal(*SHAPE, seed=16), conditioning(len(TIMES), seed=17), conditioning(1, seed=18)


@both_predictions
@pytest.mark.parametrize("scale", [0, 0.5, 4.5])
def test_guidance_is_one_call_that_equals_two(scale, prediction):
    denoise, alone = Denoiser(), Denoiser()
    actual = guided_epsilon(denoise, X_T, TIMES, COND, NULL, scale, SCHEDULE, prediction)
    outputs = [alone(X_T, TIMES, text).double() for text in (COND, NULL)]
    alpha, sigma = by_hand(TIMES)
    cond, null = outputs if prediction == "epsilon" else (alpha * v + sigma * X_T for v in outputs)
    close(actual, (1 - scale) * null + scale * cond, atol=1e-5)
    assert denoise.batches == [2 * len(TIMES)]


@both_predictions
def test_guidance_at_scale_one_is_the_conditional_alone_at_half_the_cost(prediction):
    denoise = Denoiser()
    actual = guided_epsilon(denoise, X_T, TIMES, COND, NULL, 1.0, SCHEDULE, prediction)
    output = Denoiser()(X_T, TIMES, COND).double()
    alpha, sigma = by_hand(TIMES)
    close(actual, output if prediction == "epsilon" else alpha * output + sigma * X_T)
    assert denoise.batches == [len(TIMES)]


def test_each_sample_may_have_its_own_guidance_scale():
    scales = torch.tensor([1.0, 3.0] * len(TIMES))[: len(TIMES)]
    each = scales.view(-1, 1, 1, 1)
    actual = guided_epsilon(Denoiser(), X_T, TIMES, COND, NULL, each, SCHEDULE, "v_prediction")
    for i, scale in enumerate(scales.tolist()):
        alone = guided_epsilon(Denoiser(), X_T, TIMES, COND, NULL, scale, SCHEDULE, "v_prediction")
        close(actual[i], alone[i].double(), atol=1e-5)
    one = torch.ones(len(TIMES), 1, 1, 1)
    denoise = Denoiser()
    guided_epsilon(denoise, X_T, TIMES, COND, NULL, one, SCHEDULE, "epsilon")
    assert denoise.batches == [2 * len(TIMES)]  # looking whether all are one would wait for the device


def test_guide_extrapolates_from_null_through_cond():
    cond, null = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guide(cond, null, 0).tolist() == [1, 1]
    assert guide(cond, null, 1).tolist() == [3, -1]
    assert guide(cond, null, 4.5).tolist() == [10, -8]
    assert guide(cond, null, torch.tensor([4.5, 2])).tolist() == [10, -3]


# --- the VSD gradient, on Gaussians, whose scores are known -----------------------------------------------------------


class Gaussian:
    """N(mean, cov) in two dimensions, shaped [B, 2, 1, 1], with its noised self q_t and the exact noise prediction."""

    def __init__(self, mean, cov):
        self.mean, self.cov = torch.as_tensor(mean).double(), torch.as_tensor(cov).double()

    def noised(self, t):
        abar = ABAR[t].view(-1, 1, 1)
        cov = abar * self.cov + (1 - abar) * torch.eye(2)
        return MultivariateNormal(abar[:, :, 0].sqrt() * self.mean, cov)

    def epsilon(self, x_t, t):
        """-sigma_t times the score, the score by autograd."""
        x = x_t.detach().double()[:, :, 0, 0].requires_grad_()
        (score,) = torch.autograd.grad(self.noised(t).log_prob(x).sum(), x)
        return (-(1 - ABAR[t]).sqrt()[:, None] * score).float()[:, :, None, None]


TARGET = Gaussian([1.0, -2.0], [[1.0, 0.6], [0.6, 0.5]])

# Points over which any quadratic has the mean it has under (z, noise) ~ N(0, I): averages without Monte-Carlo error.
CUBATURE = 2 * torch.cat([torch.eye(4), -torch.eye(4)])  # 8 points in 4 dimensions
Z, NOISE = CUBATURE[:, :2], CUBATURE[:, 2:, None, None]


@pytest.mark.parametrize("t", [20, 250, 500, 750, 980])
def test_gradient_is_that_of_kl_of_the_noised_student_from_the_noised_target(t):
    """grad vsd_loss = sigma_t^3 / alpha_t / numel(x0 of one sample) * grad KL(q_t || p_t), for mean and covariance."""
    mean, factor = torch.tensor([0.3, 0.5]).requires_grad_(), torch.tensor([[0.8, 0.1], [-0.4, 1.2]]).requires_grad_()
    times = torch.full((8,), t)

    x0 = (Z @ factor.T + mean)[:, :, None, None]  # the student: N(mean, factor factor^T)
    student = Gaussian(mean, factor @ factor.T)
    x_t = add_noise(x0.detach(), NOISE, times, SCHEDULE)
    gap = vsd_gap(TARGET.epsilon(x_t, times), student.epsilon(x_t, times), times, SCHEDULE)
    actual = torch.autograd.grad(vsd_loss(x0, gap), [mean, factor])

    kl = kl_divergence(student.noised(times[:1]), TARGET.noised(times[:1])).sum()
    alpha, sigma = by_hand(times[:1])
    for ours, exact in zip(actual, torch.autograd.grad(kl, [mean, factor]), strict=True):
        close(ours, (sigma**3 / alpha / 2).squeeze() * exact, rtol=1e-4, atol=1e-6)


def test_gradient_by_monte_carlo_agrees_at_mixed_timesteps():
    """The same for random z and noise and several timesteps in a batch, within 4 standard errors."""
    z, noise = normal(20000, 2, seed=19), normal(20000, 2, 1, 1, seed=20)
    times = torch.tensor([100, 400, 700, 900]).repeat(5000)
    student = Gaussian([0.0, 0.0], torch.eye(2))
    x0 = z[:, :, None, None].clone().requires_grad_()
    x_t = add_noise(x0.detach(), noise, times, SCHEDULE)
    gap = vsd_gap(TARGET.epsilon(x_t, times), student.epsilon(x_t, times), times, SCHEDULE)
    vsd_loss(x0, gap).backward()
    per_sample = len(z) * x0.grad[:, :, 0, 0]  # of the mean: d x0 / d mean = 1

    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    alpha, sigma = by_hand(times[:4])
    kl = kl_divergence(Gaussian(mean, torch.eye(2)).noised(times[:4]), TARGET.noised(times[:4]))
    (exact,) = torch.autograd.grad(((sigma**3 / alpha).flatten() / 2 * kl).mean(), mean)
    standard_error = per_sample.std(dim=0) / math.sqrt(len(z))
    assert (standard_error < 0.02 * exact.abs()).all()  # the tolerance means something
    assert ((per_sample.mean(dim=0) - exact).abs() < 4 * standard_error).all()


def test_gap_is_exactly_zero_when_the_student_has_the_targets_distribution():
    x_t = add_noise(normal(7, 2, 1, 1, seed=21), normal(7, 2, 1, 1, seed=22), TIMES, SCHEDULE)
    own = Gaussian(TARGET.mean, TARGET.cov).epsilon(x_t, TIMES)
    teacher = TARGET.epsilon(x_t, TIMES)
    assert teacher.abs().min() > 0
    assert not vsd_gap(teacher, own, TIMES, SCHEDULE).any()
    assert not dmd_gap(teacher, own, normal(7, 2, 1, 1, seed=23)).any()


def train_linear_student(gap_of):
    """x0 = factor z + mean, 400 steps from a poor start; returns the Gaussian it has become."""
    mean, factor = torch.zeros(2, requires_grad=True), (0.5 * torch.eye(2)).requires_grad_()
    optimizer = torch.optim.Adam([mean, factor], lr=0.03)
    generator = torch.Generator().manual_seed(24)
    for _ in range(400):
        z, noise = torch.randn(2, 64, 2, 1, 1, generator=generator)
        t = torch.randint(20, 981, (64,), generator=generator)
        x0 = (z[:, :, 0, 0] @ factor.T + mean)[:, :, None, None]
        x_t = add_noise(x0.detach(), noise, t, SCHEDULE)
        student = Gaussian(mean.detach(), (factor @ factor.T).detach())
        optimizer.zero_grad()
        vsd_loss(x0, gap_of(TARGET.epsilon(x_t, t), student.epsilon(x_t, t), noise, t)).backward()
        optimizer.step()
    return Gaussian(mean.detach(), (factor @ factor.T).detach())


@both_predictions
def test_the_steps_of_a_student_are_diffusers_lcm_and_ddim_steps(prediction):
    """student_input and the last step, against LCMScheduler with the same noise, and against DDIM without any."""
    z, *fresh = normal(4, 5, 4, 8, 8, seed=31)

    def network(x_t, t, cond):
        return torch.sin(3 * x_t + 0.01 * t.view(-1, 1, 1, 1).float())

    kinds = {"prediction_type": prediction, "clip_sample": False, "set_alpha_to_one": True, **BETAS}
    lcm = LCMScheduler(original_inference_steps=4, **kinds)
    ddim = DDIMScheduler(timestep_spacing="trailing", **kinds)
    for scheduler, noises in ((lcm, fresh), (ddim, None)):
        scheduler.set_timesteps(4)
        rungs = [int(t) for t in scheduler.timesteps]
        assert rungs == [999, 749, 499, 249]
        x, drawn = z, iter(fresh)
        for t in rungs:
            stepped = scheduler.step(network(x, torch.tensor([t]), {}), t, x, return_dict=False)[0]
            if scheduler is lcm and t != rungs[-1]:
                # LCMScheduler draws its noise itself: put ours in its place.
                x0 = to_x0(network(x, torch.tensor([t]), {}), x, torch.tensor([t]), SCHEDULE, prediction)
                stepped = add_noise(x0, next(drawn), torch.tensor([rungs[rungs.index(t) + 1]]), SCHEDULE)
            x = stepped
        seen = student_input(network, z, noises, rungs, {}, SCHEDULE, prediction)
        last = torch.full((5,), rungs[-1])
        close(student_x0(network(seen, last, {}), seen, last, SCHEDULE, prediction), x, rtol=1e-3, atol=1e-3)


def test_one_rung_is_the_noise_itself():
    z = normal(3, 4, 2, 2, seed=32)
    assert student_input(None, z, (), (999,), {}, SCHEDULE, "epsilon") is z


@pytest.mark.parametrize("kind", ["vsd", "dmd"])
def test_a_linear_student_recovers_mean_and_covariance(kind):
    gaps = {
        "vsd": lambda teacher, student, noise, t: vsd_gap(teacher, student, t, SCHEDULE),
        "dmd": lambda teacher, student, noise, t: dmd_gap(teacher, student, noise),
    }
    student = train_linear_student(gaps[kind])
    close(student.mean, TARGET.mean, rtol=0, atol=1e-3)
    close(student.cov, TARGET.cov, rtol=0, atol=1e-3)


def test_score_distillation_sampling_finds_the_mean_and_loses_the_covariance():
    student = train_linear_student(lambda teacher, student, noise, t: vsd_gap(teacher, noise, t, SCHEDULE))
    close(student.mean, TARGET.mean, rtol=0, atol=0.15)
    assert student.cov.trace() < 0.02 * TARGET.cov.trace()


# --- the other gap and the losses -------------------------------------------------------------------------------------


def test_dmd_gap_is_dmds_x0_form_sample_by_sample():
    """DMD writes ((x0 - x0_real) - (x0 - x0_fake)) / mean|x0 - x0_real|, with x0 predictions of the two networks."""
    x0, noise, eps_teacher, eps_lora = (normal(*SHAPE, seed=seed) for seed in range(25, 29))
    eps_teacher = eps_teacher * torch.logspace(-2, 2, len(TIMES)).view(-1, 1, 1, 1)  # samples of unlike size
    actual = dmd_gap(eps_teacher, eps_lora, noise)
    for i, t in enumerate(TIMES.tolist()):
        alpha, sigma = ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()
        x_t = alpha * x0[i] + sigma * noise[i]
        real, fake = ((x_t - sigma * eps[i]) / alpha for eps in (eps_teacher, eps_lora))
        close(actual[i], ((x0[i] - real) - (x0[i] - fake)) / (x0[i] - real).abs().mean(), rtol=1e-4, atol=1e-5)


def test_dmd_gap_stays_finite_where_the_teacher_is_perfect():
    noise = normal(*SHAPE, seed=29)
    assert dmd_gap(noise, noise + 1, noise).isfinite().all()


def test_vsd_loss_is_half_the_mean_square_and_its_gradient_is_the_gap_over_numel():
    x0, gap = normal(*SHAPE, seed=30).requires_grad_(), normal(*SHAPE, seed=31).requires_grad_()
    loss = vsd_loss(x0, gap)
    loss.backward()
    close(loss.detach(), (gap.detach().double() ** 2).mean() / 2)
    close(x0.grad * x0.numel(), gap.detach(), atol=1e-5)
    assert gap.grad is None  # the teachers are not trained through the student's loss


def test_vsd_loss_descends_along_the_gap_when_the_gap_depends_on_x0():
    x0 = normal(*SHAPE, seed=32).requires_grad_()
    vsd_loss(x0, 3 * x0).backward()
    close(x0.grad * x0.numel(), 3 * x0.detach(), atol=1e-5)


def test_lora_loss_is_the_papers_and_reaches_the_lora_teacher():
    eps_lora, noise = normal(*SHAPE, seed=33).requires_grad_(), normal(*SHAPE, seed=34)
    loss = lora_loss(eps_lora, noise, TIMES, SCHEDULE)
    loss.backward()
    alpha, _ = by_hand(TIMES)
    error = eps_lora.detach().double() - noise
    close(loss.detach(), (alpha * error).square().mean())
    close(eps_lora.grad * error.numel(), 2 * alpha**2 * error, atol=1e-5)


@pytest.mark.parametrize("weight, cap", [("min-snr", 5), ("v", None)])
def test_lora_loss_in_v_is_the_plain_or_min_snr_weighted_error_in_v(weight, cap):
    t = torch.arange(0, 1000, 37)
    x0, noise, v = (normal(len(t), 2, 3, 3, seed=seed) for seed in (35, 36, 37))
    ddpm = DDPMScheduler(**BETAS)
    x_t = ddpm.add_noise(x0, noise, t)
    snr = compute_snr(ddpm, t).double()
    factor = torch.ones_like(snr)
    if cap:
        assert snr.min() < cap < snr.max()
        factor = torch.minimum(snr, torch.tensor(cap)) / (snr + 1)  # as in diffusers' training scripts
    expected = (factor.view(-1, 1, 1, 1) * (v - ddpm.get_velocity(x0, noise, t)) ** 2).mean()
    alpha, sigma = by_hand(t)
    close(lora_loss(alpha * v + sigma * x_t, noise, t, SCHEDULE, weight=weight), expected, rtol=1e-4)


@pytest.mark.parametrize("weight", ["alpha", "v", "min-snr"])
def test_lora_loss_is_least_at_the_noise_and_in_expectation_at_the_students_score(weight):
    noise = normal(*SHAPE, seed=38)
    assert lora_loss(noise, noise, TIMES, SCHEDULE, weight=weight) == 0

    student, t = Gaussian([0.0, 0.0], [[1.0, 0.6], [0.6, 0.5]]), torch.full((8,), 500)
    x_t = add_noise((Z @ torch.linalg.cholesky(student.cov).float().T)[:, :, None, None], NOISE, t, SCHEDULE)
    k = torch.ones(8, 2, 1, 1, requires_grad=True)
    lora_loss(student.epsilon(x_t, t) * k, NOISE, t, SCHEDULE, weight=weight).backward()
    assert k.grad.abs().max() > 1e-3
    assert k.grad.sum(dim=0).abs().max() < 1e-6


# --- the module -------------------------------------------------------------------------------------------------------


def test_core_imports_torch_and_the_standard_library_only():
    imported = set()
    for node in ast.walk(ast.parse(Path(core.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"torch"}


def test_the_pair_loss_pulls_the_student_to_the_teachers_image_and_not_the_other_way():
    torch.manual_seed(0)
    x0, theirs = (torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(2))
    loss = core.pair_loss(x0.bfloat16(), theirs.bfloat16())
    rounded = x0.detach().bfloat16().float() - theirs.detach().bfloat16().float()
    assert loss.dtype == torch.float32 and torch.isclose(loss, (rounded**2).sum() / (2 * x0.numel()))
    core.pair_loss(x0, theirs).backward()
    assert torch.allclose(x0.grad, (x0 - theirs).detach() / x0.numel()) and theirs.grad is None


def test_the_clamped_clip_loss_is_zero_from_tau_on():
    cosine = torch.tensor([0.1, 0.35, 0.6], requires_grad=True)
    loss = core.clamped_clip_loss(cosine, 0.35)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 / 3)
    assert cosine.grad[0].item() == pytest.approx(-1 / 3) and cosine.grad[2] == 0
