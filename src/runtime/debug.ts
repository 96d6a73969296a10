import createDebug from "debug"
import { Cause, Effect, Exit, HashMap, Layer, Logger, LogLevel, Option, Tracer } from "effect"

const channels = new Map<string, createDebug.Debugger>()
const channel = (name: string) => {
  const known = channels.get(name)
  if (known !== undefined) return known
  const made = createDebug(`machinen:${name}`)
  channels.set(name, made)
  return made
}

const logger = Logger.replace(
  Logger.defaultLogger,
  Logger.make(({ annotations, logLevel, message }) => {
    const service = Option.getOrElse(HashMap.get(annotations, "service"), () => "core")
    const parts = Array.isArray(message) ? message : [message]
    const format = ["%s", ...parts.map((part) => (typeof part === "string" ? "%s" : "%o"))].join(" ")
    channel(String(service))(format, logLevel.label.toLowerCase(), ...parts)
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
const telling = (other: Tracer.Tracer) =>
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

const tracer = Layer.unwrapEffect(Effect.map(Effect.tracer, (other) => Layer.setTracer(telling(other))))

/**
 * Effect's logs and spans by way of `debug`: DEBUG=machinen:* shows them, DEBUG=machinen:registry those of one service or operation, and
 * nothing is printed otherwise. Logs of all levels reach it: what is shown is for `debug` to choose.
 */
export const layer = Layer.mergeAll(logger, Logger.minimumLogLevel(LogLevel.Debug), tracer)
