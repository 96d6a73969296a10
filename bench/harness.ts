import type { CommandExecutor, FileSystem, Error as PlatformErrors } from "@effect/platform"
import { Console, Effect, Schema, type Scope } from "effect"
import type { FilesError, TunnelError } from "../src/errors.ts"
import type { Assets } from "../src/host/Assets.ts"
import type { RootfsImage } from "../src/image/RootfsImage.ts"
import type { BootFailure, Machinen, SnapshotFailure } from "../src/Machinen.ts"
import type { HostProbe } from "../src/machine/HostProbe.ts"
import type { Mountdisk } from "../src/mount/Mountdisk.ts"
import type { Settings } from "../src/Settings.ts"

/** The bench failed: a tool is missing, or what was measured did not work. */
export class BenchError extends Schema.TaggedError<BenchError>()("BenchError", {
  message: Schema.String,
  cause: Schema.optional(Schema.Defect)
}) {}

export type Failure =
  | BenchError
  | BootFailure
  | SnapshotFailure
  | FilesError
  | TunnelError
  | PlatformErrors.PlatformError
export type Services =
  | Assets
  | CommandExecutor.CommandExecutor
  | FileSystem.FileSystem
  | HostProbe
  | Machinen
  | Mountdisk
  | RootfsImage
  | Settings

export type Unit = "ms" | "MB/s" | "MiB"

/** Collects the results of one run. */
export interface Probe {
  /** Records the milliseconds since the run began, or `at` when the caller has measured them otherwise. */
  readonly mark: (label: string, at?: number) => Effect.Effect<void>
  readonly record: (label: string, value: number, unit: Unit) => Effect.Effect<void>
  /** Milliseconds since the run began. */
  readonly elapsed: Effect.Effect<number>
}

/** One of the variants that are measured side by side. */
export interface Variant {
  readonly name: string
  /** Takes one sample in a scope of its own: it starts from nothing and leaves nothing. */
  readonly run: (probe: Probe) => Effect.Effect<void, Failure, Services | Scope.Scope>
  /** Number of samples, in place of the scenario's. */
  readonly runs?: number
  readonly warmup?: number
  /** True: also marks `released` when the run's scope is closed. */
  readonly released: boolean
}

/** A scenario after its set-up, ready to be measured. */
export interface Prepared {
  readonly warmup: number
  readonly runs: number
  readonly variants: ReadonlyArray<Variant>
  /** Settings that affect the numbers; they go into the report. */
  readonly settings: Readonly<Record<string, unknown>>
  /** Variants that could not be measured on this host, with the reason. */
  readonly skipped: ReadonlyArray<string>
  readonly verdicts: (results: Results) => ReadonlyArray<Verdict>
}

export interface Options {
  readonly runs: number | undefined
  readonly images: ReadonlyArray<"micro" | "debian">
}

export interface Scenario {
  readonly name: string
  readonly description: string
  /** Run once and not timed. What it acquires is released after the last sample. */
  readonly setup: (options: Options) => Effect.Effect<Prepared, Failure, Services | Scope.Scope>
}

/** A target, and whether it was met. */
export interface Verdict {
  readonly target: string
  readonly unit: Unit
  readonly actual: number
  readonly limit: number
  readonly passed: boolean
}

export interface Series {
  readonly unit: Unit
  /** All samples, in the order in which they were taken. */
  readonly samples: ReadonlyArray<number>
  readonly p50: number
  readonly p95: number
  readonly min: number
  readonly max: number
}

/** Series by variant, then by label, both in the order in which they first appeared. */
export type Results = Readonly<Record<string, Readonly<Record<string, Series>>>>

/** Quantile by nearest rank. The median of an even number of samples is the mean of the middle two. */
const quantile = (sorted: ReadonlyArray<number>, q: number): number => {
  const at = (index: number) => sorted[Math.max(0, Math.min(sorted.length - 1, index))] ?? Number.NaN
  const half = sorted.length / 2
  return q === 0.5 && Number.isInteger(half) ? (at(half - 1) + at(half)) / 2 : at(Math.ceil(q * sorted.length) - 1)
}

const summarize = (unit: Unit, samples: ReadonlyArray<number>): Series => {
  const sorted = [...samples].sort((a, b) => a - b)
  return {
    unit,
    samples,
    p50: quantile(sorted, 0.5),
    p95: quantile(sorted, 0.95),
    min: quantile(sorted, 0),
    max: quantile(sorted, 1)
  }
}

type Collected = Map<string, { readonly unit: Unit; readonly samples: Array<number> }>

const sample = (variant: Variant, into: Collected) =>
  Effect.gen(function* () {
    const record = (label: string, value: number, unit: Unit) =>
      Effect.sync(() => {
        const series = into.get(label)
        if (series === undefined) into.set(label, { unit, samples: [value] })
        else series.samples.push(value)
      })
    const began = performance.now()
    const elapsed = Effect.sync(() => performance.now() - began)
    const mark = (label: string, at?: number) => record(label, at ?? performance.now() - began, "ms")
    yield* Effect.scoped(variant.run({ mark, record, elapsed }))
    if (variant.released) yield* mark("released")
  })

/**
 * Takes all samples, one of each variant in turn, so that other work of the host affects all of them alike. Every other round goes backwards, so
 * that no variant always follows the same one.
 */
export const measure = Effect.fn("measure")(function* (name: string, prepared: Prepared) {
  const collected = new Map(prepared.variants.map((variant) => [variant, new Map() as Collected]))
  const counts = prepared.variants.map((variant) => ({
    variant,
    warmup: variant.warmup ?? prepared.warmup,
    runs: variant.runs ?? prepared.runs
  }))
  const rounds = Math.max(...counts.map(({ runs, warmup }) => warmup + runs))
  for (let round = 0; round < rounds; round++) {
    const due = counts.filter(({ runs, warmup }) => round < warmup + runs)
    for (const { variant, warmup } of round % 2 === 0 ? due : due.reverse()) {
      yield* sample(variant, round < warmup ? new Map() : (collected.get(variant) ?? new Map()))
    }
    if (round % Math.ceil(rounds / 20) === 0) yield* Console.error(`${name}: round ${round + 1} of ${rounds}`)
  }
  const results: Results = Object.fromEntries(
    [...collected].map(([variant, series]) => [
      variant.name,
      Object.fromEntries([...series].map(([label, { samples, unit }]) => [label, summarize(unit, samples)]))
    ])
  )
  return results
})

/** The median of a series. NaN, which meets no target, when it was not measured. */
export const p50 = (results: Results, variant: string, label: string): number =>
  results[variant]?.[label]?.p50 ?? Number.NaN
export const max = (results: Results, variant: string, label: string): number =>
  results[variant]?.[label]?.max ?? Number.NaN

export const atMost = (target: string, unit: Unit, actual: number, limit: number): Verdict => ({
  target,
  unit,
  actual,
  limit,
  passed: actual <= limit
})

export const atLeast = (target: string, unit: Unit, actual: number, limit: number): Verdict => ({
  target,
  unit,
  actual,
  limit,
  passed: actual >= limit
})
