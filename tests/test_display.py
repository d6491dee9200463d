"""Videos in notebooks: the frames are inside the page, and without IPython it says so."""

import base64
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import diffsynth
from diffsynth import VideoData
from diffsynth.testing import write_clip


@pytest.fixture
def ipython(monkeypatch):
    """A stand-in that keeps what it is given, where IPython itself is not installed."""
    try:
        import IPython.display  # noqa: F401
    except ImportError:

        class Video:
            def __init__(self, data=None, mimetype="video/mp4", html_attributes="", **_options):
                data = data if isinstance(data, bytes) else Path(data).read_bytes()
                source = f"data:{mimetype};base64,{base64.b64encode(data).decode()}"
                self.html = f'<video {html_attributes} src="{source}">'

            def _repr_html_(self):
                return self.html

        module = ModuleType("IPython.display")
        module.Video = Video
        monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", module)


@pytest.mark.usefixtures("ipython")
@pytest.mark.parametrize("kind", ["path", "video", "array"])
def test_a_video_is_shown_inside_the_page(tmp_path, kind):
    path = write_clip(tmp_path / "clip.mp4", num_frames=5, height=32, width=48)
    given = {"path": path, "video": VideoData(path), "array": np.zeros((5, 32, 48, 3), np.uint8)}[kind]
    shown = diffsynth.display(given)._repr_html_()
    assert "autoplay" in shown
    (tmp_path / "shown.mp4").write_bytes(base64.b64decode(re.search(r"base64,([^\"']+)", shown)[1]))
    with VideoData(tmp_path / "shown.mp4") as video:
        assert (len(video), video.shape()) == (5, (32, 48))


def test_without_ipython_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(ImportError, match="needs IPython: pip install ipython"):
        diffsynth.display(np.zeros((5, 32, 48, 3), np.uint8))
