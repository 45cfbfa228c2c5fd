#!/usr/bin/env bash
# Functions of all launch scripts: messages, --help, --dry_run and options of the form --name=value. Sourced, not run.

script=${0##*/}
dry_run=false

say() { printf '[%s] %s\n' "$script" "$*" >&2; }
fail() { # status 2, as for every input error of `memorizing`
    printf '[%s] error: %s\n' "$script" "$*" >&2
    exit 2
}

print_header() { # prints a script's first comment: its --help
    sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

enter_environment() { # puts `memorizing` on PATH, unless MEMORIZING names another command
    [ -z "${MEMORIZING:-}" ] || return 0
    bash launch/setup.sh
    PATH="$PWD/.venv/bin:$PATH"
}

shell_quoted() { # prints a line that a shell reads as the same words
    local word line=
    for word in "$@"; do
        if ! [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
        line+=" $word"
    done
    printf '%s' "${line# }"
}

run() { # runs a command; with --dry_run prints it
    if $dry_run; then
        shell_quoted "$@"
        echo
    else
        "$@"
    fi
}

check_spelling() { # word: refuses an option that is spelled with hyphens
    local name=${1%%=*}
    if [[ "$name" =~ ^--[a-z]+(-[a-z]+)+$ ]]; then
        name=${name#--}
        fail "--$name is now --${name//-/_}"
    fi
}

require_whole() { # --name value lowest
    if ! [[ "$2" =~ ^(0|[1-9][0-9]*)$ ]] || [ "$2" -lt "$3" ]; then
        fail "$1=$2: must be a whole number, at least $3"
    fi
}

has_option() { # --name words...: tells whether one of the words sets the option
    local name=$1 word
    for word in "${@:2}"; do
        case "$word" in "$name" | "$name"=*) return 0 ;; esac
    done
    return 1
}
