#!/usr/bin/env bash
# What the launching scripts share: messages, --help, --dry_run, and settings of the form --name=value. Sourced, not run.

script=${0##*/}
dry_run=false

say() { printf '[%s] %s\n' "$script" "$*" >&2; }
fail() { # 2, as the command `memorizing` says of input that a user can mend
    printf '[%s] error: %s\n' "$script" "$*" >&2
    exit 2
}

print_header() { # the comment that a script opens with: its --help
    sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

enter_environment() { # puts `memorizing` on PATH; another command (MEMORIZING) brings its own environment
    [ -z "${MEMORIZING:-}" ] || return 0
    bash launch/setup.sh
    PATH="$PWD/.venv/bin:$PATH"
}

shell_quoted() { # one line that a shell reads back as the same words
    local word line=
    for word in "$@"; do
        if ! [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
        line+=" $word"
    done
    printf '%s' "${line# }"
}

run() { # the one place where --dry_run is decided
    if $dry_run; then
        shell_quoted "$@"
        echo
    else
        "$@"
    fi
}

require_whole() { # --name value lowest
    if ! [[ "$2" =~ ^(0|[1-9][0-9]*)$ ]] || [ "$2" -lt "$3" ]; then
        fail "$1=$2: must be a whole number, at least $3"
    fi
}

has_option() { # --name words... : whether one of the words sets it
    local name=$1 word
    for word in "${@:2}"; do
        case "$word" in "$name" | "$name"=*) return 0 ;; esac
    done
    return 1
}
