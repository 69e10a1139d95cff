"""bn completion: the scripts that shells source, and what they ask bn for while a line is typed."""

from __future__ import annotations

import os
import re
import shlex

import click
from click.shell_completion import BashComplete, ShellComplete, add_completion_class, shell_complete

from bncli.cli import options as opt
from bncli.errors import UsageError, printable

ASKED = "_BN_COMPLETE"  # in the environment: what a shell's script asks for
SHELLS = ("bash", "zsh", "fish")
BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion
    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" BN_LINE="$COMP_LINE" BN_POINT="$COMP_POINT" \\
        BN_WORDBREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1")
    for completion in $response; do
        case "${completion%%%%,*}" in
            dir) COMPREPLY=(); compopt -o dirnames 2>/dev/null ;;
            file) COMPREPLY=(); compopt -o default 2>/dev/null ;;
            plain) COMPREPLY+=("${completion#*,}") ;;
        esac
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null || complete -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """Bash, which breaks words at : and = and replaces only what stands behind."""

    source_template = BASH

    def source(self) -> str:
        """The script; it needs no bash to be printed."""
        return ShellComplete.source(self)

    def complete(self) -> str:
        """What to put in place of the last word; outside of quotes, of what follows the last break in it."""
        line = os.environ.get("BN_LINE", "")
        if not line:
            return super().complete()
        words, quote = _words(os.fsdecode(os.fsencode(line)[: int(os.environ["BN_POINT"])]))
        incomplete = words[-1]
        breaks = "" if quote else os.environ.get("BN_WORDBREAKS", "")
        kept = max((incomplete.rfind(mark) + 1 for mark in ":=" if mark in breaks), default=0)
        if incomplete.startswith("-"):  # Click completes the value of --option=value alone
            kept = max(0, kept - incomplete.find("=") - 1)
        lines = []
        for item in self.get_completions(words[1:-1], incomplete):
            value = _escaped(item.value[kept:], quote) if item.type == "plain" else item.value
            lines.append(f"{item.type},{value}")
        return "\n".join(lines)


def _words(typed: str) -> tuple[list[str], str]:
    """Split a line as a shell does; and the quote that is still open, "" for none. The last word may be empty."""
    for quote in ("", '"', "'"):
        try:
            words = shlex.split(typed + quote)
        except ValueError:
            continue
        starts_new = not quote and typed[-1:].isspace() and not typed.endswith("\\ ")
        return words + [""] * (starts_new or not words), quote
    return [*typed.split(), ""], ""


def _escaped(value: str, quote: str) -> str:
    """Text as bash reads it back, in a quote or outside of quotes."""
    if quote == "'":
        return value.replace("'", "'\\''")
    special = r'(["$`\\])' if quote else r"([^\w@%+=:,./-])"
    return re.sub(special, r"\\\1", value)


def answer(group: click.Group, asked: str) -> None:
    """Print the script for a shell ("bash_source"), or what completes a line as that script asks ("bash_complete")."""
    opt.without_plugins()
    add_completion_class(Bash, "bash")
    if shell_complete(group, {}, "bn", ASKED, asked):
        known = ", ".join(f"{shell}_source" for shell in SHELLS)
        raise UsageError(f"{ASKED}={printable(asked)} is not one of {known}")


@opt.command("completion")
@click.argument("shell", type=click.Choice(SHELLS), metavar="SHELL")
@opt.debug
def completion(shell: str) -> None:
    """Print a script for SHELL (bash, zsh or fish) that completes commands, options, choices, files and datasets.

    \b
    Examples, for the start-up file of the shell:
      eval "$(bn completion bash)"        in ~/.bashrc
      eval "$(bn completion zsh)"         in ~/.zshrc, after compinit
      bn completion fish | source         in ~/.config/fish/config.fish
    """
    answer(click.Group(), f"{shell}_source")
