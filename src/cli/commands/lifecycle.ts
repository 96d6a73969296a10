import { Command, Options } from "@effect/cli"
import { Console, Effect } from "effect"
import { Machinen } from "../../Machinen.ts"
import { json } from "../options.ts"
import * as render from "../render.ts"
import { attached, vmArg } from "../vmArgument.ts"

/** `machinen stop VM`: powers a VM off. Nothing of the VM is left when the command returns. */
export const stop = Command.make(
  "stop",
  {
    force: Options.boolean("force").pipe(Options.withAlias("f"), Options.withDescription("kill it at once")),
    json,
    vm: vmArg
  },
  (input) =>
    Effect.gen(function* () {
      const vm = yield* attached(input.vm)
      const exit = yield* input.force ? vm.kill : vm.stop()
      yield* input.json
        ? render.json({ id: vm.id, name: vm.name ?? null, exit: { ...exit } })
        : Console.log(vm.name ?? vm.id)
    })
).pipe(Command.withDescription("stop a VM"))

/** `machinen pause VM`, `machinen resume VM`: stop a VM's vCPUs and let them go on. */
export const pause = Command.make("pause", { vm: vmArg }, (input) =>
  Effect.flatMap(attached(input.vm), (vm) => vm.pause)
).pipe(Command.withDescription("hold a VM's vCPUs"))

export const resume = Command.make("resume", { vm: vmArg }, (input) =>
  Effect.flatMap(attached(input.vm), (vm) => vm.resume)
).pipe(Command.withDescription("let a paused VM go on"))

/** `machinen gc`: removes what dead VMs left behind, and templates that can no longer be used. */
export const gc = Command.make(
  "gc",
  { dryRun: Options.boolean("dry-run").pipe(Options.withDescription("only say what would be removed")), json },
  (input) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const leftovers = yield* machinen.gc({ dryRun: input.dryRun })
      if (input.json) return yield* render.json(leftovers)
      const verb = input.dryRun ? "would remove" : "removed"
      for (const { failedPaths, id, name, removedPaths } of leftovers) {
        for (const path of removedPaths) yield* Console.log(`${verb} ${path} (${name ?? id})`)
        for (const path of failedPaths) yield* Console.error(`could not remove ${path} (${name ?? id})`)
      }
      if (leftovers.length === 0) yield* Console.log("nothing is left behind")
    })
).pipe(Command.withDescription("remove what dead VMs left behind"))
