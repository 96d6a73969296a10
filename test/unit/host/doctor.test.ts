import { writeFileSync } from "node:fs"
import * as path from "node:path"
import * as NodeContext from "@effect/platform-node/NodeContext"
import { assert, describe, it } from "@effect/vitest"
import { Effect, Layer, Schema } from "effect"
import { BootError } from "../../../src/errors.ts"
import { Assets } from "../../../src/host/Assets.ts"
import { Doctor, DoctorReport } from "../../../src/host/Doctor.ts"
import { SourceTree } from "../../../src/host/SourceTree.ts"
import { type AcceleratorChoice, HostProbe } from "../../../src/machine/HostProbe.ts"
import { Settings } from "../../../src/Settings.ts"
import { type FakeAnswer, fakeCommands } from "../../fakeCommands.ts"
import { temporaryDirectory, writeSourceTree } from "../../sourceTree.ts"

/** A host where every program answers `1.99.0`; a test breaks what it is about. */
const host = Effect.gen(function* () {
  const source = yield* temporaryDirectory
  const state = yield* temporaryDirectory
  writeSourceTree(source)
  const programs = new Map<string, FakeAnswer | undefined>([["df", { stdout: `Avail\n${100 * 1024 ** 3}\n` }]])
  const accelerator: { choice: Effect.Effect<AcceleratorChoice, BootError> } = {
    choice: Effect.succeed({ accel: "tcg", reason: "no /dev/kvm" })
  }
  const layer = Doctor.layerFor({ nodeVersion: "20.20.2" }).pipe(
    Layer.provideMerge(Assets.layerWithoutSource),
    Layer.provide(
      Layer.succeed(HostProbe, {
        accelerator: Effect.suspend(() => accelerator.choice),
        tscKhz: Effect.succeed(1),
        vmmVersion: Effect.succeed("7.2.22")
      })
    ),
    Layer.provide(SourceTree.layerTest(source)),
    Layer.provide(Settings.layerTest(state)),
    Layer.provide(
      Layer.merge(
        NodeContext.layer,
        fakeCommands(([bin = ""]) => (programs.has(bin) ? programs.get(bin) : { stdout: `${bin} 1.99.0\n` }))
      )
    )
  )
  const buildAll = Effect.flatMap(Assets, (assets) =>
    Effect.forEach(["kernel", "programs", "gvproxy", "base-micro", "base-debian"] as const, (name) =>
      assets.build(name, ({ out }) => Effect.sync(() => writeFileSync(path.join(out, "file"), name)))
    )
  )
  const examine = Effect.gen(function* () {
    const report = yield* Effect.flatMap(Doctor, (doctor) => doctor.examine)
    const of = (id: string) => report.requirements.find((requirement) => requirement.id === id)
    return { report, of }
  })
  return { accelerator, buildAll, examine, layer, programs, state }
})

describe("Doctor", () => {
  it.scoped("a host with everything is well, and says so in JSON", () =>
    Effect.gen(function* () {
      const { buildAll, examine, layer } = yield* host
      const { of, report } = yield* Effect.provide(Effect.zipRight(buildAll, examine), layer)
      assert.isTrue(report.ok)
      assert.strictEqual(of("mke2fs")?.version, "1.99.0")
      assert.strictEqual(of("asset-kernel")?.status, "found")
      const json = JSON.stringify(yield* Schema.encode(DoctorReport)(report))
      assert.deepStrictEqual(yield* Schema.decode(Schema.parseJson(DoctorReport))(json), report)
    })
  )

  it.scoped("tells missing programs from broken ones, and names the fix", () =>
    Effect.gen(function* () {
      const { examine, layer, programs } = yield* host
      programs.set("mksquashfs", undefined)
      programs.set("qemu-system-x86_64", {
        code: 127,
        stderr: "qemu-system-x86_64: error while loading shared libraries: libfdt.so.1.4: cannot open"
      })
      programs.set("cargo", { stdout: "cargo 1.65.0\n" })
      const { of, report } = yield* Effect.provide(examine, layer)
      assert.isFalse(report.ok)
      assert.deepInclude(of("mksquashfs"), { status: "missing", fix: "apt-get install squashfs-tools" })
      assert.strictEqual(of("qemu-system-x86_64")?.status, "broken")
      assert.include(of("qemu-system-x86_64")?.detail, "libfdt")
      assert.deepInclude(of("cargo"), { status: "broken", fix: "rustup update stable" })
      assert.deepInclude(of("asset-kernel"), { status: "missing" })
    })
  )

  it.scoped("a host that brought its assets needs no compiler; one that must build does", () =>
    Effect.gen(function* () {
      const { buildAll, examine, layer, programs } = yield* host
      const compilers = ["cargo", "go", "gcc", "make", "mmdebstrap", "busybox", "resize2fs"]
      for (const bin of compilers) programs.set(bin, undefined)
      const bare = yield* Effect.provide(examine, layer)
      for (const bin of compilers) assert.deepInclude(bare.of(bin), { status: "missing", optional: false })
      const { of, report } = yield* Effect.provide(Effect.zipRight(buildAll, examine), layer)
      assert.isTrue(report.ok)
      for (const bin of compilers) assert.deepInclude(of(bin), { status: "missing", optional: true })
      assert.include(of("gcc")?.detail, "kernel")

      // a VM's own needs are not optional for that
      programs.set("mke2fs", undefined)
      const lame = yield* Effect.provide(examine, layer)
      assert.isFalse(lame.report.ok)
      assert.deepInclude(lame.of("mke2fs"), { status: "missing", optional: false, fix: "apt-get install e2fsprogs" })
    })
  )

  it.scoped("an asset whose file is not as it was built is broken", () =>
    Effect.gen(function* () {
      const { buildAll, examine, layer } = yield* host
      const { of, report } = yield* Effect.gen(function* () {
        yield* buildAll
        const assets = yield* Assets
        const dir = path.dirname(yield* assets.kernel)
        writeFileSync(path.join(dir, "file"), "torn")
        return yield* examine
      }).pipe(Effect.provide(layer))
      assert.isFalse(report.ok)
      assert.strictEqual(of("asset-kernel")?.status, "broken")
      assert.include(of("asset-kernel")?.fix, "machinen install")
      assert.strictEqual(of("asset-programs")?.status, "found")
    })
  )

  it.scoped("shows the accelerator and why; a probe that fails is broken, not a crash", () =>
    Effect.gen(function* () {
      const { accelerator, examine, layer } = yield* host
      const first = yield* Effect.provide(examine, layer)
      assert.deepInclude(first.of("accelerator"), { status: "found", version: "tcg", detail: "no /dev/kvm" })
      accelerator.choice = new BootError({ code: "BOOT_VMM_MISSING", message: "no qemu", hint: "install it" })
      const second = yield* Effect.provide(examine, layer)
      assert.deepInclude(second.of("accelerator"), { status: "broken", detail: "no qemu", fix: "install it" })
    })
  )

  it.scoped("too little disk is broken; what is optional does not count", () =>
    Effect.gen(function* () {
      const { buildAll, examine, layer, programs } = yield* host
      const built = Effect.zipRight(buildAll, examine)
      const well = yield* Effect.provide(built, layer)
      const kvm = well.of("kvm")
      assert.isTrue(kvm?.optional)
      assert.isTrue(well.report.ok)
      programs.set("df", { stdout: "Avail\n1000000\n" })
      const full = yield* Effect.provide(examine, layer)
      assert.isFalse(full.report.ok)
      assert.strictEqual(full.of("disk")?.status, "broken")
    })
  )
})
