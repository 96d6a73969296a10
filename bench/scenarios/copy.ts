import { randomBytes } from "node:crypto"
import { mkdirSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { Effect, Stream } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import { newDirectory } from "../files.ts"
import { atLeast, BenchError, type Probe, p50, type Scenario, type Variant } from "../harness.ts"

const files = 1000
const fileBytes = 500_000
const totalBytes = files * fileBytes

/** A directory in the guest's memory, so that the guest's disk is not measured. */
const guestDir = "/dev/shm/bench"

const makeTree = (dir: string) =>
  Effect.sync(() => {
    // slices of one random buffer: no two files are equal, and little time is spent on randomness
    const noise = randomBytes(fileBytes + files)
    for (let n = 0; n < files; n++) {
      const sub = path.join(dir, String(n % 20))
      mkdirSync(sub, { recursive: true })
      writeFileSync(path.join(sub, String(n)), noise.subarray(n, n + fileBytes))
    }
  })

const variant = (name: string, work: (probe: Probe) => ReturnType<Variant["run"]>): Variant => ({
  name,
  released: false,
  run: work
})

/** One stream of bytes each way, and a tree of the same size over the same channel. */
const variants = (vm: Vm, tree: string): ReadonlyArray<Variant> => {
  const during = (probe: Probe, work: Effect.Effect<unknown, Effect.Effect.Error<ReturnType<Variant["run"]>>>) =>
    Effect.gen(function* () {
      const began = yield* probe.elapsed
      yield* work
      yield* probe.record("throughput", totalBytes / 1000 / ((yield* probe.elapsed) - began), "MB/s")
    })
  const block = randomBytes(1_000_000)
  const clear = Effect.ignore(vm.remove(guestDir, { recursive: true }))
  return [
    variant("raw in", (probe) =>
      Effect.zipRight(
        clear,
        during(
          probe,
          vm.writeFile(
            `${guestDir}/file`,
            Stream.rechunk(Stream.fromIterable(Array.from({ length: totalBytes / block.length }, () => block)), 1)
          )
        )
      )
    ),
    variant("push", (probe) => Effect.zipRight(clear, during(probe, vm.push(tree, guestDir)))),
    variant("raw out", (probe) =>
      Effect.gen(function* () {
        yield* clear
        yield* vm.exec(
          `mkdir ${guestDir}; dd if=/dev/zero of=${guestDir}/file bs=1000000 count=${totalBytes / 1_000_000}`
        )
        yield* during(probe, Stream.runDrain(vm.readFile(`${guestDir}/file`)))
      })
    ),
    variant("pull", (probe) =>
      Effect.gen(function* () {
        yield* clear
        yield* vm.push(tree, guestDir)
        const target = yield* newDirectory("pulled")
        yield* during(probe, vm.pull(guestDir, target))
      })
    )
  ]
}

export const copy: Scenario = {
  name: "copy",
  description: "500 MB in 1000 files into a guest and out of it, beside one file of that size through the same channel",
  setup: Effect.fn("copy.setup")(function* ({ images, runs = 5 }) {
    const machinen = yield* Machinen
    const probe = yield* HostProbe
    const image = images[0] ?? "micro"
    const { vm } = yield* machinen.boot({ image, memoryMib: 2048 })
    const tree = yield* newDirectory("tree")
    yield* makeTree(tree)
    if (totalBytes % 1_000_000 !== 0) return yield* new BenchError({ message: "the raw variants count in megabytes" })
    return {
      warmup: 1,
      runs,
      variants: variants(vm, tree),
      settings: { image, files, fileBytes, guest: "tmpfs", accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: (results) => [
        atLeast(
          "push beside raw in (median)",
          "MB/s",
          p50(results, "push", "throughput"),
          0.7 * p50(results, "raw in", "throughput")
        ),
        atLeast(
          "pull beside raw out (median)",
          "MB/s",
          p50(results, "pull", "throughput"),
          0.7 * p50(results, "raw out", "throughput")
        )
      ]
    }
  })
}
