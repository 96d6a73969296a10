import { execFileSync } from "node:child_process"
import { randomBytes } from "node:crypto"
import {
  appendFileSync,
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync
} from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Fiber, FastCheck as fc, Layer, Option } from "effect"
import { Assets } from "../../../src/host/Assets.ts"
import { RootfsImage } from "../../../src/image/RootfsImage.ts"
import { Registry } from "../../../src/machine/Registry.ts"
import { Mountdisk } from "../../../src/mount/Mountdisk.ts"
import * as processes from "../../../src/platform/processes.ts"
import * as treeScan from "../../../src/platform/treeScan.ts"
import { Settings, type SettingsValues } from "../../../src/Settings.ts"
import { eventually, executable, smallDisk, temporaryDirectory } from "../../fixtures.ts"

const using = (home: string, overrides: Partial<SettingsValues> = {}) =>
  Mountdisk.layer.pipe(
    Layer.provide(RootfsImage.layer),
    Layer.provide(Assets.layer),
    Layer.provide(Registry.layer),
    Layer.provide(Settings.layerTest(home, overrides)),
    Layer.provide(NodeContext.layer)
  )

const keyOf = (dir: string) => Effect.flatMap(treeScan.scan(dir), (tree) => treeScan.contentKey(dir, tree))

/** Older than any clock's tick, so that it counts as at rest. */
const atRest = (files: Readonly<Record<string, string>>): string => {
  const dir = path.join(temporaryDirectory(), "tree")
  mkdirSync(dir)
  for (const [name, content] of Object.entries(files)) {
    mkdirSync(path.dirname(path.join(dir, name)), { recursive: true })
    writeFileSync(path.join(dir, name), content)
  }
  return dir
}
const settle = Effect.promise(() => new Promise((resolve) => setTimeout(resolve, 80)))

describe("a tree's key", () => {
  const change: ReadonlyArray<readonly [what: string, (dir: string) => void]> = [
    ["content", (dir) => writeFileSync(path.join(dir, "a"), "two")],
    [
      "content of the same size and time",
      (dir) => keepTime(path.join(dir, "a"), () => writeFileSync(path.join(dir, "a"), "eno"))
    ],
    ["mode", (dir) => chmodSync(path.join(dir, "a"), 0o640)],
    ["mtime", (dir) => utimesSync(path.join(dir, "a"), 5, 5)],
    ["name", (dir) => keepTime(dir, () => renameSync(path.join(dir, "a"), path.join(dir, "b")))],
    [
      "link",
      (dir) =>
        keepTime(dir, () =>
          keepTime(path.join(dir, "l"), () => {
            rmSync(path.join(dir, "l"))
            symlinkSync("bb", path.join(dir, "l"))
          })
        )
    ]
  ]
  const keepTime = (file: string, act: () => void) => {
    // what it knows of time is exact to the nanosecond
    const times = path.join(temporaryDirectory(), "times")
    writeFileSync(times, "")
    execFileSync("touch", ["--no-dereference", "--reference", file, times])
    act()
    execFileSync("touch", ["--no-dereference", "--reference", times, file])
  }
  const make = () => {
    const dir = atRest({ a: "one", "d/e": "three" })
    symlinkSync("aa", path.join(dir, "l"))
    return dir
  }
  for (const [what, act] of change) {
    it.effect(`changes with its ${what}`, () =>
      Effect.gen(function* () {
        const dir = make()
        const before = yield* keyOf(dir)
        assert.strictEqual(yield* keyOf(dir), before)
        act(dir)
        assert.notStrictEqual(yield* keyOf(dir), before)
      })
    )
  }

  it("is equal for equal trees, however they were made, and for no others", () => {
    const name = fc.constantFrom("a", "b", "é", "a b", "a\nb", "-x")
    const files = fc.dictionary(name, fc.string({ maxLength: 3 }), { maxKeys: 4 })
    const build = (tree: Readonly<Record<string, string>>, order: number) => {
      const dir = path.join(temporaryDirectory(), "t")
      mkdirSync(dir)
      const all = Object.entries(tree)
      for (const [file, content] of order > 0 ? all : [...all].reverse()) {
        writeFileSync(path.join(dir, file), content)
        utimesSync(path.join(dir, file), 7, 7)
      }
      utimesSync(dir, 7, 7)
      return Effect.runSync(keyOf(dir))
    }
    const sorted = (tree: object) => JSON.stringify(Object.entries(tree).sort())
    fc.assert(
      fc.property(files, files, (one, other) => {
        assert.strictEqual(build(one, 1), build(one, -1))
        assert.strictEqual(build(one, 1) === build(other, 1), sorted(one) === sorted(other))
      }),
      { numRuns: 60 }
    )
  })

  it.effect("reads names that are no UTF-8", () =>
    Effect.gen(function* () {
      const dir = atRest({})
      writeFileSync(Buffer.concat([Buffer.from(`${dir}/`), Buffer.from([0xff, 0x41])]), "x")
      const tree = yield* treeScan.scan(dir)
      assert.deepStrictEqual(
        tree.entries.map((entry) => entry.path),
        ["", "\u00ffA"]
      )
      assert.match(yield* keyOf(dir), /^[0-9a-f]{64}$/)
    })
  )
})

