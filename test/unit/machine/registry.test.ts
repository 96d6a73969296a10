import { spawnSync } from "node:child_process"
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { FileSystem, Error as PlatformErrors } from "@effect/platform"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, Layer, Schema, Scope } from "effect"
import { VmId, VmName } from "../../../src/machine/MachineSpec.ts"
import { Registry } from "../../../src/machine/Registry.ts"
import { VmEntry } from "../../../src/machine/VmEntry.ts"
import * as processes from "../../../src/platform/processes.ts"
import { Settings } from "../../../src/Settings.ts"
import { temporaryHome } from "../../fixtures.ts"

const live = (home: string) =>
  Effect.provide(
    Registry.layer.pipe(Layer.provideMerge(Settings.layerTest(home)), Layer.provideMerge(NodeContext.layer))
  )

const entryOf = Effect.fnUntraced(function* (home: string, id: string, over: Partial<VmEntry> = {}) {
  return new VmEntry({
    version: 1,
    id: VmId.make(id),
    state: "booting",
    bootId: yield* processes.bootId,
    owner: yield* processes.self,
    detached: false,
    backend: "fake",
    accel: "tcg",
    image: "micro",
    memoryMib: 128,
    vcpus: 1,
    createdAt: 1,
    vsockPath: path.join(home, "v"),
    controlPath: path.join(home, "c"),
    ...over
  })
})

const name = VmName.make("team/web")
const vms = (home: string) => path.join(home, "vms")
const pins = (home: string) => (existsSync(path.join(home, "names")) ? readdirSync(path.join(home, "names")) : [])

/** Writes an entry as another process would have. */
const plant = (home: string, entry: VmEntry) => {
  const dir = path.join(vms(home), entry.id)
  mkdirSync(dir, { recursive: true })
  mkdirSync(path.join(home, "names"), { recursive: true })
  writeFileSync(path.join(dir, "entry.json"), Schema.encodeSync(Schema.parseJson(VmEntry))(entry))
  if (entry.name !== undefined) writeFileSync(path.join(home, "names", encodeURIComponent(entry.name)), entry.id)
}

/** Nobody: our own pid, but another start time, as after a pid was reused. */
const dead = { pid: process.pid, startTime: 1 }

