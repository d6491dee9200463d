"""500 damaged and hostile files: each is read, or refused as documented."""

import json

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis, of the extra dev")

from fuzzing import GROWTH, make_targets, peak_megabytes, run_target

from diffsynth.cli.main import main
from diffsynth.testing import write_checkpoint, write_clip

CASES = 500


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    clip = write_clip(folder / "ref.mp4", num_frames=5, height=32, width=32)
    model = write_checkpoint(folder / "tiny")
    run = ["transfer", clip, "--model", model, "--prompt", "a cat", "--height", "32", "--width", "32", "-q"]
    assert main([*run, "--num-inference-steps", "2", "-o", folder / "out.mp4"]) == 0
    record = json.loads((folder / "out.mp4.json").read_text())
    return folder, make_targets(folder, record)


@pytest.mark.slow
def test_every_damaged_file_is_read_or_refused_as_documented(targets):
    folder, targets = targets
    total = sum(target.weight for target in targets)
    before = peak_megabytes()
    outcomes = {t.name: run_target(t, folder, round(CASES * t.weight / total)) for t in targets}
    assert sum(sum(outcome.ends.values()) for outcome in outcomes.values()) >= 0.9 * CASES
    assert peak_megabytes() - before < GROWTH
    # Damage that nothing notices would make this test worthless.
    assert sum(outcome.ends["read"] for outcome in outcomes.values()) < 0.6 * CASES
