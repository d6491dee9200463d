"""Docstrings of public functions and dataclasses are whole: what is listed at all is listed completely."""

import ast
import inspect
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "diffsynth"
FILES = sorted(PACKAGE.rglob("*.py"))
# Parameters that no Args section needs to name.
IMPLIED = {"self", "cls"}
# `run` takes the arguments of the call, which lists them; the summary of `to` says both.
WITHOUT_ARGS = {"WanVideoPipeline.run", "WanVideoPipeline.to"}
make_api = SimpleNamespace(**runpy.run_path(str(PACKAGE.parent / "docs" / "make_api.py")))


def section(docstring: str, title: str) -> set[str]:
    """Return the names that a section of a Google-style docstring describes, "a, b: ..." as both."""
    match = re.search(rf"^( *){title}:\n((?:\1 +.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    if match is None:
        return set()
    entries = re.findall(rf"^{match[1]}    ([\w*]+(?:, [\w*]+)*):", match[2], re.MULTILINE)
    entries += re.findall(r"; (\w+(?:, \w+)*): ", match[2])
    return {name.strip("*") for entry in entries for name in entry.split(", ")}


def public(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def unlisted(node: ast.FunctionDef) -> set[str]:
    """Return the parameters that an Args section leaves out; none if there is no such section."""
    listed = section(ast.get_docstring(node) or "", "Args")
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = {argument.arg for argument in arguments if not argument.arg.startswith("_")}
    names |= {rest.arg for rest in (node.args.vararg, node.args.kwarg) if rest is not None}
    return names - IMPLIED - listed if listed else set()


def page_functions() -> Iterator[tuple[str, Callable]]:
    """Yield the functions and methods that docs/api.md lists, by name."""
    for thing in (thing for things in make_api.SECTIONS.values() for thing in things):
        if not inspect.isclass(thing):
            yield thing.__name__, thing
            continue
        for name, member in vars(thing).items():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and function.__doc__ and not name.startswith("_"):
                yield f"{thing.__name__}.{name}", function


def undescribed(node: ast.ClassDef, lines: list[str]) -> set[str]:
    """Return the fields of a dataclass that are in no Attributes or Args section and have no comment."""
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return set()
    docstring = ast.get_docstring(node) or ""
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    told = section(docstring, "Attributes") | section(docstring, "Args")
    told |= {f.target.id for f in fields if "#" in lines[f.end_lineno - 1]}
    told |= {f.target.id for f in fields if f.value is not None and "option(" in ast.unparse(f.value)}
    return {f.target.id for f in fields} - told if told else set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_docstring_that_lists_some_lists_all(path):
    source = path.read_text()
    found = {}
    for node in public(ast.parse(source)):
        names = unlisted(node) if isinstance(node, ast.FunctionDef) else undescribed(node, source.split("\n"))
        if names:
            found[f"{node.name} (line {node.lineno})"] = sorted(names)
    assert not found


def test_functions_of_the_api_page_with_several_parameters_list_them():
    functions = dict(page_functions())
    bare = {
        name
        for name, function in functions.items()
        if len(inspect.signature(function).parameters.keys() - IMPLIED) > 1
        and not section(inspect.getdoc(function) or "", "Args")
    }
    assert len(functions) > 60
    assert bare == WITHOUT_ARGS
