"""What the documents show works, and what they quote is what the library says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffsynth import MotionGuidance, WanVideoPipeline
from diffsynth.cli.parser import build_parser
from diffsynth.configs.descriptors import DESCRIPTORS, Descriptor
from diffsynth.testing import write_checkpoint, write_clip

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import check_claims  # noqa: E402

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
    # Links to "../../" are pages of the repository's host: its issues, its runs of CI.
    linked = [name for name in re.findall(r"\]\(([^)#:]+)[)#]", text) if not name.startswith("../../")]
    named = re.findall(r"\b((?:docs|examples|benchmarks|tests|diffsynth)/[\w/.-]+\.\w+)", text)
    missing = [name for name in linked if not (page.parent / name).exists()]
    assert missing + [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_one_screen_and_its_documents_have_an_index():
    assert len((ROOT / "README.md").read_text().split()) <= 900
    assert (DOCS / "transfer.gif").stat().st_size < 2e6
    index = (DOCS / "README.md").read_text()
    assert [
        page.name
        for page in DOCS.glob("*.md")
        if page.name not in ("README.md", *re.findall(r"\w+\.md", index))
    ] == []


def test_every_claim_stands_in_its_document_and_every_command_is_a_claim():
    claims = check_claims.read_claims()
    texts = {claim.document: (ROOT / claim.document).read_text() for claim in claims}
    assert [claim.words for claim in claims if claim.words not in texts[claim.document]] == []
    known = {plain(claim.command) for claim in claims}
    lines = {plain(line) for page in PAGES for line in all_commands(page)}
    assert sorted(lines - known) == []


def all_commands(page):
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if re.match(r"(fastvmt|python) ", line)]


def plain(command):
    """The command without the names of the files that are its reader's, its output and its comment."""
    command = re.sub(r"\s#.*", "", command)
    return re.sub(r"[\w/-]+\.mp4(?=\b)", "VIDEO.mp4", " ".join(command.split()))


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("a 5.9 px b", "a ~5.7 px", True),
        ("a 9.9 px b", "a ~5.7 px", False),
        ("one\ntwo 3", "one ... 3", True),
        ("two one", "one ... two", False),
    ],
)
def test_what_a_claim_prints_is_compared(printed, expected, same):
    assert check_claims.agrees(printed, expected) is same


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_section_that_is_linked_exists(page):
    for name, section in re.findall(r"\]\(([\w/.]*\.md)#([\w-]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.+)$", (page.parent / name).read_text(), re.MULTILINE)
        assert section in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], section


def test_the_descriptor_of_the_example_guides(monkeypatch, tmp_path):
    made: dict = {}
    exec(blocks(DOCS / "new_descriptor.md", "python")[0], made)
    monkeypatch.setitem(DESCRIPTORS, "KeyChanges", Descriptor(make=made["KeyChanges"], help="its changes"))
    pipe = WanVideoPipeline.from_pretrained(write_checkpoint(tmp_path / "tiny"), device="cpu")
    video = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8)
    size = {"height": 32, "width": 32, "num_frames": 9}
    small = MotionGuidance(mode="KeyChanges", lr=(1e-4, 1e-4))
    pipe("a cat", input_video=video, motion=small, num_inference_steps=2, seed=1, **size)
    first, *_others = pipe.costs[0].losses
    assert first[-1] < first[0]


KNOWN_EVERYWHERE = """
import json, sys
from pathlib import Path
from benchmarks.quality.methods import standard_methods
from diffsynth import WanVideoPipeline
from diffsynth.cli.main import main
from diffsynth.webui.requests import checked_request

model = ["--model", "tiny"]
run = ["--device", "cpu", "--steps", "2", "--height", "32", "--width", "32", "--num-frames", "9"]
mode = ["--mode", "KeyChanges"]
job = {"reference": "clip.mp4", "prompt": "a cat", "mode": mode[1], "output": "b.mp4"}
Path("jobs.jsonl").write_text(json.dumps(job))
assert main(["transfer", "clip.mp4", "--prompt", "a cat", "-o", "a.mp4", *mode, *model, *run]) == 0
assert main(["inspect", "a.mp4.json"]) == 0
assert main(["plan", *mode, *model, "--steps", "2"]) == 0
assert main(["batch", "jobs.jsonl", "-o", "many", *model, *run]) == 0
assert checked_request({"prompt": "a cat", "mode": mode[1]})["mode"] == mode[1]
pipe = WanVideoPipeline.from_pretrained("tiny", device="cpu")
assert "KeyChanges" in [method.name for method in standard_methods(pipe)]
"""


@pytest.mark.slow
def test_a_descriptor_that_is_kept_as_the_document_says_is_known_everywhere(tmp_path):
    page = DOCS / "new_descriptor.md"
    ignored = shutil.ignore_patterns("__pycache__")
    kept, _tried, entry = blocks(page, "python")
    for folder in ("diffsynth", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / "diffsynth" / "motion" / "key_changes.py").write_text(kept)
    registry = tmp_path / "diffsynth" / "configs" / "descriptors.py"
    before = registry.read_text()
    registry.write_text(re.sub(r"(DESCRIPTORS: .* = \{\n)", rf"\1{entry}", before))
    write_checkpoint(tmp_path / "tiny")
    write_clip(tmp_path / "clip.mp4", num_frames=9, height=32, width=32)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", KNOWN_EVERYWHERE]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for record in ("a.mp4.json", "many/b.mp4.json"):
        options = json.loads((tmp_path / record).read_text())["options"]
        assert options["motion"]["mode"] == "KeyChanges"


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
