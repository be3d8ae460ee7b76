# shellcheck shell=bash
# Installs what dmafs needs on Debian 12 or its like. To be sourced, by contrib/test, contrib/bench and contrib/demo.
#
#   dmafs_root "$0" "$@"   go on as root (loop devices and mounts need it), through sudo if need be
#   dmafs_setup [EXTRA]    system packages, kernel devices, virtual environment, dmafs itself; EXTRA is `test` or nothing
#   dmafs_vm               what a User-Mode Linux guest needs: system packages, and the kernel, whose program is then
#                          $DMAFS_UML_KERNEL and whose modules are in $DMAFS_UML_MODULES
#   dmafs_package          what building and trying the package for Debian needs
#   dmafs_bench            system packages of the programs that benchmarks compare with
#
# dmafs_setup puts the virtual environment's programs first in PATH. It does only what is missing, so a second run takes
# no time. Its folder is $DMAFS_VENV, by default .venv in the repository. A guest's kernel that isn't installed is kept
# in $DMAFS_UML, by default .cache/uml in the repository.

DMAFS_REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DMAFS_VENV="$(realpath -m "${DMAFS_VENV:-$DMAFS_REPO/.venv}")"
DMAFS_UML="$(realpath -m "${DMAFS_UML:-$DMAFS_REPO/.cache/uml}")"
DMAFS_PACKAGES=(
    fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv # to build pyfuse3, which has no binary packages
    e2fsprogs btrfs-progs mount util-linux attr # file systems on loop devices
    sqlite3 git tar # what runs on the protected disks in tests
    groff-base mandoc # to check the man pages
)
DMAFS_TEST_PACKAGES=(
    qemu-system-common # its storage daemon writes the logs that are followed
    systemd # checks the units for boot; nothing of it has to run
    tzdata # README.md was run in another zone than UTC
    fdisk xfsprogs # partition tables, and file systems on partitions
    postgresql # a database that is started from a clone; the cluster that the package makes is left alone
)
DMAFS_VM_PACKAGES=(
    gcc libc6-dev # builds what lets the guest's kernel run on processors that are newer than it
    kmod iproute2 # modules and the loopback interface of the guest, which uses the host's programs
    dmsetup # the other opinion on what device-mapper's state is
    fuse3 e2fsprogs xfsprogs fio # what runs on the devices
    fdisk parted dosfstools btrfs-progs # partition tables, and what is none
)
DMAFS_PACKAGE_PACKAGES=(
    debhelper # makes the package
    debootstrap # makes the system that it is tried in
)
DMAFS_BENCH_PACKAGES=(
    qemu-utils qemu-system-common # chains of overlays, and the storage daemon that shows them
    borgbackup python3-pyfuse3 # an archive, mounted
    fio # random reads
)

_dmafs_say() { printf 'setup: %s\n' "$*" >&2; }

_dmafs_die() {
    printf 'setup: error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2
    exit 3
}

dmafs_root() {
    [ "$(id -u)" -ne 0 ] || return 0
    command -v sudo >/dev/null || _dmafs_die "${1##*/} needs root for loop devices and mounts, and there is no sudo" \
        "run it as root"
    _dmafs_say "going on through sudo: loop devices and mounts need root"
    exec sudo -E -- "$@"
}

_dmafs_as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -- "$@"; fi
}

# Run a command with its output in a log, up to TRIES times; show the log only if it never succeeds.
_dmafs_quietly() {
    local tries=$1 log try
    shift
    log="$(mktemp)"
    for ((try = 1; try <= tries; try++)); do
        if "$@" >"$log" 2>&1 </dev/null; then
            rm -f "$log"
            return 0
        fi
        if ((try < tries)); then sleep $((try * 3)); fi
    done
    cat "$log" >&2
    rm -f "$log"
    return 1
}

_dmafs_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# _dmafs_system_packages PACKAGE...
_dmafs_system_packages() {
    local missing=() package apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y)
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        _dmafs_say "not a Debian system: the equivalents of $* have to be there"
        return 0
    fi
    for package in "$@"; do
        _dmafs_installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
        _dmafs_die "not root, and these system packages are missing: ${missing[*]}" \
            "as root: apt-get install ${missing[*]}"
    fi
    _dmafs_say "installing system packages: ${missing[*]}"
    # An update that fails in part may still have brought what is needed; the installation decides.
    _dmafs_quietly 3 _dmafs_as_root "${apt[@]}" update || _dmafs_say "apt-get update failed; trying to install anyway"
    _dmafs_quietly 3 _dmafs_as_root "${apt[@]}" install --no-install-recommends "${missing[@]}" \
        || _dmafs_die "can't install system packages: ${missing[*]}" "see apt-get's messages above"
}

_dmafs_device() {
    local device=$1 module=$2
    [ -e "$device" ] || _dmafs_as_root modprobe "$module" >/dev/null 2>&1 || true
    [ -e "$device" ] || _dmafs_die "$device is missing and module $module can't be loaded" \
        "in a container, pass $device in or run it privileged; otherwise use a kernel with $module"
}

# The first Python that is new enough and can both make virtual environments and compile extensions.
_dmafs_python() {
    local python
    for python in /usr/bin/python3 "$(command -v python3 || true)"; do
        if [ -x "$python" ] && "$python" - >/dev/null 2>&1 <<'PY'; then
import ensurepip, pathlib, sys, sysconfig, venv

assert sys.version_info >= (3, 11)
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file()
PY
            printf '%s\n' "$python"
            return 0
        fi
    done
    return 1
}

# An environment that works is kept, whichever Python made it.
_dmafs_venv_works() {
    "$DMAFS_VENV/bin/python" -c 'import pip, sys; assert sys.version_info >= (3, 11)' >/dev/null 2>&1
}

