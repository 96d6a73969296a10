import { randomBytes } from "node:crypto"
import * as readline from "node:readline"
import { Command, Options } from "@effect/cli"
import { Console, Effect, Option, Queue, type Scope, Stream } from "effect"
import { isMachinenError, render } from "../../errors.ts"
import type { Terminal } from "../../guest/Terminal.ts"
import { Machinen } from "../../Machinen.ts"
import { CommandEndParser } from "../../terminal/CommandEndParser.ts"
import type { Vm } from "../../vm/Vm.ts"
import { ExitWith } from "../exit.ts"
import * as stdio from "../stdio.ts"
import * as terminal from "../terminal.ts"
import { attached, vmArg } from "../vmArgument.ts"
import { detachAll } from "./boot.ts"

/** A line that begins with this drops an incomplete command; the rest of the line is the token of the marks from now on. */
const resetMark = "\x18"
/** A line that runs the text so far, complete or not. */
const runMark = "\x19"

/**
 * The shell script that runs commands, each when its last line has arrived. `command` keeps a syntax error from ending the shell. Ctrl-c goes to the
 * running command.
 *
 * The shell's own parser (`sh -n`) decides whether a command is complete: it reports a missing end, or, in an open here-document, takes a line that
 * could be no command for text.
 */
const shell = String.raw`stty -echo -onlcr -icanon; trap : INT
__fresh=$(printf '\030') __finish=$(printf '\031') __status=0 __text= __nl='
'
__return() { return "$1"; }
__parses() { __said=$(printf '%s\n' "$1" | LC_ALL=C sh -n 2>&1); }
__complete() {
  case $__text in *\\\\) ;; *\\) return 1;; esac
  if __parses "$__text"; then
    case $__text in *'<<'*) ! __parses "$__text$__nl)";; esac
  else
    case $__said in *'end of file'* | *EOF* | *nterminated*) return 1;; esac
  fi
}
__mark() { printf '\036%s:%s\036' "$__token" "$1"; }
while IFS= read -r __line; do
  case $__line in
    "$__fresh"*) __text= __token=${"$"}{__line#?}; __mark $__status; continue;;
    "$__finish") ;;
    *) __text=$__text${"$"}{__text:+$__nl}$__line; __complete || { __mark more; continue; };;
  esac
  __line=$__text __text=
  __return $__status
  command eval "$__line" </dev/null
  __status=$?
  __mark $__status
done`

const help = `a line runs in the guest's shell, which keeps its variables and directory, for the next repl and in every fork too
:fork NAME      a sibling of this VM, with this shell in it: machinen repl NAME
:snapshot DIR   a bundle of this VM, which goes on
:help           this
:quit           leave; the shell stays (exit ends it)`

interface LineReader {
  /** The next line; `None` at the end of input. `isMore`: the line continues a command. */
  readonly next: (isMore: boolean) => Effect.Effect<Option.Option<string>>
  /** Completes at the next ctrl-c. */
  readonly interrupted: Effect.Effect<void>
}

/** Reads typed lines, in a terminal with editing and history. */
const lineReader: Effect.Effect<LineReader, never, Scope.Scope> = Effect.gen(function* () {
  const lines = yield* Queue.unbounded<Option.Option<string>>()
  const interrupts = yield* Queue.sliding<void>(1)
  const isTty = process.stdin.isTTY === true
  const editor = yield* Effect.acquireRelease(
    Effect.sync(() => readline.createInterface({ input: process.stdin, ...(isTty ? { output: process.stdout } : {}) })),
    (editor) => Effect.sync(() => editor.close())
  )
  editor.on("line", (line) => lines.unsafeOffer(Option.some(line)))
  editor.on("close", () => lines.unsafeOffer(Option.none()))
  editor.on("SIGINT", () => {
    editor.write(null, { ctrl: true, name: "u" })
    interrupts.unsafeOffer(undefined)
  })
  return {
    next: (isMore) =>
      Effect.zipRight(
        Effect.sync(() => {
          if (!isTty) return
          editor.setPrompt(isMore ? ". " : "> ")
          editor.prompt()
        }),
        Queue.take(lines)
      ),
    // earlier ctrl-c's do not count
    interrupted: Effect.zipRight(Queue.takeAll(interrupts), Queue.take(interrupts))
  }
})

/** Drives the shell behind a terminal: sends it lines, and reads output and exit codes. */
const shellClient = Effect.fnUntraced(function* (shellOf: Terminal) {
  const token = randomBytes(8).toString("hex")
  const marked = new CommandEndParser(token)
  const statuses = yield* Queue.unbounded<number | "more">()
  const send = (text: string) => shellOf.write(Buffer.from(text))
  let begun = false
  const shown = Stream.runForEach(shellOf.output, (bytes) =>
    Effect.forEach(
      marked.push(bytes),
      (piece) => {
        if ("status" in piece) return Queue.offer(statuses, piece.status)
        // output from before our first mark is not shown
        return begun ? stdio.write("stdout")(piece.text) : Effect.void
      },
      { discard: true }
    )
  )
  const run = (line: string) => Effect.zipRight(send(`${line}\n`), Queue.take(statuses))
  const drop = run(`${resetMark}${token}`)
  const begin = Effect.zipRight(
    drop,
    Effect.sync(() => {
      begun = true
    })
  )
  const ended = Effect.flatMap(shown, () => Effect.map(shellOf.exit, ({ code }) => code))
  return { run, begin, drop, ended, interrupt: send("\x03") }
})

/** Obeys a line that is meant for the repl itself. False: leave the repl. */
const runReplCommand = Effect.fnUntraced(
  function* (vm: Vm, line: string) {
    const machinen = yield* Machinen
    const [name = "", argument = ""] = line.slice(1).trim().split(/\s+/, 2)
    if (name === "quit") return false
    if (name === "fork" && argument !== "") {
      yield* Effect.scoped(
        Effect.flatMap(machinen.fork(vm, { name: argument }), ({ siblings }) =>
          detachAll(
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

/** `machinen repl VM`: runs line after line in one shell of a running VM. */
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
      const vm = yield* attached(input.vm)
      const { begin, drop, ended, interrupt, run } = yield* shellClient(
        yield* vm.terminal(
          { argv: ["sh", "-c", shell], env: terminal.environment() },
          { ...terminal.size(), session: input.session }
        )
      )
      const { interrupted, next } = yield* lineReader
      const serve = Effect.gen(function* () {
        yield* begin
        let status = 0
        let isMore = false
        const send = (line: string) =>
          Effect.gen(function* () {
            const answer = yield* Effect.raceFirst(run(line), Effect.forever(Effect.zipRight(interrupted, interrupt)))
            isMore = answer === "more"
            if (answer !== "more") status = answer
          })
        // ctrl-c drops an incomplete command
        const typed = Effect.suspend(() =>
          isMore ? Effect.raceFirst(next(true), Effect.as(interrupted, "dropped" as const)) : next(false)
        )
        for (;;) {
          const line = yield* typed
          if (line === "dropped") {
            yield* drop
            isMore = false
          } else if (Option.isNone(line)) {
            if (isMore) yield* send(runMark)
            return status
          } else if (!isMore && /^:[a-z]/.test(line.value)) {
            if (!(yield* runReplCommand(vm, line.value))) return status
          } else if (isMore || line.value.trim() !== "") yield* send(line.value)
        }
      })
      return yield* new ExitWith({ code: yield* Effect.raceFirst(serve, ended) })
    }).pipe(Effect.scoped)
).pipe(Command.withDescription("run line after line in one shell of a running VM"))
