import { mkdtempSync, rmSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"

/** One directory for all that the tests of a run make; workers may be ended without their exit handlers, this process is not. */
export default function setup(): () => void {
  const dir = mkdtempSync(path.join(os.tmpdir(), "mn-"))
  process.env["MACHINEN_TEST_TMP"] = dir
  return () => rmSync(dir, { recursive: true, force: true })
}
