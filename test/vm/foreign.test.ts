import { execFileSync } from "node:child_process"
import * as fs from "node:fs"
import * as path from "node:path"
import { afterAll, assert, beforeAll, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import type { BootOptions } from "../../src/machine/BootOptions.ts"
import type { SnapshotOptions } from "../../src/snapshot/snapshot.ts"
import { cli, leftovers, live, newBundle, settled, sh, sha256, temporaryDirectory, temporaryHome } from "../fixtures.ts"

/** Ours, and another user's. */
const home = temporaryHome()
const elsewhere = temporaryHome()
const ours = live(home)
const theirs = live(elsewhere)
const shared = temporaryDirectory()
fs.writeFileSync(path.join(shared, "secret"), "of the host")

/** A bundle of a new VM, made by whoever `program` is. */
const bundleOf = (
  program: typeof ours,
  options: BootOptions,
  how: Partial<SnapshotOptions> = {}
): Effect.Effect<string, unknown> =>
  Effect.gen(function* () {
    const machinen = yield* Machinen
    const { vm } = yield* machinen.boot({ image: "micro", network: "none", name: "origin", ...options })
    yield* sh(vm, "echo kept >/dev/shm/note")
    return (yield* machinen.snapshot(vm, { outDir: newBundle(), ...how })).bundle.dir
  }).pipe(Effect.scoped, Effect.provide(program))

// biome-ignore lint/suspicious/noExplicitAny: these are forged
type Forged = any
/** A copy of a bundle whose manifest was changed by somebody without the key. */
const forged = (bundle: string, change: (manifest: Forged) => void): string => {
  const dir = newBundle()
  execFileSync("cp", ["-r", "--sparse=always", bundle, dir])
  const file = path.join(dir, "meta.json")
  const { checksum: _, mac, ...manifest } = JSON.parse(fs.readFileSync(file, "utf8"))
  change(manifest)
  const checksum = sha256(Buffer.from(JSON.stringify(manifest)))
  fs.writeFileSync(file, JSON.stringify({ ...manifest, checksum, mac }))
  return dir
}
const wholeHost = { liveMounts: [{ host: "/", guest: "/mnt/x", mode: "rw" }] }

const restore = (snapDir: string, options: object = {}) =>
  Effect.flatMap(Machinen, (m) => m.restore({ snapDir, ...options }))

/** Refused, with nothing started. */
const refused = (snapDir: string, options: object = {}) =>
  Effect.gen(function* () {
    const error = yield* Effect.flip(
      Effect.zipRight(Effect.scoped(restore(snapDir, options)), Effect.dieMessage("it was restored"))
    )
    assert.deepStrictEqual(leftovers(home), { processes: [], vms: [], names: [] })
    return { code: error.code, message: error.message, hint: error.hint ?? "" }
  })

/** Made once, never changed. */
const made = { own: "", plain: "", network: "", shares: "", processes: "" }
beforeAll(async () => {
  const liveMounts = [{ host: shared, guest: "/mnt/s" }] as const
  const all = Effect.all({
    own: bundleOf(ours, { network: "nat", liveMounts }),
    plain: bundleOf(theirs, {}),
    network: bundleOf(theirs, { network: "nat" }),
    shares: bundleOf(theirs, { liveMounts }),
    processes: bundleOf(theirs, { image: "debian", network: "nat" }, { engine: "criu" })
  })
  Object.assign(made, await Effect.runPromise(all))
}, 120_000)
afterAll(() => settled(home))
afterAll(() => settled(elsewhere))

describe("a bundle of this user's own", { timeout: 120_000 }, () => {
  it.scopedLive("is restored as recorded, wherever it was copied", () =>
    Effect.gen(function* () {
      const dir = forged(made.own, () => {})
      const { vm } = yield* restore(dir)
      assert.strictEqual(vm.name, `origin/${vm.pid}`)
      assert.strictEqual(
        yield* sh(vm, "cat /dev/shm/note /mnt/s/secret; ls /sys/class/net"),
        "kept\nof the hosteth0\nlo"
      )
      const { bundle, misfits, unasked } = yield* (yield* Machinen).inspect(dir)
      assert.deepStrictEqual([bundle.isOwn, misfits, unasked], [true, [], []])
    }).pipe(Effect.provide(ours))
  )

  it.live("that was changed is no longer the user's own", () =>
    Effect.gen(function* () {
      const dir = forged(made.own, (manifest) => Object.assign(manifest, wholeHost))
      const { code, hint, message } = yield* refused(dir)
      assert.strictEqual(code, "BOOT_SNAPSHOT_FOREIGN")
      assert.include(message, "share this host's / with its guest at /mnt/x (rw)")
      assert.include(message, "network")
      assert.include(hint, "--mount-live HOST:/mnt/x")
      assert.include(hint, "--network nat")
    }).pipe(Effect.provide(ours))
  )
})

describe("a bundle of another", { timeout: 120_000 }, () => {
  it.scopedLive("that asks for nothing of this host is restored, without the source's name", () =>
    Effect.gen(function* () {
      const { vm } = yield* restore(made.plain)
      assert.isUndefined(vm.name)
      assert.strictEqual(yield* sh(vm, "cat /dev/shm/note; hostname"), `kept\nvm-${vm.id}`)
    }).pipe(Effect.provide(ours))
  )

  it.scopedLive("gets the network only when that is asked for", () =>
    Effect.gen(function* () {
      const { code, hint } = yield* refused(made.network)
      assert.deepStrictEqual([code, hint.includes("--network nat")], ["BOOT_SNAPSHOT_FOREIGN", true])
      assert.strictEqual((yield* refused(made.network, { network: "none" })).code, "BOOT_OPTION_INVALID")
      const { vm } = yield* restore(made.network, { network: "nat" })
      assert.strictEqual(yield* sh(vm, "cat /dev/shm/note; ls /sys/class/net"), "kept\neth0\nlo")
    }).pipe(Effect.provide(ours))
  )

  it.scopedLive("gets only the directories that are named for it", () =>
    Effect.gen(function* () {
      for (const dir of [made.shares, forged(made.shares, (manifest) => Object.assign(manifest, wholeHost))]) {
        assert.strictEqual((yield* refused(dir)).code, "BOOT_SNAPSHOT_FOREIGN")
      }
      const mine = temporaryDirectory()
      fs.writeFileSync(path.join(mine, "given"), "this")
      const liveMounts = [{ host: mine, guest: "/mnt/s", mode: "ro" }] as const
      const { vm } = yield* restore(made.shares, { liveMounts })
      assert.strictEqual(yield* sh(vm, "ls /mnt/s; touch /mnt/s/x 2>/dev/null || echo refused"), "given\nrefused")
    }).pipe(Effect.provide(ours))
  )

  it.scopedLive("by criu is bound by the same, and can go without the network, and with more memory", () =>
    Effect.gen(function* () {
      const { code } = yield* refused(made.processes)
      assert.strictEqual(code, "BOOT_SNAPSHOT_FOREIGN")
      const sharing = forged(made.processes, (manifest) => Object.assign(manifest, wholeHost))
      assert.include((yield* refused(sharing, { network: "none" })).message, "share this host's /")
      const { vm } = yield* restore(made.processes, { network: "none", memoryMib: 768 })
      assert.strictEqual(yield* sh(vm, "cat /dev/shm/note; ls /sys/class/net"), "kept\nlo")
      const kib = Number(yield* sh(vm, "awk '/MemTotal/ { print $2 }' /proc/meminfo"))
      assert.isAbove(kib, 640 * 1024)
      assert.strictEqual(vm.entry.memoryMib, 768)
    }).pipe(Effect.provide(ours))
  )

  it.live("whose engine is forged is no machine that could go on", () =>
    Effect.gen(function* () {
      const dir = forged(made.plain, (manifest) => Object.assign(manifest, { engine: "criu", ...wholeHost }))
      assert.strictEqual((yield* refused(dir)).code, "BOOT_SNAPSHOT_FOREIGN")
    }).pipe(Effect.provide(ours))
  )

  it.live("cannot give its guest another file of this host", () =>
    Effect.gen(function* () {
      const dir = forged(made.plain, () => {})
      fs.renameSync(path.join(dir, "upper.img"), path.join(path.dirname(dir), "upper.img"))
      fs.symlinkSync("../upper.img", path.join(dir, "upper.img"))
      const { code, message } = yield* refused(dir)
      assert.deepStrictEqual([code, message.includes("not a regular file")], ["BOOT_SNAPSHOT_INVALID", true])
      assert.deepStrictEqual(yield* (yield* Machinen).verify(dir), ["upper.img"])
    }).pipe(Effect.provide(ours))
  )
})

it.live("a whole machine keeps its memory, and the CLI shows that and the maker of a bundle", () =>
  Effect.gen(function* () {
    const larger = yield* cli(home, ["restore", made.plain, "--memory", "768", "-d"])
    assert.strictEqual(larger.code, 1)
    assert.match(larger.stderr, /\(BOOT_MEMORY_INVALID\).*vmstate/)
    const own = yield* cli(home, ["snapshot", "inspect", made.own])
    assert.include(own.stdout, "your own: it is restored as recorded")
    const foreign = yield* cli(home, ["snapshot", "inspect", made.shares])
    assert.include(foreign.stdout, "not made by your machinen")
    assert.include(foreign.stdout, `--mount-live HOST:/mnt/s:ro`)
    const { isOwn, unasked } = JSON.parse((yield* cli(home, ["snapshot", "inspect", "--json", made.network])).stdout)
    assert.deepStrictEqual([isOwn, unasked.length], [false, 1])
    const refusal = yield* cli(home, ["restore", made.network, "-d", "--name", "x"])
    assert.deepStrictEqual([refusal.code, refusal.stdout], [1, ""])
    assert.include(refusal.stderr, "(BOOT_SNAPSHOT_FOREIGN)")
    const asked = yield* cli(home, ["restore", made.network, "-d", "--name", "x", "--network", "nat"])
    assert.deepStrictEqual({ ...asked, stderr: "" }, { code: 0, signal: null, stdout: "x\n", stderr: "" })
    assert.strictEqual((yield* cli(home, ["stop", "x"])).code, 0)
  })
)
