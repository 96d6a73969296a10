#!/bin/sh
# debian-finish.sh ROOT VERSIONS_FILE: mmdebstrap's last hook. Records what was installed and removes what differs from run to run.
set -eu

dpkg-query --admindir="$1/var/lib/dpkg" --show --showformat '${Package} ${Version}\n' >"$2"

# mmdebstrap took these from the host; the guest's init writes its own.
rm -f "$1/etc/hostname"
rm -f "$1/etc/resolv.conf"
install -m 0644 /dev/null "$1/etc/resolv.conf"

rm -rf "$1"/var/log/*.log "$1"/var/log/apt/* "$1/var/cache/ldconfig/aux-cache" "$1"/var/cache/debconf/*-old