/** The entry of a VM that is alive, as far as anybody can see, and runs from that disk. */
const vmWith = (vmsDir: string, disk: string) => {
  const id = "abcdefabcdef"
  const dir = path.join(vmsDir, id)
  mkdirSync(dir, { recursive: true })
  const entry = {
    version: 1,
    id,
    state: "running",
    bootId: readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim(),
    owner: Effect.runSync(processes.self),
    detached: false,
    backend: "qemu",
    accel: "tcg",
    image: "micro",
    memoryMib: 128,
    vcpus: 1,
    network: "none",
    portForward: [],
    createdAt: Date.now(),
    vsockPath: path.join(dir, "vsock.sock"),
    controlPath: path.join(dir, "shim.sock"),
    disks: [{ id: "mountlower", path: disk, readOnly: true }]
  }
  writeFileSync(path.join(dir, "entry.json"), JSON.stringify(entry))
}

describe("a mounted directory's image", () => {
  it.live("is built once, padded, and found again without reading the directory", () => {
    const home = temporaryDirectory()
    const dir = atRest({ a: "one", "d/e": "three" })
    return Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      yield* settle
      const phases: Array<string> = []
      const onPhase = (name: string) => void phases.push(name)
      const first = yield* mountdisk.lower(dir, { onPhase })
      assert.deepStrictEqual(phases, ["manifest-hash", "mksquashfs", "staging-rename"])
      assert.strictEqual(first.lowerPath, path.join(mountdisk.cacheDir, `${first.key}.sqfs`))
      assert.strictEqual(first.key, yield* keyOf(dir))
      assert.strictEqual(statSync(first.lowerPath).size % 512, 0)
      assert.strictEqual(readFileSync(first.lowerPath).toString("latin1", 0, 4), "hsqs")
      const { ino } = statSync(first.lowerPath)

      phases.length = 0
      assert.deepStrictEqual(yield* mountdisk.lower(dir, { onPhase }), first)
      assert.deepStrictEqual(phases, [])
      // the same content elsewhere in the tree's life is another key, and going back is the first again
      appendFileSync(path.join(dir, "a"), "!")
      const second = yield* mountdisk.lower(dir)
      assert.notStrictEqual(second.key, first.key)
      assert.strictEqual(statSync(first.lowerPath).ino, ino)
      assert.deepStrictEqual(
        readdirSync(mountdisk.cacheDir).filter((name) => !name.includes(".sqfs")),
        ["trees"]
      )
    }).pipe(Effect.provide(using(home)))
  })

  it.live("is built again when it is unmarked, cut, or to be forced", () => {
    const home = temporaryDirectory()
    const dir = atRest({ a: "one" })
    return Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      yield* settle
      const { lowerPath } = yield* mountdisk.lower(dir)
      const size = statSync(lowerPath).size
      const rebuilt = (spoil: () => void, force = false) =>
        Effect.gen(function* () {
          const { ino } = statSync(lowerPath)
          spoil()
          assert.strictEqual((yield* mountdisk.lower(dir, { force })).lowerPath, lowerPath)
          assert.notStrictEqual(statSync(lowerPath).ino, ino)
          assert.strictEqual(statSync(lowerPath).size, size)
          assert.isTrue(existsSync(`${lowerPath}.ok`))
        })
      yield* rebuilt(() => rmSync(`${lowerPath}.ok`))
      yield* rebuilt(() => truncateSync(lowerPath, 100))
      yield* rebuilt(() => {}, true)
    }).pipe(Effect.provide(using(home)))
  })

  it.live("of several callers at once one builds it", () => {
    const home = temporaryDirectory()
    const log = path.join(home, "log")
    const mksquashfs = executable(home, "mksquashfs", `echo run >>${log}; exec /usr/bin/mksquashfs "$@"`)
    const dir = atRest({ a: "one" })
    return Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      const all = yield* Effect.all(
        [1, 2, 3, 4].map(() => mountdisk.lower(dir)),
        { concurrency: 4 }
      )
      assert.strictEqual(new Set(all.map(({ key }) => key)).size, 1)
      assert.strictEqual(readFileSync(log, "utf8"), "run\n")
    }).pipe(Effect.provide(using(home, { mksquashfs: Option.some(mksquashfs) })))
  })

  it.live("of a directory that is being written is for one mount only", () => {
    const home = temporaryDirectory()
    const dir = atRest({ a: "one" })
    const mksquashfs = executable(home, "mksquashfs", `echo more >>${dir}/a; exec /usr/bin/mksquashfs "$@"`)
    return Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      const told = yield* keyOf(dir)
      const { key, lowerPath } = yield* mountdisk.lower(dir)
      assert.notStrictEqual(key, told)
      assert.isTrue(existsSync(lowerPath))
      assert.isFalse(existsSync(path.join(mountdisk.cacheDir, `${told}.sqfs`)))
    }).pipe(Effect.provide(using(home, { mksquashfs: Option.some(mksquashfs) })))
  })

  const failures: ReadonlyArray<readonly [what: string, body: string | undefined, code: string]> = [
    ["no tool", undefined, "BOOT_MOUNTDISK_TOOL_MISSING"],
    ["a tool that fails", "echo broken >&2; exit 3", "BOOT_MOUNTDISK_BUILD_FAILED"],
    ["a tool that speaks of space", "echo 'No space left on device'; exit 1", "BOOT_MOUNTDISK_BUILD_FAILED"]
  ]
  for (const [what, body, code] of failures) {
    it.effect(`${what} is ${code}`, () => {
      const home = temporaryDirectory()
      const tool = body === undefined ? path.join(home, "none") : executable(home, "mksquashfs", body)
      return Effect.gen(function* () {
        const mountdisk = yield* Mountdisk
        const error = yield* Effect.flip(mountdisk.lower(atRest({ a: "one" })))
        assert.strictEqual(error.code, code)
        assert.isString(error.hint)
        const left = existsSync(mountdisk.cacheDir) ? readdirSync(mountdisk.cacheDir) : []
        assert.deepStrictEqual(left, [])
      }).pipe(Effect.provide(using(home, { mksquashfs: Option.some(tool) })))
    })
  }

  it.scoped("is ROOTFS_IMG_NO_SPACE where the disk is full, and what was written of it is gone", () =>
    Effect.gen(function* () {
      const small = yield* smallDisk("1M")
      const dir = atRest({})
      writeFileSync(path.join(dir, "large"), randomBytes(4 * 2 ** 20))
      const error = yield* Effect.flatMap(Mountdisk, (m) => m.lower(dir)).pipe(
        Effect.flip,
        Effect.provide(using(small))
      )
      assert.strictEqual(error.code, "ROOTFS_IMG_NO_SPACE", error.message)
      assert.deepStrictEqual(readdirSync(path.join(small, "cache", "mountdisk")), [])
    })
  )

  it.live("is removed when it is not used for long and no VM has it", () => {
    const home = temporaryDirectory()
    const { namesDir: _, vmsDir } = Effect.runSync(Effect.provide(Settings, Settings.layerTest(home)))
    return Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      const trees = ["used", "old", "booted", "killed"].map((name) => atRest({ a: name }))
      const images = yield* Effect.forEach(trees, (dir) =>
        Effect.map(mountdisk.lower(dir), ({ lowerPath }) => lowerPath)
      )
      const [used = "", old = "", booted = "", killed = ""] = images
      yield* settle
      // noted once more now that the directories are at rest
      yield* Effect.forEach(trees, (dir) => mountdisk.lower(dir))
      const memos = path.join(mountdisk.cacheDir, "trees")
      const noted = readdirSync(memos).length
      const longAgo = new Date(Date.now() - 3_600_000)
      for (const file of [old, booted]) utimesSync(`${file}.ok`, longAgo, longAgo)
      // a build that was killed between its two last steps, and one in the midst of its work
      rmSync(`${killed}.ok`)
      utimesSync(killed, longAgo, longAgo)
      const half = path.join(mountdisk.cacheDir, `${"0".repeat(64)}.sqfs.building`)
      mkdirSync(half)
      utimesSync(half, longAgo, longAgo)
      vmWith(vmsDir, booted)

      const paths = (found: ReadonlyArray<{ readonly path: string }>) => found.map(({ path }) => path).sort()
      assert.deepStrictEqual(yield* mountdisk.collect({ unusedForMs: 2 * 3_600_000 }), [])
      const due = yield* mountdisk.collect({ unusedForMs: 0, dryRun: true })
      assert.include(paths(due), old)
      assert.isTrue(existsSync(old))
      assert.deepStrictEqual(paths(yield* mountdisk.collect({ unusedForMs: 0 })), [killed, old].sort())
      assert.deepStrictEqual(images.map(existsSync), [true, false, true, false])
      assert.isTrue(existsSync(`${booted}.ok`) && !existsSync(half) && !existsSync(`${old}.ok.aside`))
      assert.strictEqual(readdirSync(memos).length, noted - 2)

      // what is used meanwhile counts as used, and what is gone is made again
      assert.strictEqual((yield* mountdisk.lower(trees[1] ?? "")).lowerPath, old)
      assert.isTrue(existsSync(old) && existsSync(used))
    }).pipe(Effect.provide(using(home)))
  })

  it.live("more makes those go that are beyond the limit of the cache, unused longest first", () => {
    const home = temporaryDirectory()
    return Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      const [first = "", second = ""] = yield* Effect.forEach(["one", "two"], (a) =>
        Effect.map(mountdisk.lower(atRest({ a })), ({ lowerPath }) => lowerPath)
      )
      const hoursAgo = (hours: number) => new Date(Date.now() - hours * 3_600_000)
      utimesSync(`${first}.ok`, hoursAgo(2), hoursAgo(2))
      utimesSync(`${second}.ok`, hoursAgo(1), hoursAgo(1))
      yield* mountdisk.lower(atRest({ a: "three" }))
      assert.isTrue(existsSync(first) && existsSync(second))
      // takes 8 GiB for the accounts of the file system, none of it written
      execFileSync("fallocate", ["-l", String(8 * 2 ** 30), second])
      yield* mountdisk.lower(atRest({ a: "four" }))
      assert.deepStrictEqual([existsSync(first), existsSync(second)], [false, false])
    }).pipe(Effect.provide(using(home)))
  })

  it.live("as an upper that could not be copied leaves no part of a file", () => {
    const home = temporaryDirectory()
    const given = { path: process.env["PATH"] ?? "", tmp: process.env["TMPDIR"] }
    const temporary = path.join(home, "tmp")
    mkdirSync(temporary)
    // writes a part and fails, or is at work when it is interrupted
    executable(home, "cp", `for last; do :; done; echo part >"$last"; [ -e ${home}/fail ] && exit 1; exec sleep 1000`)
    const restore = Effect.sync(() => {
      process.env["PATH"] = given.path
      if (given.tmp === undefined) delete process.env["TMPDIR"]
      else process.env["TMPDIR"] = given.tmp
    })
    return Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      const size = 64 * 2 ** 20
      yield* mountdisk.upperTemplate(size)
      process.env["PATH"] = `${home}:${given.path}`
      process.env["TMPDIR"] = temporary
      const copying = yield* Effect.fork(mountdisk.upper(size))
      yield* eventually("a part of the copy", () => readdirSync(temporary).length === 1)
      yield* Fiber.interrupt(copying)
      assert.deepStrictEqual(readdirSync(temporary), [])
      writeFileSync(path.join(home, "fail"), "")
      const error = yield* Effect.flip(mountdisk.upper(size))
      assert.strictEqual(error.code, "ROOTFS_IMG_IO")
      assert.deepStrictEqual(readdirSync(temporary), [])
    }).pipe(Effect.ensuring(restore), Effect.provide(using(home)))
  })

  it.effect("needs a directory", () => {
    const home = temporaryDirectory()
    writeFileSync(path.join(home, "file"), "")
    return Effect.gen(function* () {
      const mountdisk = yield* Mountdisk
      const missing = yield* Effect.flip(mountdisk.lower(path.join(home, "none")))
      assert.strictEqual(missing.code, "BOOT_MOUNT_HOST_NOT_FOUND")
      const file = yield* Effect.flip(mountdisk.lower(path.join(home, "file")))
      assert.strictEqual(file.code, "BOOT_MOUNT_INVALID")
    }).pipe(Effect.provide(using(home)))
  })

  it.live("has a sparse upper of the size asked for, and fails without mke2fs", () => {
    const home = temporaryDirectory()
    return Effect.gen(function* () {
      const upper = yield* Effect.flatMap(Mountdisk, (m) => m.upperTemplate(64 * 2 ** 20)).pipe(
        Effect.provide(using(home))
      )
      const { blocks, size } = statSync(upper)
      assert.strictEqual(size, 64 * 2 ** 20)
      assert.isBelow(blocks * 512, 4 * 2 ** 20)
      const none = using(path.join(home, "other"), { mke2fs: Option.some("/nowhere/mke2fs") })
      const error = yield* Effect.flip(
        Effect.flatMap(Mountdisk, (m) => m.upperTemplate(64 * 2 ** 20)).pipe(Effect.provide(none))
      )
      assert.strictEqual(error.code, "BOOT_MOUNTDISK_TOOL_MISSING")
    })
  })
})
