"""Noise schedules and solvers: published tables and trajectories, and what must hold for any of them."""

import pytest
import torch

from diffsynth.schedulers import SAMPLERS, FlowMatchScheduler, UniPCScheduler, make_scheduler

TABLES = ["50_7_0.75", "50_5_1.0", "30_3_0.92", "10_8_1.0"]
BOTH = pytest.mark.parametrize("name", sorted(SAMPLERS))


def scheduler_for(table: str) -> FlowMatchScheduler:
    steps, shift, strength = table.split("_")
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(int(steps), float(strength), float(shift))
    return scheduler


def toy_trajectory(scheduler, tensors, dtype=torch.float32) -> torch.Tensor:
    x = tensors["toy.x0"].to(dtype)
    trajectory = [x]
    for timestep in scheduler.timesteps:
        velocity = tensors["toy.A"] @ x.float().flatten() + timestep / 1000 * tensors["toy.b"]
        x = scheduler.step(velocity.view_as(x).to(dtype), timestep, x)
        trajectory.append(x)
    return torch.stack(trajectory)


@pytest.mark.parametrize("table", TABLES)
def test_flow_match_tables_are_the_released_ones(golden, table):
    tensors, _ = golden("schedule")
    scheduler = scheduler_for(table)
    assert scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32
    torch.testing.assert_close(scheduler.sigmas, tensors[f"fm.{table}.sigmas"], atol=1e-6, rtol=0)
    torch.testing.assert_close(scheduler.timesteps, tensors[f"fm.{table}.timesteps"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("table", TABLES)
def test_noising_and_euler_steps_are_the_released_ones(golden, table):
    tensors, _ = golden("schedule")
    scheduler = scheduler_for(table)
    clean, noise, velocity = (tensors[f"fm.{key}"] for key in ("clean", "noise", "velocity"))
    timesteps = tensors[f"fm.{table}.timesteps"]
    indices = tensors[f"fm.{table}.idx"].long()
    noised = torch.stack([scheduler.add_noise(clean, noise, timesteps[i]) for i in indices])
    stepped = torch.stack([scheduler.step(velocity, timesteps[i], noise) for i in indices])
    torch.testing.assert_close(noised, tensors[f"fm.{table}.add_noise"], atol=1e-6, rtol=0)
    torch.testing.assert_close(stepped, tensors[f"fm.{table}.step"], atol=1e-6, rtol=0)


def test_euler_trajectory_is_the_released_one(golden):
    tensors, info = golden("schedule")
    scheduler = make_scheduler("euler", shift=info["toy"]["shift"])
    scheduler.set_timesteps(info["toy"]["steps"])
    torch.testing.assert_close(
        toy_trajectory(scheduler, tensors), tensors["toy.euler_fastvmt.traj"], atol=1e-5, rtol=0
    )


def test_unipc_trajectory_is_that_of_wan(golden):
    tensors, info = golden("schedule")
    scheduler = make_scheduler("unipc", shift=info["toy"]["shift"])
    scheduler.set_timesteps(info["toy"]["steps"])
    torch.testing.assert_close(scheduler.sigmas, tensors["toy.unipc.sigmas"][:-1], atol=1e-6, rtol=0)
    assert scheduler.timesteps.tolist() == tensors["toy.unipc.timesteps"].tolist()
    torch.testing.assert_close(
        toy_trajectory(scheduler, tensors), tensors["toy.unipc.traj"], atol=1e-5, rtol=0
    )


def test_a_second_unipc_run_on_one_object_repeats_the_first(golden):
    tensors, _ = golden("schedule")
    scheduler = UniPCScheduler()
    scheduler.set_timesteps(10)
    first = toy_trajectory(scheduler, tensors)
    scheduler.set_timesteps(10)
    assert torch.equal(toy_trajectory(scheduler, tensors), first)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@BOTH
def test_a_network_that_knows_the_clean_sample_is_followed_along_the_straight_line(name, steps, strength):
    clean, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    scheduler = make_scheduler(name, shift=4.0)
    scheduler.set_timesteps(steps, strength)
    x = scheduler.add_noise(clean.float(), noise.float(), scheduler.timesteps[0])
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        if name != "renoise":  # whose noise is another in each step
            torch.testing.assert_close(x.double(), (1 - sigma) * clean + sigma * noise, atol=1e-5, rtol=0)
        x = scheduler.step((x - clean.float()) / sigma, timestep, x)
    torch.testing.assert_close(x.double(), clean, atol=1e-5, rtol=0)


def test_renoise_steps_are_the_clean_prediction_and_fresh_noise_of_seed_and_step():
    velocity, x = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler("renoise", 5.0, seed=7)
    scheduler.set_timesteps(4)
    noises = []
    for i, timestep in enumerate(scheduler.timesteps[:-1]):
        sigma, following = (float(level) for level in scheduler.sigmas[i : i + 2])
        clean = x - sigma * velocity
        noises.append((scheduler.step(velocity, timestep, x) - (1 - following) * clean) / following)
    for noise in noises:
        assert abs(float(noise.mean())) < 0.1
        assert float(noise.std()) == pytest.approx(1, abs=0.05)
    first, second, third = (noise.flatten() for noise in noises)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([second, third]))[0, 1])) < 0.1
    # A new object draws the same, in any order; another seed does not; the last step ends clean.
    again, other = (make_scheduler("renoise", 5.0, seed=seed) for seed in (7, 8))
    for made in (again, other):
        made.set_timesteps(4)
    late = scheduler.timesteps[2]
    assert torch.equal(again.step(velocity, late, x), scheduler.step(velocity, late, x))
    assert not torch.equal(other.step(velocity, late, x), scheduler.step(velocity, late, x))
    last = scheduler.step(velocity, scheduler.timesteps[3], x)
    torch.testing.assert_close(last, x - 0.625 * velocity, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["euler", "renoise"])
