import { isUtf8 } from "node:buffer"
import { Command, Options } from "@effect/cli"
import { Effect } from "effect"
import { ParseError } from "../../errors.ts"
import { given } from "../../platform/given.ts"
import { ExitWith, exitWithTerminal } from "../exit.ts"
import { bootOptions, environment, json, whenGiven } from "../options.ts"
import * as render from "../render.ts"
import { readSecrets } from "../secrets.ts"
import * as stdio from "../stdio.ts"
import * as terminal from "../terminal.ts"
import { attached, vmArg } from "../vmArgument.ts"
import { commandArgs, relay, timeLimit, withinLimit } from "./run.ts"

/** Output for JSON; output that is not UTF-8 is added as base64. */
const asText = (channel: "stdout" | "stderr", bytes: Uint8Array) => ({
  [channel]: Buffer.from(bytes).toString(),
  ...(isUtf8(bytes) ? {} : { [`${channel}Base64`]: Buffer.from(bytes).toString("base64") })
})

const jsonAndTerminal = new ParseError({
  code: "PARSE_FLAG_MALFORMED",
  message: "--json and --tty exclude each other",
  hint: "a terminal shows what the command prints; leave one of the two out"
})

/** `machinen exec VM -- COMMAND`: runs a command in a running VM. */
export const exec = (tail: ReadonlyArray<string>) =>
  Command.make(
    "exec",
    {
      interactive: Options.boolean("interactive").pipe(
        Options.withAlias("i"),
        Options.withDescription("pass stdin on to the command")
      ),
      tty: Options.boolean("tty").pipe(
        Options.withAlias("t"),
        Options.withDescription("run it in a terminal, which ours becomes")
      ),
      env: Options.text("env").pipe(Options.withAlias("e"), Options.repeated, Options.withDescription("KEY=VALUE")),
      secret: Options.text("secret").pipe(
        Options.repeated,
        Options.withDescription("NAME of a secret the VM has, or NAME=@FILE to give it that; may be repeated")
      ),
      workdir: Options.text("workdir").pipe(Options.withAlias("w"), Options.optional),
      user: bootOptions.user,
      timeout: Options.text("timeout").pipe(Options.optional, Options.withDescription("kill it after this long")),
      json,
      vm: vmArg,
      command: commandArgs
    },
    (input) =>
      Effect.gen(function* () {
        const [first, ...rest] = [...input.command, ...tail]
        if (first === undefined) {
          return yield* new ParseError({
            code: "PARSE_ARGUMENT_MISSING",
            message: "no command to run",
            hint: "machinen exec VM -- uname -a"
          })
        }
        if (input.tty) {
          if (input.json) yield* jsonAndTerminal
          yield* terminal.required
        }
        const env = yield* environment(input.env)
        const secretNames = input.secret.map((flag) => flag.split("=", 1)[0] ?? "")
        const secrets = yield* readSecrets(input.secret.filter((flag) => flag.includes("=")))
        const limit = yield* timeLimit(input.timeout)
        const vm = yield* attached(input.vm)
        if (Object.keys(secrets).length > 0) yield* vm.secrets(secrets)
        const place = {
          ...whenGiven({ cwd: input.workdir, user: input.user }),
          ...(secretNames.length === 0 ? {} : { secrets: secretNames })
        }
        if (input.tty) {
          const spec = { argv: [first, ...rest], env: { ...terminal.environment(), ...env }, ...place }
          const running = terminal.relay(vm.terminal(spec, terminal.size()), { detachKeys: false })
          return yield* exitWithTerminal(yield* withinLimit(running, limit))
        }
        const stdin = input.interactive ? yield* stdio.stdin : undefined
        const command = {
          argv: [first, ...rest] as const,
          env,
          ...place,
          ...given({ stdin })
        }
        if (input.json) {
          const result = yield* vm.execRaw(command, whenGiven({ timeout: limit }))
          yield* render.json({
            exitCode: result.exitCode,
            signal: result.signal,
            oomKilled: result.oomKilled,
            ...asText("stdout", result.stdout),
            ...asText("stderr", result.stderr)
          })
          return yield* new ExitWith({ code: result.exitCode })
        }
        const running = Effect.flatMap(vm.start(command), relay)
        const code = yield* withinLimit(running, limit)
        return yield* new ExitWith({ code })
      }).pipe(Effect.scoped)
  ).pipe(Command.withDescription("run a command in a running VM"))
