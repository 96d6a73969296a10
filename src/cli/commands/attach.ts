import { Args, Command, Options } from "@effect/cli"
import { Console, Effect, Option } from "effect"
import { given } from "../../platform/given.ts"
import { ExitWith } from "../exit.ts"
import { json } from "../options.ts"
import * as render from "../render.ts"
import * as stdio from "../stdio.ts"
import * as terminal from "../terminal.ts"
import { attached, vmArg } from "../vmArgument.ts"
import { commandArgs } from "./run.ts"

/** `machinen attach VM`: connects this terminal to one in a running VM, with a shell or a command. */
export const attach = (tail: ReadonlyArray<string>) =>
  Command.make(
    "attach",
    {
      session: Options.text("session").pipe(
        Options.withAlias("s"),
        Options.optional,
        Options.withDescription("a session of that name, which outlives us; made if it is not there")
      ),
      steal: Options.boolean("steal").pipe(Options.withDescription("take the session from whoever is attached to it")),
      vm: vmArg,
      command: commandArgs
    },
    (input) =>
      Effect.gen(function* () {
        const argv = [...input.command, ...tail]
        yield* terminal.required
        const vm = yield* attached(input.vm)
        const name = Option.getOrUndefined(input.session)
        const opened = vm.terminal(
          { argv, env: terminal.environment() },
          { ...terminal.size(), steal: input.steal, ...given({ session: name }) }
        )
        const end = yield* terminal.relay(opened, { detachKeys: true })
        if (end !== "detached") return yield* new ExitWith({ code: end })
        const of = `VM ${vm.name ?? vm.id}`
        const what = name === undefined ? `detached from ${of}` : `detached from session ${name} of ${of}`
        yield* Effect.ignore(stdio.tryWrite("stderr")(`[${what}]\n`))
      })
  ).pipe(Command.withDescription("a shell in a running VM, or a session that stays (ctrl-] twice leaves it)"))

/** `machinen sessions VM`: lists the terminal sessions of a VM. */
export const sessions = Command.make("sessions", { json, vm: vmArg }, (input) =>
  Effect.gen(function* () {
    const vm = yield* attached(input.vm)
    const list = yield* vm.sessions
    if (input.json) {
      return yield* render.json(
        list.map(({ createdMs, ended, ...session }) => ({
          ...session,
          createdAt: new Date(createdMs).toISOString(),
          ended: ended === null ? null : { code: ended.code, signal: ended.signal }
        }))
      )
    }
    const now = Date.now()
    yield* Console.log(
      render.table(
        ["NAME", "PID", "STATE", "SIZE", "AGE", "COMMAND"],
        list.map(({ argv, attached, columns, createdMs, ended, name, pid, rows }) => [
          name,
          String(pid),
          ended === null ? (attached ? "attached" : "detached") : `ended (${ended.code})`,
          `${columns}x${rows}`,
          render.age(createdMs, now),
          argv.join(" ")
        ])
      )
    )
  })
).pipe(Command.withDescription("list a VM's terminal sessions"))

/** `machinen session-kill VM SESSION`: ends a session and the processes in it. */
export const sessionKill = Command.make(
  "session-kill",
  { vm: vmArg, session: Args.text({ name: "session" }).pipe(Args.withDescription("the session's name")) },
  (input) =>
    Effect.gen(function* () {
      const vm = yield* attached(input.vm)
      yield* vm.killSession(input.session)
      yield* Console.log(input.session)
    })
).pipe(Command.withDescription("end a terminal session"))
