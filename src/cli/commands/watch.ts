import { Args, Command, Options } from "@effect/cli"
import { Console, Effect, Stream } from "effect"
import type { FileChange } from "../../AgentProtocol.ts"
import { Machinen } from "../../Machinen.ts"
import { json } from "../options.ts"
import * as stdio from "../stdio.ts"
import { vmArg } from "./exec.ts"

/** The guest chose the name: what a terminal might obey is shown as JSON has it. */
const shown = (name: string): string => (/\p{C}/u.test(name) ? JSON.stringify(name) : name)

const line = (change: FileChange): string =>
  change.kind === "lost"
    ? "lost"
    : `${change.kind} ${change.kind === "moved" ? `${shown(change.from)} -> ` : ""}${shown(change.path)}`

/** `machinen watch VM /path`: a line for each change below a guest's directory. */
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
      const machinen = yield* Machinen
      const vm = yield* machinen.attach(input.vm)
      const changes = yield* vm.watch(input.path, { recursive: input.recursive })
      yield* Console.error(`watching ${input.path} in ${input.vm}; ctrl-c ends it`)
      yield* Stream.runForEach(changes, (change) =>
        stdio.write("stdout")(`${input.json ? JSON.stringify(change) : line(change)}\n`)
      )
      yield* Console.error(`${input.path} is gone`)
    }).pipe(Effect.scoped)
).pipe(Command.withDescription("show what changes below a directory of a VM"))
