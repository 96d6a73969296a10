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

const extract = (vm: Vm, place: keyof typeof places): Variant => ({
  name: `tar x, ${place}`,
  released: false,
  run: ({ record }) =>
    Effect.gen(function* () {
      const dir = `${places[place]}/extracted`
      yield* inGuest(vm, `rm -rf ${dir}; mkdir ${dir}; sync`)
      const began = performance.now()
      yield* inGuest(vm, `tar xf /tmp/sources.tar -C ${dir}; sync`)
      yield* record("elapsed", performance.now() - began, "ms")
    })
})

const status = (vm: Vm, place: keyof typeof places): Variant => ({
  name: `git status, ${place}`,
  released: false,
  run: ({ record }) =>
    Effect.gen(function* () {
      const began = performance.now()
      yield* inGuest(vm, `cd ${places[place]}/repository && git status --porcelain`)
      yield* record("elapsed", performance.now() - began, "ms")
    })
})

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
    const count = Number((yield* succeed(["sh", "-c", `find ${repository} -type f | wc -l`])).trim())

    const { vm } = yield* machinen.boot({
      image: "debian",
      network: "none",
      mount: { host, guest: places.copy },
      liveMounts: [{ host, guest: places.live }]
    })
    yield* giveGit(vm)
    yield* inGuest(vm, `cp ${places.live}/sources.tar /tmp/; cp -a ${places.live}/repository ${places.own}/`)
    // the inodes of a copy are new to git's index, so its first `status` reads everything
    yield* Effect.forEach(Object.values(places), (at) => inGuest(vm, `cd ${at}/repository && git status`), {
      discard: true
    })
    const each = Object.keys(places) as ReadonlyArray<keyof typeof places>
    return {
      warmup: 1,
      runs,
      variants: [
        raw(tree),
        first(tree),
        second(tree, cacheDir),
        ...each.map((place) => extract(vm, place)),
        ...each.map((place) => status(vm, place))
      ],
      settings: { files, bytes: files * fileBytes, repositoryFiles: count },
      skipped: [],
      verdicts: (results) => [
        atMost("second mount of 20,000 files (median)", "ms", p50(results, "second mount", "elapsed"), 500)
      ]
    }
  })
}
