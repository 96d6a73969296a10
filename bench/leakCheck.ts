import { readdirSync, readFileSync } from "node:fs"
import * as path from "node:path"
import { Effect } from "effect"
import { processesOf } from "../test/host.ts"
import { BenchError } from "./harness.ts"

const entries = (dir: string): ReadonlyArray<string> => {
  try {
    return readdirSync(dir)
  } catch {
    return []
  }
}

/** Unix sockets below a directory that a process still holds, with or without their file (proc(5), /proc/net/unix). */
const socketsBelow = (home: string): ReadonlyArray<string> =>
  readFileSync("/proc/net/unix", "utf8")
    .split("\n")
    .map((line) => line.split(" ").at(-1) ?? "")
    .filter((name) => name.startsWith(`${home}/`))

/** What the VMs of a home have left: processes, sockets, directories, name pins. */
export const leaks = (home: string): Effect.Effect<ReadonlyArray<string>> =>
  Effect.sync(() => [
    ...processesOf(home).map(({ argv, pid }) => `process ${pid}: ${argv.slice(0, 120)}`),
    ...[...new Set(socketsBelow(home))].map((name) => `socket ${name}`),
    ...entries(path.join(home, "vms")).map((id) => `directory vms/${id}`),
    ...entries(path.join(home, "names")).map((name) => `name pin ${name}`)
  ])

/** Fails when anything is left, because leaks make the numbers worthless. */
export const check = (home: string): Effect.Effect<void, BenchError> =>
  Effect.flatMap(leaks(home), (found) =>
    found.length === 0
      ? Effect.void
      : new BenchError({ message: `${found.length} things were left behind:\n  ${found.join("\n  ")}` })
  )
