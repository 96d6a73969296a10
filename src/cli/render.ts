import { Console, type Option } from "effect"
import type { VmEntry } from "../machine/VmEntry.ts"
import { printable } from "../platform/printable.ts"
import type { VmMemory } from "../platform/vmMemory.ts"

/** Formats a table: columns are as wide as their widest cell, the last one is not padded. Cells are escaped, so that each row is one line. */
export const table = (header: ReadonlyArray<string>, rows: ReadonlyArray<ReadonlyArray<string>>): string => {
  const all = [header, ...rows].map((row) => row.map((cell) => printable(cell)))
  const widths = header.map((_, column) => Math.max(...all.map((row) => (row[column] ?? "").length)))
  return all
    .map((row) =>
      row.map((cell, column) => (column === row.length - 1 ? cell : cell.padEnd((widths[column] ?? 0) + 3))).join("")
    )
    .join("\n")
}

/** Formats JSON for a terminal: also escapes the control characters that JSON allows in strings. */
export const jsonText = (value: unknown, indent = 0): string =>
  JSON.stringify(value, null, indent).replace(/[^\P{C}\n]|[\u2028\u2029]/gu, (character) =>
    character.replace(/./gs, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`)
  )

export const json = (value: unknown) => Console.log(jsonText(value, 2))

export const bytes = (n: number): string => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"]
  let value = n
  let unit = 0
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024
    unit += 1
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`
}

export const age = (sinceMs: number, nowMs: number): string => {
  const s = Math.max(0, Math.floor((nowMs - sinceMs) / 1000))
  if (s < 120) return `${s}s`
  if (s < 7200) return `${Math.floor(s / 60)}m`
  return s < 172800 ? `${Math.floor(s / 3600)}h` : `${Math.floor(s / 86400)}d`
}

/** Memory of a VM in `--json` output, in bytes: resident guest memory, and the overhead of running the guest. */
export const memoryJson = (memory: Option.Option<VmMemory>) =>
  memory._tag === "Some"
    ? { guestResidentBytes: memory.value.guestBytes, overheadBytes: memory.value.overheadBytes }
    : { guestResidentBytes: null, overheadBytes: null }

/** A VM in `--json` output. */
export const vmJson = (entry: VmEntry) => ({
  id: entry.id,
  name: entry.name ?? null,
  state: entry.state,
  pid: entry.vmm?.pid ?? null,
  shimPid: entry.shim?.pid ?? null,
  image: entry.image,
  command: entry.command ?? null,
  memoryMib: entry.memoryMib,
  vcpus: entry.vcpus,
  network: entry.network,
  portForward: entry.portForward ?? [],
  mount: entry.mount ?? null,
  liveMounts: entry.liveMounts ?? [],
  liveMountsLost: entry.liveMountsLost ?? null,
  backend: entry.backend,
  accel: entry.accel,
  detached: entry.detached,
  prepared: entry.prepared ?? false,
  createdAt: new Date(entry.createdAt).toISOString()
})
