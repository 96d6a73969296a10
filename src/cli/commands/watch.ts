import { Args, Command, Options } from "@effect/cli"
import { Console, Effect, Stream } from "effect"
import type { FileChange } from "../../guest/AgentProtocol.ts"
import { printable } from "../../platform/printable.ts"
import { json } from "../options.ts"
import * as render from "../render.ts"
import * as stdio from "../stdio.ts"
import { attached, vmArg } from "../vmArgument.ts"

const line = (change: FileChange): string =>
  change.kind === "lost"
    ? "lost"
    : `${change.kind} ${change.kind === "moved" ? `${printable(change.from)} -> ` : ""}${printable(change.path)}`

/** `machinen watch VM /path`: prints a line for each change below a directory of the guest. */
export const watch = Command.make(
  "watch",
  {
    recursive: Options.boolean("recursive").pipe(
      Options.withAlias("r"),
      Options.withDescription("the directories below it, too")
    ),
    json,
    vm: vmArg,
    path: Args.text({ name: "path" }).pipe(Args.withDescription("a directory in the guest"))
  },
  (input) =>
    Effect.gen(function* () {
      const vm = yield* attached(input.vm)
      const changes = yield* vm.watch(input.path, { recursive: input.recursive })
      yield* Console.error(`watching ${input.path} in ${input.vm}; ctrl-c ends it`)
      yield* Stream.runForEach(changes, (change) =>
        stdio.write("stdout")(`${input.json ? render.jsonText(change) : line(change)}\n`)
      )
      yield* Console.error(`${input.path} is gone`)
    }).pipe(Effect.scoped)
).pipe(Command.withDescription("show what changes below a directory of a VM"))
