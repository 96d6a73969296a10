#!/usr/bin/env bash
# build.sh OUT_DIR WORK_DIR: builds the guest kernel from Debian's kernel source package, without network.
#
#   OUT_DIR/vmlinux     stripped ELF with a PVH entry
#   OUT_DIR/config      the complete configuration
#   OUT_DIR/info.json   what it was built from
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" "$2"
out=$(cd "$1" && pwd)
work=$(cd "$2" && pwd)
version=$(<"$here/VERSION")
archive=/usr/src/linux-source-$version.tar.xz
tree=$work/linux-source-$version

say() { echo "kernel: $*"; }

if [[ ! -r $archive ]]; then
  say "$archive is missing: apt-get install linux-source-$version" >&2
  exit 1
fi

# The same source, compiler and options give the same bytes.
export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' KBUILD_BUILD_USER=machinen KBUILD_BUILD_HOST=machinen KBUILD_BUILD_VERSION=1
make=(make --no-print-directory -C "$tree" ARCH=x86_64)

say "unpacking $archive"
rm -rf "$tree"
tar --extract --file "$archive" --use-compress-program 'xz --threads=0' --directory "$work"
for patch in "$here"/patches/*.patch; do
  say "applying $(basename "$patch")"
  patch --silent --strip 1 --fuzz 0 --directory "$tree" --input "$patch"
done

say "configuring"
"${make[@]}" -s tinyconfig
(cd "$tree" && scripts/kconfig/merge_config.sh -m -Q .config "$here/config") >"$work/merge.log"
"${make[@]}" -s olddefconfig

# Kconfig drops what it cannot satisfy without a word, so every line of the fragment is looked up in the result.
unmet=$(
  grep '^CONFIG_' "$here/config" | while IFS='=' read -r option wanted; do
    actual=$(sed -n "s/^$option=//p" "$tree/.config")
    [[ ${actual:-n} == "$wanted" ]] || echo "  $option: wanted $wanted, got ${actual:-n}"
  done
)
if [[ -n $unmet ]]; then
  say "options of kernel/config that this source does not give:" >&2
  echo "$unmet" >&2
  exit 1
fi

say "compiling with $(nproc) jobs (about 2,100 steps, 5 minutes on two cores)"
# make prints a line for each object; one line in ten seconds is enough for a person.
"${make[@]}" -j"$(nproc)" vmlinux | {
  SECONDS=0 steps=0 next=10
  while read -r _; do
    steps=$((steps + 1))
    if ((SECONDS >= next)); then
      say "$steps steps, ${SECONDS} s"
      next=$((SECONDS + 10))
    fi
  done
  say "$steps steps, ${SECONDS} s, done"
}

strip --strip-all -o "$out/vmlinux" "$tree/vmlinux"
cp "$tree/.config" "$out/config"
jq --null-input --sort-keys \
  --arg release "$("${make[@]}" -s kernelrelease)" \
  --arg source "$(dpkg-query --show --showformat '${Package} ${Version}' "linux-source-$version")" \
  --arg compiler "$(gcc --version | head -n 1)" \
  --arg linker "$(ld --version | head -n 1)" \
  '$ARGS.named' >"$out/info.json"
rm -rf "$tree"
say "$(stat --format %s "$out/vmlinux") bytes, $(jq --raw-output .release "$out/info.json")"