describe("registry", () => {
  it.effect("a claim is listed, found by each of its names, and gone with its scope", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const registry = yield* Registry
      yield* Effect.scoped(
        Effect.gen(function* () {
          const cleanup = yield* registry.claim(yield* entryOf(home, "abcdef012345", { name }))
          assert.deepStrictEqual(cleanup, [path.join(home, "names", "team%2Fweb")])
          assert.lengthOf(yield* registry.list, 1)
          for (const reference of ["team/web", "abcdef012345", "abcd"]) {
            assert.strictEqual((yield* registry.find(reference)).id, "abcdef012345")
          }
        })
      )
      assert.deepStrictEqual([readdirSync(vms(home)), pins(home)], [[], []])
      const error = yield* Effect.flip(registry.find("team/web"))
      assert.strictEqual(error.code, "REGISTRY_VM_NOT_FOUND")
    }).pipe(live(home))
  })

  it.effect("of many claims of one name at the same time, one succeeds", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const registry = yield* Registry
      const scope = yield* Scope.make()
      const exits = yield* Effect.forEach(
        [...Array(12).keys()],
        (i) =>
          entryOf(home, `a${String(i).padStart(11, "0")}`, { name }).pipe(
            Effect.flatMap(registry.claim),
            Scope.extend(scope),
            Effect.exit
          ),
        { concurrency: "unbounded" }
      )
      assert.strictEqual(exits.filter(Exit.isSuccess).length, 1)
      yield* Scope.close(scope, Exit.void)
      assert.deepStrictEqual([readdirSync(vms(home)), pins(home)], [[], []])
    }).pipe(live(home))
  })

  it.effect("of many claims of a dead VM's name, one succeeds", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      plant(home, yield* entryOf(home, "fffffffffff0", { name, owner: dead }))
      const registry = yield* Registry
      const scope = yield* Scope.make()
      const exits = yield* Effect.forEach(
        [...Array(12).keys()],
        (i) =>
          entryOf(home, `b${String(i).padStart(11, "0")}`, { name }).pipe(
            Effect.flatMap(registry.claim),
            Scope.extend(scope),
            Effect.exit
          ),
        { concurrency: "unbounded" }
      )
      assert.strictEqual(exits.filter(Exit.isSuccess).length, 1)
      const holder = yield* registry.find("team/web")
      assert.strictEqual(readFileSync(path.join(home, "names", "team%2Fweb"), "utf8"), holder.id)
      yield* Scope.close(scope, Exit.void)
    }).pipe(live(home))
  })

  it.effect("reconcile removes what the dead left, and only that", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      plant(home, yield* entryOf(home, "d00000000001", { name: VmName.make("gone"), owner: dead }))
      plant(home, yield* entryOf(home, "d00000000002", { name: VmName.make("rebooted"), bootId: "another boot" }))
      plant(home, yield* entryOf(home, "d00000000003", { name: VmName.make("alive") }))
      mkdirSync(path.join(vms(home), "d00000000004")) // no entry
      mkdirSync(path.join(vms(home), `.d00000000005.${process.pid}.1`)) // a starter that died while making it
      const me = yield* processes.self
      const ours = `.d00000000006.${me.pid}.${me.startTime}`
      mkdirSync(path.join(vms(home), ours))
      writeFileSync(path.join(home, "names", "orphan"), "d00000000009")

      const registry = yield* Registry
      const told = yield* registry.reconcile({ dryRun: true })
      assert.strictEqual(readdirSync(vms(home)).length, 6)
      const done = yield* registry.reconcile()
      assert.deepStrictEqual(done, told)
      assert.sameMembers(readdirSync(vms(home)), ["d00000000003", ours])
      assert.deepStrictEqual(pins(home), ["alive"])
      assert.deepStrictEqual(yield* registry.reconcile(), [])
    }).pipe(live(home))
  })

  it.effect("a malformed entry is not listed, whatever pid it names", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      for (const [id, text] of [
        ["e00000000001", "not json"],
        ["e00000000002", JSON.stringify({ pid: 1 })],
        ["e00000000003", "x".repeat(100_000)]
      ] as const) {
        mkdirSync(path.join(vms(home), id), { recursive: true })
        writeFileSync(path.join(vms(home), id, "entry.json"), text)
      }
      const registry = yield* Registry
      assert.deepStrictEqual(yield* registry.list, [])
      yield* registry.reconcile()
      assert.deepStrictEqual(readdirSync(vms(home)), [])
    }).pipe(live(home))
  })

  it.effect("a claim that cannot be written leaves nothing", () => {
    const home = temporaryHome()
    const full = new PlatformErrors.SystemError({ reason: "Unknown", module: "FileSystem", method: "rename" })
    const fullDisk = Layer.effect(
      FileSystem.FileSystem,
      Effect.map(FileSystem.FileSystem, (fs) => ({ ...fs, rename: () => Effect.fail(full) }))
    )
    return Effect.gen(function* () {
      const registry = yield* Registry
      const error = yield* Effect.flip(Effect.scoped(registry.claim(yield* entryOf(home, "e00000000001"))))
      assert.strictEqual(error.code, "REGISTRY_IO")
      assert.deepStrictEqual(readdirSync(vms(home)), [])
    }).pipe(
      Effect.provide(
        Registry.layer.pipe(
          Layer.provide(fullDisk),
          Layer.provide(Settings.layerTest(home)),
          Layer.provideMerge(NodeContext.layer)
        )
      )
    )
  })

  it.effect("a name is given up under the lock, so that no process takes it between the check and the removal", () => {
    const home = temporaryHome()
    const pin = path.join(home, "names", encodeURIComponent(name))
    const looks: Array<number | null> = []
    /** Whether another process gets the lock while the pin is looked at: flock(1) ends with 1 where it does not. */
    const seen = Layer.effect(
      FileSystem.FileSystem,
      Effect.map(
        FileSystem.FileSystem,
        (fs): FileSystem.FileSystem => ({
          ...fs,
          readFileString: (file, encoding) =>
            Effect.suspend(() => {
              const lock = path.join(home, "names.lock")
              if (file === pin) looks.push(spawnSync("flock", ["--nonblock", lock, "true"]).status)
              return fs.readFileString(file, encoding)
            })
        })
      )
    )
    return Effect.gen(function* () {
      const registry = yield* Registry
      yield* Effect.scoped(registry.claim(yield* entryOf(home, "a00000000001", { name })))
      assert.deepStrictEqual([looks, pins(home)], [[1], []])
    }).pipe(
      Effect.provide(
        Registry.layer.pipe(
          Layer.provide(seen),
          Layer.provide(Settings.layerTest(home)),
          Layer.provideMerge(NodeContext.layer)
        )
      )
    )
  })

  it.effect("an entry under another id's directory is not believed", () => {
    const home = temporaryHome()
    return Effect.gen(function* () {
      const entry = yield* entryOf(home, "e00000000001")
      mkdirSync(path.join(vms(home), "e00000000002"), { recursive: true })
      writeFileSync(
        path.join(vms(home), "e00000000002", "entry.json"),
        Schema.encodeSync(Schema.parseJson(VmEntry))(entry)
      )
      const registry = yield* Registry
      assert.deepStrictEqual(yield* registry.list, [])
    }).pipe(live(home))
  })
})

describe("processes", () => {
  it.effect("a process is told from an earlier one with the same pid", () =>
    Effect.gen(function* () {
      const me = yield* processes.self
      assert.isTrue(yield* processes.isAlive(me))
      assert.isFalse(yield* processes.isAlive({ ...me, startTime: me.startTime + 1 }))
    })
  )
})
