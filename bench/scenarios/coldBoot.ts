import { Effect, Option } from "effect"
import { Assets } from "../../src/host/Assets.ts"
import { Machinen } from "../../src/Machinen.ts"
import { defaultMemoryMib } from "../../src/machine/BootOptions.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import { atMost, BenchError, p50, type Scenario, type Variant } from "../harness.ts"
import * as rawQemu from "../rawQemu.ts"

const machine: rawQemu.Machine = { memoryMib: defaultMemoryMib, vcpus: 1 }

/** The median of the first command's answer may be at most this many times the raw marker, plus `slackMs`. */
const factors = { micro: 1.25, debian: 1.4 } as const
const slackMs = 60

type Image = keyof typeof factors

const boot = (image: Image, prepared: boolean): Variant => ({
  name: prepared ? `${image} prepared` : image,
  released: true,
  run: ({ elapsed, mark, record }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const { phases, vm } = yield* machinen.boot({ image, ...machine, prepared })
      if (prepared !== (vm.entry.prepared ?? false)) {
        return yield* new BenchError({ message: `it began ${prepared ? "with a kernel" : "as a template"}` })
      }
      const ready = yield* elapsed
      // the boot's last phase, the wait for the guest, began when shim and VMM had been started
      yield* mark("vmm-spawned", ready - (phases.get("guest-ready") ?? Number.NaN))
      yield* mark("doorbell", ready)
      const { exitCode } = yield* vm.execRaw({ argv: ["true"] })
      yield* mark("first-exec")
      if (exitCode !== 0) return yield* new BenchError({ message: `true ended with code ${exitCode}` })
      yield* Effect.forEach(phases, ([phase, ms]) => record(`phase ${phase}`, ms, "ms"))
    })
})

export const coldBoot: Scenario = {
  name: "cold-boot",
  description:
    "a boot to the first command's answer and back to nothing, with a kernel and as a prepared machine, beside QEMU alone",
  setup: Effect.fn("coldBoot.setup")(function* ({ images, runs = 10 }) {
    const assets = yield* Assets
    const probe = yield* HostProbe
    const raw = yield* rawQemu.make(machine)
    const built = yield* Effect.filter(images, (image) => Effect.map(assets.find(`base-${image}`), Option.isSome))
    const machinen = yield* Machinen
    yield* Effect.forEach(built, (image) => machinen.prepare({ image, ...machine }))
    return {
      warmup: 2,
      runs,
      variants: [raw.variant, ...built.flatMap((image) => [boot(image, false), boot(image, true)])],
      settings: { ...machine, accelerator: yield* probe.accelerator, kernel: yield* assets.kernel, raw: raw.argv },
      skipped: images.filter((image) => !built.includes(image)).map((image) => `${image}: its base image is not built`),
      verdicts: (results) =>
        built.flatMap((image) =>
          [image, `${image} prepared`].map((name) =>
            atMost(
              `${name}: first-exec <= ${factors[image]} x raw marker + ${slackMs} ms (medians)`,
              "ms",
              p50(results, name, "first-exec"),
              factors[image] * p50(results, "raw", "marker") + slackMs
            )
          )
        )
    }
  })
}
