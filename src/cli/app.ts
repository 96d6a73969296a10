import { Command, CommandDescriptor } from "@effect/cli"
import { Effect, HashMap, Option } from "effect"
import { version } from "../version.ts"
import { attach, sessionKill, sessions } from "./commands/attach.ts"
import { boot } from "./commands/boot.ts"
import { cp } from "./commands/cp.ts"
import { demo } from "./commands/demo.ts"
import { doctor } from "./commands/doctor.ts"
import { exec } from "./commands/exec.ts"
import { forward } from "./commands/forward.ts"
import { image } from "./commands/image.ts"
import { inspect } from "./commands/inspect.ts"
import { install } from "./commands/install.ts"
import { gc, pause, resume, stop } from "./commands/lifecycle.ts"
import { logs } from "./commands/logs.ts"
import { ls } from "./commands/ls.ts"
import { prepare } from "./commands/prepare.ts"
import { provision } from "./commands/provision.ts"
import { repl } from "./commands/repl.ts"
import { fork, restore } from "./commands/restore.ts"
import { run } from "./commands/run.ts"
import { bundle, snapshot } from "./commands/snapshot.ts"
import { watch } from "./commands/watch.ts"
import * as usage from "./usage.ts"

/**
 * argv in, Effect out; its requirements are services, so that a test can run it on fakes. What follows the first `--` belongs to a guest
 * command and is kept from the option parser whole.
 */
export const cli = (argv: ReadonlyArray<string>) => {
  const at = argv.indexOf("--")
  const [head, tail] = at === -1 ? [argv, []] : [argv.slice(0, at), argv.slice(at + 1)]
  const root = Command.make("machinen").pipe(
    Command.withDescription("microVMs that boot in a fraction of a second, keep their state and never leak"),
    Command.withSubcommands([
      run(tail),
      boot(tail),
      exec(tail),
      attach(tail),
      sessions,
      sessionKill,
      repl,
      ls("ls"),
      ls("list"),
      ls("ps"),
      inspect,
      logs,
      cp,
      watch,
      forward,
      stop,
      pause,
      resume,
      ["inspect", "verify"].includes(head[3] ?? "") ? bundle : snapshot,
      restore,
      fork,
      image,
      prepare,
      provision("provision"),
      provision("bake"),
      gc,
      install,
      doctor,
      demo
    ])
  )
  const [, , verb = "", ...args] = head
  const flags = HashMap.get(Command.getSubcommands(root), verb).pipe(
    Option.map((command) => usage.flagsOf(CommandDescriptor.getUsage(command))),
    Option.getOrElse(() => [])
  )
  return Effect.zipRight(usage.check(flags, args), Command.run(root, { name: "machinen", version })(head))
}
