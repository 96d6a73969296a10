import { Option } from "effect"

/** Debian packages, each with its programs that machinen starts, directly or by way of another tool. */
export type Packages = Readonly<Record<string, ReadonlyArray<string>>>

/** Packages of every Debian. Set-up does not install them. */
export const basePackages = {
  apt: ["apt-cache", "apt-get"],
  bash: ["bash"],
  coreutils: [
    ...[
      "basename",
      "cat",
      "chmod",
      "chown",
      "chroot",
      "cp",
      "dd",
      "df",
      "dirname",
      "head",
      "id",
      "install",
      "ln",
      "mkdir",
      "mkfifo",
      "mknod",
      "mktemp",
      "mv"
    ],
    ...[
      "nproc",
      "paste",
      "realpath",
      "rm",
      "seq",
      "sha256sum",
      "sleep",
      "sort",
      "stat",
      "stty",
      "tail",
      "tee",
      "timeout",
      "touch",
      "wc"
    ]
  ],
  dash: ["sh"],
  dpkg: ["dpkg-query"],
  findutils: ["find", "xargs"],
  grep: ["grep"],
  gzip: ["gzip"],
  "libc-bin": ["ldd"],
  mawk: ["awk"],
  mount: ["mount", "umount"],
  sed: ["sed"],
  tar: ["tar"],
  "util-linux": ["fallocate", "flock", "prlimit", "setpriv", "unshare"]
} as const satisfies Packages

/** Packages that VMs and images need on a host that has all assets. */
export const runPackages = {
  e2fsprogs: ["debugfs", "mke2fs"],
  fakeroot: ["fakeroot"],
  "qemu-system-x86": ["qemu-system-x86_64"],
  skopeo: ["skopeo"],
  "squashfs-tools": ["mksquashfs"],
  umoci: ["umoci"],
  zstd: ["zstd"]
} as const satisfies Packages

const imagePackages = {
  e2fsprogs: ["debugfs", "e2fsck", "mke2fs", "resize2fs"],
  fakeroot: ["fakeroot"],
  jq: ["jq"]
} as const

/** Packages that each asset needs to be built. A host that has the asset does not need them. */
export const buildPackages = {
  // cargo links with `cc`
  programs: { gcc: ["cc"], "libc6-dev": [] },
  gvproxy: {},
  kernel: {
    bc: ["bc"],
    binutils: ["ld", "strip"],
    bison: ["bison"],
    flex: ["flex"],
    gcc: ["gcc"],
    jq: ["jq"],
    "libc6-dev": [],
    "libelf-dev": [],
    "linux-source-6.12": [],
    make: ["make"],
    patch: ["patch"],
    "xz-utils": ["xz"]
  },
  "base-micro": { ...imagePackages, "busybox-static": ["busybox"] },
  "base-debian": { ...imagePackages, "debian-archive-keyring": [], mmdebstrap: ["mmdebstrap"] }
} as const satisfies Readonly<Record<string, Packages>>

/** Packages that only tests and benches need: a second reader of our archives, clients of servers, a registry, a terminal, git. */
export const testPackages = {
  "busybox-static": ["busybox"],
  cpio: ["cpio"],
  curl: ["curl"],
  "docker-registry": ["docker-registry"],
  git: ["git"],
  procps: ["ps"],
  tmux: ["tmux"]
} as const satisfies Packages

/** Compilers that do not come from Debian, whose versions are too old. `npm` comes with Node. */
export const toolchainPrograms = ["cargo", "go", "gofmt", "node", "npm", "rustc"] as const

/** The packages that a host needs to run VMs and to build these assets, each once. With `tests`: all packages. */
export const packagesFor = (
  assets: ReadonlyArray<keyof typeof buildPackages>,
  { tests = false } = {}
): ReadonlyArray<string> => {
  const built = tests ? Object.values(buildPackages) : assets.map((name) => buildPackages[name])
  return [...new Set([runPackages, ...built, ...(tests ? [testPackages] : [])].flatMap(Object.keys))].sort()
}

/** Every package that set-up may install. */
export const packages = packagesFor([], { tests: true })

/** The Debian releases that set-up builds on, with the suites of apt it needs. */
export const debianReleases = {
  bookworm: { version: "12", suites: ["bookworm", "bookworm-security"] },
  trixie: { version: "13", suites: ["trixie", "trixie-security"] }
} as const

export const minimumNode = "20.19"

/** The first toolchain with Rust 2024. */
export const minimumRust = "1.85"

/** The Go version that gvisor-tap-vsock requires (gvproxy/go.mod). */
export const minimumGo = "1.25"

/** The version in the first line of a program's output, such as `1.47.0` in `mke2fs 1.47.0 (5-Feb-2023)`. */
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
