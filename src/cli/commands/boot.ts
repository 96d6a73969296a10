import { Command, Options } from "@effect/cli"
import { Console, Effect } from "effect"
import { Machinen } from "../../Machinen.ts"
import type { Vm } from "../../vm/Vm.ts"
import { ExitWith } from "../exit.ts"
import { bootOptions, json, toBootOptions } from "../options.ts"
import * as render from "../render.ts"
import * as stdio from "../stdio.ts"
import { commandArgs, relay } from "./run.ts"

/** Detaches VMs and prints their names. Uninterruptible: an interruption either ends the VMs, or comes after their names are printed. */
export const detachAll = (vms: ReadonlyArray<Vm>, announce: Effect.Effect<void>) =>
  Effect.uninterruptible(
    Effect.zipRight(
      Effect.forEach(vms, ({ detach }) => detach),
      announce
    )
  )

/** `machinen boot`: starts a VM that stays: in the foreground until it ends or ctrl-c, or with --detach in the background. */
export const boot = (tail: ReadonlyArray<string>) =>
  Command.make(
    "boot",
    {
      ...bootOptions,
      detach: Options.boolean("detach").pipe(
        Options.withAlias("d"),
        Options.withDescription("return when it is ready; it lives until it is stopped")
      ),
      detached: Options.boolean("detached").pipe(Options.withDescription("the same as --detach")),
      json,
      command: commandArgs
    },
    (input) =>
      Effect.gen(function* () {
        const detached = input.detach || input.detached
        const options = yield* toBootOptions(input, [...input.command, ...tail])
        const machinen = yield* Machinen
        const { command, phases, vm } = yield* machinen.boot(options)
        const shown = { ...render.vmJson(vm.entry), detached, phasesMs: Object.fromEntries(phases) }
        if (detached) {
          // attached until the command runs, so that a command that cannot be started ends the VM
          if (command !== undefined) yield* vm.startMainDetached
          return yield* detachAll([vm], input.json ? render.json(shown) : Console.log(vm.name ?? vm.id))
        }
        yield* input.json
          ? render.json(shown)
          : Console.error(`${vm.name ?? vm.id} is up (pid ${vm.pid}); ctrl-c stops it`)
        if (command === undefined) {
          yield* vm.wait
          return
        }
        const code = yield* Effect.flatMap(vm.startMain(yield* stdio.stdin), relay)
        yield* vm.wait
        return yield* new ExitWith({ code })
      }).pipe(Effect.scoped)
  ).pipe(Command.withDescription("boot a VM and keep it"))
