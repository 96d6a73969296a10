#!/usr/bin/env bash
# debian.sh OUT_DIR WORK_DIR: the default base, a Debian 12 with the packages of debian.packages.
#
#   OUT_DIR/base.ext4    the tree as a read-only image
#   OUT_DIR/info.json    mirrors and the exact version of every package
#
# The same list and the same state of the mirror give the same image.
set -euo pipefail
export LC_ALL=C
umask 022

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" "$2"
out=$(cd "$1" && pwd)
work=$(cd "$2" && pwd)
suite=bookworm

# No file of the image is younger than this; raise it together with the list. It also makes Python check its bytecode by the source's
# hash, not by its time, which would no longer match.
export SOURCE_DATE_EPOCH=1767225600 # 2026-01-01

# The mirrors of Debian that this host is configured for, asked for this base's suite: the host may be another release.
sources=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
  awk -v suite="$suite" '$3 == "main" && $2 ~ /^[a-z]+(-updates|-security)?$/ { sub(/^[a-z]+/, suite, $2); print "deb", $1, $2, $3 }' |
  sort --unique)
if [[ -z $sources ]]; then
  echo "debian: this host's apt sources have no mirror of Debian (did \`apt-get update\` run?)" >&2
  exit 1
fi
# It has the keys of every release; what this host trusts for its own may be one file for each.
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

packages=$(grep --extended-regexp --only-matching '^[a-z0-9][a-z0-9.+-]*' "$here/debian.packages" | paste --serial --delimiters ,)

# Mounts made inside the tree end with this process, however it ends: nobody removing WORK_DIR may reach the host's /dev through one.
isolated=()
if unshare --mount true 2>/dev/null; then isolated=(unshare --mount)
fi

echo "debian: installing $packages"
# Documentation and translations are left out, now and (the options stay in the image) when a guest installs more; licences stay.
# merged-usr + usr-is-merged: without them minbase installs usrmerge and with it all of perl (55 MB).
TMPDIR=$work "${isolated[@]}" mmdebstrap --variant=minbase --keyring="$keyring" --include="usr-is-merged,$packages" \
  --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
  --dpkgopt='path-exclude=/usr/share/lintian/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --dpkgopt='path-include=/usr/share/locale/locale.alias' \
  --customize-hook="$here/debian-finish.sh \"\$1\" '$work/versions'" \
  "$suite" "$work/rootfs.tar" - <<<"$sources" 2>&1 |
  tee "$work/mmdebstrap.log" | sed --unbuffered --quiet --expression '/^I: running/d' --expression 's/^I: /debian: /p' || {
  tail --lines 30 "$work/mmdebstrap.log" >&2
  exit 1
}

echo "debian: making the ext4 image"
"$here/ext4.sh" "$work/rootfs.tar" "$out/base.ext4" "$work" machinen-debian

jq --null-input --rawfile versions "$work/versions" --arg sources "$sources" '{
  sources: $sources | split("\n"),
  packages: $versions | split("\n") | map(select(. != "") | split(" ") | {(.[0]): .[1]}) | add
}' >"$out/info.json"
rm "$work/rootfs.tar"
echo "debian: $(stat --format %s "$out/base.ext4") bytes, $(jq '.packages | length' "$out/info.json") packages"
