import * as os from "node:os"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import * as command from "../src/platform/command.ts"
import { Settings } from "../src/Settings.ts"
import type { Prepared, Results, Series, Verdict } from "./harness.ts"

const root = path.resolve(import.meta.dirname, "..")

/** The report of one run of one scenario. `schema` changes when older readers would misunderstand newer files. */
export interface Report {
  readonly schema: 1
  readonly name: string
  readonly startedAt: string
  /** `git describe --always --dirty`. A dirty revision cannot be checked out again. */
  readonly revision: string
  readonly host: Host
  readonly settings: Readonly<Record<string, unknown>>
  readonly results: Results
  readonly skipped: ReadonlyArray<string>
  readonly verdicts: ReadonlyArray<Verdict>
  readonly leaks: ReadonlyArray<string>
}

export interface Host {
  readonly cpu: string
  readonly cpus: number
  readonly memoryMib: number
  readonly kernel: string
  readonly node: string
  readonly qemu: string
  /** One-minute load averages before and after the run: other work on the host. */
  readonly load: readonly [before: number, after: number]
}

/** The first line of a command's output. */
const ask = (argv: readonly [string, ...ReadonlyArray<string>]) =>
  command.run(argv).pipe(
    Effect.map(({ code, stdout }) => (code === 0 ? (stdout.split("\n")[0] ?? "").trim() : "unknown")),
    Effect.orElseSucceed(() => "unknown")
  )

const load = () => Math.round((os.loadavg()[0] ?? 0) * 100) / 100

/** Begins a report. Run it before measuring, because it records the load. */
export const begin = Effect.gen(function* () {
  const before = load()
  const startedAt = new Date()
  const { vmm } = yield* Settings
  const revision = yield* ask(["git", "-C", root, "describe", "--always", "--dirty"])
  const qemu = yield* ask([vmm._tag === "Some" ? vmm.value : "qemu-system-x86_64", "--version"])
  return (name: string, prepared: Prepared, results: Results, leaks: ReadonlyArray<string>): Report => ({
    schema: 1,
    name,
    startedAt: startedAt.toISOString(),
    revision,
    host: {
      cpu: os.cpus()[0]?.model ?? "unknown",
      cpus: os.availableParallelism(),
      memoryMib: Math.round(os.totalmem() / 2 ** 20),
      kernel: os.release(),
      node: process.version,
      qemu,
      load: [before, load()]
    },
    settings: {
      runs: prepared.runs,
      warmup: prepared.warmup,
      environment: Object.fromEntries(Object.entries(process.env).filter(([key]) => key.startsWith("MACHINEN_"))),
      ...prepared.settings
    },
    results,
    skipped: prepared.skipped,
    verdicts: prepared.verdicts(results),
    leaks
  })
})

/** Writes `bench/results/<name>-<time>.json` and returns the path. */
export const save = Effect.fn("report.save")(function* (report: Report) {
  const fs = yield* FileSystem.FileSystem
  const dir = path.join(root, "bench", "results")
  const file = path.join(dir, `${report.name}-${report.startedAt.replaceAll(/[:.]/g, "-")}.json`)
  yield* fs.makeDirectory(dir, { recursive: true })
  yield* fs.writeFileString(file, `${JSON.stringify(report, undefined, 1)}\n`)
  return file
})

const number = (value: number) => (Math.abs(value) >= 1000 ? value.toFixed(0) : value.toFixed(1))

const row = (variant: string, label: string, series: Series) => [
  variant,
  label,
  series.unit,
  ...[series.p50, series.p95, series.min, series.max].map(number),
  String(series.samples.length)
]

/** Formats a report for people: host, table, targets. */
export const text = (report: Report): string => {
  const { host, results, verdicts } = report
  const rows = [
    ["variant", "what", "unit", "p50", "p95", "min", "max", "n"],
    ...Object.entries(results).flatMap(([variant, labels]) =>
      Object.entries(labels).map(([label, series]) => row(variant, label, series))
    )
  ]
  const widths = (rows[0] ?? []).map((_, column) => Math.max(...rows.map((cells) => cells[column]?.length ?? 0)))
  const table = rows.map((cells) =>
    cells
      .map((cell, column) => (column < 3 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0)))
      .join("  ")
      .trimEnd()
  )
  return [
    `${report.name} at ${report.revision}, ${report.startedAt}`,
    `${host.cpus} x ${host.cpu}, ${host.memoryMib} MiB, Linux ${host.kernel}, Node ${host.node}, ${host.qemu}`,
    `load ${host.load.join(" -> ")}${Math.max(...host.load) > host.cpus ? ": THE HOST WAS BUSY, these are no figures to keep" : ""}`,
    "",
    ...table,
    "",
    ...report.skipped.map((what) => `SKIPPED  ${what}`),
    ...verdicts.map(
      ({ actual, limit, passed, target, unit }) =>
        `${passed ? "MET     " : "MISSED  "} ${target}: ${number(actual)} ${unit} (limit ${number(limit)})`
    ),
    ...(report.leaks.length === 0 ? ["nothing left behind"] : report.leaks.map((what) => `LEAKED   ${what}`))
  ].join("\n")
}
