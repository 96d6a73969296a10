import { spawnSync } from "node:child_process"
import { mkdtempSync, rmSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"

/**
 * The CLI of these sources, bundled again where that is stale: tests start the bundle. And one directory for all that the tests of a run
 * make; workers may be ended without their exit handlers, this process is not.
 */
export default function setup(): () => void {
  const cli = path.join(import.meta.dirname, "..", "scripts", "machinen.mjs")
  const built = spawnSync(process.execPath, [cli, "--version"], { encoding: "utf8", timeout: 60_000 })
  if (built.status !== 0) throw new Error(`the CLI cannot be bundled: ${built.stderr}`)
  const dir = mkdtempSync(path.join(os.tmpdir(), "mn-"))
  process.env["MACHINEN_TEST_TMP"] = dir
  return () => rmSync(dir, { recursive: true, force: true })
}
