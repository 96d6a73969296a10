/** A program of this host in a terminal, with the handle of a VM: for a VMM of one's own, and for `Sandboxes`. */
import { accessSync, constants, statSync } from "node:fs"
import * as os from "node:os"
import * as path from "node:path"
import { type Readable, Writable } from "node:stream"
import { Effect } from "effect"
import { BootError } from "../errors.ts"
import { checkSize } from "../guest/Terminal.ts"
import * as HostPty from "../platform/HostPty.ts"
import { TailReadable } from "../platform/TailReadable.ts"

export interface PtyBootOptions {
  /** Absolute, or relative to `cwd`. */
  readonly binary: string
  readonly args?: ReadonlyArray<string>
  /** Over this process's own. */
  readonly env?: Readonly<Record<string, string>>
  readonly cwd?: string
  /** Default 80 × 24. */
  readonly cols?: number
  readonly rows?: number
  /** TERM. Default `xterm-256color`. */
  readonly name?: string
}

export interface PtyVmHandle {
  readonly pid: number
  /** What is typed. */
  readonly stdin: Writable
  /** What the terminal shows. Before it is read its last 1 MiB is kept; from then on the program waits for its reader. */
  readonly stdout: Readable
  /** The same stream: a terminal has one. */
  readonly stderr: Readable
  /** The program is told by SIGWINCH. After its end nobody is. */
  readonly resize: (cols: number, rows: number) => void
  readonly wait: () => Promise<{ readonly code: number | null; readonly signal: NodeJS.Signals | null }>
  /** Ends it at once; completes when it is gone. */
  readonly kill: () => Promise<void>
  /** The last 1 MiB of what it has shown. */
  readonly output: () => Promise<string>
  readonly errorOutput: () => Promise<string>
}

const tailBytes = 1024 * 1024

/** It is hung up when this process ends. */
export const bootPty = (options: PtyBootOptions): PtyVmHandle => {
  const { args = [], cols = 80, cwd = process.cwd(), name = "xterm-256color", rows = 24 } = options
  const binary = path.resolve(cwd, options.binary)
  const bad = checkSize({ columns: cols, rows }) ?? checkBinary(binary)
  if (bad !== undefined) throw bad
  const pty = HostPty.spawn(binary, args, {
    name,
    cols,
    rows,
    cwd,
    env: { ...process.env, TERM: name, ...options.env },
    encoding: null
  })

  const screen = new TailReadable(tailBytes)
  pty.onData((bytes) => {
    pty.pause()
    Effect.runCallback(screen.write(bytes), { onExit: () => pty.resume() })
  })
  const stdin = new Writable({
    write: (chunk: Buffer, _encoding, done) => {
      pty.write(chunk)
      done()
    }
  })
  let isOver = false
  const ended = new Promise<Awaited<ReturnType<PtyVmHandle["wait"]>>>((resolve) => {
    pty.onExit(({ exitCode, signal = 0 }) => {
      isOver = true
      stdin.destroy()
      Effect.runSync(screen.end)
      resolve(signal === 0 ? { code: exitCode, signal: null } : { code: null, signal: signalNames.get(signal) ?? null })
    })
  })
  const shown = async () => screen.tail.toString()
  return {
    pid: pty.pid,
    stdin,
    stdout: screen,
    stderr: screen,
    resize: (columns, rows) => {
      const bad = checkSize({ columns, rows })
      if (bad !== undefined) throw bad
      if (!isOver) pty.resize(columns, rows)
    },
    wait: () => ended,
    kill: async () => {
      if (!isOver) pty.kill("SIGKILL")
      Effect.runSync(screen.unlimit)
      await ended
    },
    output: shown,
    errorOutput: shown
  }
}

const signalNames = new Map(
  Object.entries(os.constants.signals).map(([name, number]) => [number, name as NodeJS.Signals] as const)
)

/** A terminal tells of a program that is not there only by text in it. */
const checkBinary = (binary: string): BootError | undefined => {
  try {
    accessSync(binary, constants.X_OK)
    if (statSync(binary).isFile()) return undefined
  } catch {
    // said below
  }
  return new BootError({
    code: "BOOT_VMM_MISSING",
    message: `${binary} is not there, or no program that may be run`,
    hint: "`binary` is absolute, or relative to `cwd`; it is not looked up in PATH"
  })
}
