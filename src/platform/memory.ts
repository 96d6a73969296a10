import * as os from "node:os"
import { Effect } from "effect"

/** Physical memory of the host in bytes. */
export const totalBytes: Effect.Effect<number> = Effect.sync(() => os.totalmem())
