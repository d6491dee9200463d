"""The denoising loop: guidance in an interval of steps, no waiting for the device, compiled blocks."""

import logging

import pytest
import torch

from diffsynth.configs.options import RunOptions
from diffsynth.models.compile_blocks import compile_blocks
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.pipelines.denoise import cfg_velocity, denoise, dit_velocity
from diffsynth.runs.state import PromptEmbeddings
from diffsynth.schedulers import make_scheduler

SCALE = 4.0


def make_dit(num_layers=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanModel(
            dim=24, in_dim=4, ffn_dim=48, out_dim=4, text_dim=8, freq_dim=32, num_heads=2,
            num_layers=num_layers, text_len=4,
        ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def dit():
    return make_dit()


def velocity_of(dit, positive, negative, num_steps, batch, interval=(0.0, 1.0)):
    options = RunOptions(
        num_inference_steps=num_steps, cfg_scale=SCALE, batch_cfg=batch, cfg_interval=interval
    )
    return cfg_velocity(dit, PromptEmbeddings(positive, negative), options, {})


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(s, generator=generator) for s in ((1, 4, 2, 4, 4), (1, 4, 8), (1, 4, 8)))


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ((0.0, 1.0), range(10)),
        ((0.2, 0.7), range(2, 7)),
        ([0, 0.5], range(5)),
        ((0.07, 0.29), range(1, 3)),
        ((0.5, 0.5), range(5, 5)),
    ],
)
def test_an_interval_is_rounded_to_whole_steps(interval, steps):
    options = RunOptions(cfg_interval=interval, num_inference_steps=10)
    assert list(options.cfg_steps) == list(steps)


@pytest.mark.parametrize("wrong", [(0.5, 0.2), (-0.1, 1.0), (0, 1.5), (0.1,), 0.5, ("0", 1), (True, 1), None])
def test_an_interval_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=r"cfg_interval must be .*\(from, to\)"):
        RunOptions(cfg_interval=wrong)


@torch.no_grad()
@pytest.mark.parametrize("batch", [False, True])
def test_outside_of_the_interval_the_positive_prompt_runs_alone(dit, tensors, batch):
    x, positive, negative = tensors
    timestep, rows = torch.tensor(700.0), []
    velocity = velocity_of(dit, positive, negative, 4, batch, (0.25, 0.75))
    v_pos, v_neg = (dit(x, timestep[None], context) for context in (positive, negative))
    hook = dit.blocks[0].register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    velocities = [velocity(step, x, timestep) for step in range(4)]
    hook.remove()
    assert rows == ([1, 2, 2, 1] if batch else [1] * 6)
    guided = v_neg + SCALE * (v_pos - v_neg)
    for given, expected in zip(velocities, (v_pos, guided, guided, v_pos), strict=True):
        assert torch.allclose(given, expected, atol=1e-5)


@torch.no_grad()
def test_an_empty_interval_is_the_positive_prompt_alone_to_the_bit(dit, tensors):
    x, positive, negative = tensors
    none = velocity_of(dit, positive, negative, 3, True, (0.4, 0.4))
    alone = velocity_of(dit, positive, None, 3, True)
    t = torch.tensor(300.0)
    assert all(torch.equal(none(step, x, t), alone(step, x, t)) for step in range(3))


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_the_loop_never_reads_a_tensor_of_the_device(tensors, sampler):
    # On the meta device nothing can be read: an .item(), a comparison or a copy to the CPU would raise.
    x, positive, negative = (t.to("meta") for t in tensors)
    dit = make_dit().to("meta")
    for batch in (False, True):
        scheduler = make_scheduler(sampler, 3.0)
        scheduler.set_timesteps(4)
        velocity = velocity_of(dit, positive, negative, 4, batch, (0.25, 1.0))
        with torch.no_grad():
            *_, last = denoise(x, scheduler, velocity)
        assert (last.step, last.latents.shape, last.latents.device.type) == (4, x.shape, "meta")


