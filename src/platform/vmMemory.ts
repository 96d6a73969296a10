import { readdir, readFile } from "node:fs"
import { Effect, Option } from "effect"
import * as processes from "./processes.ts"

/** Resident memory of a running VM, in bytes. */
export interface VmMemory {
  /** Bytes of guest memory that are resident on the host. */
  readonly guestBytes: number
  /** Resident bytes of everything that runs the guest: the rest of the VMM, the shim and its helpers. */
  readonly overheadBytes: number
}

const read = (file: string): Effect.Effect<Option.Option<string>> =>
  Effect.async((resume) => {
    readFile(file, "utf8", (_error, text) => resume(Effect.succeed(Option.fromNullable(text))))
  })

/** Pids of the children of all threads of a process. */
const childrenOf = (pid: number): Effect.Effect<ReadonlyArray<number>> =>
  Effect.async<ReadonlyArray<string>>((resume) => {
    readdir(`/proc/${pid}/task`, (_error, threads) => resume(Effect.succeed(threads ?? [])))
  }).pipe(
    Effect.flatMap((threads) => Effect.forEach(threads, (thread) => read(`/proc/${pid}/task/${thread}/children`))),
    Effect.map((lists) => lists.flatMap((list) => Option.getOrElse(list, () => "").match(/\d+/g) ?? []).map(Number))
  )

/**
 * Resident bytes of guest memory in a VMM's smaps (proc(5)): the mappings of the shim's memfd, or of the memory file of a bundle or template,
 * which the VMM maps privately.
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

/** Resident memory of a VM. `None` when the VMM has ended, or its /proc files cannot be read. */
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
