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

/** Logs from this level on are shown on stderr, whatever DEBUG says (`--log-level`). Default: warnings. */
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

/** The DEBUG namespace of a span: `rootfs-image` of `RootfsImage.ensure`, `boot` of `boot`. */
const namespaceOf = (span: string) => (span.split(".")[0] ?? span).replace(/(?<=[a-z])[A-Z]/g, "-$&").toLowerCase()

const howItEnded = (exit: Exit.Exit<unknown, unknown>) => {
  if (Exit.isSuccess(exit)) return ""
  if (Cause.isInterruptedOnly(exit.cause)) return ", interrupted"
  return `, failed: ${Cause.prettyErrors(exit.cause).map(({ message }) => message)}`
}

/** Logs each span when it ends, and passes it on to the other tracer. */
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
 * Shows Effect's logs and spans by the package `debug`: DEBUG=machinen:* all of them, DEBUG=machinen:registry those of one service or operation.
 * Without DEBUG, stderr shows what `shownFrom` says.
 */
export const layer = Layer.mergeAll(logger, Logger.minimumLogLevel(LogLevel.All), tracer)
