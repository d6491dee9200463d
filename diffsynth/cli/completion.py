"""`fastvmt completion`: scripts for tab completion, made from the parser, so that they fit it."""

import argparse
import shlex
from argparse import Namespace

from diffsynth.cli.console import DONE, Console
from diffsynth.cli.parser import Parser, build_parser

_BASH = """_fastvmt() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $before" in
{choices}
            *) case "${{COMP_WORDS[1]}}" in
{options}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _fastvmt fastvmt
"""


def run(options: Namespace, console: Console) -> int:
    """Print the script for a shell."""
    script = _fish() if options.shell == "fish" else _bash(zsh=options.shell == "zsh")
    console.say(script.rstrip())
    console.result({"shell": options.shell, "script": script})
    return DONE


def commands_of(parser: Parser) -> dict[str, Parser]:
    """The commands of the parser by name."""
    actions = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(next(actions).choices)


def _bash(zsh: bool) -> str:
    commands = commands_of(build_parser())
    options, choices = [], []
    for name, command in commands.items():
        flags = " ".join(flag for action in command._actions for flag in action.option_strings)
        values = " ".join(str(c) for a in command._actions if not a.option_strings for c in a.choices or ())
        options.append(f'                {name}) words="{" ".join(filter(None, (values, flags)))}" ;;')
        for action in command._actions:
            if action.choices and action.option_strings:
                pattern = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                choices.append(f'            {pattern}) words="{" ".join(map(str, action.choices))}" ;;')
    script = _BASH.format(commands=" ".join(commands), choices="\n".join(choices), options="\n".join(options))
    return ("autoload -U +X bashcompinit && bashcompinit\n" if zsh else "") + script


def _fish() -> str:
    commands = commands_of(build_parser())
    lines = [
        f"complete -c fastvmt -n __fish_use_subcommand -f -a {name} -d {shlex.quote(command.description)}"
        for name, command in commands.items()
    ]
    for name, command in commands.items():
        lines += [_fish_option(name, action) for action in command._actions]
    return "\n".join(lines) + "\n"


def _fish_option(command: str, action: argparse.Action) -> str:
    words = ["complete -c fastvmt", f"-n '__fish_seen_subcommand_from {command}'"]
    flags = action.option_strings
    words += [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in flags]
    if action.choices:
        # An option's values are all that may follow it; a command's own stand beside its options.
        kind = "-xa" if action.option_strings else "-fa"
        words.append(f"{kind} {shlex.quote(' '.join(map(str, action.choices)))}")
    if action.help:
        words.append(f"-d {shlex.quote(action.help)}")
    return " ".join(words)
