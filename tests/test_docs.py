"""What the documents show works, and what they quote is what the library says."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from diffsynth import MotionGuidance, WanVideoPipeline
from diffsynth.cli.parser import build_parser
from diffsynth.motion.guided_step import DESCRIPTORS
from diffsynth.testing import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page):
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if line.startswith("fastvmt ")]


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page)}))
def test_every_command_has_options_that_there_are(line):
    build_parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_picture_that_is_named_exists(page):
    text = page.read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"\b((?:docs|examples|benchmarks|tests|diffsynth)/[\w/.-]+\.\w+)", text)
    missing = [name for name in linked if not (page.parent / name).exists()]
    assert missing + [name for name in named if not (ROOT / name).exists()] == []


def test_the_descriptor_of_the_example_guides(monkeypatch, tmp_path):
    made: dict = {}
    exec(blocks(DOCS / "new_descriptor.md", "python")[0], made)
    monkeypatch.setitem(DESCRIPTORS, "AMF", made["KeyChanges"])
    pipe = WanVideoPipeline.from_pretrained(write_checkpoint(tmp_path / "tiny"), device="cpu")
    video = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8)
    size = {"height": 32, "width": 32, "num_frames": 9}
    small = MotionGuidance(mode="AMF", lr=(1e-4, 1e-4))
    pipe("a cat", input_video=video, motion=small, num_inference_steps=2, seed=1, **size)
    first, *_others = pipe.costs[0].losses
    assert first[-1] < first[0]


def test_the_api_page_is_that_of_the_docstrings():
    import make_api

    assert (DOCS / "api.md").read_text() == make_api.page(), "run: python docs/make_api.py"


QUOTED = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", QUOTED)
def test_every_message_that_is_explained_is_one_of_ours(message):
    """Its fixed words, in their order, in one string of the code; "..." stands for what differs."""
    source = "\n".join(path.read_text() for path in (ROOT / "diffsynth").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    assert re.search(r"[^\n]*".join(parts), joined), message
