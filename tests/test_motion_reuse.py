"""Rules of gradient reuse and of moving the latents, on objectives whose answer is known."""

import pytest
import torch

from diffsynth.motion import MotionGuidance, optimize_latents
from diffsynth.motion.optimizer import Evaluation


def quadratic(target, calls=None, curvature=1.0):
    """Loss curvature/2 |x - target|^2 and its gradient."""

    def objective(x):
        if calls is not None:
            calls.append(x.clone())
        difference = curvature * (x - target)
        return Evaluation(0.5 * (difference * (x - target)).sum(), difference, {})

    return objective


def descend(objective, **numbers):
    numbers = {"update": "gradient", "weight_decay": 0.0, "inner_steps": 6, "interval": 3, **numbers}
    return optimize_latents(torch.zeros(4), objective, MotionGuidance(**numbers))


def test_plain_descent_moves_by_lr_in_the_root_mean_square_and_along_the_gradient():
    target = torch.tensor([3.0, -4.0, 0.0, 0.0])
    moved, _ = descend(quadratic(target), inner_steps=1, lr=(0.01, 0.01))
    assert moved.square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-5)
    torch.testing.assert_close(moved, 0.01 * 2 * target / 5, atol=1e-7, rtol=1e-5)
    # AdamW moves every element that has any gradient alike.
    adamw, _ = descend(quadratic(target), inner_steps=1, lr=(0.01, 0.01), update="adamw")
    torch.testing.assert_close(adamw, 0.01 * target.sign(), atol=1e-6, rtol=0)


def test_falling_steps_get_shorter_the_older_the_gradient_is():
    _, record = descend(quadratic(torch.ones(4)), reuse="falling", lr=(0.3, 0.3))
    assert record.evaluated_at == (0, 3)
    assert record.lrs == pytest.approx((0.3, 0.2, 0.1, 0.3, 0.2, 0.1))


def test_extrapolation_is_exact_where_the_gradient_is_linear():
    # Both gradients seen lie on the line through x(0) and x(2); with an even pace the extrapolated gradient
    # at step 3 is smaller than the last fresh one, as the true one is.
    positions: list[torch.Tensor] = []
    numbers = {"interval": 2, "inner_steps": 4, "lr": (0.1, 0.1)}
    repeated, _ = descend(quadratic(torch.ones(4), positions), **numbers)
    extrapolated, _ = descend(quadratic(torch.ones(4)), reuse="extrapolate", **numbers)
    first, second = (1 - position[0].item() for position in positions)
    step = 0.1 * second / first
    shorter = 0.1 * (second + (second - first) / 2) / first
    assert (repeated - positions[1])[0].item() == pytest.approx(2 * step, rel=1e-4)
    assert (extrapolated - positions[1])[0].item() == pytest.approx(step + shorter, rel=1e-4)


def test_gradients_that_turn_are_computed_afresh():
    straight, turning = [], []
    numbers = {"inner_steps": 9, "interval": 4, "reuse_above": 0.5, "lr": (0.1, 0.1)}
    descend(quadratic(torch.full((4,), 100.0), straight), **numbers)
    # Steps that overshoot the minimum turn the gradient around each time.
    descend(quadratic(torch.full((4,), 0.04), turning), **numbers)
    assert len(straight) == 3  # steps 0 and 1 to compare, then 5
    assert len(turning) > len(straight)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ({"reuse": "often"}, "reuse must be one of repeat, falling, extrapolate; got 'often'"),
        ({"update": "sgd"}, "update must be one of adamw, gradient; got 'sgd'"),
        ({"reuse_above": 2}, "reuse_above must be .* at least -1, at most 1 or None; got 2"),
    ],
)
def test_unknown_rules_are_named(number, message):
    with pytest.raises(ValueError, match=message):
        MotionGuidance(**number)
