import { randomBytes } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import { Mountdisk } from "../../src/mount/Mountdisk.ts"
import * as command from "../../src/platform/command.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { newDirectory, newPath } from "../files.ts"
import { atMost, BenchError, p50, type Scenario, type Variant } from "../harness.ts"

/** The files that a first mount reads and packs: 20,000 files, 1 GiB. */
const files = 20_000
const fileBytes = 52_429
const filesInDirectory = 200

/** A source tree that every checkout has. */
const sources = path.resolve("node_modules", "effect", "src")

const succeed = Effect.fnUntraced(function* (argv: readonly [string, ...ReadonlyArray<string>]) {
  const { code, stderr, stdout } = yield* command.run(argv)
  if (code !== 0) return yield* new BenchError({ message: `${argv.join(" ")}: ${stderr.trim()}` })
  return stdout
})

const inGuest = (vm: Vm, script: string) =>
  Effect.flatMap(vm.execRaw(script), ({ exitCode, stderr }) =>
    exitCode === 0
      ? Effect.void
      : new BenchError({ message: `${script} ended with ${exitCode}: ${Buffer.from(stderr).toString().trim()}` })
  )

const makeTree = Effect.fnUntraced(function* () {
  const fs = yield* FileSystem.FileSystem
  const dir = yield* newDirectory("tree")
  for (let i = 0; i < files; i++) {
    const at = path.join(dir, `d${Math.floor(i / filesInDirectory)}`)
    if (i % filesInDirectory === 0) yield* fs.makeDirectory(at)
    // half of each file can be compressed, as in a mix of sources and pictures
    const half = randomBytes(fileBytes / 2)
    yield* fs.writeFile(path.join(at, `f${i}`), Buffer.concat([half, half]))
  }
  // a tree that was changed a moment ago does not count as unchanged
  yield* Effect.sleep("200 millis")
  return dir
})

const first = (tree: string): Variant => ({
  name: "first mount",
  runs: 1,
  warmup: 0,
  released: false,
  run: ({ elapsed, record }) =>
    Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      const cacheDir = yield* newPath("mountdisk")
      const phases = new Map<string, number>()
      const began = yield* elapsed
      yield* mountdisk.lower(tree, { cacheDir, onPhase: (name, ms) => void phases.set(name, ms) })
      yield* record("elapsed", (yield* elapsed) - began, "ms")
      for (const [name, ms] of phases) yield* record(name, ms, "ms")
    })
})

const raw = (tree: string): Variant => ({
  name: "mksquashfs alone",
  runs: 1,
  warmup: 0,
  released: false,
  run: ({ mark }) =>
    Effect.gen(function* () {
      const image = yield* newPath("raw")
      const how = ["-noappend", "-no-xattrs", "-no-progress", "-quiet", "-comp", "zstd", "-Xcompression-level", "1"]
      yield* succeed(["mksquashfs", tree, image, ...how])
      yield* mark("elapsed")
    })
})

const second = (tree: string, cacheDir: string): Variant => ({
  name: "second mount",
  released: false,
  run: ({ mark }) =>
    Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      yield* mountdisk.lower(tree, { cacheDir })
      yield* mark("elapsed")
    })
})

const places = { live: "/mnt/live", copy: "/mnt/copy", own: "/srv" } as const
/** Where every work is done; in the copy only what was measured of it before. */
const compared = ["live", "own"] as const
const ofCopy: ReadonlySet<string> = new Set(["tar x", "git status"])

type Place = keyof typeof places

/** Work in the guest: what comes before it, and what is measured. `at` is a directory of the place. */
interface Work {
  readonly name: string
  readonly before?: (at: string) => string
  readonly script: (at: string) => string
}

const largeMib = 1024
const inserts = 200
const sqlite = (at: string) =>
  `python3 -c 'import sqlite3; db = sqlite3.connect("${at}/db"); db.execute("pragma journal_mode=wal"); db.execute("create table t (n)"); [(db.execute("insert into t values (?)", (n,)), db.commit()) for n in range(${inserts})]'`

/** The same for each place, so that a share is seen beside the guest's own disk. */
const works: ReadonlyArray<Work> = [
  {
    name: "tar x",
    before: (at) => `rm -rf ${at}/extracted; mkdir ${at}/extracted; sync`,
    script: (at) => `tar xf /tmp/sources.tar -C ${at}/extracted; sync`
  },
  { name: "git status", script: (at) => `cd ${at}/repository && git status --porcelain` },
  {
    name: "git clone",
    before: (at) => `rm -rf ${at}/cloned; sync`,
    script: (at) => `git clone -q ${at}/repository ${at}/cloned; sync`
  },
  { name: `grep -r, ${files} files`, script: (at) => `! grep -rq no-file-has-this ${at}/small` },
  {
    name: `sqlite, ${inserts} inserts with WAL`,
    before: (at) => `rm -f ${at}/db*; sync`,
    script: sqlite
  },
  {
    name: `${largeMib} MiB in`,
    before: (at) => `rm -f ${at}/large; sync`,
    script: (at) => `dd if=/dev/zero of=${at}/large bs=1M count=${largeMib} conv=fsync 2>/dev/null`
  },
  {
    name: `${largeMib} MiB out`,
    before: (at) =>
      `[ -e ${at}/large ] || dd if=/dev/zero of=${at}/large bs=1M count=${largeMib} 2>/dev/null; sync; echo 3 >/proc/sys/vm/drop_caches`,
    script: (at) => `dd if=${at}/large of=/dev/null bs=1M 2>/dev/null`
  }
]