def count_up(scheduler):
    """A loop whose velocity counts the calls: its steps move latents by known amounts."""
    return denoise(torch.zeros(1, 1, 1, 1, 1), scheduler, lambda step, x, _: torch.full_like(x, step + 1.0))


def test_latents_that_are_sent_replace_those_of_the_run():
    scheduler = make_scheduler("euler", 1.0)
    scheduler.set_timesteps(3)
    left_alone = [step.latents.item() for step in count_up(scheduler)]
    steps = count_up(scheduler)
    next(steps)
    moved = steps.send(torch.full((1, 1, 1, 1, 1), 7.0)).latents.item()
    assert moved == pytest.approx(7.0 + left_alone[1] - left_alone[0])
    assert [step.step for step in steps] == [3], "the loop ends by itself"


def test_a_guided_step_is_told_before_its_velocity_runs():
    scheduler, order = make_scheduler("euler", 1.0), []
    scheduler.set_timesteps(3)

    def guide(index, latents, _timestep):
        order.append(f"guide {index}")
        return latents + 1, (0.5,)

    def velocity(index, latents, _timestep):
        order.append(f"velocity {index}")
        return torch.zeros_like(latents)

    for step in denoise(torch.zeros(1, 1, 1, 1, 1), scheduler, velocity, guide, guided=range(2)):
        order += [(step.stage, step.step, step.steps, step.latents.item(), step.losses)]
    assert order == [
        "guide 0", ("guidance", 1, 2, 1.0, (0.5,)), "velocity 0", ("sampling", 1, 3, 1.0, ()),
        "guide 1", ("guidance", 2, 2, 2.0, (0.5,)), "velocity 1", ("sampling", 2, 3, 2.0, ()),
        "velocity 2", ("sampling", 3, 3, 2.0, ()),
    ]  # fmt: skip


def test_a_step_during_which_the_loop_is_stopped_is_marked_and_the_last():
    scheduler = make_scheduler("euler", 1.0)
    scheduler.set_timesteps(5)
    stopping = []

    def guide(index, latents, _timestep):
        stopping.extend([True] * (index == 1))
        return latents, ()

    steps = denoise(
        torch.zeros(1, 1, 1, 1, 1), scheduler, lambda _, x, __: x, guide, guided=range(5), first=1,
        stop=lambda: bool(stopping),
    )  # fmt: skip
    told = [(step.stage, step.step, step.interrupted) for step in steps]
    assert told == [("guidance", 2, False), ("sampling", 2, True)]


def test_the_timestep_goes_to_the_device_without_waiting(dit, tensors, monkeypatch):
    x, positive, _ = tensors
    timestep, seen = torch.tensor(500.0), []
    to = torch.Tensor.to

    def watched(self, *args, **kwargs):
        if self.shape == (1, dit.freq_dim) and args[:1] == (dit.device,):
            seen.append(kwargs.get("non_blocking"))
        assert self is not timestep  # embedded on the CPU, where there is float64
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    with torch.no_grad():
        dit_velocity(dit, x, timestep, positive)
    assert seen == [True]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_and_say_what_warming_up_took(tensors, caplog):
    dit, (x, positive, _) = make_dit(num_layers=3), tensors
    timestep, calls = torch.tensor([500.0]), []
    with torch.no_grad(), caplog.at_level(logging.INFO):
        plain = dit(x, timestep, positive)
        compile_blocks(dit, backend="eager")
        compile_blocks(dit, backend="eager")
        dit.blocks[2].register_forward_hook(lambda *_: calls.append(1))
        compiled = dit(x, timestep, positive)
        dit(x, timestep, positive)
    assert torch.allclose(compiled, plain, atol=1e-6)
    assert len(calls) == 2
    warmed = [record for record in caplog.messages if record.startswith("torch.compile (eager)")]
    assert len(warmed) == 1, "three blocks share one compilation, and the second call needs none"
    assert set(dit.state_dict()) == set(make_dit(num_layers=3).state_dict())


def test_an_unknown_compiler_is_refused(dit):
    with pytest.raises(ValueError, match=r"backend must be one of .*inductor.*; got 'gcc'"):
        compile_blocks(dit, backend="gcc")
