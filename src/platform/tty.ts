import { spawnSync } from "node:child_process"
import { searchPath } from "./searchPath.ts"

/**
 * Stops a terminal from changing what is written to it (OPOST). Node's raw mode leaves that on (libuv), so that what a guest's terminal has
 * made of a newline already would be changed a second time. Leaving raw mode puts it back. A terminal of which stty(1) cannot be told stays as
 * it is.
 */
export const leaveOutputAlone = (fd: number): void => {
  spawnSync("stty", ["-opost"], { stdio: [fd, "ignore", "ignore"], env: { PATH: searchPath() } })
}
