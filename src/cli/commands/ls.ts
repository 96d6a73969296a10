import { Command } from "@effect/cli"
import { Console, Effect } from "effect"
import { Machinen } from "../../Machinen.ts"
import * as processes from "../../platform/processes.ts"
import { json } from "../options.ts"
import * as render from "../render.ts"

/** `machinen ls` (also `list` and `ps`): the VMs that run. */
export const ls = (name: "ls" | "list" | "ps") =>
  Command.make(name, { json }, (input) =>
    Effect.gen(function* () {
      const machinen = yield* Machinen
      const entries = yield* machinen.list
      const rows = yield* Effect.forEach(entries, (entry) =>
        Effect.map(entry.vmm === undefined ? Effect.succeedNone : processes.residentBytes(entry.vmm.pid), (rss) => ({
          entry,
          rssBytes: rss._tag === "Some" ? rss.value : null
        }))
      )
      if (input.json) {
        return yield* render.json(rows.map(({ entry, rssBytes }) => ({ ...render.vmJson(entry), rssBytes })))
      }
      const now = Date.now()
      yield* Console.log(
        render.table(
          ["NAME", "ID", "PID", "STATE", "MEM", "IMAGE", "AGE"],
          rows.map(({ entry, rssBytes }) => [
            entry.name ?? "-",
            entry.id,
            String(entry.vmm?.pid ?? "-"),
            entry.state,
            `${rssBytes === null ? "-" : render.bytes(rssBytes)} / ${entry.memoryMib} MiB`,
            entry.image,
            render.age(entry.createdAt, now)
          ])
        )
      )
    })
  ).pipe(Command.withDescription(name === "ls" ? "list running VMs" : "the same as ls"))
