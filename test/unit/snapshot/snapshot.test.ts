import { createHash } from "node:crypto"
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync
} from "node:fs"
import * as path from "node:path"
import { NodeContext } from "@effect/platform-node"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer } from "effect"
import * as Vmstate from "../../../backends/vmstate/Vmstate.ts"
import { Settings } from "../../../src/Settings.ts"
import * as Bundle from "../../../src/snapshot/Bundle.ts"
import { FileHasher } from "../../../src/snapshot/FileHasher.ts"
import { SnapshotEngine, SnapshotEngines } from "../../../src/snapshot/SnapshotEngine.ts"
import { chooseEngine } from "../../../src/snapshot/snapshot.ts"
import { temporaryDirectory } from "../../sourceTree.ts"

const engines = Layer.effect(
  SnapshotEngines,
  Effect.map(SnapshotEngine, (engine) => new Map([[engine.name, engine]]))
).pipe(Layer.provide(Vmstate.layer))

const chosen = (snapshotEngine: string) =>
  chooseEngine(undefined).pipe(
    Effect.match({ onSuccess: ({ name }): string => name, onFailure: ({ code }) => code }),
    Effect.provide(Layer.merge(engines, Settings.layerTest("/nowhere", { snapshotEngine })))
  )

const facts: Bundle.Facts = {
  engine: "vmstate",
  snappedAt: 0,
  sourceId: "abcdef012345",
  sourceImage: "micro",
  machine: {
    backend: "fake",
    vmmVersion: "1",
    machine: "fake",
    accel: "tcg",
    cpu: "fake",
    tscKhz: 1,
    devices: []
  },
  kernelSha256: "0",
  memoryMib: 64,
  vcpus: 1,
  network: "none",
  disks: []
}

const digests = Layer.succeed(FileHasher, {
  of: (files) => Effect.succeed(files.map(() => ({ sizeBytes: 1, dataBytes: 1, sha256: "0".repeat(64) }))),
  remembered: () => Effect.succeed("0".repeat(64))
})

/** A finished bundle of one blob, made with the key of that home. */
const finishAs = (home: string, dir: string) =>
  Effect.suspend(() => {
    mkdirSync(dir)
    writeFileSync(path.join(dir, "blob"), "x")
    symlinkSync("{}", path.join(dir, "claim"))
    return Bundle.finish(dir, ["blob"], facts)
  }).pipe(Effect.provide(Settings.layerTest(home)), Effect.provide(digests))

const readAs = (home: string, dir: string) => Effect.provide(Bundle.read(dir), Settings.layerTest(home))

/** Changes a manifest as somebody without the key would: its checksum is right, its MAC is the old one. */
const rewrite = (dir: string, change: (manifest: object) => void) => {
  const file = path.join(dir, "meta.json")
  const { checksum: _, mac, ...manifest } = JSON.parse(readFileSync(file, "utf8"))
  change(manifest)
  const checksum = createHash("sha256").update(JSON.stringify(manifest)).digest("hex")
  writeFileSync(file, JSON.stringify({ ...manifest, checksum, mac }))
}