# One that doesn't is made anew; a folder that is something else is left alone.
_dmafs_make_venv() {
    local python=$1
    if [ -e "$DMAFS_VENV" ] && [ ! -e "$DMAFS_VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$DMAFS_VENV")" ]; then
        echo "$DMAFS_VENV is there and is not a virtual environment"
        return 1
    fi
    "$python" -m venv --clear "$DMAFS_VENV"
}

# What an installation depends on: the repository's place, the Python, and pyproject.toml.
_dmafs_key() {
    {
        echo "$DMAFS_REPO"
        "$DMAFS_VENV/bin/python" -c 'import sys; print(sys.version)'
        cat "$DMAFS_REPO/pyproject.toml"
    } | sha256sum | cut -d ' ' -f 1
}

# A stamp holds the key of the installation it stands for: `base` for dmafs itself, one more for an extra.
_dmafs_virtual_environment() {
    local extra=$1 python key stamps="$DMAFS_VENV/.dmafs-stamps"
    local target="$DMAFS_REPO${extra:+[$extra]}"
    if ! _dmafs_venv_works; then
        python="$(_dmafs_python)" || _dmafs_die "no Python >= 3.11 with venv and headers" \
            "on Debian 12 or later: apt-get install python3 python3-venv python3-dev"
        _dmafs_say "making the virtual environment $DMAFS_VENV with $python"
        _dmafs_quietly 1 _dmafs_make_venv "$python" \
            || _dmafs_die "can't make the virtual environment $DMAFS_VENV" "set DMAFS_VENV to a folder of its own"
    fi
    key="$(_dmafs_key)"
    if [ "$(cat "$stamps/${extra:-base}" 2>/dev/null)" != "$key" ]; then
        _dmafs_say "installing dmafs${extra:+ for $extra} into $DMAFS_VENV"
        rm -rf "$stamps"
        _dmafs_quietly 2 "$DMAFS_VENV/bin/python" -m pip install -q --disable-pip-version-check -e "$target" \
            || _dmafs_die "can't install dmafs${extra:+ for $extra} into $DMAFS_VENV" "see pip's messages above"
        mkdir -p "$stamps"
        printf '%s\n' "$key" >"$stamps/base"
        [ -z "$extra" ] || printf '%s\n' "$key" >"$stamps/$extra"
    fi
    export PATH="$DMAFS_VENV/bin:$PATH"
}

dmafs_setup() {
    # mkfs, losetup and mount are in sbin, which isn't in everybody's PATH.
    export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
    local packages=("${DMAFS_PACKAGES[@]}")
    [ "${1:-}" != test ] || packages+=("${DMAFS_TEST_PACKAGES[@]}")
    _dmafs_system_packages "${packages[@]}"
    _dmafs_device /dev/fuse fuse
    _dmafs_device /dev/loop-control loop
    _dmafs_virtual_environment "${1:-}"
}

# Sets the two variables if a guest's kernel and its modules are below a folder.
_dmafs_uml_below() {
    local kernel="$1/bin/linux.uml" modules
    modules="$(find "$1/lib/uml/modules" -mindepth 1 -maxdepth 1 -type d 2>/dev/null | sort -V | tail -n 1)"
    [ -x "$kernel" ] && [ -e "$modules/modules.dep" ] || return 1
    export DMAFS_UML_KERNEL="$kernel" DMAFS_UML_MODULES="$modules"
}

# The package is only unpacked, so this needs no root, and the machine stays as it is.
_dmafs_uml_unpack() {
    local folder=$1
    rm -rf "$folder"
    mkdir -p "$folder/package" "$folder/root"
    if ! (cd "$folder/package" && apt-get -q download user-mode-linux); then
        _dmafs_as_root apt-get -q -y update || true
        (cd "$folder/package" && apt-get -q download user-mode-linux) || return 1
    fi
    dpkg -x "$folder"/package/*.deb "$folder/root"
}

dmafs_vm() {
    local unpacked
    export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
    _dmafs_system_packages "${DMAFS_VM_PACKAGES[@]}"
    if _dmafs_uml_below /usr || _dmafs_uml_below "$DMAFS_UML/usr"; then return 0; fi
    [ "$(uname -m)" = x86_64 ] || _dmafs_die "no User-Mode Linux for a $(uname -m)" "it is there for x86_64 only"
    if [ -n "$(ls -A "$DMAFS_UML" 2>/dev/null)" ] && [ ! -d "$DMAFS_UML/usr/lib/uml" ]; then
        _dmafs_die "$DMAFS_UML is there and is not an unpacked user-mode-linux" "let DMAFS_UML name a folder of its own"
    fi
    _dmafs_say "getting the guest's kernel, package user-mode-linux, into $DMAFS_UML"
    mkdir -p "$(dirname "$DMAFS_UML")"
    unpacked="$(mktemp -d "$DMAFS_UML.XXXXXX")"
    if ! _dmafs_quietly 3 _dmafs_uml_unpack "$unpacked/new" || ! _dmafs_uml_below "$unpacked/new/root/usr"; then
        rm -rf "$unpacked"
        _dmafs_die "can't get the guest's kernel into $DMAFS_UML" \
            "install the package user-mode-linux, or unpack it and let DMAFS_UML name the folder that has its usr"
    fi
    # Whoever else did the same meanwhile has the same.
    rm -rf "$DMAFS_UML"
    mv -T "$unpacked/new/root" "$DMAFS_UML"
    rm -rf "$unpacked"
    _dmafs_uml_below "$DMAFS_UML/usr"
}

dmafs_bench() {
    _dmafs_system_packages "${DMAFS_BENCH_PACKAGES[@]}"
}

dmafs_package() {
    _dmafs_system_packages "${DMAFS_PACKAGE_PACKAGES[@]}"
}
