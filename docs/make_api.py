"""Write docs/api.md from the docstrings of the public names.

python docs/make_api.py
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import diffsynth
from diffsynth import evaluation
from diffsynth.caches.mag_calibration import calibrate_magcache
from diffsynth.configs.caches import CacheOptions
from diffsynth.configs.defaults import RunDefaults
from diffsynth.configs.options import RunOptions
from diffsynth.data.synthetic import SyntheticClip, make_clip
from diffsynth.models.attention import use_attention
from diffsynth.models.convert import convert_checkpoint
from diffsynth.pipelines.denoise import RunEvent
from diffsynth.planning.plan import RunPlan

HERE = Path(__file__).parent
INTRO = """# API

Made from the docstrings by `python docs/make_api.py`. Shapes are in brackets: B batch, C channels, F frames,
H rows, W columns. Pictures and videos are PIL images of mode RGB unless said otherwise.
"""
SECTIONS: dict[str, list[object]] = {
    "diffsynth": [getattr(diffsynth, name) for name in diffsynth.__all__],
    "Options and results of a run": [RunOptions, CacheOptions, RunDefaults, RunEvent, RunPlan],
    "diffsynth.evaluation": [getattr(evaluation, name) for name in evaluation.__all__],
    "Elsewhere": [make_clip, SyntheticClip, use_attention, convert_checkpoint, calibrate_magcache],
}


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    for title, things in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [entry(thing) for thing in things]
    return "\n".join(parts)


def entry(thing: object) -> str:
    """Signature and docstring of a function or a class, and those of a class's public methods."""
    if not inspect.isclass(thing):
        return _described("###", f"{_place(thing)}{_signature(thing)}", thing)
    parts = [_described("###", f"{_place(thing)}{_signature(thing)}", thing)]
    for name, member in vars(thing).items():
        if isinstance(member, property) and member.__doc__ and not name.startswith("_"):
            parts.append(f"- **`.{name}`** {_text(member)}\n")
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        public = not name.startswith("_") or (name == "__call__" and thing.__name__ == "WanVideoPipeline")
        if inspect.isfunction(function) and public and function.__doc__:
            parts.append(_described("####", f".{name}{_signature(function)}", function))
    return "\n".join(parts)


def _place(thing: object) -> str:
    module = thing.__module__
    for public in (diffsynth, evaluation):
        if thing.__name__ in public.__all__:
            module = public.__name__
    return f"{module}.{thing.__name__}"


def _signature(function: Callable) -> str:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return ""
    kept = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    # Types are told by the docstrings where they matter; with them signatures would fill the page.
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in kept]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+|<factory>", "", text)


def _text(thing: object) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _described(level: str, heading: str, thing: object) -> str:
    text = _text(thing)
    generated = inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")
    return f"{level} `{heading}`\n\n{'' if generated else text}\n"


if __name__ == "__main__":
    (HERE / "api.md").write_text(page())