describe("snapshots", () => {
  it.effect("the engine is named by the variable, whatever its case and spaces; vmstate without one", () =>
    Effect.gen(function* () {
      const answers = yield* Effect.forEach(["", "  ", " VmState\n", "vm state", "magic"], chosen)
      const invalid = "BOOT_SNAPSHOT_ENGINE_INVALID"
      assert.deepStrictEqual(answers, ["vmstate", "vmstate", "vmstate", invalid, invalid])
    })
  )

  it.scoped("a directory without a manifest is no bundle, one with another is refused", () =>
    Effect.gen(function* () {
      const dir = yield* temporaryDirectory
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
    }).pipe(Effect.provide(Settings.layerTest("/nowhere")), Effect.provide(NodeContext.layer))
  )

  it.scoped("a bundle is the user's own when it is signed with the user's key and unchanged", () =>
    Effect.gen(function* () {
      const dir = yield* temporaryDirectory
      const [mine, theirs] = [path.join(dir, "mine"), path.join(dir, "theirs")]
      const isOwn = (home: string, at: string) => Effect.map(readAs(home, at), (bundle) => bundle.isOwn)
      const made = yield* Effect.all(
        [1, 2, 3, 4].map((i) => finishAs(mine, path.join(dir, `bundle${i}`))),
        { concurrency: 4 }
      )
      const key = statSync(path.join(mine, "bundle.key"))
      assert.deepStrictEqual([key.mode & 0o777, key.size], [0o600, 32])
      for (const bundle of made) {
        assert.isTrue(bundle.isOwn)
        assert.isTrue(yield* isOwn(mine, bundle.dir))
        assert.isFalse(yield* isOwn(theirs, bundle.dir))
      }
      // asking does not make a key
      assert.isFalse(existsSync(path.join(theirs, "bundle.key")))
      const another = yield* finishAs(theirs, path.join(dir, "another"))
      assert.deepStrictEqual([yield* isOwn(mine, another.dir), yield* isOwn(theirs, another.dir)], [false, true])

      const changed = path.join(dir, "bundle1")
      rewrite(changed, (manifest) => Object.assign(manifest, { sourceName: "changed" }))
      assert.isFalse(yield* isOwn(mine, changed))
      // a key that others can read is nobody's proof, and is not used
      chmodSync(path.join(mine, "bundle.key"), 0o644)
      assert.isFalse(yield* isOwn(mine, path.join(dir, "bundle2")))
      const error = yield* Effect.flip(finishAs(mine, path.join(dir, "bundle5")))
      assert.strictEqual(error.code, "SNAPSHOT_DUMP_FAILED")
      assert.include(error.message, "chmod 600")
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it.scoped("a manifest with values that no boot accepts is refused, even in the user's own bundle", () =>
    Effect.gen(function* () {
      const dir = yield* temporaryDirectory
      const share = (host: string, guest: string) => ({ liveMounts: [{ host, guest, mode: "rw" }] })
      const wrong: ReadonlyArray<object> = [
        share("/", "/"),
        share("/", "/proc/self"),
        share("/", "/mnt/../etc"),
        share("/", "/dev"),
        share("/", "/mnt//x/"),
        share("relative", "/mnt/x"),
        share("", "/mnt/x"),
        { liveMounts: Array.from({ length: 65 }, (_, i) => ({ host: "/", guest: `/mnt/${i}`, mode: "ro" })) },
        { mount: { host: "/srv", guest: "/usr" } },
        { sourceName: "../../etc" },
        { memoryMib: -1 },
        { vcpus: 0 },
        { disks: [{ id: "root", source: { _tag: "Image", path: "etc/passwd", sha256: "0" } }] },
        { disks: [{ id: "root", source: { _tag: "Blob", name: "../x" } }] },
        { blobs: [{ name: "a/b", sizeBytes: 1, dataBytes: 1, sha256: "0", probe: "0" }] }
      ]
      for (const [i, change] of wrong.entries()) {
        const at = path.join(dir, String(i))
        yield* finishAs(dir, at)
        rewrite(at, (manifest) => Object.assign(manifest, change))
        const error = yield* Effect.flip(readAs(dir, at))
        assert.strictEqual(error.code, "BOOT_SNAPSHOT_INVALID", JSON.stringify(change))
      }
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it.scoped("files of a bundle are files of its directory, not links to others", () =>
    Effect.gen(function* () {
      const dir = yield* temporaryDirectory
      const at = path.join(dir, "bundle")
      const bundle = yield* finishAs(dir, at)
      const checking = Bundle.check(bundle, [])
      yield* checking
      renameSync(path.join(at, "blob"), path.join(dir, "elsewhere"))
      symlinkSync(path.join(dir, "elsewhere"), path.join(at, "blob"))
      const error = yield* Effect.flip(checking)
      assert.strictEqual(error.code, "BOOT_SNAPSHOT_INVALID")
      assert.include(error.message, "not a regular file")
      renameSync(path.join(at, "meta.json"), path.join(dir, "meta.json"))
      symlinkSync(path.join(dir, "meta.json"), path.join(at, "meta.json"))
      assert.strictEqual((yield* Effect.flip(readAs(dir, at))).code, "BOOT_SNAPSHOT_NOT_FOUND")
    }).pipe(Effect.provide(NodeContext.layer))
  )

  it.effect("a bundle that was kept stays, however the scope ends; another goes", () =>
    Effect.gen(function* () {
      for (const kept of [true, false]) {
        const dir = yield* Effect.scoped(temporaryDirectory)
        const at = path.join(dir, "deep", "bundle")
        const claiming = Effect.gen(function* () {
          const claim = yield* Bundle.claim(at, ["blob"])
          writeFileSync(path.join(at, "blob"), "x")
          if (kept) yield* claim.keep
          return yield* Effect.interrupt
        })
        yield* Effect.exit(Effect.scoped(claiming))
        assert.strictEqual(existsSync(path.join(at, "blob")), kept)
        rmSync(dir, { recursive: true, force: true })
      }
    }).pipe(Effect.provide(NodeContext.layer))
  )
})
