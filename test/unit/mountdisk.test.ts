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
import { Effect, FastCheck as fc, Layer, Option } from "effect"
import { Assets } from "../../src/Assets.ts"
import { guestPath, type MountOptions, overridden, validateMounts } from "../../src/domain/mounts.ts"
import { Mountdisk } from "../../src/Mountdisk.ts"
import * as treeScan from "../../src/platform/treeScan.ts"
import { RootfsImage } from "../../src/RootfsImage.ts"
import { Settings, type SettingsValues } from "../../src/Settings.ts"
import { executable, temporaryDirectory } from "../fixtures.ts"

const using = (home: string, overrides: Partial<SettingsValues> = {}) =>
  Mountdisk.layer.pipe(
    Layer.provide(RootfsImage.layer),
    Layer.provide(Assets.layer),
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

describe("mounts", () => {
  const refused: ReadonlyArray<readonly [what: string, options: MountOptions]> = [
    ["a guest path outside /mnt", { mount: { host: "/srv", guest: "/srv" } }],
    ["/mnt itself", { mount: { host: "/srv", guest: "/mnt/" } }],
    ["a neighbour of /mnt", { mount: { host: "/srv", guest: "/mnt2/x" } }],
    ["a guest path that leads out", { mount: { host: "/srv", guest: "/mnt/x/../../etc" } }],
    ["a relative guest path", { liveMounts: [{ host: "/srv", guest: "mnt/x" }] }],
    ["a NUL in the guest path", { liveMounts: [{ host: "/srv", guest: "/mnt/a\0b" }] }],
    ["a NUL in the host path", { liveMounts: [{ host: "/srv\0", guest: "/mnt/a" }] }],
    ["an empty host path", { mount: { host: "", guest: "/mnt/a" } }],
    ["an unknown mode", { liveMounts: [{ host: "/srv", guest: "/mnt/a", mode: "x" as never }] }],
    ["an odd size", { mountDiskUpperSizeBytes: 2 ** 30 + 1 }],
    ["no size", { mountDiskUpperSizeBytes: 0 }],
    [
      "two mounts for one place",
      {
        liveMounts: [
          { host: "/a", guest: "/mnt/x" },
          { host: "/b", guest: "/mnt//x/" }
        ]
      }
    ],
    ["a mount in a mount", { mount: { host: "/a", guest: "/mnt/x" }, liveMounts: [{ host: "/b", guest: "/mnt/x/y" }] }],
    ["six live mounts", { liveMounts: [..."abcdef"].map((name) => ({ host: "/srv", guest: `/mnt/${name}` })) }]
  ]
  for (const [what, options] of refused) {
    it.effect(`refuses ${what}`, () =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(validateMounts(options))
        assert.strictEqual(error.code, "BOOT_MOUNT_INVALID")
        assert.isString(error.hint)
        if (what === "six live mounts") assert.match(error.message, /^6 .* limit is 5$/)
      })
    )
  }

  it.effect("fills in what was left out, and normalises", () =>
    Effect.gen(function* () {
      const plan = yield* validateMounts({
        mount: { host: "/srv/", guest: "/mnt//a/./b/" },
        liveMounts: [{ host: "x", guest: "/mnt/c" }]
      })
      assert.deepStrictEqual(plan, {
        mount: { guest: "/mnt/a/b", host: "/srv" },
        mountUpperBytes: 4 * 1024 ** 3,
        liveMounts: [{ guest: "/mnt/c", host: path.resolve("x"), mode: "rw" }]
      })
    })
  )

  it.effect("a copy has its original's shares, with another directory or mode where that is given", () =>
    Effect.gen(function* () {
      const recorded = [
        { guest: "/mnt/a", host: "/srv/a", mode: "ro" },
        { guest: "/mnt/b", host: "/srv/b", mode: "rw" }
      ] as const
      assert.deepStrictEqual(yield* overridden(recorded, []), [...recorded])
      assert.deepStrictEqual(yield* overridden(recorded, [{ guest: "/mnt//b/", host: "/x" }]), [
        recorded[0],
        { guest: "/mnt/b", host: "/x", mode: "rw" }
      ])
      const both = [
        { guest: "/mnt/b", host: "/x", mode: "ro" },
        { guest: "/mnt/a", host: "/y" }
      ] as const
      assert.deepStrictEqual(yield* overridden(recorded, both), [
        { guest: "/mnt/a", host: "/y", mode: "ro" },
        { guest: "/mnt/b", host: "/x", mode: "ro" }
      ])
      for (const [known, hint] of [
        [recorded, "/mnt/a, /mnt/b"],
        [[], "no live mounts"]
      ] as const) {
        const error = yield* Effect.flip(overridden(known, [{ guest: "/mnt/c", host: "/x" }]))
        assert.strictEqual(error.code, "BOOT_LIVE_MOUNT_OVERRIDE_UNKNOWN")
        assert.include(error.hint, hint)
      }
    })
  )

  it("no accepted guest path leaves /mnt", () => {
    const part = fc.oneof(fc.constantFrom("..", ".", "", "mnt", "a", "..."), fc.string())
    fc.assert(
      fc.property(fc.array(part), (parts) => {
        const accepted = Effect.runSync(Effect.option(guestPath(`/${parts.join("/")}`)))
        if (Option.isNone(accepted)) return
        assert.strictEqual(path.posix.normalize(accepted.value), accepted.value)
        assert.match(accepted.value, /^\/mnt\/./)
      })
    )
  })
})

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
        keepTime(dir, () => {
          rmSync(path.join(dir, "l"))
          symlinkSync("bb", path.join(dir, "l"))
        })
    ]
  ]
  const keepTime = (file: string, act: () => void) => {
    const { atime, mtime } = statSync(file)
    act()
    utimesSync(file, atime, mtime)
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
    ["a tool that fails", "echo broken >&2; exit 3", "PROVISION_INSTALL_HOOK_FAILED"],
    ["no space", "echo 'Write failed because No space left on device'; exit 1", "ROOTFS_IMG_NO_SPACE"]
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
        if (existsSync(mountdisk.cacheDir)) assert.deepStrictEqual(readdirSync(mountdisk.cacheDir), [])
      }).pipe(Effect.provide(using(home, { mksquashfs: Option.some(tool) })))
    })
  }

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

  it.live("has an upper of the size asked for, almost all hole; without mke2fs there is none", () => {
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
