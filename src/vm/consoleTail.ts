import { Effect, Stream } from "effect"
import type { ShimHandle } from "../machine/Shim.ts"

/** The last 4 KiB of a guest's console, for an error. Empty when they cannot be read within a second. */
export const consoleTail = ({ logs }: Pick<ShimHandle, "logs">): Effect.Effect<string> =>
  logs("console", { tailBytes: 4096 }).pipe(
    Stream.decodeText(),
    Stream.mkString,
    Effect.timeout("1 second"),
    Effect.orElseSucceed(() => "")
  )

/** The `console` field of an error; absent when the console is empty. */
export const shownConsole = (console: string): { readonly console?: string } =>
  console.trim() === "" ? {} : { console }
