import { inspect } from "node:util"
import createDebug from "debug"
import { Cause, Effect, Exit, FiberRef, FiberRefs, HashMap, Layer, Logger, LogLevel, Option, Tracer } from "effect"
import { format, isMachinenError } from "../errors.ts"
import { printable } from "../platform/printable.ts"

const channels = new Map<string, createDebug.Debugger>()
const channel = (name: string) => {
  const known = channels.get(name)
  if (known !== undefined) return known
  const made = createDebug(`machinen:${name}`)
  channels.set(name, made)
  return made
}

/** From which level on a log is shown on stderr whatever DEBUG says (`--log-level`). */
export const shownFrom: FiberRef.FiberRef<LogLevel.LogLevel> = FiberRef.unsafeMake<LogLevel.LogLevel>(LogLevel.Warning)

const asText = (part: unknown): string => {
  if (typeof part === "string") return part
  if (isMachinenError(part)) return format(part)
  return part instanceof Error ? part.message : inspect(part)
}

const logger = Logger.replace(
  Logger.defaultLogger,
  Logger.make(({ annotations, context, logLevel, message }) => {
    const service = Option.getOrElse(HashMap.get(annotations, "service"), () => "core")
    const parts = Array.isArray(message) ? message : [message]
    const level = logLevel.label.toLowerCase()
    const debug = channel(String(service))
    if (debug.enabled) {
      debug(
        ["%s", ...parts.map((part) => (typeof part === "string" ? "%s" : "%o"))].join(" "),
        level,
        ...parts.map((part) => (typeof part === "string" ? printable(part, { lines: true }) : part))
      )
    } else if (LogLevel.greaterThanEqual(logLevel, FiberRefs.getOrDefault(context, shownFrom))) {
      const text = parts.map((part) => printable(asText(part), { lines: true })).join(": ")
      process.stderr.write(`machinen: ${level}: ${text}\n`)
    }
  })
)

/** `RootfsImage.ensure` belongs to `rootfs-image`, `boot` to `boot`. */
const namespaceOf = (span: string) => (span.split(".")[0] ?? span).replace(/(?<=[a-z])[A-Z]/g, "-$&").toLowerCase()

const howItEnded = (exit: Exit.Exit<unknown, unknown>) => {
  if (Exit.isSuccess(exit)) return ""
  if (Cause.isInterruptedOnly(exit.cause)) return ", interrupted"
  return `, failed: ${Cause.prettyErrors(exit.cause).map(({ message }) => message)}`
}

/** Tells of each span when it ends, beside what another tracer does with it. */
const debugTracer = (other: Tracer.Tracer) =>
  Tracer.make({
    context: (f, fiber) => other.context(f, fiber),
    span: (name, ...rest) => {
      const span = other.span(name, ...rest)
      const debug = channel(namespaceOf(name))
      if (!debug.enabled) return span
      const end = span.end.bind(span)
      span.end = (endTime, exit) => {
        debug("%s took %d ms%s", name, Number((endTime - span.status.startTime) / 1000n) / 1000, howItEnded(exit))
        end(endTime, exit)
      }
      return span
    }
  })

const tracer = Layer.unwrapEffect(Effect.map(Effect.tracer, (other) => Layer.setTracer(debugTracer(other))))

/**
 * Effect's logs and spans by way of `debug`: DEBUG=machinen:* shows them, DEBUG=machinen:registry those of one service or operation. Without
 * DEBUG, warnings and errors are shown on stderr, or what `shownFrom` says.
 */
export const layer = Layer.mergeAll(logger, Logger.minimumLogLevel(LogLevel.All), tracer)
