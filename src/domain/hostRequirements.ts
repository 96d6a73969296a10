import { Option } from "effect"

/** Debian packages that set-up installs, by what needs them. */
export const packageGroups = {
  kernel: ["linux-source-6.12", "build-essential", "bc", "bison", "flex", "libelf-dev", "patch", "xz-utils", "jq"],
  bases: ["busybox-static", "fakeroot", "mmdebstrap", "util-linux"],
  runtime: ["e2fsprogs", "qemu-system-x86", "skopeo", "squashfs-tools", "tar", "umoci"],
  /** What only tests need: clients of a server, a registry, a real terminal. */
  tests: ["curl", "docker-registry", "tmux"]
} as const

export const packages: ReadonlyArray<string> = Object.values(packageGroups).flat()

export const minimumNode = "20.19"

/** The first toolchain with Rust 2024. */
export const minimumRust = "1.85"

/** What gvisor-tap-vsock asks for (gvproxy/go.mod). */
export const minimumGo = "1.25"

/** The version in the first line of what a program prints about itself, such as `1.47.0` in `mke2fs 1.47.0 (5-Feb-2023)`. */
export const versionIn = (text: string): Option.Option<string> =>
  Option.fromNullable(/\d+(?:\.\d+)+/.exec(text.trimStart().split("\n", 1)[0] ?? "")?.[0])

/** Compares dotted numbers: `20.9` is older than `20.19`. */
export const isAtLeast = (version: string, minimum: string): boolean => {
  const [have, want] = [version.split(".").map(Number), minimum.split(".").map(Number)]
  for (const [i, part] of want.entries()) {
    const other = have[i] ?? 0
    if (other !== part) return other > part
  }
  return true
}
