import { readdir, readFile } from "node:fs"
import { Effect, Option } from "effect"
import * as processes from "./processes.ts"

export interface VmMemory {
  /** What of the guest's memory is resident in the host's. */
  readonly guestBytes: number
  /** What runs the guest: the rest of the VMM, the shim and its helpers. */
  readonly overheadBytes: number
}

const read = (file: string): Effect.Effect<Option.Option<string>> =>
  Effect.async((resume) => {
    readFile(file, "utf8", (_error, text) => resume(Effect.succeed(Option.fromNullable(text))))
  })

/** The children that any thread of a process has. */
const childrenOf = (pid: number): Effect.Effect<ReadonlyArray<number>> =>
  Effect.async<ReadonlyArray<string>>((resume) => {
    readdir(`/proc/${pid}/task`, (_error, threads) => resume(Effect.succeed(threads ?? [])))
  }).pipe(
    Effect.flatMap((threads) => Effect.forEach(threads, (thread) => read(`/proc/${pid}/task/${thread}/children`))),
    Effect.map((lists) => lists.flatMap((list) => Option.getOrElse(list, () => "").match(/\d+/g) ?? []).map(Number))
  )

/**
 * What a VMM's mappings of the guest's memory hold: the shim's memfd, or the memory file of a bundle or a template, which the VMM maps
 * privately (smaps of proc(5)).
 */
export const guestBytes = (smaps: string): number => {
  let isGuest = false
  let total = 0
  for (const line of smaps.split("\n")) {
    const [, path] = /^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)$/.exec(line) ?? []
    if (path !== undefined) isGuest = /^\/memfd:machinen-memory\b|^\/.*\/memory( \(deleted\))?$/.test(path)
    else if (isGuest) total += Number(/^Rss:\s+(\d+) kB$/.exec(line)?.[1] ?? 0) * 1024
  }
  return total
}

/** None when one of the two is gone, or somebody else's. */
export const residentOf = Effect.fnUntraced(function* (vmmPid: number, shimPid: number) {
  const smaps = yield* read(`/proc/${vmmPid}/smaps`)
  const rss = yield* processes.residentBytes(vmmPid)
  if (Option.isNone(smaps) || Option.isNone(rss) || smaps.value === "") return Option.none<VmMemory>()
  const helpers = [shimPid, ...(yield* childrenOf(shimPid)).filter((pid) => pid !== vmmPid)]
  const others = yield* Effect.forEach(helpers, processes.residentBytes)
  const guest = guestBytes(smaps.value)
  const rest = others.reduce((sum, bytes) => sum + Option.getOrElse(bytes, () => 0), rss.value)
  return Option.some<VmMemory>({ guestBytes: guest, overheadBytes: Math.max(0, rest - guest) })
})