def test_the_published_four_steps_are_shift_5(name):
    """Self-Forcing and lightx2v list 1000, 750, 500, 250, warped by shift 5."""
    scheduler, explicit = make_scheduler(name, 5.0), make_scheduler(name)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625], rel=1e-7)
    levels = [5 * u / (1 + 4 * u) for u in (1, 0.75, 0.5, 0.25)]
    explicit.set_sigmas(levels)
    assert torch.equal(explicit.sigmas, scheduler.sigmas)
    assert torch.equal(explicit.timesteps, scheduler.timesteps)
    explicit.set_sigmas([1.0, 0.757, 0.522])  # three steps, as FastWan was distilled
    assert explicit.timesteps.tolist() == pytest.approx([1000, 757, 522], rel=1e-7)


def test_unipc_takes_the_levels_of_another_unipc():
    scheduler, explicit = make_scheduler("unipc", 4.0), make_scheduler("unipc")
    scheduler.set_timesteps(5, 0.9)
    explicit.set_sigmas(scheduler._exact_sigmas[:-1])
    x = torch.linspace(-1, 1, 7)
    y = x.clone()
    for timestep, same in zip(scheduler.timesteps, explicit.timesteps, strict=True):
        assert timestep == same
        x, y = scheduler.step(x.sin(), timestep, x), explicit.step(y.sin(), same, y)
    assert torch.equal(x, y)


def test_unipc_is_an_order_more_accurate_than_euler():
    """dx/dsigma = x has the solution x(0) = x(sigma) * exp(-sigma): errors of 40 against 20 steps."""
    errors = {"euler": [], "unipc": []}
    for name, found in errors.items():
        for steps in (20, 40):
            scheduler = make_scheduler(name, shift=1.0)
            scheduler.set_timesteps(steps)
            x = torch.ones(1)
            for timestep in scheduler.timesteps:
                x = scheduler.step(x, timestep, x)
            found.append(abs(float(x) - float(torch.exp(-scheduler.sigmas[0]))))
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(2.0, rel=0.1)
    assert errors["unipc"][0] / errors["unipc"][1] > 3.0
    assert errors["unipc"][1] < errors["euler"][1] / 20


def test_unipc_keeps_what_guidance_adds_between_steps():
    """Where the prediction is constant, an added offset can only fade as sigma does."""
    clean, noise, offset = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    scheduler = UniPCScheduler()
    scheduler.set_timesteps(6)
    x = scheduler.add_noise(clean, noise, scheduler.timesteps[0])
    for i in range(3):
        if i == 2:
            x += offset
        sigma = float(scheduler.sigmas[i])
        x = scheduler.step((x - clean) / sigma, scheduler.timesteps[i], x)
    sigma = float(scheduler.sigmas[3])
    faded = sigma / float(scheduler.sigmas[2]) * offset
    torch.testing.assert_close(x, (1 - sigma) * clean + sigma * noise + faded, atol=1e-5, rtol=0)


@BOTH
def test_a_shift_given_to_one_run_does_not_reach_the_next(name):
    scheduler, fresh = make_scheduler(name, shift=3.0), make_scheduler(name, shift=3.0)
    scheduler.set_timesteps(10, shift=9.0)
    shifted = scheduler.sigmas
    scheduler.set_timesteps(10)
    fresh.set_timesteps(10)
    assert torch.equal(scheduler.sigmas, fresh.sigmas)
    assert (shifted[1:] > fresh.sigmas[1:]).all()


