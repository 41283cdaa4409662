#!/bin/sh
# What every worker's image installs, whatever its flavour: a virtual environment in /opt/edif-hpc from the flavour's lock,
# and edif-hpc itself. It runs inside the image that is being built, in the folder that holds it, the lock and the wheel.
#
#   install-worker.sh cpu|cuda|rocm
#
# With wheels in /mnt (`--bind FOLDER:/mnt`) everything comes from there and nothing from a network.
set -eu
flavour=$1
lock=requirements-$flavour.lock
umask 022

# The system's part: Python with venv, and the certificates that a hub is checked with.
if ! python3 -c 'import ensurepip, venv' 2>/dev/null || ! [ -e /etc/ssl/certs/ca-certificates.crt ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates python3 python3-venv
  rm -rf /var/lib/apt/lists/*
fi
python3 -m venv /opt/edif-hpc
pip() { /opt/edif-hpc/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

if ls /mnt/*.whl >/dev/null 2>&1; then
  set -- --isolated --no-index --find-links /mnt
else # torch's build, such as cpu, cu126 or rocm7.2, names its index
  set -- --extra-index-url "https://download.pytorch.org/whl/$(sed -n 's/^torch==[^+]*+\([a-z0-9.]*\).*/\1/p' "$lock")"
fi
# The cpu lock has a hash for each file, so pip checks them; it takes wheels alone, so nothing is built or run.
pip install -q --no-cache-dir --only-binary :all: "$@" -r "$lock"
pip install -q --no-cache-dir --no-index --no-deps ./edif_hpc-*.whl
pip check
/opt/edif-hpc/bin/python canary.py "$flavour"
