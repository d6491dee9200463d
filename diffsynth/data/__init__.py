"""Frames in and out: reference videos before the VAE encoder, finished ones after its decoder."""

from diffsynth.data.frames import fit_frame
from diffsynth.data.video import VideoData
from diffsynth.data.writer import save_frames, save_video

__all__ = ["VideoData", "fit_frame", "save_frames", "save_video"]
