import * as path from "node:path"
import { Command } from "@effect/platform"
import { Effect } from "effect"
import { BenchError } from "./harness.ts"

const root = path.resolve(import.meta.dirname, "..")

/** Bundles the CLI as users run it, unless the bundle is newer than its sources: the checkout's launcher does that. */
export const bundle = Effect.gen(function* () {
  const launcher = path.join(root, "scripts", "machinen.mjs")
  const fresh = yield* Command.exitCode(Command.make(process.execPath, launcher, "--version"))
  if (fresh !== 0) return yield* new BenchError({ message: "the CLI cannot be bundled" })
  return path.join(root, "dist", "cli.js")
})
