import * as path from "node:path"
import type { Reporter, TestCase, TestModule } from "vitest/node"

/** Prints each test that did not run, and why: a count alone would hide a test that never runs on this machine. */
export default class SkipReporter implements Reporter {
  onTestRunEnd(modules: ReadonlyArray<TestModule>): void {
    for (const module of modules) {
      for (const test of module.children.allTests()) {
        if (["passed", "failed"].includes(test.result().state)) continue
        const file = path.relative(process.cwd(), module.moduleId)
        process.stdout.write(`skipped: ${file} > ${test.fullName}: ${reason(test)}\n`)
      }
    }
  }
}

const reason = (test: TestCase): string => {
  const result = test.result()
  if (result.state === "skipped" && result.note !== undefined) return result.note
  if (test.options.mode === "todo") return "it is still to be written"
  if (test.parent.state() === "failed") return "what its group needs failed"
  return result.state === "skipped" ? "no reason given" : "it was not reached"
}
