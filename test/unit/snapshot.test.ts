import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { NodeContext } from "@effect/platform-node"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import * as Vmstate from "../../backends/vmstate/Vmstate.ts"
import * as Bundle from "../../src/Bundle.ts"
import { parseAvailable } from "../../src/platform/memory.ts"
import { probeHash } from "../../src/platform/probeHash.ts"
import { Settings } from "../../src/Settings.ts"
import { SnapshotEngine, SnapshotEngines } from "../../src/SnapshotEngine.ts"
import { chooseEngine } from "../../src/snapshot.ts"

const engines = Layer.effect(
  SnapshotEngines,
  Effect.map(SnapshotEngine, (engine) => new Map([[engine.name, engine]]))
).pipe(Layer.provide(Vmstate.layer))

const chosen = (snapshotEngine: string) =>
  chooseEngine(undefined).pipe(
    Effect.match({ onSuccess: ({ name }): string => name, onFailure: ({ code }) => code }),
    Effect.provide(Layer.merge(engines, Settings.layerTest("/nowhere", { snapshotEngine })))
  )

const scratch = Effect.acquireRelease(
  Effect.sync(() => mkdtempSync(path.join(process.env["MACHINEN_TEST_TMP"] ?? os.tmpdir(), "mn-"))),
  (dir) => Effect.sync(() => rmSync(dir, { recursive: true }))
)

describe("snapshots", () => {
  it.effect("the engine is named by the variable, whatever its case and spaces; vmstate without one", () =>
    Effect.gen(function* () {
      const answers = yield* Effect.forEach(["", "  ", " VmState\n", "vm state", "magic"], chosen)
      const invalid = "BOOT_SNAPSHOT_ENGINE_INVALID"
      assert.deepStrictEqual(answers, ["vmstate", "vmstate", "vmstate", invalid, invalid])
    })
  )

  it.scoped("a hole and zeros are the same to a look at a file's ends, anything else is not", () =>
    Effect.gen(function* () {
      const dir = yield* scratch
      const file = path.join(dir, "file")
      const looked = (content: Buffer, size: number) =>
        Effect.suspend(() => {
          writeFileSync(file, content)
          truncateSync(file, size)
          return probeHash(file)
        })
      const block = Buffer.alloc(4096, 1)
      const at = (offset: number) => Buffer.concat([Buffer.alloc(offset), block])
      const size = 8 * 2 ** 20
      const head = yield* looked(at(4096), size)
      assert.strictEqual(yield* looked(Buffer.concat([at(4096), Buffer.alloc(100_000)]), size), head)
      assert.notStrictEqual(yield* looked(at(8192), size), head)
      assert.notStrictEqual(yield* looked(at(size - 4096), size), yield* looked(at(size - 8192), size))
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it.scoped("a directory without a manifest is no bundle, one with another is refused", () =>
    Effect.gen(function* () {
      const dir = yield* scratch
      const reading = Effect.map(Effect.flip(Bundle.read(dir)), ({ code }) => code)
      assert.strictEqual(yield* reading, "BOOT_SNAPSHOT_NOT_FOUND")
      const written = (text: string) =>
        Effect.suspend(() => {
          writeFileSync(path.join(dir, "meta.json"), text)
          return reading
        })
      const answers = yield* Effect.forEach(
        ["", "{", "[]", '{"format":1}', '{"format":1,"checksum":"0"}', '{"format":2,"checksum":"0"}'],
        written
      )
      const invalid = "BOOT_SNAPSHOT_INVALID"
      assert.deepStrictEqual(answers, [invalid, invalid, invalid, invalid, invalid, "BOOT_SNAPSHOT_MISMATCH"])
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it("memory that is free is what the kernel calls available", () => {
    assert.strictEqual(parseAvailable("MemTotal:       100 kB\nMemAvailable:    42 kB\n"), 43008)
    assert.strictEqual(parseAvailable("MemTotal: 100 kB\n"), undefined)
  })
})
