/**
 * `npm test`: everything, in the order in which a failure is cheapest to learn of. Prints what runs as it runs, goes on after a failure, and
 * ends with one line of counts. A check that is not a test suite counts as one test.
 */
import { spawnSync } from "node:child_process"
import { mkdtempSync, readFileSync, rmSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"

const root = path.resolve(import.meta.dirname, "..")
const bin = (name: string) => path.join(root, "node_modules", ".bin", name)
const scratch = mkdtempSync(path.join(os.tmpdir(), "mn-test-"))

interface Counts {
  readonly passed: number
  readonly failed: number
  readonly skipped: number
}

const say = (text: string) => process.stdout.write(`${text}\n`)

const execute = (title: string, command: string, args: ReadonlyArray<string>, minutes: number, capture = false) => {
  const began = Date.now()
  say(`\n=== ${title}: ${[path.basename(command), ...args].join(" ")}`)
  const done = spawnSync(command, args, {
    cwd: root,
    timeout: minutes * 60_000,
    killSignal: "SIGKILL",
    encoding: "utf8",
    maxBuffer: 1 << 28,
    stdio: ["ignore", capture ? "pipe" : "inherit", "inherit"]
  })
  if (capture) process.stdout.write(done.stdout)
  const ok = done.status === 0
  say(
    `=== ${title}: ${ok ? "ok" : `failed (${done.error?.message ?? done.signal ?? `code ${done.status}`})`}, ${((Date.now() - began) / 1000).toFixed(1)} s`
  )
  return { ok, stdout: capture ? done.stdout : "" }
}

const check = (title: string, command: string, args: ReadonlyArray<string>, minutes = 5): Counts => {
  const { ok } = execute(title, command, args, minutes)
  return { passed: ok ? 1 : 0, failed: ok ? 0 : 1, skipped: 0 }
}

/** A suite whose runner died, or found nothing to run, failed: no count of its own can be trusted then. */
const judged = (ok: boolean, counts: Counts): Counts =>
  (ok || counts.failed > 0) && counts.passed + counts.failed > 0 ? counts : { ...counts, failed: counts.failed + 1 }

const vitest = (project: string, minutes: number): Counts => {
  const file = path.join(scratch, `${project}.json`)
  const { ok } = execute(
    `tests: ${project}`,
    bin("vitest"),
    [
      ...["run", "--project", project, "--reporter=verbose", "--reporter=./test/skipReporter.ts"],
      ...["--reporter=json", `--outputFile.json=${file}`]
    ],
    minutes
  )
  try {
    const report = JSON.parse(readFileSync(file, "utf8"))
    return judged(ok, {
      passed: report.numPassedTests,
      failed: report.numFailedTests,
      skipped: report.numPendingTests + report.numTodoTests
    })
  } catch (error) {
    say(`tests: ${project}: there is no report: ${error}`)
    return { passed: 0, failed: 1, skipped: 0 }
  }
}

/** A test that finds out itself that it cannot run here prints `skipped: ` and why, and passes for cargo. */
const cargoTest = (): Counts => {
  const argv = ["test", "--locked", "--workspace", "--", "--show-output"]
  const { ok, stdout } = execute("tests: Rust", "cargo", argv, 20, true)
  const counts = [...stdout.matchAll(/^test result: \S+ (\d+) passed; (\d+) failed; (\d+) ignored/gm)]
  const sum = (group: number) => counts.reduce((total, match) => total + Number(match[group]), 0)
  const outputs = stdout.split(/^---- .* stdout ----$/m).slice(1)
  const skips = outputs.filter((output) => /^skipped: /m.test(output)).length
  return judged(ok, { passed: sum(1) - skips, failed: sum(2), skipped: sum(3) + skips })
}

/** Vet, format and tests of the guests' network; `go test -v` prints a line for each test. */
const goTest = (): Counts => {
  const dir = path.join(root, "gvproxy")
  const vet = execute("Go lint", "go", ["-C", dir, "vet", "./..."], 10)
  const format = execute("Go format", "gofmt", ["-l", dir], 1, true)
  const { ok, stdout } = execute("tests: Go", "go", ["-C", dir, "test", "-v", "./..."], 10, true)
  const count = (verdict: string) => [...stdout.matchAll(new RegExp(`^--- ${verdict}:`, "gm"))].length
  const lint = vet.ok && format.ok && format.stdout === ""
  return judged(ok && lint, {
    passed: count("PASS") + (lint ? 1 : 0),
    failed: count("FAIL") + (lint ? 0 : 1),
    skipped: count("SKIP")
  })
}

const results: Array<readonly [title: string, counts: Counts]> = []
const record = (title: string, counts: Counts) => {
  results.push([title, counts])
  return counts.failed === 0
}

const ready = record(
  "set-up",
  check("set-up", process.execPath, ["scripts/machinen.mjs", "install", "--with-tests"], 45)
)
record("types", check("types", bin("tsc"), ["--noEmit"]))
record("lint and format", check("lint and format", bin("biome"), ["check", "."]))
record("unused", check("unused exports, files and packages", bin("knip"), []))
record("unit", vitest("unit", 5))
record("Rust format", check("Rust format", "cargo", ["fmt", "--check"]))
record(
  "Rust lint",
  check("Rust lint", "cargo", ["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"], 15)
)
record("Rust", cargoTest())
record("Go", goTest())
if (ready) record("real guests", vitest("vm", 40))
else record("real guests", { passed: 0, failed: 1, skipped: 0 })

rmSync(scratch, { recursive: true, force: true })
const total = (key: keyof Counts) => results.reduce((sum, [, counts]) => sum + counts[key], 0)
say("")
for (const [title, { failed, passed, skipped }] of results) {
  say(
    `${failed === 0 ? "✔" : "✘"} ${title}: ${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ""}`
  )
}
say(
  `${total("passed")} passed, ${total("failed")} failed${total("skipped") > 0 ? `, ${total("skipped")} skipped` : ""}`
)
process.exitCode = total("failed") === 0 ? 0 : 1
