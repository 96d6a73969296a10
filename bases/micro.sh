#!/usr/bin/env bash
# micro.sh OUT_DIR WORK_DIR: the smallest useful root filesystem, a static busybox. For tests and first steps.
#
#   OUT_DIR/rootfs.tar   the tree
#   OUT_DIR/base.ext4    the same as a read-only image
#   OUT_DIR/info.json    what it was built from
set -euo pipefail
export LC_ALL=C
umask 022

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" "$2"
out=$(cd "$1" && pwd)
work=$(cd "$2" && pwd)
tree=$work/tree

# /bin/busybox is a different program when the package is `busybox`: its static sibling is what we need.
busybox=/bin/busybox
if ! version=$(dpkg-query --show --showformat '${Version}' busybox-static 2>/dev/null); then
  echo "micro: busybox-static is missing: apt-get install busybox-static" >&2
  exit 1
fi

echo "micro: laying out the tree"
rm -rf "$tree"
mkdir -p "$tree"/{bin,sbin,dev,etc,home,mnt,opt,proc,root,run,sys,tmp,srv} "$tree"/usr/{bin,sbin,lib} "$tree"/var/{lib,log,tmp}
chmod 0700 "$tree/root"
chmod 1777 "$tree/tmp" "$tree/var/tmp"
ln -s /run "$tree/var/run"
install -m 0755 $busybox "$tree/bin/busybox"
# `linuxrc` is the one applet without a directory; the initramfs of another age used it.
$busybox --list-full | grep / | grep -v '^bin/busybox$' | while read -r applet; do
  ln -s /bin/busybox "$tree/$applet"
done

cat >"$tree/etc/passwd" <<'FILE'
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
FILE
cat >"$tree/etc/group" <<'FILE'
root:x:0:
tty:x:5:
nogroup:x:65534:
FILE
cat >"$tree/etc/hosts" <<'FILE'
127.0.0.1 localhost
::1 localhost
FILE
# The guest's init writes it when the VM has a network.
: >"$tree/etc/resolv.conf"
cat >"$tree/etc/os-release" <<'FILE'
ID=machinen-micro
NAME="Machinen micro"
PRETTY_NAME="Machinen micro (busybox)"
FILE

tar --create --file "$out/rootfs.tar" --directory "$tree" \
  --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --format=gnu .
rm -rf "$tree"

echo "micro: making the ext4 image"
"$here/ext4.sh" "$out/rootfs.tar" "$out/base.ext4" "$work" machinen-micro

jq --null-input --arg busybox "$version" '{packages: {"busybox-static": $busybox}}' >"$out/info.json"
echo "micro: $(stat --format %s "$out/base.ext4") bytes"
