"""`safegene completion SHELL`: a script with which a shell completes commands, options and file names.

The options are read from a file, `completion_words.json`, because the parsers that know them import
TRL: `.ci/completion_words.py` writes it, and a test holds it to the parsers.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files

from ..text import read_json
from .output import OPTIONS, give
from .plain_parser import PlainParser


_WORDS = "completion_words.json"
_SHELLS = ("bash", "zsh", "fish")
_ESTIMATED = ("sft", "apply", "extract", "audit")

# A function goes through the words of the line for the command, since `--quiet` may stand before it
# and `estimate` has another one behind it. Where it offers nothing, bash completes file names itself.
_BASH = """\
# safegene completion bash
_safegene() {
    local current=${COMP_WORDS[COMP_CWORD]} word command= words= options=
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case "$command $word" in
            %(followed)s) command=$word ;;
        esac
    done
    case $command in
%(offered)s
    esac
    [[ $current == -* ]] && words=$options
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _safegene safegene
"""
_ZSH = """\
#compdef safegene
# safegene completion zsh
_safegene() {
    local word command=
    local -a offered options
    for word in "${(@)words[2,CURRENT-1]}"; do
        case "$command $word" in
            %(followed)s) command=$word ;;
        esac
    done
    case $command in
%(offered)s
    esac
    if [[ $PREFIX == -* ]]; then
        compadd -- $options
    else
        compadd -- $offered
        [[ -n $command ]] && _files
    fi
}
compdef _safegene safegene
"""
_FISH = """\
# safegene completion fish
function __safegene_command
    set -l command ""
    for word in (commandline -opc)[2..-1]
        switch "$command $word"
            case %(followed)s
                set command $word
        end
    end
    echo $command
end
%(offered)s
"""
_FORMS = {
    "bash": (_BASH, '        "{command}") words="{words}" options="{options}" ;;'),
    "zsh": (_ZSH, '        "{command}") offered=({words}) options=({options}) ;;'),
    "fish": (
        _FISH,
        'complete -c safegene{alone} -n \'test "$(__safegene_command)" = "{command}"\' -a "{words} {options}"',
    ),
}


def main(argv: Sequence[str]) -> int:
    """Prints the script."""
    parser = PlainParser(
        prog="safegene completion",
        description="Print what lets a shell complete the words of `safegene`.",
        epilog='In bash: eval "$(safegene completion bash)". For all sessions keep the script where the shell looks for such files: '
        "~/.local/share/bash-completion/completions/safegene, _safegene in a folder of zsh's fpath, or "
        "~/.config/fish/completions/safegene.fish.",
    )
    parser.add_argument("shell", choices=_SHELLS, help="For which shell.")
    shell = parser.read(argv).shell
    script = script_for(shell)
    give({"shell": shell, "script": script}, script.rstrip("\n"))
    return 0


def script_for(shell: str) -> str:
    """The script for `bash`, `zsh` or `fish`."""
    text = files(__package__).joinpath(_WORDS).read_text(encoding="utf-8")
    options: Mapping[str, list[str]] = read_json(text)
    words = {"": list(options), "estimate": _ESTIMATED, "completion": _SHELLS}
    followed = [f" {command}" for command in options]
    followed += [f"estimate {command}" for command in _ESTIMATED]
    script, form = _FORMS[shell]
    offered = [
        form.format(
            command=command,
            words=" ".join(words.get(command, ())),
            options=" ".join(own),
            alone="" if command else " -f",
        )
        for command, own in {"": ["--version", "--help", *OPTIONS], **options}.items()
    ]
    between = " " if shell == "fish" else " | "
    return script % {
        "followed": between.join(f'"{each}"' for each in followed),
        "offered": "\n".join(offered),
    }
