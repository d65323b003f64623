# Sourced by run.sh and test.sh: prepares .venv at the repository's root.
# Sets $root and $python, and leaves the working directory alone. Everything it says goes to standard error.
#
# A stamp in .venv says what was installed, so that the second run starts at once. It is written after everything
# else; an installation that was cut off is made again from the start.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/minimax_jax.installed"
unfinished="$venv/minimax_jax.unfinished"
log="$venv/minimax_jax.log"

say() { printf '%s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# "3.11" for an interpreter that this package supports. Otherwise says what is wrong with it and returns 1.
python_version() {
    "$1" -c 'import sys
v = sys.version_info[:2]
print("%d.%d" % v)
sys.exit(not (3, 11) <= v < (3, 14))' 2>/dev/null && return
    [ $? = 1 ] || printf 'does not start'
    return 1
}

# Prints the path of the first supported Python that can make virtual environments.
find_python() {
    local name path version tried="" without_venv="" seen=":"
    while IFS= read -r path; do
        [ -x "$path" ] || continue
        case "$seen" in *":$path:"*) continue ;; esac
        seen="$seen$path:"
        if ! version=$(python_version "$path"); then
            tried="$tried${tried:+, }$path ($version)"
        elif ! "$path" -c 'import ensurepip, venv' 2>/dev/null; then
            without_venv="$without_venv${without_venv:+, }$path ($version)"
        else
            "$path" -c 'import sys; print(sys.executable)'
            return
        fi
    done < <(
        for name in python3 python3.13 python3.12 python3.11 python; do type -ap "$name" || true; done
        printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[123].*/bin/python3
    )
    [ -z "$without_venv" ] || fail "no virtual environment can be made with $without_venv: install its venv module" \
        "(Debian and Ubuntu: apt install python3-venv)."
    fail "Python 3.11, 3.12 or 3.13 is needed and none was found; tried: ${tried:-python3, python}."
}

# cuda13, cuda12 or nothing, by the NVIDIA driver.
cuda_extra() {
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
    driver=${driver%%.*}
    case "$driver" in
        '' | *[!0-9]*) ;;
        *) if [ "$driver" -ge 580 ]; then echo cuda13; elif [ "$driver" -ge 525 ]; then echo cuda12; fi ;;
    esac
}

# Keeps pip's output in the log. A terminal gets one moving line; elsewhere only the large downloads are named.
show_progress() {
    local line columns=0
    [ ! -t 2 ] || columns=$(($(tput cols 2>/dev/null || echo 80) - 1))
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        line="  ${line#"${line%%[![:space:]]*}"}"
        if [ "$columns" -gt 0 ]; then
            printf '\r\033[K%.*s' "$columns" "$line" >&2
        else
            case "$line" in
                "  Downloading "*" MB"* | "  Using cached "*" MB"* | *"WARNING: Retrying"*) say "$line" ;;
            esac
        fi
    done
    [ "$columns" -eq 0 ] || printf '\r\033[K' >&2
}

make_venv() {
    local base=$1
    rm -rf "$venv"
    mkdir "$venv"
    : >"$unfinished"
    say "Making .venv with $base"
    if ! "$base" -m venv "$venv" >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        fail "$base cannot make a virtual environment."
    fi
}

install_extras() { # extras, separated by spaces
    local list=${1// /,} started=$SECONDS
    say "Installing minimax-jax${list:+[$list]} into .venv (minutes the first time)"
    rm -f "$stamp"
    : >"$unfinished"
    : >"$log"
    trap 'exit 130' INT TERM
    if ! (cd "$root" && "$python" -m pip install --no-user --no-input --disable-pip-version-check --progress-bar off \
        --editable ".${list:+[$list]}" </dev/null 2>&1) | show_progress; then
        # pip had not begun to change anything: what is in .venv is as good as before.
        grep -q '^Installing collected packages' "$log" || rm -f "$unfinished"
        grep -E 'ERROR|error:' "$log" | tail -n 8 >&2 || true
        fail "the installation failed; pip's whole output is in $log"
    fi
    trap - INT TERM
    say "Installed in $((SECONDS - started)) s"
}

prepare_environment() { # extras
    local version="" base="" key stamped="" installed="" cuda extra extras
    if [ -e "$unfinished" ]; then
        say "The last installation into .venv was cut off; making it again"
        base=$("$python" -c 'import sys; print(sys._base_executable)' 2>/dev/null) || base=""
    elif [ -e "$venv" ] || [ -L "$venv" ]; then
        if ! version=$(python_version "$python"); then
            say "Making .venv again: its Python is not of use (${version:-none})"
            version=""
        fi
    fi

    cuda=$(cuda_extra)
    extras="${cuda:+$cuda }$*"
    if [ -n "$version" ]; then
        key="$version $(cksum <"$root/pyproject.toml") $root"
        [ ! -r "$stamp" ] || { read -r stamped && read -r installed || true; } <"$stamp"
        for extra in $installed; do
            case "$extra $cuda" in
                "cuda12 cuda13" | "cuda13 cuda12") # the two plugins must not meet
                    say "Making .venv again: the NVIDIA driver asks for $cuda now"
                    base=$("$python" -c 'import sys; print(sys._base_executable)')
                    version=""
                    ;;
            esac
        done
    fi
    if [ -n "$version" ]; then
        local missing=""
        for extra in $extras; do
            case " $installed " in *" $extra "*) ;; *) missing=yes ;; esac
        done
        [ -n "$missing" ] || [ "$stamped" != "$key" ] || return 0
        for extra in $installed; do # what was asked for earlier stays
            case " $extras " in *" $extra "*) ;; *) extras="${extras:+$extras }$extra" ;; esac
        done
        if ! "$python" -m pip --version >/dev/null 2>&1; then
            say "Making .venv again: it has no pip"
            base=$("$python" -c 'import sys; print(sys._base_executable)')
            version=""
        fi
    fi
    if [ -z "$version" ]; then
        { [ -n "$base" ] && version=$(python_version "$base"); } || base=$(find_python)
        make_venv "$base"
        version=$(python_version "$python") || fail "the Python of the new .venv does not start."
        key="$version $(cksum <"$root/pyproject.toml") $root"
    fi

    install_extras "$extras"
    printf '%s\n%s\n' "$key" "$extras" >"$stamp"
    rm -f "$unfinished"
}
