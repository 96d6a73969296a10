import { Command } from "@effect/cli"
import { Effect, Option } from "effect"
import * as vmMemory from "../../platform/vmMemory.ts"
import { json } from "../options.ts"
import * as render from "../render.ts"
import { attached, vmArg } from "../vmArgument.ts"

/** `machinen inspect VM`: prints everything known about a VM, as JSON. */
export const inspect = Command.make("inspect", { json, vm: vmArg }, (input) =>
  Effect.gen(function* () {
    const vm = yield* attached(input.vm)
    const memory = yield* vm.memoryStats
    const { shim, vmm } = vm.entry
    const resident =
      shim === undefined || vmm === undefined ? Option.none() : yield* vmMemory.residentOf(vmm.pid, shim.pid)
    // a time limit, so that the rest is shown even when the guest is paused or hangs
    const guest = yield* vm.stats.pipe(
      Effect.timeout("2 seconds"),
      Effect.orElseSucceed(() => null)
    )
    yield* render.json({
      ...render.vmJson(vm.entry),
      memory: { ...memory, ...render.memoryJson(resident) },
      guest,
      paths: { vsock: vm.entry.vsockPath, control: vm.entry.controlPath, vmmControl: vm.entry.vmmControlPath ?? null }
    })
  })
).pipe(Command.withDescription("show everything known of a VM"))
