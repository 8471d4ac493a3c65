# What demo, test and bench need on a Debian 12 machine; they source this and call `prepare`.
#
# Nothing is done twice: packages are installed only when missing, and the Python environment and the C
# module are made again only when the files they come from have changed (stamps in .venv). So a second
# run needs no network.
#
#   prepare PURPOSE...     PURPOSE: run (the product and a guest), dpdk (a peer), bench (a peer's
#                          library), check (pytest, mypy, ruff)

checkout=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
venv=$checkout/.venv

packages_run="qemu-system-x86 libvirt-daemon libvirt-clients libvirt-dev busybox-static iproute2 iputils-ping
    util-linux python3-venv python3-dev gcc libc6-dev pkg-config kmod"
packages_dpdk="dpdk-dev"
packages_bench="libdpdk-dev"
packages_check=""

progress() {
    printf '%s\n' "$(basename "$0"): $*" >&2
}

install_packages() {
    missing=
    for package in "$@"; do
        state=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) || state=none
        [ "$state" = installed ] || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        progress "these Debian packages are missing, and only root can install them:$missing"
        exit 1
    fi
    progress "installing Debian packages:$missing"
    apt-get --quiet --quiet update
    # shellcheck disable=SC2086 # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet --yes --no-install-recommends install $missing >/dev/null
}

# once STAMP FILE... -- COMMAND...: run the command unless it has succeeded before with the same files.
once() {
    stamp=$venv/stamp-$1
    shift
    files=
    while [ "$1" != -- ]; do
        files="$files $1"
        shift
    done
    shift
    # shellcheck disable=SC2086
    now=$(cd "$checkout" && cat $files | sha256sum)
    [ "$now" != "$(cat "$stamp" 2>/dev/null)" ] || return 0
    (cd "$checkout" && "$@")
    echo "$now" >"$stamp"
}

install_project() {
    progress "installing Python packages into .venv"
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check install --editable "$1"
    # It has built the C module too, but without the compiler flags that the next step may want.
    rm -f "$venv"/stamp-native*
}

# build_native [FLAG...]: build in place, with these compiler flags.
build_native() {
    progress "building the C modules"
    NATIVE_CFLAGS=$* "$venv/bin/python" setup.py --quiet build_ext --inplace --force
}

prepare() {
    extras='' flags=''
    for purpose in "$@"; do
        eval "packages=\$packages_$purpose"
        # shellcheck disable=SC2086,SC2154
        install_packages $packages
        [ "$purpose" != check ] || extras='[dev]' flags=-Werror
    done
    [ -x "$venv/bin/python" ] || /usr/bin/python3 -m venv "$venv"
    # A development environment stays one.
    [ ! -e "$venv/stamp-project[dev]" ] || extras='[dev]'
    once "project$extras" setup.cfg setup.py pyproject.toml -- install_project ".$extras"
    # shellcheck disable=SC2086
    once "native$flags" datapath/mlx5_*.py datapath/drivers/mlx5/abi*.py datapath/native/build.py \
        datapath/native/*.[ch] datapath/emulation/mlx5/*.py datapath/emulation/mlx5/*.[ch] -- build_native $flags
    # As the installation of a package does; every port would compile them anew where PYTHONDONTWRITEBYTECODE is set.
    (cd "$checkout" && "$venv/bin/python" -m compileall -q datapath libvirt_vdpa)
}
