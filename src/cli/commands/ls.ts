import { Command } from "@effect/cli"
import { Console, Effect, Option } from "effect"
import { Machinen } from "../../Machinen.ts"
import type { VmEntry } from "../../machine/VmEntry.ts"
import * as processes from "../../platform/processes.ts"
import * as vmMemory from "../../platform/vmMemory.ts"
import { json } from "../options.ts"
import * as render from "../render.ts"

/** Memory of a VM in bytes; nulls while the VM is being started, and when it has just ended. */
const memoryOf = Effect.fnUntraced(function* ({ shim, vmm }: VmEntry) {
  if (shim === undefined || vmm === undefined) return { rssBytes: null, guestResidentBytes: null, overheadBytes: null }
  const rss = yield* processes.residentBytes(vmm.pid)
  return { rssBytes: Option.getOrNull(rss), ...render.memoryJson(yield* vmMemory.residentOf(vmm.pid, shim.pid)) }
})

/** `machinen ls` (also `list` and `ps`): lists running VMs. */
export const ls = (name: "ls" | "list" | "ps") =>
  Command.make(name, { json }, (input) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const entries = yield* machinen.list
      const rows = yield* Effect.forEach(
        entries,
        (entry) => Effect.map(memoryOf(entry), (memory) => ({ entry, memory })),
        { concurrency: 8 }
      )
      if (input.json) {
        return yield* render.json(rows.map(({ entry, memory }) => ({ ...render.vmJson(entry), ...memory })))
      }
      const now = Date.now()
      const size = (bytes: number | null) => (bytes === null ? "-" : render.bytes(bytes))
      yield* Console.log(
        render.table(
          ["NAME", "ID", "PID", "STATE", "GUEST MEM", "OVERHEAD", "IMAGE", "AGE"],
          rows.map(({ entry, memory }) => [
            entry.name ?? "-",
            entry.id,
            String(entry.vmm?.pid ?? "-"),
            entry.state,
            `${size(memory.guestResidentBytes)} / ${entry.memoryMib} MiB`,
            size(memory.overheadBytes),
            entry.image,
            render.age(entry.createdAt, now)
          ])
        )
      )
    })
  ).pipe(Command.withDescription(name === "ls" ? "list running VMs" : "the same as ls"))
