import createDebug from "debug"
import { HashMap, Logger, LogLevel, Option } from "effect"

const channels = new Map<string, createDebug.Debugger>()
const channel = (name: string) => {
  const known = channels.get(name)
  if (known !== undefined) return known
  const made = createDebug(name)
  channels.set(name, made)
  return made
}

/** Effect's logs by way of `debug`: DEBUG=machinen:* shows them, DEBUG=machinen:boot one service's, and nothing is printed otherwise. */
export const layer = Logger.replace(
  Logger.defaultLogger,
  Logger.make(({ annotations, logLevel, message }) => {
    const service = Option.getOrElse(HashMap.get(annotations, "service"), () => "core")
    channel(`machinen:${String(service)}`)("%s %o", logLevel.label.toLowerCase(), message)
  })
)

/** As much as `debug` may be asked for; what it is not asked for costs a look-up. */
export const minimumLevel = Logger.minimumLogLevel(LogLevel.Debug)
