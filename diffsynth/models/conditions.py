"""The inputs that pictures add to an image model's DiT, beside the noised latents."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class ImageCondition(NamedTuple):
    """The inputs of the DiT that come from pictures; all None for a model or a run without pictures.

    The first channels of y, which are appended to the latents, are a mask, 1 in the frames of a picture.
    Without y, first_frame is the first latent frame throughout, at timestep 0.
    """

    y: Tensor | None = None  # [1, C, F, h, w]
    clip_feature: Tensor | None = None  # [1, L, image_dim]
    first_frame: Tensor | None = None  # latents [1, C, 1, h, w] of the first picture

    def hold(self, latents: Tensor) -> Tensor:
        """Return latents [1, C, F, h, w] whose first frame is the picture's, if the model has it so."""
        if self.y is not None or self.first_frame is None:
            return latents
        return torch.cat([self.first_frame.to(latents), latents[:, :, 1:]], dim=2)

    def free(self, latents: Tensor) -> Tensor:
        """Return 1 for the frames of latents [1, C, F, h, w] that no picture fixes, else 0, as [F, 1, 1]."""
        free = latents.new_ones(latents.shape[2], 1, 1)
        if self.y is not None:
            mask = self.y[0, : self.y.shape[1] - latents.shape[1]]
            return free - mask.amax((0, 2, 3))[:, None, None].to(free)
        free[: 0 if self.first_frame is None else 1] = 0
        return free

    def averaged(self, average: Callable[[Tensor], Tensor]) -> "ImageCondition":
        """Return the condition of latents that are averaged over squares, as y and first_frame then are."""
        maps = {"y": self.y, "first_frame": self.first_frame}
        return self._replace(**{name: average(m) for name, m in maps.items() if m is not None})

    def of_dit(self, timestep: Tensor, batch: int, num_frames: int) -> dict[str, Tensor]:
        """Return the arguments of the DiT for a batch at one timestep [1] of the noised frames."""
        if self.y is None and self.first_frame is not None:
            timestep = torch.cat([torch.zeros_like(timestep), timestep.expand(num_frames - 1)])[None]
        named = {"timestep": timestep, "y": self.y, "clip_feature": self.clip_feature}
        return {
            name: tensor.expand(batch, *tensor.shape[1:])
            for name, tensor in named.items()
            if tensor is not None
        }


NO_CONDITION = ImageCondition()
