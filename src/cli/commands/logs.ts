import { Command, Options } from "@effect/cli"
import { Effect, Option, Stream } from "effect"
import * as stdio from "../stdio.ts"
import { attached, vmArg } from "../vmArgument.ts"

/** `machinen logs VM`: shows the output of a detached main command, or the console. */
export const logs = Command.make(
  "logs",
  {
    follow: Options.boolean("follow").pipe(Options.withAlias("f"), Options.withDescription("go on until the VM ends")),
    console: Options.boolean("console").pipe(
      Options.withDescription("the kernel's and init's console instead of the command's output")
    ),
    tail: Options.integer("tail-bytes").pipe(
      Options.optional,
      Options.withDescription("begin this far before the end")
    ),
    vm: vmArg
  },
  (input) =>
    Effect.gen(function* () {
      const vm = yield* attached(input.vm)
      // Without a main command the console is the only output.
      const source = input.console || vm.entry.command === undefined ? "console" : "output"
      const tail = Option.isSome(input.tail) ? { tailBytes: input.tail.value } : {}
      yield* Stream.runForEach(vm.logs(source, { follow: input.follow, ...tail }), stdio.write("stdout"))
    })
).pipe(Command.withDescription("show what a VM printed"))
