import { Effect } from "effect"
import { BootError } from "../errors.ts"

/** Tests by option name for values that can be honoured. */
type Supported = Readonly<Record<string, (value: unknown) => boolean>>
const any = () => true
const only = (wanted: unknown) => (value: unknown) => value === wanted

const startOptions: Supported = {
  name: any,
  env: any,
  portForward: any,
  onLog: any,
  detached: any,
  signal: any,
  timeoutMs: any
}
export const bootOptions: Supported = {
  ...startOptions,
  image: any,
  cmd: any,
  guestCwd: any,
  rootDisk: (value) => value === true || typeof value === "string",
  rootDiskSizeBytes: any,
  memory: any,
  vcpus: any,
  network: any,
  pdeathsig: only(true),
  mount: any,
  mountDiskUpperSizeBytes: any,
  liveMounts: any
}
export const restoreOptions: Supported = {
  ...startOptions,
  snapDir: any,
  image: any,
  lazy: any,
  liveMounts: any,
  memory: any,
  network: any
}
export const forkOptions: Supported = {
  ...startOptions,
  outDir: any,
  freeMemoryThreshold: any,
  engine: any,
  tcpKeep: any,
  lazy: any,
  liveMounts: any,
  lazyUmount: any
}
export const snapshotOptions: Supported = {
  outDir: any,
  engine: any,
  leaveRunning: any,
  tcpClose: any,
  lazyUmount: any,
  timeoutMs: any,
  onLog: any,
  signal: any
}
export const execOptions: Supported = {
  connectTimeoutMs: any,
  retryMs: any,
  execTimeoutMs: any,
  onStdout: any,
  onStderr: any,
  signal: any
}
export const provisionOptions: Supported = {
  base: any,
  install: any,
  out: any,
  cmd: any,
  env: any,
  scratchDiskSizeBytes: any,
  timeoutMs: any,
  onLog: any,
  signal: any
}
export const gcOptions: Supported = { dryRun: any }

/** Whether a value asks for nothing: it is undefined, or an empty list or object. */
const isNothing = (value: unknown) =>
  value === undefined || (typeof value === "object" && value !== null && Object.keys(value).length === 0)

export const refuseOthers = (what: string, options: object, supported: Supported): Effect.Effect<void, BootError> => {
  const refused = Object.entries(options).find(
    ([name, value]) => !isNothing(value) && (!Object.hasOwn(supported, name) || supported[name]?.(value) !== true)
  )
  if (refused === undefined) return Effect.void
  const [name, value] = refused
  const isKnown = Object.hasOwn(supported, name)
  return new BootError({
    code: "BOOT_OPTION_INVALID",
    message: `${what}() ${isKnown ? `cannot be given ${name}: ${String(value)}` : `has no option "${name}" in this version`}`,
    hint: `it takes: ${Object.keys(supported).join(", ")}`
  })
}
