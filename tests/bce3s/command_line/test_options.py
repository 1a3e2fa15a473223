"""One house, one language: an option of several commands is the same thing, of the same type, in the same words."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bce3s.cli import COMMANDS
from bce3s.command_line.options import STEMS
from tests.bce3s.command_line.commands_and_tools import command_lines, options_by_name

SHARED = {name: found for name, found in options_by_name().items() if len(found) > 1}
DIFFERENT_THINGS = {
    "--format": "of shards, of what is exported, printed or drawn",
    "--batch-size": "source images of a training step, or images at once",
}


def kind(option: Any) -> tuple[Any, ...]:
    """What may be typed after it; a place is typed alike whether it is a path or may be a URL."""
    annotation = str(option.type_descriptor.annotation).replace("pathlib.Path", "str")
    return option.is_flag, option.multiple, option.nargs, annotation


def clause(text: str) -> str:
    """The first clause of a help text: what the option is, before defaults and examples."""
    return re.split(r"[;:.,(]", text)[0].strip()


def test_there_are_as_many_command_lines_as_we_think() -> None:
    assert len(command_lines()) == len(COMMANDS) + 3 + 1  # tools, and `make_shards.py merge`
    assert {"--device", "--out", "--shards", "--json", "--set", "--quiet", "--overwrite"} <= set(SHARED)


@pytest.mark.parametrize("name", command_lines())
def test_every_command_says_in_a_sentence_what_it_does(name: str) -> None:
    sentence = (command_lines()[name].help or "").split("\n")[0]
    assert re.fullmatch(r"[A-Z].{15,}\.", sentence), sentence
    if name in COMMANDS:
        assert sentence == COMMANDS[name][1], "the list of commands in bce3s/cli.py and the docstring say different things"


@pytest.mark.parametrize("name", command_lines())
def test_every_option_has_help_and_none_is_there_twice(name: str) -> None:
    options = [option for option in command_lines()[name].params if option.param_type_name == "option"]
    spellings = [spelling for option in options for spelling in (*option.opts, *option.secondary_opts)]
    assert len(spellings) == len(set(spellings))
    for option in options:
        assert option.hidden or re.fullmatch(r"\S.{5,}[.…]", option.help or ""), (option.opts, option.help)
        assert option.show_default or "default" in option.help, f"{option.opts[0]} does not show its default"
        assert re.fullmatch(r"--[a-z][a-z-]+", option.opts[0]), option.opts


@pytest.mark.parametrize("name", SHARED)
def test_the_same_name_takes_the_same(name: str) -> None:
    kinds = {command: kind(option) for command, option in SHARED[name]}
    if name not in DIFFERENT_THINGS:
        assert len(set(kinds.values())) == 1, kinds


@pytest.mark.parametrize("name", SHARED)
def test_the_same_name_is_explained_in_the_same_words(name: str) -> None:
    helps = {command: option.help for command, option in SHARED[name]}
    if name == "--out":
        assert all(re.match(r"(HTML file|File|Folder) to write", text) for text in helps.values()), helps
    elif name in STEMS:
        assert all(text.startswith(STEMS[name]) for text in helps.values()), helps
    elif name not in DIFFERENT_THINGS:
        assert len({clause(text) for text in helps.values()}) == 1, helps


@pytest.mark.parametrize(("command", "old", "new"), [("fast-train", "--loss", "--method"), ("make_shards.py", "--keep", "--keep-bytes")])
def test_old_spellings_still_work(command: str, old: str, new: str) -> None:
    assert any({old, new} <= set(option.opts) for option in command_lines()[command].params)
