import { Args, Command, Options } from "@effect/cli"
import { Console, Effect } from "effect"
import { Machinen } from "../../Machinen.ts"
import { printable } from "../../platform/printable.ts"
import type { EngineName } from "../../snapshot/BundleManifest.ts"
import { ExitWith } from "../exit.ts"
import { json, whenGiven } from "../options.ts"
import * as render from "../render.ts"
import { attached, vmArg } from "../vmArgument.ts"

const engineNames: ReadonlyArray<EngineName> = ["vmstate", "criu"]
export const engineOption = Options.choice("engine", engineNames).pipe(
  Options.optional,
  Options.withDescription("vmstate: the whole machine (default); criu: the process tree")
)

export const lazyUmount = Options.boolean("lazy-umount").pipe(
  Options.withDescription("processes may hold locks on files of live mounts; a copy has none")
)

const dirArg = Args.text({ name: "dir" }).pipe(Args.withDescription("the bundle's directory"))

/** `machinen snapshot inspect DIR`: shows a bundle's manifest, and whether this host can restore the bundle. */
const inspect = Command.make("inspect", { json, dir: dirArg }, (input) =>
  Effect.gen(function* () {
    const { bundle, misfits, unasked } = yield* Effect.flatMap(Machinen, (m) => m.inspect(input.dir))
    const { manifest } = bundle
    if (input.json)
      return yield* render.json({
        dir: bundle.dir,
        isOwn: bundle.isOwn,
        unasked,
        restorable: misfits.length === 0,
        misfits,
        ...manifest
      })
    const size = manifest.blobs.reduce((sum, { dataBytes }) => sum + dataBytes, 0)
    yield* Console.log(
      [
        `snapshot of ${manifest.sourceName ?? manifest.sourceId} (${manifest.sourceImage}), ${render.age(manifest.snappedAt, Date.now())} old`,
        `${manifest.engine}, ${manifest.machine.backend} ${manifest.machine.vmmVersion} on ${manifest.machine.accel}, ${manifest.memoryMib} MiB, ${manifest.vcpus} vCPU`,
        `${render.bytes(size)} of data:`,
        ...manifest.blobs.map(({ dataBytes, name }) => `  ${name.padEnd(12)} ${render.bytes(dataBytes)}`),
        bundle.isOwn
          ? "your own: it is restored as recorded"
          : "not made by your machinen (the key in MACHINEN_HOME): nothing it records of this host is done unasked",
        ...unasked.map(({ effect, option }) => `  it would ${effect}; to ask for that: ${option}`),
        misfits.length === 0 ? "it can be restored here" : "it cannot be restored here:",
        ...misfits.map((reason) => `  ${reason}`)
      ]
        .map((line) => printable(line))
        .join("\n")
    )
  })
).pipe(Command.withDescription("show what a bundle holds, and whether it can be restored here"))

/** `machinen snapshot verify DIR`: reads all of a bundle. Exits with 1 when a file is damaged. */
const verify = Command.make("verify", { json, dir: dirArg }, (input) =>
  Effect.gen(function* () {
    const damaged = yield* Effect.flatMap(Machinen, (m) => m.verify(input.dir))
    if (input.json) yield* render.json({ sound: damaged.length === 0, damaged })
    else if (damaged.length === 0) yield* Console.log("every byte is as it was")
    else for (const name of damaged) yield* Console.error(`damaged: ${printable(name)}`)
    if (damaged.length > 0) return yield* new ExitWith({ code: 1 })
  })
).pipe(Command.withDescription("read all of a bundle and compare it with its hashes"))

/** `machinen snapshot VM DIR`: saves a running VM as a bundle. */
export const snapshot = Command.make(
  "snapshot",
  {
    engine: engineOption,
    keepAlive: Options.boolean("keep-alive").pipe(
      Options.withDescription("the VM goes on; without it, it ends with the snapshot")
    ),
    tcpClose: Options.boolean("tcp-close").pipe(
      Options.withDescription("criu: what is restored finds its established TCP connections closed")
    ),
    lazyUmount,
    dryRun: Options.boolean("dry-run").pipe(Options.withDescription("only check that it could be taken")),
    json,
    vm: vmArg,
    dir: dirArg
  },
  (input) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const vm = yield* attached(input.vm)
      const options = {
        outDir: input.dir,
        leaveRunning: input.keepAlive,
        tcpClose: input.tcpClose,
        lazyUmount: input.lazyUmount,
        ...whenGiven({ engine: input.engine })
      }
      if (input.dryRun) {
        yield* machinen.checkSnapshot(vm, options)
        return yield* input.json ? render.json({ possible: true }) : Console.log("it can be taken")
      }
      const { bundle, elapsedMs, pausedMs, phases } = yield* machinen.snapshot(vm, options)
      if (input.json) {
        return yield* render.json({
          dir: bundle.dir,
          engine: bundle.manifest.engine,
          pausedMs,
          elapsedMs,
          phasesMs: Object.fromEntries(phases),
          blobs: bundle.manifest.blobs
        })
      }
      const paused = pausedMs === null ? "the VM has ended" : `the VM stood still for ${Math.round(pausedMs)} ms`
      yield* Console.log(bundle.dir)
      yield* Console.error(`taken in ${Math.round(elapsedMs)} ms; ${paused}`)
    })
).pipe(Command.withDescription("turn a running VM into a bundle (snapshot inspect|verify DIR: look at one)"))

/** `machinen snapshot inspect|verify DIR`. A separate command, because the option parser cannot have subcommands beside arguments. */
export const bundle = Command.make("snapshot").pipe(
  Command.withDescription("look at a bundle"),
  Command.withSubcommands([inspect, verify])
)