@BOTH
def test_levels_fall_and_a_smaller_strength_starts_lower_with_as_many_steps(name):
    scheduler = make_scheduler(name)
    starts = []
    for strength in (1.0, 0.75, 0.3):
        scheduler.set_timesteps(12, strength)
        assert scheduler.sigmas.shape == scheduler.timesteps.shape == (12,)
        assert (scheduler.sigmas.diff() < 0).all()
        assert scheduler.sigmas[-1] > 0
        starts.append(float(scheduler.sigmas[0]))
    assert starts == sorted(starts, reverse=True)


def test_without_the_extra_step_the_last_level_is_sigma_min():
    scheduler = FlowMatchScheduler(shift=1.0, sigma_min=0.1, extra_one_step=False)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.7, 0.4, 0.1]))
    torch.testing.assert_close(scheduler.step(torch.ones(2), 100.0, torch.ones(2)), torch.full((2,), 0.9))


def test_a_timestep_may_be_a_number_or_a_tensor_of_one(golden):
    tensors, _ = golden("schedule")
    scheduler = scheduler_for("30_3_0.92")
    x, noise, timestep = tensors["fm.clean"], tensors["fm.noise"], scheduler.timesteps[7]
    expected = scheduler.add_noise(x, noise, timestep)
    for form in (timestep.item(), timestep.view(1), timestep.double(), timestep.item() + 0.4):
        assert torch.equal(scheduler.add_noise(x, noise, form), expected)


@BOTH
def test_bfloat16_samples_move_in_float32_and_come_back_in_bfloat16(golden, name):
    tensors, _ = golden("schedule")
    x, velocity, noise = (tensors[f"fm.{key}"].bfloat16() for key in ("clean", "velocity", "noise"))
    scheduler, reference = make_scheduler(name), make_scheduler(name)
    scheduler.set_timesteps(10)
    reference.set_timesteps(10)
    first = scheduler.timesteps[0]
    stepped = scheduler.step(velocity, first, x)
    noised = scheduler.add_noise(x, noise.double(), scheduler.timesteps[4])
    assert stepped.dtype == noised.dtype == torch.bfloat16
    assert torch.equal(stepped, reference.step(velocity.float(), first, x.float()).bfloat16())
    assert torch.equal(
        noised, reference.add_noise(x.float(), noise.float(), scheduler.timesteps[4]).bfloat16()
    )


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be .*got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be .*got 2.5"),
        ({"num_inference_steps": 4, "denoising_strength": 0.0}, "denoising_strength must be .*got 0.0"),
        ({"num_inference_steps": 4, "denoising_strength": 1.01}, "denoising_strength must be .*got 1.01"),
        ({"num_inference_steps": 4, "shift": 0.0}, "shift must be .*got 0.0"),
        ({"num_inference_steps": 4, "shift": float("nan")}, "shift must be .*got nan"),
    ],
)
def test_bad_settings_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(name).set_timesteps(**arguments)


@BOTH
def test_bad_calls_are_named(name):
    scheduler = make_scheduler(name)
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="call set_timesteps first"):
        scheduler.step(x, 999.0, x)
    with pytest.raises(RuntimeError, match="call set_timesteps first"):
        scheduler.add_noise(x, x, 999.0)
    scheduler.set_timesteps(4)
    first = scheduler.timesteps[0]
    with pytest.raises(ValueError, match=r"timestep has the shape \(2,\)"):
        scheduler.step(x, scheduler.timesteps[:2], x)
    with pytest.raises(ValueError, match=r"model_output has the shape \(3,\); sample has \(2, 3\)"):
        scheduler.step(x[0], first, x)
    with pytest.raises(ValueError, match=r"noise has the shape \(3,\); x has \(2, 3\)"):
        scheduler.add_noise(x, x[0], first)


def test_unipc_steps_out_of_order_are_refused():
    scheduler = UniPCScheduler()
    scheduler.set_timesteps(3)
    x = torch.zeros(2)
    with pytest.raises(RuntimeError, match="must be taken in order: step 0 is at timestep 999, given 908"):
        scheduler.step(x, scheduler.timesteps[1], x)
    for timestep in scheduler.timesteps:
        x = scheduler.step(x, timestep, x)
    with pytest.raises(RuntimeError, match="All 3 steps are done"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_unipc_takes_more_steps_than_there_are_whole_timesteps():
    scheduler = UniPCScheduler(shift=1.0)
    scheduler.set_timesteps(1500)
    x = torch.ones(1)
    for timestep in scheduler.timesteps:
        x = scheduler.step(torch.zeros(1), timestep, x)
    torch.testing.assert_close(x, torch.ones(1))


def test_an_unknown_sampler_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="sampler must be one of euler, unipc, renoise; got 'ddim'"):
        make_scheduler("ddim", shift=5.0)
