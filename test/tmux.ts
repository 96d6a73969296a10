import { execFileSync, spawnSync } from "node:child_process"
import * as path from "node:path"
import { Effect, Schedule, type Scope } from "effect"
import { environment, temporaryDirectory } from "./fixtures.ts"

/** A terminal on this host, as a person would have one before them. */
export interface Tmux {
  /** Types text as it is. */
  readonly type: (text: string) => Effect.Effect<void>
  /** Presses keys by tmux's names: `Enter`, `C-c`. */
  readonly press: (...keys: ReadonlyArray<string>) => Effect.Effect<void>
  /** What the screen shows now, without blanks at the ends of lines and of the screen. */
  readonly screen: Effect.Effect<string>
  /** Waits until it shows what is wanted; gives the screen. */
  readonly shows: (wanted: string | RegExp) => Effect.Effect<string>
  readonly cursorIsShown: Effect.Effect<boolean>
  readonly resize: (columns: number, rows: number) => Effect.Effect<void>
}

/** A window with a shell (`sh`, prompt `$ `), in which `machinen` is the CLI; gone with the scope, with all that runs in it. */
export const window = (
  home: string,
  cliPath: string,
  { columns = 100, rows = 30 } = {}
): Effect.Effect<Tmux, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.sync(() => {
      const dir = temporaryDirectory()
      const socket = path.join(dir, "tmux")
      const tmux = (...args: ReadonlyArray<string>) =>
        execFileSync("tmux", ["-S", socket, ...args], { encoding: "utf8" })
      const env = { ...process.env, ...environment(home), ENV: "" }
      const shell = `PS1='$ '; machinen() { '${process.execPath}' '${cliPath}' "$@"; }`
      const size = ["-x", String(columns), "-y", String(rows)]
      execFileSync("tmux", ["-S", socket, "-f", "/dev/null", "new-session", "-d", ...size, "sh"], { env, cwd: dir })
      tmux("send-keys", "-l", `${shell}; clear`)
      tmux("send-keys", "Enter")
      return { socket, tmux }
    }),
    ({ socket }) => Effect.sync(() => void spawnSync("tmux", ["-S", socket, "kill-server"]))
  ).pipe(
    Effect.map(({ tmux }): Tmux => {
      const look = () =>
        tmux("capture-pane", "-p")
          .split("\n")
          .map((line) => line.trimEnd())
          .join("\n")
          .trimEnd()
      return {
        type: (text) => Effect.sync(() => void tmux("send-keys", "-l", text)),
        press: (...keys) => Effect.sync(() => void tmux("send-keys", ...keys)),
        screen: Effect.sync(look),
        shows: (wanted) =>
          Effect.suspend(() => {
            const seen = look()
            const found = typeof wanted === "string" ? seen.includes(wanted) : wanted.test(seen)
            return found ? Effect.succeed(seen) : Effect.fail(seen)
          }).pipe(
            Effect.retry({ schedule: Schedule.intersect(Schedule.spaced("50 millis"), Schedule.recurs(400)) }),
            Effect.catchAll((seen) => Effect.dieMessage(`${wanted} is not on the screen, which shows:\n${seen}`))
          ),
        cursorIsShown: Effect.sync(() => tmux("display-message", "-p", "#{cursor_flag}").trim() === "1"),
        resize: (columns, rows) =>
          Effect.sync(() => void tmux("resize-window", "-x", String(columns), "-y", String(rows)))
      }
    })
  )
