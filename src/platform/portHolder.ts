import { readdirSync, readlinkSync } from "node:fs"
import { Effect, Option } from "effect"
import { read } from "./procfs.ts"

/** A process that listens on a port, with its name (comm). */
export interface PortHolder {
  readonly pid: number
  readonly command: string
}

const attempt = <A>(look: () => A): A | undefined => {
  try {
    return look()
  } catch {
    return undefined
  }
}

/** Inodes of the sockets that listen on a port. A line of /proc/net/tcp has state 0A then, and the port in hexadecimal behind the address. */
const inodes = (table: string, port: number): ReadonlyArray<string> =>
  Option.getOrElse(read(table), () => "")
    .split("\n")
    .flatMap((line) => {
      const fields = line.trim().split(/\s+/)
      const [, local = "", , state] = fields
      const inode = fields[9]
      return state === "0A" && inode !== undefined && Number.parseInt(local.split(":")[1] ?? "", 16) === port
        ? [inode]
        : []
    })

/** The process that listens on a TCP port of this host. `None` when there is none, or it belongs to another user. */
export const portHolder = (port: number): Effect.Effect<Option.Option<PortHolder>> =>
  Effect.sync(() => {
    const sockets = new Set(
      ["/proc/net/tcp", "/proc/net/tcp6"].flatMap((table) => inodes(table, port)).map((inode) => `socket:[${inode}]`)
    )
    if (sockets.size === 0) return Option.none()
    for (const pid of attempt(() => readdirSync("/proc")) ?? []) {
      if (!/^\d+$/.test(pid)) continue
      const fds = attempt(() => readdirSync(`/proc/${pid}/fd`)) ?? []
      if (fds.some((fd) => sockets.has(attempt(() => readlinkSync(`/proc/${pid}/fd/${fd}`)) ?? ""))) {
        const command = Option.getOrElse(read(`/proc/${pid}/comm`), () => "").trim()
        return Option.some({ pid: Number(pid), command })
      }
    }
    return Option.none()
  })
