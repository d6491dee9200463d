"""Cleaning, tokenising and encoding of prompts."""

from diffsynth.prompters.wan_prompter import WanPrompter, clean_prompt

__all__ = ["WanPrompter", "clean_prompt"]
