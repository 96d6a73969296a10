import { randomBytes } from "node:crypto"
import * as readline from "node:readline"
import { Command, Options } from "@effect/cli"
import { Console, Effect, Option, Queue, type Scope, Stream } from "effect"
import { isMachinenError, render } from "../../domain/errors.ts"
import { Marked } from "../../domain/Marked.ts"
import { Machinen } from "../../Machinen.ts"
import type { Terminal } from "../../Terminal.ts"
import type { Vm } from "../../Vm.ts"
import { ExitWith } from "../exit.ts"
import * as stdio from "../stdio.ts"
import * as terminal from "../terminal.ts"
import { letGo } from "./boot.ts"
import { vmArg } from "./exec.ts"

/** Runs a line at a time; `command` keeps the shell from ending with a mistake in one. Ctrl-c is for what it runs. */
const shell = `stty -echo -onlcr -icanon; trap : INT
while IFS= read -r __line; do command eval "$__line" </dev/null; printf '\\036%s:%d\\036' "$__mark" $?; done`

const help = `a line runs in the guest's shell, which keeps its variables and directory, for the next repl and in every fork too
:fork NAME      a sibling of this VM, with this shell in it: machinen repl NAME
:snapshot DIR   a bundle of this VM, which goes on
:help           this
:quit           leave; the shell stays (exit ends it)`

interface Typing {
  /** The next line; none at the end. */
  readonly next: Effect.Effect<Option.Option<string>>
  /** The next ctrl-c. */
  readonly interrupted: Effect.Effect<void>
}

/** What is typed, with editing and history in a terminal. */
const typing: Effect.Effect<Typing, never, Scope.Scope> = Effect.gen(function* () {
  const lines = yield* Queue.unbounded<Option.Option<string>>()
  const interrupts = yield* Queue.sliding<void>(1)
  const isTty = process.stdin.isTTY === true
  const editor = yield* Effect.acquireRelease(
    Effect.sync(() =>
      readline.createInterface({ input: process.stdin, ...(isTty ? { output: process.stdout, prompt: "> " } : {}) })
    ),
    (editor) => Effect.sync(() => editor.close())
  )
  editor.on("line", (line) => lines.unsafeOffer(Option.some(line)))
  editor.on("close", () => lines.unsafeOffer(Option.none()))
  editor.on("SIGINT", () => {
    editor.write(null, { ctrl: true, name: "u" })
    interrupts.unsafeOffer(undefined)
  })
  return {
    next: Effect.zipRight(
      Effect.sync(() => (isTty ? editor.prompt() : undefined)),
      Queue.take(lines)
    ),
    // not one of before
    interrupted: Effect.zipRight(Queue.takeAll(interrupts), Queue.take(interrupts))
  }
})

/** The shell behind a terminal: lines in, output and exit codes out. */
const drive = Effect.fnUntraced(function* (shellOf: Terminal) {
  const token = randomBytes(8).toString("hex")
  const marked = new Marked(token)
  const statuses = yield* Queue.unbounded<number>()
  const send = (text: string) => shellOf.write(Buffer.from(text))
  let begun = false
  const shown = Stream.runForEach(shellOf.output, (bytes) =>
    Effect.forEach(
      marked.push(bytes),
      (piece) => {
        if ("status" in piece) return Queue.offer(statuses, piece.status)
        // what was there before we came
        return begun ? stdio.write("stdout")(piece.text) : Effect.void
      },
      { discard: true }
    )
  )
  const run = (line: string) => Effect.zipRight(send(`${line}\n`), Queue.take(statuses))
  const begin = Effect.zipRight(
    run(`__mark=${token}`),
    Effect.sync(() => {
      begun = true
    })
  )
  const ended = Effect.flatMap(shown, () => Effect.map(shellOf.exit, ({ code }) => code))
  return { run, begin, ended, interrupt: send("\x03") }
})

/** A line for the repl itself. False: leave. */
const obey = Effect.fnUntraced(
  function* (vm: Vm, line: string) {
    const machinen = yield* Machinen
    const [name = "", argument = ""] = line.slice(1).trim().split(/\s+/, 2)
    if (name === "quit") return false
    if (name === "fork" && argument !== "") {
      yield* Effect.scoped(
        Effect.flatMap(machinen.fork(vm, { name: argument }), ({ siblings }) =>
          letGo(
            siblings.map((sibling) => sibling.vm),
            Console.log(`${argument} goes on from here`)
          )
        )
      )
    } else if (name === "snapshot" && argument !== "") {
      const { bundle } = yield* machinen.snapshot(vm, { outDir: argument, leaveRunning: true })
      yield* Console.log(bundle.dir)
    } else yield* Console.log(help)
    return true
  },
  Effect.catchIf(isMachinenError, (error) => Effect.as(Console.error(render(error)), true))
)

/** `machinen repl VM`: line after line in one shell of a running VM. */
export const repl = Command.make(
  "repl",
  {
    session: Options.text("session").pipe(
      Options.withAlias("s"),
      Options.withDefault("repl"),
      Options.withDescription("the shell's session (default repl)")
    ),
    vm: vmArg
  },
  (input) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const vm = yield* machinen.attach(input.vm)
      const { begin, ended, interrupt, run } = yield* drive(
        yield* vm.terminal(
          { argv: ["sh", "-c", shell], env: terminal.environment() },
          { ...terminal.size(), session: input.session }
        )
      )
      const { interrupted, next } = yield* typing
      const serve = Effect.gen(function* () {
        yield* begin
        let status = 0
        for (;;) {
          const line = Option.getOrElse(yield* next, () => ":quit")
          if (line.startsWith(":")) {
            if (!(yield* obey(vm, line))) return status
          } else if (line.trim() !== "") {
            status = yield* Effect.raceFirst(run(line), Effect.forever(Effect.zipRight(interrupted, interrupt)))
          }
        }
      })
      return yield* new ExitWith({ code: yield* Effect.raceFirst(serve, ended) })
    }).pipe(Effect.scoped)
).pipe(Command.withDescription("run line after line in one shell of a running VM"))
