import { Effect, Stream } from "effect"
import type { ShimHandle } from "../machine/Shim.ts"

/** The last lines of a guest's console, for an error to show; empty when they cannot be read within a second. */
export const consoleTail = ({ logs }: Pick<ShimHandle, "logs">): Effect.Effect<string> =>
  logs("console", { tailBytes: 4096 }).pipe(
    Stream.decodeText(),
    Stream.mkString,
    Effect.timeout("1 second"),
    Effect.orElseSucceed(() => "")
  )

/** The field of an error that shows what a console printed; none when it printed nothing. */
export const shownConsole = (console: string): { readonly console?: string } =>
  console.trim() === "" ? {} : { console }
