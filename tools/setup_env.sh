#!/usr/bin/env bash
# Make .venv hold what pyproject.toml asks for, in the versions of constraints.txt.
# Safe to call at any time: instant when there is nothing to do, and an environment that was left half made
# (a killed install, a moved checkout, a vanished interpreter) is started over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
busy=.venv/.busy         # there while something is being installed; left behind only by a kill or Ctrl-C
complete=.venv/.complete # holds the path of the checkout, because the scripts in .venv/bin do too
ffcv_done=.venv/.ffcv    # FFCV imports
ffcv_failed=.venv/.ffcv-failed
ffcv_log=.venv/ffcv-build.log

# pip's own variables also reach the isolated environments in which it builds, where `-c` does not.
export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1

trap 'exit 130' INT # pip takes Ctrl-C for an ordinary failure; we must not

say() { printf '%s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

require_python() {
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        die "bce3s needs Python 3.10 or newer and '$python' does not run: sudo apt-get install -y python3 python3-venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "bce3s needs Python 3.10 or newer and '$python' is $version: name a newer one, as in 'make PYTHON=python3.12 …'"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || install_venv
}

# Debian's python3 leaves ensurepip to a package of its own; as root it is simply installed.
install_venv() {
    local package=${python##*/}-venv
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        say "Installing $package, without which '$python' cannot create virtual environments …"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package" >/dev/null && return
    fi
    die "'$python' cannot create virtual environments yet: sudo apt-get install -y $package"
}

runs() { .venv/bin/python -c 'import pip' 2>/dev/null; }
is_here() { [[ ! -f $complete || $(<$complete) == "$(pwd -P)" ]]; }
is_current() { [[ -f $complete && ! -f $busy && $complete -nt pyproject.toml && $complete -nt constraints.txt ]] && is_here; }

install_project() {
    require_python
    if [[ -e .venv ]] && { [[ -f $busy ]] || ! is_here || ! runs; }; then
        say "The environment in .venv is unfinished, broken or was moved: starting it over."
        rm -rf .venv
    fi
    mkdir -p .venv
    touch $busy
    rm -f $ffcv_done $ffcv_failed # other versions: FFCV is looked at anew
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    # pip leaves things as they were when it fails (no network, say), so that is no reason to start over; a kill is.
    .venv/bin/python -m pip install -e ".[dev]" || {
        rm $busy
        die "The installation failed for the reason above: 'make env' tries again, 'make clean-env' comes before starting from nothing."
    }
    pwd -P >$complete
    rm $busy
}

can_build_ffcv() {
    command -v c++ >/dev/null && pkg-config --exists opencv4 libturbojpeg 2>/dev/null &&
        .venv/bin/python -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

# FFCV is one loader of several: whatever happens here, everything else works.
install_ffcv() {
    if [[ -f $ffcv_failed ]]; then
        say "FFCV is skipped, because it did not build (the reason is in $ffcv_log; 'rm $ffcv_failed' lets the next call try again)."
    elif ! can_build_ffcv; then
        say "FFCV is skipped, because its build needs packages that one line installs:" \
            "sudo apt-get install -y build-essential pkg-config ${python##*/}-dev libturbojpeg0-dev libopencv-dev"
    else
        say "Installing FFCV …"
        touch $busy
        if .venv/bin/python -m pip install -e ".[ffcv]" >$ffcv_log 2>&1 && .venv/bin/python -c 'import ffcv' >>$ffcv_log 2>&1; then
            touch $ffcv_done
            say "FFCV is installed."
        else
            touch $ffcv_failed
            say "FFCV did not build and is skipped; the reason is in $ffcv_log."
        fi
        rm $busy
    fi
}

if ! { is_current && runs; }; then install_project; fi
[[ -f $ffcv_done ]] || install_ffcv
