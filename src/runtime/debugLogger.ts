import createDebug from "debug"
import { HashMap, Layer, Logger, LogLevel, Option } from "effect"

const channels = new Map<string, createDebug.Debugger>()
const channel = (name: string) => {
  const known = channels.get(name)
  if (known !== undefined) return known
  const made = createDebug(name)
  channels.set(name, made)
  return made
}

const throughDebug = Logger.replace(
  Logger.defaultLogger,
  Logger.make(({ annotations, logLevel, message }) => {
    const service = Option.getOrElse(HashMap.get(annotations, "service"), () => "core")
    channel(`machinen:${String(service)}`)("%s %o", logLevel.label.toLowerCase(), message)
  })
)

/**
 * Effect's logs by way of `debug`: DEBUG=machinen:* shows them, DEBUG=machinen:boot one service's, and nothing is printed otherwise. All
 * levels reach it: what is shown is for `debug` to choose.
 */
export const layer = Layer.merge(throughDebug, Logger.minimumLogLevel(LogLevel.Debug))
