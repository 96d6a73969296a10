import * as path from "node:path"
import { Effect } from "effect"
import { BootError } from "../errors.ts"
import type { LiveMountOption } from "../machine/mountOptions.ts"
import type { NetworkMode } from "../machine/Network.ts"
import type { Bundle } from "./Bundle.ts"

/** An effect on this host that the manifest records and a restore would have, and the option that asks for it. */
export interface Recorded {
  readonly effect: string
  readonly option: string
}

/** The options that ask for what a bundle records. */
export interface AskedFor {
  readonly liveMounts?: ReadonlyArray<LiveMountOption>
  readonly network?: NetworkMode
}

/** Effects that another user's bundle records and the options do not ask for. Empty for this user's own bundles. */
export const unasked = (
  { isOwn, manifest }: Bundle,
  { liveMounts = [], network }: AskedFor
): ReadonlyArray<Recorded> => {
  if (isOwn) return []
  const asked = new Set(liveMounts.map(({ guest }) => path.posix.normalize(guest).replace(/\/+$/, "")))
  const shares = (manifest.liveMounts ?? []).filter(({ guest }) => !asked.has(guest))
  return [
    ...(manifest.network === "nat" && network === undefined
      ? [{ effect: "connect its guest to this host's network", option: "--network nat (`network`)" }]
      : []),
    ...shares.map(({ guest, host, mode }) => ({
      effect: `share this host's ${host} with its guest at ${guest} (${mode})`,
      option: `--mount-live HOST:${guest}:ro (\`liveMounts\`)`
    }))
  ]
}

export const refuseUnasked = (bundle: Bundle, options: AskedFor): Effect.Effect<void, BootError> => {
  const wanted = unasked(bundle, options)
  return wanted.length === 0
    ? Effect.void
    : new BootError({
        code: "BOOT_SNAPSHOT_FOREIGN",
        message: `the bundle ${bundle.dir} is not one that this user's machinen made, and its manifest would ${wanted.map(({ effect }) => effect).join("; ")}`,
        hint: `if you want that and trust its maker, ask for it: ${wanted.map(({ option }) => option).join(", ")}`
      })
}
