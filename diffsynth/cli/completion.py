"""`fastvmt completion`: scripts for the shell's tab completion, which shtab makes from the parser."""

import argparse
from argparse import Namespace
from pathlib import Path

from diffsynth.cli.console import DONE, Console
from diffsynth.cli.parser import Parser, build_parser


def run(options: Namespace, console: Console) -> int:
    """Print the script for a shell; ImportError that names the extra with shtab if that is missing."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError("completion needs shtab: pip install 'fastvmt[completion]'") from error
    parser = build_parser()
    for command in commands_of(parser).values():
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads this attribute
    script = shtab.complete(parser, shell=options.shell)
    console.say(script.rstrip())
    console.result({"shell": options.shell, "script": script})
    return DONE


def commands_of(parser: Parser) -> dict[str, Parser]:
    """Return the commands of the parser by name."""
    actions = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(next(actions).choices)
