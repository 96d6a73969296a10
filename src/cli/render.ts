import { Console } from "effect"
import type { VmEntry } from "../domain/VmEntry.ts"

/** Columns as wide as their widest cell; the last is not padded. */
export const table = (header: ReadonlyArray<string>, rows: ReadonlyArray<ReadonlyArray<string>>): string => {
  const all = [header, ...rows]
  const widths = header.map((_, column) => Math.max(...all.map((row) => (row[column] ?? "").length)))
  return all
    .map((row) =>
      row.map((cell, column) => (column === row.length - 1 ? cell : cell.padEnd((widths[column] ?? 0) + 3))).join("")
    )
    .join("\n")
}

export const json = (value: unknown) => Console.log(JSON.stringify(value, null, 2))

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

/** A VM as `--json` shows it. */
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
  backend: entry.backend,
  accel: entry.accel,
  detached: entry.detached,
  prepared: entry.prepared ?? false,
  createdAt: new Date(entry.createdAt).toISOString()
})
