import { Args, Command } from "@effect/cli"
import { Console, Effect } from "effect"
import { parseMapping, showAddress, showTarget } from "../../machine/TunnelAddress.ts"
import { json } from "../options.ts"
import * as render from "../render.ts"
import { attached, vmArg } from "../vmArgument.ts"

const mappings = Args.text({ name: "mapping" }).pipe(
  Args.atLeast(1),
  Args.withDescription("[[ADDRESS:]PORT:]GUEST: the guest's port or unix:/path; without PORT, any that is free")
)

/** `machinen forward VM 8080:80`: forwards ports of this host into the guest, over the private channel. */
export const forward = Command.make("forward", { json, vm: vmArg, mappings }, (input) =>
  Effect.gen(function* () {
    const wanted = yield* Effect.forEach(input.mappings, parseMapping)
    const vm = yield* attached(input.vm)
    const listeners = yield* Effect.forEach(wanted, vm.tunnel)
    if (input.json) yield* render.json(listeners)
    else {
      for (const { guest, hostAddress, hostPort } of listeners) {
        yield* Console.error(`${showAddress(hostAddress, hostPort)} leads to ${showTarget(guest)} in ${input.vm}`)
      }
      yield* Console.error("ctrl-c ends it")
    }
    yield* vm.wait
    yield* Console.error(`${input.vm} has ended`)
  }).pipe(Effect.scoped)
).pipe(Command.withDescription("lead ports of this host into a VM"))
