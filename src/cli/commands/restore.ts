import { Args, Command, Options } from "@effect/cli"
import { Console, Effect, Option } from "effect"
import { Machinen } from "../../Machinen.ts"
import { printable } from "../../platform/printable.ts"
import type { Restored } from "../../snapshot/revive.ts"
import {
  environment,
  json,
  liveMounts,
  memory,
  mountLive,
  network,
  portForward,
  publish,
  whenGiven
} from "../options.ts"
import * as render from "../render.ts"
import { readSecrets, secretOption } from "../secrets.ts"
import { attached, vmArg } from "../vmArgument.ts"
import { detachAll } from "./boot.ts"
import { engineOption, lazyUmount } from "./snapshot.ts"

const name = Options.text("name").pipe(
  Options.withAlias("n"),
  Options.optional,
  Options.withDescription("the VM's name (default: <source>/<pid>)")
)
const env = Options.text("env").pipe(
  Options.withAlias("e"),
  Options.repeated,
  Options.withDescription("KEY=VALUE for commands run from now on; may be repeated")
)
const detach = Options.boolean("detach").pipe(
  Options.withAlias("d"),
  Options.withDescription("return when it is ready; it lives until it is stopped")
)

const restoredJson = ({ lost, phases, rejuvenation, vm }: Restored, detached: boolean) => ({
  ...render.vmJson(vm.entry),
  detached,
  forkedFrom: vm.entry.forkedFrom ?? null,
  rejuvenation,
  lost,
  phasesMs: Object.fromEntries(phases)
})

/** Detaches the VMs, with --detach, or keeps them in the foreground until the last one has ended or ctrl-c. */
const detachOrWait = Effect.fnUntraced(function* (
  restored: ReadonlyArray<Restored>,
  detached: boolean,
  shown: Option.Option<unknown>
) {
  const vms = restored.map(({ vm }) => vm)
  for (const { lost, vm } of restored) {
    for (const { path, why } of lost) {
      const file = path === "" ? "a file" : path
      yield* Console.error(printable(`${vm.name ?? vm.id}: ${file} that was open gives errors in this VM: ${why}`))
    }
  }
  if (detached) {
    const names = Effect.forEach(vms, (vm) => Console.log(vm.name ?? vm.id), { discard: true })
    return yield* detachAll(vms, Option.match(shown, { onNone: () => names, onSome: render.json }))
  }
  if (Option.isSome(shown)) yield* render.json(shown.value)
  for (const vm of vms) yield* Console.error(`${vm.name ?? vm.id} is up (pid ${vm.pid}); ctrl-c stops it`)
  yield* Effect.forEach(vms, ({ wait }) => wait, { concurrency: "unbounded" })
})

const whenJson = <A>(json: boolean, value: A) => (json ? Option.some(value) : Option.none())

/** `machinen restore DIR`: starts a VM that continues where the bundle's source was saved. */
export const restore = Command.make(
  "restore",
  {
    name,
    image: Options.text("image").pipe(
      Options.optional,
      Options.withDescription("where the source's image lies now, if it was moved")
    ),
    memory: Options.text("memory").pipe(
      Options.withAlias("m"),
      Options.optional,
      Options.withDescription("criu: MiB of memory, or auto (default: what the source had)")
    ),
    network: Options.text("network").pipe(
      Options.optional,
      Options.withDescription(
        "nat: connect the guest of a bundle that is not your own; criu: none leaves the network out"
      )
    ),
    publish,
    env,
    mountLive,
    secret: secretOption,
    lazy: Options.boolean("lazy").pipe(
      Options.withDescription("criu: memory is read when it is touched, and in the background")
    ),
    detach,
    json,
    dir: Args.text({ name: "dir" }).pipe(Args.withDescription("the bundle's directory"))
  },
  (input) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const restored = yield* machinen.restore({
        snapDir: input.dir,
        ...whenGiven({
          name: input.name,
          image: input.image,
          memoryMib: yield* Effect.transposeMapOption(input.memory, memory),
          network: yield* Effect.transposeMapOption(input.network, network)
        }),
        portForward: yield* portForward(input.publish),
        env: yield* environment(input.env),
        liveMounts: yield* liveMounts(input.mountLive),
        secrets: yield* readSecrets(input.secret),
        lazy: input.lazy
      })
      yield* detachOrWait([restored], input.detach, whenJson(input.json, restoredJson(restored, input.detach)))
    }).pipe(Effect.scoped)
).pipe(Command.withDescription("start a VM from a bundle"))

/** `machinen fork VM`: starts siblings of a running VM, which keeps running. */
export const fork = Command.make(
  "fork",
  {
    newName: Options.text("new-name").pipe(
      Options.optional,
      Options.withDescription("the sibling's name (default: <source>/<pid>)")
    ),
    outDir: Options.text("out-dir").pipe(
      Options.optional,
      Options.withDescription("keep the bundle there (default: nothing of it stays)")
    ),
    count: Options.integer("count").pipe(
      Options.withDefault(1),
      Options.withDescription("how many siblings, all of one moment (default 1)")
    ),
    engine: engineOption,
    tcpKeep: Options.boolean("tcp-keep").pipe(
      Options.withDescription("criu: established TCP connections survive in the siblings too")
    ),
    publish,
    lazyUmount,
    env,
    mountLive,
    secret: secretOption,
    detach,
    json,
    vm: vmArg
  },
  (input) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const vm = yield* attached(input.vm)
      const { pausedMs, siblings } = yield* machinen.fork(vm, {
        ...whenGiven({ name: input.newName, outDir: input.outDir, engine: input.engine }),
        count: input.count,
        tcpKeep: input.tcpKeep,
        portForward: yield* portForward(input.publish),
        lazyUmount: input.lazyUmount,
        env: yield* environment(input.env),
        liveMounts: yield* liveMounts(input.mountLive),
        secrets: yield* readSecrets(input.secret)
      })
      const shown = { pausedMs, siblings: siblings.map((sibling) => restoredJson(sibling, input.detach)) }
      yield* detachOrWait(siblings, input.detach, whenJson(input.json, shown))
    }).pipe(Effect.scoped)
).pipe(Command.withDescription("fork a running VM into siblings"))
