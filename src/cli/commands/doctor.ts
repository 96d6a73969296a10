import { Command } from "@effect/cli"
import { Console, Effect } from "effect"
import { Doctor } from "../../host/Doctor.ts"
import { ExitWith } from "../exit.ts"
import { json } from "../options.ts"
import * as render from "../render.ts"

const marks = { found: "✔", missing: "✘ missing:", broken: "✘ broken:" } as const

/** `machinen doctor`: lists what this host has, lacks, or has broken, and the command that mends it. Exits with 1 when something is wrong. */
export const doctor = Command.make("doctor", { json }, (input) =>
  Effect.gen(function* () {
    const { examine } = yield* Doctor
    const report = yield* examine
    if (input.json) yield* render.json(report)
    else {
      for (const { detail, fix, optional, status, title, version } of report.requirements) {
        const about = [title, version].filter((part) => part !== undefined).join(" ")
        const why = detail === undefined ? "" : ` (${detail})`
        yield* Console.log(`${marks[status]} ${about}${why}${optional && status !== "found" ? " [optional]" : ""}`)
        if (status !== "found" && fix !== undefined) yield* Console.log(`    fix: ${fix}`)
      }
    }
    if (!report.ok) return yield* new ExitWith({ code: 1 })
  })
).pipe(Command.withDescription("check this host"))