const measured = (vm: Vm, { before, name, script }: Work, place: Place): Variant => ({
  name: `${name}, ${place}`,
  released: false,
  run: ({ record }) =>
    Effect.gen(function* () {
      if (before !== undefined) yield* inGuest(vm, before(places[place]))
      const began = performance.now()
      yield* inGuest(vm, script(places[place]))
      yield* record("elapsed", performance.now() - began, "ms")
    })
})

/** Makes a tree of as many files as `files`, each of some 100 bytes. */
const smallFiles = `mkdir "$0"; for d in $(seq ${files / filesInDirectory}); do mkdir "$0/$d"; for f in $(seq ${filesInDirectory}); do echo "the file $f of the directory $d: $(printf %080d "$f")" >"$0/$d/$f"; done; done`

/** Copies the host's git and its libraries into a guest of the same distribution. */
const giveGit = Effect.fnUntraced(function* (vm: Vm) {
  const libraries = [...(yield* succeed(["ldd", "/usr/bin/git"])).matchAll(/=> (\/\S+)/g)].map(([, file = ""]) => file)
  yield* Effect.forEach(["/usr/bin/git", ...libraries.filter((file) => !/lib(c|m)\.so/.test(file))], (file) =>
    vm
      .push(file, file.endsWith("/git") ? "/usr/local/bin/git" : `/usr/local/lib/${path.basename(file)}`)
      .pipe(Effect.mapError((cause) => new BenchError({ message: "git does not get into the guest", cause })))
  )
  yield* inGuest(vm, "ldconfig; git config --global --add safe.directory '*'; git --version")
})

export const mounts: Scenario = {
  name: "mounts",
  description:
    "host directories in a guest: the first and the second mount of a copy; work in a share beside the guest's own disk",
  setup: Effect.fn("mounts.setup")(function* ({ runs = 5 }) {
    const machinen = yield* Machinen
    const mountdisk = yield* Mountdisk
    const tree = yield* makeTree()
    const cacheDir = yield* newPath("mountdisk")
    yield* mountdisk.lower(tree, { cacheDir })

    const host = yield* newDirectory("share")
    const repository = path.join(host, "repository")
    yield* succeed(["cp", "-R", sources, repository])
    const git = ["git", "-C", repository, "-c", "user.name=bench", "-c", "user.email=bench@localhost"] as const
    yield* succeed([...git, "init", "-q"])
    yield* succeed([...git, "add", "."])
    yield* succeed([...git, "commit", "-q", "-m", "all"])
    const tarball = path.join(host, "sources.tar")
    yield* succeed(["tar", "--create", "--file", tarball, "--directory", sources, "."])
    yield* succeed(["sh", "-c", smallFiles, path.join(host, "small")])
    const count = Number((yield* succeed(["sh", "-c", `find ${repository} -type f | wc -l`])).trim())

    const { vm } = yield* machinen.boot({
      image: "debian",
      network: "none",
      memoryMib: 1024,
      rootDiskSizeBytes: 8 * 2 ** 30,
      mount: { host, guest: places.copy },
      liveMounts: [{ host, guest: places.live }]
    })
    yield* giveGit(vm)
    yield* inGuest(
      vm,
      `cp ${places.live}/sources.tar /tmp/; cp -a ${places.live}/repository ${places.live}/small ${places.own}/`
    )
    // the inodes of a copy are new to git's index, so its first `status` reads everything
    yield* Effect.forEach(Object.values(places), (at) => inGuest(vm, `cd ${at}/repository && git status`), {
      discard: true
    })
    return {
      warmup: 1,
      runs,
      variants: [
        raw(tree),
        first(tree),
        second(tree, cacheDir),
        ...works.flatMap((work) => compared.map((place) => measured(vm, work, place))),
        ...works.filter(({ name }) => ofCopy.has(name)).map((work) => measured(vm, work, "copy"))
      ],
      settings: { files, bytes: files * fileBytes, repositoryFiles: count },
      skipped: [],
      verdicts: (results) => [
        atMost("second mount of 20,000 files (median)", "ms", p50(results, "second mount", "elapsed"), 500)
      ]
    }
  })
}
