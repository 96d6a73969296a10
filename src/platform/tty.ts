import { spawnSync } from "node:child_process"
import { searchPath } from "./searchPath.ts"

/**
 * Turns a terminal's output processing off (OPOST). Node's raw mode leaves it on (libuv), so newlines that the guest's terminal has processed
 * already would be processed a second time. Leaving raw mode turns it on again. Does nothing when stty(1) fails.
 */
export const leaveOutputAlone = (fd: number): void => {
  spawnSync("stty", ["-opost"], { stdio: [fd, "ignore", "ignore"], env: { PATH: searchPath() } })
}
