import { createRequire } from "node:module"

/** A program of this host in a terminal of its own. */
export interface HostPty {
  readonly pid: number
  readonly onData: (listener: (bytes: Buffer) => void) => void
  /** It has ended, and all it wrote has been handed out. */
  readonly onExit: (listener: (exit: { readonly exitCode: number; readonly signal?: number }) => void) => void
  readonly write: (bytes: Uint8Array) => void
  readonly resize: (columns: number, rows: number) => void
  readonly kill: (signal: NodeJS.Signals) => void
  readonly pause: () => void
  readonly resume: () => void
}

interface NodePty {
  readonly spawn: (
    file: string,
    args: ReadonlyArray<string>,
    options: {
      readonly name: string
      readonly cols: number
      readonly rows: number
      readonly cwd: string
      readonly env: Readonly<Record<string, string | undefined>>
      /** Bytes, not text. */
      readonly encoding: null
    }
  ) => HostPty
}

/** Loaded when it is used: it is native code, which nothing else needs. */
export const spawn: NodePty["spawn"] = (file, args, options) => {
  const pty: NodePty = createRequire(import.meta.url)("@lydell/node-pty")
  return pty.spawn(file, args, options)
}
