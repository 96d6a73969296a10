import { existsSync, readFileSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect, Exit } from "effect"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import { fakeVmm, hang, live, settled, temporaryDirectory, temporaryHome } from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

/** A cache of its own, so that nothing is known of the host yet, and a VMM that counts its starts. */
const fixture = (name: string, body: string) => {
  const cache = temporaryDirectory()
  const starts = path.join(cache, "starts")
  const vmm = fakeVmm(home, name, `echo >>"${starts}"; ${body}`)
  const settings = { MACHINEN_CACHE_DIR: cache, MACHINEN_VMM: vmm, MACHINEN_ACCEL: "auto" }
  const notes = path.join(cache, `host-${readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim()}.json`)
  return {
    /** Each provides a layer of its own, as each process does. */
    run: <A, E>(use: (probe: HostProbe["Type"]) => Effect.Effect<A, E>) =>
      Effect.flatMap(HostProbe, use).pipe(Effect.provide(live(home, settings))),
    starts: () => (existsSync(starts) ? readFileSync(starts, "utf8").length : 0),
    /** Makes what is noted of KVM older than it is believed. */
    outdate: () =>
      writeFileSync(notes, readFileSync(notes, "utf8").replace(/"untilMs":\d+/, `"untilMs":${Date.now() - 1}`)),
    noted: () => readFileSync(notes, "utf8")
  }
}

const asked = ({ accelerator }: HostProbe["Type"]) => accelerator

// without a device nothing is probed: there is nothing to get wrong
describe.skipIf(!existsSync("/dev/kvm"))("the probe for KVM (needs a /dev/kvm, working or not)", () => {
  it.live("believes a VMM that aborted for as long as the host is up", () => {
    const { noted, run, starts } = fixture("aborts", "kill -ABRT $$")
    return Effect.gen(function* () {
      const { accel, reason } = yield* run(asked)
      assert.strictEqual(accel, "tcg")
      assert.include(reason, "cannot use it")
      yield* run(asked)
      assert.strictEqual(starts(), 1)
      assert.notInclude(noted(), "untilMs")
    })
  })

  it.live("asks again, later, where a VMM refused for a reason that may pass", () => {
    const { outdate, run, starts } = fixture("busy", "echo 'Device or resource busy' >&2; exit 1")
    return Effect.gen(function* () {
      assert.include((yield* run(asked)).reason, "Device or resource busy")
      yield* run(asked)
      assert.strictEqual(starts(), 1)
      outdate()
      yield* run(asked)
      assert.strictEqual(starts(), 2)
    })
  })

  it.live("asks again, later, where the kernel was too slow", () => {
    const { outdate, run, starts } = fixture("slow", hang(home))
    return Effect.gen(function* () {
      assert.include((yield* run(asked)).reason, "hangs")
      yield* run(asked)
      assert.strictEqual(starts(), 1)
      outdate()
      yield* Effect.timeoutOption(run(asked), "1 second")
      assert.strictEqual(starts(), 2)
    })
  })

  it.live("answers the next caller when the first was interrupted, and leaves nothing of that one", () => {
    const { run, starts } = fixture("hangs-once", `[ -e "${home}/again" ] && exit 1; : >"${home}/again"; ${hang(home)}`)
    return run((probe) =>
      Effect.gen(function* () {
        assert.isTrue(Exit.isFailure(yield* Effect.exit(Effect.timeout(probe.accelerator, "1 second"))))
        assert.strictEqual((yield* probe.accelerator).accel, "tcg")
        assert.strictEqual(starts(), 2)
      })
    )
  })

  it.live("works where the cache lies too deep for a socket", () => {
    const vmm = fakeVmm(home, "deep", "kill -ABRT $$")
    const cache = path.join(temporaryDirectory(), "d".repeat(100))
    return Effect.gen(function* () {
      const { reason } = yield* Effect.flatMap(HostProbe, asked)
      assert.include(reason, "cannot use it")
    }).pipe(Effect.provide(live(home, { MACHINEN_CACHE_DIR: cache, MACHINEN_VMM: vmm, MACHINEN_ACCEL: "auto" })))
  })
})
