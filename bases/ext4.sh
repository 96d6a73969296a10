#!/usr/bin/env bash
# ext4.sh ROOTFS_TAR IMAGE WORK_DIR LABEL: turns a root filesystem tarball into a read-only ext4 image.
#
# The image is a shared overlayfs lower: mounted `ro,noload` by many guests at once and never written. So it has no journal, no
# reserved blocks, no free space, and the same tarball always gives the same bytes.
set -euo pipefail
export LC_ALL=C

tar=$(realpath "$1")
image=$(realpath "$2")
work=$(realpath "$3")
label=$4
root=$work/root
block=4096

# Owners and device nodes of the tarball need root, or something that answers like root.
if [[ $(id --user) != 0 && -z ${FAKEROOTKEY:-} ]]; then
  exec fakeroot -- "$0" "$@"
fi

rm -rf "$root" "$image"
mkdir "$root"
tar --extract --file "$tar" --directory "$root" --numeric-owner --same-owner --preserve-permissions --xattrs --xattrs-include='*'

# An inode and its data, rounded up to blocks, plus a margin that the final shrinking takes back.
inodes=$(find "$root" -printf '%i\n' | sort --unique | wc --lines)
blocks=$(find "$root" -type f -printf '%i %s\n' | sort --unique |
  awk -v block=$block '{ sum += int(($2 + block - 1) / block) } END { print sum }')
blocks=$(((blocks + inodes / 8 + 2048) * 115 / 100))

# A UUID that follows from the contents; it also seeds the directory hashes.
id=$(sha256sum "$tar" | sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-4\3-8\4-\5/')

# The clock and the host's mke2fs.conf have no say: time is fixed, every feature is named.
export E2FSPROGS_FAKE_TIME=${SOURCE_DATE_EPOCH:-1}
mke2fs -q -F -b $block -I 256 -N $((inodes + 32)) -m 0 -L "$label" -U "$id" -d "$root" \
  -O none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,metadata_csum,sparse_super,64bit \
  -E "hash_seed=$id,lazy_itable_init=0,nodiscard" "$image" $blocks >"$work/mke2fs.log"

# mke2fs copies access and change times of the extracted files, which are those of this run.
{
  for inode in 2 $(seq 12 $((inodes + 10))); do
    echo "set_inode_field <$inode> atime @$E2FSPROGS_FAKE_TIME"
    echo "set_inode_field <$inode> ctime @$E2FSPROGS_FAKE_TIME"
  done
} >"$work/times"
# debugfs reports a failed command in its output only, between the commands it repeats there.
complaints=$(debugfs -w -f "$work/times" "$image" 2>&1 | grep -v -e '^debugfs: set_inode_field' -e '^debugfs [0-9]' || true)
if [[ -n $complaints ]]; then
  echo "$complaints" >&2
  exit 1
fi

for command in "resize2fs -f -M" "e2fsck -f -n"; do
  if ! $command "$image" >"$work/log" 2>&1; then
    cat "$work/log" >&2
    exit 1
  fi
done
rm -rf "$root"
