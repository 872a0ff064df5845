#!/usr/bin/env bash
# Run the kernels' compiler IR on the CPU: `make test-kernels-ir`. Arguments go to pytest.
#
# ttsem needs Python 3.12. Where none is found, root makes a Debian 13 in a folder, which has Python 3.13. This and the
# packages (5.7 GB) are kept for the next run. What is missing is said, and nothing is tested then.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/sws-dist/kernels-ir
debian=$cache/debian
packages=(torch triton ttsem==0.1.0 pytest)
gigabytes=8

skip() {
    echo "test-kernels-ir: skipped, nothing was tested: $1"
    exit 0
}

find_python() {
    local candidate
    for candidate in python3 python3.{12,13,14} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-4].*/bin/python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info < (3, 15))' 2>/dev/null
        then
            command -v "$candidate"
            return
        fi
    done
}

check_that_debian_can_be_made() {
    local why="no Python of 3.12 to 3.14 was found"
    [ "$(id -u)" = 0 ] || skip "$why, and to make a Debian 13 in a folder takes root"
    unshare --mount true 2>/dev/null || skip "$why, and a Debian 13 in a folder takes a root who may mount"
    command -v debootstrap >/dev/null || (apt-get update -qq && apt-get install -y -qq debootstrap) >/dev/null ||
        skip "$why, and debootstrap, which would bring one, could not be installed"
}

install() { # PYTHON [OPTIONS]: the packages in the versions that all tests take
    "$1" -m pip install --quiet --constraint constraints.txt "${@:2}" "${packages[@]}" ||
        skip "pip could not install ${packages[*]}"
}

make_environment() {
    if [ -n "$python" ]; then
        "$python" -m venv "$cache/venv"
        install "$cache/venv/bin/python"
    else
        debootstrap --variant=minbase --include=python3 trixie "$debian" >"$cache/debootstrap.log" 2>&1 ||
            skip "debootstrap could not make a Debian 13: $(tail -1 "$cache/debootstrap.log")"
        # The Python here installs for that one, so the Debian needs neither pip nor a network.
        install python3 --python-version 3.13 --only-binary :all: --target "$debian/packages"
    fi
}

python=$(find_python)
[ -n "$python" ] || check_that_debian_can_be_made
made_of="${python:-debian} ${packages[*]} $(grep -E '^(torch|triton|pytest)==' constraints.txt)"
if [ "$(cat "$cache/made_of" 2>/dev/null)" != "$made_of" ]; then
    rm -rf --one-file-system "$cache" # debootstrap that was stopped may have left /proc mounted
    mkdir -p "$cache"
    [ "$(df --output=avail -BG "$cache" | tr -dc '0-9\n' | tail -1)" -ge $gigabytes ] ||
        skip "$cache has less than $gigabytes GB of free space"
    echo "test-kernels-ir: making its environment in $cache: some minutes, once"
    make_environment
    echo "$made_of" >"$cache/made_of"
fi

# typings/ has the kernels under the name that they are imported by.
command=(python3 -m tests.kernels_ir "$@")
if [ -n "$python" ]; then
    PATH=$cache/venv/bin:$PATH PYTHONPATH=typings:. OMP_NUM_THREADS=1 exec "${command[@]}"
fi
rm -rf "$debian/repository"
mkdir "$debian/repository"
cp -a pyproject.toml kernels typings tests "$debian/repository"
# PyTorch reads from /proc and /sys what the CPU can do. They are mounted for this process alone.
enter='mount --bind /proc "$0/proc" && mount --bind /sys "$0/sys" && exec chroot "$0" "$@"'
exec unshare --mount bash -c "$enter" "$debian" \
    env -C /repository PATH=/usr/bin:/bin HOME=/root PYTHONPATH=/packages:typings:. OMP_NUM_THREADS=1 "${command[@]}"
