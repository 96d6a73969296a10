import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import type { Bundle } from "../../src/index.ts"
import { Machinen } from "../../src/Machinen.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import * as cpu from "../cpu.ts"
import { copy, evict, newDirectory, newPath } from "../files.ts"
import { atMost, BenchError, p50, type Scenario, type Variant } from "../harness.ts"
import * as rawExec from "../rawExec.ts"
import * as rawRestore from "../rawRestore.ts"

const sizesMib = [256, 1024, 4096] as const
const caches = ["warm", "cold"] as const
type Cache = (typeof caches)[number]

const smallest = sizesMib[0]
const largest = 4096

/** Limits for medians of the first answer (`first-exec`): our guest against raw QEMU's; `growth`: the largest guest against the smallest. */
const factor = 1.4
const growth = 1.1

interface Case {
  readonly memoryMib: number
  readonly cache: Cache
  readonly bundle: Bundle
  readonly raw: rawRestore.Saved
}

const nameOf = (who: "raw" | "machinen", memoryMib: number, cache: Cache) => `${who} ${memoryMib} ${cache}`

const evictBundle = Effect.fnUntraced(function* (dir: string) {
  const fs = yield* FileSystem.FileSystem
  yield* evict((yield* fs.readDirectory(dir)).map((file) => path.join(dir, file)))
})

/** The same work with the least software: QEMU alone, and a guest that is only a shell (`rawExec.ts`). */
const raw = ({ cache, memoryMib, raw: saved }: Case): Variant => ({
  name: nameOf("raw", memoryMib, cache),
  released: false,
  run: ({ elapsed, mark, record }) =>
    Effect.gen(function* () {
      const ready = yield* rawRestore.prepare(saved)
      if (cache === "cold") yield* evict([saved.memory, saved.state])
      const began = yield* elapsed
      const { ended, pid, word } = yield* rawExec.start(ready)
      yield* word
      yield* mark("first-word", (yield* elapsed) - began)
      yield* ended
      yield* mark("first-exec", (yield* elapsed) - began)
      yield* record("CPU of QEMU", yield* cpu.usedMs(pid), "ms")
    })
})

const ours = ({ bundle, cache, memoryMib }: Case): Variant => ({
  name: nameOf("machinen", memoryMib, cache),
  released: false,
  run: ({ elapsed, mark, record }) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      if (cache === "cold") yield* evictBundle(bundle.dir)
      const began = yield* elapsed
      const { phases, vm } = yield* machinen.restore({ snapDir: bundle.dir })
      yield* mark("restored", (yield* elapsed) - began)
      const { exitCode } = yield* vm.execRaw({ argv: ["true"] })
      yield* mark("first-exec", (yield* elapsed) - began)
      yield* record("CPU of QEMU", yield* cpu.usedMs(vm.pid), "ms")
      if (exitCode !== 0) return yield* new BenchError({ message: `true ended with code ${exitCode}` })
      // a second command, because the first one pays for a cold guest: pages that are not mapped, code that is not translated
      const second = yield* elapsed
      yield* vm.execRaw({ argv: ["true"] })
      yield* record("second exec alone", (yield* elapsed) - second, "ms")
      yield* Effect.forEach(phases, ([phase, ms]) => record(`phase ${phase}`, ms, "ms"))
    })
})

/** Makes a bundle of an idle guest with `memoryMib`. */
const bundleOf = Effect.fn("bundleOf")(function* (image: string, memoryMib: number) {
  const machinen = yield* Machinen
  const outDir = yield* newPath(`bundle-${memoryMib}`)
  return yield* Effect.scoped(
    Effect.gen(function* () {
      const { vm } = yield* machinen.boot({ image, memoryMib, ...rawRestore.asRaw })
      yield* vm.execRaw({ argv: ["true"] })
      return (yield* machinen.snapshot(vm, { outDir })).bundle
    })
  )
})

export const restore: Scenario = {
  name: "restore",
  description: "a bundle to its first command's answer, by memory size, with and without page cache, beside QEMU alone",
  setup: Effect.fn("restore.setup")(function* ({ images, runs = 10 }) {
    const probe = yield* HostProbe
    const image = images[0] ?? "micro"
    const cases = yield* Effect.forEach(sizesMib, (memoryMib) =>
      Effect.gen(function* () {
        const warm = yield* bundleOf(image, memoryMib)
        const rawWarm = yield* rawExec.saved(image, memoryMib, warm.manifest.vcpus)
        // own files, so that evicting them does not evict the warm variant's
        const dir = yield* newPath(`cold-${memoryMib}`)
        yield* copy([warm.dir], dir)
        const rawDir = yield* newDirectory(`raw-cold-${memoryMib}`)
        const rawCold = { ...rawWarm, memory: path.join(rawDir, "memory"), state: path.join(rawDir, "state") }
        yield* copy([rawWarm.memory, rawWarm.state], rawDir)
        return [
          { memoryMib, cache: "warm", bundle: warm, raw: rawWarm },
          { memoryMib, cache: "cold", bundle: { ...warm, dir }, raw: rawCold }
        ] satisfies ReadonlyArray<Case>
      })
    )
    const all = cases.flat()
    return {
      warmup: 1,
      runs,
      variants: all.flatMap((one) => [raw(one), ours(one)]),
      settings: {
        image,
        accelerator: yield* probe.accelerator,
        memoryDataMib: Object.fromEntries(
          all.flatMap(({ bundle, cache, memoryMib }) =>
            cache === "cold"
              ? []
              : bundle.manifest.blobs.flatMap(({ dataBytes, name }) =>
                  name === "memory" ? [[memoryMib, Math.round(dataBytes / 2 ** 20)]] : []
                )
          )
        )
      },
      skipped: [],
      verdicts: (results) => {
        const answered = (memoryMib: number, cache: Cache, who: "raw" | "machinen" = "machinen") =>
          p50(results, nameOf(who, memoryMib, cache), "first-exec")
        return [
          ...all.map(({ cache, memoryMib }) =>
            atMost(
              `${memoryMib} MiB, ${cache}: first-exec <= ${factor} x raw first-exec (medians)`,
              "ms",
              answered(memoryMib, cache),
              factor * answered(memoryMib, cache, "raw")
            )
          ),
          ...caches.map((cache) =>
            atMost(
              `${cache}: first-exec of ${largest} MiB <= ${growth} x that of ${smallest} MiB (medians)`,
              "ms",
              answered(largest, cache),
              growth * answered(smallest, cache)
            )
          )
        ]
      }
    }
  })
}
